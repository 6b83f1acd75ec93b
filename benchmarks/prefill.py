"""Prefill with fewer visual tokens: measured speed-up beside the one that the FLOPs promise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved, peak_tensor_bytes, ratio, summary, timed
from benchmarks.models import (
    DecoderSize,
    TowerSize,
    batch,
    described,
    prompt,
    random_images,
    random_llava,
)
from mmlm_efficient.answers import kv_bytes
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.stations.handed import CACHE

UNPRUNED = "unpruned"
STOCK = "stock model"
NOTE = (
    "One prompt with one image. tower: vision tower and projector, pruning inside it included; "
    "prune: the scoring and cutting alone, as the host sees it; prefill: the language model over "
    "the prompt, to the first token; first_token: all of it, the prompt's shortening included; "
    "decode: one further token. 'stock model' is transformers without a hook, 'unpruned' the same "
    "through this package with no method. Random weights: the tower cuts late, see the tower part."
)
FORMULA = "2 * layers * (4 n D^2 + 2 n^2 D + 3 n D M), n = text and visual tokens"


@dataclass(frozen=True)
class PrefillPlan:
    """What to measure.

    Attributes:
        tower, decoder: sizes.
        scale: the sizes in words.
        budgets: visual tokens kept, one FlowCut case each.
        text_tokens: tokens of the prompt that are not visual.
        decode_tokens: further tokens to generate, for the decode time.
        repeats: rounds of timing.
        seed: of weights and image.
    """

    tower: TowerSize
    decoder: DecoderSize
    scale: str
    budgets: tuple[int, ...]
    text_tokens: int
    decode_tokens: int
    repeats: int
    seed: int


def measure_prefill(plan: PrefillPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of every phase, FLOPs and KV bytes for each budget."""
    model = random_llava(plan.tower, plan.decoder, device=device, dtype=dtype, seed=plan.seed)
    per_image = plan.tower.patches
    words = prompt(1, per_image, plan.text_tokens, plan.decoder.vocabulary)
    pixels = random_images(1, plan.tower.image_px, device=device, seed=plan.seed).to(dtype)
    inputs = {**batch([words], device), "pixel_values": pixels}
    budgets: dict[str, int] = {
        UNPRUNED: per_image,
        **{f"flowcut {tokens}": tokens for tokens in plan.budgets},
    }
    facts: dict[str, dict[str, Any]] = {}

    def case(name: str, methods: tuple[Method, ...]) -> Callable[[], Mapping[str, float]]:
        def run() -> Mapping[str, float]:
            with LMMParts(model) as parts, torch.no_grad():
                seconds, facts[name] = _request(parts, inputs, methods, plan, device)
            return seconds

        return run

    cases: dict[str, Callable[[], Mapping[str, float]]] = {
        STOCK: lambda: _stock(model, inputs, device),
        UNPRUNED: case(UNPRUNED, ()),
    }
    for name, tokens in budgets.items():
        if name != UNPRUNED:
            cases[name] = case(name, (FlowCut(keep_tokens=tokens),))
    measured = interleaved(cases, plan.repeats, label="prefill")
    if device.type == "cuda":
        for name, run in cases.items():
            facts.setdefault(name, {})["peak_tensor_bytes"] = peak_tensor_bytes(run, device)
    return {
        "what": NOTE,
        "scale": plan.scale,
        "tower": described(plan.tower),
        "decoder": described(plan.decoder),
        "dtype": str(dtype).removeprefix("torch."),
        "text_tokens": plan.text_tokens,
        "flop_formula": FORMULA,
        "stock": {
            **summary([one["first_token"] for one in measured[STOCK]]),
            **facts.get(STOCK, {}),
        },
        "unpruned_to_stock": ratio(
            [one["first_token"] for one in measured[UNPRUNED]],
            [one["first_token"] for one in measured[STOCK]],
        ),
        "cases": [
            {
                "name": name,
                "visual_tokens": tokens,
                **_row(plan, tokens, per_image, measured[name], measured[UNPRUNED]),
                **facts[name],
            }
            for name, tokens in budgets.items()
        ],
    }


def decoder_flops(size: DecoderSize, tokens: int) -> float:
    """Multiplications and additions of the decoder layers in the prefill of a prompt."""
    width, mlp = size.width, size.mlp_width
    per_layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * mlp
    return 2.0 * size.layers * per_layer


def _row(
    plan: PrefillPlan,
    tokens: int,
    all_tokens: int,
    rounds: list[dict[str, float]],
    unpruned: list[dict[str, float]],
) -> dict[str, Any]:
    """Figures of one case. Speed-ups are unpruned / this."""
    column = {phase: [one[phase] for one in rounds] for phase in rounds[0]}
    before = {phase: [one[phase] for one in unpruned] for phase in rounds[0]}
    flops = decoder_flops(plan.decoder, plan.text_tokens + tokens)
    full = decoder_flops(plan.decoder, plan.text_tokens + all_tokens)
    return {
        "prefill_tflop": round(flops / 1e12, 4),
        "flop_speed_up": round(full / flops, 3),
        "prefill_speed_up": _speed_up(before["prefill"], column["prefill"]),
        "first_token_speed_up": _speed_up(before["first_token"], column["first_token"]),
        "decode_speed_up": _speed_up(before["decode"], column["decode"]),
        "tower": summary(column["tower"]),
        "prune_median_s": round(statistics.median(column["prune"]), 6),
        "prefill": summary(column["prefill"]),
        "first_token": summary(column["first_token"]),
        "decode": summary(column["decode"]),
    }


def _speed_up(before: list[float], after: list[float]) -> float:
    return round(statistics.median(before) / statistics.median(after), 3)


def _request(
    parts: LMMParts,
    inputs: Mapping[str, Tensor],
    methods: tuple[Method, ...],
    plan: PrefillPlan,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, Any]]:
    """One request through the package: seconds by phase, and what does not vary."""
    prepared, prepare_s = timed(lambda: prepare(parts, inputs, methods), device)
    with prepared.active():
        output, prefill_s = timed(lambda: _prefill(parts.model, prepared), device)
        kept_bytes = kv_bytes(output[CACHE])
        _, decode_s = timed(
            lambda: _decode(parts.model, output, prepared, plan.decode_tokens), device
        )
    report = prepared.report()
    seconds = {
        "tower": report.seconds["tower_s"],
        "prune": report.seconds["prune_s"],
        "prefill": prefill_s,
        "first_token": prepare_s + prefill_s,
        "decode": decode_s / plan.decode_tokens,
    }
    counts = list(report.images[0].layer_counts)
    return seconds, {
        "kv_bytes": kept_bytes,
        "kept": len(report.images[0].kept),
        "patches_entering_each_tower_layer": counts,
    }


def _prefill(model: Any, prepared: Prepared) -> Any:
    return model(**prepared.model_inputs, use_cache=True, logits_to_keep=1)


def _decode(model: Any, output: Any, prepared: Prepared, steps: int) -> None:
    """Generate greedily, one token at a time."""
    mask = prepared.model_inputs["attention_mask"]
    for _ in range(steps):
        token = output.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        output = model(
            input_ids=token,
            attention_mask=mask,
            **{CACHE: output[CACHE]},
            use_cache=True,
        )


@torch.no_grad()
def _stock(model: Any, inputs: Mapping[str, Tensor], device: torch.device) -> Mapping[str, float]:
    """The stock model from pixels to its first token."""
    _, seconds = timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1), device)
    return {"first_token": seconds}
