"""A dry run: every run x task x row with its budget and published number, and what is missing.

Nothing is loaded or fetched. What this machine lacks is said in words, with what to do about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.find_tasks import find_tasks, task_table
from eval.plan import EvalConfig, Job
from eval.row_files import profiles_of
from eval.rows import Budget, Row
from eval.task_index import IndexedTask, IndexTrouble, look_up
from mmlm_efficient.errors import (
    MissingExtraError,
    ModelLoadError,
    SettingsError,
    UnsupportedError,
)
from mmlm_efficient.names import POCKET, model_name
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.settings import Config
from mmlm_efficient.sinks.var import VAR


@dataclass(frozen=True)
class PlannedRun:
    """One row of one run on one task.

    Attributes:
        run, model, task, row: what would be run; row is its label.
        budgets: of each method of the row: tokens (int), a ratio (float), or None.
        expected: the published number in its source's unit, or None.
        compared: whether the report puts it beside the measured one.
        source: where the number is from.
        note: what to know before comparing.
        missing: what this machine lacks for it, and what to do.
    """

    run: str
    model: str
    task: str
    row: str
    budgets: tuple[Budget | None, ...] = ()
    expected: float | None = None
    compared: bool = True
    source: str | None = None
    note: str | None = None
    missing: tuple[str, ...] = ()

    @property
    def budget(self) -> str:
        """In words.

        Example:
            >>> PlannedRun("pocket", "pocket", "gqa", "flowcut:72+fastv:0.25", (72, 0.25)).budget
            '72 tokens + 25 %'
        """
        return " + ".join(map(_budget_words, self.budgets)) or "-"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "budgets": list(self.budgets), "missing": list(self.missing)}


def dry_run(config: EvalConfig) -> list[PlannedRun]:
    """Everything that a config would run, read with ``lenient=True``.

    Returns:
        By run, task and row, in the config's order.

    Example:
        >>> config = EvalConfig.read({"methods": ["random:8"], "tasks": ["mmlm_pocket_vqa"]})
        >>> [(one.row, one.budget) for one in dry_run(config)]
        [('none', '-'), ('random:8', '8 tokens')]
    """
    planned = []
    tasks = _TaskCheck(config)
    for job in config.runs:
        model = tuple(model_missing(job.model))
        rows = {row.label: tuple(row_missing(row, job.model)) for row in job.rows}
        for task in (name for group in job.tasks for name in group):
            data = tuple(tasks.missing(job, task))
            for row in job.rows:
                lacks = (*model, *rows[row.label], *data)
                planned.append(_planned(job, task, row, lacks))
    return planned


def all_missing(planned: Iterable[PlannedRun]) -> list[str]:
    """What is missing for any of these, each thing once."""
    return list(dict.fromkeys(text for one in planned for text in one.missing))


def dry_run_table(planned: Sequence[PlannedRun]) -> Table:
    """A table of planned runs; what is missing is numbered and spelt out below it."""
    numbers = {text: str(number) for number, text in enumerate(all_missing(planned), 1)}
    noted = dict.fromkeys((one.task, one.note) for one in planned if one.note)
    legend = [f"missing {number}: {text}" for text, number in numbers.items()]
    legend += [f"* {task}: {note}" for task, note in noted]
    legend += [f"expected: {text}" for text in dict.fromkeys(one.source for one in planned) if text]
    table = Table(caption=Text("\n".join(legend) or "Nothing is missing."), caption_justify="left")
    for heading in ("run", "model", "task", "row", "budget", "expected", "missing"):
        table.add_column(heading, overflow="fold")
    before = ("", "", "")
    for one in planned:
        place = (one.run, one.model, one.task)
        if before[2] and place != before:
            table.add_section()
        # What has not changed since the line above is not repeated.
        shown = [name if place[: n + 1] != before[: n + 1] else "" for n, name in enumerate(place)]
        before = place
        number = "-" if one.expected is None else f"{one.expected:g}"
        number += "*" if one.note and one.expected is not None else ""
        lacks = ", ".join(sorted((numbers[text] for text in one.missing), key=int)) or "nothing"
        table.add_row(*map(Text, (*shown, one.row, one.budget, number, lacks)))
    return table


def model_missing(config: Config) -> list[str]:
    """What this machine lacks to load a model, in words."""
    from mmlm_efficient.loading import check_device
    from mmlm_efficient.quantization import check_quantization

    checks: list[Callable[[], object]] = [
        lambda: _local_folder(config.model),
        lambda: check_device(config.device),
        lambda: check_quantization(config.quantization),
    ]
    found = []
    for check in checks:
        try:
            check()
        except (ModelLoadError, MissingExtraError, SettingsError) as error:
            found.append(str(error))
    tower = config.vision_tower
    if tower is not None and not Path(os.path.expanduser(tower)).is_dir():
        found.append(f"vision_tower: {tower} is not a folder here.")
    return found


def row_missing(row: Row, model: Config) -> list[str]:
    """What a row needs that this version or this machine does not have, in words."""
    from mmlm_efficient.pruning.vflowopt_profiles import named_profile

    found = [] if row.missing is None else [row.missing]
    for method in row.methods:
        if isinstance(method, VAR):
            found += _sinks_missing(method, model)
        if not isinstance(method, VFlowOpt) or method.profile == "none":
            continue
        if method.profile == "auto":
            if method.stage_keep_ratios is None and not profiles_of(model.model):
                share = method.keep_ratio if isinstance(method.keep_ratio, float) else 0.25
                found.append(
                    f"vflowopt: no profile of {model.model}, so an untuned schedule is used. Make "
                    f"one with: mmlm calibrate vflowopt --model {model.model} --budget {share:g} "
                    "--data FOLDER"
                )
            continue
        try:
            named_profile(method.profile)
        except SettingsError as error:
            found.append(f"vflowopt: {error}")
    return found


def _sinks_missing(method: VAR, model: Config) -> list[str]:
    """What keeps VAR off a model, as far as its config tells; nothing where that is not here."""
    from mmlm_efficient.families import family_class
    from mmlm_efficient.loading import read_config

    try:
        config = read_config(_local_folder(model.model), model.model, model.vision_tower)
        family = family_class(config, model.model).name
    except (ModelLoadError, UnsupportedError):
        return []  # said of the model itself
    try:
        method.check_config(config, model_name(None, model.model), family)
    except SettingsError as error:
        return [str(error)]
    return []


class _TaskCheck:
    """What is missing for tasks; lmms-eval is asked once, and only if a task needs it."""

    def __init__(self, config: EvalConfig) -> None:
        self._local: dict[tuple[Path, ...], dict[str, dict[str, Any]]] = {}
        self._index: dict[tuple[Path, ...], Mapping[str, IndexedTask]] = {}
        self._trouble: str | None = None
        wanted: dict[tuple[Path, ...], set[str]] = {}
        for job in config.runs:
            names = {name for group in job.tasks for name in group}
            wanted.setdefault(job.include_path, set()).update(names)
        for folders, names in wanted.items():
            self._local[folders] = {row["task"]: row for row in task_table(folders)}
            others = names - self._local[folders].keys()
            try:
                self._index[folders] = look_up(others, folders) if others else {}
            except IndexTrouble as error:
                self._trouble = str(error)

    def missing(self, job: Job, task: str) -> list[str]:
        """In words."""
        row, metric = self._local[job.include_path].get(task), job.metric.get(task)
        if row is None and self._trouble is not None:
            return [self._trouble]
        if row is None:
            return _indexed_missing(self._index[job.include_path][task], metric)
        if row["samples"] is None:
            return [f"task {task}: {row['source']}"]
        if metric is None:
            return []
        known = [one.name for one in find_tasks(task, job.include_path)[0].metrics]
        return _metric_missing(task, metric, known)


def _indexed_missing(task: IndexedTask, metric: str | None) -> list[str]:
    if not task.known:
        close = f" Did you mean {task.nearest!r}?" if task.nearest else ""
        return [f"task {task.name!r} is neither bundled nor one of lmms-eval.{close}"]
    found = _metric_missing(task.name, metric, task.metrics)
    for data in task.datasets:
        if not data.here:
            found.append(f"data set {data.path}: {_fetch_words(data.path, dataset=True)}")
    return found


def _metric_missing(task: str, metric: str | None, known: Sequence[str]) -> list[str]:
    if metric is None or metric in known:
        return []
    return [f"task {task}: has no metric {metric!r}. Allowed: {', '.join(known)}."]


def _planned(job: Job, task: str, row: Row, missing: tuple[str, ...]) -> PlannedRun:
    compared = task not in job.not_compared
    numbers = (job.expected if compared else job.not_compared).get(task, {})
    return PlannedRun(
        run=job.run,
        model=job.model.model,
        task=task,
        row=row.label,
        budgets=row.budgets,
        expected=numbers.get(row.label),
        compared=compared,
        source=job.expected_source,
        note=job.notes.get(task),
        missing=missing,
    )


def _budget_words(budget: Budget | None) -> str:
    if budget is None:
        return "-"
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.4g} %"


def _local_folder(source: str) -> Path:
    """A model's complete local folder, without asking the hub.

    Raises:
        ModelLoadError: what is missing.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from mmlm_efficient.loading import find_folder, missing_files

    path = Path(os.path.expanduser(source))
    if source == POCKET or path.exists() or source.count("/") != 1:
        return find_folder(source)
    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError as error:
        raise ModelLoadError(f"model {source}: is neither a folder here nor a hub id.") from error
    if not isinstance(cached, str):
        raise ModelLoadError(f"model {source}: {_fetch_words(source)}")
    folder = Path(cached).parent
    lacking = missing_files(folder)
    if lacking:
        raise ModelLoadError(
            f"model {source}: only a part is here, missing: {'; '.join(lacking)}. "
            f"It {_fetch_words(source)}"
        )
    return folder


def _fetch_words(name: str, dataset: bool = False) -> str:
    from huggingface_hub import constants

    kind = " --repo-type dataset" if dataset else ""
    if constants.HF_HUB_OFFLINE or (dataset and _is_true(os.environ.get("HF_DATASETS_OFFLINE"))):
        return (
            "is not on this machine, which is set to work offline. On a connected one run: "
            f"hf download {name}{kind}   and copy its cache folder here"
        )
    return (
        "is not on this machine; it is fetched when the run starts, or by: "
        f"hf download {name}{kind}"
    )


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in {"1", "ON", "YES", "TRUE"}
