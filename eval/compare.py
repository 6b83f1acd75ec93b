"""Two runs side by side: what changed, and whether it did.

Where both runs asked the same samples of the same data, differences are paired, sample by sample,
which finds much smaller ones than the two intervals could.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.compare_view import compare_tables, write_comparison
from eval.compare_warnings import all_warnings
from eval.report import read_report, report_folder
from eval.report_view import Report, Row, TaskResult, row_of, ttft_s
from eval.report_words import file_name, in_words, metric_of, plural
from eval.samples_log import read_records
from eval.statistics import paired_interval
from mmlm_efficient.errors import DataError
from mmlm_efficient.machine import now_text

__all__ = ["compare", "compare_tables", "write_comparison"]

FORMAT = 1
EXAMPLES = 20  # of changed answers, per row
_FIGURES = (
    "visual_tokens_in",
    "visual_tokens_kept",
    "visual_tokens_mean",
    "kv_bytes",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "prune_s",
)
Records = dict[tuple[str, str], dict[str, Any]]


@dataclass
class _Side:
    """One of the two runs.

    Attributes:
        folder: its files.
        report: what report.json holds.
        tasks: results by (run, task); the run is "" where there is only one.
    """

    path: Path
    folder: Path
    report: Report
    tasks: dict[tuple[str, str], TaskResult] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Side:
        report = read_report(path)
        return cls(path, report_folder(path), report)

    def number(self, with_runs: bool) -> None:
        """Set `tasks`."""
        for task in self.report["tasks"]:
            self.tasks[task["run"] if with_runs else "", task["task"]] = task

    def records(self, task: TaskResult) -> tuple[dict[str, Any], Records] | None:
        """Header and records of a task by (row, id); None if the samples file is not there.

        A file may hold more samples than the task's figures are of: those of an earlier run with a
        larger limit, before it was resumed. They are left out.
        """
        path = self._file(task, "samples.jsonl")
        if not path.is_file():
            return None
        header, records = read_records(path)
        ids = self._ids(task)
        return header, {
            (one["row"], one["id"]): one for one in records if ids is None or one["id"] in ids
        }

    def is_of(self, task: TaskResult, records: Records) -> bool:
        """Whether records can be those of a task's figures, by how many samples there are."""
        asked: int | None = task.get("samples")
        ids = self._ids(task)
        if asked is None:
            return True
        if ids is None:
            return len({one for _, one in records}) <= asked
        return len(ids) == asked

    def _file(self, task: TaskResult, kind: str) -> Path:
        return self.folder / str(task["run"]) / f"{file_name(task['task'])}.{kind}"

    def _ids(self, task: TaskResult) -> frozenset[str] | None:
        """The samples that a task's figures are of; None if its results file does not say."""
        path = self._file(task, "results.json")
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}). Write it again by resuming its run."
            ) from error
        ids = result.get("ids") if isinstance(result, dict) else None
        if ids is None:
            return None
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
            raise DataError(
                f"{path}: is damaged, ids is no list of texts. Write it again by resuming its run."
            )
        return frozenset(ids)


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Put two runs side by side; differences are the second less the first.

    Tasks are matched by name, rows by label; where a run evaluated several models, these by name
    too.

    Args:
        first: folder of a run, or its report.json.
        second: of the other.

    Returns:
        {"format": 1, "kind": "comparison", "date", "a" and "b": {"path", "date", "name",
        "config_sha"}, "warnings": texts, "tasks": [{"task", "run" (None if
        each has but one), "runs": of the first and second, "metric", "higher_is_better",
        "percent", "notes", "rows": [{"row", "a" and "b": figures, "difference": {"value",
        "interval", "paired", "pairs", "note"}, "ratios": {"ttft_s", ...}, "answers": {"compared",
        "changed", "failed_a", "failed_b", "examples": [{"id", "target", "a", "b"}]} or None}]}],
        "only_a" and "only_b": [{"run", "task", "row" or None}]}. Figures that were not
        measured are None.

    Raises:
        DataError: one of the two is no report, damaged, or of another format; or a samples file is
            damaged.
    """
    a, b = _Side.read(first), _Side.read(second)
    several = any(len(set(side.report["runs"])) > 1 for side in (a, b))
    a.number(several)
    b.number(several)
    shared = [key for key in a.tasks if key in b.tasks]
    tasks = [_task(a, b, key) for key in shared]
    return {
        "format": FORMAT,
        "kind": "comparison",
        "date": now_text(),
        "a": _about(a),
        "b": _about(b),
        "warnings": all_warnings(
            a.report, b.report, [(key[0], (a.tasks[key], b.tasks[key])) for key in shared]
        ),
        "tasks": tasks,
        "only_a": _only(a, b),
        "only_b": _only(b, a),
    }


def _about(side: _Side) -> dict[str, Any]:
    report = side.report
    name = report.get("name") or ", ".join(report["runs"])
    facts = {key: report.get(key) for key in ("date", "config_sha")}
    return {"path": str(side.path), "name": name, **facts}


def _only(side: _Side, other: _Side) -> list[dict[str, Any]]:
    """Tasks, and rows of shared tasks, that the other side does not have."""
    found: list[dict[str, Any]] = []
    for key, task in side.tasks.items():
        where = {"run": task["run"], "task": task["task"]}
        if key not in other.tasks:
            found.append({**where, "row": None})
            continue
        for row in task["rows"]:
            if row_of(other.tasks[key], row["row"]) is None:
                found.append({**where, "row": row["row"]})
    return found


# -- one task -----------------------------------------------------------------------------------


def _task(a: _Side, b: _Side, key: tuple[str, str]) -> dict[str, Any]:
    task_a, task_b = a.tasks[key], b.tasks[key]
    metric, notes = task_a["metric"], []
    if task_b["metric"] != metric:
        notes.append(f"The second run shows {task_b['metric']}; compared is {metric}.")
        task_b = {**task_b, "metric": metric}
    pairing, reason = _pairing(a, b, task_a, task_b)
    if reason:
        notes.append(f"Not paired: {reason}.")
    rows = []
    for row in task_a["rows"]:
        other = row_of(task_b, row["row"])
        if other is not None:
            rows.append(_row(task_a, task_b, row, other, pairing, reason))
    return {
        "task": task_a["task"],
        "run": key[0] or None,
        "runs": [task_a["run"], task_b["run"]],
        "metric": metric,
        "higher_is_better": bool(task_a.get("higher_is_better", True)),
        "percent": _percent(task_a, b.tasks[key]),
        "notes": notes,
        "rows": rows,
    }


def _percent(a: TaskResult, b: TaskResult) -> bool | None:
    """Whether the compared figures are shares of 1, if the reports say so."""
    said = [task.get("percent") for task in (a, b) if task["metric"] == a["metric"]]
    known = [one for one in said if one is not None]
    return all(known) if known else None


@dataclass(frozen=True)
class _Pairing:
    """Records of both sides on the same data, by (row, id)."""

    a: Records
    b: Records

    def ids(self, row: str) -> list[str]:
        """Samples of a row that both sides have, failed ones too, in the first one's order."""
        return [one for label, one in self.a if label == row and (label, one) in self.b]


