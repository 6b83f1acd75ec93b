"""Station 3: the decoder layers. Visual tokens are cut from the output of a layer.

A :class:`LayerCut` names a layer, how many tokens stay and how they are ranked. The station runs
that layer on all tokens, scores the image blocks from the rows it needs (never a full attention
map, whatever attention implementation is on), and cuts the layer's output; dropped tokens may be
merged into new ones. The layers after it get positions and masks for what is left; their part of
the KV cache is shorter, and decoding continues with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts
from mmlm_efficient.stations.active import activate
from mmlm_efficient.stations.bridge import Block, PromptLayout
from mmlm_efficient.stations.handed import cache_of, causal_mask, check_decoder
from mmlm_efficient.stations.hooks import Arguments, LayerHooks, StationHook, check_seen
from mmlm_efficient.stations.layer_rows import (
    LayerCut,
    LayerScorer,
    Merge,
    SampleRows,
    cut_rows,
    merges_of,
)
from mmlm_efficient.tokens import top_positions

__all__ = ["LayerCut", "LayerRequest", "LayerScorer", "LayerStation", "SampleRows"]


@dataclass
class _Forward:
    """One forward of the decoder.

    Attributes:
        prefill: the whole prompt runs (with or without generated tokens behind it).
        n_new: tokens behind the prompt in this forward.
        copies: batch rows per prompt (beams or returned sequences).
        stage: cuts passed so far.
        rope: position table of the layer that runs now.
        embeddings: input of layer 0, where a cut asks for it.
        keep: for each image that this layer cuts, the positions that stay; merged tokens last,
            each at its carrier's position.
        groups: for each image with merged tokens, the members of each.
        scores: of the tokens of an image whose merging waits for the layer's output.
        tables: positions and masks already built, by stage and kind of mask.
    """

    prefill: bool
    n_new: int
    copies: int
    stage: int = 0
    rope: tuple[Tensor, Tensor] | None = None
    embeddings: Tensor | None = None
    keep: dict[int, Tensor] = field(default_factory=dict)
    groups: dict[int, Sequence[Tensor]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[Any, Any] = field(default_factory=dict)


class LayerRequest:
    """Cuts of one request, and their state from its prefill to its last token.

    Args:
        layout: the prompt as it enters the decoder.
        cuts: in ascending order of layers.
        compact: renumber positions after a cut; otherwise kept tokens keep theirs.
        gaps: the prompt's position ids have gaps already.

    Raises:
        SettingsError: a cut gives images of one prompt, which it ranks together, other ratios.

    Attributes:
        kept: for each image that was cut, int64 positions among its tokens before the decoder,
            merged tokens last, each as its carrier.
        members: for each image with merged tokens, by carrier, the positions of all members;
            a token that was merged with no other is not listed.
        cut_layers: decoder layers whose output was cut, in order.
        counts: for each image, its tokens after each of those cuts.
        scored_layers: decoder layers that were scored in the last prefill.
        steps: forwards over generated tokens since the last prefill.
        seconds: host seconds spent in scoring and cutting.
    """

    def __init__(
        self, layout: PromptLayout, cuts: Sequence[LayerCut], *, compact: bool, gaps: bool
    ) -> None:
        self.cuts = {cut.layer: cut for cut in sorted(cuts, key=lambda cut: cut.layer)}
        self.kept: dict[int, Tensor] = {}
        self.members: dict[int, dict[int, tuple[int, ...]]] = {}
        self.cut_layers: list[int] = []
        self.counts: dict[int, list[int]] = {}
        self.scored_layers: list[int] = []
        self.prefilled = False
        self.steps = 0
        self.seconds = 0.0
        self._compact = compact
        self._gaps = gaps
        # From here on, "uncut" means the prompt as the decoder gets it.
        self._layouts = [PromptLayout.of(layout.mask, layout.blocks, layout.padding_side)]
        self._uncut = {block.image: block for blocks in layout.blocks for block in blocks}
        self._memory: dict[int, dict[str, Any]] = {}
        self._sources: list[Tensor] = []
        self._merges: list[list[Merge]] = []
        self._forward: _Forward | None = None
        self._left: set[int] = set()
        for cut in self.cuts.values():
            cut.check_ratios(layout.blocks)

    @property
    def idle(self) -> bool:
        """Whether the request has nothing to do at this station."""
        return not self.cuts and not self._gaps

    @property
    def layout(self) -> PromptLayout:
        """What the last forward over the prompt left of it; ``origin`` counts its columns."""
        return self._layouts[-1]

    @property
    def running_layout(self) -> PromptLayout:
        """The prompt as it enters the layer that runs now."""
        return self._layouts[0 if self._forward is None else self._forward.stage]

    def check_acted(self, new_tokens: int) -> None:
        """The model has run: refuse its result where the request should have worked and did not.

        Args:
            new_tokens: tokens that were generated, 0 for a plain forward.

        Raises:
            UnsupportedError: it did not see the prompt, or no generated token behind a cut.
        """
        check_seen(self._forward is not None and self._left >= {*self.cuts}, "the language model")
        if self.cut_layers:
            check_seen(new_tokens < 2 or self.steps > 0, "decoding")

    # -- one forward -----------------------------------------------------------------------

    def begin(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        """A forward starts; hidden [B, L, D] enters layer 0."""
        cache = cache_of(kwargs)
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
                "decoder supports only an empty cache there: leave it out, and give "
                "the earlier turns as part of the prompt."
            )
        n_new = hidden.shape[1] - width if prefill else 0
        if prefill and self.cuts:
            self._check_prefill(n_new, cache)
            if n_new == 0:
                self._restart()
        wanted = any(cut.embeddings for cut in self.cuts.values()) and prefill and n_new == 0
        self.steps += int(not prefill or n_new > 0)
        self._forward = _Forward(
            prefill=prefill, n_new=n_new, copies=copies, embeddings=hidden if wanted else None
        )

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
        self._merges.clear()
        self._memory.clear()
        self.kept.clear()
        self.members.clear()
        self.counts.clear()
        self.cut_layers.clear()
        self._left.clear()
        self.scored_layers.clear()
        self.prefilled = True
        self.steps = 0
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
        cache = cache_of(kwargs)
        # Without a cache and a mask, transformers takes gaps between position ids for borders of
        # packed sequences: give it a mask of ours instead.
        repair = self._gaps and cache is None
        if forward.stage == 0 and not repair:
            return None
        # The same for all layers of a stage: made by the first of them.
        tables, stage = forward.tables, forward.stage
        masked = (stage, parts.sliding[layer])
        if masked not in tables or (stage > 0 and stage not in tables):
            layout = self._entering(layer, hidden, cache)
            tables[masked] = self._mask(layer, hidden, layout, cache, parts)
            if stage > 0 and stage not in tables:
                tables[stage] = self._positions(kwargs, layout, hidden, parts)
        changed = {**kwargs, "attention_mask": tables[masked]}
        if stage > 0:
            changed["position_ids"], changed["position_embeddings"] = tables[stage]
            forward.rope = changed["position_embeddings"]
        return args, changed

    def _entering(self, layer: int, hidden: Tensor, cache: Any) -> PromptLayout:
        """What the layer that runs now attends to: its part of the prompt, and new tokens."""
        forward = self._running()
        layout = self._layouts[forward.stage]
        if forward.prefill:
            return layout.extended(forward.n_new)
        total = int(cache.get_seq_length(layer)) + hidden.shape[1]
        return layout.extended(total - layout.mask.shape[1])

    def _mask(
        self, layer: int, hidden: Tensor, layout: PromptLayout, cache: Any, parts: DecoderParts
    ) -> Any:
        copies = self._running().copies
        mask = None
        if not bool(layout.mask.all()):
            mask = layout.mask.repeat_interleave(copies, dim=0).to(hidden.device)
        sliding = parts.sliding[layer]
        return causal_mask(parts.config, hidden, mask, cache, layer, sliding=sliding)

    def _positions(
        self,
        kwargs: Mapping[str, Any],
        layout: PromptLayout,
        hidden: Tensor,
        parts: DecoderParts,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """Position ids [B, L'] and rotary tables of the rows of hidden, from the uncut ones.

        Original positions are gathered, so that they may be those of several axes (M-RoPE).
        """
        forward = self._running()
        given: Tensor | None = kwargs.get("position_ids")
        tables: tuple[Tensor, Tensor] = kwargs["position_embeddings"]
        batch, columns = hidden.shape[:2]
        origin = None
        if forward.prefill:
            origin = layout.origin.repeat_interleave(forward.copies, dim=0).to(hidden.device)
        if given is not None:
            given = given.expand(batch, -1)
            given = given if origin is None else given.gather(1, origin)
        if self._compact:
            if given is None:
                raise UnsupportedError(
                    "position_ids='compact': this model gives its decoder layers no position ids "
                    "to renumber. Use position_ids='original'."
                )
            shift = layout.shift[:, -columns:].repeat_interleave(forward.copies, dim=0)
            given = (given - shift.to(given.device)).clamp(min=0).to(hidden.device)
            return given, parts.rotary(hidden, given)
        if origin is None:
            return given, tables
        cos, sin = (
            torch.take_along_dim(table.expand(batch, -1, -1), origin.unsqueeze(-1), dim=1)
            for table in tables
        )
        return given, (cos, sin)

    # -- cutting ---------------------------------------------------------------------------

    def wants(self, layer: int) -> bool:
        """Whether the projections of this layer are needed in this forward."""
        cut = self._cutting(layer)
        return cut is not None and cut.score is not None and not cut.lookahead

    def _cutting(self, layer: int) -> LayerCut | None:
        """The cut that is to be decided at this layer in this forward, if any."""
        forward = self._forward
        if forward is None or not forward.prefill or forward.n_new > 0:
            return None
        return self.cuts.get(layer)

    def capture(self, part: int, output: Tensor) -> None:
        """Remember a projection until the layer's attention is done."""
        self._running().projections[part] = output

    def observe(self, layer: int, parts: DecoderParts) -> None:
        """Score the blocks of a layer and let go of its projections."""
        if self.wants(layer):
            self._choose(layer, parts)
            self._running().projections.clear()

    def _choose(self, layer: int, parts: DecoderParts) -> None:
        """Decide which tokens of every image stay."""
        forward, cut = self._running(), self.cuts[layer]
        start = time.perf_counter()
        for sample, blocks in enumerate(self._layouts[forward.stage].blocks):
            due = [block for block in blocks if cut.due(block.image, len(block))]
            rows = self._rows(sample, parts) if due and cut.score is not None else None
            groups = [[block] for block in due] if cut.ratios is None else [due] if due else []
            for group in groups:
                self._rank(cut, group, rows)
        if forward.keep and cut.score is not None:
            self.scored_layers.append(layer)
        self.seconds += time.perf_counter() - start

    def _rank(self, cut: LayerCut, blocks: Sequence[Block], rows: SampleRows | None) -> None:
        """Rank the tokens of some blocks of one prompt together and note what stays."""
        forward = self._running()
        scores = torch.cat([self._score(cut, block, rows) for block in blocks])
        target = cut.target([b.image for b in blocks], [len(block) for block in blocks])
        if target == len(scores):
            return
        keep = top_positions(scores, target).to("cpu")
        first = 0
        for block in blocks:
            inside = keep[(keep >= first) & (keep < first + len(block))] - first
            forward.keep[block.image] = inside
            if cut.recycler is not None:
                forward.scores[block.image] = scores[first : first + len(block)]
            first += len(block)

    def _score(self, cut: LayerCut, block: Block, rows: SampleRows | None) -> Tensor:
        """Scores [V] of one block's tokens."""
        if cut.score is None or rows is None:
            fixed = (cut.fixed or {})[block.image]
            kept = self.kept.get(block.image)
            return fixed.float() if kept is None else fixed[kept.to(fixed.device)].float()
        columns = torch.arange(block.start, block.stop, device=rows.columns.device)
        uncut, memory = self._uncut[block.image], self._memory.setdefault(block.image, {})
        return cut.score(replace(rows, block=block, uncut=uncut, memory=memory), columns).float()

    def _rows(self, sample: int, parts: DecoderParts) -> SampleRows:
        forward, layout = self._running(), self._layouts[self._running().stage]
        row = sample * forward.copies
        projections = {part: rows[row] for part, rows in forward.projections.items()}
        cos, sin = cast("tuple[Tensor, Tensor]", forward.rope)
        table = row if cos.shape[0] > 1 else 0
        columns = layout.mask[sample].nonzero().squeeze(1)
        device = next(iter(projections.values())).device
        embeddings = forward.embeddings
        return SampleRows(
            last=int(columns[-1]),
            scaling=parts.head_dim**-0.5,
            columns=columns.to(device),
            _projections=projections,
            _rope=(cos[table].to(device), sin[table].to(device)),
            _parts=parts,
            text=layout.text(sample),
            uncut_text=self._layouts[0].text(sample),
            _embeddings=None if embeddings is None else embeddings[row],
        )

    def leave(self, layer: int, hidden: Tensor, parts: DecoderParts) -> Tensor | None:
        """The layer's output [B, L, D] without the tokens that are cut, or None to keep it."""
        forward = self._forward
        if forward is None or layer not in self.cuts:
            return None
        self._left.add(layer)
        cut = self._cutting(layer)
        if cut is not None:
            with torch.no_grad():
                self._decide_late(layer, cut, hidden, parts)
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
        source = torch.cat([self._sources[stage], new], dim=1)
        return cut_rows(hidden, source, self._merges[stage], forward.copies)

    def _decide_late(self, layer: int, cut: LayerCut, hidden: Tensor, parts: DecoderParts) -> None:
        """What can be decided only with the layer's output: all of a cut with fixed scores or
        with lookahead, and which dropped tokens are merged."""
        forward = self._running()
        if cut.lookahead:
            # Called from our own hook: no request wants these projections.
            normed = parts.norms[layer + 1](hidden)
            for part in (0, 1):
                forward.projections[part] = parts.projections[layer + 1][part](normed)
        if cut.lookahead or cut.score is None:
            self._choose(layer, parts)
            forward.projections.clear()
        if cut.recycler is None:
            return
        layout = self._layouts[forward.stage]
        for sample, blocks in enumerate(layout.blocks):
            for block in blocks:
                if block.image in forward.scores:
                    rows = hidden[sample * forward.copies, block.start : block.stop]
                    scores, keep = forward.scores.pop(block.image), forward.keep[block.image]
                    groups = [group.to("cpu") for group in cut.recycler(scores, keep, rows)]
                    carriers = torch.tensor([int(group[0]) for group in groups], dtype=torch.long)
                    forward.groups[block.image] = groups
                    forward.keep[block.image] = torch.cat([keep, carriers])

    def _first_cut(self, layer: int, hidden: Tensor) -> Tensor | None:
        forward = self._running()
        if not forward.keep:
            return None
        start = time.perf_counter()
        before = self._layouts[forward.stage]
        layout, source = before.cut(forward.keep)
        merges = merges_of(before, layout, forward.groups)
        self._layouts.append(layout)
        self._sources.append(source)
        self._merges.append(merges)
        self.cut_layers.append(layer)
        self._remember()
        for blocks in layout.blocks:
            for block in blocks:
                self.counts.setdefault(block.image, []).append(len(block))
        forward.keep.clear()
        forward.groups.clear()
        forward.stage += 1
        shorter = cut_rows(hidden, source, merges, forward.copies)
        self.seconds += time.perf_counter() - start
        return shorter

    def _remember(self) -> None:
        """Note what is left of every image, in positions before the decoder."""
        forward = self._running()
        for image, keep in forward.keep.items():
            kept = self.kept.get(image)
            own = self.members.setdefault(image, {})
            origin = None if kept is None else kept.tolist()
            merged: dict[int, tuple[int, ...]] = {}
            for group in forward.groups.get(image, ()):
                ids = group.tolist()
                if origin is not None:
                    ids = [origin[position] for position in ids]
                # A member that stood for several tokens itself brings them along.
                everything = [one for i in ids for one in own.get(i, (i,))]
                if len(everything) > 1:
                    merged[ids[0]] = tuple(sorted(set(everything)))
            self.kept[image] = keep if kept is None else kept[keep]
            left = set(self.kept[image].tolist())
            self.members[image] = {i: m for i, m in own.items() if i in left} | merged

    def _running(self) -> _Forward:
        if self._forward is None:
            raise RuntimeError("a decoder layer ran before layer 0")
        return self._forward


class LayerStation(LayerHooks[DecoderParts]):
    """Hooks of one language model, registered once and idle until a request is active.

    Args:
        parts: the decoder, from its family.

    Raises:
        UnsupportedError: a release of transformers whose layers are called otherwise.
    """

    def __init__(self, parts: DecoderParts) -> None:
        check_decoder(parts)
        super().__init__(parts)
        check = StationHook(self.key, _check_labels)
        if parts.head is not None:
            self._handles.append(parts.head.register_forward_pre_hook(check, with_kwargs=True))

    @contextmanager
    def active(self, request: LayerRequest) -> Iterator[None]:
        """Apply a request to the forwards of this thread inside the ``with`` block."""
        if request.idle:
            yield
            return
        self.check_open()
        with activate(self.key, request):
            yield
        # Closed meanwhile: what ran without the hooks is no result.
        self.check_open()


def _check_labels(
    request: LayerRequest, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse labels that the model would compare with the logits of a cut sequence."""
    if not request.cuts or kwargs.get("labels") is None:
        return
    raise UnsupportedError(
        "labels: tokens are cut inside the language model (after decoder layer "
        f"{', '.join(map(str, request.cuts))}), so the model's own loss would pair its logits "
        "with the labels of other tokens. Use EfficientLMM.forward(labels=...), or leave the "
        "labels out here and compute the loss with Prepared.labels_left(labels)."
    )
