"""One line of a run's samples file: what a row answered to a sample, and what it is worth."""

from __future__ import annotations

import json
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
    # Tasks bring their own code, which may raise anything and give what JSON cannot hold.
    try:
        scores = None if outcome.text is None else dict(task.score(sample.id, outcome.text))
        json.dumps([scores, sample.target])
    except Exception as error:  # noqa: BLE001
        return failed_record(row, sample.id, error, "score", sample)
    if scores is None:
        return _head(row, sample.id, False, sample) | {"error": outcome.error}
    return _head(row, sample.id, True, sample) | {
        "answer": outcome.text,
        "scores": scores,
        "finish_reason": outcome.finish_reason,
        "usage": dict(outcome.usage),
    }


def failed_record(
    row: str, sample_id: str, error: Exception, where: str, sample: Sample | None = None
) -> Record:
    """The record of a sample that did not reach the model, or whose answer has no score.

    Args:
        row: label of the row.
        sample_id: of the sample.
        error: why.
        where: "media" or "score".
        sample: if it is known.
    """
    return _head(row, sample_id, False, sample) | {"error": failure(sample_id, error, where).error}


def _head(row: str, sample_id: str, ok: bool, sample: Sample | None) -> Record:
    return {
        "kind": "sample",
        "row": row,
        "id": sample_id,
        "ok": ok,
        "group": None if sample is None else sample.group,
        "cluster": None if sample is None else sample.cluster,
        "target": None if sample is None or not ok else sample.target,
    }
