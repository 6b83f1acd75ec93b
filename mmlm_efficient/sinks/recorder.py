"""What VAR did, layer by layer, for reports and pictures. Only with `return_stats`.

Everything stays on the model's device until somebody asks, so that no layer waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmlm_efficient.sinks.evaluations import Outcome
from mmlm_efficient.sinks.redistribution import Keys, Rule, redistribute
from mmlm_efficient.stations.bridge import PromptLayout


@dataclass(frozen=True)
class LayerStats:
    """One layer of one prompt. Columns are those of the prompt as it entered the layer.

    Attributes:
        layer: decoder layer.
        visual_sinks, text_sinks: columns of sinks.
        visual: columns of all visual tokens.
        eligible, selected: rows times heads of the prompt that might change, and that did.
        by_head: the latter for each head.
        moved: mean attention that changed hands in a selected row.
        gain: largest factor of a receiver.
        decoded: for each generated token that ran, heads whose row changed; empty with beams,
            whose rows change places.
        before, after: float32 [heads, visual tokens], attention of the prompt's last row.
    """

    layer: int
    visual_sinks: tuple[int, ...]
    text_sinks: tuple[int, ...]
    visual: tuple[int, ...]
    eligible: int
    selected: int
    by_head: tuple[int, ...]
    moved: float
    gain: float
    decoded: tuple[int, ...]
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Forward:
    """One forward of a layer, as VAR sees it.

    Attributes:
        past: tokens before its first row.
        first: first row that may change.
        width: columns of the prompt; rows behind them are generated tokens.
        offset: keys that a sliding window's cache has dropped: the call's first key is this one.
        keys: flags of the prompt's keys so far, the dropped ones included.
        eligible: bool [B, Q - first], rows that may change.
        picked: int64 [R], which of these rows may change in any sample, where few do; else None.
    """

    past: int
    first: int
    width: int
    offset: int
    keys: Keys
    eligible: Tensor
    picked: Tensor | None = None

    @property
    def cached_keys(self) -> Keys:
        """Flags of the call's own keys."""
        if self.offset == 0:
            return self.keys
        return Keys(self.keys.visual[:, self.offset :], self.keys.sink[:, self.offset :])


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of the prompts: eligible [B, T], selected, moved and gain [B, H, T]."""

    eligible: Tensor
    selected: Tensor
    moved: Tensor
    gain: Tensor

    def until(self, row: int) -> _Piece:
        """The rows before this one."""
        parts = (self.eligible, self.selected, self.moved, self.gain)
        return _Piece(*(part[..., :row] for part in parts))

    @classmethod
    def joined(cls, pieces: Sequence[_Piece], sample: int) -> _Piece:
        """Of one row of the batch."""
        names = ("eligible", "selected", "moved", "gain")
        return cls(
            *(torch.cat([getattr(one, name)[sample] for one in pieces], dim=-1) for name in names)
        )


@dataclass
class _Layer:
    """What is known of a layer since its prefill began.

    Attributes:
        layout: the prompt as it entered the layer.
        copies: rows of the batch per prompt.
        keys: of the prompt.
        pieces: rows of the prompt that may change, in order.
        origin: column of their first row.
        generated: selected [B, H] of each generated token, by its place behind the prompt.
        before, after: [B, H, 1, N] attention of the prompt's last row.
    """

    layout: PromptLayout
    copies: int
    keys: Keys | None = None
    pieces: list[_Piece] = field(default_factory=list)
    origin: int = 0
    generated: dict[int, Tensor] = field(default_factory=dict)
    before: Tensor | None = None
    after: Tensor | None = None


@dataclass
class Recorder:
    """Keeps the last prefill of every layer and what decoding behind it changed."""

    layers: dict[int, _Layer] = field(default_factory=dict)

    def begin(self, layer: int, layout: PromptLayout, copies: int) -> None:
        """A layer starts at the first token of the prompts; what was there is forgotten."""
        self.layers[layer] = _Layer(layout, copies)

    def add(
        self,
        layer: int,
        forward: Forward,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        rule: Rule,
        outcome: Outcome | None,
    ) -> None:
        """One attention call; the tensors are those of `attend`, None for an untouched call."""
        one = self.layers[layer]
        eligible = forward.eligible
        if outcome is None:
            gain = query.new_ones(*query.shape[:2], eligible.shape[1], dtype=torch.float32)
            selected, moved = torch.zeros_like(gain, dtype=torch.bool), torch.zeros_like(gain)
        else:
            selected, moved, gain = outcome.selected, outcome.moved, outcome.gain
        start = forward.past + forward.first
        inside = max(0, min(eligible.shape[1], forward.width - start))
        if inside:
            if not one.pieces:
                one.origin = start
            # Rows that run again behind a crop of the cache replace what they were.
            one.pieces = _first_rows(one.pieces, start - one.origin)
            one.pieces.append(_Piece(eligible, selected, moved, gain).until(inside))
        for row in range(inside, eligible.shape[1]):
            one.generated[start + row - forward.width] = selected[..., row]
        if forward.past < forward.width:
            one.keys = forward.keys
            _add_last_row(one, forward, query, key, mask, scaling, rule)

    @property
    def decoded(self) -> dict[int, Tensor]:
        """Rows times heads of generated tokens, by layer: int64 [eligible, selected]."""
        found = {}
        for layer, one in self.layers.items():
            if one.generated:
                rows = torch.stack(list(one.generated.values()))
                shows = torch.tensor([bool(sample) for sample in one.layout.blocks])
                eligible = int(shows.sum()) * one.copies * rows.shape[0] * rows.shape[2]
                found[layer] = torch.stack(
                    [rows.new_tensor(eligible, dtype=torch.long), rows.sum()]
                )
        return found

    def stats(self, sample: int) -> tuple[LayerStats, ...]:
        """What was done to one prompt, by layer. Waits for the device."""
        return tuple(
            _stats(layer, one, one.keys, sample)
            for layer, one in sorted(self.layers.items())
            if one.keys is not None
        )


def _first_rows(pieces: list[_Piece], count: int) -> list[_Piece]:
    """The pieces that hold the first rows, the last of them cut to fit."""
    kept = []
    for piece in pieces:
        if count <= 0:
            break
        kept.append(piece.until(count))
        count -= piece.eligible.shape[-1]
    return kept


def _add_last_row(
    one: _Layer,
    forward: Forward,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    rule: Rule,
) -> None:
    """The attention of the last tokens of the prompts, of those that are in this forward."""
    visible = one.layout.mask.repeat_interleave(one.copies, dim=0)
    last = visible.shape[1] - 1 - visible.flip(1).to(torch.uint8).argmax(dim=1)
    inside = (last >= forward.past) & (last < forward.past + query.shape[2])
    if not bool(inside.any()):
        return
    last, inside = last.to(query.device), inside.to(query.device)
    row = (last - forward.past).clamp(0, query.shape[2] - 1)
    offset = forward.offset
    seen = torch.arange(offset, offset + key.shape[2], device=key.device) <= last[:, None]
    seen = seen[:, None, None]
    if mask is not None:
        whole = mask.expand(query.shape[0], -1, -1, -1)
        seen = seen & whole.take_along_dim(row[:, None, None, None], dim=2)
    before = _row_attention(query, key, row, seen, scaling)
    place, rows = row - forward.first, forward.eligible.shape[1]
    eligible = torch.zeros_like(inside)[:, None]
    if rows:
        own = forward.eligible.gather(1, place.clamp(0, rows - 1)[:, None])
        eligible = own & ((place >= 0) & inside)[:, None]
    keys = forward.cached_keys
    after, _ = redistribute(before, keys, eligible, rule, seen)
    flagged = keys.visual.shape[1]
    before, after = (
        torch.nn.functional.pad(part[..., :flagged], (offset, 0)) for part in (before, after)
    )
    length = offset + flagged
    if one.before is not None and one.after is not None:
        # Chunks that end some prompts before others: the filling of these is no attention.
        missing = (0, length - one.before.shape[-1])
        old = [torch.nn.functional.pad(part, missing) for part in (one.before, one.after)]
        here = inside[:, None, None, None]
        before, after = torch.where(here, before, old[0]), torch.where(here, after, old[1])
    one.before, one.after = before, after


def _row_attention(query: Tensor, key: Tensor, row: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attention [B, H, 1, K], float32, of one row int64 [B] of each sample, to the seen keys."""
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, dim=1).float()
    queries = query.take_along_dim(row[:, None, None, None], dim=2).float()
    scores = queries @ keys.transpose(2, 3) * scaling
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)


