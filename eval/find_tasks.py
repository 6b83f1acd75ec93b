"""From the name of a task or of a group of tasks to the tasks.

Names are looked up in the bundled tasks, then in the YAML files under the folders given; anything
else is lmms-eval's to know.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import INSTALL_LMMS_EVAL
from eval.local_task import LocalTask
from eval.task import Task
from eval.task_yaml import did_you_mean, read_yaml
from mmlm_efficient.errors import MMLMError, SettingsError

BUNDLED = "bundled with mmlm_efficient"
# No task of lmms-eval starts like this.
_OUR_PREFIX = "mmlm_"
_IGNORED_FOLDERS = ("__pycache__", ".ipynb_checkpoints")


def bundled_folder() -> Path:
    """Where the YAML files of the bundled tasks lie; also for `lmms-eval --include_path`."""
    return Path(__file__).parent / "tasks"


def task_names() -> list[str]:
    """The bundled tasks.

    Example:
        >>> task_names()
        ['mmlm_pocket_video', 'mmlm_pocket_vqa']
    """
    return sorted(_Index(()).tasks)


def find_tasks(entry: str, include_path: Sequence[Path] = ()) -> list[Task]:
    """The task of a name, or the tasks of a group or tag, in order.

    Args:
        entry: a name, not a path.
        include_path: folders whose YAML files are looked through, with all folders below.

    Raises:
        SettingsError: unknown name (naming the nearest), a path instead of a name, a name that
            two files give, no such folder, a task that needs lmms-eval where it is not installed.
        DataError: the definition or the data of a task cannot be used.
        UnsupportedError: a task that neither this project nor its lmms-eval adapter can ask.
    """
    if not entry.strip():
        raise SettingsError(
            f"tasks: a name is empty. Bundled tasks: {', '.join(task_names())}; "
            "`mmlm eval tasks` lists them."
        )
    _refuse_path(entry)
    index = _Index(include_path)
    if entry in index.tasks:
        return [_task(entry, index, include_path)]
    if entry in index.groups:
        return _members(entry, index, include_path)
    return _of_lmms_eval(entry, index, include_path, f"task {entry!r}: is unknown")


def task_table(include_path: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """What can be run without lmms-eval, and what is under the folders given.

    Returns:
        task, samples, metric and source of each, JSON-able; samples and metric are None for a
        task that cannot be used as it is, and its source says why.
    """
    index = _Index(include_path)
    return [_table_row(name, index) for name in sorted(index.tasks)]


def _table_row(name: str, index: _Index) -> dict[str, Any]:
    found = index.tasks[name]
    row: dict[str, Any] = {"task": name, "samples": None, "metric": None, "source": found.source}
    try:
        reason = LocalTask.why_not(found.path)
        if reason is not None:
            return row | {"source": f"{found.source} (by lmms-eval: {reason})"}
        task = LocalTask(found.path, found.source)
    except MMLMError as error:
        return row | {"source": f"{found.source} (cannot be used: {error})"}
    return row | {"samples": len(task.ids), "metric": task.metrics[0].name}


# -- names -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A task's file and, in words, where it comes from."""

    path: Path
    source: str


class _Index:
    """All names that YAML files give.

    Attributes:
        tasks: by name.
        groups: by name of group or tag, the members; a member that changes settings of its task
            is a mapping, which only lmms-eval understands.
    """

    def __init__(self, include_path: Sequence[Path]) -> None:
        self.tasks: dict[str, _Found] = {}
        self.groups: dict[str, list[Any]] = {}
        self._group_files: dict[str, Path] = {}
        seen: set[Path] = set()
        for path, source in _files(include_path):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                self._add(path, source or str(path))
        for name in self.tasks.keys() & self.groups.keys():
            raise SettingsError(
                f"task {name!r}: is also the name of a group or tag ({self.tasks[name].path}). "
                "Rename one of them."
            )

    def _add(self, path: Path, source: str) -> None:
        values = read_yaml(path).values
        task, group = values.get("task"), values.get("group")
        if isinstance(task, list) and isinstance(group, str):
            if group in self.groups:
                raise SettingsError(
                    f"group {group!r}: is given by {path}, and by "
                    f"{self._group_files.get(group, 'tasks that have it as their tag')}. "
                    "Rename one of them."
                )
            self.groups[group] = task
            self._group_files[group] = path
        elif isinstance(task, str):
            if task in self.tasks:
                raise SettingsError(
                    f"task {task!r}: is given by {self.tasks[task].path} and by {path}. "
                    "Rename one of them."
                )
            self.tasks[task] = _Found(path, source)
            for tag in (*_names(values.get("tag")), *_names(group)):
                if tag in self._group_files:
                    raise SettingsError(
                        f"tag {tag!r} of {path}: is the name of the group of "
                        f"{self._group_files[tag]}. Rename one of them."
                    )
                self.groups.setdefault(tag, []).append(task)

    def files_of(self, group: str) -> dict[str, Path]:
        """The YAML files of a group and of the tasks and groups in it, as far as they are here."""
        found: dict[str, Path] = {}
        todo = [group]
        while todo:
            name = todo.pop()
            path = self.tasks[name].path if name in self.tasks else self._group_files.get(name)
            if path is not None and name not in found:
                found[name] = path
                for member in self.groups.get(name, []):
                    todo += _names(member.get("task") if isinstance(member, dict) else member)
        return found

    def names(self) -> list[str]:
        """Everything that can be asked for."""
        return sorted((*self.tasks, *self.groups))


