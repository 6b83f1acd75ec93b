"""Reads a task's YAML in lmms-eval's format, and says whether we can use it without lmms-eval.

Format: lmms-eval 0.7.3, `api/task.py: TaskConfig` and `utils.load_yaml_config`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from mmlm_efficient.errors import DataError, nearest

# The kinds of local files; lmms-eval knows more.
DATA_KINDS = ("json", "csv", "parquet")
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams", "until")
METRIC_OPTIONS = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore")

_KEYS = (
    "task",
    "task_alias",
    "tag",
    "group",
    "dataset_path",
    "dataset_kwargs",
    "test_split",
    "output_type",
    "doc_to_visual",
    "doc_to_text",
    "doc_to_target",
    "doc_to_messages",
    "process_results",
    "metric_list",
    "generation_kwargs",
    "metadata",
    "score_key",
    "cluster_key",
)
# Keys that change nothing as long as they hold one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_fewshot": (0,),
    "repeats": (1,),
    "description": ("",),
    "full_docs": (False,),
    "process_results_use_image": (False, True),
    "should_decontaminate": (False,),
    "auto_strip_thinking": (False,),
}
_BUILDERS = (*DATA_KINDS, "text", "pandas", "arrow")


@dataclass(frozen=True)
class Function:
    """A `!function` of a task's YAML, not yet imported.

    Attributes:
        text: "module.function", as written.
        folder: of the YAML that names it.
    """

    text: str
    folder: Path

    @property
    def file(self) -> Path:
        """Where it is looked for first."""
        return self.folder / f"{self.text.rpartition('.')[0]}.py"

    def load(self) -> Callable[..., Any]:
        """Import it: from the file beside the YAML, else from an importable module.

        Raises:
            DataError: neither exists, the module fails, or it has no such function.
        """
        module_name, _, name = self.text.rpartition(".")
        where = f"!function {self.text} of {self.folder}"
        if not module_name or not name:
            raise DataError(f"{where}: write it as module.function, such as utils.doc_to_text.")
        if self.file.is_file():
            module = _module_of(self.file, where)
        else:
            module = _importable(module_name, where, self.file)
        function = getattr(module, name, None)
        if not callable(function):
            known = [key for key, value in vars(module).items() if callable(value)]
            raise DataError(
                f"{where}: {module.__file__ or module_name} has no function '{name}'."
                f"{did_you_mean(name, known)}"
            )
        found: Callable[..., Any] = function
        return found


def _module_of(file: Path, where: str) -> ModuleType:
    """The module in a file, under a name that no other file and no other content gets."""
    path = file.resolve()
    digest = hashlib.sha256(bytes(path) + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"mmlm_task_functions_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{where}: {file} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise DataError(f"{where}: {file} fails: {type(error).__name__}: {error}") from error
    return module


def _importable(module_name: str, where: str, file: Path) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        beside = sorted(path.stem for path in file.parent.glob("*.py"))
        raise DataError(
            f"{where}: there is neither {file} nor a module '{module_name}' that can be imported "
            f"({error}). Beside the YAML: {', '.join(beside) or 'no Python files'}."
            f"{did_you_mean(module_name, beside)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{where}: module '{module_name}' fails: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class TaskYaml:
    """A task's YAML with everything that it includes.

    Attributes:
        path: the file.
        values: its keys; those without a value are left out; `data_files` that exist are absolute.
        files: the YAML files it was read from, in reading order.
    """

    path: Path
    values: Mapping[str, Any]
    files: tuple[Path, ...]

    def functions(self) -> list[Function]:
        """Every `!function` anywhere in it."""
        return list(_functions(self.values))


def _functions(value: Any) -> Sequence[Function]:
    if isinstance(value, Function):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [function for one in value for function in _functions(one)]
    return []


class _Loader(yaml.SafeLoader):
    """Plain YAML and `!function`, nothing that runs code by being read."""

    folder: Path


def _function(loader: _Loader, node: yaml.Node) -> Function:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(
            None, None, "!function takes a name such as utils.doc_to_text", node.start_mark
        )
    return Function(str(loader.construct_scalar(node)), loader.folder)


_Loader.add_constructor("!function", _function)


def read_yaml(path: Path) -> TaskYaml:
    """Read a task's YAML and what it includes.

    Raises:
        DataError: a file is missing, is not YAML, or has tags other than `!function`; files that
            include each other.
    """
    files: list[Path] = []
    values = _read(path, (), files)
    kept = {key: value for key, value in values.items() if value is not None}
    return TaskYaml(path, kept, tuple(files))


def _read(path: Path, chain: tuple[Path, ...], files: list[Path]) -> dict[str, Any]:
    if path in chain:
        raise DataError(f"{path}: includes itself, by way of {chain[-1]}. Remove one `include`.")
    values = _parsed(path)
    files.append(path)
    includes = values.pop("include", None) or []
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(one, str) for one in includes):
        raise DataError(f"{path}: include: expected a file name or a list of them.")
    merged: dict[str, Any] = {}
    for name in reversed(includes):  # as lmms-eval: what is named first wins
        included = path.parent / name
        if not included.is_file():
            raise DataError(f"{path}: include: there is no file {included}.")
        merged.update(_read(included, (*chain, path), files))
    return _with_data_paths(merged | values, path.parent)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not YAML: {error}") from error
    loader.folder = path.parent
    try:
        values = loader.get_single_data()
    except yaml.constructor.ConstructorError as error:
        raise DataError(
            f"{path}: {error.problem or error}{_line(error)}. The only tag that is allowed is "
            "!function."
        ) from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    # A list or a word is no task, which the reader's caller finds out.
    return values if isinstance(values, dict) else {}


def _line(error: yaml.MarkedYAMLError) -> str:
    return "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"


def _with_data_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Data files that exist beside the YAML become absolute, as lmms-eval does it."""
    options = values.get("dataset_kwargs")
    if values.get("dataset_path") not in _BUILDERS or not isinstance(options, dict):
        return values
    if "data_files" not in options:
        return values

    def absolute(name: Any) -> Any:
        found = isinstance(name, str) and name and (folder / name).is_file()
        return str((folder / name).absolute()) if found else name

    files = options["data_files"]
    if isinstance(files, dict):
        files = {split: absolute(name) for split, name in files.items()}
    return {**values, "dataset_kwargs": {**options, "data_files": absolute(files)}}


