"""FlowCut's stage A: what it does during one forward of the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_scores import (
    accumulated,
    entropy_ratio,
    fused_score,
    normalised,
    prune_amount,
    relay_weights,
    value_norm,
)
from mmlm_efficient.stations.tower import TowerPass, TowerRows
from mmlm_efficient.tokens import top_positions

if TYPE_CHECKING:
    from mmlm_efficient.pruning.flowcut import FlowCut


@dataclass(frozen=True)
class LayerTerms:
    """What stage A computed at one layer, [B, N] over the patches entering it.

    Attributes:
        layer: 0-based tower layer.
        attention: relay attention, a share of the softmax over all tokens, not normalised.
        semantic: the same of the value vectors; None when left out.
        norm: information density; None when left out.
        score: the layer's own score.
        total: the accumulated score.
    """

    layer: int
    attention: Tensor
    semantic: Tensor | None
    norm: Tensor | None
    score: Tensor
    total: Tensor


class FlowCutPass(TowerPass):
    """Stage A during one forward of the tower.

    Args:
        settings: the method.
        job: the images and their targets.
        trace: called with every scored layer's terms, for tests and plots.

    Attributes:
        entropy_ratios: for each image, the ratio at each of its adaptive cuts.
        scores: float32 [B, N], last accumulated score of every patch.
        terms: criteria that make up the score.
        cut_layers: 0-based layers whose output may be cut, the last one always to the budget.
    """

    def __init__(
        self,
        settings: FlowCut,
        job: TowerJob,
        trace: Callable[[LayerTerms], None] | None = None,
    ) -> None:
        self.settings = settings
        self.job = job
        self.trace = trace
        self.terms = settings.score_terms
        self.entropy_ratios: list[list[float]] = []
        self._counts: list[int] = []
        self._index: list[Tensor] | None = None
        self._total: Tensor | None = None
        self._attention: Tensor | None = None
        self._mean_relay = self._choose_relay()
        self._last = job.last_cut_layer
        self.cut_layers = self._choose_cut_layers()
        self._check_static()

    def _choose_relay(self) -> bool:
        relay = self.settings.relay
        if relay == "cls" and not self.job.has_cls:
            raise SettingsError(
                "relay='cls', but this tower has no CLS token: use 'mean' or 'auto'"
            )
        return relay == "mean" or not self.job.has_cls

    def _choose_cut_layers(self) -> tuple[int, ...]:
        start, step = self.settings.prune_start_layer, self.settings.prune_interval
        if start > self._last:
            raise SettingsError(
                f"prune_start_layer={start}, but the last layer that may be cut in this tower is "
                f"{self._last}: give 0 to {self._last}"
            )
        # Counted from the forced last cut backwards.
        layers = range(self._last % step, self._last + 1, step)
        return tuple(layer for layer in layers if layer >= start)

    def _check_static(self) -> None:
        counts = self.settings.counts
        if counts is None:
            return
        if len(counts) != len(self.cut_layers):
            raise SettingsError(
                f"counts has {len(counts)} values, but this tower is cut after the "
                f"{len(self.cut_layers)} layers {list(self.cut_layers)}: give one value each"
            )
        if any(target != counts[-1] for target in self.job.targets):
            raise SettingsError(
                f"counts ends with {counts[-1]}, but the budget is {sorted(set(self.job.targets))} "
                "patches: a static schedule serves one budget, the last of its counts"
            )

    # -- the tower station's protocol ------------------------------------------------------

    def begin(self, n_images: int, n_patches: int) -> None:
        """Start with all patches and no history."""
        if (n_images, n_patches) != (len(self.job.targets), self.job.n_patches):
            raise SettingsError(
                f"this pass is for {len(self.job.targets)} image(s) of {self.job.n_patches} "
                f"patches, but the tower runs {n_images} of {n_patches}"
            )
        self._counts = [n_patches] * n_images
        self._index = self._total = self._attention = self.scores = None
        self.entropy_ratios = [[] for _ in range(n_images)]

    def wants(self, layer: int) -> bool:
        """Every layer up to the last cut, until all images have reached their targets."""
        return layer <= self._last and any(
            count > target for count, target in zip(self._counts, self.job.targets, strict=True)
        )

    def observe(self, rows: TowerRows) -> None:
        """Score the layer's patches and add them to the history."""
        lead = int(rows.has_cls)
        shape = (*rows.query.shape[:2], rows.heads, -1)
        query, key, value = (part.view(shape) for part in (rows.query, rows.key, rows.value))
        patches = None if rows.valid is None else rows.valid[:, lead:]
        attention = relay_weights(
            self._relay(query, patches, lead), key, key.shape[-1] ** -0.5, rows.valid
        )[:, lead:]
        terms = self.terms
        semantic = norm = None
        if "semantic" in terms:
            relay_value = self._relay(value, patches, lead)
            semantic = relay_weights(relay_value, value, 1.0, rows.valid)[:, lead:]
        if "value_norm" in terms:
            norm = value_norm(value[:, lead:])
        shares = normalised(attention)
        score = fused_score(
            shares if "attention" in terms else None,
            None if semantic is None else normalised(semantic),
            norm,
        )
        self._attention, score = self._pooled(shares, score, patches)
        self._total = accumulated(self._total, score, self.settings.score_momentum)
        self._remember()
        if self.trace is not None:
            self.trace(LayerTerms(rows.layer, attention, semantic, norm, score, self._total))

    def cut(self, layer: int) -> Sequence[Tensor] | None:
        """The positions that go on after this layer, or None when all do."""
        total, attention = self._total, self._attention
        if self.job.score_only:
            return None
        if layer not in self.cut_layers or total is None or attention is None:
            return None
        if not self.wants(layer):
            return None
        wanted = self._next_counts(layer, attention)
        if wanted == self._counts:
            return None
        keep = [
            top_positions(total[image, :now], after)
            for image, (now, after) in enumerate(zip(self._counts, wanted, strict=True))
        ]
        self._index = [
            positions if self._index is None else self._index[image][positions]
            for image, positions in enumerate(keep)
        ]
        longest = max(wanted)
        shorter = total.new_zeros(total.shape[0], longest)
        for image, positions in enumerate(keep):
            shorter[image, : wanted[image]] = total[image, positions]
        self._total, self._attention, self._counts = shorter, None, wanted
        return keep

    # -- what a tower with other rules overrides ---------------------------------------------

    def _pooled(self, shares: Tensor, score: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention shares and scores of the units that are cut: here of the patches themselves.

        Args:
            shares: normalised attention strength [B, N] of the patches.
            score: the layer's score [B, N].
            valid: bool [B, N], False on padding; or None.
        """
        return shares, score

    def _ratios(self, shares: Tensor, counts: Tensor) -> Tensor:
        """Entropy ratio [B] of attention shares [B, N]; counts [B] of them are no padding."""
        return entropy_ratio(shares, counts)

    # -- parts -----------------------------------------------------------------------------

    def _relay(self, rows: Tensor, patches: Tensor | None, lead: int) -> Tensor:
        """The relay token's row [B, h, d] of rows [B, L, h, d]."""
        if not self._mean_relay:
            return rows[:, 0]
        rows = rows[:, lead:].float()
        if patches is None:
            return rows.mean(dim=1)
        weights = patches[:, :, None, None].float()
        return (rows * weights).sum(dim=1) / weights.sum(dim=1)

    def _remember(self) -> None:
        """Keep the newest score of every patch, for the report."""
        total = self._total
        if total is None:
            return
        if self._index is None or self.scores is None:
            self.scores = total.clone()
            return
        for image, index in enumerate(self._index):
            now = self._counts[image]
            # Alone, an image at its target is no longer scored; batch mates change nothing.
            if now > self.job.targets[image]:
                self.scores[image, index] = total[image, :now]

    def _next_counts(self, layer: int, attention: Tensor) -> list[int]:
        """Patches of each image after the cut at this layer."""
        targets = self.job.targets
        remaining = self._last - layer
        if remaining == 0:
            return [min(now, target) for now, target in zip(self._counts, targets, strict=True)]
        if self.settings.counts is not None:
            planned = self.settings.counts[self.cut_layers.index(layer)]
            return [min(now, planned) for now in self._counts]
        counts = torch.tensor(self._counts, device=attention.device)
        ratios: list[float] = self._ratios(attention, counts).tolist()
        amounts = []
        for image, ratio in enumerate(ratios):
            now, target = self._counts[image], targets[image]
            if now > target:
                self.entropy_ratios[image].append(ratio)
            amounts.append(prune_amount(now, min(now, target), remaining, ratio))
        groups = self.job.groups or tuple(range(len(amounts)))
        if self.settings.crop_sync == "batch":
            groups = (0,) * len(amounts)
        together: dict[int, float] = {}
        for group, amount in zip(groups, amounts, strict=True):
            together[group] = max(amount, together.get(group, amount))
        amounts = [together[group] for group in groups]
        # round() is half to even, as torch.round in the reference.
        return [
            max(now - round(amount), min(now, target))
            for now, target, amount in zip(self._counts, targets, amounts, strict=True)
        ]
