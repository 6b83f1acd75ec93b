"""FlowCut inside a vision tower against the stock tower: time and peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    in_fresh_process,
    interleaved,
    peak_tensor_bytes,
    ratio,
    summary,
    timed,
)
from benchmarks.models import SMALL_DECODER, TowerSize, described, random_images, random_llava
from mmlm_efficient.families.llava import Llava
from mmlm_efficient.machine import peak_resident_bytes
from mmlm_efficient.prepare import LMMParts
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.stations.tower import TowerRun

MOST_TIME = 0.95
MOST_EXTRA_MEMORY = 0.05

WEIGHTS_NOTE = (
    "Random weights. As initialised (contrast 1) attention is nearly even, so that FlowCut cuts "
    "only at its forced last cut: the dearest case there is, every layer but the last two runs on "
    "all patches. With a higher contrast (query and key weights multiplied by it) attention is "
    "concentrated, as in trained towers, and patches leave earlier."
)
MEMORY_NOTE = (
    "Peak memory beyond the weights of one forward, with contrast 1. 'tensors' counts torch's own "
    "allocations: exact, the same in every run, and the figure that the goal is about. 'resident' "
    "is the growth of the resident set that Linux saw in a fresh process per run: it has the work "
    "space of the matrix library in it, but comes in whole pages and arenas and varies by a few MB."
)


@dataclass(frozen=True)
class TowerPlan:
    """What to measure.

    Attributes:
        size: of the tower.
        keep_tokens: FlowCut's budget.
        contrasts: factors on query and key weights, the first being the one the goals are about.
        repeats: rounds of timing.
        memory_repeats: fresh processes per case.
        seed: of weights and image.
    """

    size: TowerSize
    keep_tokens: int
    contrasts: tuple[float, ...]
    repeats: int
    memory_repeats: int
    seed: int


def measure_tower(plan: TowerPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Time and peak memory of the tower, pruned and stock, for one image."""
    cases = [_timed_case(plan, contrast, device, dtype) for contrast in plan.contrasts]
    memory = _memory(plan, device, dtype)
    time_ratio = cases[0]["time_ratio"]["of_medians"]
    extra = memory["tensors"]["extra"]
    return {
        "tower": described(plan.size),
        "dtype": str(dtype).removeprefix("torch."),
        "images": 1,
        "keep_tokens": plan.keep_tokens,
        "weights": WEIGHTS_NOTE,
        "cases": cases,
        "memory": memory,
        "goals": {
            "time_ratio": {
                "at_most": MOST_TIME,
                "measured": time_ratio,
                "met": time_ratio <= MOST_TIME,
            },
            "extra_peak_memory": {
                "at_most": MOST_EXTRA_MEMORY,
                "measured": extra,
                "met": extra <= MOST_EXTRA_MEMORY,
            },
        },
    }


def tower_flops(size: TowerSize, layer_counts: Sequence[int]) -> float:
    """Multiplications and additions of the encoder layers, for the patches entering each one."""
    tokens = [count + 1 for count in layer_counts]  # CLS
    return float(sum(24 * n * size.width**2 + 4 * n**2 * size.width for n in tokens))


