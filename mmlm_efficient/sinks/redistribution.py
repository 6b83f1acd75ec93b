"""The rule of VAR on attention probabilities: which rows are changed, and how.

Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025,
arXiv 2503.03321, sections 4 and 5; names say what they do (paper: rho, p). This is the definition;
:mod:`mmlm_efficient.sinks.evaluations` computes the same without a map of the whole layer.

Shapes: B samples, H query heads, T query rows, K keys, N <= K keys that have flags. The keys of a
sample fall into groups: visual sinks (A), other visual keys (B), text sinks (C), and the rest.
Masses, tests and factors are float32 whatever the model's dtype (float64 in a float64 model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.sinks.call import compute_dtype

# The reference adds this to every visual key before it takes the ratio.
_RATIO_EPSILON = 1e-6


@dataclass(frozen=True)
class Rule:
    """Thresholds of VAR, in the sense of the paper (the released code uses the complements).

    Attributes:
        min_nonsink_ratio: least share of a row's image attention on visual keys that are no
            sinks (paper: rho).
        min_image_mass: least attention of a row to the image (released code: summ).
        redistribute_fraction: share of the sinks' attention that is moved (paper: p).
        include_text_sinks: whether text sinks pay too.
        require_visual_sink: whether only rows that see a visual sink are changed.

    Raises:
        SettingsError: a threshold is not within [0, 1].
    """

    min_nonsink_ratio: float
    min_image_mass: float
    redistribute_fraction: float
    include_text_sinks: bool = True
    require_visual_sink: bool = True

    def __post_init__(self) -> None:
        for name in ("min_nonsink_ratio", "min_image_mass", "redistribute_fraction"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise SettingsError(f"{name} is {value}; give a number from 0 to 1")


@dataclass(frozen=True)
class Groups:
    """The keys of a batch by what happens to them; all bool [B, N].

    Attributes:
        visual_sinks: group A.
        receivers: group B, visual keys that are no sinks.
        text_sinks: group C; empty where text sinks do not pay.
    """

    visual_sinks: Tensor
    receivers: Tensor
    text_sinks: Tensor

    @cached_property
    def payers(self) -> Tensor:
        """Bool [B, N]: the keys that give attention away."""
        return self.visual_sinks | self.text_sinks

    @cached_property
    def stacked(self) -> Tensor:
        """Bool [B, 3, N]: A, B, C."""
        return torch.stack((self.visual_sinks, self.receivers, self.text_sinks), dim=1)

    @cached_property
    def totals(self) -> Tensor:
        """Int64 [B, 3, 1]: how many keys each group has."""
        return self.stacked.sum(dim=-1, keepdim=True)

    @cached_property
    def receiver_span(self) -> tuple[int, int]:
        """First and last + 1 position of a receiver in any sample; (0, 0) without one.

        Waits for the device: for forms that run on the CPU.
        """
        positions = self.receivers.any(dim=0).nonzero().flatten()
        return (int(positions[0]), int(positions[-1]) + 1) if positions.numel() else (0, 0)

    @cached_property
    def payer_index(self) -> tuple[Tensor, Tensor]:
        """Positions of the payers int64 [B, P], and bool [B, P]: False on the filling.

        P is the largest number of payers of a sample. Waits for the device, as above.
        """
        most = int(self.payers.sum(dim=1).max()) if self.payers.numel() else 0
        index = self.payers.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return index, self.payers.gather(1, index)

    def of(self, samples: slice) -> Groups:
        """The groups of some samples."""
        flags = (self.visual_sinks, self.receivers, self.text_sinks)
        return Groups(*(flag[samples] for flag in flags))

    def counts(self, rows: int, keys: int, visible: Tensor | None) -> Tensor:
        """How many keys of each group each row sees: [B, 3, T], or [B, 3, 1] for all rows alike.

        Args:
            rows: T.
            keys: K, at least N.
            visible: bool [B or 1, 1, T, K]; None: the rows are the last T of K causal positions.
        """
        flagged = self.receivers.shape[1]
        if visible is not None:
            shown = visible[:, 0, :, :flagged].expand(self.receivers.shape[0], -1, -1)
            # Small whole numbers: exact in float32.
            return torch.bmm(self.stacked.float(), shown.float().transpose(1, 2))
        first = keys - rows
        if flagged <= first + 1:
            return self.totals
        last_seen = torch.arange(first, keys, device=self.receivers.device).clamp(max=flagged - 1)
        return self.stacked.cumsum(dim=-1).index_select(2, last_seen)


@dataclass(frozen=True)
class Keys:
    """What the keys of a layer are. Keys past the N flagged ones are neither (generated tokens).

    Attributes:
        visual: bool [B, N], the visual tokens.
        sink: bool [B, N], visual and text sinks.

    Raises:
        SettingsError: the two differ in shape, or are not bool [B, N].
    """

    visual: Tensor
    sink: Tensor

    def __post_init__(self) -> None:
        for name, flags in (("visual", self.visual), ("sink", self.sink)):
            if flags.dtype != torch.bool or flags.ndim != 2 or flags.shape != self.visual.shape:
                raise SettingsError(
                    f"{name} is {flags.dtype} {list(flags.shape)}; visual and sink must be bool "
                    "[samples, keys] of one shape"
                )

    @cached_property
    def _with_text(self) -> Groups:
        return Groups(self.visual & self.sink, self.visual & ~self.sink, self.sink & ~self.visual)

    @cached_property
    def _without_text(self) -> Groups:
        groups = self._with_text
        return Groups(groups.visual_sinks, groups.receivers, torch.zeros_like(self.sink))

    @cached_property
    def _has_visual_sink(self) -> bool:
        return bool((self.visual & self.sink).any())

    @cached_property
    def _has_receiver(self) -> bool:
        return bool((self.visual & ~self.sink).any())

    def groups(self, rule: Rule) -> Groups:
        """The groups under a rule; kept, so that decoding does not build them at every step."""
        return self._with_text if rule.include_text_sinks else self._without_text

    def inert(self, rule: Rule) -> bool:
        """Whether these flags rule out that any row is changed. Waits for the device."""
        missing_sink = rule.require_visual_sink and not self._has_visual_sink
        return missing_sink or not self._has_receiver


@dataclass(frozen=True)
class Decision:
    """What happens to each row.

    Attributes:
        selected: bool [B, H, T].
        keep: factor [B, H, T] of the payers: 1 - fraction, or 1 in other rows.
        gain: factor [B, H, T] of the receivers, at least 1; 1 in other rows.
        moved: attention [B, H, T] that changes hands; 0 in other rows.
    """

    selected: Tensor
    keep: Tensor
    gain: Tensor
    moved: Tensor

    def spread(self, rows: Tensor, total: int) -> Decision:
        """These rows at their places among so many, of which the others stay as they are."""

        def placed(part: Tensor, other: float) -> Tensor:
            room = part.new_full((*part.shape[:2], total), other)
            return room.index_copy_(2, rows, part)

        return Decision(
            placed(self.selected, False),
            placed(self.keep, 1.0),
            placed(self.gain, 1.0),
            placed(self.moved, 0.0),
        )

    @classmethod
    def joined(cls, parts: list[Decision], dim: int) -> Decision:
        """Consecutive samples (dim 0), heads (1) or rows (2) as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat([getattr(p, f.name) for p in parts], dim) for f in fields(cls)))


