"""Accuracy of pocket on held-out scenes: methods x budgets x position rules, all on the same
questions, with confidence intervals and the paired difference to the unpruned model.

    python -m benchmarks.pocket_accuracy --out docs/results/pocket_accuracy.json
    python -m benchmarks.pocket_accuracy --scenes 40 --methods flowcut --position-ids compact

A killed run goes on where it was when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.chart import accuracy_chart
from benchmarks.common import add_machine_options, measured, positive
from benchmarks.intervals import Scores, paired, row_figures
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.files import write_json
from mmlm_efficient.loading import find_folder
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.pocket.questions import IMAGE_KINDS, Question, is_right, questions
from mmlm_efficient.pocket.scenes import Scene, rng_of, scene
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.registry import method_class

SPLIT = "heldout"
POSITIONS = ("compact", "original")
MAX_NEW_TOKENS = 32
_QUESTION_KEY = 8  # keeps these questions apart from those of other evaluations


@dataclass(frozen=True)
class Case:
    """One row of the result: a method at a budget with a position rule."""

    method: Method
    keep_ratio: float
    position_ids: str

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        return f"{self.method.name} {self.keep_ratio:g} {self.position_ids}"


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
    if options.out is not None:
        write_json(options.out, result)
        accuracy_chart(result, options.out.with_suffix(".png"))
        _progress_file(options.out).unlink(missing_ok=True)
        print(f"written: {options.out} and {options.out.with_suffix('.png')}")
    else:
        print("nothing written: give --out FILE")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all questions with all cases and count the right answers."""
    cases = list(_cases(options))
    folder = find_folder(options.model)
    settings = {
        "model": options.model,
        "weights_sha256": digest_of_weights(folder),
        "scenes": options.scenes,
        "batch_size": options.batch_size,
        "cases": [case.name for case in cases],
    }
    progress = _Progress(None if options.out is None else _progress_file(options.out), settings)
    start = time.perf_counter()
    with load(options.model, device=options.device, dtype="float32") as lmm:
        tokens = {case.name: _kept(lmm, case) for case in cases}
        _run(lmm, cases, options, progress)
        device = lmm.model.device
    scores = _scores(progress.batches, cases, options.scenes)
    base = scores[cases[0].name]
    return {
        "benchmark": "pocket_accuracy",
        **provenance(device),
        **{name: value for name, value in settings.items() if name != "cases"},
        "split": SPLIT,
        "dtype": "float32",
        "questions": int(base.asked.sum()),
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": progress.resumed,
        "intervals": "95 %; per kind Wilson's, overall and differences by bootstrap over scenes",
        "rows": [
            {
                "method": case.method.name,
                "keep_ratio": case.keep_ratio,
                "keep_tokens": tokens[case.name],
                "position_ids": case.position_ids,
                **row_figures(scores[case.name], base, IMAGE_KINDS),
            }
            for case in cases
        ],
        "flowcut_against": _against(FlowCut.name, cases, scores, tokens),
    }


