"""Maximise a costly function over a box: a space-filling design, then a Gaussian process.

The optimiser is the one VFlowOpt is calibrated with (arXiv 2508.05211: Gaussian process, expected
improvement, 50 evaluations of which 27 initial points), on optuna's `GPSampler` (Matern 5/2 with a
length scale per parameter, log expected improvement). The initial points are a scrambled Sobol
sequence instead of plain random draws. Nothing here knows about models.

Suggestion i depends on the seed, on i, on the evaluations before it and on the installed versions,
not on the process. A search that was killed therefore goes on from its log exactly as if nothing
had happened. A suggestion takes about 0.1 s on one core, half of it with greenlet installed.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from mmlm_efficient.calibration.search_log import Evaluation, SearchLog
from mmlm_efficient.errors import SettingsError, UnsupportedError, require_extra
from mmlm_efficient.plots import write_png

Box: TypeAlias = Mapping[str, tuple[float, float]]
Objective: TypeAlias = Callable[[dict[str, float]], float]

EXTRA = "calibrate"
# Scatter panels side by side in the drawing.
COLUMNS = 5


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        evaluations: all of them in order, at least one.
        resumed: how many of them, the first ones, came from the log.
        space: name -> (low, high) of every parameter.
        n_initial_points: how many evaluations the Sobol design made before the Gaussian process.
        seed: of the search.

    Example:
        >>> first, second = Evaluation(0, {"x": 0.2}, 0.5, 1.0), Evaluation(1, {"x": 0.4}, 0.9, 1.0)
        >>> result = SearchResult((first, second), 0, {"x": (0.0, 1.0)}, 27, 42)
        >>> result.best.parameters
        {'x': 0.4}
        >>> result.running_best
        [0.5, 0.9]
    """

    evaluations: tuple[Evaluation, ...]
    resumed: int
    space: dict[str, tuple[float, float]]
    n_initial_points: int
    seed: int

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise SettingsError("evaluations is empty: a result needs at least one evaluation")

    @property
    def best(self) -> Evaluation:
        """The evaluation with the largest value, the earliest on ties."""
        return max(self.evaluations, key=lambda evaluation: evaluation.value)

    @property
    def running_best(self) -> list[float]:
        """The largest value so far, after each evaluation."""
        return list(accumulate((evaluation.value for evaluation in self.evaluations), max))

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "seed": self.seed,
            "n_initial_points": self.n_initial_points,
            "space": {name: list(bounds) for name, bounds in self.space.items()},
            "best": self.best.to_dict(),
            "resumed": self.resumed,
            "evaluations": [evaluation.to_dict() for evaluation in self.evaluations],
        }


