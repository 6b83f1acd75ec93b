"""What differs between two runs beside what was to be compared: told before anyone trusts it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.report_summary import dtype_of, run_config, workers
from eval.report_view import Report, Row, TaskResult, row_of

# Of a run's configuration, beside what is looked at more closely.
_SETTINGS = ("vision_tower", "quantization", "attn_implementation", "generation")
_SHOWN = 6  # differences of one row's settings

Pair = tuple[TaskResult, TaskResult]


def all_warnings(a: Report, b: Report, shared: Sequence[tuple[str, Pair]]) -> list[str]:
    """What a reader of a comparison has to know, each text once.

    Args:
        a: report of the first run.
        b: of the second.
        shared: tasks that both have, each with its run's name, or "" where there is but one.
    """
    found = [] if shared else ["The runs have no task in common."]
    for report, name in ((a, "first"), (b, "second")):
        for error in report.get("errors") or []:
            where = error.get("task")
            found.append(f"In the {name} run {where} did not finish: {error.get('message')}")
    if (workers(a) or 0) != (workers(b) or 0):
        found.append(f"Workers: {workers(a) or 0} and {workers(b) or 0}; times do not compare.")
    for run, (first, second) in shared:
        start = f"{run}: " if run else ""
        differing = list(_settings(a, b, first, second))
        found += [f"{start}{text}" for text in differing]
        found += [f"{start}{text}" for text in _samples(a, b, first, second)]
        if not differing:
            found += [f"{start}{text}" for text in _unnamed(first, second)]
        found += _task_warnings(first, second)
        found += [f"{start}{text}" for text in _rows(first, second)]
    return list(dict.fromkeys(found))


def _settings(a: Report, b: Report, first: TaskResult, second: TaskResult) -> Iterable[str]:
    """Model and settings of the two runs; what a report does not say cannot differ."""
    here, there = run_config(a, first["run"]), run_config(b, second["run"])
    names = [name for name in ("model", *_SETTINGS) if name in here and name in there]
    values = {name: (here[name], there[name]) for name in names}
    dtypes = dtype_of(here, first), dtype_of(there, second)
    if None not in dtypes:
        values["dtype"] = dtypes
    devices = [(task.get("hardware") or {}).get("device") for task in (first, second)]
    if None in devices and "device" in here and "device" in there:  # else told as hardware
        values["device"] = here["device"], there["device"]
    for name, (value, other) in values.items():
        if (value or None) != (other or None):
            words = f"{_words(value)} and {_words(other)}"
            yield f"{name}: {words}; answers and times differ by that too."


def _samples(a: Report, b: Report, first: TaskResult, second: TaskResult) -> Iterable[str]:
    """Which samples the runs asked."""
    configs = run_config(a, first["run"]), run_config(b, second["run"])
    for name in ("limit", "only"):
        values = [
            task.get(name, config.get(name)) or None
            for task, config in zip((first, second), configs, strict=True)
        ]
        if values[0] != values[1]:
            yield (
                f"{first['task']}: {name}: {_words(values[0])} and {_words(values[1])}; the two "
                "scores need not be of the same samples, paired differences are."
            )


def _unnamed(a: TaskResult, b: TaskResult) -> Iterable[str]:
    """Configurations that differ though nothing that the reports name does."""
    shas = a.get("config_sha"), b.get("config_sha")
    named = a.get("seed") != b.get("seed")
    devices = [(task.get("hardware") or {}).get("device") for task in (a, b)]
    if None not in shas and shas[0] != shas[1] and not named and devices[0] == devices[1]:
        yield (
            f"{a['task']}: configurations {shas[0]} and {shas[1]} differ in what the reports do "
            "not name, such as the weights."
        )


def _rows(a: TaskResult, b: TaskResult) -> Iterable[str]:
    """Rows of one label that stand for different settings."""
    for row in a["rows"]:
        other = row_of(b, row["row"])
        if other is None or row.get("methods") is None or other.get("methods") is None:
            continue
        found = [
            f"{name} {_words(one)} and {_words(two)}"
            for name, one, two in different(_flat(row), _flat(other))
        ]
        if found:
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            yield (
                f"{a['task']}: row {row['row']} has other settings in each run: "
                f"{'; '.join(found[:_SHOWN])}{more}."
            )


def _flat(row: Row) -> dict[str, Any]:
    """Settings of a row by "method.setting"."""
    methods = row["methods"]
    if not isinstance(methods, Mapping):
        return {"methods": methods} if methods else {}
    flat: dict[str, Any] = {}
    for method, settings in methods.items():
        if isinstance(settings, Mapping) and settings:
            flat |= {f"{method}.{name}": value for name, value in settings.items()}
        else:
            flat[str(method)] = settings
    return flat


def _task_warnings(a: TaskResult, b: TaskResult) -> Iterable[str]:
    for name, value_a, value_b in different(a.get("versions"), b.get("versions")):
        yield f"Version of {name}: {value_a} and {value_b}."
    machines = list(different(a.get("hardware"), b.get("hardware")))
    if machines:
        what = "; ".join(f"{name} {one} and {other}" for name, one, other in machines)
        yield f"Hardware: {what}; times and memory do not compare."
    for field_name, words in (
        ("threads", "Threads: {} and {}; times do not compare."),
        ("seed", "Seed: {} and {}; random methods and sampled answers differ by chance."),
    ):
        if a.get(field_name) != b.get(field_name):
            yield words.format(a.get(field_name), b.get(field_name))
    if a.get("task_version") != b.get("task_version"):
        yield (
            f"{a['task']}: version {a.get('task_version')} and {b.get('task_version')} of the "
            "task; scores do not compare."
        )
    sizes = [{row.get("batch_size") for row in task["rows"]} - {None} for task in (a, b)]
    if sizes[0] != sizes[1]:
        text = [", ".join(f"{one:g}" for one in sorted(found)) or "unknown" for found in sizes]
        yield f"{a['task']}: batch size {text[0]} and {text[1]}; times do not compare."
    for task, name in ((a, "first"), (b, "second")):
        if task.get("mixed"):
            yield (
                f"{a['task']}: in the {name} run, sessions with other {', '.join(task['mixed'])} "
                "are mixed; times and memory do not compare."
            )


def different(a: Any, b: Any) -> Iterable[tuple[str, Any, Any]]:
    """Keys of two mappings, or of none, whose values differ, with both."""
    first, second = a or {}, b or {}
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            yield name, first.get(name), second.get(name)


def _words(value: Any) -> str:
    """A setting as a file writes it, cut where it is long."""
    if value is None or value == [] or value == {}:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
