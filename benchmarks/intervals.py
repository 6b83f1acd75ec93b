"""Confidence intervals of accuracies, and of paired differences between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eval import statistics

RESAMPLES = 2000
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Right answers and questions by scene and kind, int64 [scenes, kinds] each."""

    right: Counts
    asked: Counts

    @classmethod
    def empty(cls, scenes: int, kinds: int) -> Scores:
        """Nothing asked yet."""
        return cls(np.zeros((scenes, kinds), np.int64), np.zeros((scenes, kinds), np.int64))


def row_figures(scores: Scores, base: Scores, kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracies of one case, per kind and overall, beside those of the unpruned model.

    Args:
        scores: of the case.
        base: of the unpruned model, on the same questions.
        kinds: names of the columns; a kind that was never asked is left out.
    """
    per_kind = {}
    for column, kind in enumerate(kinds):
        right, asked = int(scores.right[:, column].sum()), int(scores.asked[:, column].sum())
        if asked:
            per_kind[kind] = {
                "count": asked,
                "right": right,
                "accuracy": round(right / asked, 4),
                "interval": wilson(right, asked),
                "to_unpruned": paired(
                    scores.right[:, column], base.right[:, column], scores.asked[:, column]
                ),
            }
    right, asked = scores.right.sum(axis=1), scores.asked.sum(axis=1)
    return {
        "overall": {
            "count": int(asked.sum()),
            "right": int(right.sum()),
            "accuracy": round(float(right.sum() / asked.sum()), 4),
            "interval": bootstrap(right, asked),
        },
        "to_unpruned": paired(right, base.right.sum(axis=1), asked),
        "kinds": per_kind,
    }


def wilson(right: int, asked: int) -> list[float]:
    """Wilson's 95 % interval of a share of independent answers, to 4 places.

    Example:
        >>> wilson(8, 10)
        [0.4902, 0.9433]
    """
    return [round(end, 4) for end in statistics.wilson(right, asked)]


def bootstrap(values: Counts, asked: Counts) -> list[float]:
    """95 % interval of sum(values) / sum(asked) when scenes are drawn again.

    Questions about one scene are not independent, scenes are.

    Args:
        values: int64 [scenes], right answers of each scene, or a difference of those.
        asked: int64 [scenes], questions of each scene.
    """
    n_scenes = len(asked)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n_scenes, np.full(n_scenes, 1 / n_scenes), size=RESAMPLES)
    drawn = weights @ asked
    shares = (weights @ values)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(shares, (0.025, 0.975))
    return [round(float(low), 4), round(float(high), 4)]


def paired(right: Counts, base: Counts, asked: Counts) -> dict[str, Any]:
    """Difference of two accuracies on the same questions, with its 95 % interval."""
    difference = float((right - base).sum() / asked.sum())
    return {"difference": round(difference, 4), "interval": bootstrap(right - base, asked)}
