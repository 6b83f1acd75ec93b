"""What a report file has to hold for the project to read it, as pydantic models.

Whatever a report leaves out was not measured; what it has must be of the right kind, so that a
damaged or hand-made file is refused with its place and never fails somewhere in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from eval.schema import explained

Number = FiniteFloat | None
Ends = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None
Anything = dict[str, Any] | None
# A run is a folder, a task is part of a file's name.
Name = Annotated[str, Field(min_length=1, pattern=r"^[^/\\\x00]+$")]


class _Part(BaseModel):
    """Keys that no model names are welcome: later versions may write more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Metric(_Part):
    value: Number = None
    interval: Ends = None
    interval_kind: str | None = None


class _Change(_Part):
    difference: Number = None
    interval: Ends = None


class _GroupOfSamples(_Part):
    count: int | None = None
    value: Number = None
    interval: Ends = None


class _Seconds(_Part):
    median: Number = None


class _Row(_Part):
    row: str
    samples: int | None = None
    failed: int | None = None
    metrics: dict[str, _Metric | None] | None = None
    to_vanilla: _Change | None = None
    groups: dict[str, _GroupOfSamples] | None = None
    visual_tokens_in: Number = None
    visual_tokens_kept: Number = None
    visual_tokens_mean: Number = None
    ttft_s: _Seconds | None = None
    decode_tokens_per_s: Number = None
    peak_memory_bytes: Number = None
    kv_bytes: Number = None
    prune_s: Number = None
    batch_size: Number = None


class _Failure(_Part):
    row: str
    id: str | None = None
    where: str
    type: str
    message: str


class _Expected(_Part):
    value: Number = None
    scale: Number = None


class _Task(_Part):
    run: Name
    task: Annotated[str, Field(min_length=1)]
    metric: str
    rows: list[_Row]
    higher_is_better: bool | None = None
    percent: bool | None = None
    samples: int | None = None
    clusters: int | None = None
    workers: int | None = None
    mixed: list[str] | None = None
    versions: Anything = None
    hardware: Anything = None
    failures: list[_Failure] | None = None
    expected: dict[str, _Expected] | None = None
    not_compared: dict[str, FiniteFloat] | None = None


class _Error(_Part):
    message: str


class _Report(_Part):
    runs: list[str]
    tasks: list[_Task]
    config: Anything = None
    errors: list[_Error] | None = None
    seconds: Number = None


def what_is_wrong(report: Mapping[str, Any]) -> str | None:
    """The first thing by which a report of the right format cannot be read; None if it can.

    Example:
        >>> what_is_wrong({"runs": [], "tasks": [{"task": "vqa"}]})
        'tasks: 0: run: is missing.'
    """
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        return explained(error)
    return None
