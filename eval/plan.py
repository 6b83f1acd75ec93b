"""The schema of an evaluation: which models, rows, tasks and budgets, and what the papers say.

```yaml
name: pocket
model: pocket            # with dtype, device, quantization, ... as in mmlm_efficient.settings
methods: [flowcut, "flowcut:72+fastv:36", {name: flowcut, keep_tokens: 64, position_ids: original}]
budgets: [0.5, 36]       # for rows of bare names: shares, or whole numbers of tokens
tasks: [mmlm_pocket_vqa, [gqa, pope]]      # an inner list is one group: one process
metric: {pope: pope_f1_score}              # which one tables show
seed: 0
batch_size: 8
limit: null              # samples of each task
include_path: [../tasks] # folders with YAMLs of further tasks, seen from this file
expected:                # of a paper, in its own unit
  source: "FlowCut, arXiv 2505.19536"
  tasks: [gqa, pope]
  rows: {none: [61.9, 85.9], "flowcut:192": [60.1, null]}
  scale: {gqa: 100, pope: 100}             # measured value x scale is what the paper prints
  notes: {pope: "the paper does not say which metric"}
  not_compared: []       # tasks whose number is listed but measures something else
runs: []                 # several models: the same keys and a name each; those above are defaults
```
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from eval.model_digest import model_digest, tower_digest
from eval.rows import Budget, Row, rows, rows_from_text
from eval.schema import (
    Expected,
    RunKeys,
    checked_name,
    explained,
    folders,
    narrowed,
    short_name,
    tasks_from_text,
)
from mmlm_efficient.errors import ModelLoadError, SettingsError, nearest
from mmlm_efficient.names import model_name
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.settings import Config, check_for_answers, refuse_unknown

_MODEL_KEYS = tuple(name for name in Config.model_fields if name != "methods")
_KEYS = (*_MODEL_KEYS, *RunKeys.model_fields)
_DIGITS = 12

Numbers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Job:
    """One run: a model with its rows on its tasks.

    Attributes:
        run: its name, fit for a folder.
        model: what is loaded, and generation settings that win over the tasks'.
        rows: the stock model first.
        tasks: groups of task names; each group is one process.
        seed: of sampling.
        batch_size: samples at once.
        limit: samples of each task, or None for all.
        metric: by task, the metric that tables show instead of the task's first.
        expected: by task and row, the published number in the unit of its source.
        expected_source: where the numbers are from.
        scale: by task, what a measured value is multiplied by to compare it.
        notes: by task, what to know before comparing.
        not_compared: as `expected`, for numbers that measure something else.
        include_path: folders with YAMLs of further tasks, absolute.
    """

    run: str
    model: Config
    rows: tuple[Row, ...]
    tasks: tuple[tuple[str, ...], ...]
    seed: int = 0
    batch_size: int = 8
    limit: int | None = None
    metric: Mapping[str, str] = field(default_factory=dict)
    expected: Numbers = field(default_factory=dict)
    expected_source: str | None = None
    scale: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    not_compared: Numbers = field(default_factory=dict)
    include_path: tuple[Path, ...] = ()

    def config_sha(self) -> str:
        """Of all that can change an answer and is the same for all rows, 12 hex digits.

        The weights are looked at, and those of a vision tower apart from them, so the model must be
        here; one of the hub is fetched if need be.

        Raises:
            ModelLoadError: the model or the device is not there.
        """
        from mmlm_efficient.loading import check_device, check_dtype

        device = check_device(self.model.device)
        described = {
            "model": model_name(None, self.model.model).rstrip("/").rpartition("/")[2],
            "weights": model_digest(self.model.model),
            "vision_tower": tower_digest(self.model.model, self.model.vision_tower),
            "dtype": str(check_dtype(self.model.dtype, device)),
            "device": device.type,
            "quantization": self.model.quantization,
            "attn_implementation": self.model.attn_implementation,
            "generation": self.model.generation,
            "seed": self.seed,
        }
        return _digest(described)

    def row_settings(self) -> dict[str, dict[str, Any]]:
        """By label, all that a row does on this model; see `Row.settings_on`."""
        return {row.label: row.settings_on(self.model.model) for row in self.rows}

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it, with everything spelt out."""
        found: dict[str, Any] = {
            "name": self.run,
            **{name: getattr(self.model, name) for name in _MODEL_KEYS},
            "methods": [row.to_dict() for row in self.rows],
            "tasks": [list(group) for group in self.tasks],
            "metric": dict(self.metric),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "include_path": [str(path) for path in self.include_path],
        }
        if self.expected_source is not None:
            found["expected"] = self._published()
        return found

    def _published(self) -> dict[str, Any]:
        numbers = {**self.expected, **self.not_compared}
        labels = [
            row.label for row in self.rows if any(row.label in one for one in numbers.values())
        ]
        return {
            "source": self.expected_source,
            "tasks": list(numbers),
            "rows": {name: [one.get(name) for one in numbers.values()] for name in labels},
            "scale": dict(self.scale),
            "notes": dict(self.notes),
            "not_compared": list(self.not_compared),
        }


