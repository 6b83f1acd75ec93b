"""What calibrating VFlowOpt costs: a candidate with everything cached against one without.

    python -m benchmarks.calibration --out docs/results/calibration_bench.json

The released code runs the tower and the unpruned model again for every candidate. Here both are
remembered; the two ways are timed in turns on the same candidates and give the same objective.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import add_machine_options, interleaved, json_file, positive, ratio, summary
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.calibration.data import Sample, find_samples
from mmlm_efficient.calibration.vflowopt import (
    Prompt,
    candidate,
    cosines,
    last_state,
    model_inputs,
    optimize_profile,
    remembered,
)
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import default_stage_layers, segments

THETA = {"c0": 0.3, "u": 0.5, "anchor_threshold": 2.0, "merge_grid_size": 4.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _parser().parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = measure(options)
    print("\n".join(report(result)))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time a candidate both ways, then a whole calibration."""
    samples = find_samples("pocket", options.samples, seed=42)
    with load(options.model, device=options.device, dtype="float32") as lmm:
        prompts = remembered(lmm, samples, progress=False)
        inputs = [model_inputs(lmm, sample) for sample in samples]
        cases: dict[str, Any] = {}
        for weight in (0.0, 0.3):
            method = _method(lmm, options.budget, weight)
            cases |= _both_ways(lmm, prompts, inputs, method, f"entropy_weight {weight:g}")
        agreement = _agreement(lmm, prompts, inputs, _method(lmm, options.budget, 0.3))
        measured = interleaved(cases, options.repeats, label="candidate")
        whole = _whole_search(lmm, samples, options)
        device = lmm.model.device
    seconds = {name: [one["candidate"] for one in rounds] for name, rounds in measured.items()}
    return {
        "benchmark": "calibration",
        **provenance(device),
        "model": options.model,
        "samples": len(samples),
        "budget": options.budget,
        "largest_difference_of_a_cosine": agreement,
        "candidates": [
            {
                "candidate": name.removesuffix(", cached"),
                "cached": summary(seconds[name]),
                "recomputed": summary(seconds[name.replace("cached", "recomputed")]),
                "recomputed_to_cached": ratio(
                    seconds[name.replace("cached", "recomputed")], seconds[name]
                ),
            }
            for name in seconds
            if name.endswith("cached")
        ],
        "search": whole,
    }


def _method(lmm: EfficientLMM, budget: float, weight: float) -> VFlowOpt:
    depth = lmm.parts.identity.decoder_layers
    layers = default_stage_layers(depth)
    theta = {**THETA, "c0": 1.2 * budget, "entropy_weight": weight}
    return candidate(theta, budget, layers, segments(layers, depth), "budget")


def _both_ways(
    lmm: EfficientLMM,
    prompts: Sequence[Prompt],
    inputs: Sequence[Mapping[str, Any]],
    method: VFlowOpt,
    name: str,
) -> dict[str, Any]:
    def cached() -> Mapping[str, float]:
        start = time.perf_counter()
        cosines(lmm.parts, prompts, method)
        return {"candidate": time.perf_counter() - start}

    def recomputed() -> Mapping[str, float]:
        start = time.perf_counter()
        _recomputed(lmm, inputs, method)
        return {"candidate": time.perf_counter() - start}

    return {f"{name}, cached": cached, f"{name}, recomputed": recomputed}


@torch.no_grad()
def _recomputed(
    lmm: EfficientLMM, inputs: Sequence[Mapping[str, Any]], method: VFlowOpt
) -> list[float]:
    """The objective as the released code computes it: the tower, both models, every time."""
    found = []
    for one in inputs:
        full = last_state(lmm.parts, one, ())
        pruned = last_state(lmm.parts, one, [method])
        found.append(float(torch.nn.functional.cosine_similarity(full, pruned, dim=0)))
    return found


def _agreement(
    lmm: EfficientLMM,
    prompts: Sequence[Prompt],
    inputs: Sequence[Mapping[str, Any]],
    method: VFlowOpt,
) -> float:
    """Largest difference between the cosines of the two ways."""
    pair = (cosines(lmm.parts, prompts, method), _recomputed(lmm, inputs, method))
    one, other = (Tensor(values) for values in pair)
    return float((one - other).abs().max())


def _whole_search(
    lmm: EfficientLMM, samples: Sequence[Sample], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a calibration from nothing, and what it found."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = optimize_profile(
            lmm,
            samples,
            options.budget,
            n_evaluations=options.evaluations,
            log_path=Path(folder) / "search.jsonl",
        )
    seconds = time.perf_counter() - start
    inside = sum(one.seconds for one in outcome.result.evaluations)
    return {
        "evaluations": len(outcome.result.evaluations),
        "seconds": round(seconds, 2),
        "in_candidates_s": round(inside, 2),
        "candidate_median_s": round(
            statistics.median(one.seconds for one in outcome.result.evaluations), 4
        ),
        "mean_cosine": round(outcome.mean, 6),
        "untuned_mean_cosine": round(outcome.untuned_mean, 6),
    }


def report(result: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    lines = [f"{result['samples']} samples, budget {result['budget']:g}, {machine_line(result)}"]
    for one in result["candidates"]:
        lines.append(
            f"  {one['candidate']}: {one['cached']['median_s']:.3f} s cached, "
            f"{one['recomputed']['median_s']:.3f} s recomputed: "
            f"{one['recomputed_to_cached']['of_medians']:.2f}x"
        )
    whole = result["search"]
    lines.append(
        f"  {whole['evaluations']} evaluations in {whole['seconds']:.1f} s; mean cosine "
        f"{whole['mean_cosine']:.4f}, untuned {whole['untuned_mean_cosine']:.4f}"
    )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench calibration",
        description="What calibrating VFlowOpt on pocket costs, with and without remembering.",
        epilog="example: mmlm bench calibration --out outputs/calibration_bench.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same kind")
    parser.add_argument("--samples", type=positive, default=30, help="default 30")
    parser.add_argument("--evaluations", type=positive, default=50, help="default 50")
    parser.add_argument("--budget", type=float, default=0.25, help="default 0.25")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; default 5")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
