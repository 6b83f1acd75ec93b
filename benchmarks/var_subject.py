"""One prompt of the VAR benchmark: the three ways to run it, and what is measured of each."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common import interleaved, peak_tensor_bytes, ratio, summary, timed
from benchmarks.models import FIRST_WORD
from benchmarks.var_models import (
    SINKS_PER_IMAGE,
    AttentionCall,
    EagerVar,
    Request,
    VarShape,
    full_map_attention,
    method,
    request,
)
from mmlm_efficient.answers import kv_bytes
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.sinks.evaluations import attend, choose
from mmlm_efficient.sinks.flags import sink_flags
from mmlm_efficient.sinks.redistribution import Keys
from mmlm_efficient.stations.handed import CACHE

SDPA, OURS, EAGER = "sdpa", "var", "eager var"
PHASES = ("prefill", "decode")
TEXT_BEFORE, TEXT_AFTER = 35, 60
# Tokens decoded, and attention calls of a decode step, in one measurement.
_DECODED, _CALLS = 8, 50
# Largest difference of a logit to eager VAR's that is rounding; else as a share of the largest.
_AGREE = {torch.float32: 1e-3}
_AGREE_SHARE = 0.05


@dataclass
class Way:
    """One of the three ways to run the model.

    Attributes:
        model: the one to run.
        active: what to run it inside of.
    """

    model: Any
    active: Callable[[], AbstractContextManager[Any]]


class Subject:
    """One prompt and the three ways to run it.

    Args:
        shape: of the model.
        parts: the model, for VAR.
        stock, mapped: its twins, for SDPA and for eager VAR.
        images: pictures of the prompt.
        seed: of the visual tokens.
        between: tokens of text between two pictures.
    """

    def __init__(
        self,
        shape: VarShape,
        parts: LMMParts,
        stock: Any,
        mapped: Any,
        images: int,
        seed: int,
        between: int = 0,
    ) -> None:
        self.shape, self.parts, self.images, self.between = shape, parts, images, between
        self.device = parts.model.device
        self.request: Request = request(
            parts, images, TEXT_BEFORE, TEXT_AFTER, self.device, seed, between
        )
        self.method = method(shape, parts.model.config)
        self.inputs = self.prepared()
        found = self.method.sinks(parts.model, parts.identity)
        self.dims, self.threshold = found.dims, found.threshold
        self.eager = EagerVar(mapped, self.method.rule, self.dims, self.threshold, shape.layers)
        self.ways = {
            SDPA: Way(stock, nullcontext),
            OURS: Way(parts.model, self.inputs.active),
            EAGER: Way(mapped, lambda: self.eager.active(self.request)),
        }

    def prepared(self, **settings: Any) -> Prepared:
        """The request with VAR, with other settings where given."""
        chosen = self.method.model_copy(update=settings)
        ids = {"input_ids": self.request.ids}
        return prepare(self.parts, ids, [chosen], encoded=self.request.encoded)

    def measured(self, repeats: int) -> dict[str, Any]:
        """Everything about this prompt."""
        load = os.getloadavg()[0]
        agreement, changed, calls = self._agreement(), self._changed(), self._calls()
        cases = {name: self._timed_model(way) for name, way in self.ways.items()}
        width = self.request.ids.shape[1]
        times = interleaved(cases, repeats, label=f"model, {width} tokens")
        cases = {name: _timed_attention(self, calls, name) for name in self.ways}
        alone = interleaved(cases, repeats, label=f"attention, {width} tokens")
        return {
            "tokens": width,
            "load_before": round(load, 2),
            "images": self.images,
            "visual_tokens": int(self.request.visual.sum()),
            "text_before": TEXT_BEFORE,
            "text_between": self.between,
            "text_after": TEXT_AFTER,
            "agreement": agreement,
            "changed": changed,
            "evaluation": self._evaluation(calls),
            "kernels": self._kernels(),
            "find_sinks": self._find_sinks(repeats),
            "model": _figures(times, self._model_peaks()),
            "attention": _figures(alone, _attention_peaks(self, calls)),
        }

    # -- the whole model

    def _prefill(self, way: Way, keep: int = 1) -> Any:
        inputs = self.inputs.model_inputs
        with way.active():
            return way.model(**inputs, use_cache=True, logits_to_keep=keep)

    def _decode(self, way: Way, cache: Any, steps: int) -> Tensor:
        """Logits [1, V] of the last of some further tokens."""
        logits = torch.empty(0)
        with way.active():
            for step in range(steps):
                ids = torch.full((1, 1), FIRST_WORD + step, device=self.device)
                logits = way.model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits
        return logits[:, -1]

    def _timed_model(self, way: Way) -> Callable[[], Mapping[str, float]]:
        def run() -> Mapping[str, float]:
            output, prefill = timed(lambda: self._prefill(way), self.device)
            cache = output[CACHE]
            self._decode(way, cache, 1)
            _, decode = timed(lambda: self._decode(way, cache, _DECODED), self.device)
            return {"prefill": prefill, "decode": decode / _DECODED}

        return run

    def _model_peaks(self) -> dict[str, dict[str, int]]:
        peaks = {}
        for name, way in self.ways.items():
            run = self._prefill
            prefill = peak_tensor_bytes(lambda: run(way), self.device)  # noqa: B023
            cache = self._prefill(way)[CACHE]
            # The step replaces the cache's tensors. Only what is allocated inside is seen to be
            # freed, so the cache is copied inside and taken off.
            copied_and_decoded = peak_tensor_bytes(
                lambda: self._decode(way, copy.deepcopy(cache), 1),  # noqa: B023
                self.device,
            )
            decode = copied_and_decoded - kv_bytes(cache)
            peaks[name] = {"prefill": prefill, "decode": decode}
        return peaks

    # -- what is compared

    def _agreement(self) -> dict[str, Any]:
        """Largest differences of logits: of the text rows after the images, and of a decoded
        token."""
        logits = {}
        for name, way in self.ways.items():
            output = self._prefill(way, keep=TEXT_AFTER)
            decoded = self._decode(way, output[CACHE], 1)
            logits[name] = {"prefill": output.logits[0].float(), "decode": decoded.float()}
        ours, eager = logits[OURS], logits[EAGER]
        scale = max(float(eager[phase].abs().max()) for phase in PHASES)
        at_most = _AGREE.get(self.parts.model.dtype, _AGREE_SHARE * scale)
        apart = {phase: float((ours[phase] - eager[phase]).abs().max()) for phase in PHASES}
        return {
            **{f"{phase}_to_eager": apart[phase] for phase in PHASES},
            "prefill_to_sdpa": float((ours["prefill"] - logits[SDPA]["prefill"]).abs().max()),
            "largest_logit": scale,
            "at_most": at_most,
            "met": max(apart.values()) <= at_most,
        }

    def _changed(self) -> dict[str, Any]:
        """Planted sinks that were found, and rows that were changed, over the active layers."""
        prepared: Any = self.prepared(return_stats=True)
        with prepared.active():
            output = self.parts.model(**prepared.model_inputs, use_cache=True, logits_to_keep=1)
            self._continued(output[CACHE])
        recorder = prepared._attention.recorder
        stats = recorder.stats(0)
        pairs = [(one.selected, one.eligible) for one in stats]
        decoded = [counts.tolist() for counts in recorder.decoded.values()]
        return {
            "visual_sinks_planted": SINKS_PER_IMAGE * self.images,
            "visual_sinks_found": [len(one.visual_sinks) for one in stats],
            "text_sinks_found": [len(one.text_sinks) for one in stats],
            "rows_changed": _share(pairs),
            "rows_changed_by_layer": [_share([pair]) for pair in pairs],
            "rows_changed_decoding": _share([(chosen, may) for may, chosen in decoded]),
            "largest_gain": round(max(one.gain for one in stats), 3),
        }

    def _continued(self, cache: Any) -> None:
        """One token on a cache, inside somebody else's `with`."""
        ids = torch.full((1, 1), FIRST_WORD, device=self.device)
        self.parts.model(input_ids=ids, **{CACHE: cache}, use_cache=True)

    def _calls(self) -> dict[str, AttentionCall]:
        """The attention of a middle layer, in the prefill and in a decode step."""
        self.eager.tap = self.shape.layers[len(self.shape.layers) // 2]
        way = self.ways[EAGER]
        self._decode(way, self._prefill(way)[CACHE], 1)
        self.eager.tap = None
        prefill, decode = self.eager.calls
        self.eager.calls = []
        return {"prefill": prefill, "decode": decode}

    def _evaluation(self, calls: Mapping[str, AttentionCall]) -> dict[str, str]:
        """The form that "auto" takes."""
        return {
            phase: choose(
                call.query.shape[0],
                call.query.shape[1],
                call.eligible.shape[1] if call.picked is None else len(call.picked),
                call.key.shape[2],
                call.query.dtype,
                self.device.type,
            )
            for phase, call in calls.items()
        }

    def _find_sinks(self, repeats: int) -> dict[str, Any]:
        """Seconds of looking for sinks in one layer's input."""
        config = self.parts.model.config.text_config
        hidden = torch.randn(
            1,
            self.request.ids.shape[1],
            config.hidden_size,
            device=self.device,
            dtype=self.parts.model.dtype,
        )
        visible = torch.ones_like(self.request.visual)

        def look() -> Tensor:
            return sink_flags(hidden, self.dims, self.threshold, visible)

        look()
        return summary([timed(look, self.device)[1] for _ in range(repeats)])

    def _kernels(self) -> dict[str, dict[str, dict[str, int]]]:
        """Attention operators and kernels of a forward, by how often they ran."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for name in (SDPA, OURS):
            way = self.ways[name]
            cache = self._prefill(way)[CACHE]
            found[name] = {
                "prefill": attention_kernels(
                    lambda: self._prefill(way),  # noqa: B023
                    self.device,
                ),
                "decode": attention_kernels(
                    lambda: self._decode(way, cache, 1),  # noqa: B023
                    self.device,
                ),
            }
        return found


def attention_kernels(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Operators and device kernels for attention that ran in a call, and how often."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
    words = ("attention", "flash", "fmha", "sdpa")
    return {
        event.key: event.count
        for event in profile.key_averages()
        if any(word in event.key.lower() for word in words)
    }


def _share(pairs: Sequence[tuple[int, int]]) -> float:
    """Of (part, whole) pairs together."""
    return round(sum(part for part, _ in pairs) / max(1, sum(whole for _, whole in pairs)), 4)


# -- the attention alone ---------------------------------------------------------------------


def _attention(subject: Subject, call: AttentionCall, name: str) -> Tensor:
    """The attention [1, Q, H, d] of one call in one of the three ways."""
    if name == SDPA:
        output, _ = sdpa_attention_forward(
            call.module, call.query, call.key, call.value, None, scaling=call.scaling
        )
        return output
    rule = subject.method.rule
    if name == EAGER:
        return full_map_attention(call, rule)
    outcome = attend(
        call.query,
        call.key,
        call.value,
        None,
        first_eligible=call.first,
        # A prefill finds new flags; decode steps share theirs.
        keys=call.keys if call.query.shape[2] == 1 else Keys(call.keys.visual, call.keys.sink),
        eligible=call.eligible,
        rule=rule,
        scaling=call.scaling,
        picked=call.picked,
    )
    return outcome.output.transpose(1, 2)


def _timed_attention(
    subject: Subject, calls: Mapping[str, AttentionCall], name: str
) -> Callable[[], Mapping[str, float]]:
    def many(phase: str, times: int) -> None:
        for _ in range(times):
            _attention(subject, calls[phase], name)

    def run() -> Mapping[str, float]:
        many("decode", 3)
        times = {"prefill": 1, "decode": _CALLS}
        return {
            phase: timed(lambda: many(phase, times[phase]), subject.device)[1] / times[phase]  # noqa: B023
            for phase in PHASES
        }

    return run


def _attention_peaks(
    subject: Subject, calls: Mapping[str, AttentionCall]
) -> dict[str, dict[str, int]]:
    return {
        name: {
            phase: peak_tensor_bytes(
                lambda: _attention(subject, calls[phase], name),  # noqa: B023
                subject.device,
            )
            for phase in PHASES
        }
        for name in subject.ways
    }


def _figures(
    times: Mapping[str, list[dict[str, float]]], peaks: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Times and peaks of the three ways by phase, and their ratios to SDPA."""
    figures: dict[str, Any] = {}
    for phase in PHASES:
        seconds = {name: [one[phase] for one in rounds] for name, rounds in times.items()}
        figures[phase] = {
            name: {
                **summary(seconds[name]),
                "to_sdpa": ratio(seconds[name], seconds[SDPA]),
                "peak_bytes": peaks[name][phase],
                "peak_to_sdpa": round(peaks[name][phase] / max(1, peaks[SDPA][phase]), 4),
            }
            for name in times
        }
    return figures
