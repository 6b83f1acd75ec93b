"""All pruning methods on pocket: accuracy, tokens, time and memory at the same budgets.

    python -m benchmarks.pocket_methods --out docs/results/pocket_methods.json
    python -m benchmarks.pocket_methods --scenes 40 --methods fastv random --ratios 0.25

Every case answers the same questions about held-out scenes. The tower runs once per scene for all
methods that do not cut inside it. A killed run goes on where it was; cases may be added later.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from benchmarks.chart import methods_chart
from benchmarks.common import add_machine_options, interleaved, json_file, measured, positive, timed
from benchmarks.intervals import Scores, paired, row_figures
from benchmarks.pocket_accuracy import (
    SPLIT,
    Batch,
    asked_batches,
    digest_of_weights,
)
from benchmarks.pocket_answers import right_answers, scores_of
from benchmarks.progress import Progress
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.answers import kv_bytes
from mmlm_efficient.encoding import Encoded, encode
from mmlm_efficient.files import write_json
from mmlm_efficient.loading import find_folder
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.pocket.questions import IMAGE_KINDS
from mmlm_efficient.pocket.scenes import Scene, scene
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.registry import METHODS, method_class
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.tokens import ImageReport

UNTUNED = "vflowopt (untuned)"
RATIOS = (0.5, 0.25, 0.125, 0.0625)
# Scenes whose prefill is timed, one after the other.
TIMED_SCENES = 12


@dataclass(frozen=True)
class Case:
    """One row of the result: a method at a budget."""

    label: str
    method: Method
    keep_ratio: float

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        return f"{self.label} {self.keep_ratio:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when the model cannot be loaded or a setting is wrong.
    """
    options = _parser().parse_args(argv)
    result = measured(measure, options)
    if result is None:
        return 1
    print("\n".join(_report(result)))
    if options.out is None:
        print("nothing written: give --out FILE")
        return 0
    write_json(options.out, result)
    methods_chart(result, options.out.with_suffix(".png"))
    print(f"written: {options.out} and {options.out.with_suffix('.png')}")
    return 0


def case_names() -> list[str]:
    """What --methods takes: every method with a budget, and VFlowOpt without its profile."""
    named = [
        name
        for name, method in METHODS.items()
        if issubclass(method, PruningMethod) and "mask" not in method.model_fields
    ]
    return [*named, UNTUNED]


def cases_of(
    names: Sequence[str], ratios: Sequence[float], variants: Sequence[str] = ()
) -> list[Case]:
    """The unpruned model, then every method at every budget.

    Args:
        names: methods with their defaults.
        ratios: budgets.
        variants: methods with other settings, such as "fastv:layer=1".

    Raises:
        SettingsError: a variant names no method or setting.
    """
    cases = [Case(NoPruning.name, NoPruning(), 1.0)]
    for variant in variants:
        name, _, assignments = variant.partition(":")
        pairs = (pair.partition("=")[::2] for pair in assignments.split(",") if pair)
        given = {field: yaml.safe_load(value) for field, value in pairs}
        cases += [
            Case(variant, method_class(name)(keep_ratio=ratio, **given), ratio) for ratio in ratios
        ]
    for name in names:
        settings: dict[str, Any] = {"profile": "none"} if name == UNTUNED else {}
        method = METHODS["vflowopt" if name == UNTUNED else name]
        cases += [Case(name, method(keep_ratio=ratio, **settings), ratio) for ratio in ratios]
    return cases


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all questions with all cases, then time them."""
    cases = cases_of(options.methods, options.ratios, options.variants)
    settings = {
        "model": options.model,
        "weights_sha256": digest_of_weights(find_folder(options.model)),
        "scenes": options.scenes,
        "batch_size": options.batch_size,
    }
    path = None if options.out is None else options.out.with_suffix(".progress.jsonl")
    progress = Progress(path, settings)
    start = time.perf_counter()
    with load(options.model, device=options.device, dtype="float32") as lmm:
        _run(lmm, cases, options, progress)
        seconds = time.perf_counter() - start
        costs = _costs(lmm, cases, options.repeats)
        device = lmm.model.device
    scores = scores_of(progress, [case.name for case in cases], options.scenes, options.batch_size)
    base = scores[cases[0].name]
    rows = [
        {
            "method": case.label,
            "keep_ratio": case.keep_ratio,
            **costs[case.name],
            **row_figures(scores[case.name], base, IMAGE_KINDS),
        }
        for case in cases
    ]
    return {
        "benchmark": "pocket_methods",
        **provenance(device),
        **settings,
        "split": SPLIT,
        "dtype": "float32",
        "questions": int(base.asked.sum()),
        "seconds": round(seconds, 1),
        "resumed": progress.resumed,
        "intervals": "95 %; per kind Wilson's, overall and differences by bootstrap over scenes",
        "timing": f"one prompt, median over {TIMED_SCENES} scenes x {options.repeats} rounds, all "
        "cases in turns. Prefill: the language model's forward and the pruning before it",
        "rows": rows,
        "to_random": _differences(cases, scores, "random"),
        "to_random_at_equal_tokens": _at_equal_tokens(rows),
        "tuned_to_untuned": _differences(
            [case for case in cases if case.label in ("vflowopt", UNTUNED)], scores, UNTUNED
        ),
    }


def _differences(
    cases: Sequence[Case], scores: Mapping[str, Scores], other: str
) -> list[dict[str, Any]]:
    """Paired differences of every method to another one at the same nominal budget."""
    against = {case.keep_ratio: case for case in cases if case.label == other}
    found = []
    for case in cases:
        rival = against.get(case.keep_ratio)
        if rival is not None and case.label != other:
            mine, theirs = scores[case.name], scores[rival.name]
            figures = paired(
                mine.right.sum(axis=1), theirs.right.sum(axis=1), mine.asked.sum(axis=1)
            )
            found.append({"method": case.label, "keep_ratio": case.keep_ratio, **figures})
    return found


def _at_equal_tokens(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of every case less that of random pruning with as many tokens per decoder layer.

    Random's accuracy between its budgets is interpolated over the logarithm of the tokens; with
    fewer than two budgets of random there is too little to go by.
    """
    known = sorted(
        (row["mean_decoder_tokens"], row["overall"]["accuracy"])
        for row in rows
        if row["method"] in ("random", NoPruning.name)
    )
    if len(known) < 3:
        return []
    tokens = np.log2([count for count, _ in known])
    accuracy = [share for _, share in known]
    return [
        {
            "method": row["method"],
            "keep_ratio": row["keep_ratio"],
            "mean_decoder_tokens": row["mean_decoder_tokens"],
            "difference": round(
                row["overall"]["accuracy"]
                - float(np.interp(np.log2(row["mean_decoder_tokens"]), tokens, accuracy)),
                4,
            ),
        }
        for row in rows
        if row["method"] not in ("random", NoPruning.name)
        and known[0][0] <= row["mean_decoder_tokens"] <= known[-1][0]
    ]