# -- the subset ------------------------------------------------------------------------------


def unsupported(values: Mapping[str, Any]) -> str | None:
    """Why lmms-eval must read this task; None if we can.

    Args:
        values: of a `TaskYaml`.

    Example:
        >>> unsupported({"task": "t", "dataset_path": "lmms-lab/POPE"})
        "dataset_path 'lmms-lab/POPE' is none of json, csv, parquet"
    """
    for check in (_keys, _data, _kinds, _metrics, _generation):
        reason = check(values)
        if reason is not None:
            return reason
    return None


def _keys(values: Mapping[str, Any]) -> str | None:
    for key, value in values.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                return f"{key}: {value!r} is not supported"
        elif key not in _KEYS:
            return f"key '{key}' is not supported"
    return None


def _data(values: Mapping[str, Any]) -> str | None:
    kind = values.get("dataset_path")
    if kind is not None and kind not in DATA_KINDS:
        return f"dataset_path {kind!r} is none of {', '.join(DATA_KINDS)}"
    options = values.get("dataset_kwargs", {})
    if not isinstance(options, Mapping):
        return "dataset_kwargs is not a mapping"
    for key in options:
        if key != "data_files":
            return f"dataset_kwargs: key '{key}' is not supported"
    files = options.get("data_files", {})
    for name in files.values() if isinstance(files, Mapping) else [files]:
        if name is None:  # forgotten, which the task says when it is read
            continue
        if not isinstance(name, str):
            return "data_files: several files for one split are not supported"
        if "://" in name or any(sign in name for sign in "*?["):
            return f"data_files: {name} is an address or a pattern"
    return None


def _kinds(values: Mapping[str, Any]) -> str | None:
    """Which of text and function a key takes."""
    if values.get("output_type", "generate_until") != "generate_until":
        return f"output_type {values['output_type']} is not generate_until"
    allowed: dict[str, tuple[type, ...]] = {
        "doc_to_visual": (str, Function),
        "doc_to_text": (str, Function),
        "doc_to_target": (str, Function),
        "doc_to_messages": (Function,),
        "process_results": (Function,),
    }
    for key, types in allowed.items():
        if key in values and not isinstance(values[key], types):
            return f"{key}: {values[key]!r} is not supported"
    return None


def _metrics(values: Mapping[str, Any]) -> str | None:
    metrics = values.get("metric_list", [])
    if not isinstance(metrics, list) or not all(isinstance(one, Mapping) for one in metrics):
        return "metric_list is not a list of mappings"
    own = "process_results" in values
    for metric in metrics:
        name, aggregation = metric.get("metric"), metric.get("aggregation", "mean")
        if not isinstance(name, str):
            return f"metric_list: metric {name!r} is not a name"
        if not own and name != "exact_match":
            return f"metric_list: without process_results, metric '{name}' is not supported"
        if aggregation != "mean" and not isinstance(aggregation, Function):
            return f"metric_list: aggregation {aggregation!r} is neither mean nor a !function"
        for key in metric:
            options = () if own else METRIC_OPTIONS
            if key not in ("metric", "aggregation", "higher_is_better", *options):
                return f"metric_list: option '{key}' of {name} is not supported"
    return None


def _generation(values: Mapping[str, Any]) -> str | None:
    options = values.get("generation_kwargs", {})
    if not isinstance(options, Mapping):
        return "generation_kwargs is not a mapping"
    for key in options:
        if key not in GENERATION:
            return f"generation_kwargs: '{key}' is not supported"
    return None


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A hint to add to a message, with a blank before it; empty when nothing is similar.

    Example:
        >>> did_you_mean("quesiton", ["question", "answer"])
        " Did you mean 'question'?"
    """
    near = nearest(name, names)
    return "" if near is None else f" Did you mean '{near}'?"
