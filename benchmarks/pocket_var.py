"""VAR on pocket: accuracy with and without it, alone and on top of FlowCut.

    python -m benchmarks.pocket_var --out docs/results/pocket_var.json
    python -m benchmarks.pocket_var --scenes 40 --settings general

The sink dimensions are calibrated first, as `mmlm calibrate sinks` does it. Every case answers the
same questions about held-out scenes; what VAR changed is counted on the first few of them. A killed
run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import add_machine_options, json_file, measured, positive
from benchmarks.intervals import Scores, paired, row_figures
from benchmarks.pocket_accuracy import (
    MAX_NEW_TOKENS,
    SPLIT,
    Batch,
    asked_batches,
    digest_of_weights,
)
from benchmarks.pocket_answers import right_answers, scores_of
from benchmarks.progress import Progress
from benchmarks.var_chart import var_chart
from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.calibration.data import find_samples
from mmlm_efficient.calibration.sinks import calibrate_sinks
from mmlm_efficient.encoding import Encoded, encode
from mmlm_efficient.files import write_json
from mmlm_efficient.loading import find_folder
from mmlm_efficient.machine import machine_line, provenance
from mmlm_efficient.pocket.questions import IMAGE_KINDS
from mmlm_efficient.pocket.scenes import patch_labels
from mmlm_efficient.prepare import prepare
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.sinks.profiles import SinkProfile
from mmlm_efficient.sinks.recorder import Recorder
from mmlm_efficient.sinks.var import PRESETS, VAR

SETTINGS = ("general", "hallucination", "vision_centric")
ALONE = "alone"
ON_FLOWCUT = "on flowcut"
OFF = "off"


@dataclass(frozen=True)
class Case:
    """One row of the result: a pruning, and VAR with a setting or not at all."""

    pruning: str
    setting: str
    methods: tuple[Method, ...]

    @property
    def name(self) -> str:
        """Unique among the cases of a run."""
        return f"{self.pruning}, var {self.setting}"

    @property
    def var(self) -> VAR | None:
        """The method, where it is on."""
        return next((method for method in self.methods if isinstance(method, VAR)), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 when the model cannot be loaded or calibrated, or a setting is wrong.
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
    var_chart(result, options.out.with_suffix(".png"))
    print(f"written: {options.out} and {options.out.with_suffix('.png')}")
    return 0


def cases_of(settings: Sequence[str], profile: SinkProfile, keep_ratio: float) -> list[Case]:
    """Without VAR and with every setting of it: first on all tokens, then on FlowCut's."""
    cases = []
    for pruning in (ALONE, ON_FLOWCUT):
        before = () if pruning == ALONE else (FlowCut(keep_ratio=keep_ratio),)
        cases.append(Case(pruning, OFF, before))
        for setting in settings:
            var = VAR(
                task_preset=setting,
                sink_dims=profile.dims,
                sink_threshold=profile.threshold,
            )
            cases.append(Case(pruning, setting, (*before, var)))
    return cases


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, ask all questions with all cases, and count what VAR changed."""
    start = time.perf_counter()
    with load(options.model, device=options.device, dtype="float32") as lmm:
        samples = find_samples("pocket", options.calibration_samples, seed=42)
        profile = calibrate_sinks(lmm, samples).profile
        cases = cases_of(options.settings, profile, options.keep_ratio)
        settings = {
            "model": options.model,
            "weights_sha256": digest_of_weights(find_folder(options.model)),
            "scenes": options.scenes,
            "batch_size": options.batch_size,
            "keep_ratio": options.keep_ratio,
            "sink_dims": list(profile.dims),
            "sink_threshold": profile.threshold,
        }
        path = None if options.out is None else options.out.with_suffix(".progress.jsonl")
        progress = Progress(path, settings)
        _run(lmm, cases, options, progress)
        changed = {case.name: _changed(lmm, case, options) for case in cases if case.var}
        device = lmm.model.device
    scores = scores_of(progress, [case.name for case in cases], options.scenes, options.batch_size)
    return {
        "benchmark": "pocket_var",
        **provenance(device),
        **settings,
        "split": SPLIT,
        "dtype": "float32",
        "questions": int(scores[cases[0].name].asked.sum()),
        "counted_scenes": min(options.counted_scenes, options.scenes),
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": progress.resumed,
        "intervals": "95 %; per kind Wilson's, overall and differences by bootstrap over scenes",
        "calibration": profile.model_dump(mode="json", exclude={"fingerprint", "weights"}),
        "rows": [_row(case, cases, scores, changed) for case in cases],
    }


def _row(
    case: Case,
    cases: Sequence[Case],
    scores: Mapping[str, Scores],
    changed: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Figures of one case; differences are to the same pruning without VAR."""
    (reference,) = [one for one in cases if (one.pruning, one.setting) == (case.pruning, OFF)]
    mine, base = scores[case.name], scores[reference.name]
    figures = row_figures(mine, base, IMAGE_KINDS)
    for part in (figures, *figures["kinds"].values()):
        part["to_without"] = part.pop("to_unpruned")
    right, without = mine.right.sum(axis=1), base.right.sum(axis=1)
    asked = mine.asked.sum(axis=1)
    row: dict[str, Any] = {"pruning": case.pruning, "setting": case.setting}
    if case.var is not None:
        row["var"] = {**PRESETS[case.setting], **case.var.rule.__dict__}
        row["changed"] = changed[case.name]
        row["scenes_better"] = int((right > without).sum())
        row["scenes_worse"] = int((right < without).sum())
    unpruned = scores[cases[0].name].right.sum(axis=1)
    return {**row, **figures, "to_unpruned": paired(right, unpruned, asked)}