def decide(masses: Tensor, counts: Tensor, eligible: Tensor, rule: Rule) -> Decision:
    """Selects rows by their masses.

    Args:
        masses: [B, 3, H, T] attention to groups A, B and C.
        counts: [B, 3, T or 1] keys of each group that a row sees.
        eligible: bool [B, T].
        rule: the thresholds.
    """
    sinks, receivers, text = masses.unbind(dim=1)
    image = sinks + receivers
    may = eligible & (counts[:, 1] > 0)
    if rule.require_visual_sink:
        may = may & (counts[:, 0] > 0)
    slack = (counts[:, 0] + counts[:, 1]).to(masses.dtype) * _RATIO_EPSILON
    limit = (image + slack.unsqueeze(1)) * (1.0 - rule.min_nonsink_ratio)
    selected = may.unsqueeze(1) & (image >= rule.min_image_mass) & (sinks <= limit)
    # Nobody to give to, or so little that the factor would overflow: the row stays as it is.
    selected = selected & (receivers >= torch.finfo(masses.dtype).tiny)
    # The guards of where: unselected rows may hold inf or nan here.
    moved = torch.where(selected, (sinks + text) * rule.redistribute_fraction, 0.0)
    gain = torch.where(selected, moved / receivers + 1.0, 1.0)
    keep = torch.where(selected, torch.full_like(gain, 1.0 - rule.redistribute_fraction), 1.0)
    return Decision(selected, keep, gain, moved)


