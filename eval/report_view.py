"""What a report says, as text in tables: the same for Markdown and HTML, before any markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report_words import (
    DASH,
    Mark,
    Scale,
    count,
    digits,
    mark_of,
    metric_of,
    milliseconds,
    plural,
    score_of,
    share,
    size,
    task_scale,
    times,
)

VANILLA = "none"
Row = Mapping[str, Any]
TaskResult = Mapping[str, Any]
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """A difference with its interval and zero, as places between the column's ends, 0 to 1."""

    low: float
    value: float
    high: float
    zero: float


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        text: what it says.
        note: in smaller print, such as the interval.
        sort: what the column is sorted by; None for text and for what was not measured.
        mark: whether a difference is one.
        arrow: before the text of a difference that is one, which way it goes.
        bar: the difference drawn.
    """

    text: str
    note: str = ""
    sort: float | None = None
    mark: Mark = ""
    arrow: str = ""
    bar: Bar | None = None


@dataclass(frozen=True)
class Column:
    """Head of a column: what it holds, what that means, and a word below the name."""

    name: str
    help: str = ""
    under: str = ""


@dataclass(frozen=True)
class TableView:
    """A table of texts.

    Attributes:
        columns: heads.
        rows: cells, as many as columns; the first one names the row.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Facts:
    """One row of a task beside the task's stock model; ends: of all differences of the task."""

    task: TaskResult
    scale: Scale
    row: Row
    vanilla: Row
    ends: tuple[float, float] = (0.0, 0.0)

    @property
    def changed(self) -> Mapping[str, Any]:
        """Its paired difference to the stock model; empty for the stock model itself."""
        return self.row.get("to_vanilla") or {}


def row_of(task: TaskResult, label: str) -> Row | None:
    """A row by its label."""
    return next((row for row in task["rows"] if row["row"] == label), None)


def is_vanilla(row: Row) -> bool:
    """Whether a row is the stock model."""
    return bool(row["row"] == VANILLA)


def ttft_s(row: Row) -> float | None:
    """Median time to the first token, seconds."""
    found: float | None = (row.get("ttft_s") or {}).get("median")
    return found


# -- the table of a task ------------------------------------------------------------------------

ROW = Column("row", "method and budget; none is the stock model")


def task_table(task: TaskResult) -> TableView:
    """Everything measured in one task, one line per row."""
    scale = task_scale(task)
    columns = dict(_columns(task, scale))
    vanilla = row_of(task, VANILLA) or {}
    found = [0.0, *(end for row in task["rows"] for end in _ends(row))]
    ends = min(found), max(found)
    lines = []
    for row in task["rows"]:
        facts = Facts(task, scale, row, vanilla, ends)
        lines.append((Cell(row["row"]), *(cell(facts) for cell in columns.values())))
    return TableView((ROW, *columns), tuple(lines))


def _columns(task: TaskResult, scale: Scale) -> list[tuple[Column, Callable[[Facts], Cell]]]:
    paper = [(Column("paper", "the paper's number, and ours minus it"), _paper_cell)]
    direction = "higher" if task.get("higher_is_better", True) else "lower"
    return [
        (Column(scale.named(task["metric"]), f"{direction} is better; 95 % interval"), _score_cell),
        (Column("to none", "paired difference to the stock model; 95 % interval"), _change_cell),
        *(paper if task.get("expected") else []),
        (Column("tokens in", "visual tokens before pruning, per sample"), _tokens_in_cell),
        (Column("kept", "visual tokens that enter the language model"), _kept_cell),
        (Column("per layer", "visual tokens entering a decoder layer, averaged"), _mean_cell),
        (Column("TTFT, ms", "time to the first token, median; beside that of none"), _ttft_cell),
        (Column("decode, tok/s", "further tokens per second of decoding"), _decode_cell),
        (Column("prune, ms", "scoring and cutting, median; part of TTFT"), _prune_cell),
        (Column("peak memory", "high-water mark, weights included"), _peak_cell),
        (Column("KV cache", "keys and values per sample"), _kv_cell),
        (Column("samples", "answered, and failed ones"), _samples_cell),
    ]


def _ends(row: Row) -> list[float]:
    change = row.get("to_vanilla") or {}
    return [*(change.get("interval") or ()), change.get("difference") or 0.0]


def _score_cell(facts: Facts) -> Cell:
    found, scale = metric_of(facts.task, facts.row), facts.scale
    value = found.get("value")
    return Cell(scale.score(value), scale.interval(found.get("interval")), value)


def _change_cell(facts: Facts) -> Cell:
    if is_vanilla(facts.row) or facts.changed.get("difference") is None:
        return Cell(DASH)
    difference, interval = facts.changed["difference"], facts.changed.get("interval")
    higher = bool(facts.task.get("higher_is_better", True))
    mark = mark_of(interval, higher_is_better=higher)
    return Cell(
        facts.scale.signed(difference),
        facts.scale.interval(interval, signed=True),
        difference,
        mark,
        arrow_of(difference) if mark else "",
        bar_of(difference, interval, facts.ends),
    )


def arrow_of(difference: float) -> str:
    """Which way a difference goes."""
    return "▲" if difference > 0 else "▼"


