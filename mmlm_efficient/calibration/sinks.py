"""Finding the sink dimensions of a model: where its massive activations sit.

The released code of "See What You Are Told" (arXiv 2503.03321) has three hand-written pairs and no
procedure; this one is our own. The first token of a prompt is nearly always an attention sink, so
the dimensions that are massive there in most of the middle layers are the candidates. They count
where visual tokens are massive in them too. A model whose visual tokens are massive elsewhere
(fine-tuned far from its language model) is scanned on visual tokens alone. Every prompt is run
once, without attention maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmlm_efficient.calibration.data import Sample
from mmlm_efficient.calibration.digests import samples_digest
from mmlm_efficient.calibration.vflowopt import model_inputs
from mmlm_efficient.errors import ContextError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.families.base import DecoderParts
from mmlm_efficient.machine import now_text, versions
from mmlm_efficient.model import EfficientLMM
from mmlm_efficient.prepare import prepare
from mmlm_efficient.pruning.decoder_ranking import last_token_attention
from mmlm_efficient.sinks.fingerprint import Fingerprint, signs_digest
from mmlm_efficient.sinks.flags import checked_dims, checked_threshold, relative_activations
from mmlm_efficient.sinks.profiles import LayerActivity, SinkProfile
from mmlm_efficient.stations.active import activate
from mmlm_efficient.stations.layer_rows import SampleRows

# Dimensions that a model may have at most; massive ones are few.
MOST_DIMS = 4
# Prompts in which a visual token must be massive for a dimension to count: one of so many.
_ONE_PROMPT_OF = 10
# Share of visual tokens above which "a few sinks" is no description any more.
_MANY = 0.1
# Attention to visual sinks over that to other visual tokens below which dimensions look inert.
_LEAST_RATIO = 2.0
_FEW_PROMPTS = 32
# A threshold below sqrt(width / this) would let so many dimensions of one state be massive.
_MOST_MASSIVE = 64


@dataclass(frozen=True)
class SinkCalibration:
    """What a calibration found.

    Attributes:
        profile: dimensions, threshold and what was seen by layer.
        first: float32 [layers, D], |x| / RMS(x) of the first token, median over the prompts.
        visual: float32 [layers, D], the largest of any visual token of any prompt.
    """

    profile: SinkProfile
    first: Tensor
    visual: Tensor


@dataclass(frozen=True)
class Trace:
    """What one prompt showed; all on the CPU, L decoder layers, V visual tokens.

    Attributes:
        first: float32 [L, D], |x| / RMS(x) of the first token.
        most: float32 [L, D], the largest of the visual tokens.
        massive: int64 [n, 3], every (layer, visual token, dimension) above the threshold.
        received: float32 [L, V], attention of the last prompt token, mean over heads.
    """

    first: Tensor
    most: Tensor
    massive: Tensor
    received: Tensor


@dataclass
class _Watch:
    """Looks at what enters every decoder layer in one forward: a `stations.hooks.LayerWork`.

    Attributes:
        visual: int64 [V] columns of the visual tokens; first, last: of the prompt.
        threshold: above which an activation is massive.
    """

    visual: Tensor
    first: int
    last: int
    threshold: float
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _rope: tuple[Tensor, Tensor] | None = None
    _projections: dict[int, Tensor] = field(default_factory=dict)
    _states: tuple[Tensor, Tensor, Tensor] | None = None

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: DecoderParts
    ) -> None:
        """Rate the states of the first and of the visual tokens."""
        hidden: Tensor = args[0][0]
        self._rope = kwargs["position_embeddings"]
        first = relative_activations(hidden[self.first])
        visual = relative_activations(hidden[self.visual.to(hidden.device)])
        most = visual.amax(dim=0)
        if not bool((first.isfinite() & most.isfinite()).all()):
            raise UnsupportedError(
                f"the states at decoder layer {layer} are no numbers. Check the model's dtype: "
                "float16 overflows in some models; try bfloat16 or float32"
            )
        massive = (visual > self.threshold).nonzero()
        layers = torch.full_like(massive[:, :1], layer)
        self._states = first.cpu(), most.cpu(), torch.cat([layers, massive], dim=1).cpu()

    def wants(self, layer: int) -> bool:
        """All layers."""
        return True

    def capture(self, part: int, output: Tensor) -> None:
        """Remember queries and keys until the layer's attention is done."""
        if part < 2:
            self._projections[part] = output[0]

    def observe(self, layer: int, parts: DecoderParts) -> None:
        """The last token's row of the layer's attention."""
        if self._rope is None or self._states is None:
            raise RuntimeError(f"the attention of decoder layer {layer} ran before the layer")
        device = self._projections[1].device
        cos, sin = (table[0].to(device) for table in self._rope)
        rows = SampleRows(
            last=self.last,
            scaling=parts.head_dim**-0.5,
            columns=torch.arange(self.first, self.last + 1, device=device),
            _projections=self._projections,
            _rope=(cos, sin),
            _parts=parts,
        )
        received = last_token_attention(rows, self.visual.to(device)).cpu()
        self.rows.append((*self._states, received))
        self._projections = {}

    def leave(self, layer: int, hidden: Tensor, parts: DecoderParts) -> None:
        """Nothing to change."""

    def trace(self) -> Trace:
        """What the layers showed."""
        first, most, massive, received = zip(*self.rows, strict=True)
        return Trace(
            torch.stack(first), torch.stack(most), torch.cat(massive), torch.stack(received)
        )