@dataclass(frozen=True)
class EvalConfig:
    """A checked evaluation.

    Attributes:
        name: of all of it, fit for a folder.
        runs: at least one.
        given: for each run the keys that it was read from.
    """

    name: str
    runs: tuple[Job, ...]
    given: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(
        cls,
        values: Mapping[str, Any],
        where: str = "config",
        *,
        folder: Path | None = None,
        name: str | None = None,
        lenient: bool = False,
        narrow: bool = False,
    ) -> EvalConfig:
        """Check a mapping against the schema.

        Args:
            values: what a YAML file holds.
            where: how errors name it.
            folder: where relative include paths start; None is the current folder.
            name: of the evaluation unless it names itself.
            lenient: list rows whose method this version does not have as missing, for a dry run.
            narrow: leave out metrics and expected numbers of rows and tasks that are not there,
                instead of refusing them.

        Raises:
            SettingsError: unknown key (with the nearest valid one) or bad value, with its place.

        Example:
            >>> config = EvalConfig.read({"methods": ["random:8"], "tasks": ["mmlm_pocket_vqa"]})
            >>> config.name, [row.label for row in config.jobs()[0].rows]
            ('pocket', ['none', 'random:8'])
        """
        refuse_unknown(values, (*_KEYS, "runs"), where)
        given = _run_values(values, where)
        own = values.get("name")
        if len(given) == 1 and own is None:
            own = given[0].get("name")
        jobs: list[Job] = []
        kept: list[Mapping[str, Any]] = []
        for place, one in zip(_places(values, where), given, strict=True):
            one = {**one, "include_path": folders(one.get("include_path"), folder, place)}
            fallback = name or short_name(one.get("model"))
            job = _job(one, place, fallback, lenient, narrow)
            if any(job.run.casefold() == other.run.casefold() for other in jobs):
                raise SettingsError(f"{place}: there is a run {job.run!r} already.")
            jobs.append(job)
            kept.append({**one, "name": job.run})
        own = own or name or jobs[0].run
        return cls(checked_name(own, where), tuple(jobs), tuple(kept))

    def jobs(self) -> tuple[Job, ...]:
        """The runs, all of which this version can do.

        Raises:
            SettingsError: the config was read leniently and holds a row that it cannot.
        """
        for job in self.runs:
            for row in job.rows:
                if row.missing is not None:
                    raise SettingsError(f"run {job.run}, row {row.label}: {row.missing}")
        return self.runs

    def to_dict(self) -> dict[str, Any]:
        """All of it spelt out, as JSON that `read` takes."""
        return {"name": self.name, "runs": [job.to_dict() for job in self.runs]}

    def sha(self) -> str:
        """Of what is asked for, 12 hex digits; `Job.config_sha` looks at the models too."""
        return _digest(self.to_dict())


def load_eval_config(source: str | os.PathLike[str], *, lenient: bool = False) -> EvalConfig:
    """Read an evaluation from a YAML file, or a preset by its name.

    Args:
        source: path of a YAML file, or a name that `eval_preset_names` lists, as "pocket".
        lenient: see `EvalConfig.read`.

    Raises:
        SettingsError: no such file or preset, not YAML, or against the schema.
    """
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        presets = eval_preset_names()
        if name not in presets:
            close = nearest(name, presets)
            hint = f" Did you mean {close!r}?" if close else ""
            raise SettingsError(
                f"config: {name!r} is neither a file nor a preset.{hint} "
                f"Presets: {', '.join(presets)}."
            )
        path = preset_folder("eval") / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}: is not valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise SettingsError(f"{name}: holds {type(values).__name__}, not names and values.")
    stem = re.sub(r"[^\w.-]+", "-", path.stem).lstrip(".-") or "eval"
    return EvalConfig.read(values, name, folder=path.parent, name=stem, lenient=lenient)