# -- accuracy --------------------------------------------------------------------------------


def _run(
    lmm: EfficientLMM, cases: Sequence[Case], options: argparse.Namespace, progress: Progress
) -> None:
    """Go through the batches and cases that are not done yet."""
    total = -(-options.scenes // options.batch_size) * len(IMAGE_KINDS) * len(cases)
    with tqdm(total=total, desc="pocket var", unit="case", disable=None) as bar:
        for batch in asked_batches(options.scenes, options.batch_size):
            due = [case for case in cases if not progress.has(batch.number, case.name)]
            bar.update(len(cases) - len(due))
            if not due or not batch.asked:
                bar.update(len(due))
                continue
            inputs, encoded = _encoded(lmm, batch)
            for case in due:
                progress.add(batch.number, case.name, _right(lmm, case, inputs, encoded, batch))
                bar.update()


@torch.no_grad()
def _encoded(lmm: EfficientLMM, batch: Batch) -> tuple[dict[str, Any], Encoded]:
    """The inputs of a batch, and the unpruned tower's outcome for it."""
    requests = [(question.text, one.image) for one, question in batch.asked]
    inputs = dict(preprocess(lmm.processor, requests, lmm.model.dtype))
    return inputs, encode(lmm.parts, inputs)


@torch.no_grad()
def _right(
    lmm: EfficientLMM, case: Case, inputs: Mapping[str, Any], encoded: Encoded, batch: Batch
) -> list[int]:
    """1 for every right answer of a batch."""
    own = encoded if case.pruning == ALONE else None
    prepared = prepare(lmm.parts, inputs, case.methods, encoded=own)
    return right_answers(lmm, prepared, batch)


# -- what VAR changed ------------------------------------------------------------------------


@dataclass
class _Layer:
    """Sums over prompts of what one layer did."""

    prompts: int = 0
    eligible: int = 0
    selected: int = 0
    moved: float = 0.0
    gain: float = 1.0
    visual: int = 0
    sinks: int = 0
    sinks_on_objects: int = 0
    decode_eligible: int = 0
    decode_selected: int = 0

    def figures(self) -> dict[str, Any]:
        """For the result file; shares of nothing are None."""
        return {
            "rows_changed": _share(self.selected, self.eligible),
            "rows_changed_decoding": _share(self.decode_selected, self.decode_eligible),
            "moved": _share(self.moved, self.selected),
            "largest_gain": round(self.gain, 3),
            "visual_tokens": round(self.visual / self.prompts, 2),
            "visual_sinks": round(self.sinks / self.prompts, 2),
            "visual_sinks_on_objects": _share(self.sinks_on_objects, self.sinks),
        }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


@torch.no_grad()
def _changed(lmm: EfficientLMM, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """How many attention rows VAR changed in the questions about the first scenes, by layer, and
    whether what it takes for sinks lies on objects."""
    if case.var is None:
        return {}
    methods = [*case.methods[:-1], case.var.model_copy(update={"return_stats": True})]
    layers: dict[int, _Layer] = {}
    on_objects: list[float] = []
    scenes = min(options.counted_scenes, options.scenes)
    for batch in asked_batches(scenes, options.batch_size):
        if not batch.asked:
            continue
        inputs, _ = _encoded(lmm, batch)
        prepared = prepare(lmm.parts, inputs, methods)
        with prepared.active():
            lmm.model.generate(
                **prepared.model_inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
        request: Any = prepared._attention
        recorder: Recorder = request.recorder
        for image, (one, _) in zip(prepared.report().images, batch.asked, strict=True):
            owner, _ = patch_labels(one)
            covered = owner[image.kept.numpy()] >= 0
            on_objects.append(float(covered.mean()))
            _count(layers, recorder, image.sample, covered)
        for number, counts in recorder.decoded.items():
            layers[number].decode_eligible += int(counts[0])
            layers[number].decode_selected += int(counts[1])
    all_layers = list(layers.values())
    return {
        "rows_changed": _share(
            sum(one.selected for one in all_layers), sum(one.eligible for one in all_layers)
        ),
        "rows_changed_decoding": _share(
            sum(one.decode_selected for one in all_layers),
            sum(one.decode_eligible for one in all_layers),
        ),
        "visual_tokens_on_objects": round(float(np.mean(on_objects)), 4),
        "layers": [{"layer": number, **layers[number].figures()} for number in sorted(layers)],
    }


def _count(layers: dict[int, _Layer], recorder: Recorder, sample: int, covered: Any) -> None:
    """Add the prefill of one prompt; covered: bool [visual tokens], True on an object."""
    for stats in recorder.stats(sample):
        one = layers.setdefault(stats.layer, _Layer())
        sinks = np.isin(stats.visual, stats.visual_sinks)
        one.prompts += 1
        one.eligible += stats.eligible
        one.selected += stats.selected
        one.moved += stats.moved * stats.selected
        one.gain = max(one.gain, stats.gain)
        one.visual += len(sinks)
        one.sinks += int(sinks.sum())
        one.sinks_on_objects += int((sinks & covered).sum())


# -- words -----------------------------------------------------------------------------------


def _report(result: Mapping[str, Any]) -> Iterator[str]:
    found = result["calibration"]
    yield (
        f"{result['model']} on {result['scenes']} held-out scenes, {result['questions']} "
        f"questions, {machine_line(result)}"
    )
    yield f"  sink dimensions {found['dims']} at the threshold {found['threshold']:.4g}"
    yield from (f"  warning: {text}" for text in found["warnings"])
    for row in result["rows"]:
        low, high = row["overall"]["interval"]
        line = (
            f"  {row['pruning']:10s} {row['setting']:14s} {row['overall']['accuracy']:6.1%} "
            f"({low:.1%} to {high:.1%})"
        )
        if "changed" in row:
            low, high = (f"{100 * end:+.2f}" for end in row["to_without"]["interval"])
            line += (
                f"  {100 * row['to_without']['difference']:+.2f} points ({low} to {high}), "
                f"{row['changed']['rows_changed'] or 0:.1%} of the rows changed"
            )
        yield line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench pocket_var",
        description="Accuracy of pocket with and without VAR, alone and on top of FlowCut.",
        epilog="example: mmlm bench pocket_var --out docs/results/pocket_var.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write, a chart beside it")
    parser.add_argument("--model", default="pocket", help="pocket, or a folder of the same kind")
    parser.add_argument("--scenes", "--limit", type=positive, default=1000, help="default 1000")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="PRESET",
        help=f"of {', '.join(SETTINGS)}; default all",
    )
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="of FlowCut; default 0.25")
    parser.add_argument("--calibration-samples", type=positive, default=64, help="default 64")
    parser.add_argument(
        "--counted-scenes",
        type=positive,
        default=100,
        help="scenes on which changed rows are counted; default 100",
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="scenes per batch")
    add_machine_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