def _pairing(
    a: _Side, b: _Side, task_a: TaskResult, task_b: TaskResult
) -> tuple[_Pairing | None, str]:
    """The records to pair, or why there are none."""
    sha = task_a.get("data_sha")
    if sha is None or sha != task_b.get("data_sha"):
        return None, "the runs asked about different data"
    found_a, found_b = a.records(task_a), b.records(task_b)
    for name, found in (("first", found_a), ("second", found_b)):
        if found is None:
            return None, f"the {name} run's file of samples is not there"
        if found[0].get("data_sha") != sha:
            return None, f"the {name} run's file of samples is of other data than its report"
    for name, side, task, found in (
        ("first", a, task_a, found_a),
        ("second", b, task_b, found_b),
    ):
        if found is not None and not side.is_of(task, found[1]):
            return None, f"the {name} run's files hold other samples than its report counts"
    if found_a is None or found_b is None:  # said above
        return None, ""
    return _Pairing(found_a[1], found_b[1]), ""


def _row(
    task_a: TaskResult,
    task_b: TaskResult,
    a: Row,
    b: Row,
    pairing: _Pairing | None,
    reason: str,
) -> dict[str, Any]:
    figures_a, figures_b = _figures(task_a, a), _figures(task_b, b)
    difference = None
    if pairing is not None:
        values = figures_a["value"], figures_b["value"]
        difference, reason = _paired(task_a["metric"], a["row"], pairing, values)
    if difference is None:
        difference = _unpaired(figures_a, figures_b, reason)
    names = (*_FIGURES, "ttft_s")
    return {
        "row": a["row"],
        "a": figures_a,
        "b": figures_b,
        "difference": difference,
        "ratios": {name: _ratio(figures_b[name], figures_a[name]) for name in names},
        "answers": None if pairing is None else _answers(a["row"], pairing),
    }


