"""A task of a few samples without files, and answers for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from eval.task import Metric, Sample
from mmlm_efficient.pocket import scene


class SmallTask:
    """Questions about held-out scenes; an answer is right when it is "yes"."""

    name = "small"
    version = "1"
    metrics = (Metric("right"),)
    data_sha = "0123456789ab"
    source = "made in the test"

    def __init__(self, count: int = 6) -> None:
        self.ids: Sequence[str] = [f"s{number}" for number in range(count)]

    def sample(self, id: str) -> Sample:
        number = self.ids.index(id)
        return Sample(
            id,
            "is there a cat?",
            (scene("heldout", number).image,),
            target="yes",
            generation={"max_new_tokens": 4},
            group="even" if number % 2 == 0 else "odd",
            cluster=id,
        )

    def score(self, id: str, answer: str) -> dict[str, Any]:
        return {"right": float(answer == "yes")}

    def aggregate(self, metric: str, items: Sequence[Any]) -> float:
        return sum(items) / len(items)


@pytest.fixture
def small_task() -> SmallTask:
    return SmallTask()
