"""Attention calls with flags, and the definition of VAR on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm_efficient.sinks.call import Call, causal_mask
from mmlm_efficient.sinks.evaluations import (
    Evaluation,
    Outcome,
    attend,
    partial_sums_form,
    rows_form,
)
from mmlm_efficient.sinks.redistribution import Keys, Rule, redistribute

RULE = Rule(min_nonsink_ratio=0.5, min_image_mass=0.2, redistribute_fraction=0.6)


@dataclass(frozen=True)
class Case:
    """One attention call with its flags; rows before ``first`` are never eligible."""

    call: Call
    keys: Keys
    eligible: Tensor
    rule: Rule
    first: int = 0

    def attend(
        self, form: Evaluation, row_chunk: int | None = None, picked: Tensor | None = None
    ) -> Outcome:
        call = self.call
        return attend(
            call.query,
            call.key,
            call.value,
            call.mask,
            self.first,
            self.keys,
            self.eligible,
            self.rule,
            call.scaling,
            form,
            row_chunk,
            picked,
        )

    def late(self, form: Evaluation, row_chunk: int | None = None) -> Outcome:
        """The form on the late rows alone."""
        call = self.call.after(self.first)
        tensors = (call.query, call.key, call.value, call.mask)
        rest = (self.keys, self.eligible, self.rule, call.scaling)
        if form == "rows":
            return rows_form(*tensors, *rest, row_chunk=row_chunk)
        return partial_sums_form(*tensors, *rest)

    def logits(self) -> Tensor:
        """Scaled scores [B, H, Q, K] before the mask."""
        key = self.call.key.repeat_interleave(self.call.grouping, 1)
        return (self.call.query * self.call.scaling) @ key.transpose(-1, -2)

    def definition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eager output [B, H, Q, d], selected [B, H, T], and the rows near a threshold."""
        call = self.call
        batch, _, rows, _ = call.query.shape
        value = call.value.repeat_interleave(call.grouping, 1)
        mask = call.mask
        if mask is None:
            mask = causal_mask(rows, call.keys, value.device)[None, None]
        before = self.logits().masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        early = torch.zeros(batch, self.first, dtype=torch.bool)
        eligible = torch.cat((early, self.eligible), dim=1)
        after, selected = redistribute(before, self.keys, eligible, self.rule, call.mask)
        return after @ value, selected[:, :, self.first :], self._near(before, mask)

    def _near(self, before: Tensor, mask: Tensor) -> Tensor:
        """Bool [B, H, T]: rows within 1e-6 of a threshold, where rounding decides."""
        flagged = self.keys.visual.shape[1]
        seen = before.double()[..., :flagged]
        visual, sink = self.keys.visual[:, None, None], self.keys.sink[:, None, None]
        image, sinks = (seen * visual).sum(-1), (seen * (visual & sink)).sum(-1)
        count = (mask[..., :flagged] & visual).sum(-1)
        limit = (1 - self.rule.min_nonsink_ratio) * (image + count * 1e-6)
        near = ((image - self.rule.min_image_mass).abs() < 1e-6) | ((sinks - limit).abs() < 1e-6)
        return near[:, :, self.first :]


def made(
    seed: int = 0,
    batch: int = 1,
    heads: tuple[int, int] = (4, 2),
    rows: int = 20,
    cached: int = 0,
    width: int = 8,
    images: tuple[tuple[int, int], ...] = ((3, 14),),
    sinks: tuple[int, ...] = (0, 4, 9, 16),
    dtype: torch.dtype = torch.float32,
    rule: Rule = RULE,
    first: int | None = None,
    sharpness: float = 2.0,
) -> Case:
    """A causal call: the last ``rows`` of cached + rows positions; text rows are eligible."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(count: int, length: int) -> Tensor:
        made = torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64)
        return made.transpose(1, 2).to(dtype)

    total = cached + rows
    visual, sink = torch.zeros(2, batch, total, dtype=torch.bool)
    for begin, end in images:
        visual[:, begin:end] = True
    sink[:, [position for position in sinks if position < total]] = True
    after = visual.cumsum(1).bool() & ~visual
    first = min(max(0, images[0][1] - cached), rows) if first is None else first
    eligible = after[:, cached + first :]
    call = Call(
        tensor(heads[0], rows) * sharpness,
        tensor(heads[1], total).contiguous(),
        torch.tanh(tensor(heads[1], total)),
        None,
        width**-0.5,
    )
    return Case(call, Keys(visual, sink), eligible, rule, first)
