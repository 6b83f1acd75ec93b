"""FlowCut's stage A in the packed towers of Qwen2-VL and Qwen2.5-VL, which have no CLS token.

Source: the rules of arXiv 2505.19536's reference code for Qwen2-VL. The relay is the mean of the
rotated queries, the score is its attention times the information density, without a semantic
term. The reference cuts single patches in front of the 2x2 merger, which then joins patches of
different places; by default whole 2x2 squares are cut here, so that every visual token still is
one place of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass, LayerTerms

if TYPE_CHECKING:
    from mmlm_efficient.pruning.flowcut import FlowCut

MergeAlignment = Literal["window", "reference"]


class PackedFlowCutPass(FlowCutPass):
    """Stage A during one forward of a packed tower; an "image" is one slice of its sequence.

    With ``merge_alignment="window"`` the unit that is scored, counted and cut is the square of
    patches that becomes one visual token: its score is the mean of its patches' scores, its share
    of the attention the sum of theirs. With "reference" the unit is the patch, as in the
    reference code, whose entropy it computes too. The counts of a static schedule are in units.

    Args:
        settings: the method; its semantic term is left out, its relay must not be "cls".
        job: the slices and their targets, all in patches and multiples of the merge unit.
        merge_alignment: what is cut.
        trace: called with every scored layer's terms; attention and norm are of patches, score
            and total of units.

    Attributes:
        scores: float32 [B, N], last accumulated score of every patch (of its square, if squares
            are cut), 0 behind the end of a shorter slice.

    Raises:
        SettingsError: the settings or the job do not fit such a tower.
    """

    def __init__(
        self,
        settings: FlowCut,
        job: TowerJob,
        merge_alignment: MergeAlignment = "window",
        trace: Callable[[LayerTerms], None] | None = None,
    ) -> None:
        if merge_alignment not in ("window", "reference"):
            raise SettingsError(
                f"merge_alignment must be 'window' or 'reference', got {merge_alignment!r}"
            )
        lengths = (job.n_patches,) * len(job.targets) if job.lengths is None else job.lengths
        _check_job(job, lengths)
        self._unit = job.merge_unit if merge_alignment == "window" else 1
        # From here on everything is counted in units.
        self._starts = [length // self._unit for length in lengths]
        units = replace(
            job,
            targets=tuple(target // self._unit for target in job.targets),
            n_patches=job.n_patches // self._unit,
            lengths=tuple(self._starts),
            merge_unit=1,
        )
        super().__init__(settings, units, trace)
        self.terms = tuple(term for term in settings.score_terms if term != "semantic")
        if not self.terms:
            raise SettingsError(
                "score_terms=('semantic',) leaves nothing to score: FlowCut has no semantic term "
                "in a tower that merges patches. Use 'attention', 'value_norm' or both."
            )
        self._per_patch = merge_alignment == "reference"
        self._unit_scores: Tensor | None = None

    def begin(self, n_images: int, n_patches: int) -> None:
        """Start with all patches and no history."""
        super().begin(n_images, n_patches // self._unit)
        self._counts = list(self._starts)
        self._unit_scores = None

    def cut(self, layer: int) -> Sequence[Tensor] | None:
        """The patches that go on after this layer, or None when all do."""
        keep = super().cut(layer)
        if keep is None or self._unit == 1:
            return keep
        return [_patches_of(units, self._unit) for units in keep]

    def _pooled(self, shares: Tensor, score: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention shares and scores [B, N / unit] of the units, 0 on padding."""
        if valid is not None:
            score = score.masked_fill(~valid, 0.0)
        if self._unit == 1:
            return shares, score
        squares = (score.shape[0], -1, self._unit)
        return shares.reshape(squares).sum(dim=-1), score.reshape(squares).mean(dim=-1)

    def _ratios(self, shares: Tensor, counts: Tensor) -> Tensor:
        """The reference's entropy when patches are cut as it cuts them."""
        if self._per_patch:
            return offset_entropy_ratio(shares, counts)
        return super()._ratios(shares, counts)

    def _remember(self) -> None:
        """Keep the newest scores; the report counts in patches."""
        self.scores = self._unit_scores
        super()._remember()
        self._unit_scores = self.scores
        if self._unit_scores is not None:
            self.scores = self._unit_scores.repeat_interleave(self._unit, dim=1)


def offset_entropy_ratio(attention: Tensor, counts: Tensor) -> Tensor:
    """Entropy ratio with 1e-7 added in the logarithm, as the reference has it for Qwen2-VL.

    Args:
        attention: [B, N], rows sum to 1; padding is 0.
        counts: [B] patches of each image.

    Returns:
        float32 [B], about 1 for uniform attention and about 0 for all attention on one patch.

    Example:
        >>> round(float(offset_entropy_ratio(torch.full((1, 4), 0.25), torch.tensor([4]))[0]), 4)
        1.0
    """
    entropy = -(attention * (attention + 1e-7).log()).sum(dim=-1)
    return entropy / counts.clamp(min=2).float().log()


def _patches_of(units: Tensor, unit: int) -> Tensor:
    """Positions [K * unit] of the patches of units at ascending positions [K].

    Example:
        >>> _patches_of(torch.tensor([0, 2]), 2).tolist()
        [0, 1, 4, 5]
    """
    return (units.unsqueeze(1) * unit + torch.arange(unit, device=units.device)).flatten()


def _check_job(job: TowerJob, lengths: Sequence[int]) -> None:
    """Refuse slices and targets that no packed tower can have.

    Raises:
        SettingsError: naming them.
    """
    if len(lengths) != len(job.targets) or max(lengths) != job.n_patches:
        raise SettingsError(
            f"lengths {list(lengths)} do not fit {len(job.targets)} target(s) and a longest slice "
            f"of {job.n_patches} patches: give one length for each target"
        )
    unit = job.merge_unit
    for name, values in (("lengths", lengths), ("targets", job.targets)):
        odd = [value for value in values if value < 1 or value % unit]
        if odd:
            raise SettingsError(
                f"{name} of a tower that merges {unit} patches into one token must be positive "
                f"multiples of {unit}, got {odd[0]}"
            )