class _Subject:
    """One random tower and one image, run stock or pruned."""

    def __init__(
        self, plan: TowerPlan, contrast: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.plan, self.device = plan, device
        self.model = random_llava(
            plan.size, SMALL_DECODER, device=device, dtype=dtype, seed=plan.seed, contrast=contrast
        )
        pixels = random_images(1, plan.size.image_px, device=device, seed=plan.seed)
        self.pixels = pixels.to(dtype)

    @torch.no_grad()
    def stock(self) -> list[Tensor]:
        """The stock tower, without a single hook on it."""
        inputs, family = {"pixel_values": self.pixels}, Llava(self.model)
        return family.stock_features(inputs, family.visuals(inputs))

    @torch.no_grad()
    def pruned(self, parts: LMMParts) -> TowerRun:
        """The tower with FlowCut."""
        job = TowerJob(
            targets=(self.plan.keep_tokens,),
            n_patches=self.plan.size.patches,
            last_cut_layer=parts.family.last_cut_layer,
            has_cls=True,
        )
        inputs, family = {"pixel_values": self.pixels}, parts.family
        visuals = family.visuals(inputs)
        with parts.tower.running(FlowCut(keep_tokens=self.plan.keep_tokens).tower_pass(job)) as run:
            family.project(torch.stack(family.run_tower(inputs, visuals)))
        return run


def _timed_case(
    plan: TowerPlan, contrast: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    subject = _Subject(plan, contrast, device, dtype)
    runs: list[TowerRun] = []

    def stock() -> dict[str, float]:
        return {"seconds": timed(subject.stock, device)[1]}

    def flowcut() -> dict[str, float]:
        with LMMParts(subject.model) as parts:
            run, seconds = timed(lambda: subject.pruned(parts), device)
        runs.append(run)
        return {"seconds": seconds, "prune": run.seconds}

    measured = interleaved(
        {"stock": stock, "flowcut": flowcut},
        plan.repeats,
        label=f"tower, contrast {contrast:g}",
    )
    seconds = {name: [one["seconds"] for one in rounds] for name, rounds in measured.items()}
    counts = runs[-1].layer_counts[0]
    full = tower_flops(plan.size, [plan.size.patches] * plan.size.layers)
    return {
        "contrast": contrast,
        "patches_entering_each_layer": counts,
        "stock": summary(seconds["stock"]),
        "flowcut": summary(seconds["flowcut"]),
        "prune_median_s": round(statistics.median(one["prune"] for one in measured["flowcut"]), 6),
        "time_ratio": ratio(seconds["flowcut"], seconds["stock"]),
        "flop_ratio": round(tower_flops(plan.size, counts) / full, 4),
        "stock_tflop": round(full / 1e12, 4),
    }


def _memory(plan: TowerPlan, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    stock, flowcut, weights = _tensor_peaks(plan, device, dtype)
    result: dict[str, Any] = {
        "what": MEMORY_NOTE,
        "weights_bytes": weights,
        "tensors": _compared(stock, flowcut, weights),
        "resident": None,
    }
    if device.type == "cpu":
        threads = torch.get_num_threads()
        found = {
            pruned: [
                in_fresh_process(_resident_peak, plan, pruned, threads)
                for _ in range(plan.memory_repeats)
            ]
            for pruned in (False, True)
        }
        peaks = {
            pruned: [peak for peak in values if peak is not None]
            for pruned, values in found.items()
        }
        if peaks[False] and peaks[True]:
            medians = [int(statistics.median(peaks[pruned])) for pruned in (False, True)]
            result["resident"] = {
                **_compared(medians[0], medians[1], weights),
                "stock_runs_bytes": peaks[False],
                "flowcut_runs_bytes": peaks[True],
            }
    return result


def _tensor_peaks(
    plan: TowerPlan, device: torch.device, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Peak bytes of tensors, stock and pruned, and the bytes of the weights."""
    subject = _Subject(plan, plan.contrasts[0], device, dtype)
    stock = peak_tensor_bytes(subject.stock, device)
    with LMMParts(subject.model) as parts:
        flowcut = peak_tensor_bytes(lambda: subject.pruned(parts), device)
    weights = sum(
        weight.numel() * weight.element_size()
        for weight in subject.model.model.vision_tower.parameters()
    )
    return stock, flowcut, weights


def _compared(stock: int, flowcut: int, weights: int) -> dict[str, Any]:
    """extra: relative to the stock peak alone; with the weights counted it is far smaller."""
    return {
        "stock_bytes": stock,
        "flowcut_bytes": flowcut,
        "extra": round(flowcut / stock - 1, 5),
        "extra_with_weights": round((flowcut + weights) / (stock + weights) - 1, 6),
    }


def _resident_peak(plan: TowerPlan, pruned: bool, threads: int) -> int | None:
    """In a fresh process: growth of the resident set in one forward."""
    torch.set_num_threads(threads)
    subject = _Subject(plan, plan.contrasts[0], torch.device("cpu"), torch.float32)
    if not pruned:
        return peak_resident_bytes(subject.stock)
    with LMMParts(subject.model) as parts:
        return peak_resident_bytes(lambda: subject.pruned(parts))