def check_task_keys(job: Job, tasks: Mapping[str, Sequence[str]]) -> None:
    """Refuse what a config says of a task where the name is a group's: it would go unused.

    Args:
        job: whose `metric` and published numbers are checked.
        tasks: by entry of the job, the names of the tasks that it stands for.

    Raises:
        SettingsError: naming the key, and what to write instead.

    Example:
        >>> job = EvalConfig.read({"tasks": ["all"], "metric": {"all": "x"}}).runs[0]
        >>> check_task_keys(job, {"all": ["all"]})
        >>> check_task_keys(job, {"all": ["one", "two"]})
        Traceback (most recent call last):
        mmlm_efficient.errors.SettingsError: run pocket: metric: 'all' is a group, not a task. ...
    """
    known = {name for names in tasks.values() for name in names}
    places = {"metric": job.metric, "expected": {**job.expected, **job.not_compared}}
    for place, keys in places.items():
        for key in keys:
            if key not in known:
                members = ", ".join(tasks.get(key, ()))
                raise SettingsError(
                    f"run {job.run}: {place}: {key!r} is a group, not a task. List its tasks under "
                    f"tasks, as [{members}], and name those of them that you mean."
                )


def eval_preset_names() -> list[str]:
    """Names that `load_eval_config` takes beside paths.

    Example:
        >>> "paper_flowcut" in eval_preset_names()
        True
    """
    return sorted(file.stem for file in preset_folder("eval").glob("*.yaml"))


def config_from_options(
    *,
    config: str | os.PathLike[str] | EvalConfig | None = None,
    model: str | None = None,
    methods: str | Sequence[Any] | None = None,
    tasks: str | Sequence[Any] | None = None,
    budgets: str | Sequence[Budget] | None = None,
    runs: Sequence[str] | None = None,
    include_path: Sequence[str | os.PathLike[str]] | None = None,
    lenient: bool = False,
    **settings: Any,
) -> EvalConfig:
    """An evaluation from options, which win over those of a file.

    Args:
        config: a file or preset to start from, or what was read from one.
        model, methods, tasks, budgets: as in the file, or as text with commas between.
        runs: names of the config's runs to do; None does all.
        include_path: folders with YAMLs of further tasks, beside the file's.
        lenient: see `EvalConfig.read`.
        settings: other keys of a run, such as limit, seed, batch_size, device; None leaves the
            file's.

    Raises:
        SettingsError: as `EvalConfig.read`; or a model given for a config of several.
    """
    if config is not None and not isinstance(config, EvalConfig):
        config = load_eval_config(config, lenient=lenient)
    changed = {name: value for name, value in settings.items() if value is not None}
    refuse_unknown(changed, _KEYS, "options")
    if methods is not None:
        changed["methods"] = rows_from_text(methods) if isinstance(methods, str) else methods
    if tasks is not None:
        changed["tasks"] = tasks_from_text(tasks) if isinstance(tasks, str) else tasks
    if budgets is not None:
        changed["budgets"] = budgets
    if model is not None:
        changed["model"] = model
    further = [str(Path(os.path.expanduser(path)).absolute()) for path in include_path or ()]
    given = _chosen_runs(config, runs)
    if model is not None and len(given) > 1:
        raise SettingsError(
            "model: the config has several, in the runs "
            f"{', '.join(one['name'] for one in given)}. Leave the option out, or choose one run."
        )
    merged = []
    for one in given:
        if model is not None and model != one.get("model"):
            # Published numbers belong to their model, and so does the run's name.
            one = {name: one[name] for name in one if name not in ("expected", "name")}
        folders = [*one.get("include_path", ()), *further]
        merged.append({**one, **changed, "include_path": folders})
    name = None if config is None else config.name
    if len(merged) == 1:
        found = EvalConfig.read(merged[0], "options", lenient=lenient, narrow=True)
        # Without its own name, the run is of another model than the config's.
        return replace(found, name=name) if name and "name" in merged[0] else found
    values = {"name": name, "runs": merged}
    return EvalConfig.read(values, "options", lenient=lenient, narrow=True)