def _stats(layer: int, one: _Layer, keys: Keys, sample: int) -> LayerStats:
    row = sample * one.copies
    visual, sink = keys.visual[row].cpu(), keys.sink[row].cpu()
    columns = torch.nonzero(visual).flatten()
    eligible, by_head, moved, gain = 0, [0], 0.0, 1.0
    if one.pieces:
        rows = _Piece.joined(one.pieces, row)
        eligible = int(rows.eligible.sum()) * rows.selected.shape[0]
        by_head = rows.selected.sum(dim=-1).tolist()
        moved = float(rows.moved[rows.selected].mean()) if any(by_head) else 0.0
        gain = float(rows.gain.max())
    before, after = (_shown(part, row, columns) for part in (one.before, one.after))
    generated = [] if one.copies > 1 else [one.generated[n][row] for n in sorted(one.generated)]
    return LayerStats(
        layer=layer,
        visual_sinks=tuple(torch.nonzero(visual & sink).flatten().tolist()),
        text_sinks=tuple(torch.nonzero(sink & ~visual).flatten().tolist()),
        visual=tuple(columns.tolist()),
        eligible=eligible,
        selected=sum(by_head),
        by_head=tuple(by_head),
        moved=moved,
        gain=gain,
        decoded=tuple(torch.stack(generated).sum(dim=1).tolist()) if generated else (),
        before=before,
        after=after,
    )


def _shown(attention: Tensor | None, row: int, columns: Tensor) -> Tensor:
    """Attention [H, V] to some columns, from that of all samples [B, H, 1, N]."""
    if attention is None:
        return torch.zeros(1, len(columns))
    return attention[row, :, 0].cpu()[:, columns]
