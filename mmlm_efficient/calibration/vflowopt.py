"""Finding VFlowOpt's schedule for a model and a budget.

Source: "VFlowOpt", ICCV 2025, arXiv 2508.05211: a Bayesian search over the schedule maximises how
well the state of the last prompt token survives pruning, over some 30 unlabelled prompts. The
state is the last decoder layer's output behind the final norm, the vector that the output head
turns into the first answer token; no labels and no generation are needed.

What does not depend on the schedule is computed once: the unpruned model's states, the tower's
output, its attention map and the projected features. A candidate then costs pruned prefills only.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from mmlm_efficient.calibration.data import Sample
from mmlm_efficient.calibration.digests import samples_digest, weights_digest
from mmlm_efficient.calibration.search import SearchResult, search
from mmlm_efficient.encoding import Encoded, encode
from mmlm_efficient.errors import ContextError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.model import EfficientLMM
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import (
    Schedule,
    Segments,
    achieved_ratio,
    default_stage_layers,
    ratios_from_cumulative,
    segments,
    solve_last_ratio,
    untuned,
)
from mmlm_efficient.pruning.vflowopt_profiles import Profile

Space = Literal["budget", "released"]
# The grid that the released box was written for: 27 x 27 tokens of a SigLIP tower.
_RELEASED_SIDE = 27
# How much of what an even spread leaves for the later stages an earlier one may spend.
_MOST = 0.98
# How far a schedule may miss the budget and still count as one for it.
_ROUNDING = 1e-6


_pruning_logger = logging.getLogger("mmlm_efficient.pruning")
_DTYPE_HINT = "Check the model's dtype: float16 overflows in some models; try bfloat16 or float32"


@dataclass(frozen=True)
class Prompt:
    """One sample, ready for any schedule.

    Attributes:
        inputs: model inputs without pixels.
        encoded: the tower's outcome.
        state: float32 [D], the unpruned model's state of the last prompt token.
    """

    inputs: Mapping[str, Any]
    encoded: Encoded
    state: Tensor


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        profile: the schedule with the best objective. Its keep_ratio is what the schedule really
            keeps, in the space "released" mostly less than was asked for.
        result: every evaluation of the search.
        mean, least: cosine of the pruned with the unpruned state at the best schedule, mean and
            smallest over the samples.
        untuned_mean: the mean of the untuned schedule, for comparison.
    """

    profile: Profile
    result: SearchResult
    mean: float
    least: float
    untuned_mean: float


