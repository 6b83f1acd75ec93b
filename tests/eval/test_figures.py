"""The figures of a task: every one worked out by hand from a small table of records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from eval.figures import MAX_FAILURES, OWN_FUNCTION, TOO_LITTLE, task_result
from eval.statistics import mean_interval, paired_interval
from mmlm_efficient.errors import SettingsError

FLOWCUT = {"name": "flowcut", "keep_tokens": 36}


def header(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "header",
        "run": "pocket",
        "task": "toy",
        "task_version": "1.0",
        "source": "written by hand",
        "metrics": [
            {"name": "acc", "higher_is_better": True, "aggregation": "mean"},
            {"name": "total", "higher_is_better": False, "aggregation": "sum_of_points"},
        ],
        "config_sha": "0123456789ab",
        "data_sha": "ba9876543210",
        "rows": {"none": {}, "flowcut:36": FLOWCUT, "fastv:36": {"name": "fastv"}},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "a cpu"},
        "threads": 2,
        "date": "2026-12-01 10:00 UTC",
        **changes,
    }


def usage(**changes: Any) -> dict[str, Any]:
    return {
        "visual_tokens_in": 144,
        "visual_tokens_kept": 144,
        "visual_tokens_mean": 144.0,
        "prompt_tokens": 160,
        "completion_tokens": 3,
        "kv_bytes": 1000,
        "preprocess_s": 0.01,
        "tower_s": 0.02,
        "prune_s": 0.0,
        "prefill_s": 0.07,
        "decode_s": 0.4,
        "tokens_per_s": 5.0,
        "ttft_s": 0.1,
        "peak_memory_bytes": None,
        "batch_size": 2,
        **changes,
    }


def answered(row: str, sample: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    known = {"group": None, "cluster": None, "usage": usage(), **more}
    return {"kind": "sample", "row": row, "id": sample, "ok": True, "scores": scores, **known}


def failed(row: str, sample: str, message: str = "out of memory") -> dict[str, Any]:
    error = {"where": "model", "type": "RuntimeError", "message": message}
    kept = {"group": None, "cluster": None, "target": None}
    return {"kind": "sample", "row": row, "id": sample, "ok": False, "error": error, **kept}


def aggregate(metric: str, items: Sequence[Any]) -> float:
    return sum(items) / len(items) if metric == "acc" else float(sum(items))


def table() -> list[dict[str, Any]]:
    """Five samples: 1 and 2 ask "is_there", 3 to 5 "what"."""
    is_there, what = {"group": "is_there"}, {"group": "what"}
    first = usage(ttft_s=0.1, tower_s=0.02, prefill_s=0.07, decode_s=0.4)
    second = usage(ttft_s=0.3, tower_s=0.04, prefill_s=0.25, decode_s=0.6)
    cut = {"visual_tokens_kept": 36, "visual_tokens_mean": 54.0, "kv_bytes": 400, "prune_s": 0.002}
    return [
        answered("none", "1", {"acc": 1.0, "total": 5}, **is_there, usage=first),
        answered("none", "2", {"acc": 1.0, "total": 4}, **is_there, usage=first),
        answered("none", "3", {"acc": 0.0, "total": 3}, **what, usage=second),
        answered("none", "4", {"acc": 1.0, "total": 2}, **what, usage=second),
        failed("none", "5"),
        answered(
            "flowcut:36",
            "1",
            {"acc": 0.0, "total": 1},
            **is_there,
            usage=usage(**cut, ttft_s=0.05, completion_tokens=5, decode_s=0.8, batch_size=4),
        ),
        answered(
            "flowcut:36",
            "2",
            {"acc": 1.0, "total": 1},
            **is_there,
            usage=usage(**cut, ttft_s=0.06, decode_s=0.8, batch_size=4, peak_memory_bytes=7000),
        ),
        answered(
            "flowcut:36",
            "3",
            {"acc": 0.0, "total": 1},
            **what,
            usage=usage(
                **{**cut, "prune_s": 0.004}, ttft_s=0.07, completion_tokens=1, decode_s=0.0
            ),
        ),
        # Answered once, then asked again, and failed: the later line counts.
        answered("flowcut:36", "4", {"acc": 1.0, "total": 9}, **what),
        failed("flowcut:36", "4", "bad sample"),
        # Failed once, then asked again.
        failed("flowcut:36", "5"),
        answered(
            "flowcut:36",
            "5",
            {"acc": 1.0, "total": 1},
            **what,
            usage=usage(
                **{**cut, "prune_s": 0.003, "visual_tokens_in": 148, "visual_tokens_kept": 40},
                ttft_s=0.08,
                decode_s=0.1,
                batch_size=1,
                peak_memory_bytes=6000,
            ),
        ),
        failed("fastv:36", "1", "no room"),
    ]


def test_every_figure_by_hand() -> None:
    result = task_result(header(), table(), aggregate)
    none, flowcut, fastv = result.pop("rows")
    failures = result.pop("failures")
    assert result == {
        "run": "pocket",
        "task": "toy",
        "task_version": "1.0",
        "source": "written by hand",
        "config_sha": "0123456789ab",
        "data_sha": "ba9876543210",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "a cpu"},
        "threads": 2,
        "date": "2026-12-01 10:00 UTC",
        "metric": "acc",
        "higher_is_better": True,
        "samples": 5,
        "clusters": 5,
        "ids": ["1", "2", "3", "4", "5"],
        "percent": True,
        "workers": 0,
        "mixed": [],
    }
    assert none == {
        "row": "none",
        "methods": {},
        "samples": 4,
        "failed": 1,
        "empty": 0,
        "metrics": {
            # 3 of 4. Wilson, z^2 / 4 = 0.960365: middle (0.75 + 0.480183) / 1.960365 = 0.627528,
            # half width 1.959964 sqrt(0.046875 + 0.060023) / 1.960365 = 0.326885.
            "acc": {
                "value": 0.75,
                "interval": pytest.approx([0.300642, 0.954413], abs=2e-6),
                "interval_kind": "wilson",
            },
            # 5 + 4 + 3 + 2
            "total": {"value": 14.0, "interval": None, "interval_kind": OWN_FUNCTION},
        },
        "to_vanilla": None,
        "groups": {
            # 2 of 2: 2 / (2 + z^2) = 2 / 5.841459 to 1.
            "is_there": {
                "count": 2,
                "value": 1.0,
                "interval": pytest.approx([0.342380, 1.0], abs=2e-6),
            },
            # 1 of 2, z^2 / 2 = 1.920729: 0.5 +- 1.959964 sqrt(0.125 + 0.240091) / 2.920729.
            "what": {
                "count": 2,
                "value": 0.5,
                "interval": pytest.approx([0.094531, 0.905469], abs=2e-6),
            },
        },
        "visual_tokens_in": 144.0,
        "visual_tokens_kept": 144.0,
        "visual_tokens_mean": 144.0,
        # 0.1, 0.1, 0.3, 0.3: the 95 % place is 2.85, between equal values.
        "ttft_s": {"median": 0.2, "mean": 0.2, "p95": 0.3},
        # 4 samples of 2 further tokens, by 0.4 s and 0.6 s of two batches: 8 / 1.0.
        "decode_tokens_per_s": 8.0,
        "peak_memory_bytes": None,
        "kv_bytes": 1000.0,
        "prune_s": 0.0,
        "prefill_s": 0.16,
        "tower_s": 0.03,
        "batch_size": 2,
    }
    assert flowcut == {
        "row": "flowcut:36",
        "methods": FLOWCUT,
        "samples": 4,
        "failed": 1,
        "empty": 0,
        "metrics": {
            # 2 of 4: 0.5 +- 1.959964 sqrt(0.0625 + 0.060023) / 1.960365.
            "acc": {
                "value": 0.5,
                "interval": pytest.approx([0.150039, 0.849961], abs=2e-6),
                "interval_kind": "wilson",
            },
            "total": {"value": 4.0, "interval": None, "interval_kind": OWN_FUNCTION},
        },
        # Samples 1 to 3: 1 of 3 right instead of 2 of 3; one pair lost, none gained.
        "to_vanilla": {
            "difference": pytest.approx(-1 / 3, abs=1e-6),
            "interval": pytest.approx(tango(-1, 3), abs=1e-6),
            "interval_kind": "tango",
            "pairs": 3,
        },
        "groups": {
            "is_there": {
                "count": 2,
                "value": 0.5,
                "interval": pytest.approx([0.094531, 0.905469], abs=2e-6),
            },
            "what": {
                "count": 2,
                "value": 0.5,
                "interval": pytest.approx([0.094531, 0.905469], abs=2e-6),
            },
        },
        "visual_tokens_in": 145.0,  # (3 x 144 + 148) / 4
        "visual_tokens_kept": 37.0,  # (3 x 36 + 40) / 4
        "visual_tokens_mean": 54.0,
        # 0.05, 0.06, 0.07, 0.08: place 2.85, 0.07 + 0.85 x 0.01.
        "ttft_s": {"median": 0.065, "mean": 0.065, "p95": 0.0785},
        # Further tokens 4 + 2 + 0 + 2; seconds 0.8 / 4 + 0.8 / 4 + 0 + 0.1: 8 / 0.5.
        "decode_tokens_per_s": 16.0,
        "peak_memory_bytes": 7000,
        "kv_bytes": 400.0,
        "prune_s": 0.0025,  # of 0.002, 0.002, 0.003, 0.004
        "prefill_s": 0.07,
        "tower_s": 0.02,
        "batch_size": 4,  # 4, 4, 2, 1
    }
    assert fastv == {
        "row": "fastv:36",
        "methods": {"name": "fastv"},
        "samples": 0,
        "failed": 1,
        "empty": 0,
        "metrics": {
            name: {"value": None, "interval": None, "interval_kind": None}
            for name in ("acc", "total")
        },
        "to_vanilla": {"difference": None, "interval": None, "interval_kind": None, "pairs": 0},
        "groups": {},
        "visual_tokens_in": None,
        "visual_tokens_kept": None,
        "visual_tokens_mean": None,
        "ttft_s": {"median": None, "mean": None, "p95": None},
        "decode_tokens_per_s": None,
        "peak_memory_bytes": None,
        "kv_bytes": None,
        "prune_s": None,
        "prefill_s": None,
        "tower_s": None,
        "batch_size": None,
    }
    model = {"where": "model", "type": "RuntimeError"}
    assert failures == [
        {"row": "none", "id": "5", **model, "message": "out of memory"},
        {"row": "flowcut:36", "id": "4", **model, "message": "bad sample"},
        {"row": "fastv:36", "id": "1", **model, "message": "no room"},
    ]


def tango(change: int, pairs: int) -> list[float]:
    """Of one pair that gained (1) or lost (-1), of that many."""
    values = [1.0] + [0.0] * (pairs - 1)
    base = [0.0] * pairs
    first, second = (values, base) if change > 0 else (base, values)
    interval = paired_interval(first, second, [None] * pairs).interval
    assert interval is not None
    return [interval.low, interval.high]


def test_results_are_json_and_leave_the_records_as_they_are() -> None:
    records = table()
    result = task_result(header(), records, aggregate, expected={"none": 80.0}, scale=100.0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert records == table()


def row_of(result: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["row"] == label)


def test_a_chosen_metric_is_compared_by_its_own_function() -> None:
    result = task_result(header(), table(), aggregate, "total")
    assert result["metric"] == "total"
    assert result["higher_is_better"] is False
    flowcut = row_of(result, "flowcut:36")
    # Samples 1 to 3: 3 points instead of 12.
    assert flowcut["to_vanilla"] == {
        "difference": -9.0,
        "interval": None,
        "interval_kind": OWN_FUNCTION,
        "pairs": 3,
    }
    assert flowcut["groups"] == {}


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(SettingsError, match="task toy has no 'f1'; it has acc, total"):
        task_result(header(), table(), aggregate, "f1")


def test_the_order_of_records_does_not_matter_where_ids_are_given() -> None:
    ids = ["1", "2", "3", "4", "5"]
    # Of one row and id the later line counts, so that only those are left to be mixed.
    latest = list({(one["row"], one["id"]): one for one in table()}.values())
    there = task_result(header(), latest, aggregate, ids=ids)
    assert task_result(header(), latest[::-1], aggregate, ids=ids) == there
    assert there["rows"] == task_result(header(), table(), aggregate)["rows"]


def test_items_come_in_the_order_of_ids() -> None:
    def first_one(metric: str, items: Sequence[Any]) -> float:
        return float(items[0])

    records = [answered("none", one, {"acc": float(one), "total": 0.0}) for one in "312"]
    small = header(rows={"none": {}})
    by_ids = task_result(small, records, first_one, ids=["1", "2", "3"])
    assert row_of(by_ids, "none")["metrics"]["acc"]["value"] == 1.0
    as_they_come = task_result(small, records, first_one)
    assert row_of(as_they_come, "none")["metrics"]["acc"]["value"] == 3.0


def test_selected_samples_alone_count() -> None:
    result = task_result(header(), table(), aggregate, ids=["1", "2", "9"])
    assert result["samples"] == 3
    assert [row["samples"] for row in result["rows"]] == [2, 2, 0]
    assert [one["row"] for one in result["failures"]] == ["fastv:36"]


def test_rows_of_other_runs_are_left_out() -> None:
    result = task_result(header(rows={"none": {}}), table(), aggregate)
    assert [row["row"] for row in result["rows"]] == ["none"]
    without = task_result(header(rows={"flowcut:36": {}}), table(), aggregate)
    assert [row["to_vanilla"] for row in without["rows"]] == [None]


def test_percent_and_scores_in_dicts() -> None:
    """Such as tasks that hand on a dict and report 100 times its mean score."""

    def percent(metric: str, items: Sequence[Any]) -> float:
        return 100.0 * float(sum(item["score"] for item in items)) / len(items)

    rights = {"none": [1, 1, 1, 0, 1, 1], "flowcut:36": [1, 0, 1, 0, 1, 0]}
    clusters: list[str | None] = ["a", "a", "b", "b", "c", "c"]
    records = [
        answered(row, str(place), {"acc": {"score": score}}, cluster=clusters[place], group="g")
        for row, scores in rights.items()
        for place, score in enumerate(scores)
    ]
    metric = {"name": "acc", "higher_is_better": True, "aggregation": "percent"}
    result = task_result(header(metrics=[metric]), records, percent)
    flowcut = row_of(result, "flowcut:36")
    interval = mean_interval(rights["flowcut:36"], clusters)
    change = paired_interval(rights["flowcut:36"], rights["none"], clusters).interval
    assert interval is not None
    assert change is not None
    ends = pytest.approx([100 * interval.low, 100 * interval.high], abs=1e-5)
    assert flowcut["metrics"]["acc"] == {
        "value": 50.0,
        "interval": ends,
        "interval_kind": "wilson, clustered",
    }
    assert flowcut["groups"] == {"g": {"count": 6, "value": 50.0, "interval": ends}}
    assert flowcut["to_vanilla"] == {
        "difference": pytest.approx(-100 / 3, abs=1e-5),
        "interval": pytest.approx([100 * change.low, 100 * change.high], abs=1e-5),
        "interval_kind": "tango, clustered",
        "pairs": 6,
    }


@pytest.mark.parametrize(
    ("items", "aggregation"),
    [
        ([1.0, 2.0, 3.0], "rooted"),  # its function makes sqrt(mean)
        (["a", "b", "c"], "rooted"),
        ([{"category": "x"}, {"category": "y"}, {"category": "z"}], "rooted"),
        ([0.0, 0.0, 0.0], "rooted"),  # 0 is 0 in any unit
        ([0.0, float("nan"), 1.0], "rooted"),
    ],
)
def test_no_interval_for_what_is_no_mean(items: list[Any], aggregation: str) -> None:
    def rooted(metric: str, items: Sequence[Any]) -> float:
        numbers = [item if isinstance(item, float) and item == item else 4.0 for item in items]
        return float((sum(numbers) / len(numbers)) ** 0.5)

    metric = {"name": "acc", "higher_is_better": True, "aggregation": aggregation}
    records = [answered("none", str(place), {"acc": item}) for place, item in enumerate(items)]
    result = task_result(header(metrics=[metric]), records, rooted)
    found = row_of(result, "none")["metrics"]["acc"]
    assert found["value"] is not None
    assert (found["interval"], found["interval_kind"]) == (None, OWN_FUNCTION)


def test_means_that_are_all_zero_have_their_interval() -> None:
    records = [answered("none", str(place), {"acc": 0.0, "total": 0}) for place in range(10)]
    found = row_of(task_result(header(), records, aggregate), "none")["metrics"]["acc"]
    assert found["interval"] == pytest.approx([0.0, 0.277533], abs=1e-6)


def test_a_mean_of_one_sample_has_no_interval() -> None:
    records = [answered("none", "1", {"acc": 1.0, "total": 0})]
    found = row_of(task_result(header(), records, aggregate), "none")["metrics"]["acc"]
    assert found == {"value": 1.0, "interval": None, "interval_kind": TOO_LITTLE}


def test_a_metric_of_some_samples() -> None:
    """Such as tasks that count a sample for one of two figures."""
    records = [
        answered(row, one, {"acc": score} if one in "12" else {"total": 3})
        for row in ("none", "flowcut:36")
        for one, score in (("1", 1.0), ("2", 0.0), ("3", None), ("4", None))
    ]
    flowcut = row_of(task_result(header(), records, aggregate), "flowcut:36")
    assert flowcut["samples"] == 4
    assert flowcut["metrics"]["acc"]["value"] == 0.5
    assert flowcut["metrics"]["total"]["value"] == 6.0
    assert flowcut["to_vanilla"]["pairs"] == 2


def test_a_figure_that_cannot_be_made_is_a_failure_and_no_crash() -> None:
    def broken(metric: str, items: Sequence[Any]) -> float:
        if metric == "total":
            return float("nan")
        if len(items) == 4 and 0.0 in items[:1]:  # flowcut:36
            raise ZeroDivisionError("no category")
        return aggregate(metric, items)

    result = task_result(header(), table(), broken)
    flowcut = row_of(result, "flowcut:36")
    nothing = {"value": None, "interval": None, "interval_kind": None}
    assert flowcut["metrics"] == {"acc": nothing, "total": nothing}
    assert flowcut["to_vanilla"]["difference"] is None
    assert flowcut["to_vanilla"]["pairs"] == 3
    assert flowcut["groups"] == {}
    assert row_of(result, "none")["metrics"]["acc"]["value"] == 0.75
    score = {"id": None, "where": "score"}
    nan = {"metric": "total", "type": "ValueError", "message": "metric total is nan"}
    total = {**score, **nan}
    assert result["failures"][:3] == [
        {
            "row": "flowcut:36",
            **score,
            "metric": "acc",
            "type": "ZeroDivisionError",
            "message": "no category",
        },
        {"row": "none", **total},
        {"row": "flowcut:36", **total},
    ]


def test_pairs_that_cannot_be_scored_are_a_failure_too() -> None:
    def four_or_more(metric: str, items: Sequence[Any]) -> float:
        if len(items) < 4:
            raise ValueError("too few")
        return aggregate(metric, items)

    result = task_result(header(), table(), four_or_more)
    flowcut = row_of(result, "flowcut:36")
    assert flowcut["metrics"]["acc"]["value"] == 0.5
    assert flowcut["to_vanilla"]["difference"] is None
    assert {one["message"] for one in result["failures"] if one["where"] == "score"} == {"too few"}


def test_as_many_failures_as_can_be_read() -> None:
    records = [failed("none", str(place)) for place in range(MAX_FAILURES + 9)]
    result = task_result(header(), records, aggregate)
    assert [one["id"] for one in result["failures"]] == [str(one) for one in range(MAX_FAILURES)]
    assert result["rows"][0]["failed"] == MAX_FAILURES + 9


def test_expected_numbers_beside_the_measured() -> None:
    plain = task_result(header(), table(), aggregate)
    assert "expected" not in plain
    assert "expected_source" not in plain
    result = task_result(
        header(),
        table(),
        aggregate,
        expected={"none": 78.5, "fastv:36": 70.0, "random:36": 60.0},
        scale=100.0,
        expected_source="a paper, table 1",
    )
    assert result["expected"] == {
        "none": {"value": 78.5, "scale": 100.0, "difference": -3.5},
        "fastv:36": {"value": 70.0, "scale": 100.0, "difference": None},
        "random:36": {"value": 60.0, "scale": 100.0, "difference": None},
    }
    assert result["expected_source"] == "a paper, table 1"