def search(
    objective: Objective,
    space: Box,
    n_evaluations: int = 50,
    n_initial_points: int = 27,
    seed: int = 42,
    log_path: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> SearchResult:
    """Maximise a function without noise over a box.

    Args:
        objective: takes name -> value, returns a finite number; larger is better.
        space: name -> (low, high), low < high, both allowed values. The order of the names matters.
        n_evaluations: evaluations in total, those from the log included. It may be raised later:
            the log of a search with 50 goes on to 300 with the same first 50.
        n_initial_points: evaluations of the Sobol design before the Gaussian process takes over.
            With n_evaluations or more, the search is the design alone.
        seed: of the design and of the optimiser, at least 0.
        log_path: JSON-lines file that every finished evaluation is appended to at once. If it
            exists, its evaluations are not repeated. None = no log.
        settings: what else the values depend on (model, samples, budget), as JSON values; it is
            written to the log, and a log with other settings is refused.
        progress: show a bar with the best value and the time left on stderr.
        on_evaluation: called with every new evaluation after it was logged, not with those read
            from the log.

    Returns:
        The first `n_evaluations` evaluations and the best of them.

    Raises:
        SettingsError: a bad argument, a log of another search, or one that cannot be read or
            written.
        UnsupportedError: the objective returned NaN or an infinity; the message names the
            parameters. Earlier evaluations stay in the log.
        MissingExtraError: optuna or scipy is not installed.
        Whatever the objective raises, KeyboardInterrupt too, passes through; the log stays valid.

    Example:
        >>> result = search(lambda p: 1 - (p["x"] - 3) ** 2, {"x": (0, 10)}, 10, 5, progress=False)
        >>> abs(result.best.parameters["x"] - 3) < 0.1
        True
    """
    box = _checked_space(space)
    _at_least("n_evaluations", n_evaluations, 1)
    _at_least("n_initial_points", n_initial_points, 1)
    _at_least("seed", seed, 0)
    # Before the first costly evaluation, not after the last of the design.
    optuna = require_extra("optuna", EXTRA)
    require_extra("scipy", EXTRA)
    log: SearchLog | None = None
    evaluations: list[Evaluation] = []
    if log_path is not None:
        log = SearchLog(
            Path(log_path),
            {
                "seed": seed,
                "n_initial_points": n_initial_points,
                "parameters": list(box),
                "space": {name: list(bounds) for name, bounds in box.items()},
                "settings": dict(settings or {}),
            },
        )
        evaluations = log.open(box)[:n_evaluations]
    resumed = len(evaluations)
    design = _design(len(box), min(n_initial_points, n_evaluations), seed)
    with tqdm(
        total=n_evaluations,
        initial=resumed,
        desc="search",
        unit="evaluation",
        disable=not progress,
    ) as bar:
        for number in range(resumed, n_evaluations):
            if number < n_initial_points:
                parameters = _placed(box, design[number])
            else:
                parameters = _suggested(optuna, box, evaluations, seed)
            evaluation = _evaluated(objective, number, parameters)
            if log is not None:
                log.append(evaluation)
            evaluations.append(evaluation)
            if on_evaluation is not None:
                on_evaluation(evaluation)
            best = max(evaluation.value for evaluation in evaluations)
            bar.set_postfix_str(f"best {best:.5g}", refresh=False)
            bar.update()
    return SearchResult(tuple(evaluations), resumed, box, n_initial_points, seed)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")


def _checked_space(space: Box) -> dict[str, tuple[float, float]]:
    """The box with float bounds, refused when it is empty or a bound makes no sense."""
    if not space:
        raise SettingsError("space is empty: give at least one parameter as name -> (low, high)")
    box = {}
    for name, (low, high) in space.items():
        if not (low < high and math.isfinite(high - low)):
            raise SettingsError(
                f"space: '{name}' has the bounds ({low}, {high}), but low < high and finite "
                "bounds are needed; leave a fixed parameter out of the space"
            )
        box[name] = (float(low), float(high))
    return box


# -- points ----------------------------------------------------------------------------------


def _design(n_parameters: int, n_points: int, seed: int) -> list[list[float]]:
    """Points of the unit cube, [n_points][n_parameters]; the first ones do not depend on n_points.

    The engine has a generator of its own: the global one of torch is left alone.
    """
    with torch.device("cpu"):
        engine = torch.quasirandom.SobolEngine(  # type: ignore[no-untyped-call]
            n_parameters, scramble=True, seed=seed
        )
        points: list[list[float]] = engine.draw(n_points, dtype=torch.float64).tolist()
    return points


def _placed(box: Box, point: Sequence[float]) -> dict[str, float]:
    """A point of the unit cube in the units of the box."""
    return {
        name: min(high, low + share * (high - low))
        for (name, (low, high)), share in zip(box.items(), point, strict=True)
    }


def _suggested(
    optuna: ModuleType, box: Box, evaluations: Sequence[Evaluation], seed: int
) -> dict[str, float]:
    """Where the Gaussian process expects the largest improvement.

    The sampler is made anew for every suggestion, seeded by (seed, number): one that lived longer
    would carry random state and kernel parameters over, which no log could bring back.
    """
    distributions = {
        name: optuna.distributions.FloatDistribution(low, high) for name, (low, high) in box.items()
    }
    mixed = np.random.SeedSequence([seed, len(evaluations)]).generate_state(1)
    with _quiet(optuna):
        sampler = optuna.samplers.GPSampler(
            seed=int(mixed[0]),
            n_startup_trials=0,
            deterministic_objective=True,
            warn_independent_sampling=False,
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(
            [
                optuna.trial.create_trial(
                    params=dict(evaluation.parameters),
                    distributions=distributions,
                    value=evaluation.value,
                )
                for evaluation in evaluations
            ]
        )
        # The sampler itself holds torch to one thread: its matrices are small.
        trial = study.ask(distributions)
    return {name: float(trial.params[name]) for name in box}


@contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Without "a new study was created" and the note that an argument is experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _evaluated(objective: Objective, number: int, parameters: dict[str, float]) -> Evaluation:
    """Call the objective and refuse what is no finite number."""
    started_s = time.perf_counter()
    value = float(objective(dict(parameters)))
    seconds = time.perf_counter() - started_s
    if not math.isfinite(value):
        raise UnsupportedError(
            f"evaluation {number}: the objective is {value} for {json.dumps(parameters)}. It must "
            "be a finite number everywhere in the space: exclude these parameters, or find out "
            "what went wrong there"
        )
    return Evaluation(number, parameters, value, seconds)


# -- drawing ---------------------------------------------------------------------------------


def plot_search(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Draw the value of every evaluation with the best so far, and below each parameter's values.

    Args:
        result: of `search`.
        path: PNG file to write; its folder is made if missing.

    Raises:
        SettingsError: the path is no ".png".
        MediaError: the file cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "plots")
    names = list(result.space)
    columns = min(len(names), COLUMNS)
    rows = -(-len(names) // columns)
    figure = figure_module.Figure(
        figsize=(max(6.0, 2.4 * columns), 3.2 + 2.3 * rows), dpi=110, layout="constrained"
    )
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.2] + [2.3] * rows)
    numbers = [evaluation.number for evaluation in result.evaluations]
    values = [evaluation.value for evaluation in result.evaluations]
    _draw_course(figure.add_subplot(grid[0, :]), result, numbers, values)
    first = None
    for place, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns], sharey=first)
        first = first or axes
        where = [evaluation.parameters[name] for evaluation in result.evaluations]
        axes.scatter(where, values, c=numbers, cmap="viridis_r", s=14)
        axes.axvline(result.best.parameters[name], color="#d62728", linestyle=":", linewidth=1)
        axes.set_xlim(*result.space[name])
        axes.set_xlabel(name, parse_math=False)
        axes.grid(alpha=0.3)
        if place % columns == 0:
            axes.set_ylabel("value")
        else:
            axes.tick_params(labelleft=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    write_png(path, encoded.getvalue())


def _draw_course(
    axes: Any, result: SearchResult, numbers: Sequence[int], values: Sequence[float]
) -> None:
    """The upper panel: values in the order of the evaluations."""
    best = result.best
    last = min(result.n_initial_points, len(values)) - 0.5
    axes.axvspan(-0.5, last, color="0.93", label="Sobol design")
    axes.scatter(numbers, values, c=numbers, cmap="viridis_r", s=18, label="evaluation")
    axes.step(numbers, result.running_best, where="post", color="#d62728", label="best so far")
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xlabel("evaluation, later ones darker")
    axes.set_ylabel("value")
    axes.set_title(f"best {best.value:.5g} in evaluation {best.number}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
