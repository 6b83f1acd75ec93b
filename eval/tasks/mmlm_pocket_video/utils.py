"""Functions that `mmlm_pocket_video.yaml` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmlm_efficient.pocket.questions import Question, is_right
from mmlm_efficient.pocket.scenes import video


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One turn of the user: every frame after its time, then the question."""
    shown = video("heldout", int(doc["video"]))
    content: list[dict[str, Any]] = []
    for time_s, frame in zip(shown.times_s, shown.frames, strict=True):
        content.append({"type": "text", "text": f"{time_s} s"})
        content.append({"type": "image", "url": frame.image})
    content.append({"type": "text", "text": doc["question"]})
    return [{"role": "user", "content": content}]


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The frames without their times, for models that take no messages."""
    return [frame.image for frame in video("heldout", int(doc["video"])).frames]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 for the right answer, which must be said as pocket says it."""
    question = Question(doc["kind"], doc["question"], doc["answer"])
    return {"mmlm_acc": float(is_right(question, results[0]))}
