"""The samples file of a task: one JSON line per answer, written as it goes.

A killed run leaves at most one torn line, the last, which is dropped when the run goes on. A line
that a later one repeats (a sample that had failed and was asked again) no longer counts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.record import Record
from mmlm_efficient.errors import DataError, RunError, SettingsError

_LOG = logging.getLogger(__name__)
FORMAT = 1
# What a run that goes on may have otherwise: it is told in the report.
_MAY_CHANGE = ("versions", "hardware", "threads", "workers")
_LOCK_WAIT_S = 20.0


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a samples file.

    Returns:
        The last header with the rows of all of them, and the records in the order in which they
        were first written, repeated ones replaced.

    Raises:
        DataError: missing, without a header, of another format, or a damaged line before the last.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error
    header, records, _ = _parse(path, text)
    if header is None:
        raise DataError(f"{path}: holds no header. Remove the file; its task is run again.")
    return header, records


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a samples file; None if there is no file, or no whole line in it.

    Raises:
        DataError: it is damaged or of another format.
    """
    return _parse(path, path.read_bytes())[0] if path.exists() else None


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any] | None, list[Record], int]:
    """Header, records, and the bytes of the lines that are whole."""
    whole = text.rfind(b"\n") + 1
    header: dict[str, Any] | None = None
    records: dict[tuple[str, str], Record] = {}
    for number, line in enumerate(text[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line)
            kind = entry["kind"]
            if kind == "header":
                header = joined(header, entry)
            elif kind == "sample" and isinstance(entry["ok"], bool):
                records[entry["row"], entry["id"]] = entry
            else:
                raise ValueError(kind)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: is damaged. Remove that line (its sample is asked again) "
                "or start anew in another folder."
            ) from error
        if header is None or header["format"] != FORMAT:
            raise DataError(
                f"{path}, line {number}: is no samples file of format {FORMAT}, which this version "
                "reads. Start anew in another folder."
            )
    return header, list(records.values()), whole


def joined(before: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any]:
    """The header of a file that several runs wrote: the last one's, with the rows of all.

    Args:
        before: of the runs so far, or None.
        entry: of the next.

    Returns:
        A header whose "mixed" names what has not been the same in all of them.
    """
    for name in ("format", "task", "config_sha", "data_sha"):
        entry[name]  # a KeyError names what is missing
    if before is None:
        return {"mixed": [], **entry, "rows": dict(entry["rows"])}
    mixed = {
        *before["mixed"],
        *(name for name in _MAY_CHANGE if before.get(name) != entry.get(name)),
    }
    return {**entry, "rows": {**before["rows"], **entry["rows"]}, "mixed": sorted(mixed)}


class SamplesLog:
    """The samples file of one task, open for one process at a time.

    Args:
        path: of the file.
        header: of this run, see `check_same` for what has to agree with a file that is there.
        resume: go on with a file that is there; otherwise it is refused.

    Raises:
        SettingsError: the file holds answers of another configuration, or is there without resume.
        RunError: another process writes it, or the disk is full.
        DataError: it is damaged.

    Attributes:
        header: of all runs that wrote the file, see `joined`.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._file = -1
        header = json.loads(json.dumps(header))  # as the file will have it: lists, no tuples
        if path.exists() and not resume:
            raise SettingsError(
                f"{path}: is there already. Go on with it by --resume, or choose another --out."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._lock()
            before, records, whole = _parse(path, path.read_bytes())
            if before is not None:
                check_same(path, before, header)
            os.ftruncate(self._file, whole)
        except OSError as error:
            self.close()
            raise _unwritable(path, error) from error
        except BaseException:
            self.close()
            raise
        self._records = {(one["row"], one["id"]): one for one in records}
        self.header = joined(before, {"kind": "header", "format": FORMAT, **header})
        if "versions" in self.header["mixed"]:
            _LOG.warning("%s: holds answers of other package versions; reports say so", path)
        try:
            self._write([{"kind": "header", "format": FORMAT, **header}])
        except RunError:
            self.close()
            raise

    @property
    def records(self) -> list[Record]:
        """All records that count, in the order in which they were first written."""
        return list(self._records.values())

    def finished(self, row: str, sample_id: str) -> bool:
        """Whether a sample has its answer; a failed one is asked again."""
        record = self._records.get((row, sample_id))
        return record is not None and bool(record["ok"])

    def append(self, records: Iterable[Record]) -> None:
        """Write records behind the others, all in one piece.

        Raises:
            RunError: they cannot be written, such as on a full disk.
        """
        records = list(records)
        self._write(records)
        for record in records:
            self._records[record["row"], record["id"]] = record

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> SamplesLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Wait for a process that is just ending, refuse one that is not."""
        end = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise RunError(
                        f"{self.path}: another process writes it. Wait for it, stop it, or choose "
                        "another --out."
                    ) from error
                time.sleep(0.1)

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        left = memoryview(b"".join(map(_line, entries)))
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _line(entry: Mapping[str, Any]) -> bytes:
    """An entry as a line, readable where it can be: a lone surrogate has no UTF-8."""
    try:
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(entry) + "\n").encode()


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to mix answers that do not belong together.

    Args:
        path: for messages.
        before: header of the file.
        now: header of this run; further rows are welcome.

    Raises:
        SettingsError: other model or settings, other data, another task, or a row whose label
            stands for other settings.
    """
    for name, what in (
        ("task", "another task"),
        ("config_sha", "another model or other settings"),
        ("data_sha", "other data or another version of the task"),
    ):
        if before[name] != now[name]:
            raise SettingsError(
                f"{path}: holds answers for {what} ({name} {before[name]}, now {now[name]}). "
                "Choose another --out, or go back to what it was."
            )
    for label, settings in now["rows"].items():
        if label in before["rows"] and before["rows"][label] != settings:
            raise SettingsError(
                f"{path}: row {label!r} had other settings ({before['rows'][label]}, now "
                f"{settings}). Give the row another label, or choose another --out."
            )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written: {error.strerror}. What was finished is kept: make room and "
        "go on with --resume."
    )
