"""PyramidDrop: cuts in stages through the language model, by the attention of the last token.

Source: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", arXiv 2410.17247: at the input of layers 8, 16 and 24 of 32 one half, one quarter and
one eighth of the tokens are left, ranked anew each time.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, StrictInt, model_validator

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.pruning.base import LayerJob, PruningMethod, Station
from mmlm_efficient.pruning.decoder_ranking import (
    check_ascending,
    check_depth,
    last_token_attention,
    shares,
)
from mmlm_efficient.stations.layer_rows import LayerCut


class PyramidDrop(PruningMethod):
    """Cut each image in equal steps through the language model; the paper's is keep_ratio=0.125.

    Each stage ranks at the input of its layer, with that layer's own queries and keys: the
    attention of the last prompt token, softmax over the whole prompt, mean over heads.

    The budget counts the tokens left behind the last stage. With S stages the k-th of them leaves
    the share ratio ** (k / S) of the tokens that the image had before any pruning, rounded down,
    at least 1. An image that has no more than that is left alone.

    Example:
        >>> stage_counts(576, 72, 0.125, 3)
        (288, 144, 72)
        >>> default_stages(32)
        (8, 16, 24)
    """

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction (arXiv 2410.17247)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("layer",)
    looks_at: ClassVar[str] = (
        "attention row of the last prompt token at the input of each stage's layer"
    )
    sees_prompt: ClassVar[bool] = True
    budget_counts: ClassVar[str] = (
        "tokens of each image left behind the last cut inside the language model"
    )

    stage_layers: tuple[StrictInt, ...] | None = Field(
        None,
        description="decoder layers (0-based) whose input is cut, ascending and >= 1; by default "
        "at a quarter, half and three quarters of the depth",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if self.stage_layers is not None:
            check_ascending("stage_layers", self.stage_layers, lowest=1)
        return self

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse stage layers that the language model does not have."""
        self._stages(identity.decoder_layers)

    def _stages(self, n_layers: int) -> tuple[int, ...]:
        """Layers whose input is cut."""
        stages = self.stage_layers
        if stages is None:
            stages = default_stages(n_layers)
        check_depth("stage_layers", stages, n_layers)
        return stages

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """One cut in front of each stage's layer."""
        stages, budgets = self._stages(job.n_layers), self.budgets(job.stock)
        images = zip(job.stock, budgets, shares(self, budgets, job.stock), strict=True)
        counts = [stage_counts(*image, len(stages)) for image in images]
        return tuple(
            LayerCut(layer - 1, targets, last_token_attention, lookahead=True)
            for layer, targets in zip(stages, zip(*counts, strict=True), strict=True)
        )


def stage_counts(n_tokens: int, budget: int, share: float, stages: int) -> tuple[int, ...]:
    """Tokens of an image that each stage leaves, the last of them the budget.

    Args:
        n_tokens: tokens that the image had before any pruning.
        budget: tokens behind the last stage, 1..n_tokens.
        share: the share that the budget stands for, in (0, 1].
        stages: how many stages.

    Example:
        >>> stage_counts(36, 1, 0.01, 3)
        (7, 1, 1)
    """
    # The small term keeps 576 * 0.25 at 144 in spite of binary fractions.
    before = (int(n_tokens * share ** (stage / stages) + 1e-9) for stage in range(1, stages))
    return (*(max(count, budget) for count in before), budget)


def default_stages(n_layers: int) -> tuple[int, int, int]:
    """Layers at a quarter, half and three quarters of the depth, rounded (half to even).

    Args:
        n_layers: decoder layers, at least 4.

    Raises:
        SettingsError: there are fewer than 4.

    Example:
        >>> default_stages(28), default_stages(4)
        ((7, 14, 21), (1, 2, 3))
    """
    if n_layers < 4:
        raise SettingsError(
            f"PyramidDrop's three stages need at least 4 decoder layers, the model has {n_layers}: "
            "give stage_layers"
        )
    return round(n_layers / 4), round(n_layers / 2), round(3 * n_layers / 4)
