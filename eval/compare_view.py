"""A comparison of two runs for people: terminal, Markdown, HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.report import folded, markdown_table, text
from eval.report_html import page
from eval.report_view import ROW, Cell, Column, TableView, arrow_of, bar_of
from eval.report_words import DASH, Scale, count, mark_of, milliseconds, plural, size
from mmlm_efficient.errors import RunError
from mmlm_efficient.files import write_json, write_text

Comparison = Mapping[str, Any]
_COLOURS = {"better": "green", "worse": "red", "": ""}


def compare_tables(result: Comparison) -> list[Table]:
    """A table per task for the terminal.

    Args:
        result: of `compare.compare`.
    """
    tables = []
    for task in result["tasks"]:
        view = task_view(task)
        table = Table(title=Text(_heading(task)), caption=Text("\n".join(task["notes"])))
        for number, column in enumerate(view.columns):
            table.add_column(Text(column.name), justify="right" if number else "left")
        for row in view.rows:
            table.add_row(*(_rich(cell) for cell in row))
        tables.append(table)
    rest = [*result["warnings"], *_only_words(result)]
    if rest:
        table = Table("beside the scores", show_header=True)
        for one in rest:
            table.add_row(Text(one))
        tables.append(table)
    return tables


def write_comparison(folder: Path, result: Comparison) -> list[Path]:
    """Write compare.json, compare.md and compare.html.

    Args:
        folder: is made if missing.
        result: of `compare.compare`.

    Raises:
        RunError: a file cannot be written.
    """
    files = [folder / f"compare.{kind}" for kind in ("json", "md", "html")]
    try:
        write_json(files[0], result)
        write_text(files[1], comparison_markdown(result))
        write_text(files[2], comparison_html(result))
    except OSError as error:
        raise RunError(
            f"{folder}: the comparison cannot be written: {error.strerror or error}. Make room, "
            "or choose another --out."
        ) from error
    return files


# -- words and tables ---------------------------------------------------------------------------


def summary(result: Comparison) -> list[str]:
    """The comparison in a few sentences."""
    if not result["tasks"]:
        return ["The two runs have nothing to compare."]
    sentences = []
    for task in result["tasks"]:
        scale, marks = _scale(task), []
        for row in task["rows"]:
            mark = _mark(task, row)
            if mark:
                change = scale.signed(row["difference"]["value"])
                marks.append(f"{row['row']} is {mark} ({change}{scale.unit})")
        rows = plural(len(task["rows"]), "row")
        known = any(row["difference"]["interval"] for row in task["rows"])
        clear = "; ".join(marks) or ("no clear difference" if known else "no intervals to judge by")
        changed = sum((row["answers"] or {}).get("changed", 0) for row in task["rows"])
        compared = sum((row["answers"] or {}).get("compared", 0) for row in task["rows"])
        answers = f" {changed:,} of {compared:,} answers changed." if compared else ""
        sentences.append(f"{_heading(task)}, {rows}: {clear}.{answers}")
    return sentences


def task_view(task: Mapping[str, Any]) -> TableView:
    """The rows of a task side by side."""
    scale = _scale(task)
    found = [0.0]
    for row in task["rows"]:
        found += [*(row["difference"]["interval"] or ()), row["difference"]["value"] or 0.0]
    ends = min(found), max(found)
    columns = (
        ROW,
        Column("first", f"{scale.named(task['metric'])}; 95 % interval"),
        Column("second", f"{scale.named(task['metric'])}; 95 % interval"),
        Column("difference", "second less first; 95 % interval"),
        Column("tokens per layer", "visual tokens entering a decoder layer, first and second"),
        Column("TTFT, ms", "median time to the first token, first and second"),
        Column("KV cache", "keys and values per sample, first and second"),
        Column("answers changed", "of the samples that both answered"),
    )
    return TableView(columns, tuple(_cells(task, row, scale, ends) for row in task["rows"]))


def _cells(
    task: Mapping[str, Any], row: Mapping[str, Any], scale: Scale, ends: tuple[float, float]
) -> tuple[Cell, ...]:
    a, b, ratios, answers = row["a"], row["b"], row["ratios"], row["answers"]
    changed = DASH if answers is None else f"{answers['changed']:,} of {answers['compared']:,}"
    return (
        Cell(row["row"]),
        Cell(scale.score(a["value"]), scale.interval(a["interval"]), a["value"]),
        Cell(scale.score(b["value"]), scale.interval(b["interval"]), b["value"]),
        _difference(task, row, scale, ends),
        _pair(a, b, ratios, "visual_tokens_mean", count),
        _pair(a, b, ratios, "ttft_s", milliseconds),
        _pair(a, b, ratios, "kv_bytes", size),
        Cell(changed, "", None if answers is None else answers["changed"]),
    )


def _difference(
    task: Mapping[str, Any], row: Mapping[str, Any], scale: Scale, ends: tuple[float, float]
) -> Cell:
    change = row["difference"]
    value, interval = change["value"], change["interval"]
    if value is None:
        return Cell(DASH)
    mark = _mark(task, row)
    paired = "" if change["paired"] else "not paired"
    notes = [scale.interval(interval, signed=True), paired]
    if change["paired"] and change["note"]:
        notes.append(change["note"])
    return Cell(
        scale.signed(value),
        ", ".join(one for one in notes if one),
        value,
        mark,
        arrow_of(value) if mark else "",
        bar_of(value, interval, ends),
    )


def _pair(
    a: Mapping[str, Any], b: Mapping[str, Any], ratios: Mapping[str, Any], name: str, write: Any
) -> Cell:
    ratio = ratios[name]
    if a[name] is None and b[name] is None:
        return Cell(DASH)
    words = write(a[name]) if a[name] == b[name] else f"{write(a[name])} → {write(b[name])}"
    return Cell(words, "" if ratio is None or a[name] == b[name] else f"{ratio:.2f}×", b[name])


def _mark(task: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    return mark_of(row["difference"]["interval"], higher_is_better=task["higher_is_better"])


def _scale(task: Mapping[str, Any]) -> Scale:
    values = [row[side]["value"] for row in task["rows"] for side in ("a", "b")]
    return Scale.of(values, task.get("percent"))


def _heading(task: Mapping[str, Any]) -> str:
    run = f"{task['run']}: " if task["run"] else ""
    return f"{run}{task['task']}"


def _only_words(result: Comparison) -> list[str]:
    words = []
    for side, name in (("only_a", "first"), ("only_b", "second")):
        for one in result[side]:
            what = f"task {one['task']}" if one["row"] is None else f"{one['task']}: {one['row']}"
            words.append(f"Only in the {name} run: {what}")
    return words


def _rich(cell: Cell) -> Text:
    arrow = f"{cell.arrow} " if cell.arrow else ""
    found = Text(f"{arrow}{cell.text}", style=_COLOURS[cell.mark])
    if cell.note:
        found.append(f"\n{cell.note}", style="dim")
    return found


def _examples(task: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Heads and examples of changed answers, of rows that have some."""
    found = []
    for row in task["rows"]:
        answers = row["answers"] or {}
        if answers.get("examples"):
            shown, changed = len(answers["examples"]), answers["changed"]
            first = f", the first {shown}" if shown < changed else ""
            name = f"{row['row']}: {plural(changed, 'changed answer')}{first}"
            found.append((name, answers["examples"]))
    return found