# -- accuracy --------------------------------------------------------------------------------


def _run(
    lmm: EfficientLMM, cases: Sequence[Case], options: argparse.Namespace, progress: Progress
) -> None:
    """Go through the batches and cases that are not done yet."""
    total = -(-options.scenes // options.batch_size) * len(IMAGE_KINDS) * len(cases)
    sights = frozenset().union(*(getattr(case.method, "observes", ()) for case in cases))
    with tqdm(total=total, desc="pocket methods", unit="case", disable=None) as bar:
        for scenes, batches in _by_scenes(options):
            encoded: Encoded | None = None
            for batch in batches:
                due = [case for case in cases if not progress.has(batch.number, case.name)]
                bar.update(len(cases) - len(due))
                if not due or not batch.asked:
                    bar.update(len(due))
                    continue
                if encoded is None:
                    encoded = _encoded(lmm, scenes, sights)
                requests = [(question.text, one.image) for one, question in batch.asked]
                inputs = preprocess(lmm.processor, requests, lmm.model.dtype)
                places = [one.index - scenes[0].index for one, _ in batch.asked]
                for case in due:
                    right = _right(lmm, case, inputs, encoded.take(places), batch)
                    progress.add(batch.number, case.name, right)
                    bar.update()


def _by_scenes(options: argparse.Namespace) -> Iterator[tuple[list[Scene], list[Batch]]]:
    """The batches of the same scenes together."""
    per_group = len(IMAGE_KINDS)
    group: list[Batch] = []
    for batch in asked_batches(options.scenes, options.batch_size):
        group.append(batch)
        if len(group) == per_group:
            first = batch.number // per_group * options.batch_size
            last = min(first + options.batch_size, options.scenes)
            yield [scene(SPLIT, index) for index in range(first, last)], group
            group = []


def _encoded(lmm: EfficientLMM, scenes: Sequence[Scene], sights: frozenset[Any]) -> Encoded:
    """The unpruned tower's outcome for some scenes."""
    requests = [("what is in the picture?", one.image) for one in scenes]
    inputs = preprocess(lmm.processor, requests, lmm.model.dtype)
    with torch.no_grad():
        return encode(lmm.parts, dict(inputs), sights, crops=True)


@torch.no_grad()
def _right(
    lmm: EfficientLMM, case: Case, inputs: Mapping[str, Any], encoded: Encoded, batch: Batch
) -> list[int]:
    """1 for every right answer of a batch."""
    own = None if getattr(case.method, "cuts_tower", False) else encoded
    prepared = prepare(lmm.parts, inputs, [case.method], encoded=own)
    return right_answers(lmm, prepared, batch)


# -- cost ------------------------------------------------------------------------------------


@torch.no_grad()
def _costs(lmm: EfficientLMM, cases: Sequence[Case], repeats: int) -> dict[str, dict[str, Any]]:
    """Tokens, KV bytes and prefill time of every case, on the same few prompts."""
    question, dtype = "what is in the picture?", lmm.model.dtype
    prompts = [
        preprocess(lmm.processor, [(question, scene(SPLIT, index).image)], dtype)
        for index in range(TIMED_SCENES)
    ]
    facts: dict[str, dict[str, Any]] = {}

    def measured(case: Case) -> Callable[[], Mapping[str, float]]:
        def run() -> Mapping[str, float]:
            seconds, reports, held = [], [], []
            for inputs in prompts:
                one, report, cache = first_token(lmm.parts, dict(inputs), [case.method])
                seconds.append(one)
                reports.append(report)
                held.append(cache)
            facts[case.name] = {
                "mean_decoder_tokens": _mean([one.mean_decoder_tokens for one in reports]),
                "final_tokens": _mean([one.per_station["layer"] for one in reports]),
                "kv_bytes": round(statistics.mean(held)),
            }
            return {
                phase: statistics.median(one[phase] for one in seconds)
                for phase in ("before", "pruning", "forward")
            }

        return run

    timings = interleaved(
        {case.name: measured(case) for case in cases}, repeats, label="prefill time"
    )
    stock = timings[cases[0].name]
    for case in cases:
        facts[case.name] |= prefill_figures(timings[case.name], stock)
    return facts


def _mean(values: Sequence[float]) -> float:
    return round(statistics.mean(values), 2)


def first_token(
    parts: LMMParts, inputs: Mapping[str, Tensor], methods: Sequence[Method]
) -> tuple[dict[str, float], ImageReport, int]:
    """One request from pixels to the first token's logits, nothing remembered.

    Returns:
        Seconds "before" the language model, "pruning" among them (observing, scoring, selecting,
        merging; host seconds), and in its "forward" (scoring and cutting inside it included); the
        image's report; bytes of the cache.
    """
    device = parts.model.device
    prepared, before_s = timed(lambda: prepare(parts, inputs, methods), device)
    pruning_s = prepared.report().seconds["prune_s"]
    with prepared.active():
        output, forward_s = timed(
            lambda: parts.model(**prepared.model_inputs, use_cache=True, logits_to_keep=1), device
        )
    report = prepared.report().images[0]
    seconds = {"before": before_s, "pruning": pruning_s, "forward": forward_s}
    return seconds, report, kv_bytes(output[CACHE])


def prefill_figures(
    rounds: Sequence[Mapping[str, float]], stock: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Times of a case beside those of the unpruned model, medians over the rounds.

    Prefill is the language model's forward and the pruning before it. That pruning inside the
    tower makes the tower faster shows in the time to the first token only.
    """

    def median(of: Sequence[Mapping[str, float]], phase: str) -> float:
        return statistics.median(one[phase] for one in of)

    prefill = median(rounds, "forward") + median(rounds, "pruning")
    first = median(rounds, "before") + median(rounds, "forward")
    stock_first = median(stock, "before") + median(stock, "forward")
    return {
        "prefill_ms": round(1000 * prefill, 3),
        "pruning_before_ms": round(1000 * median(rounds, "pruning"), 3),
        "first_token_ms": round(1000 * first, 3),
        "prefill_speed_up": round(median(stock, "forward") / prefill, 3),
        "first_token_speed_up": round(stock_first / first, 3),
    }


# -- words -----------------------------------------------------------------------------------


def _report(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{result['model']} on {result['scenes']} held-out scenes, {result['questions']} "
        f"questions, {machine_line(result)}"
    ]
    for row in result["rows"]:
        low, high = row["overall"]["interval"]
        lines.append(
            f"  {row['method']:18s} {row['keep_ratio']:<6g} {row['overall']['accuracy']:6.1%} "
            f"({low:.1%} to {high:.1%})  tokens {row['mean_decoder_tokens']:6.1f} mean "
            f"{row['final_tokens']:6.1f} last {row['prefill_ms']:7.2f} ms {row['kv_bytes']:>9,d} B"
        )
    for one in result["to_random_at_equal_tokens"]:
        lines.append(
            f"  to random at {one['mean_decoder_tokens']:.1f} tokens: {one['method']:18s} "
            f"{one['keep_ratio']:<6g} {100 * one['difference']:+.1f} points"
        )
    for name in ("to_random", "tuned_to_untuned"):
        for one in result[name]:
            low, high = (f"{100 * end:+.1f}" for end in one["interval"])
            lines.append(
                f"  {name}: {one['method']:18s} {one['keep_ratio']:<6g} "
                f"{100 * one['difference']:+.1f} points ({low} to {high})"
            )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench pocket_methods",
        description="All pruning methods on pocket: accuracy, tokens, time and memory.",
        epilog="example: mmlm bench pocket_methods --out docs/results/pocket_methods.json",
        allow_abbrev=False,
    )
    names = case_names()
    parser.add_argument("--out", type=json_file, help="JSON file to write, a chart beside it")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same kind")
    parser.add_argument("--scenes", "--limit", type=positive, default=1000, help="default 1000")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=names,
        default=names,
        metavar="METHOD",
        help=f"of {', '.join(names)}; default all",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        metavar="METHOD:FIELD=VALUE",
        help="methods with other settings, such as fastv:layer=1",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--batch-size", type=positive, default=32, help="scenes per batch")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds of timing; default 5")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
