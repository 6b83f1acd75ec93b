"""The figures of a task: what all its rows scored, kept, cost, and how sure that is.

Made of the records alone (see `record`), so that a report can be made again without a model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.statistics import Interval, mean_interval, paired_interval
from mmlm_efficient.errors import SettingsError

VANILLA = "none"
MAX_FAILURES = 50
OWN_FUNCTION = "none: the task aggregates with its own function"
TOO_LITTLE = "none: too few samples, or all alike"
# A figure is a mean if it is that of the items to this precision; in percent in some tasks.
UNITS = (1.0, 100.0)
TOLERANCE = 1e-9

Record = Mapping[str, Any]
Aggregate = Callable[[str, Sequence[Any]], float]


def task_result(
    header: Mapping[str, Any],
    records: Iterable[Record],
    aggregate: Aggregate,
    primary: str | None = None,
    *,
    ids: Sequence[str] | None = None,
    expected: Mapping[str, float] | None = None,
    scale: float = 1.0,
    expected_source: str | None = None,
) -> dict[str, Any]:
    """What the records of a task come to, ready for JSON.

    Failed samples are counted and are in no figure. A metric's value is what the task makes of its
    items. It has an interval if it is their mean, or 100 times their mean, in every row; items are
    numbers or have a number by the name of "score". Differences to the row "none" are over the
    samples that both rows finished.

    Times and memory in a record are those of the batch in which its sample was answered, for a
    sample waits for its batch. Decoding is the exception: further tokens of all samples by the
    seconds of all batches, a sample counting for its share of its batch.

    Args:
        header: of the samples file: task, metrics, rows in order, and where the records are from.
        records: of samples; a later one of the same row and id replaces the earlier one.
        aggregate: the task's figure from a metric's name and its items, in the order of samples;
            if it raises, the figure is None and there is a failure at "score".
        primary: the metric to compare by; the task's first one by default.
        ids: the samples that were selected, in order; by default those of the records as they come.
            Records of others do not count.
        expected: what the primary metric should be, by row.
        scale: a measured value times this is in the unit of `expected`.
        expected_source: where those numbers are from.

    Raises:
        SettingsError: the task has no such metric.
    """
    table, seen = _latest(records)
    table = {label: table.get(label, {}) for label in header["rows"]}
    order = list(seen if ids is None else ids)
    metrics = {metric["name"]: metric for metric in header["metrics"]}
    name = next(iter(metrics)) if primary is None else primary
    if name not in metrics:
        raise SettingsError(
            f"metric: task {header['task']} has no {name!r}; it has {', '.join(metrics)}."
        )
    rows = [_Row.of(label, found, order) for label, found in table.items()]
    aggregator = _Aggregator(aggregate)
    columns = {one: _columns(one, rows, aggregator) for one in metrics}
    units = {one: _unit(found, metrics[one]) for one, found in columns.items()}
    vanilla = columns[name].get(VANILLA)
    results = []
    for row in rows:
        column, unit = columns[name][row.label], units[name]
        results.append(
            {
                "row": row.label,
                "methods": header["rows"][row.label],
                "samples": len(row.finished),
                "failed": len(row.failed),
                "empty": sum(record.get("answer") == "" for record in row.finished),
                "metrics": {
                    one: _metric(found[row.label], units[one]) for one, found in columns.items()
                },
                "to_vanilla": _to_vanilla(column, vanilla, unit, aggregator),
                "groups": _groups(column, unit),
                **_usage(row.finished),
            }
        )
    copied = ("run", "task", "task_version", "source", "config_sha", "data_sha", "seed", "versions")
    result = {
        **{key: header[key] for key in (*copied, "hardware", "threads", "date")},
        "workers": header.get("workers", 0),
        "mixed": list(header.get("mixed", ())),
        "metric": name,
        "higher_is_better": metrics[name]["higher_is_better"],
        "percent": _is_share(columns[name], units[name]),
        "samples": len(order),
        "clusters": _clusters(rows),
        "ids": order,
        "rows": results,
        "failures": [*aggregator.failures, *(_failure(one) for row in rows for one in row.failed)][
            :MAX_FAILURES
        ],
    }
    if expected is not None:
        measured = {label: column.value for label, column in columns[name].items()}
        result["expected"] = {
            label: _expected(value, measured.get(label), scale) for label, value in expected.items()
        }
    if expected_source is not None:
        result["expected_source"] = expected_source
    return result


def _latest(records: Iterable[Record]) -> tuple[dict[str, dict[str, Record]], list[str]]:
    """The record that counts by row and id, and the ids as they come."""
    table: dict[str, dict[str, Record]] = {}
    seen: dict[str, None] = {}
    for record in records:
        table.setdefault(record["row"], {})[record["id"]] = record
        seen.setdefault(record["id"])
    return table, list(seen)


@dataclass(frozen=True)
class _Row:
    """Records of one row, in the order of samples."""

    label: str
    finished: list[Record]
    failed: list[Record]

    @classmethod
    def of(cls, label: str, found: Mapping[str, Record], order: Sequence[str]) -> _Row:
        records = [found[one] for one in order if one in found]
        finished = [record for record in records if record["ok"]]
        return cls(label, finished, [record for record in records if not record["ok"]])


@dataclass
class _Aggregator:
    """The task's own figures; where it has none, a failure."""

    aggregate: Aggregate
    failures: list[dict[str, Any]] = field(default_factory=list)

    def value(self, label: str, metric: str, items: Sequence[Any]) -> float | None:
        if not items:
            return None
        # Tasks bring their own code, which may raise anything.
        try:
            value = float(self.aggregate(metric, items))
            if not math.isfinite(value):
                raise ValueError(f"metric {metric} is {value}")
        except Exception as error:  # noqa: BLE001
            failure = {
                "where": "score",
                "metric": metric,
                "type": type(error).__name__,
                "message": str(error),
            }
            self.failures.append({"row": label, "id": None, **failure})
            return None
        return value