def _failed(task: Mapping[str, Any]) -> list[str]:
    """Rows in which one side failed where the other did not."""
    words = []
    for row in task["rows"]:
        answers = row["answers"] or {}
        for side, name in (("failed_a", "first"), ("failed_b", "second")):
            if answers.get(side):
                number = plural(answers[side], "sample")
                words.append(f"{row['row']}: {number} failed in the {name} run alone.")
    return words


def _sides(result: Comparison) -> list[tuple[str, str]]:
    sides = []
    for side, name in (("a", "first"), ("b", "second")):
        one = result[side]
        facts = (one["name"], one["path"], one.get("date"), f"configuration {one['config_sha']}")
        sides.append((name, " · ".join(str(fact) for fact in facts if fact)))
    return sides


# -- files --------------------------------------------------------------------------------------


def comparison_markdown(result: Comparison) -> str:
    """The comparison in GitHub's Markdown."""
    parts = ["# Comparison of two runs"]
    parts.append("\n".join(f"- {name}: {text(facts)}" for name, facts in _sides(result)))
    parts += [text(sentence) for sentence in summary(result)]
    parts += [f"> {text(one)}" for one in result["warnings"]]
    for task in result["tasks"]:
        parts += [f"## {text(_heading(task))}", *(text(one) for one in task["notes"])]
        parts += [markdown_table(task_view(task)), *(text(one) for one in _failed(task))]
        for name, examples in _examples(task):
            lines = ["| sample | right answer | first | second |", "|---|---|---|---|"]
            for one in examples:
                facts = (one["id"], one["target"], one["a"], one["b"])
                lines.append("| " + " | ".join(text(fact) for fact in facts) + " |")
            parts.append(folded(name, "\n".join(lines)))
    only = _only_words(result)
    if only:
        parts += ["## Without a counterpart", "\n".join(f"- {text(one)}" for one in only)]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_html(result: Comparison) -> str:
    """The comparison as one page that needs nothing else."""
    sections = [
        {
            "heading": _heading(task),
            "metric": _scale(task).named(task["metric"]),
            "direction": "higher" if task["higher_is_better"] else "lower",
            "notes": [*task["notes"], *_failed(task)],
            "table": task_view(task),
            "examples": _examples(task),
        }
        for task in result["tasks"]
    ]
    return page(
        "compare.html.jinja",
        title="Comparison of two runs",
        meta=str(result["date"]),
        sides=_sides(result),
        summary=summary(result),
        warnings=result["warnings"],
        sections=sections,
        only=_only_words(result),
    )