def optimize_profile(
    lmm: EfficientLMM,
    samples: Sequence[Sample],
    keep_ratio: float,
    *,
    n_evaluations: int = 50,
    n_initial_points: int = 27,
    seed: int = 42,
    space: Space = "budget",
    stage_layers: tuple[int, int] | None = None,
    log_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Search the schedule of a model for one budget.

    Args:
        lmm: the model with its processor.
        samples: at least two prompts with one picture each.
        keep_ratio: mean kept fraction over the decoder layers, in (0, 1).
        n_evaluations: candidates to try; 300 is thorough.
        n_initial_points: of them, how many spread over the space before the search learns.
        seed: of the search.
        space: "budget" tries only schedules that spend the budget, with thresholds and cells in
            proportion to the model's grid; "released" is the authors' box, whose schedules keep
            the budget at most. See `candidate`.
        stage_layers: decoder layers whose input is cut; the paper's share of the depth if unset.
        log_path: file of finished evaluations; a search with the same settings goes on from it.
        progress: show progress bars.

    Raises:
        SettingsError: a setting is out of range, too few samples, or the log is of another search.
        PromptError: a sample's prompt does not fit the model, or exceeds its context unpruned.
        UnsupportedError: a candidate gave no number, or no picture has tokens to prune.
    """
    if not 0.0 < keep_ratio < 1.0:
        raise SettingsError(f"budget must be a number in (0, 1), got {keep_ratio!r}")
    if len(samples) < 2:
        raise SettingsError(f"calibration needs at least 2 samples, got {len(samples)}")
    if space not in ("budget", "released"):
        raise SettingsError(f"space must be 'budget' or 'released', got {space!r}")
    parts = lmm._parts
    depth = parts.identity.decoder_layers
    layers = default_stage_layers(depth) if stage_layers is None else stage_layers
    lengths = segments(layers, depth)
    prompts = remembered(lmm, samples, progress=progress)
    _check_tokens(parts, prompts)
    grids = [prompt.encoded.visuals[0].crop_grids[0] for prompt in prompts]
    box = _box(space, keep_ratio, lengths, grids)

    def objective(theta: dict[str, float]) -> float:
        method = candidate(theta, keep_ratio, layers, lengths, space)
        return sum(cosines(parts, prompts, method))

    settings = {
        "model": parts.identity.name,
        "keep_ratio": keep_ratio,
        "stage_layers": list(layers),
        "space": space,
        "samples": len(samples),
        "samples_sha256": samples_digest(samples, [one.inputs["input_ids"] for one in prompts]),
        "weights_sha256": weights_digest(lmm.parts.family.model, lmm.name),
    }
    result = search(
        objective,
        box,
        n_evaluations,
        n_initial_points,
        seed,
        None if log_path is None else Path(log_path),
        settings,
        progress,
    )
    best = candidate(dict(result.best.parameters), keep_ratio, layers, lengths, space)
    found = cosines(parts, prompts, best)
    plain = _untuned(keep_ratio, lengths)
    fallback = VFlowOpt(
        stage_layers=layers,
        stage_keep_ratios=plain.stage_keep_ratios,
        anchor_threshold=plain.anchor_threshold,
        entropy_weight=plain.entropy_weight,
        merge_grid_size=plain.merge_grid_size,
        exact_budget=plain.exact_budget,
    )
    before = statistics.mean(cosines(parts, prompts, fallback))
    profile = _profile(parts, keep_ratio, best, found, before, result, settings)
    return Calibration(profile, result, statistics.mean(found), min(found), before)


def remembered(
    lmm: EfficientLMM, samples: Sequence[Sample], *, progress: bool = True
) -> list[Prompt]:
    """Everything about the samples that no schedule changes, computed once.

    Raises:
        PromptError: a sample's prompt does not fit the model, or exceeds its context.
        UnsupportedError: the unpruned model gives no number.
    """
    bar = tqdm(samples, desc="unpruned model", leave=False, disable=not progress or None)
    return [_remembered(lmm, sample) for sample in bar]


def _remembered(lmm: EfficientLMM, sample: Sample) -> Prompt:
    parts = lmm._parts
    try:
        inputs = model_inputs(lmm, sample)
        with torch.no_grad():
            encoded = encode(parts, inputs, VFlowOpt.observes)
            left = {
                name: value for name, value in inputs.items() if name not in parts.family.consumed
            }
            state = last_state(parts, left, (), encoded)
    except ContextError as error:
        raise ContextError(
            f"sample {sample.name!r}: {error}. Calibration runs every prompt unpruned once: "
            "shorten this question, give a smaller picture, or leave the sample out"
        ) from error
    except PromptError as error:
        raise PromptError(f"sample {sample.name!r}: {error}") from error
    if not bool(state.isfinite().all()):
        raise UnsupportedError(
            f"sample {sample.name!r}: the state of the unpruned model is no number. {_DTYPE_HINT}"
        )
    return Prompt(left, encoded, state)


def _check_tokens(parts: LMMParts, prompts: Sequence[Prompt]) -> None:
    """Refuse samples that leave nothing to find out."""
    if all(int((~one.encoded.visuals[0].places.newline).sum()) <= 1 for one in prompts):
        raise UnsupportedError(
            f"{parts.identity.name} makes one visual token of every one of these {len(prompts)} "
            "pictures, so there is nothing to prune: give larger pictures if the model takes "
            "pictures of any size, or another model"
        )


def model_inputs(lmm: EfficientLMM, sample: Sample) -> dict[str, Any]:
    """Model inputs of one sample on the model's device."""
    device = lmm.parts.family.input_device
    given = preprocess(
        lmm.processor, [(sample.question, sample.image())], lmm.parts.family.model.dtype
    )
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def last_state(
    parts: LMMParts,
    inputs: Mapping[str, Any],
    methods: Sequence[Method],
    encoded: Encoded | None = None,
) -> Tensor:
    """The state [D] of the last prompt token behind the final norm, float32.

    Args:
        parts: the model.
        inputs: model inputs of one prompt.
        methods: of the request; none for the unpruned model.
        encoded: the tower's outcome, or None to run it.
    """
    prepared = prepare(parts, inputs, methods, encoded=encoded)
    with prepared.active():
        output = parts.family.backbone(**prepared.model_inputs, use_cache=False)
    state: Tensor = output.last_hidden_state[0, -1].float()
    return state


def cosines(parts: LMMParts, prompts: Sequence[Prompt], method: VFlowOpt) -> list[float]:
    """Cosine of the pruned with the unpruned state, for every sample.

    Raises:
        UnsupportedError: one is no number.
    """
    found = []
    with torch.no_grad(), _quiet():
        for prompt in prompts:
            state = last_state(parts, prompt.inputs, [method], prompt.encoded)
            value = float(torch.nn.functional.cosine_similarity(state, prompt.state, dim=0))
            if not math.isfinite(value):
                raise UnsupportedError(
                    f"the model's state is no number under {method!r}. {_DTYPE_HINT}"
                )
            found.append(value)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice to the user about settings that the search itself tries."""
    level = _pruning_logger.level
    _pruning_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _pruning_logger.setLevel(level)


def candidate(
    theta: Mapping[str, float],
    keep_ratio: float,
    stage_layers: tuple[int, int],
    lengths: Segments,
    space: Space,
) -> VFlowOpt:
    """The method that a point of the search space stands for; every point of the box has one.

    In the space "budget", c0 and u give ratios that spend the budget exactly. In "released", r0
    and r1 are the ratios themselves and the last one is solved from the budget, at most 1: where
    it would be larger, the rest of the budget stays unspent. Where r0 and r1 would spend (nearly)
    the whole budget, r1 is lowered until something is left for the last stage.

    Args:
        theta: name -> value of every parameter of the space.
        keep_ratio: the budget, in (0, 1).
        stage_layers: decoder layers whose input is cut.
        lengths: the segments that they make.
        space: see `optimize_profile`.
    """
    if space == "budget":
        ratios = ratios_from_cumulative(keep_ratio, theta["c0"], theta["u"], lengths)
    else:
        ratios = _within(keep_ratio, theta["r0"], theta["r1"], lengths)
    return VFlowOpt(
        stage_layers=stage_layers,
        stage_keep_ratios=ratios,
        anchor_threshold=theta["anchor_threshold"],
        entropy_weight=theta["entropy_weight"],
        merge_grid_size=theta["merge_grid_size"],
        # A candidate must not look good by keeping more than its budget.
        exact_budget=space == "budget",
    )


def _within(
    keep_ratio: float, r0: float, r1: float, lengths: Segments
) -> tuple[float, float, float]:
    """Ratios that keep the budget at most; r0 spends less than the budget."""
    left = sum(lengths) * keep_ratio - lengths[0] * r0
    r1 = min(r1, _MOST * left / (lengths[1] * r0))
    return r0, r1, solve_last_ratio(keep_ratio, r0, r1, lengths)


def _most_first(keep_ratio: float, lengths: Segments) -> float:
    """The largest first ratio that leaves something of the budget, larger than the budget."""
    later = lengths[1] + lengths[2]
    return min(1.0, keep_ratio * (1.0 + _MOST * later / lengths[0]))


def _untuned(keep_ratio: float, lengths: Segments) -> Schedule:
    """The untuned schedule; a near one where the stages lie too late for it."""
    try:
        return untuned(keep_ratio, lengths)
    except SettingsError:
        r0 = min(1.1 * keep_ratio, _most_first(keep_ratio, lengths))
        ratios = _within(keep_ratio, r0, 1.0, lengths)
        return replace(untuned(1.0, lengths), stage_keep_ratios=ratios)


def _box(
    space: Space, keep_ratio: float, lengths: Segments, grids: Sequence[tuple[int, int]]
) -> dict[str, tuple[float, float]]:
    """The search space; see section 3.4 of the paper for the released one.

    Args:
        space: see `optimize_profile`.
        keep_ratio: the budget, in (0, 1).
        lengths: see `segments`.
        grids: (rows, cols) of tokens of one tower run of every sample; the median counts.
    """
    most = min(1.5 * keep_ratio, _most_first(keep_ratio, lengths))
    if space == "released":
        return {
            "r0": (keep_ratio, most),
            "r1": (0.2 / 0.375, 1.0),
            "anchor_threshold": (0.0, 50.0),
            "merge_grid_size": (3.0, 24.0),
            "entropy_weight": (-1.0, 1.0),
        }
    side = statistics.median(max(grid) for grid in grids) / _RELEASED_SIDE
    area = statistics.median(rows * cols for rows, cols in grids) / _RELEASED_SIDE**2
    return {
        "c0": (keep_ratio, most),
        "u": (0.0, 1.0),
        "anchor_threshold": (0.0, 50.0 * area),
        "merge_grid_size": (max(1.0, 3.0 * side), max(2.0, 24.0 * side)),
        "entropy_weight": (-1.0, 1.0),
    }


def _profile(
    parts: LMMParts,
    keep_ratio: float,
    best: VFlowOpt,
    found: Sequence[float],
    before: float,
    result: SearchResult,
    settings: Mapping[str, Any],
) -> Profile:
    """The profile of the best candidate, with how it was found.

    Its keep_ratio is the mean that the candidate keeps, where that is not the budget asked for.

    Raises:
        SettingsError: the candidate makes no valid profile.
    """
    identity = parts.identity
    grid, ratios, layers = best.merge_grid_size, best.stage_keep_ratios, best.stage_layers
    if ratios is None or layers is None:
        raise SettingsError(f"{best!r} has no stage_layers or no stage_keep_ratios of its own")
    kept = achieved_ratio(*ratios, segments(layers, identity.decoder_layers))
    try:
        return Profile(
            model=identity.name,
            family=identity.family,
            decoder_layers=identity.decoder_layers,
            decoder_width=identity.decoder_width,
            tower_layers=identity.tower_layers,
            # Rounded, so that the number can be written out and given back.
            keep_ratio=keep_ratio if abs(kept - keep_ratio) < _ROUNDING else float(f"{kept:.6g}"),
            stage_layers=layers,
            stage_keep_ratios=ratios,
            anchor_threshold=best.anchor_threshold or 0.0,
            entropy_weight=best.entropy_weight or 0.0,
            merge_grid_size=None if isinstance(grid, str) else grid,
            exact_budget=bool(best.exact_budget),
            search={
                "space": settings["space"],
                "asked_keep_ratio": keep_ratio,
                "samples": settings["samples"],
                "samples_sha256": settings["samples_sha256"],
                "weights_sha256": settings["weights_sha256"],
                "evaluations": len(result.evaluations),
                "seed": result.seed,
                "mean_cosine": round(statistics.mean(found), 6),
                "least_cosine": round(min(found), 6),
                "untuned_mean_cosine": round(before, 6),
            },
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise SettingsError(
            f"the best schedule of {identity.name} makes no profile: {place}"
            f"{first['msg'].removeprefix('Value error, ')}. Its parameters are in the search log"
        ) from error


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as YAML, whole or not at all."""
    head = (
        f"# VFlowOpt's schedule of {profile.model}, {profile.keep_ratio:.2%} of the visual tokens "
        "on average.\n# Made by: mmlm calibrate vflowopt\n"
    )
    values = profile.model_dump(mode="json")
    text = head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
