"""Prefill of every pruning method at several budgets: measured speed-up against FLOPs.

    python -m benchmarks.methods_prefill --out docs/results/methods_prefill.json
    python -m benchmarks.methods_prefill --shape llava-next-7b --device cuda --dtype bfloat16

Random weights. All cases run in turns on the same prompt, from pixels to the first token's logits,
nothing remembered between them. Prefill is the language model's forward, scoring and cutting inside
it included, and the pruning before it: observing, scoring, selecting, merging.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    add_machine_options,
    interleaved,
    json_file,
    measured,
    peak_tensor_bytes,
    positive,
    summary,
)
from benchmarks.pocket_methods import (
    UNTUNED,
    Case,
    case_names,
    cases_of,
    first_token,
    prefill_figures,
)
from benchmarks.shapes import SHAPES, random_inputs, random_model
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.prepare import LMMParts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMULA = "2 * sum over layers of (2*(h + k)*d*n*w + 2*n*n*w + 3*n*w*m)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when a method refuses the shape.
    """
    options = _parser().parse_args(argv)
    result = measured(measure, options)
    if result is None:
        return 1
    print("\n".join(report(result)))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    return 0


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time every case and count what it computed."""
    shape, device = SHAPES[options.shape], torch.device(options.device)
    model = random_model(shape, device, DTYPES[options.dtype], options.seed)
    inputs = random_inputs(shape, model, options.text_tokens, device, options.seed)
    cases = cases_of(options.methods, options.ratios)
    name = "llava-onevision-qwen2-7b-ov-hf" if options.shape == "onevision-7b" else None
    with LMMParts(model, name=name) as parts:
        facts: dict[str, dict[str, Any]] = {}
        runs = {case.name: _runner(parts, inputs, case, facts) for case in cases}
        measured = interleaved(runs, options.repeats, label="prefill")
        for case in cases:
            call = runs[case.name]
            facts[case.name]["peak_bytes"] = peak_tensor_bytes(lambda: call(), device)  # noqa: B023
    stock = measured[cases[0].name]
    full_flops = facts[cases[0].name]["prefill_gflop"]
    rows = []
    for case in cases:
        rounds = measured[case.name]
        figures = prefill_figures(rounds, stock)
        flop_ratio = full_flops / facts[case.name]["prefill_gflop"]
        rows.append(
            {
                "method": case.label,
                "keep_ratio": case.keep_ratio,
                **facts[case.name],
                **figures,
                "forward": summary([one["forward"] for one in rounds]),
                "before": summary([one["before"] for one in rounds]),
                "flop_speed_up": round(flop_ratio, 3),
                "measured_to_flops": round(figures["prefill_speed_up"] / flop_ratio, 3),
            }
        )
    return {
        "benchmark": "methods_prefill",
        **provenance(device),
        "shape": options.shape,
        "model": shape.describes,
        "dtype": options.dtype,
        "text_tokens": options.text_tokens,
        "flop_formula": FORMULA,
        "rows": rows,
    }


def _runner(
    parts: LMMParts, inputs: Mapping[str, Any], case: Case, facts: dict[str, dict[str, Any]]
) -> Callable[[], Mapping[str, float]]:
    """One prefill of one case; its counts go into the facts."""

    def run() -> Mapping[str, float]:
        seconds, image, cache_bytes = first_token(parts, inputs, [case.method])
        text = inputs["input_ids"].shape[1] - image.n_in
        lengths = [text + tokens for tokens in image.decoder_layer_tokens]
        facts[case.name] = {
            "visual_tokens": image.n_in,
            "mean_decoder_tokens": round(image.mean_decoder_tokens, 2),
            "final_tokens": image.per_station["layer"],
            "prefill_gflop": round(decoder_flops(parts, lengths) / 1e9, 3),
            "kv_bytes": cache_bytes,
        }
        return seconds

    return run


def decoder_flops(parts: LMMParts, lengths: Sequence[int]) -> float:
    """Multiplications and additions of the decoder layers, one length per layer."""
    decoder = parts.family.decoder
    width, mlp = int(decoder.config.hidden_size), int(decoder.config.intermediate_size)
    projected = 2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim * width
    inner = decoder.heads * decoder.head_dim
    per_layer = (projected * n + 2 * n * n * inner + 3 * n * width * mlp for n in lengths)
    return 2.0 * sum(per_layer)


def report(result: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    lines = [f"{result['model']}, {result['dtype']}, {machine_line(result)}"]
    for row in result["rows"]:
        lines.append(
            f"  {row['method']:12s} {row['keep_ratio']:<6g} {row['mean_decoder_tokens']:7.1f} "
            f"tokens, {row['final_tokens']:5d} last {row['prefill_ms']:9.2f} ms "
            f"{row['prefill_speed_up']:5.2f}x, by FLOPs {row['flop_speed_up']:5.2f}x "
            f"({row['measured_to_flops']:.2f})"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench methods_prefill",
        description="Prefill of every pruning method: measured speed-up against FLOPs.",
        epilog="example: mmlm bench methods_prefill --out outputs/methods_prefill.json",
        allow_abbrev=False,
    )
    names = [name for name in case_names() if name != UNTUNED]
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--shape", choices=list(SHAPES), default="mid", help="default mid")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=names,
        default=names,
        metavar="METHOD",
        help=f"of {', '.join(names)}; default all",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--text-tokens", type=positive, default=64, help="default 64")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; default 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
