"""What a report says in sentences: its summary, what to be careful with, where figures are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report_view import VANILLA, Report, Row, TaskResult, is_vanilla, row_of, ttft_s
from eval.report_words import (
    DASH,
    count,
    duration,
    mark_of,
    metric_of,
    plural,
    score_of,
    share,
    task_scale,
)


def title(report: Report) -> str:
    """What was evaluated."""
    return f"Evaluation of {report.get('name') or ', '.join(report['runs']) or 'nothing'}"


def summary(report: Report) -> list[str]:
    """The report in a few sentences, one per task."""
    several = len(report["runs"]) > 1
    sentences = [_task_sentence(task, several) for task in report["tasks"]]
    if not sentences:
        sentences = ["No task has finished."]
    return sentences


def _task_sentence(task: TaskResult, several_runs: bool) -> str:
    scale, vanilla = task_scale(task), row_of(task, VANILLA)
    where = f"{task['task']} ({task['run']})" if several_runs else str(task["task"])
    stock = None if vanilla is None else score_of(task, vanilla)
    asked = plural(int(task.get("samples") or 0), "sample")
    start = f"On {where} ({asked}) the stock model scores {scale.with_unit(stock)}"
    if stock is None:
        start = f"On {where} ({asked}) the stock model has no score"
    row, choice = headline(task)
    if row is None:
        return f"{start}."
    kept = share(row.get("visual_tokens_mean"), row.get("visual_tokens_in"))
    keeps = f"keeps {kept} of the visual tokens (mean over layers) and " if kept else ""
    named = f"{choice}: {row['row']}" if choice else row["row"]
    return f"{start}; {named} {keeps}{change_words(task, row)}{_speed_words(task, row)}."


def headline(task: TaskResult) -> tuple[Row | None, str]:
    """The row that a summary names, and in words how it was chosen, for a pick flatters.

    The best of those that keep at most half of the tokens; where no row is so thrifty, the best of
    all but the stock model; None if there is none. No words where there was no choice.
    """
    rows = [row for row in task["rows"] if not is_vanilla(row) and score_of(task, row) is not None]
    sign = 1 if task.get("higher_is_better", True) else -1

    def kept(row: Row) -> float:
        part, whole = row.get("visual_tokens_mean"), row.get("visual_tokens_in")
        return part / whole if part is not None and whole else 1.0

    def worth(row: Row) -> tuple[float, float]:
        return sign * (score_of(task, row) or 0.0), -kept(row)

    thrifty = [row for row in rows if kept(row) <= 0.5]
    best = max(thrifty or rows, key=worth, default=None)
    if len(rows) < 2:
        return best, ""
    if len(thrifty) == 1:
        return best, f"the only one of {len(rows)} rows that keeps at most half"
    if thrifty:
        return best, f"the best of {len(thrifty)} rows that keep at most half"
    return best, f"the best of {len(rows)} rows"


def change_words(task: TaskResult, row: Row) -> str:
    """A row's difference to the stock model in words, with its interval.

    Example:
        >>> task = {"metric": "acc", "rows": [{"row": "a", "metrics": {"acc": {"value": 0.5}}}]}
        >>> row = {"to_vanilla": {"difference": -0.037, "interval": [-0.045, -0.029]}}
        >>> change_words(task, row)
        'loses 3.7 points (2.9 to 4.5)'
    """
    scale, change = task_scale(task), row.get("to_vanilla") or {}
    difference, interval = change.get("difference"), change.get("interval")
    if difference is None:
        return f"scores {scale.with_unit(score_of(task, row))}"
    higher = bool(task.get("higher_is_better", True))
    if interval is None:
        return f"differs by {scale.signed(difference)}{scale.unit} (no interval)"
    mark = mark_of(interval, higher_is_better=higher)
    if not mark:
        ends = scale.interval(interval, signed=True)
        return f"shows no clear difference ({scale.signed(difference)}{scale.unit}, {ends})"
    low, high = sorted(abs(end) for end in interval)
    amount = f"{scale.score(abs(difference))}{scale.unit} ({scale.interval((low, high))})"
    if not higher:
        return f"is {mark} by {amount}"
    return f"{'gains' if mark == 'better' else 'loses'} {amount}"


def _speed_words(task: TaskResult, row: Row) -> str:
    before, now = ttft_s(row_of(task, VANILLA) or {}), ttft_s(row)
    if not before or not now:
        return ""
    return f"; its first token takes {now / before:.2f}× the stock model's time"


def unscored(report: Report) -> list[str]:
    """Rows that have answers but no score in their task's own metric, and why."""
    several, found = len(report["runs"]) > 1, []
    for task in report["tasks"]:
        where = f"{task['task']} ({task['run']})" if several else str(task["task"])
        reasons: dict[str, list[str]] = {}
        for row in task["rows"]:
            if row.get("samples") and score_of(task, row) is None:
                reasons.setdefault(_no_score(task, row), []).append(row["row"])
        for reason, labels in reasons.items():
            found.append(
                f"{where}: {', '.join(labels)}: answers are there, but no {task['metric']}: "
                f"{reason}"
            )
    return found


