"""What the wrapper costs beside the stock model, in this checkout and in an earlier one.

    python -m benchmarks.boundary --before ../before --out docs/results/boundary.json

Graphs of an idle wrapper under torch.compile, milliseconds per decoded token, hooks that dropped
wrappers leave behind, and the tensors that a finished stream holds. Each checkout is measured by
its own process, in turns; both run this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mmlm_efficient
from benchmarks.common import add_machine_options, json_file, positive, read_json
from benchmarks.models import SMALL_DECODER, SMALL_TOWER, batch, prompt, random_llava
from mmlm_efficient import VAR, EfficientLMM, FastV, PyramidDrop, VFlowOpt, load
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.pocket import scene

ROOT = Path(__file__).resolve().parents[1]
# The package comes from PYTHONPATH, and only then this file and its neighbours from here.
_WORKER = f"""
import sys, mmlm_efficient
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.boundary import main
sys.exit(main(sys.argv[1:]))
"""
QUESTION = "What is in the picture?"
METHODS: dict[str, Any] = {
    "fastv": FastV(keep_tokens=36),
    "vflowopt": VFlowOpt(
        stage_layers=(2, 4), stage_keep_ratios=(0.5, 0.5, 0.5), entropy_weight=0.0
    ),
    "pyramiddrop": PyramidDrop(keep_ratio=0.125),
    "var": VAR(sink_dims=85, sink_threshold=4.33, task_preset="hallucination"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or with --worker one round of it."""
    options = _parser().parse_args(argv)
    if options.worker:
        torch.set_num_threads(options.threads or 1)
        write_json(options.out, one_round(options.tokens, options.wrappers))
        return 0
    result = measure(options)
    print("\n".join(report(result)))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both checkouts in turns; medians over the rounds, and after / before."""
    sides = {"after": (ROOT, sys.executable)}
    if options.before is not None:
        sides = {"before": (options.before.resolve(), options.before_python), **sides}
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    total = options.repeats * len(sides)
    with tqdm(total=total, desc="boundary", leave=False, disable=None) as bar:
        for _ in range(options.repeats):
            for side, (checkout, python) in sides.items():
                rounds[side].append(_in_checkout(checkout, python, options))
                bar.update()
    medians = {side: _medians([one["figures"] for one in all_]) for side, all_ in rounds.items()}
    result: dict[str, Any] = {"benchmark": "boundary", **rounds["after"][0]["provenance"]}
    result |= {"repeats": options.repeats, "tokens": options.tokens, "wrappers": options.wrappers}
    for side, figures in medians.items():
        result[side] = {"versions": rounds[side][0]["provenance"]["versions"], **figures}
    if "before" in medians:
        result["after_to_before"] = {
            name: round(value / medians["before"]["decode_ms_per_token"][name], 4)
            for name, value in medians["after"]["decode_ms_per_token"].items()
        }
    return result


def _in_checkout(checkout: Path, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round in a process that has the checkout's package."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "round.json"
        command = [python, "-P", "-c", _WORKER, "--worker", "--out", str(out)]
        command += ["--tokens", str(options.tokens), "--wrappers", str(options.wrappers)]
        command += ["--threads", str(options.threads or 1)]
        paths = {"PYTHONPATH": str(checkout)}
        ended = subprocess.run(
            command, env={**os.environ, **paths}, capture_output=True, text=True, cwd=folder
        )
        if ended.returncode != 0:
            raise SystemExit(f"the round of {checkout} failed:\n{ended.stderr[-3000:]}")
        found: dict[str, Any] = read_json(out)
    assert Path(found["package"]).is_relative_to(checkout), found["package"]
    return found


def _medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of every figure, in the shape of one round."""
    return {
        name: _medians([one[name] for one in rounds])
        if isinstance(value, Mapping)
        else round(statistics.median(one[name] for one in rounds), 4)
        for name, value in rounds[0].items()
    }


# -- one round -------------------------------------------------------------------------------


