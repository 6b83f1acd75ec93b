"""Finding VFlowOpt's schedule for a model and a budget.

Source: "VFlowOpt", ICCV 2025, arXiv 2508.05211: a Bayesian search over the schedule maximises how
well the state of the last prompt token survives pruning, over some 30 unlabelled prompts. The
state is the last decoder layer's output behind the final norm, the vector that the output head
turns into the first answer token; no labels and no generation are needed.

What does not depend on the schedule is computed once: the unpruned model's states, the tower's
output, its attention map and the projected features. A candidate then costs pruned prefills only.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from mmlm_efficient.calibration.data import Sample
from mmlm_efficient.calibration.search import SearchResult, search
from mmlm_efficient.encoding import Encoded, encode
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.model import EfficientLMM
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import (
    Segments,
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
# How near the first stage may come to spending the whole budget.
_MOST = 0.98


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
        profile: the schedule with the best objective.
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
            proportion to the model's grid; "released" is the authors' box.
        stage_layers: decoder layers whose input is cut; the paper's share of the depth if unset.
        log_path: file of finished evaluations; a search with the same settings goes on from it.
        progress: show progress bars.

    Raises:
        SettingsError: a setting is out of range, too few samples, or the log is of another search.
        UnsupportedError: a candidate gave no number.
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
    grid = prompts[0].encoded.visuals[0].crop_grids[0]
    box = _box(space, keep_ratio, lengths, grid)

    def objective(theta: dict[str, float]) -> float:
        method = candidate(theta, keep_ratio, layers, lengths, space)
        return sum(cosines(parts, prompts, method))

    settings = {
        "model": parts.identity.name,
        "keep_ratio": keep_ratio,
        "stage_layers": list(layers),
        "space": space,
        "samples": len(samples),
        "samples_sha256": digest(samples, prompts),
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
    plain = untuned(keep_ratio, lengths)
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
    """Everything about the samples that no schedule changes, computed once."""
    parts, prompts = lmm._parts, []
    sights = VFlowOpt.observes
    for sample in tqdm(samples, desc="unpruned model", leave=False, disable=not progress or None):
        inputs = model_inputs(lmm, sample)
        with torch.no_grad():
            encoded = encode(parts, inputs, sights)
            left = {
                name: value for name, value in inputs.items() if name not in parts.family.consumed
            }
            state = last_state(parts, left, (), encoded)
        prompts.append(Prompt(left, encoded, state))
    return prompts


def model_inputs(lmm: EfficientLMM, sample: Sample) -> dict[str, Any]:
    """Model inputs of one sample on the model's device."""
    device = lmm.model.device
    given = preprocess(lmm.processor, [(sample.question, sample.image())], lmm.model.dtype)
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
    with torch.no_grad():
        for prompt in prompts:
            state = last_state(parts, prompt.inputs, [method], prompt.encoded)
            value = float(torch.nn.functional.cosine_similarity(state, prompt.state, dim=0))
            if not math.isfinite(value):
                raise UnsupportedError(
                    f"the model's state is no number under {method!r}: check the model's dtype "
                    "(float16 overflows in some models; try bfloat16 or float32)"
                )
            found.append(value)
    return found


def candidate(
    theta: Mapping[str, float],
    keep_ratio: float,
    stage_layers: tuple[int, int],
    lengths: Segments,
    space: Space,
) -> VFlowOpt:
    """The method that a point of the search space stands for."""
    if space == "budget":
        ratios = ratios_from_cumulative(keep_ratio, theta["c0"], theta["u"], lengths)
    else:
        r0, r1 = theta["r0"], theta["r1"]
        ratios = (r0, r1, solve_last_ratio(keep_ratio, r0, r1, lengths))
    return VFlowOpt(
        stage_layers=stage_layers,
        stage_keep_ratios=ratios,
        anchor_threshold=theta["anchor_threshold"],
        entropy_weight=theta["entropy_weight"],
        merge_grid_size=theta["merge_grid_size"],
        # A candidate must not look good by keeping more than its budget.
        exact_budget=space == "budget",
    )


def _box(
    space: Space, keep_ratio: float, lengths: Segments, grid: tuple[int, int]
) -> dict[str, tuple[float, float]]:
    """The search space; see section 3.4 of the paper for the released one."""
    most = min(1.0, 1.5 * keep_ratio, _MOST * sum(lengths) * keep_ratio / lengths[0])
    if space == "released":
        return {
            "r0": (keep_ratio, most),
            "r1": (0.2 / 0.375, 1.0),
            "anchor_threshold": (0.0, 50.0),
            "merge_grid_size": (3.0, 24.0),
            "entropy_weight": (-1.0, 1.0),
        }
    side = max(grid) / _RELEASED_SIDE
    return {
        "c0": (keep_ratio, most),
        "u": (0.0, 1.0),
        "anchor_threshold": (0.0, 50.0 * grid[0] * grid[1] / _RELEASED_SIDE**2),
        "merge_grid_size": (max(1.0, 3.0 * side), max(2.0, 24.0 * side)),
        "entropy_weight": (-1.0, 1.0),
    }


def digest(samples: Sequence[Sample], prompts: Sequence[Prompt]) -> str:
    """Of the questions and the unpruned states: other data or another model, another digest."""
    total = hashlib.sha256()
    for sample, prompt in zip(samples, prompts, strict=True):
        total.update(sample.question.encode())
        # Coarse, so that another number of threads does not make it another search.
        coarse = (prompt.state / prompt.state.norm() * 100).round().to(torch.int16)
        total.update(coarse.cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def _profile(
    parts: LMMParts,
    keep_ratio: float,
    best: VFlowOpt,
    found: Sequence[float],
    before: float,
    result: SearchResult,
    settings: Mapping[str, Any],
) -> Profile:
    """The profile of the best candidate, with how it was found."""
    identity = parts.identity
    grid = best.merge_grid_size
    return Profile(
        model=identity.name,
        family=identity.family,
        decoder_layers=identity.decoder_layers,
        decoder_width=identity.decoder_width,
        tower_layers=identity.tower_layers,
        keep_ratio=keep_ratio,
        stage_layers=best.stage_layers or (1, 2),
        stage_keep_ratios=best.stage_keep_ratios or (1.0, 1.0, 1.0),
        anchor_threshold=best.anchor_threshold or 0.0,
        entropy_weight=best.entropy_weight or 0.0,
        merge_grid_size=None if isinstance(grid, str) else grid,
        exact_budget=bool(best.exact_budget),
        search={
            "space": settings["space"],
            "samples": settings["samples"],
            "samples_sha256": settings["samples_sha256"],
            "evaluations": len(result.evaluations),
            "seed": result.seed,
            "mean_cosine": round(statistics.mean(found), 6),
            "least_cosine": round(min(found), 6),
            "untuned_mean_cosine": round(before, 6),
        },
    )


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