def _no_score(task: TaskResult, row: Row) -> str:
    reasons = [
        f"{one['type']}: {one['message']}"
        for one in task.get("failures") or ()
        if is_score_failure(one)
        and one["row"] == row["row"]
        and one.get("metric") in (None, task["metric"])
    ]
    return "; ".join(dict.fromkeys(reasons)) or "the report holds no reason"


def is_score_failure(failure: Mapping[str, Any]) -> bool:
    """Whether a failure is of a row's score, not of one of its samples."""
    return failure.get("id") is None and failure["where"] == "score"


def caveats(report: Report) -> list[str]:
    """What a reader has to know before trusting the figures."""
    found = []
    sizes = [int(row.get("batch_size") or 1) for task in report["tasks"] for row in task["rows"]]
    if max(sizes, default=1) > 1:
        found.append(
            f"Answers came in batches of up to {max(sizes)}: TTFT and prune time are those of a "
            "whole batch, not of one request."
        )
    n_workers = workers(report)
    if n_workers is not None and n_workers > 1:
        found.append(
            f"{n_workers} workers ran side by side and shared the machine: times are longer than "
            "those of one process, and compare only with runs of as many workers."
        )
    found += _mixed_sessions(report)
    found += _few_samples(report)
    failed = sum(row.get("failed") or 0 for task in report["tasks"] for row in task["rows"])
    if failed:
        found.append(
            f"{plural(failed, 'answer')} failed and {'is' if failed == 1 else 'are'} left out of "
            "the scores; see the failures of each task."
        )
    return found


def _mixed_sessions(report: Report) -> list[str]:
    """Tasks whose file of samples several sessions wrote that were not alike."""
    found: dict[str, list[str]] = {}
    for task in report["tasks"]:
        if task.get("mixed"):
            found.setdefault(", ".join(task["mixed"]), []).append(str(task["task"]))
    return [
        f"{', '.join(dict.fromkeys(names))}: answered in several sessions with other {what}: the "
        "figures, times and memory above all, mix them."
        for what, names in found.items()
    ]


def _few_samples(report: Report) -> list[str]:
    """Tasks with too few samples for their intervals; samples of a cluster count as one."""
    few: dict[str, None] = {}
    for task in report["tasks"]:
        samples, clusters = task.get("samples") or 0, task.get("clusters")
        if samples < 30:
            few[str(task["task"])] = None
        elif clusters is not None and clusters < 30:
            few[f"{task['task']} ({samples:,} samples in {plural(clusters, 'cluster')})"] = None
    if not few:
        return []
    what = "samples" if not any("cluster" in one for one in few) else "independent samples"
    return [f"Fewer than 30 {what}: {', '.join(few)}. Intervals of so few are rough."]