def group_masses(probabilities: Tensor, groups: Groups) -> Tensor:
    """Attention of each row to the groups A, B and C: [B, 3, H, T] from [B, H, T, K]."""
    batch, heads, rows, keys = probabilities.shape
    flagged = probabilities.view(batch, heads * rows, keys)[:, :, : groups.receivers.shape[1]]
    on_cpu = probabilities.device.type == "cpu"
    masses = (_sums_by_product if on_cpu else _sums_by_choice)(flagged, groups.stacked)
    return masses.view(batch, 3, heads, rows)


def _sums_by_product(weights: Tensor, members: Tensor) -> Tensor:
    """Sums [B, 3, R] of weights [B, R, N] over members bool [B, 3, N].

    In this order of the factors one fast pass over the weights serves the three sums.
    """
    return torch.bmm(members.to(weights.dtype), weights.transpose(1, 2))


def _sums_by_choice(weights: Tensor, members: Tensor) -> Tensor:
    """The same without a product, which other devices may round (TF32)."""
    groups = members.unbind(dim=1)
    sums = [torch.where(group.unsqueeze(1), weights, 0.0).sum(dim=-1) for group in groups]
    return torch.stack(sums, dim=1)


def scale_(probabilities: Tensor, decision: Decision, groups: Groups) -> None:
    """Applies a decision to a map [B, H, T, K], in place; factors of 1 change no bit."""
    flagged = probabilities[..., : groups.receivers.shape[1]]
    for members, factor in ((groups.payers, decision.keep), (groups.receivers, decision.gain)):
        flagged.mul_(torch.where(members[:, None, None], factor.unsqueeze(-1), 1.0))


def redistribute(
    probabilities: Tensor,
    keys: Keys,
    eligible: Tensor,
    rule: Rule,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves attention from sinks to the other visual keys of the same row: the definition.

    Args:
        probabilities: [B, H, T, K] after softmax and mask.
        keys: flags of the first N <= K keys.
        eligible: bool [B, T], the rows that may change.
        rule: the thresholds.
        visible: bool [B or 1, 1, T, K], True where a row may look; None: the rows are the last T
            of K causal positions.

    Returns:
        The new probabilities, and bool [B, H, T]: the rows that were selected. Rows keep their
        sums; rows that are not selected keep every bit.

    Example:
        >>> row = torch.tensor([0.30, 0.10, 0.15, 0.25, 0.12, 0.08]).view(1, 1, 1, 6)
        >>> visual = torch.tensor([[False, True, True, True, False, False]])
        >>> sink = torch.tensor([[True, True, False, False, False, False]])
        >>> rule = Rule(min_nonsink_ratio=0.5, min_image_mass=0.2, redistribute_fraction=0.6)
        >>> after, _ = redistribute(row, Keys(visual, sink), torch.tensor([[True]]), rule)
        >>> [round(value, 4) for value in after.flatten().tolist()]
        [0.12, 0.04, 0.24, 0.4, 0.12, 0.08]
    """
    groups = keys.groups(rule)
    rows, width = probabilities.shape[-2:]
    changed = torch.empty_like(
        probabilities,
        dtype=compute_dtype(probabilities.dtype),
        memory_format=torch.contiguous_format,
    ).copy_(probabilities)
    counts = groups.counts(rows, width, visible)
    decision = decide(group_masses(changed, groups), counts, eligible, rule)
    scale_(changed, decision, groups)
    return changed.to(probabilities.dtype), decision.selected
