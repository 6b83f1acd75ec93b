"""The tasks of lmms-eval as tasks of our runner.

lmms-eval's own entry `simple_evaluate` knows no failed sample and no resuming, and writes only
when its last task has ended. So the runner has its own loop, and takes from a task what lmms-eval's
evaluator takes from it: documents, chat messages, filters, process_results and aggregations. Facts
are those of lmms-eval 0.7.3.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from eval import INSTALL_LMMS_EVAL
from eval.lmms_digest import data_digest
from eval.lmms_ids import ids_of
from eval.lmms_plugin import MODEL_NAME
from eval.messages import generation_of, sample_of_messages
from eval.task import Metric, Sample
from eval.task_scores import parameters_of
from mmlm_efficient.errors import (
    DataError,
    MissingExtraError,
    MMLMError,
    SettingsError,
    UnsupportedError,
    nearest,
)

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TRUE = ("1", "true", "yes", "on")
# What `dataset_path` says when the data are files beside the YAML.
_LOCAL_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "pandas")


def lmms_tasks(
    entry: str,
    include_path: Sequence[str | os.PathLike[str]] = (),
    files: Mapping[str, Path] | None = None,
) -> list[LmmsTask]:
    """The tasks behind a name of lmms-eval: a task, a tag, or a group with all its tasks.

    Args:
        entry: name of a task of lmms-eval or of a YAML file under `include_path`.
        include_path: further folders with YAML files of lmms-eval; its own tasks win.
        files: YAML files by name that are meant, none of lmms-eval's own.

    Raises:
        MissingExtraError: lmms-eval is not installed.
        SettingsError: no such task, naming the nearest, no such folder, or lmms-eval has a task of
            its own with the name of one of `files`.
        UnsupportedError: the task does not ask for generated text, or wants few-shot or repeats.
        DataError: its data cannot be read, or its definition cannot be loaded.
    """
    manager = _task_manager(include_path)
    if entry not in manager.task_index:
        close = nearest(entry, manager.all_tasks)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(
            f"task {entry!r}: there is none of this name in lmms-eval {version('lmms_eval')}"
            + (f" nor in {', '.join(map(str, include_path))}." if include_path else ".")
            + hint
        )
    for name, path in (files or {}).items():
        _check_file(manager, name, path)
    return [LmmsTask(task) for task in _load(manager, entry)]


def _check_file(manager: Any, name: str, path: Path) -> None:
    """Refuse a name that lmms-eval has itself."""
    known = manager.task_index.get(name, {}).get("yaml_path", path)
    if known == -1 or not os.path.samefile(known, path):
        raise SettingsError(
            f"task {name!r}: lmms-eval has a task or group of this name, which it would run "
            f"instead of {path}: rename yours."
        )


class LmmsTask:
    """One task of lmms-eval; see `eval.task.Task`.

    Its samples are the documents that lmms-eval evaluates; their ids are the values of the column
    that the task's metadata names as id_column, else the documents' numbers. Scores are
    those of `lmms-eval` from its command line: process_results gets documents without pictures
    unless the task asks for them. A task with several filters has each metric once per filter,
    named "metric,filter".

    Args:
        task: a ConfigurableMessagesTask of lmms-eval.

    Raises:
        UnsupportedError: see `lmms_tasks`.
    """

    def __init__(self, task: Any) -> None:
        self.name = str(getattr(task.config, "task", type(task).__name__))
        _check_supported(self.name, vars(task.config))
        self._task = task
        self._filters = _filters(task)
        self._docs = task.eval_docs
        self._docs_no_media = task.eval_docs_no_media
        self._check_columns()
        self.ids = ids_of(self.name, task.config.metadata, self._docs_no_media)
        self._numbers = {id: number for number, id in enumerate(self.ids)}
        self.version = str(task.VERSION)
        self.metrics = self._metrics()
        try:
            self.generation, self.until = generation_of(task.config.generation_kwargs)
        except SettingsError as error:
            raise SettingsError(f"task {self.name}: generation_kwargs: {error}") from error
        self.data_sha = data_digest(task.config, self._docs_no_media)
        part = f" ({task.config.dataset_name})" if task.config.dataset_name else ""
        self.source = f"lmms-eval {version('lmms_eval')}, {_place(task.config.dataset_path)}{part}"

    def _check_columns(self) -> None:
        """lmms-eval takes the name of a column that is not there for the prompt itself."""
        name = self._task.config.doc_to_text
        if isinstance(name, str) and name.isidentifier() and name not in self._task.features:
            raise DataError(
                f"task {self.name}: doc_to_text names a column {name!r} that its data do not have. "
                f"They have: {', '.join(self._task.features)}."
            )

    def _metrics(self) -> tuple[Metric, ...]:
        aggregations, higher = self._task.aggregation(), self._task.higher_is_better()
        names = [ensemble.name for ensemble in self._filters]
        found = []
        for filter_name in names:
            for metric, function in aggregations.items():
                name = _metric_name(metric, filter_name, names)
                how = getattr(function, "__name__", type(function).__name__)
                found.append(Metric(name, bool(higher.get(metric, True)), how))
        return tuple(found)

    def sample(self, id: str) -> Sample:
        """See `Task`: the document's chat messages with their media."""
        number = self._number(id)
        try:
            doc = self._docs[number]
            messages = self._task.doc_to_messages(doc)
            target = self._task.doc_to_target(doc)
        except MMLMError:
            raise
        except Exception as error:
            raise DataError(
                f"task {self.name}, sample {id}: cannot be read: {_words(error)}"
            ) from error
        key = self._task.config.cluster_key
        cluster = self._docs_no_media[number].get(key) if key else None
        return sample_of_messages(
            id,
            messages,
            copy.deepcopy(self.generation),
            self.until,
            target=_json_or_words(target),
            cluster=None if cluster is None else str(cluster),
        )

    def score(self, id: str, answer: str) -> dict[str, Any]:
        """See `Task`. A metric that the task leaves out for this sample is left out here.

        Raises:
            DataError: a metric's item cannot be kept as JSON. Whatever the task's own code raises
                comes through as it is.
        """
        from lmms_eval.api.instance import Instance
        from lmms_eval.api.reasoning import strip_reasoning_tags

        number = self._number(id)
        metadata = {"task": self.name, "doc_id": number, "repeats": 1}
        instance = Instance("generate_until", (answer,), 0, metadata, resps=[answer])
        for ensemble in self._filters:
            ensemble.apply([instance], self._task.task_docs)
        # Without its decorator, which tries five times with pauses: a bug is not worth waiting.
        process = inspect.unwrap(type(self._task).process_results)
        tags, wanted = _reasoning_tags(self._task), {metric.name for metric in self.metrics}
        names = list(instance.filtered_resps)
        found = {}
        for filter_name, response in instance.filtered_resps.items():
            if tags is not None and isinstance(response, list):
                response = [
                    strip_reasoning_tags(one, tags) if isinstance(one, str) else one
                    for one in response
                ]
            elif tags is not None and isinstance(response, str):
                response = strip_reasoning_tags(response, tags)
            items = process(self._task, self._docs_no_media[number], [response])
            for metric, item in items.items():
                name = _metric_name(metric, filter_name, names)
                if name in wanted:
                    found[name] = plain(item, f"task {self.name}, metric {name}")
        return found

    def aggregate(self, metric: str, items: Sequence[Any]) -> float:
        """See `Task`. Files that an aggregation writes for a leaderboard are not kept: write them
        with lmms-eval's own command line.

        Raises:
            SettingsError: no such metric.
            DataError: the task's aggregation fails or gives no number.
        """
        if metric not in {one.name for one in self.metrics}:
            names = ", ".join(one.name for one in self.metrics)
            raise SettingsError(f"task {self.name} has no metric {metric!r}. It has: {names}.")
        name = metric.rpartition(",")[0] if len(self._filters) > 1 else metric
        function = self._task.aggregation()[name]
        with tempfile.TemporaryDirectory() as folder:
            extra = {}
            if "args" in parameters_of(function):
                extra["args"] = argparse.Namespace(output_path=folder)
            try:
                value = function(copy.deepcopy(list(items)), **extra)
            except Exception as error:
                raise DataError(
                    f"task {self.name}, metric {metric}: its aggregation failed: {_words(error)}"
                ) from error
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise DataError(
                f"task {self.name}, metric {metric}: its aggregation gives {value!r:.80}, which is "
                "no number. Show another metric of the task."
            )
        return float(value)

    def _number(self, id: str) -> int:
        if id not in self._numbers:
            raise SettingsError(
                f"task {self.name}: no sample {id!r}. Its ids are {self.ids[0]} to {self.ids[-1]}."
            )
        return self._numbers[id]