def calibrate_sinks(
    lmm: EfficientLMM,
    samples: Sequence[Sample],
    *,
    threshold: float | None = None,
    dims: Sequence[int] | None = None,
    progress: bool = True,
) -> SinkCalibration:
    """Find the sink dimensions of a model.

    Args:
        lmm: the model with its processor.
        samples: prompts with one picture each; 32 or more are better than fewer.
        threshold: of the sink score; None for `sinks.flags.default_threshold`.
        dims: dimensions to check instead of searching some; doubts become warnings.
        progress: show a progress bar.

    Raises:
        SettingsError: the threshold or the dimensions are out of range, or there are no samples.
        PromptError: a sample's prompt does not fit the model, or exceeds its context.
        UnsupportedError: no dimension is massive, or states are no numbers.
    """
    config = lmm.parts.family.model.config
    fingerprint = Fingerprint.of(config)
    threshold = _usable_threshold(threshold, fingerprint.hidden_size)
    if dims is not None:
        dims = checked_dims(dims, fingerprint.hidden_size, "dims")
    if not samples:
        raise SettingsError("calibration needs at least 1 sample, got none")
    bar = tqdm(samples, desc="prompts", leave=False, disable=not progress or None)
    prompts, traces = [], []
    for sample in bar:
        ids, trace = _traced(lmm, sample, threshold)
        prompts.append(ids)
        traces.append(trace)
    seen = _Seen(traces, threshold, middle_layers(fingerprint.layers))
    found, visual_only = (dims, False) if dims is not None else seen.dims()
    if not found:
        raise UnsupportedError(seen.nothing(lmm.name))
    layers = seen.activity(found)
    ratio = seen.attention_ratio(found)
    profile = SinkProfile(
        model=lmm.name,
        family=lmm._parts.identity.family,
        fingerprint=fingerprint,
        weights=signs_digest(lmm.parts.family.model),
        dims=tuple(found),
        threshold=threshold,
        visual_only=visual_only,
        attention_ratio=None if ratio is None else _rounded(ratio),
        warnings=tuple(_doubts(seen, found, layers, ratio, visual_only)),
        search={
            "date": now_text(),
            "samples": len(samples),
            "samples_sha256": samples_digest(samples, prompts),
            "candidates": list(seen.candidates()),
            "given": dims is not None,
            "dtype": str(lmm.parts.family.model.dtype).removeprefix("torch."),
            "versions": versions(),
        },
        layers=tuple(layers),
    )
    return SinkCalibration(profile, seen.typical, seen.largest)


def middle_layers(n_layers: int) -> range:
    """The middle half of the decoder layers, at least one.

    Example:
        >>> middle_layers(32), middle_layers(6), middle_layers(1)
        (range(8, 24), range(2, 5), range(0, 1))
    """
    start = min(math.ceil(n_layers / 4), n_layers - 1)
    return range(start, max(math.ceil(3 * n_layers / 4), start + 1))


def _usable_threshold(threshold: float | None, width: int) -> float:
    """A threshold that keeps massive dimensions few.

    Raises:
        SettingsError: it does not, or no state can exceed it.
    """
    threshold = checked_threshold(threshold, width, "threshold")
    least = math.sqrt(width / _MOST_MASSIVE)
    if threshold < least:
        raise SettingsError(
            f"threshold {threshold:g} is too low to tell massive activations from others: with a "
            f"hidden size of {width} give at least {least:.4g}, better "
            f"{checked_threshold(None, width):.4g}"
        )
    return threshold