def _against(
    name: str, cases: Sequence[Case], scores: Mapping[str, Scores], tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Paired differences of one method to every other at the same budget and position rule."""
    return [
        {
            "other": other.method.name,
            "keep_tokens": tokens[case.name],
            "position_ids": case.position_ids,
            **paired(
                scores[case.name].right.sum(axis=1),
                scores[other.name].right.sum(axis=1),
                scores[case.name].asked.sum(axis=1),
            ),
        }
        for case in cases
        for other in cases[1:]
        if case.method.name == name != other.method.name
        and (case.keep_ratio, case.position_ids) == (other.keep_ratio, other.position_ids)
    ]


# -- questions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Questions of one kind about neighbouring scenes: their answers are about equally long."""

    number: int
    asked: tuple[tuple[Scene, Question], ...]


def asked_batches(scenes: int, size: int) -> Iterator[Batch]:
    """The questions about the first scenes, `size` scenes and one kind at a time."""
    number = 0
    for first in range(0, scenes, size):
        found = [scene(SPLIT, index) for index in range(first, min(first + size, scenes))]
        asked = [
            (one, question)
            for one in found
            for question in questions(one, rng_of(SPLIT, one.index, _QUESTION_KEY))
        ]
        for kind in IMAGE_KINDS:
            yield Batch(number, tuple(pair for pair in asked if pair[1].kind == kind))
            number += 1


def _run(
    lmm: EfficientLMM, cases: Sequence[Case], options: argparse.Namespace, progress: _Progress
) -> None:
    """Go through the batches that are not done yet; every case answers the same inputs."""
    total = -(-options.scenes // options.batch_size) * len(IMAGE_KINDS)
    with tqdm(total=total, desc="pocket accuracy", unit="batch", disable=None) as bar:
        for batch in asked_batches(options.scenes, options.batch_size):
            if batch.asked and batch.number not in progress.batches:
                requests = [(question.text, one.image) for one, question in batch.asked]
                inputs = preprocess(lmm.processor, requests, lmm.model.dtype)
                progress.add(
                    batch.number,
                    [[one.index, question.kind] for one, question in batch.asked],
                    {case.name: _right(lmm, case, inputs, batch) for case in cases},
                )
            bar.update()


def _right(lmm: EfficientLMM, case: Case, inputs: Mapping[str, Any], batch: Batch) -> list[int]:
    """1 for every right answer of a batch."""
    output = lmm.generate(
        **inputs, methods=[case.method], max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    said = lmm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        int(is_right(question, answer))
        for (_, question), answer in zip(batch.asked, said, strict=True)
    ]


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    """The unpruned model, then every combination."""
    yield Case(NoPruning(), 1.0, POSITIONS[0])
    for positions in options.position_ids:
        for name in options.methods:
            if name == NoPruning.name:
                continue
            for keep in options.ratios:
                method = method_class(name)(keep_ratio=keep, position_ids=positions)
                yield Case(method, keep, positions)


def _kept(lmm: EfficientLMM, case: Case) -> int:
    """Visual tokens that reach the language model, as the usage of an answer says."""
    picture = scene(SPLIT, 0).image
    answer = lmm.ask("what is in the picture?", picture, methods=[case.method], max_new_tokens=1)
    return answer.usage.visual_tokens_kept["bridge"]


def _scores(batches: Mapping[int, Any], cases: Sequence[Case], scenes: int) -> dict[str, Scores]:
    """Right and asked, by scene and kind, for each case."""
    columns = {kind: column for column, kind in enumerate(IMAGE_KINDS)}
    scores = {case.name: Scores.empty(scenes, len(IMAGE_KINDS)) for case in cases}
    for batch in batches.values():
        for name, right in batch["right"].items():
            for (index, kind), one in zip(batch["asked"], right, strict=True):
                scores[name].asked[index, columns[kind]] += 1
                scores[name].right[index, columns[kind]] += one
    return scores


# -- progress --------------------------------------------------------------------------------


class _Progress:
    """Finished batches, kept in a file so that a killed run can go on.

    Attributes:
        batches: by number: what was asked and who was right.
        resumed: whether the file held batches of an earlier run with the same settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.batches: dict[int, Any] = {}
        if path is not None:
            self._read(path, settings)
        self.resumed = bool(self.batches)

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = [entry for entry in map(_parsed, lines) if entry is not None]
        if entries and entries[0] == settings:
            self.batches = {entry["batch"]: entry for entry in entries[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew: without other settings' batches and without a half-written last line.
        kept = [dict(settings), *self.batches.values()]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def add(self, number: int, asked: Any, right: Mapping[str, list[int]]) -> None:
        """Remember a finished batch."""
        self.batches[number] = {"batch": number, "asked": asked, "right": dict(right)}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.batches[number]) + "\n")


def _parsed(line: str) -> Any:
    """A line of the progress file; None for one that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _progress_file(out: Path) -> Path:
    return out.with_suffix(".progress.jsonl")


def digest_of_weights(folder: Path) -> str:
    """Of the weights, so that runs of different weights are never mixed."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# -- words -----------------------------------------------------------------------------------


def _report(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{result['model']} on {result['scenes']} held-out scenes, {result['questions']} "
        f"questions, {machine_line(result)}"
    ]
    for row in result["rows"]:
        low, high = row["overall"]["interval"]
        line = (
            f"  {row['method']:10s} {row['keep_tokens']:4d} tokens, {row['position_ids']:8s} "
            f"{row['overall']['accuracy']:6.1%} ({low:.1%} to {high:.1%})"
        )
        if row["method"] != NoPruning.name:
            line += f", {row['to_unpruned']['difference'] * 100:+.1f} points"
        lines.append(line)
    for one in result["flowcut_against"]:
        low, high = (f"{100 * end:+.1f}" for end in one["interval"])
        lines.append(
            f"  flowcut - {one['other']:8s} {one['keep_tokens']:4d} tokens, "
            f"{one['position_ids']:8s} {100 * one['difference']:+.1f} points ({low} to {high})"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench pocket_accuracy",
        description="Accuracy of pocket on held-out scenes by method, budget and position rule.",
        epilog="example: mmlm bench pocket_accuracy --out docs/results/pocket_accuracy.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, a chart beside it")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same kind")
    parser.add_argument("--scenes", "--limit", type=positive, default=1000, help="default 1000")
    parser.add_argument("--methods", nargs="+", default=["flowcut", "random", "uniform"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--position-ids", nargs="+", choices=POSITIONS, default=list(POSITIONS))
    parser.add_argument("--batch-size", type=positive, default=32, help="scenes per batch")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