def plain(value: Any, where: str) -> Any:
    """A value that is the same after a trip through JSON: numpy's numbers become Python's, tuples
    become lists.

    Args:
        value: an item of a metric.
        where: how the error names it.

    Raises:
        DataError: anything that JSON cannot hold.

    Example:
        >>> plain({"score": np.float64(0.5), "pair": ("a", 1)}, "metric m")
        {'score': 0.5, 'pair': ['a', 1]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(one, where) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): plain(one, where) for key, one in value.items()}
    raise DataError(
        f"{where}: gives {value!r:.80} ({type(value).__name__}), which cannot be kept. Kept are "
        "finite numbers, texts, true and false, lists, and mappings with texts as keys."
    )


def _json_or_words(target: Any) -> Any:
    """The right answer, for people to read."""
    try:
        return plain(target, "target")
    except DataError:
        return f"{target!r:.500}"


def _metric_name(metric: str, filter_name: str, filters: Sequence[str]) -> str:
    return metric if len(filters) == 1 else f"{metric},{filter_name}"


def _reasoning_tags(task: Any) -> Any:
    from lmms_eval.api.reasoning import parse_reasoning_tags_config

    return parse_reasoning_tags_config(task_value=task.config.reasoning_tags)


def _filters(task: Any) -> list[Any]:
    """The task's filters as the evaluator runs them."""
    from lmms_eval.api.filter import FilterEnsemble
    from lmms_eval.filters.transformation import StripThinkingFilter

    found = list(task._filters)
    if task.config.auto_strip_thinking and _reasoning_tags(task) is None:
        found = [FilterEnsemble(one.name, [StripThinkingFilter(), *one.filters]) for one in found]
    return found