@dataclass(frozen=True)
class _Column:
    """One metric of one row.

    Attributes:
        records: of finished samples that have an item of this metric, by id, in order.
        items: theirs.
        value: the task's figure; None if there is none.
    """

    label: str
    metric: str
    records: dict[str, Record]
    items: list[Any]
    value: float | None

    @property
    def clusters(self) -> list[str | None]:
        return [record["cluster"] for record in self.records.values()]

    def of(self, ids: Sequence[str], aggregator: _Aggregator) -> _Column:
        """This metric of some of the samples."""
        if len(ids) == len(self.records):
            return self
        records = {one: self.records[one] for one in ids}
        items = [record["scores"][self.metric] for record in records.values()]
        value = aggregator.value(self.label, self.metric, items)
        return _Column(self.label, self.metric, records, items, value)

    @property
    def varies(self) -> bool:
        """Whether not all items are alike."""
        numbers = _numbers(self.items) or [0.0]
        return min(numbers) < max(numbers)

    def is_mean(self, unit: float) -> bool:
        """Whether the figure is the mean of the items times the unit."""
        numbers = _numbers(self.items)
        if numbers is None or self.value is None:
            return False
        mean = math.fsum(numbers) / len(numbers) * unit
        return abs(mean - self.value) <= TOLERANCE * max(1.0, abs(self.value))


def _is_share(columns: Mapping[str, _Column], unit: float | None) -> bool:
    """Whether a metric is the mean of items that all lie in 0 to 1."""
    if unit != 1:
        return False
    items = [item for column in columns.values() for item in _numbers(column.items) or ()]
    return bool(items) and all(0.0 <= item <= 1.0 for item in items)


def _clusters(rows: Sequence[_Row]) -> int:
    """Independent samples: clusters, and those that stand alone."""
    found = {
        (
            record["cluster"] is None,
            record["id"] if record["cluster"] is None else record["cluster"],
        )
        for row in rows
        for record in row.finished
    }
    return len(found)


def _columns(metric: str, rows: Sequence[_Row], aggregator: _Aggregator) -> dict[str, _Column]:
    """A metric by row; a task may give a sample only some of its metrics."""
    columns = {}
    for row in rows:
        records = {one["id"]: one for one in row.finished if metric in one["scores"]}
        items = [record["scores"][metric] for record in records.values()]
        value = aggregator.value(row.label, metric, items)
        columns[row.label] = _Column(row.label, metric, records, items, value)
    return columns


def _numbers(items: Sequence[Any]) -> list[float] | None:
    """Items as finite numbers; None if one of them is something else."""
    numbers = []
    for item in items:
        score = item.get("score") if isinstance(item, Mapping) else item
        if not isinstance(score, int | float) or not math.isfinite(score):
            return None
        numbers.append(float(score))
    return numbers


def _unit(columns: Mapping[str, _Column], metric: Mapping[str, Any]) -> float | None:
    """What the mean of the items is multiplied by, in all rows alike; None if it is no mean."""
    known = [column for column in columns.values() if column.value is not None]
    # Where nothing is right, no unit can be told from another.
    units = UNITS if any(column.value for column in known) else UNITS[:1]
    if metric["aggregation"] != "mean" and not any(column.varies for column in known):
        return None  # alike items have the same mean as any function of theirs, such as an F1
    return next((unit for unit in units if all(one.is_mean(unit) for one in known)), None)


def _ends(interval: Interval | None, unit: float) -> dict[str, Any]:
    if interval is None:
        return {"interval": None, "interval_kind": TOO_LITTLE}
    ends = [_rounded(interval.low * unit), _rounded(interval.high * unit)]
    return {"interval": ends, "interval_kind": interval.kind}