def workers(report: Report) -> int | None:
    """Processes that answered side by side, the most of any task, if the report says so."""
    found = [report.get("workers", (report.get("config") or {}).get("workers"))]
    found += [task.get("workers") for task in report["tasks"]]
    return max((one for one in found if isinstance(one, int)), default=None)


def run_config(report: Report, run: str) -> Mapping[str, Any]:
    """What the configuration says about a run; empty if nothing."""
    runs = (report.get("config") or {}).get("runs")
    known = [one for one in runs if isinstance(one, Mapping)] if isinstance(runs, list) else []
    return next((one for one in known if one.get("name") == run), {})


def dtype_of(config: Mapping[str, Any], task: TaskResult) -> str | None:
    """The weights' type in a run; None if the report does not say.

    Example:
        >>> dtype_of({"dtype": None}, {"hardware": {"device": "cpu"}})
        'float32'
    """
    if "dtype" not in config:
        return None
    hardware = task.get("hardware")
    on_cpu = isinstance(hardware, Mapping) and hardware.get("device") == "cpu"
    return str(config["dtype"] or ("float32" if on_cpu else "auto"))


def provenance(report: Report) -> list[tuple[str, str]]:
    """Where the figures come from, name and value, each value once."""
    tasks = report["tasks"]
    rows = [row for task in tasks for row in task["rows"]]
    facts = [
        ("run", _once(report["runs"])),
        ("model", _once(_models(report))),
        ("date", str(report.get("date") or DASH)),
        ("took", duration(report.get("seconds"))),
        ("configuration", str(report.get("config_sha") or DASH)),
        ("data", _once(f"{one['task']} {one.get('data_sha') or DASH}" for one in tasks)),
        (
            "task version",
            _once(f"{one['task']} {one.get('task_version') or DASH}" for one in tasks),
        ),
        ("source", _once(one.get("source") for one in tasks)),
        ("seed", _once(one.get("seed") for one in tasks)),
        ("threads", _once(one.get("threads") for one in tasks)),
        ("batch size", _once(count(row.get("batch_size")) for row in rows)),
        (
            "workers",
            _once([workers(report) or None, *(one.get("workers") or None for one in tasks)]),
        ),
        ("changed on resuming", _once(_mixed(one) for one in tasks)),
        ("hardware", _once(_machine(one.get("hardware")) for one in tasks)),
        ("versions", _once(_pairs(one.get("versions")) for one in tasks)),
        ("intervals", _once(_interval_kinds(tasks))),
        ("paper's numbers", _once(one.get("expected_source") for one in tasks)),
    ]
    return [(name, value) for name, value in facts if value]


def _once(values: Any) -> str:
    """Values in order, none of them twice, none that is missing."""
    return "; ".join(dict.fromkeys(str(one) for one in values if one is not None and one != ""))


def _mixed(task: TaskResult) -> str:
    return f"{task['task']}: {', '.join(task['mixed'])}" if task.get("mixed") else ""


def _models(report: Report) -> list[str]:
    """The model of every run, such as a hub id, with what changes its numbers."""
    found = []
    for name in report["runs"]:
        config = run_config(report, name)
        if config.get("model") is None:
            continue
        tasks = [task for task in report["tasks"] if task["run"] == name]
        facts = [str(config["model"]), dtype_of(config, tasks[0] if tasks else {})]
        attention = config.get("attn_implementation")
        facts += [config.get("quantization"), f"{attention} attention" if attention else None]
        found.append(", ".join(str(one) for one in facts if one))
    return found


def _machine(hardware: Any) -> str:
    if not isinstance(hardware, Mapping):
        return "" if hardware is None else str(hardware)
    return ", ".join(f"{name} {value}" for name, value in hardware.items())


def _pairs(versions: Any) -> str:
    if not isinstance(versions, Mapping):
        return ""
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def _interval_kinds(tasks: Sequence[TaskResult]) -> list[str]:
    kinds = [metric_of(task, row).get("interval_kind") for task in tasks for row in task["rows"]]
    return [kind if kind.startswith("none") else f"95 %, {kind}" for kind in kinds if kind]
