"""SparseVLM: cuts inside the language model, rated by the text; some of what is cut is merged.

Source: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
arXiv 2410.04417, first version of its reference code (Gumpest/SparseVLMs, Apache-2.0). The maths is
in :mod:`mmlm_efficient.pruning.sparsevlm_scores`. Unlike the reference, only the raters' rows of
attention at the three cuts are computed, and batches and several images work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, StrictInt, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.groups import on_cpu
from mmlm_efficient.pruning import sparsevlm_scores
from mmlm_efficient.pruning.base import LayerJob, PruningMethod, Station, checked_counts
from mmlm_efficient.pruning.decoder_ranking import (
    check_ascending,
    check_depth,
    prompt_attention,
    shares,
)
from mmlm_efficient.pruning.sparsevlm_scores import rater_columns, recycle_plan, schedule
from mmlm_efficient.stations.layer_rows import LayerCut, SampleRows


class SparseVLM(PruningMethod):
    """Cut each image three times inside the language model, by the attention of text that rates.

    Raters are the text tokens behind the image that it relates to more than average. At each cut
    their attention ranks the image's tokens; of those that leave, the best 30 percent are merged
    into a few tokens behind the kept ones.

    The budget is nominal, as in the paper's tables: about the mean over the layers of the tokens
    that they leave, merged ones among them. `stage_keep_tokens` gives the tokens kept at the three
    cuts instead (merged ones come on top). Ratios are of the tokens that an image had before any
    pruning; where no more are left than a cut keeps, it does nothing.

    Example:
        >>> SparseVLM(keep_tokens=192).stage_counts([576])
        [(300, 200, 110)]
        >>> SparseVLM(stage_keep_tokens=(66, 30, 17)).stage_counts([576])
        [(66, 30, 17)]
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference "
        "(arXiv 2410.04417)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("layer",)
    looks_at: ClassVar[str] = "attention rows of the rating text tokens in three decoder layers"
    sees_prompt: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    budget_counts: ClassVar[str] = (
        "tokens of each image, nominal mean over the decoder layers, merged ones among them"
    )

    stage_keep_tokens: tuple[int, ...] | None = Field(
        None,
        description="instead of a budget: tokens of each image to keep at the three cuts, >= 1 and "
        "not increasing",
    )
    cut_layers: tuple[StrictInt, ...] | None = Field(
        None,
        description="decoder layers (0-based) whose output is cut, ascending; by default 2, 6 and "
        "15 of 32, or as deep",
    )
    recycle: bool = Field(
        True, strict=True, description="merge the better part of what a cut removes"
    )

    @field_validator("stage_keep_tokens", mode="before")
    @classmethod
    def _check_counts(cls, value: Any) -> Any:
        return checked_counts("stage_keep_tokens", value)

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        counts, layers = self.stage_keep_tokens, self.cut_layers
        for field, values in (("stage_keep_tokens", counts), ("cut_layers", layers)):
            if values is not None and len(values) != 3:
                raise SettingsError(
                    f"{field} must have one value for each of the three cuts, got {list(values)}"
                )
        if counts is not None and not counts[0] >= counts[1] >= counts[2]:
            raise SettingsError(f"stage_keep_tokens must not increase, got {list(counts)}")
        if layers is not None:
            check_ascending("cut_layers", layers, lowest=0)
        return self

    def check_budget(self) -> None:
        """Exactly one of keep_tokens, keep_ratio and stage_keep_tokens must be given."""
        if self.stage_keep_tokens is None:
            super().check_budget()
        elif self.keep_tokens is not None or self.keep_ratio is not None:
            raise SettingsError(
                "stage_keep_tokens is the budget: leave keep_tokens and keep_ratio out"
            )

    def stage_counts(self, stock: Sequence[int]) -> list[tuple[int, ...]]:
        """For each image the tokens kept at the three cuts, merged ones not counted.

        Args:
            stock: tokens of each image before anything was pruned.

        Raises:
            SettingsError: a tuple of budgets does not fit the images.
        """
        if self.stage_keep_tokens is not None:
            return [self.stage_keep_tokens] * len(stock)
        return [
            tuple(max(1, round(n_tokens * stage)) for stage in schedule(share))
            for n_tokens, share in zip(stock, shares(self, self.budgets(stock), stock), strict=True)
        ]

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse layers that the language model does not have."""
        self._layers(identity.decoder_layers)

    def _layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers whose output is cut."""
        layers = self.cut_layers
        if layers is None:
            layers = sparsevlm_scores.cut_layers(n_layers)
        check_depth("cut_layers", layers, n_layers)
        return layers

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """Three cuts."""
        return tuple(
            LayerCut(
                layer,
                targets,
                rater_attention,
                embeddings=True,
                recycler=recycled if self.recycle else None,
            )
            for layer, targets in zip(
                self._layers(job.n_layers),
                zip(*self.stage_counts(job.stock), strict=True),
                strict=True,
            )
        )


def rater_attention(rows: SampleRows, columns: Tensor) -> Tensor:
    """Attention of the raters to an image's tokens, float32 [V]: a `LayerScorer`.

    Where the image ends the prompt all text rates it, as if it stood behind the image.

    Raises:
        PromptError: the prompt has no text.
    """
    # The same at every cut: neither the decoder's input nor the text changes.
    if "raters" not in rows.memory:
        rows.memory["raters"] = _raters(rows)
    raters, follows = rows.memory["raters"]
    return prompt_attention(rows, rows.text[raters], columns, causal=follows)


def _raters(rows: SampleRows) -> tuple[Tensor, bool]:
    """Which text tokens rate an image, int64 positions on the CPU, and whether they stand behind
    it."""
    behind = (rows.uncut_text >= rows.uncut.stop).nonzero().squeeze(1)
    follows = len(behind) > 0
    if not follows:
        behind = torch.arange(len(rows.uncut_text))
    visual = torch.arange(rows.uncut.start, rows.uncut.stop)
    raters = rater_columns(rows.embeddings(rows.uncut_text[behind]), rows.embeddings(visual))
    return behind[raters.to("cpu")], follows


def recycled(scores: Tensor, keep: Tensor, hidden: Tensor) -> list[Tensor]:
    """Groups of dropped tokens that become one token each, centres first: a `Recycler`."""
    is_dropped = torch.ones(len(scores), dtype=torch.bool)
    is_dropped[keep.to("cpu")] = False
    dropped = is_dropped.nonzero().squeeze(1)
    rows = dropped.to(hidden.device)
    plan = recycle_plan(scores[dropped.to(scores.device)].to(hidden.device), hidden[rows])
    positions, centres, assignment = on_cpu(plan.positions, plan.centres, plan.assignment)
    # By cluster, its centre in front.
    is_other = ~torch.isin(positions, centres)
    order = torch.sort(2 * assignment + is_other, stable=True).indices
    sizes = torch.bincount(assignment, minlength=len(centres)).tolist()
    return list(torch.split(dropped[positions[order]], sizes)) if sizes else []
