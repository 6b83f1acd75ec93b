"""Finished parts of a long run, kept in a file so that a killed run can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Progress:
    """Right answers by batch and case.

    Args:
        path: JSON-lines file; None keeps nothing.
        settings: what a run must share with the file to go on from it; other runs start anew.

    Attributes:
        resumed: whether the file held something.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._right: dict[tuple[int, str], list[int]] = {}
        if path is not None:
            self._read(path, dict(settings))
        self.resumed = bool(self._right)

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = [entry for entry in map(parsed, lines) if entry is not None]
        if entries and entries[0] == settings:
            self._right = {(one["batch"], one["case"]): one["right"] for one in entries[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew: without other settings' lines and without a half-written last one.
        kept = [settings, *(self._entry(*key) for key in self._right)]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def _entry(self, batch: int, case: str) -> dict[str, Any]:
        return {"batch": batch, "case": case, "right": self._right[batch, case]}

    def has(self, batch: int, case: str) -> bool:
        """Whether a case has answered a batch."""
        return (batch, case) in self._right

    def right(self, batch: int, case: str) -> Sequence[int]:
        """1 for every right answer of a case to a batch."""
        return self._right[batch, case]

    def add(self, batch: int, case: str, right: Sequence[int]) -> None:
        """Remember a finished batch of a case."""
        self._right[batch, case] = list(right)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._entry(batch, case)) + "\n")


def parsed(line: str) -> Any:
    """A line of a progress file; None for one that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