def one_round(tokens: int, wrappers: int) -> dict[str, Any]:
    """All figures of the package that this process has."""
    with load("pocket", dtype="float32") as lmm:
        decode = decode_ms(lmm, tokens)
        held = held_bytes(lmm)
    figures = {
        "compile": compiled(),
        "decode_ms_per_token": decode,
        "decode_to_stock": {name: ms / decode["stock"] for name, ms in decode.items()},
        "dropped_wrappers": dropped(wrappers),
        "finished_stream_held_bytes": held,
    }
    return {
        "package": str(Path(mmlm_efficient.__file__).resolve()),
        "provenance": provenance(torch.device("cpu")),
        "figures": figures,
    }


def compiled() -> dict[str, dict[str, int]]:
    """Graphs and breaks of a decoder under torch.compile, stock and with an idle wrapper."""
    words = batch([prompt(0, 0, 8, SMALL_DECODER.vocabulary)], torch.device("cpu"))
    found = {}
    for name in ("stock", "idle wrapper"):
        model = _small()
        wrapper = EfficientLMM(model, None) if name != "stock" else None
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model.model.language_model)(
            input_ids=words["input_ids"], use_cache=False
        )
        found[name] = {"graphs": explained.graph_count, "breaks": explained.graph_break_count}
        del wrapper
    return found


def decode_ms(lmm: EfficientLMM, tokens: int) -> dict[str, float]:
    """Milliseconds per token behind the first, for requests of the same length."""
    image = scene("heldout", 56).image
    sampled = {"do_sample": True, "temperature": 1.0}

    def ask(methods: Any = (), **settings: Any) -> Callable[[], float]:
        def run() -> float:
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            usage = lmm.ask(QUESTION, image, methods, **length, **settings).usage
            return usage.decode_s / (usage.completion_tokens - 1)

        return run

    cases = {
        "stock": _stock(lmm, tokens),
        "greedy": ask(),
        "greedy, seed": ask(seed=1),
        "sampled": ask(**sampled),
        "sampled, seed": ask(seed=1, **sampled),
        **{name: ask(method) for name, method in METHODS.items()},
    }
    runs: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(4):  # the first warms up
        for name, case in cases.items():
            gc.collect()
            seconds = case()
            if round_:
                runs[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in runs.items()}


def _stock(lmm: EfficientLMM, tokens: int) -> Callable[[], float]:
    """transformers' generate() on the model's own prompt: two lengths, the difference."""
    picture = {"type": "image", "image": scene("heldout", 56).image}
    content = [picture, {"type": "text", "text": QUESTION}]
    inputs = lmm.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    def seconds(length: int) -> float:
        start = time.perf_counter()
        lmm.model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        return time.perf_counter() - start

    return lambda: (seconds(tokens) - seconds(1)) / (tokens - 1)


def dropped(count: int) -> dict[str, float]:
    """Hooks left by wrappers that were dropped without close(), and the time to make one."""
    model = _small()
    start = time.perf_counter()
    for _ in range(count):
        EfficientLMM(model, None)
    seconds = time.perf_counter() - start
    gc.collect()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {"hooks_left": hooks, "ms_per_wrapper": 1e3 * seconds / count}


def held_bytes(lmm: EfficientLMM) -> int:
    """Bytes of tensors that a finished stream keeps alive beside its answer."""
    before = _tensors()
    stream = lmm.stream(QUESTION, scene("heldout", 56).image)
    for _ in stream:
        pass
    answer = stream.answer
    with_stream = _tensors() - before
    del stream
    left = _tensors() - before
    assert answer is not None
    return with_stream - left


def _tensors() -> int:
    """Bytes behind all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _small() -> Any:
    return random_llava(
        SMALL_TOWER, SMALL_DECODER, device=torch.device("cpu"), dtype=torch.float32, seed=0
    )


def report(result: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    lines = [machine_line(result)]
    for side in ("before", "after"):
        if side in result:
            lines += [f"{side}: transformers {result[side]['versions']['transformers']}"]
            lines += [
                f"  {name}: {json.dumps(value)}"
                for name, value in result[side].items()
                if name != "versions"
            ]
    if "after_to_before" in result:
        lines.append(f"after / before: {json.dumps(result['after_to_before'])}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench boundary",
        description="What the wrapper costs beside the stock model, here and in another checkout.",
        epilog="example: mmlm bench boundary --before ../before --out outputs/boundary.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--before-python", default=sys.executable, help="its interpreter")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens; default 48")
    parser.add_argument("--wrappers", type=positive, default=20, help="dropped; default 20")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds; default 3")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