def _traced(lmm: EfficientLMM, sample: Sample, threshold: float) -> tuple[Tensor, Trace]:
    """The token ids [1, S] of one prompt, and what it showed."""
    where, parts = f"sample {sample.name!r}", lmm._parts
    try:
        inputs = model_inputs(lmm, sample)
        with torch.no_grad():
            prepared = prepare(parts, inputs)
            watch = _watch(prepared.model_inputs, parts.family.placeholders, threshold)
            with activate(parts.layer.key, watch):
                parts.family.backbone(**prepared.model_inputs, use_cache=False)
    except ContextError as error:
        raise ContextError(
            f"{where}: {error}. Calibration prunes nothing: shorten this question, give a smaller "
            "picture, or leave the sample out"
        ) from error
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}: {error}") from error
    return inputs["input_ids"], watch.trace()


def _watch(inputs: Mapping[str, Any], placeholders: Mapping[Any, int], threshold: float) -> _Watch:
    """What looks at the forward of one prompt."""
    ids = inputs["input_ids"][0].cpu()
    visible = inputs.get("attention_mask", torch.ones_like(ids))[-1:].cpu().ne(0).reshape(-1)
    columns = visible.nonzero().squeeze(1)
    visual = torch.isin(ids, torch.tensor(list(placeholders.values()))) & visible
    return _Watch(visual.nonzero().squeeze(1), int(columns[0]), int(columns[-1]), threshold)