def _metric(column: _Column, unit: float | None) -> dict[str, Any]:
    value = {"value": _rounded(column.value)}
    if column.value is None:
        return {**value, "interval": None, "interval_kind": None}
    numbers = _numbers(column.items)
    if unit is None or numbers is None:
        return {**value, "interval": None, "interval_kind": OWN_FUNCTION}
    return {**value, **_ends(mean_interval(numbers, column.clusters), unit)}


def _to_vanilla(
    column: _Column, vanilla: _Column | None, unit: float | None, aggregator: _Aggregator
) -> dict[str, Any] | None:
    """Difference to the stock model over the samples that both have finished."""
    if vanilla is None or column.label == VANILLA:
        return None
    ids = [one for one in column.records if one in vanilla.records]
    nothing = {"difference": None, "interval": None, "interval_kind": None, "pairs": len(ids)}
    if not ids or column.value is None or vanilla.value is None:
        return nothing
    ours, base = column.of(ids, aggregator), vanilla.of(ids, aggregator)
    if ours.value is None or base.value is None:
        return nothing
    found = {"difference": _rounded(ours.value - base.value), "pairs": len(ids)}
    first, second = _numbers(ours.items), _numbers(base.items)
    is_mean = unit is not None and ours.is_mean(unit) and base.is_mean(unit)
    if unit is None or first is None or second is None or not is_mean:
        return {**found, "interval": None, "interval_kind": OWN_FUNCTION}
    return {**found, **_ends(paired_interval(first, second, ours.clusters).interval, unit)}


def _groups(column: _Column, unit: float | None) -> dict[str, dict[str, Any]]:
    """Means by group of samples; nothing where the metric is not a mean."""
    numbers = _numbers(column.items)
    if unit is None or numbers is None or column.value is None:
        return {}
    members: dict[str, list[tuple[float, str | None]]] = {}
    for record, number in zip(column.records.values(), numbers, strict=True):
        if record["group"] is not None:
            members.setdefault(record["group"], []).append((number, record["cluster"]))
    groups = {}
    for name, found in members.items():
        scores, clusters = [score for score, _ in found], [cluster for _, cluster in found]
        value = math.fsum(scores) / len(scores) * unit
        interval = _ends(mean_interval(scores, clusters), unit)["interval"]
        groups[name] = {"count": len(found), "value": _rounded(value), "interval": interval}
    return groups


def _usage(finished: Sequence[Record]) -> dict[str, Any]:
    """Tokens, seconds and bytes of a row; None where nothing was measured."""

    def measured(name: str) -> list[float]:
        found = (record["usage"].get(name) for record in finished)
        return [value for value in found if value is not None]

    ttft, peaks, kv_bytes = measured("ttft_s"), measured("peak_memory_bytes"), measured("kv_bytes")
    tokens = ("visual_tokens_in", "visual_tokens_kept", "visual_tokens_mean")
    return {
        **{name: _rounded(_mean(measured(name))) for name in tokens},
        "ttft_s": {
            "median": _rounded(_quantile(ttft, 0.5)),
            "mean": _rounded(_mean(ttft)),
            "p95": _rounded(_quantile(ttft, 0.95)),
        },
        "decode_tokens_per_s": _decode_rate([record["usage"] for record in finished]),
        "peak_memory_bytes": max(peaks, default=None),
        "kv_bytes": _rounded(_mean(kv_bytes), 1),
        **{
            name: _rounded(_quantile(measured(name), 0.5))
            for name in ("prune_s", "prefill_s", "tower_s")
        },
        "batch_size": _most_common(measured("batch_size")),
    }


def _decode_rate(usages: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens after each sample's first, by the seconds of decoding; each batch counts once."""
    tokens = sum(max(0, usage["completion_tokens"] - 1) for usage in usages)
    seconds = math.fsum(usage["decode_s"] / usage["batch_size"] for usage in usages)
    return _rounded(tokens / seconds, 3) if tokens and seconds > 0 else None


def _most_common(sizes: Sequence[float]) -> float | None:
    """The most frequent size, of equally frequent ones the largest."""
    counts = Counter(sizes)
    return max(counts, key=lambda size: (counts[size], size), default=None)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _rounded(value: float | None, places: int = 6) -> float | None:
    # Not -0.0, which would be written as such.
    return None if value is None else round(value, places) + 0.0


def _failure(record: Record) -> dict[str, Any]:
    error = record["error"]
    return {
        "row": record["row"],
        "id": record["id"],
        **{name: error[name] for name in ("where", "type", "message")},
    }


def _expected(value: float, measured: float | None, scale: float) -> dict[str, Any]:
    difference = None if measured is None else _rounded(measured * scale - value)
    return {"value": value, "scale": scale, "difference": difference}
