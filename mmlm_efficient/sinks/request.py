"""VAR in one request: where its visual tokens are, which tokens are sinks, which rows may change.

All that is known about the prompt comes from its layout on the host, so that no layer waits for a
GPU. Sinks are found layer by layer while the prompt is prefilled (also in chunks, also again when
there is no cache), on the residual stream that enters the layer; generated tokens are never sinks.
The state is the request's own: the next question starts without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.sinks.evaluations import Evaluation, attend, worth_picking
from mmlm_efficient.sinks.flags import sink_flags
from mmlm_efficient.sinks.recorder import Forward, Recorder
from mmlm_efficient.sinks.redistribution import Keys, Rule
from mmlm_efficient.sinks.reports import layer_reports
from mmlm_efficient.stations.bridge import PromptLayout
from mmlm_efficient.stations.handed import cache_of
from mmlm_efficient.stations.hooks import check_seen
from mmlm_efficient.tokens import LayerRedistribution, VisualTokens


@dataclass(frozen=True)
class _Tables:
    """What is known about a prompt [B, P] before any layer runs, on the model's device.

    Attributes:
        visual: bool, visual tokens.
        visible: bool, no padding.
        eligible: bool, text behind the sample's first visual token.
        columns: those that are eligible in some sample, ascending; on the host.
        first: the first of them, or the number of columns; None without visual tokens.
    """

    visual: Tensor
    visible: Tensor
    eligible: Tensor
    columns: tuple[int, ...]
    first: int | None
    _picked: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: PromptLayout, device: torch.device) -> _Tables:
        visible = layout.mask
        visual = torch.zeros_like(visible)
        after = torch.zeros_like(visible)
        for sample, blocks in enumerate(layout.blocks):
            for block in blocks:
                visual[sample, block.start : block.stop] = True
            if starts := [block.start for block in blocks if len(block)]:
                after[sample, min(starts) :] = True
        eligible = after & visible & ~visual
        columns = tuple(torch.nonzero(eligible.any(dim=0)).flatten().tolist())
        first = columns[0] if columns else visible.shape[1]
        return cls(
            visual=visual.to(device),
            visible=visible.to(device),
            eligible=eligible.to(device),
            columns=columns,
            first=first if bool(visual.any()) else None,
        )

    def picked(self, first: int, end: int) -> Tensor | None:
        """Which of the columns first to end - 1 may change in any sample.

        Returns:
            Int64 [R] counted from first, on the device, made once for all layers; None where so
            many may that picking them would not pay.
        """
        width = self.visible.shape[1]
        if first >= width:
            return None
        if (first, end) not in self._picked:
            self._picked.clear()  # without a cache every step asks for one more row
            found = [column - first for column in self.columns if first <= column < end]
            found += range(width - first, end - first)
            index = None
            if worth_picking(len(found), end - first):
                index = torch.tensor(found, dtype=torch.long, device=self.visible.device)
            self._picked[first, end] = index
        return self._picked[first, end]


@dataclass(frozen=True)
class _Past:
    """What a static cache held when a layer of the running forward was entered."""

    cache: weakref.ref[Any]
    layout: PromptLayout
    layer: int
    length: int


class RedistributionRequest:
    """Station "attention" of one request.

    Args:
        layout: gives the prompt as it enters the layer that runs now.
        rule: thresholds.
        dims: hidden dimensions of massive activations.
        threshold: of the sink score.
        layers: decoder layers that change.
        evaluation: which form computes the rows.
        recorder: sees what a layer did, or None.
    """

    def __init__(
        self,
        layout: Callable[[], PromptLayout],
        rule: Rule,
        dims: tuple[int, ...],
        threshold: float,
        layers: frozenset[int],
        evaluation: Evaluation,
        recorder: Recorder | None = None,
    ) -> None:
        self.rule = rule
        self.evaluation = evaluation
        self.recorder = recorder
        self._layout = layout
        self._dims = dims
        self._threshold = threshold
        self._layers = layers
        self._tables: dict[tuple[int, torch.device], tuple[PromptLayout, _Tables]] = {}
        self._keys: dict[int, Keys] = {}
        self._past: _Past | None = None
        self._entered: set[int] = set()
        self.decoded = 0

    def enter(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> _LayerWork | None:
        """See `AttentionRequest`: find the sinks among the prompt's tokens, choose the rows."""
        self._entered.add(layer)
        if layer not in self._layers:
            return None
        layout = self._layout()
        tables = self._tables_of(layout, hidden.device)
        if tables.first is None:
            return None
        samples, width = tables.visual.shape
        copies, rest = divmod(hidden.shape[0], samples)
        if rest:
            raise UnsupportedError(
                f"this request was prepared for {samples} prompt(s), but the model runs a batch of "
                f"{hidden.shape[0]}. Prepare the inputs that you run."
            )
        cache = cache_of(kwargs)
        past = 0 if cache is None else self._past_of(layer, layout, cache)
        offset = 0 if cache is None else int(cache.get_mask_sizes(hidden.shape[1], layer)[1])
        self._find_sinks(layer, hidden, past, tables, copies)
        if self.recorder is not None and past == 0:
            self.recorder.begin(layer, layout, copies)
        end = past + hidden.shape[1]
        first = min(max(past, tables.first), end)
        if first == end and self.recorder is None:
            return None
        eligible = functional.pad(tables.eligible, (0, max(0, end - width)))
        eligible[:, width:] = True  # without effect in a sample without visual tokens
        rows = _copied(eligible[:, first:end], copies)
        picked = tables.picked(first, end)
        forward = Forward(past, first - past, width, offset, self._keys[layer], rows, picked)
        return _LayerWork(self, layer, forward)

    def on_device(self, layer: int, forward: Forward, device: torch.device) -> Forward:
        """A forward's tables where the attention runs: a layer's input may come from elsewhere."""
        keys, eligible = forward.keys, forward.eligible
        if keys.visual.device == device and eligible.device == device:
            return forward
        keys = self._keys[layer] = Keys(keys.visual.to(device), keys.sink.to(device))
        picked = None if forward.picked is None else forward.picked.to(device)
        return replace(forward, keys=keys, eligible=eligible.to(device), picked=picked)

    def check_acted(self, new_tokens: int) -> None:
        """See `AttentionRequest`."""
        check_seen(self._entered >= self._layers, "the language model")
        # No keys: not one visual token was left.
        check_seen(not self._keys or new_tokens < 2 or self.decoded > 0, "decoding")

    def report(
        self, tokens: Sequence[VisualTokens], layout: PromptLayout
    ) -> tuple[LayerRedistribution, ...]:
        """See `AttentionRequest`: empty without `return_stats`. Waits for the device."""
        return () if self.recorder is None else layer_reports(self.recorder, tokens, layout)

    def _tables_of(self, layout: PromptLayout, device: torch.device) -> _Tables:
        found = self._tables.get((id(layout), device))
        if found is None or found[0] is not layout:
            found = self._tables[id(layout), device] = (layout, _Tables.of(layout, device))
        return found[1]

    def _past_of(self, layer: int, layout: PromptLayout, cache: Any) -> int:
        """Tokens that the layer's cache holds. A static cache counts on the device: it is asked
        once per forward and layout, not once per layer."""
        last = self._past
        same = last is not None and last.cache() is cache and last.layout is layout
        if last is not None and same and last.layer < layer:
            self._past = replace(last, layer=layer)
            return last.length
        length = cache.get_seq_length(layer)
        if not isinstance(length, Tensor):
            self._past = None
            return int(length)
        self._past = _Past(weakref.ref(cache), layout, layer, int(length))
        return self._past.length

    def _find_sinks(
        self, layer: int, hidden: Tensor, past: int, tables: _Tables, copies: int
    ) -> None:
        """Flags of the prompt's tokens among those that enter the layer now.

        Raises:
            UnsupportedError: the cache holds tokens that did not pass here.
        """
        width = tables.visual.shape[1]
        known = self._keys.get(layer)
        seen = 0 if known is None else known.sink.shape[1]
        if seen < min(past, width) or (past and known and len(known.sink) != len(hidden)):
            raise UnsupportedError(
                f"the cache holds {past} tokens of which this request has not seen all; "
                "which of them are attention sinks is not known. Run the whole prompt with an "
                "empty cache in this request, or give methods=() to run the stock model."
            )
        if past >= width:
            return
        entering = hidden[:, : width - past]
        visible = _copied(tables.visible[:, past : past + entering.shape[1]], copies)
        flags = sink_flags(entering, self._dims, self._threshold, visible)
        if past and known is not None:
            # Columns behind `past` are of tokens that were cropped from the cache.
            flags = torch.cat([known.sink[:, :past].to(flags.device), flags], dim=1)
        visual = _copied(tables.visual[:, : flags.shape[1]], copies)
        self._keys[layer] = Keys(visual, flags)