def _figures(task: TaskResult, row: Row) -> dict[str, Any]:
    found = metric_of(task, row)
    return {
        "value": found.get("value"),
        "interval": found.get("interval"),
        "samples": row.get("samples"),
        "failed": row.get("failed"),
        **{name: row.get(name) for name in _FIGURES},
        "ttft_s": ttft_s(row),
    }


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else round(value / base, 4)


def _paired(
    metric: str, row: str, pairing: _Pairing, values: tuple[float | None, float | None]
) -> tuple[dict[str, Any] | None, str]:
    """The paired difference of a row, or why there is none."""
    scores_a, scores_b = (_scores(records, row, metric) for records in (pairing.a, pairing.b))
    unit = _unit((scores_a, values[0]), (scores_b, values[1]))
    if unit is None:
        return None, "the score is not the mean of the samples' own scores"
    both = [one for one in scores_a if one in scores_b]
    if not both:
        return None, "no sample was answered and scored by both"
    found = paired_interval(
        [scores_b[one] for one in both],
        [scores_a[one] for one in both],
        [pairing.a[row, one].get("cluster") for one in both],
    )
    interval = found.interval
    most = len({*scores_a, *scores_b})
    note = f"{len(both):,} of {plural(most, 'sample')}" if len(both) < most else None
    ends = None
    if interval is not None:
        ends = [round(interval.low * unit, 6), round(interval.high * unit, 6)]
    return {
        "value": round(found.difference * unit, 6),
        "interval": ends,
        "interval_kind": None if interval is None else interval.kind,
        "paired": True,
        "pairs": len(both),
        "note": note,
    }, ""


def _scores(records: Records, row: str, metric: str) -> dict[str, float]:
    """Scores of a row by sample, those that are numbers."""
    found = {}
    for (label, one), record in records.items():
        number = _number(record, metric) if label == row and record["ok"] else None
        if number is not None:
            found[one] = number
    return found


def _unit(*sides: tuple[Mapping[str, float], float | None]) -> float | None:
    """What the mean of the samples' scores is multiplied by to be the score: 1, or 100 for
    percent; None if the score is something else on one of the sides."""
    for unit in (1.0, 100.0):
        if all(
            scores
            and value is not None
            and abs(math.fsum(scores.values()) / len(scores) * unit - value) < 2e-6 * unit
            for scores, value in sides
        ):
            return unit
    return None


def _number(record: Mapping[str, Any], metric: str) -> float | None:
    value = (record.get("scores") or {}).get(metric)
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _unpaired(a: Mapping[str, Any], b: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The difference of two figures as if of independent samples.

    Its interval is made of both intervals as by Newcombe (1998), method 10, "square and add". For
    runs on the same samples it is too wide, never too narrow, as long as a sample that is hard
    for one is not easy for the other.
    """
    value, interval = None, None
    if a["value"] is not None and b["value"] is not None:
        value = round(b["value"] - a["value"], 6)
        if a["interval"] is not None and b["interval"] is not None:
            (low_a, high_a), (low_b, high_b) = a["interval"], b["interval"]
            below = math.hypot(b["value"] - low_b, high_a - a["value"])
            above = math.hypot(high_b - b["value"], a["value"] - low_a)
            interval = [round(value - below, 6), round(value + above, 6)]
    kind = None if interval is None else "unpaired, square and add"
    return {
        "value": value,
        "interval": interval,
        "interval_kind": kind,
        "paired": False,
        "pairs": 0,
        "note": reason or None,
    }


def _answers(row: str, pairing: _Pairing) -> dict[str, Any]:
    """Answers of a row that are not the same, and samples that only one side could answer."""
    compared, changed, failed = 0, [], {"a": 0, "b": 0}
    for one in pairing.ids(row):
        a, b = pairing.a[row, one], pairing.b[row, one]
        if not a["ok"] or not b["ok"]:
            failed["a"] += int(b["ok"])
            failed["b"] += int(a["ok"])
            continue
        compared += 1
        if a["answer"] != b["answer"]:
            target = None if a.get("target") is None else in_words(a["target"])
            changed.append({"id": one, "target": target, "a": a["answer"], "b": b["answer"]})
    return {
        "compared": compared,
        "changed": len(changed),
        "failed_a": failed["a"],
        "failed_b": failed["b"],
        "examples": changed[:EXAMPLES],
    }
