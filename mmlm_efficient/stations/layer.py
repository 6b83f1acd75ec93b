"""Station 3: the decoder layers. Visual tokens are cut from the output of a layer.

A :class:`LayerCut` names a layer, a target per image and a scorer. The station runs that layer on
all tokens, scores the image blocks from the rows it needs (never a full attention map, whatever
attention implementation is on), and cuts the layer's output. The layers after it get positions and
masks for what is left; their part of the KV cache is shorter, and decoding continues with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts
from mmlm_efficient.stations.active import activate, active_request
from mmlm_efficient.stations.bridge import PromptLayout
from mmlm_efficient.stations.hooks import Arguments, LayerHooks
from mmlm_efficient.tokens import top_positions


@dataclass(frozen=True)
class SampleRows:
    """Queries, keys and values of one prompt at one layer, only for the columns asked for.

    Attributes:
        last: column of the last prompt token.
        scaling: factor on the query-key products.
        columns: columns of all prompt tokens, padding left out.
    """

    last: int
    scaling: float
    columns: Tensor
    _projections: tuple[Tensor, Tensor, Tensor]
    _rope: tuple[Tensor, Tensor]
    _parts: DecoderParts

    def query(self, columns: Tensor) -> Tensor:
        """Rotated queries [h, n, d] of the given columns int64 [n]."""
        return self._rotated(self._heads(0, columns, self._parts.heads), columns)

    def keys(self, columns: Tensor) -> Tensor:
        """Rotated keys [h, n, d], repeated to the query heads."""
        return self._repeated(self._rotated(self._heads(1, columns, self._parts.kv_heads), columns))

    def values(self, columns: Tensor) -> Tensor:
        """Values [h, n, d], repeated to the query heads."""
        return self._repeated(self._heads(2, columns, self._parts.kv_heads))

    def _heads(self, part: int, columns: Tensor, heads: int) -> Tensor:
        rows = self._projections[part][columns]
        return rows.view(rows.shape[0], heads, self._parts.head_dim).transpose(0, 1)

    def _rotated(self, rows: Tensor, columns: Tensor) -> Tensor:
        cos, sin = self._rope[0][columns], self._rope[1][columns]
        first, second = rows.chunk(2, dim=-1)
        return rows * cos + torch.cat((-second, first), dim=-1) * sin

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(self._parts.heads // self._parts.kv_heads, dim=0)


class LayerScorer(Protocol):
    """Scores the visual tokens of one image at a decoder layer."""

    def __call__(self, rows: SampleRows, columns: Tensor) -> Tensor:
        """Scores [V] of the image's tokens, which stand in columns int64 [V]; larger is better."""


@dataclass(frozen=True)
class LayerCut:
    """Cut the output of one decoder layer.

    Attributes:
        layer: 0-based decoder layer; it still runs on, and caches, all tokens.
        targets: visual tokens to keep of each image of the request; an image that has no more
            than its target is left alone.
        score: scores an image's tokens; the target's number of largest stay.
    """

    layer: int
    targets: tuple[int, ...]
    score: LayerScorer


@dataclass
class _Forward:
    """One forward of the decoder.

    Attributes:
        prefill: the whole prompt runs (with or without generated tokens behind it).
        n_new: tokens behind the prompt in this forward.
        copies: batch rows per prompt (beams or returned sequences).
        stage: cuts passed so far.
        rope: position table of the layer that runs now.
        tables: positions and masks already built, by stage and kind of mask.
    """

    prefill: bool
    n_new: int
    copies: int
    stage: int = 0
    rope: tuple[Tensor, Tensor] | None = None
    keep: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[Any, Any] = field(default_factory=dict)


