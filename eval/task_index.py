"""What lmms-eval knows of some tasks, asked in a process of its own.

Importing lmms-eval and indexing its two thousand YAML files takes seconds and fills memory, so
`look_up` starts this file as a script, once for all names. No data set is loaded.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# data sets that are files beside the YAML instead of a repository of the hub
_FILE_FORMATS = ("json", "parquet", "csv", "arrow", "text", "pandas", "webdataset", "imagefolder")
_TIMEOUT_S = 300
_MARK = "task index: "


@dataclass(frozen=True)
class Dataset:
    """A task's data set.

    Attributes:
        path: repository of the hub, or a folder.
        here: whether something of it is on this machine; not whether it is all of it.
    """

    path: str
    here: bool


@dataclass(frozen=True)
class IndexedTask:
    """One name among lmms-eval's tasks.

    Attributes:
        name: of a task, a group or a tag.
        known: whether lmms-eval has it.
        nearest: a name that it has, where this one is unknown.
        datasets: of the task, or of all tasks of the group.
        metrics: likewise.
    """

    name: str
    known: bool
    nearest: str | None = None
    datasets: tuple[Dataset, ...] = ()
    metrics: tuple[str, ...] = ()


class IndexTrouble(Exception):
    """Why lmms-eval cannot be asked, in words."""


def look_up(names: Iterable[str], include_path: Sequence[Path] = ()) -> dict[str, IndexedTask]:
    """What lmms-eval knows of these names.

    Args:
        names: of tasks, groups or tags.
        include_path: folders with further YAMLs.

    Raises:
        IndexTrouble: it is not installed, or does not start.
    """
    return dict(_looked_up(tuple(sorted(set(names))), tuple(map(str, include_path))))


@functools.lru_cache(maxsize=8)
def _looked_up(names: tuple[str, ...], include_path: tuple[str, ...]) -> dict[str, IndexedTask]:
    if find_spec("lmms_eval") is None:
        from eval import INSTALL_LMMS_EVAL  # not at the top, which also runs as a script

        raise IndexTrouble(f"lmms-eval is not installed. Install it with: {INSTALL_LMMS_EVAL}")
    # -P: the folder of this script must not hide modules of the same names.
    command = [sys.executable, "-P", str(Path(__file__).resolve())]
    try:
        run = subprocess.run(
            command,
            input=json.dumps({"names": names, "include_path": include_path}),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise IndexTrouble(f"lmms-eval's tasks cannot be listed: {error}") from error
    answers = [line for line in run.stdout.splitlines() if line.startswith(_MARK)]
    if run.returncode != 0 or not answers:
        last = (run.stderr.strip() or "no message").splitlines()[-1]
        raise IndexTrouble(f"lmms-eval's tasks cannot be listed: {last}")
    return {
        one["name"]: IndexedTask(
            **{
                **one,
                "datasets": tuple(Dataset(**data) for data in one["datasets"]),
                "metrics": tuple(one["metrics"]),
            }
        )
        for one in json.loads(answers[-1].removeprefix(_MARK))
    }


def _index(names: Sequence[str], include_path: Sequence[str]) -> list[dict[str, Any]]:
    """In the process of its own: the fields of `IndexedTask` for every name."""
    import difflib

    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=list(include_path))
    found = []
    for name in names:
        known = name in manager.task_index
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        configs = _configs(manager, name) if known else []
        datasets = {
            str(one["dataset_path"]): _is_here(one) for one in configs if one.get("dataset_path")
        }
        metrics = {
            entry["metric"]: None for one in configs for entry in one.get("metric_list") or ()
        }
        found.append(
            {
                "name": name,
                "known": known,
                "nearest": None if known or not close else close[0],
                "datasets": [{"path": path, "here": here} for path, here in datasets.items()],
                "metrics": list(metrics),
            }
        )
    return found


def _configs(manager: Any, name: str) -> list[dict[str, Any]]:
    """The YAML of a task, or of all tasks in a group, functions left out."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index[name]
    members = entry.get("task")
    if entry["yaml_path"] != -1:
        config = load_yaml_config(entry["yaml_path"], mode="simple")
        if entry["type"] != "group":
            return [config]
        members = config.get("task")
    found = []
    for member in members or ():
        if isinstance(member, dict):
            found.append(member)
        elif member in manager.task_index and member != name:
            found += _configs(manager, member)
    return found


def _is_here(config: dict[str, Any]) -> bool:
    """Whether there is a local copy of a task's data set."""
    from datasets.naming import camelcase_to_snakecase  # type: ignore[import-untyped]
    from huggingface_hub import constants

    path, kwargs = str(config["dataset_path"]), config.get("dataset_kwargs") or {}
    if path in _FILE_FORMATS:
        files = kwargs.get("data_files") or ()
        return all(Path(one).is_file() for one in _leaves(files) if "://" not in one)
    if Path(path).expanduser().is_dir():
        return True
    home = Path(os.path.expanduser(constants.HF_HOME))
    places = []
    if kwargs.get("video") or "From_YouTube" in kwargs:
        if kwargs.get("cache_dir"):
            places.append(home / str(kwargs["cache_dir"]))
        repository = "datasets--" + path.replace("/", "--")
        places.append(Path(constants.HF_HUB_CACHE) / repository / "snapshots")
    else:
        *owner, name = path.split("/")
        folder = "___".join([*owner, camelcase_to_snakecase(name)])
        own = os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip()
        cache = own or os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
        places.append(Path(os.path.expanduser(cache)) / folder)
    return any(place.is_dir() and any(place.iterdir()) for place in places)


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)


if __name__ == "__main__":
    sys.stdout.write(f"\n{_MARK}{json.dumps(_index(**json.loads(sys.stdin.read())))}\n")