class _Seen:
    """What all prompts showed together.

    Args:
        traces: of the prompts.
        threshold: above which an activation is massive.
        middle: layers that decide.
    """

    def __init__(self, traces: Sequence[Trace], threshold: float, middle: range) -> None:
        self.traces, self.threshold, self.middle = traces, threshold, middle
        n_layers = len(traces[0].first)
        # By layer: all prompts of all layers need not be in memory twice.
        medians = [
            np.median(np.stack([trace.first[layer].numpy() for trace in traces]), axis=0)
            for layer in range(n_layers)
        ]
        self.typical = torch.from_numpy(np.stack(medians)).float()
        self.largest = torch.stack([trace.most for trace in traces]).amax(dim=0)

    def dims(self) -> tuple[tuple[int, ...], bool]:
        """The sink dimensions, and whether they were found on visual tokens only."""
        found = self.confirmed(self.candidates())
        return (found, False) if found else (self.visual_scan(), True)

    def candidates(self) -> tuple[int, ...]:
        """Dimensions that are massive at the first token in half of the middle layers."""
        typical = self.typical[list(self.middle)]
        return _most_massive(typical > self.threshold, typical.mean(dim=0))

    def confirmed(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Those that are massive at some visual token in a tenth of the prompts."""
        middle = list(self.middle)
        over = torch.stack([trace.most[middle].amax(dim=0) for trace in self.traces])
        prompts = (over > self.threshold).sum(dim=0)
        return tuple(dim for dim in dims if prompts[dim] * _ONE_PROMPT_OF >= len(self.traces))

    def visual_scan(self) -> tuple[int, ...]:
        """Dimensions that are massive at some visual token in a tenth of the prompts, in half of
        the middle layers."""
        most = torch.stack([trace.most[list(self.middle)] for trace in self.traces])
        prompts = (most > self.threshold).sum(dim=0)
        return _most_massive(
            prompts * _ONE_PROMPT_OF >= len(self.traces), most.mean(dim=0).mean(dim=0)
        )

    def activity(self, dims: Sequence[int]) -> list[LayerActivity]:
        """What was seen by layer."""
        own, total = list(dims), sum(trace.received.shape[1] for trace in self.traces)
        flags = [self._flags(trace, dims) for trace in self.traces]
        rest = self.largest.clone()
        rest[:, own] = 0.0
        layers = []
        for layer in range(len(self.largest)):
            sinks = sum(int(one[layer].sum()) for one in flags)
            attention = self._attention(flags, [layer])
            layers.append(
                LayerActivity(
                    layer=layer,
                    first=_rounded(float(self.typical[layer, own].max())),
                    visual=_rounded(float(self.largest[layer, own].max())),
                    rest=_rounded(float(rest[layer].max())),
                    share=_rounded(sinks / total),
                    per_prompt=_rounded(sinks / len(self.traces)),
                    attention_sinks=None if attention is None else _rounded(attention[0]),
                    attention_others=None if attention is None else _rounded(attention[1]),
                )
            )
        return layers

    def attention_ratio(self, dims: Sequence[int]) -> float | None:
        """Attention to a visual sink over that to another visual token, in the middle layers."""
        flags = [self._flags(trace, dims) for trace in self.traces]
        attention = self._attention(flags, self.middle)
        return None if attention is None else attention[0] / max(attention[1], 1e-12)

    def _flags(self, trace: Trace, dims: Sequence[int]) -> Tensor:
        """Which visual tokens of a prompt are sinks, bool [L, V]."""
        flags = torch.zeros(trace.received.shape, dtype=torch.bool)
        layer, token, dim = trace.massive.unbind(dim=1)
        own = torch.isin(dim, torch.tensor(list(dims)))
        flags[layer[own], token[own]] = True
        return flags

    def _attention(
        self, flags: Sequence[Tensor], layers: Sequence[int]
    ) -> tuple[float, float] | None:
        """Mean attention to a sink and to another visual token, over the rows that have both."""
        pairs = [
            (float(row[sinks].mean()), float(row[~sinks].mean()))
            for trace, own in zip(self.traces, flags, strict=True)
            for row, sinks in zip(trace.received[list(layers)], own[list(layers)], strict=True)
            if bool(sinks.any()) and not bool(sinks.all())
        ]
        if not pairs:
            return None
        to_sinks, to_others = np.mean(pairs, axis=0).tolist()
        return to_sinks, to_others

    def nothing(self, name: str) -> str:
        """Why there is no result, in words."""
        middle = list(self.middle)

        def largest(values: Tensor) -> str:
            value, dim = values[middle].amax(dim=0).max(dim=0)
            return f"{float(value):.3g} in dimension {int(dim)}"

        width = self.largest.shape[1]
        return (
            f"{name}: no dimension is massive in {len(self.traces)} prompts with the threshold "
            f"{self.threshold:.4g}. In the middle layers ({middle[0]} to {middle[-1]}), "
            f"|x| / RMS(x) of the first token is at most {largest(self.typical)}, and of visual "
            f"tokens {largest(self.largest)}; it could be up to sqrt({width}) = "
            f"{math.sqrt(width):.4g}. No profile is made: the model may have no attention sinks of "
            "this kind. If its massive activations are weaker, give a lower threshold"
        )


def _most_massive(massive: Tensor, mean: Tensor) -> tuple[int, ...]:
    """Dimensions that are massive in at least half of the layers, the most massive first.

    Args:
        massive: bool [layers, D].
        mean: float32 [D], by which they are ordered; ties to the lower dimension.
    """
    enough = massive.sum(dim=0) * 2 >= len(massive)
    order = mean.masked_fill(~enough, -1.0).argsort(descending=True, stable=True)
    return tuple(order[: min(MOST_DIMS, int(enough.sum()))].tolist())


def _doubts(
    seen: _Seen,
    dims: Sequence[int],
    layers: Sequence[LayerActivity],
    ratio: float | None,
    visual_only: bool,
) -> list[str]:
    """What makes a result doubtful, in words."""
    doubts = []
    if len(seen.traces) < _FEW_PROMPTS:
        doubts.append(f"only {len(seen.traces)} prompts: {_FEW_PROMPTS} or more are better")
    if visual_only:
        doubts.append(
            f"visual-only: dims {list(dims)} are massive on visual tokens, but not on the first "
            "token"
        )
    scanned = seen.visual_scan()
    missed = sorted(set(dims) - set(seen.confirmed(dims)) - set(scanned))
    if missed:
        doubts.append(
            f"dims {missed} are massive on a visual token in fewer than a tenth of the prompts"
        )
    others = sorted(set(scanned) - set(dims))
    if others:
        doubts.append(f"visual tokens are massive in dims {others} too, which were left out")
    # Those that count for the search, and those that VAR changes.
    looked_at = {*seen.middle, *range(2, len(layers) - 1)}
    crowded = [one for one in layers if one.layer in looked_at and one.share > _MANY]
    if crowded:
        most = max(one.share for one in crowded)
        doubts.append(
            f"more than {_MANY:.0%} of the visual tokens are sinks at decoder layers "
            f"{', '.join(str(one.layer) for one in crowded)} (up to {most:.0%}): the threshold may "
            "be too low, or the states of this model drift"
        )
    if ratio is None:
        doubts.append("dims look inert: no prompt has both visual sinks and other visual tokens")
    elif ratio < _LEAST_RATIO:
        doubts.append(
            f"dims look inert: visual sinks get {ratio:.2f} times the attention of other visual "
            f"tokens, expected at least {_LEAST_RATIO:g}"
        )
    return doubts


def _rounded(value: float) -> float:
    """To the digits that say something."""
    return float(f"{value:.5g}")