class LayerRequest:
    """Cuts of one request, and their state from its prefill to its last token.

    Args:
        layout: the prompt as it enters the decoder.
        cuts: in ascending order of layers.
        compact: renumber positions after a cut; otherwise kept tokens keep theirs.
        gaps: the prompt's position ids have gaps already.

    Attributes:
        kept: for each image that was cut, int64 positions among its tokens before the decoder.
        cut_layers: decoder layers whose output was cut, in order.
        counts: for each image, its tokens after each of those cuts.
        scored_layers: decoder layers that were scored in the last prefill.
        seconds: host seconds spent in scoring and cutting.
    """

    def __init__(
        self, layout: PromptLayout, cuts: Sequence[LayerCut], *, compact: bool, gaps: bool
    ) -> None:
        self.cuts = {cut.layer: cut for cut in sorted(cuts, key=lambda cut: cut.layer)}
        self.kept: dict[int, Tensor] = {}
        self.cut_layers: list[int] = []
        self.counts: dict[int, list[int]] = {}
        self.scored_layers: list[int] = []
        self.prefilled = False
        self.seconds = 0.0
        self._compact = compact
        self._gaps = gaps
        # From here on, "uncut" means the prompt as the decoder gets it.
        self._layouts = [PromptLayout.of(layout.mask, layout.blocks, layout.padding_side)]
        self._sources: list[Tensor] = []
        self._forward: _Forward | None = None

    @property
    def idle(self) -> bool:
        """Whether the request has nothing to do at this station."""
        return not self.cuts and not self._gaps

    @property
    def layout(self) -> PromptLayout:
        """What the last forward over the prompt left of it; ``origin`` counts its columns."""
        return self._layouts[-1]

    # -- one forward -----------------------------------------------------------------------

    def begin(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        """A forward starts; hidden [B, L, D] enters layer 0."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        n_samples, width = self._layouts[0].mask.shape
        copies, rest = divmod(hidden.shape[0], n_samples)
        if rest:
            raise UnsupportedError(
                f"this request was prepared for {n_samples} prompt(s), but the model runs a batch "
                f"of {hidden.shape[0]}. Prepare the inputs that you run."
            )
        prefill = past == 0
        if self.cuts and not prefill and (not self.prefilled or past < width):
            raise UnsupportedError(
                f"the cache holds {past} tokens before the prompt's first forward. Pruning in the "
                "decoder supports only an empty cache there: leave out past_key_values, and give "
                "the earlier turns as part of the prompt."
            )
        n_new = hidden.shape[1] - width if prefill else 0
        if prefill and self.cuts:
            self._check_prefill(n_new, cache)
            if n_new == 0:
                self._restart()
        self._forward = _Forward(prefill=prefill, n_new=n_new, copies=copies)

    def _check_prefill(self, n_new: int, cache: Any) -> None:
        if n_new < 0 or (n_new > 0 and (cache is not None or not self.prefilled)):
            width = self._layouts[0].mask.shape[1]
            if n_new >= 0:
                advice = (
                    "alone in its first forward: assisted decoding (assistant_model, "
                    "prompt_lookup_num_tokens) is not supported with it"
                )
            elif self.prefilled:
                advice = (
                    "in every forward without a cache: guidance_scale, which runs a second prompt, "
                    "and prefill_chunk_size are not supported with it"
                )
            else:
                advice = "in one forward: do not set prefill_chunk_size"
            raise UnsupportedError(
                f"the prefill has {width + n_new} tokens where the prepared prompt has {width}. "
                f"Pruning in the decoder needs the whole prompt {advice}."
            )
        if getattr(cache, "is_compileable", False):
            raise UnsupportedError(
                f"pruning in the decoder gives layers of different lengths, which "
                f"{type(cache).__name__} cannot hold. Use the default dynamic cache."
            )

    def _restart(self) -> None:
        del self._layouts[1:]
        self._sources.clear()
        self.kept.clear()
        self.counts.clear()
        self.cut_layers.clear()
        self.scored_layers.clear()
        self.prefilled = True
        self.seconds = 0.0

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: DecoderParts
    ) -> Arguments | None:
        """Arguments of a layer with positions and masks for what is left of the prompt."""
        hidden: Tensor = args[0]
        if layer == 0:
            self.begin(hidden, kwargs)
        forward = self._running()
        forward.rope = kwargs.get("position_embeddings")
        cache: Any = kwargs.get("past_key_values")
        # Without a cache and a mask, transformers takes gaps between position ids for borders of
        # packed sequences: give it a mask of ours instead.
        repair = self._gaps and cache is None
        if forward.stage == 0 and not repair:
            return None
        layout = self._layouts[forward.stage]
        if forward.prefill:
            layout = layout.extended(forward.n_new)
        else:
            total = int(cache.get_seq_length(layer)) + hidden.shape[1]
            layout = layout.extended(total - layout.mask.shape[1])
        changed = dict(kwargs)
        key = (forward.stage, parts.sliding[layer])
        if key not in forward.tables:
            forward.tables[key] = self._mask(layer, hidden, layout, cache, parts)
        changed["attention_mask"] = forward.tables[key]
        if forward.stage > 0:
            if forward.stage not in forward.tables:
                positions = self._positions(kwargs["position_ids"], layout, hidden)
                positions = positions.to(hidden.device)
                forward.tables[forward.stage] = positions, parts.rotary(hidden, positions)
            changed["position_ids"], changed["position_embeddings"] = forward.tables[forward.stage]
            forward.rope = changed["position_embeddings"]
        return args, changed

    def _mask(
        self, layer: int, hidden: Tensor, layout: PromptLayout, cache: Any, parts: DecoderParts
    ) -> Any:
        copies = self._running().copies
        mask = None
        if not bool(layout.mask.all()):
            mask = layout.mask.repeat_interleave(copies, dim=0).to(hidden.device)
        create = create_sliding_window_causal_mask if parts.sliding[layer] else create_causal_mask
        return create(
            config=parts.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            past_key_values=cache,
            layer_idx=layer,
        )

    def _positions(self, given: Tensor, layout: PromptLayout, hidden: Tensor) -> Tensor:
        """Position ids [B, L'] of the rows of hidden, from those of the uncut sequence."""
        forward = self._running()
        given = given.expand(hidden.shape[0], -1)
        columns = hidden.shape[1]
        if forward.prefill:
            origin = layout.origin.repeat_interleave(forward.copies, dim=0).to(given.device)
            given = given.gather(1, origin)
        if not self._compact:
            return given
        shift = layout.shift[:, -columns:].repeat_interleave(forward.copies, dim=0)
        return (given - shift.to(given.device)).clamp(min=0)

    # -- cutting ---------------------------------------------------------------------------

    def wants(self, layer: int) -> bool:
        """Whether the projections of this layer are needed in this forward."""
        forward = self._forward
        return forward is not None and forward.prefill and forward.n_new == 0 and layer in self.cuts

    def capture(self, part: int, output: Tensor) -> None:
        """Remember a projection until the layer's attention is done."""
        self._running().projections[part] = output

    def observe(self, layer: int, parts: DecoderParts) -> None:
        """Score the blocks of a layer and let go of its projections."""
        if not self.wants(layer):
            return
        forward, cut = self._running(), self.cuts[layer]
        start = time.perf_counter()
        layout = self._layouts[forward.stage]
        for sample, blocks in enumerate(layout.blocks):
            due = [block for block in blocks if len(block) > cut.targets[block.image]]
            if not due:
                continue
            rows = self._rows(sample, layout, parts)
            for block in due:
                columns = torch.arange(block.start, block.stop, device=rows.columns.device)
                score = cut.score(rows, columns).float()
                keep = top_positions(score, cut.targets[block.image])
                forward.keep[block.image] = keep.to("cpu")
        if forward.keep:
            self.scored_layers.append(layer)
        forward.projections.clear()
        self.seconds += time.perf_counter() - start

    def _rows(self, sample: int, layout: PromptLayout, parts: DecoderParts) -> SampleRows:
        forward = self._running()
        row = sample * forward.copies
        query, key, value = (forward.projections[part][row] for part in range(3))
        cos, sin = cast("tuple[Tensor, Tensor]", forward.rope)
        table = row if cos.shape[0] > 1 else 0
        columns = layout.mask[sample].nonzero().squeeze(1)
        return SampleRows(
            last=int(columns[-1]),
            scaling=parts.head_dim**-0.5,
            columns=columns.to(query.device),
            _projections=(query, key, value),
            _rope=(cos[table].to(query.device), sin[table].to(query.device)),
            _parts=parts,
        )

    def leave(self, layer: int, hidden: Tensor, parts: DecoderParts) -> Tensor | None:
        """The layer's output [B, L, D] without the tokens that are cut, or None to keep it."""
        forward = self._forward
        if forward is None or layer not in self.cuts:
            return None
        if forward.prefill and forward.n_new == 0:
            return self._first_cut(layer, hidden)
        if layer not in self.cut_layers:
            return None
        stage = forward.stage
        forward.stage += 1
        if not forward.prefill:
            return None
        # Without a cache every step runs the whole sequence: cut what the prefill cut.
        width = self._layouts[stage].mask.shape[1]
        new = torch.arange(width, width + forward.n_new).expand(self._sources[stage].shape[0], -1)
        return _gathered(hidden, torch.cat([self._sources[stage], new], dim=1), forward.copies)

    def _first_cut(self, layer: int, hidden: Tensor) -> Tensor | None:
        forward = self._running()
        if not forward.keep:
            return None
        start = time.perf_counter()
        layout, source = self._layouts[forward.stage].cut(forward.keep)
        self._layouts.append(layout)
        self._sources.append(source)
        self.cut_layers.append(layer)
        for image, keep in forward.keep.items():
            before = self.kept.get(image)
            self.kept[image] = keep if before is None else before[keep]
        for blocks in layout.blocks:
            for block in blocks:
                self.counts.setdefault(block.image, []).append(len(block))
        forward.keep.clear()
        forward.stage += 1
        shorter = _gathered(hidden, source, forward.copies)
        self.seconds += time.perf_counter() - start
        return shorter

    def _running(self) -> _Forward:
        if self._forward is None:
            raise RuntimeError("a decoder layer ran before layer 0")
        return self._forward


def _gathered(hidden: Tensor, source: Tensor, copies: int) -> Tensor:
    """Columns source [B, L'] of hidden [B * copies, L, D]."""
    rows = source.repeat_interleave(copies, dim=0).to(hidden.device)
    return torch.take_along_dim(hidden, rows.unsqueeze(-1), dim=1)


class LayerStation(LayerHooks[DecoderParts]):
    """Hooks of one language model, registered once and idle until a request is active.

    Args:
        parts: the decoder, from its family.
    """

    def __init__(self, parts: DecoderParts) -> None:
        super().__init__(parts)
        if parts.head is not None:
            self._handles.append(
                parts.head.register_forward_pre_hook(self._check_labels, with_kwargs=True)
            )

    @contextmanager
    def active(self, request: LayerRequest) -> Iterator[None]:
        """Apply a request to the forwards of this thread inside the ``with`` block."""
        if request.idle:
            yield
            return
        self.check_open()
        with activate(self, request):
            yield
        # Closed meanwhile: what ran without the hooks is no result.
        self.check_open()

    def _check_labels(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse labels that the model would compare with the logits of a cut sequence."""
        request = cast("LayerRequest | None", active_request(self))
        if request is None or not request.cuts or kwargs.get("labels") is None:
            return
        raise UnsupportedError(
            "labels: tokens are cut inside the language model (after decoder layer "
            f"{', '.join(map(str, request.cuts))}), so the model's own loss would pair its logits "
            "with the labels of other tokens. Use EfficientLMM.forward(labels=...), or leave the "
            "labels out here and compute the loss with Prepared.labels_left(labels)."
        )