def _names(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _files(include_path: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """YAML files and what to call their source; None for their path."""
    for path in _below(bundled_folder()):
        yield path, BUNDLED
    for given in include_path:
        folder = Path(os.path.expanduser(given))
        if folder.is_file():
            raise SettingsError(
                f"include path {given}: is a file. Give its folder, {folder.parent}, and the "
                "task's name."
            )
        if not folder.is_dir():
            raise SettingsError(f"include path {given}: there is no such folder.")
        for path in _below(folder):
            yield path, None


def _below(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS)
        found += [Path(root) / name for name in sorted(files) if name.endswith(".yaml")]
    return found


def _refuse_path(entry: str) -> None:
    path = Path(os.path.expanduser(entry))
    looks_like_one = any(sign in entry for sign in "/\\") or entry.endswith((".yaml", ".yml"))
    if not looks_like_one:
        return
    folder, name = path if path.is_dir() else path.parent, "NAME"
    if path.is_file():
        task = read_yaml(path).values.get("task")
        name = task if isinstance(task, str) else name
    raise SettingsError(
        f"task {entry!r}: is a path; tasks go by their names. Give the folder and the name: "
        f"--include-path {folder} --tasks {name}"
    )


# -- tasks -----------------------------------------------------------------------------------


def _task(name: str, index: _Index, include_path: Sequence[Path]) -> Task:
    """A task whose YAML the index has."""
    found = index.tasks[name]
    reason = LocalTask.why_not(found.path)
    if reason is None:
        return LocalTask(found.path, found.source)
    why = f"task {name!r}: {found.path} uses what only lmms-eval reads ({reason})"
    return _of_lmms_eval(name, index, include_path, why, {name: found.path})[0]


def _members(
    group: str, index: _Index, include_path: Sequence[Path], above: tuple[str, ...] = ()
) -> list[Task]:
    """The tasks of a group, each once, in order; groups in it are opened."""
    if group in above:
        raise SettingsError(
            f"group {group!r}: contains itself, by way of {' > '.join((*above, group))}. Remove "
            "one of them."
        )
    members = index.groups[group]
    if not all(isinstance(member, str) for member in members):
        why = f"group {group!r}: changes settings of its tasks, which only lmms-eval can"
        return _of_lmms_eval(group, index, include_path, why, index.files_of(group))
    tasks: dict[str, Task] = {}
    for member in members:
        if member in index.tasks:
            found: Sequence[Task] = [_task(member, index, include_path)]
        elif member in index.groups:
            found = _members(member, index, include_path, (*above, group))
        else:
            why = f"group {group!r}: its task {member!r} is unknown"
            found = _of_lmms_eval(member, index, include_path, why)
        tasks |= {task.name: task for task in found}
    if not tasks:
        raise SettingsError(f"group {group!r}: has no tasks. List some under `task:`.")
    return list(tasks.values())


def _of_lmms_eval(
    entry: str,
    index: _Index,
    include_path: Sequence[Path],
    why: str,
    files: Mapping[str, Path] | None = None,
) -> list[Task]:
    """Tasks that only lmms-eval can read or knows.

    Args:
        entry: their name.
        index: of our names.
        include_path: as given.
        why: they are lmms-eval's, to begin a message with.
        files: YAML by name, where they are ours: lmms-eval must read these and none of its own.
    """
    known = index.names()
    hint = did_you_mean(entry, known) if entry not in known else ""
    if entry not in known and entry.startswith(_OUR_PREFIX):
        raise SettingsError(f"{why}.{hint} Known here: {', '.join(known)}.")
    if importlib.util.find_spec("lmms_eval") is None:
        raise SettingsError(
            f"{why}.{hint} Known without lmms-eval: {', '.join(known)}. lmms-eval has further "
            f"ones; install it with: {INSTALL_LMMS_EVAL}"
        )
    from eval.lmms_task import lmms_tasks

    try:
        return list(lmms_tasks(entry, include_path, files or {}))
    except SettingsError as error:
        if hint and hint not in str(error):
            raise SettingsError(f"{error} Among the bundled and local tasks:{hint}") from error
        raise