@dataclass(frozen=True)
class _LayerWork:
    """One layer in one forward; see `AttentionWork`."""

    request: RedistributionRequest
    layer: int
    forward: Forward

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor | None:
        """The attention with the sinks' share handed on; plain SDPA where there are no sinks."""
        request = self.request
        if module.training or (torch.is_grad_enabled() and query.requires_grad):
            state = "in training mode" if module.training else "run with gradients"
            raise UnsupportedError(
                f"VAR is for inference: model.eval() and torch.no_grad(); the model is {state}. "
                "Leave VAR out to train."
            )
        forward = request.on_device(self.layer, self.forward, query.device)
        request.decoded += int(forward.past + query.shape[2] > forward.width)
        keys = forward.cached_keys
        outcome = None
        # On a CPU a look costs nothing; elsewhere it would wait for the device.
        on_cpu = query.device.type == "cpu"
        some = bool(forward.eligible.shape[1] and keys.visual.shape[1])
        if some and not (on_cpu and keys.inert(request.rule)):
            outcome = attend(
                query,
                key,
                value,
                mask,
                first_eligible=forward.first,
                keys=keys,
                eligible=forward.eligible,
                rule=request.rule,
                scaling=scaling,
                evaluation=request.evaluation,
                picked=forward.picked,
            )
        if request.recorder is not None:
            request.recorder.add(
                self.layer, forward, query, key, mask, scaling, request.rule, outcome
            )
        return None if outcome is None else outcome.output.transpose(1, 2)


def _copied(table: Tensor, copies: int) -> Tensor:
    """Rows of prompts for the rows of a batch that holds each prompt several times (beams)."""
    return table if copies == 1 else table.repeat_interleave(copies, dim=0)
