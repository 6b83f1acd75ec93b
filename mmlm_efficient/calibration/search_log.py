"""The log of a search: JSON lines, appended at once, readable after a crash.

The first line says what the search depends on, every other line is one finished evaluation. Only
the last line can be torn; it is dropped, and the evaluation is made again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmlm_efficient.errors import SettingsError

KIND = "search log"
# 2: the settings name the weights; samples are told apart by their pictures.
FORMAT = 2


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        number: place in the search, from 0.
        parameters: name -> value.
        value: of the objective, finite.
        seconds: how long the objective took.
    """

    number: int
    parameters: dict[str, float]
    value: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain values for JSON."""
        return asdict(self)


class SearchLog:
    """A log file and the settings it must have been made with.

    Args:
        path: of the file.
        settings: everything the evaluations depend on, as JSON values.

    Raises:
        SettingsError: the settings are no JSON values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        header = {"kind": KIND, "format": FORMAT, **settings}
        try:
            # Through JSON and back, so that a tuple equals the list it becomes in the file.
            self.header: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"settings must be JSON values: {error}") from error

    def open(self, space: Mapping[str, tuple[float, float]]) -> list[Evaluation]:
        """The evaluations in the log; the file is made if missing, and cleaned if torn.

        Args:
            space: name -> (low, high), the parameters that every evaluation must have.

        Raises:
            SettingsError: the file is no log, has other settings or a broken line that is not
                the last, or cannot be read or written.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise self._failed("read", error) from error
        if not data:
            self._rewrite([])
            return []
        # A torn line may end within a character: replaced, it is no JSON and goes the same way.
        *lines, tail = data.decode("utf-8", errors="replace").split("\n")
        first = lines.pop(0) if lines else tail
        self._check_header(_parsed(first))
        evaluations: list[Evaluation] = []
        for place, line in enumerate(lines, start=2):
            evaluation = _evaluation(_parsed(line), len(evaluations), space)
            if evaluation is None:
                raise SettingsError(
                    f"log_path: line {place} of {self.path} is not evaluation "
                    f"{len(evaluations)} of this search. Was it edited, or written by two "
                    "searches at once? Remove this line and all after it, or use another file"
                )
            evaluations.append(evaluation)
        if tail:
            # No newline at the end: the line is torn, or only its newline is missing.
            evaluation = _evaluation(_parsed(tail), len(evaluations), space)
            if evaluation is not None:
                evaluations.append(evaluation)
            self._rewrite(evaluations)
        return evaluations

    def append(self, evaluation: Evaluation) -> None:
        """Add one line and wait until it is on the disk.

        Raises:
            SettingsError: the file cannot be written, or was removed meanwhile.
        """
        try:
            # Not "append": that would make a removed file anew, without its first line.
            with self.path.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(_line(evaluation.to_dict()))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed("written", error) from error

    def _check_header(self, logged: Any) -> None:
        if not isinstance(logged, dict) or logged.get("kind") != KIND:
            raise SettingsError(
                f"log_path: {self.path} is not the log of a search and is left as it is: "
                "use another file"
            )
        differences = list(_differences(logged, self.header))
        if differences:
            raise SettingsError(
                f"log_path: {self.path} was made with other settings: {'; '.join(differences)}. "
                "Use another file, or delete this one to start anew"
            )

    def _rewrite(self, evaluations: list[Evaluation]) -> None:
        """Write the file whole or not at all."""
        lines = [self.header, *(evaluation.to_dict() for evaluation in evaluations)]
        partial: str | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self.path.parent, suffix=".part", delete=False
            ) as file:
                partial = file.name
                file.write(b"".join(map(_line, lines)))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)  # temporary files are private, logs are not
            os.replace(partial, self.path)
        except OSError as error:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            raise self._failed("written", error) from error

    def _failed(self, action: str, error: OSError) -> SettingsError:
        return SettingsError(
            f"log_path: {self.path} cannot be {action} ({error.strerror or error}): "
            "use another file, or none"
        )


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _parsed(line: str) -> Any:
    """The JSON value of a line, None when it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _evaluation(
    content: Any, number: int, space: Mapping[str, tuple[float, float]]
) -> Evaluation | None:
    """The evaluation a line holds, None unless it is the one with this number in this space."""
    if not isinstance(content, dict) or set(content) != set(Evaluation.__annotations__):
        return None
    parameters = content["parameters"]
    if content["number"] != number or not isinstance(parameters, dict):
        return None
    if set(parameters) != set(space):
        return None
    numbers = (content["value"], content["seconds"], *parameters.values())
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers):
        return None
    if not all(low <= parameters[name] <= high for name, (low, high) in space.items()):
        return None
    ordered = {name: float(parameters[name]) for name in space}
    return Evaluation(number, ordered, float(content["value"]), float(content["seconds"]))


def _differences(logged: Any, now: Any, name: str = "") -> Iterator[str]:
    """Every setting that differs, as "name is X in the log and Y now"."""
    if isinstance(logged, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*logged, *now]):
            inner = f"{name}.{key}" if name else str(key)
            if key not in now:
                yield f"{inner} is {json.dumps(logged[key])} in the log and not set now"
            elif key not in logged:
                yield f"{inner} is not set in the log and {json.dumps(now[key])} now"
            else:
                yield from _differences(logged[key], now[key], inner)
    elif logged != now:
        yield f"{name} is {json.dumps(logged)} in the log and {json.dumps(now)} now"
