"""Functions that `mmlm_pocket_vqa.yaml` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmlm_efficient.pocket.questions import Question, is_right
from mmlm_efficient.pocket.scenes import scene


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The picture that the question is about."""
    return [scene("heldout", int(doc["scene"])).image]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 for a right answer; a place may be off by one, a list may be in any order."""
    question = Question(doc["kind"], doc["question"], doc["answer"])
    return {"mmlm_acc": float(is_right(question, results[0]))}