def _check_supported(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what the runner cannot do the way lmms-eval does it."""
    output = config.get("output_type") or "generate_until"
    if output != "generate_until":
        raise UnsupportedError(
            f"task {name}: asks for {output}. Tasks of generate_until are supported: lmms-eval "
            "0.7.3 fails on loglikelihood and multiple_choice itself, and the rest is a dialogue "
            "with the task; run that one with lmms-eval's own command line."
        )
    if (config.get("num_fewshot") or 0) > 0:
        raise UnsupportedError(
            f"task {name}: wants {config['num_fewshot']} examples in the prompt (num_fewshot), "
            "which lmms-eval leaves out for chat models with pictures. Set num_fewshot: 0."
        )
    if (config.get("repeats") or 1) > 1:
        raise UnsupportedError(
            f"task {name}: wants each question asked {config['repeats']} times (repeats). Set "
            "repeats: 1."
        )


# Loading


def _task_manager(include_path: Sequence[str | os.PathLike[str]]) -> Any:
    if find_spec("lmms_eval") is None:
        raise MissingExtraError(f"lmms-eval is not installed. Install it with: {INSTALL_LMMS_EVAL}")
    folders = tuple(os.fspath(folder) for folder in include_path)
    for folder in folders:
        if not Path(folder).is_dir():
            raise SettingsError(f"include_path: {folder} is no folder.")
    return _indexed(folders)


@functools.lru_cache(maxsize=8)
def _indexed(folders: tuple[str, ...]) -> Any:
    """All tasks by name; reading lmms-eval's 2,000 files takes seconds."""
    _quiet()
    from lmms_eval.tasks import TaskManager

    try:
        return TaskManager(include_path=list(folders), model_name=MODEL_NAME)
    except Exception as error:
        where = ", ".join(folders) or "lmms-eval"
        raise DataError(f"tasks in {where}: cannot be read: {_words(error)}") from error


def _quiet() -> None:
    """Warnings of lmms-eval only, on stderr: it reports every step, and stdout is for results."""
    from loguru import logger

    try:
        logger.remove(0)
    except ValueError:  # loguru's own handler is gone: someone has decided what to log already
        return
    logger.add(_to_stderr, level="WARNING", format="{level}: {message}\n")


def _to_stderr(text: str) -> None:
    """Write to what stderr is now: it may have been replaced."""
    sys.stderr.write(text)


def _load(manager: Any, entry: str) -> Iterator[Any]:
    """Tasks with their data."""
    found = manager.task_index[entry]
    if found["type"] == "tag":
        for name in found["task"]:
            yield from _load(manager, name)
        return
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.tasks import get_task_dict

    config: Mapping[str, Any] = {}
    try:
        if found["type"] != "group":
            config = _config_of(found["yaml_path"])
            # Before gigabytes are downloaded for a task that cannot be used.
            _check_supported(entry, config)
        with _one_try():
            tasks = get_task_dict([entry], manager, task_type="chat")
    except MMLMError:
        raise
    except SystemExit as error:
        raise DataError(f"task {entry}: its Python code wants to exit.") from error
    except Exception as error:
        raise _trouble(entry, config, error) from error
    for task in _leaves(tasks):
        if not isinstance(task, ConfigurableMessagesTask):
            raise UnsupportedError(
                f"task {entry}: is a class of its own ({type(task).__name__}), not a YAML task. "
                "Run it with lmms-eval's own command line."
            )
        yield task


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value


def _config_of(yaml_path: str) -> Mapping[str, Any]:
    from lmms_eval.utils import load_yaml_config

    config: Mapping[str, Any] = load_yaml_config(yaml_path, mode="full")
    return config


@contextmanager
def _one_try() -> Iterator[None]:
    """Loading of data is tried once, not five times with pauses.

    datasets repeats downloads itself; and lmms-eval's second try finds its own settings used up,
    so that the last error is not the cause.
    """
    from lmms_eval.api.task import ConfigurableTask
    from tenacity import stop_after_attempt

    retrying = ConfigurableTask.download.retry
    before = retrying.stop
    retrying.stop = stop_after_attempt(1)
    try:
        yield
    finally:
        retrying.stop = before


def _trouble(entry: str, config: Mapping[str, Any], error: Exception) -> DataError:
    """What is wrong with a task's data, and what to do."""
    from tenacity import RetryError

    cause: BaseException = error
    if isinstance(error, RetryError):
        cause = error.last_attempt.exception() or error
    elif not isinstance(error, OSError | ModuleNotFoundError):
        return DataError(
            f"task {entry}: does not fit its data, or cannot be set up: {_words(error)}"
        )
    if isinstance(cause, ModuleNotFoundError):
        return DataError(
            f"task {entry}: needs the Python package {cause.name!r}. Install it with pip."
        )
    path = config.get("dataset_path")
    offline = [name for name in _OFFLINE if os.environ.get(name, "").lower() in _TRUE]
    if path is None:
        advice = "Ask for its tasks one by one to see which one it is."
    elif path in _LOCAL_BUILDERS or os.path.exists(path):
        advice = "Its data are local files: check data_files (or dataset_path) in its YAML."
    elif offline:
        advice = (
            f"{offline[0]} is set, so nothing is downloaded, and the data set is not in the cache. "
            "Run once with a network and without it, or copy the cache of another machine."
        )
    else:
        advice = "Check the network, the name, and whether the data set asks for a login."
    shown = "" if path is None else f" {_place(path)}"
    return DataError(
        f"task {entry}: its data set{shown} cannot be loaded: {_words(cause)} {advice}"
    )


def _place(path: Any) -> str:
    """The data set's name; a file's name alone, for the folder differs from machine to machine."""
    text = str(path)
    return os.path.basename(text) if os.path.isabs(text) else text


def _words(error: BaseException) -> str:
    """An error and what it came from, in one line that ends like a sentence."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500].rstrip(" :.") + "."
    return text if error.__cause__ is None else f"{text[:-1]} ({_words(error.__cause__)[:-1]})."
