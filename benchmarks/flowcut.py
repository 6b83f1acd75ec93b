"""``mmlm bench flowcut``: what FlowCut costs and saves, against the stock model in one run.

Three parts: the vision tower alone (time, peak memory), exact token counts on random images and
budgets, and prefill at several budgets. Weights are random, so that sizes can be those of real
models without a download; nothing here says anything about answers (see pocket_accuracy).

    python -m benchmarks.flowcut --out docs/results/flowcut_bench.json
    python -m benchmarks.flowcut --quick
    python -m benchmarks.flowcut --device cuda --full-size --out docs/results/flowcut_bench_gpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import positive
from benchmarks.exactness import measure_exactness
from benchmarks.models import SMALL_DECODER, SMALL_TOWER, DecoderSize, TowerSize
from benchmarks.prefill import PrefillPlan, measure_prefill
from benchmarks.tower import TowerPlan, measure_tower
from mmlm_efficient.errors import MMLMError
from mmlm_efficient.files import write_json
from mmlm_efficient.loading import check_device
from mmlm_efficient.machine import machine_line, provenance

PARTS = ("tower", "exactness", "prefill")
# With 576 visual tokens: the 663-token prompt of the paper's FLOP count.
TEXT_TOKENS = 87


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; or 1 when a token count was not exact or the device is not there.
    """
    options = _parser().parse_args(argv)
    try:
        device = check_device(options.device)
    except MMLMError as error:
        print(f"mmlm: {error}", file=sys.stderr)
        return 1
    if options.full_size and device.type != "cuda":
        print("--full-size needs a GPU: add --device cuda", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = measure(options, device)
    if options.out is not None:
        write_json(options.out, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join(_report(result)))
        print(f"written: {options.out}" if options.out else "nothing written: give --out FILE")
    exact = result.get("exactness", {"met": True})["met"]
    return 0 if exact else 1


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All parts that were asked for."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {
        "benchmark": "flowcut",
        "quick": options.quick,
        **provenance(device),
        "seed": options.seed,
    }
    if "tower" in options.parts:
        result["tower"] = measure_tower(_tower_plan(options), device, dtype)
    if "exactness" in options.parts:
        images = 60 if options.quick else options.images
        result["exactness"] = measure_exactness(images, options.seed)
    if "prefill" in options.parts:
        result["prefill"] = measure_prefill(_prefill_plan(options), device, dtype)
    return result


def _tower_plan(options: argparse.Namespace) -> TowerPlan:
    quick = options.quick
    return TowerPlan(
        size=SMALL_TOWER if quick else TowerSize(),
        keep_tokens=16 if quick else 64,
        contrasts=(1.0,) if quick else (1.0, 10.0, 16.0),
        repeats=2 if quick else options.repeats,
        memory_repeats=1 if quick else 3,
        seed=options.seed,
    )


def _prefill_plan(options: argparse.Namespace) -> PrefillPlan:
    budgets: tuple[int, ...]
    if options.quick:
        tower, decoder, budgets, scale = SMALL_TOWER, SMALL_DECODER, (48, 16), "tiny, for tests"
    else:
        tower, budgets = TowerSize(), (192, 128, 64)
        layers = 32 if options.full_size else options.decoder_layers
        decoder = DecoderSize(layers=layers)
        scale = (
            f"LLaVA-1.5-7B: the whole tower, decoder layers of full width, {layers} of 32 of them"
        )
    return PrefillPlan(
        tower=tower,
        decoder=decoder,
        scale=scale,
        budgets=budgets,
        text_tokens=12 if options.quick else TEXT_TOKENS,
        decode_tokens=2 if options.quick else options.decode_tokens,
        repeats=2 if options.quick else options.repeats,
        seed=options.seed,
    )


def _report(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    lines = [f"FlowCut on {machine_line(result)}"]
    if result["quick"]:
        lines.append("quick run on tiny models: the figures mean nothing")
    if "tower" in result:
        lines += _tower_report(result["tower"])
    if "exactness" in result:
        part = result["exactness"]
        lines.append(f"exact counts: {part['exact']} of {part['images']} images")
        lines += [f"  wrong: {mismatch}" for mismatch in part["mismatches"]]
    if "prefill" in result:
        lines += _prefill_report(result["prefill"])
    return lines


def _tower_report(part: dict[str, Any]) -> list[str]:
    lines = [f"tower, {part['tower']['layers']} layers, {part['keep_tokens']} tokens kept:"]
    for case in part["cases"]:
        lines.append(
            f"  contrast {case['contrast']:g}: stock {case['stock']['median_s']:.3f} s, "
            f"flowcut {case['flowcut']['median_s']:.3f} s, "
            f"ratio {case['time_ratio']['of_medians']:.3f} (FLOPs {case['flop_ratio']:.3f})"
        )
    memory = part["memory"]
    lines.append(f"  extra peak memory: {memory['tensors']['extra']:+.2%} of tensors")
    if memory["resident"] is not None:
        lines[-1] += f", {memory['resident']['extra']:+.2%} resident"
    for name, goal in part["goals"].items():
        verdict = "met" if goal["met"] else "missed"
        lines.append(f"  goal {name} <= {goal['at_most']}: {goal['measured']} {verdict}")
    return lines


def _prefill_report(part: dict[str, Any]) -> list[str]:
    lines = [f"prefill, {part['scale']}, {part['text_tokens']} text tokens:"]
    for case in part["cases"]:
        tower_s, prefill_s = case["tower"]["median_s"], case["prefill"]["median_s"]
        lines.append(
            f"  {case['visual_tokens']:4d} visual tokens: "
            f"tower {tower_s:.3f} s, prefill {prefill_s:.3f} s, "
            f"x{case['prefill_speed_up']:.2f} (FLOPs x{case['flop_speed_up']:.2f}), "
            f"first token x{case['first_token_speed_up']:.2f}, KV {case['kv_bytes']:,} bytes"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench flowcut",
        description="FlowCut against the stock model in one run: tower time and peak memory, "
        "exact token counts, prefill speed. Random weights of real sizes; takes some minutes.",
        epilog="example: mmlm bench flowcut --out docs/results/flowcut_bench.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; default: write nothing")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a summary")
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--full-size", action="store_true", help="prefill with all 32 layers")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds (default 5)")
    parser.add_argument("--images", type=positive, default=1000, help="for exact counts")
    parser.add_argument("--decoder-layers", type=positive, default=4, help="of 32 (default 4)")
    parser.add_argument("--decode-tokens", type=positive, default=4, help="further tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
