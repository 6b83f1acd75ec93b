"""What a task of lmms-eval is made of, as one short text: two runs with the same one asked and
scored the same things.

lmms-eval's own hashes do not say that: its hash of documents is that of nothing, and the hash of a
task's settings sees neither its functions nor its data.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DIGITS = 12
_ROWS = 1000


def data_digest(config: Any, docs: Any) -> str:
    """SHA-256 of a task's settings and documents.

    Pictures, sounds and videos are left out, as reading them takes as long as the run itself.
    Functions count by the whole file they stand in, for they call others there. Absolute paths
    count by their last part, so that the digest is the same on every machine.

    Args:
        config: TaskConfig of lmms-eval.
        docs: the documents that are evaluated, a Dataset of datasets.

    Returns:
        12 hex digits.
    """
    digest = hashlib.sha256(_json(_described(dict(vars(config)))))
    for rows in _rows(docs):
        digest.update(_json(rows))
    return digest.hexdigest()[:DIGITS]


def _rows(docs: Any) -> Iterator[Any]:
    """Documents without media, as they are stored: nothing is decoded."""
    columns = sorted(name for name, kind in docs.features.items() if not _is_media(kind))
    yield [len(docs), columns]
    if columns:
        for table in docs.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS):
            yield from table.select(columns).to_pylist()


def _is_media(feature: Any) -> bool:
    """Whether a column holds something to decode, at whatever depth."""
    if hasattr(feature, "decode_example"):
        return True
    if isinstance(feature, Mapping):
        return any(map(_is_media, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_is_media, feature))
    return hasattr(feature, "feature") and _is_media(feature.feature)


def _described(value: Any) -> Any:
    """A setting as JSON, without anything that changes from machine to machine."""
    if isinstance(value, functools.partial):
        return [
            "partial",
            _described(value.func),
            _described(value.args),
            _described(value.keywords),
        ]
    if isinstance(value, Mapping):
        return {str(key): _described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if isinstance(value, str):
        return os.path.basename(value) if os.path.isabs(value) else value
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return ["function", name, _file_digest(_source_file(value))]
    return value


def _source_file(function: Any) -> str | None:
    try:
        return inspect.getsourcefile(function)
    except TypeError:  # an object that can be called: its class stands somewhere
        return inspect.getsourcefile(type(function))


@functools.cache
def _file_digest(path: str | None) -> str:
    return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_other).encode()


def _other(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
