"""VAR against plain SDPA and against eager VAR: time and memory of prefill and decode.

    python -m benchmarks.var_attention --threads 1 --repeats 7 --out docs/results/var_attention.json
    python -m benchmarks.var_attention --shape llava-next-7b --device cuda --dtype bfloat16

Random weights with planted sinks. The three ways run in turns on the same prompt, first the whole
language model (the finding of sinks included), then the attention of one layer alone. Prefill is
from the visual tokens to the last token's logits; decode is one further token on the filled cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    add_machine_options,
    json_file,
    measured,
    positive,
)
from benchmarks.var_models import SHAPES, method, random_model, twin
from benchmarks.var_subject import OURS, PHASES, Subject
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import MIB, machine_line, provenance
from mmlm_efficient.prepare import LMMParts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Most that VAR may take, as a ratio to SDPA; prefill by the pictures of the prompt.
MOST_PREFILL_TIME = {1: 1.4, 5: 1.1}
MOST_DECODE_TIME = 1.3
MOST_MEMORY = 1.1

NOTE = (
    "'model': the language model, to the last token's logits; VAR's search for sinks is in it. "
    "'attention': the attention of one layer alone, on its queries, keys and values. 'sdpa' is the "
    "stock model of transformers without a hook, 'var' this package, 'eager var' the definition on "
    "the full attention map of every layer, as the released code works, but vectorised. Peak "
    "memory counts tensors beyond weights and inputs (decode: beyond the filled cache)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when a setting is wrong or VAR's logits are not eager VAR's.
    """
    options = _parser().parse_args(argv)
    result = measured(measure, options)
    if result is None:
        return 1
    print("\n".join(_report(result)))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    else:
        print("nothing written: give --out FILE")
    wrong = [one for one in result["prompts"] if not one["agreement"]["met"]]
    for one in wrong:
        print(f"{one['tokens']} tokens: VAR and eager VAR differ", file=sys.stderr)
    return int(bool(wrong))


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of all prompts."""
    shape, device = SHAPES[options.shape], torch.device(options.device)
    model = random_model(shape, device, DTYPES[options.dtype], options.seed)
    stock, mapped = twin(model), twin(model)
    with LMMParts(model) as parts:
        prompts = [
            Subject(shape, parts, stock, mapped, *prompt).measured(options.repeats)
            for prompt in _prompts(options)
        ]
    return {
        "benchmark": "var_attention",
        **provenance(device),
        "what": NOTE,
        "shape": options.shape,
        "model": shape.describes,
        "layers": model.config.text_config.num_hidden_layers,
        "var_layers": list(shape.layers),
        "var": method(shape, model.config).rule.__dict__,
        "dtype": options.dtype,
        "repeats": options.repeats,
        "prompts": prompts,
        "targets": [target for one in prompts for target in _targets(one)],
    }


def _prompts(options: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Pictures, seed, and tokens between the pictures of each prompt."""
    for images in options.images:
        yield images, options.seed, 0
        if images > 1:
            yield images, options.seed, options.between


# -- figures ---------------------------------------------------------------------------------


def _targets(one: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What was wanted of a prompt and what came out: time of the model and of the attention,
    memory of the model."""
    for phase in PHASES:
        most = MOST_DECODE_TIME
        if phase == "prefill":
            most = MOST_PREFILL_TIME.get(one["images"], max(MOST_PREFILL_TIME.values()))
        for part in ("model", "attention"):
            reached = one[part][phase][OURS]["to_sdpa"]["of_medians"]
            yield _target(f"{part} {phase} time", one["tokens"], most, reached)
        reached = one["model"][phase][OURS]["peak_to_sdpa"]
        yield _target(f"model {phase} peak memory", one["tokens"], MOST_MEMORY, reached)


def _target(what: str, tokens: int, at_most: float, measured: float) -> dict[str, Any]:
    return {
        "what": f"{what} / sdpa",
        "tokens": tokens,
        "at_most": at_most,
        "measured": measured,
        "met": measured <= at_most,
    }


# -- words -----------------------------------------------------------------------------------


def _report(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{result['model']}, {result['dtype']}, {machine_line(result)}"
    for one in result["prompts"]:
        agreement, changed = one["agreement"], one["changed"]
        yield (
            f"{one['tokens']} tokens, {one['visual_tokens']} visual"
            f"{f', {gap} of text between pictures' if (gap := one['text_between']) else ''}: "
            f"{changed['rows_changed']:.1%} of the rows changed; logits to eager VAR "
            f"{agreement['prefill_to_eager']:.1e}, to SDPA {agreement['prefill_to_sdpa']:.1e}; "
            f"finding sinks {1000 * one['find_sinks']['median_s']:.2f} ms a layer"
        )
        for part in ("model", "attention"):
            for phase in PHASES:
                cells = [
                    f"{name} {1000 * row['median_s']:.2f} ms ({row['to_sdpa']['of_medians']:.3f}) "
                    f"{row['peak_bytes'] / MIB:.1f} MiB ({row['peak_to_sdpa']:.2f})"
                    for name, row in one[part][phase].items()
                ]
                yield f"  {part:9s} {phase:7s} " + "; ".join(cells)
    for target in result["targets"]:
        word = "met" if target["met"] else "MISSED"
        yield (
            f"  {target['tokens']:5d} tokens, {target['what']:34s} {target['measured']:.3f} "
            f"(at most {target['at_most']}): {word}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench var_attention",
        description="VAR against plain SDPA and eager VAR: time and memory of prefill and decode.",
        epilog="example: mmlm bench var_attention --threads 1 --out outputs/var_attention.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--shape", choices=list(SHAPES), default="mid", help="default mid")
    parser.add_argument(
        "--images",
        nargs="+",
        type=positive,
        default=[1, 5],
        help="pictures of 576 tokens in each prompt; default 1 5",
    )
    parser.add_argument(
        "--between",
        type=positive,
        default=2,
        metavar="TOKENS",
        help="several pictures also with so many tokens of text between them; default 2",
    )
    parser.add_argument("--repeats", type=positive, default=7, help="rounds; default 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
