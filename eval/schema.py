"""The keys of an evaluation beside the model's, and how errors about them are worded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eval.rows import Budget, budgets_from, split_outside
from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.settings import refuse_unknown

_RUN_NAME = re.compile(r"\w[\w.-]*")


def tasks_from_text(text: str) -> list[str | list[str]]:
    """Tasks as the command line writes them; brackets make a group.

    Example:
        >>> tasks_from_text("gqa,[pope,mme]")
        ['gqa', ['pope', 'mme']]
    """
    found: list[str | list[str]] = []
    for part in split_outside(text, ",", "tasks"):
        inner = part.startswith("[") and part.endswith("]")
        found.append(split_outside(part[1:-1], ",", "tasks") if inner else part)
    return found


class Expected(BaseModel):
    """Published numbers; see the module."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(min_length=1)
    tasks: list[str] = Field(min_length=1)
    rows: dict[str, list[float | None]]
    scale: dict[str, float] = Field(default_factory=dict)
    notes: dict[str, str] = Field(default_factory=dict)
    not_compared: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        for label, numbers in self.rows.items():
            if len(numbers) != len(self.tasks):
                raise SettingsError(
                    f"rows: {label!r} has {len(numbers)} numbers for {len(self.tasks)} tasks. "
                    "Write null where there is none."
                )
            if not all(one is None or math.isfinite(one) for one in numbers):
                raise SettingsError(f"rows: {label!r} holds a number that is not finite.")
        for place in ("scale", "notes", "not_compared"):
            refuse_unknown(getattr(self, place), self.tasks, place)
        for task, factor in self.scale.items():
            if not 0.0 < factor < math.inf:
                raise SettingsError(f"scale: {task!r} must be above 0, got {factor}.")
        return self

    def numbers(self, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """By task and row."""
        found: dict[str, dict[str, float]] = {task: {} for task in tasks}
        for label, numbers in self.rows.items():
            for task, number in zip(self.tasks, numbers, strict=True):
                if number is not None and task in found:
                    found[task][label] = number
        return found


def _tasks(value: Any) -> Any:
    """Groups of task names from a list with inner lists, or a text."""
    value = tasks_from_text(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise SettingsError(f"expected a list of task names, got {value!r}.")
    groups = [[entry] if isinstance(entry, str) else entry for entry in value]
    for group in groups:
        if not isinstance(group, list | tuple) or not group:
            raise SettingsError(f"expected a task's name or a list of them, got {group!r}.")
        for name in group:
            if not isinstance(name, str) or not name.strip():
                raise SettingsError(f"expected a task's name, got {name!r}.")
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"{name!r} is there twice.")
    if not names:
        raise SettingsError("there is none. `mmlm eval tasks` lists the bundled ones.")
    return tuple(tuple(group) for group in groups)


class RunKeys(BaseModel):
    """The keys of a run beside the model's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    methods: list[Any] | str = Field(default_factory=list)
    budgets: Annotated[tuple[Budget, ...], BeforeValidator(budgets_from)] = ()
    tasks: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_tasks)]
    metric: dict[str, str] = Field(default_factory=dict)
    seed: int = Field(0, ge=0, lt=2**32, strict=True)
    batch_size: int = Field(8, ge=1, strict=True)
    limit: int | None = Field(None, ge=1, strict=True)
    include_path: tuple[Path, ...] = ()
    expected: Expected | None = None


def narrowed(
    expected: Expected | None, tasks: Sequence[str], labels: Sequence[str]
) -> Expected | None:
    """The numbers of the tasks and rows that are left, None if there are none."""
    if expected is None:
        return None
    places = [place for place, task in enumerate(expected.tasks) if task in tasks]
    if not places:
        return None
    left = [expected.tasks[place] for place in places]
    return Expected(
        source=expected.source,
        tasks=left,
        rows={
            label: [numbers[place] for place in places]
            for label, numbers in expected.rows.items()
            if label in labels
        },
        scale={task: one for task, one in expected.scale.items() if task in left},
        notes={task: one for task, one in expected.notes.items() if task in left},
        not_compared=[task for task in expected.not_compared if task in left],
    )


def explained(error: ValidationError) -> str:
    """The first thing that a config has wrong, with its place."""
    first = error.errors()[0]
    place = ": ".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return f"{place}: {str(cause).removeprefix(f'{place}: ')}"
    if first["type"] == "missing":
        return f"{place}: is missing."
    if first["type"] == "extra_forbidden":
        *above, name = (str(part) for part in first["loc"])
        close = nearest(name, Expected.model_fields)
        hint = (
            f"Did you mean {close!r}?" if close else f"Allowed: {', '.join(Expected.model_fields)}."
        )
        return f"{': '.join(above)}: {name!r} is unknown. {hint}"
    return f"{place}: {first['msg']}, got {first['input']!r:.80}."


def folders(value: Any, base: Path | None, where: str) -> list[str]:
    """Absolute paths of folders that are there."""
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return []
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise SettingsError(f"{where}: include_path: expected a list of folders, got {value!r}.")
    found = []
    for one in listed:
        path = (base or Path()).joinpath(os.path.expanduser(one)).absolute()
        if not path.is_dir():
            raise SettingsError(f"{where}: include_path: there is no folder {path}.")
        found.append(os.path.normpath(path))
    return found


def short_name(model: Any) -> str:
    """A run's name from its model's: the last part."""
    name = model if isinstance(model, str) else "pocket"
    last = os.path.basename(os.path.normpath(os.path.expanduser(name)))
    return re.sub(r"[^\w.-]+", "-", last).lstrip(".-") or "run"


def checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or _RUN_NAME.fullmatch(name) is None:
        raise SettingsError(
            f"{where}: name: {name!r} becomes a folder: write letters, digits, '-', '_' and '.', "
            "the first a letter or a digit."
        )
    return name
