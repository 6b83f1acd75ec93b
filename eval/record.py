"""One line of a run's samples file: what a row answered to a sample, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.engine import Outcome, failure
from eval.task import Sample, Task

Record = dict[str, Any]


def record_of(row: str, sample: Sample, outcome: Outcome, task: Task) -> Record:
    """The record of an outcome, scored.

    Args:
        row: label of the row.
        sample: what was asked.
        outcome: what came of it.
        task: scores the answer; if it cannot, the sample has failed.
    """
    # Tasks bring their own code, which may raise anything.
    try:
        scores = None if outcome.text is None else task.score(sample.id, outcome.text)
    except Exception as error:  # noqa: BLE001
        outcome, scores = failure(sample.id, error, "score"), None
    return {
        "kind": "sample",
        "row": row,
        "id": sample.id,
        "ok": scores is not None,
        "group": sample.group,
        "cluster": sample.cluster,
        "target": sample.target,
        **(_answered(outcome, scores) if scores is not None else {"error": outcome.error}),
    }


def _answered(outcome: Outcome, scores: Mapping[str, Any]) -> Record:
    return {
        "answer": outcome.text,
        "scores": dict(scores),
        "finish_reason": outcome.finish_reason,
        "usage": dict(outcome.usage),
    }


def failed_record(row: str, sample_id: str, error: Exception, where: str) -> Record:
    """The record of a sample that did not even reach the model."""
    return {
        "kind": "sample",
        "row": row,
        "id": sample_id,
        "ok": False,
        "group": None,
        "cluster": None,
        "target": None,
        "error": failure(sample_id, error, where).error,
    }