def _chosen_runs(
    config: EvalConfig | None, names: Sequence[str] | None
) -> Sequence[Mapping[str, Any]]:
    if config is None:
        return [{}]
    if names is None:
        return config.given
    refuse_unknown(names, [job.run for job in config.runs], "runs")
    return [one for one in config.given if one["name"] in names]


# -- reading one run -------------------------------------------------------------------------


def _places(values: Mapping[str, Any], where: str) -> list[str]:
    runs = values.get("runs")
    return [where] if not runs else [f"{where}: runs[{number}]" for number in range(len(runs))]


def _run_values(values: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The keys of each run: its own, then those of the whole config."""
    runs = values.get("runs")
    shared = {name: value for name, value in values.items() if name != "runs"}
    if runs is None or runs == []:
        return [shared]
    if not isinstance(runs, list | tuple) or not all(isinstance(one, Mapping) for one in runs):
        raise SettingsError(f"{where}: runs: expected a list of names and values, got {runs!r}.")
    shared.pop("name", None)
    found = []
    for number, run in enumerate(runs):
        refuse_unknown(run, _KEYS, f"{where}: runs[{number}]")
        if len(runs) > 1 and run.get("name") is None:
            raise SettingsError(f"{where}: runs[{number}]: has no name.")
        found.append({**shared, **run})
    return found


def _job(values: Mapping[str, Any], where: str, fallback: str, lenient: bool, narrow: bool) -> Job:
    model = Config.read({name: values[name] for name in _MODEL_KEYS if name in values}, where)
    _check_model(model, where)
    try:
        run = RunKeys(**{name: values[name] for name in values if name not in _MODEL_KEYS})
    except ValidationError as error:
        raise SettingsError(f"{where}: {explained(error)}") from error
    found = rows(run.methods, run.budgets, f"{where}: methods", lenient=lenient)
    names = [name for group in run.tasks for name in group]
    metric, expected = run.metric, run.expected
    if narrow:
        metric = {task: one for task, one in metric.items() if task in names}
        expected = narrowed(expected, names, [row.label for row in found])
    refuse_unknown(metric, names, f"{where}: metric")
    if expected is not None:
        refuse_unknown(expected.tasks, names, f"{where}: expected: tasks")
        labels = [row.label for row in found]
        refuse_unknown(expected.rows, labels, f"{where}: expected: rows")
    return Job(
        run=checked_name(run.name or fallback, where),
        model=model,
        rows=found,
        tasks=run.tasks,
        seed=run.seed,
        batch_size=run.batch_size,
        limit=run.limit,
        metric=metric,
        include_path=run.include_path,
        **_published(expected),
    )


def _published(expected: Expected | None) -> dict[str, Any]:
    """The fields of a job that hold published numbers."""
    if expected is None:
        return {}
    apart = expected.not_compared
    return {
        "expected": expected.numbers([task for task in expected.tasks if task not in apart]),
        "not_compared": expected.numbers([task for task in expected.tasks if task in apart]),
        "expected_source": expected.source,
        "scale": expected.scale,
        "notes": expected.notes,
    }


def _check_model(model: Config, where: str) -> None:
    """Refuse what `load` would refuse by name, whatever this machine has."""
    from mmlm_efficient.loading import ATTENTION, check_device, check_dtype
    from mmlm_efficient.quantization import QUANTIZATIONS

    try:
        try:
            device = check_device(model.device)
        except ModelLoadError:  # a known device that is not on this machine
            device = check_device("cpu")
        check_dtype(model.dtype, device)
        for name, known in (("quantization", QUANTIZATIONS), ("attn_implementation", ATTENTION)):
            value = getattr(model, name)
            if value is not None:
                refuse_unknown([value], known, name)
        if "seed" in model.generation:
            raise SettingsError("generation: seed: write it beside generation, as the run's seed.")
        given = dict(model.generation)
        check_for_answers(given, given.pop("max_new_tokens", 1))
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


# -- digests ---------------------------------------------------------------------------------


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