def bar_of(value: float, interval: Sequence[float] | None, ends: tuple[float, float]) -> Bar | None:
    """A difference drawn between the ends of its column, 0 among them; None if all are 0."""
    first, last = ends
    if first == last:
        return None
    low, high = interval or (value, value)
    low, value, high, zero = ((one - first) / (last - first) for one in (low, value, high, 0.0))
    return Bar(low, value, high, zero)


def expected_of(task: TaskResult, label: str) -> float | None:
    """The paper's number for a row, on the scale of the measured values.

    A task may say by what its values are multiplied to be on the paper's scale. Where it does not,
    papers print percent: if all measured values are shares of 1, and a paper's number is not, it
    is taken as percent.
    """
    expected = task.get("expected") or {}
    entry = expected.get(label) or {}
    if entry.get("value") is None:
        return None
    known = [one["value"] for one in expected.values() if one.get("value") is not None]
    factor = entry.get("scale") or 1.0
    if factor == 1 and task_scale(task).percent and max(known) > 1:
        factor = 100.0
    return float(entry["value"]) / factor


def _paper_cell(facts: Facts) -> Cell:
    value = expected_of(facts.task, facts.row["row"])
    measured = score_of(facts.task, facts.row)
    if value is None:
        return Cell(DASH)
    note = "" if measured is None else facts.scale.signed(measured - value)
    return Cell(facts.scale.score(value), note, value)


def _tokens_in_cell(facts: Facts) -> Cell:
    value = facts.row.get("visual_tokens_in")
    return Cell(count(value), "", value)


def _kept_cell(facts: Facts) -> Cell:
    value = facts.row.get("visual_tokens_kept")
    return Cell(count(value), share(value, facts.row.get("visual_tokens_in")), value)


def _mean_cell(facts: Facts) -> Cell:
    value = facts.row.get("visual_tokens_mean")
    return Cell(count(value), share(value, facts.row.get("visual_tokens_in")), value)


def _ttft_cell(facts: Facts) -> Cell:
    value = ttft_s(facts.row)
    note = "" if is_vanilla(facts.row) else times(value, ttft_s(facts.vanilla))
    return Cell(milliseconds(value), note, value)


def _decode_cell(facts: Facts) -> Cell:
    value = facts.row.get("decode_tokens_per_s")
    return Cell(digits(value), "", value)


def _prune_cell(facts: Facts) -> Cell:
    value = facts.row.get("prune_s")
    return Cell(milliseconds(value), "", value)


def _peak_cell(facts: Facts) -> Cell:
    value = facts.row.get("peak_memory_bytes")
    return Cell(size(value), "", value)


def _kv_cell(facts: Facts) -> Cell:
    value = facts.row.get("kv_bytes")
    note = "" if is_vanilla(facts.row) else times(value, facts.vanilla.get("kv_bytes"))
    return Cell(size(value), note, value)


def _samples_cell(facts: Facts) -> Cell:
    failed = facts.row.get("failed") or 0
    text = count(facts.row.get("samples"))
    return Cell(text, f"{failed:,} failed" if failed else "", facts.row.get("samples"))


# -- other tables -------------------------------------------------------------------------------


def group_table(task: TaskResult) -> TableView | None:
    """Scores by group of samples, one line per row; None where a task has no groups."""
    names = list(dict.fromkeys(name for row in task["rows"] for name in row.get("groups") or {}))
    if not names:
        return None
    scale, columns = task_scale(task), [ROW]
    for name in names:
        sizes = [(row.get("groups") or {}).get(name, {}).get("count") for row in task["rows"]]
        most = max((one for one in sizes if one is not None), default=None)
        columns.append(Column(name, under="" if most is None else plural(most, "sample")))
    lines = []
    for row in task["rows"]:
        cells = [Cell(row["row"])]
        for name in names:
            found = (row.get("groups") or {}).get(name) or {}
            value = found.get("value")
            cells.append(Cell(scale.score(value), scale.interval(found.get("interval")), value))
        lines.append(tuple(cells))
    return TableView(tuple(columns), tuple(lines))


def overview_table(tasks: Sequence[TaskResult]) -> TableView | None:
    """Scores of all tasks of one run side by side; None for fewer than two."""
    if len(tasks) < 2:
        return None
    labels = list(dict.fromkeys(row["row"] for task in tasks for row in task["rows"]))
    columns = [ROW]
    for task in tasks:
        columns.append(Column(task["task"], under=task_scale(task).named(task["metric"])))
    lines = []
    for label in labels:
        cells = [Cell(label)]
        for task in tasks:
            scale, row = task_scale(task), row_of(task, label)
            if row is None:
                cells.append(Cell(DASH))
                continue
            change = row.get("to_vanilla") or {}
            difference, value = change.get("difference"), score_of(task, row)
            mark = mark_of(
                change.get("interval"), higher_is_better=bool(task.get("higher_is_better", True))
            )
            note = "" if difference is None else scale.signed(difference)
            if mark and difference is not None:
                note = f"{arrow_of(difference)} {note}"
            cells.append(Cell(scale.score(value), note, value, mark))
        lines.append(tuple(cells))
    return TableView(tuple(columns), tuple(lines))


def by_run(report: Report) -> dict[str, list[TaskResult]]:
    """The tasks of every run, in order."""
    found: dict[str, list[TaskResult]] = {}
    for task in report["tasks"]:
        found.setdefault(task["run"], []).append(task)
    return found
