"""What the documents of a task of lmms-eval are called.

The seed of a sampled answer is made of the sample's id, so that the runner and lmms-eval's own
command line must call it the same, whichever of them reads the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmlm_efficient.errors import DataError


def id_column(metadata: Any) -> str | None:
    """The column that holds the samples' ids, of a task's metadata; None without one.

    Example:
        >>> id_column({"version": 1.0, "id_column": "id"}), id_column([{"version": 0.0}])
        ('id', None)
    """
    found = metadata.get("id_column") if isinstance(metadata, Mapping) else None
    return found if isinstance(found, str) else None


def ids_of(task: str, metadata: Any, docs: Any) -> tuple[str, ...]:
    """The ids of documents: the values of the task's id_column, else their numbers.

    Args:
        task: its name, for messages.
        metadata: of the task's YAML.
        docs: a Dataset of datasets.

    Raises:
        DataError: no such column, or a value that occurs twice.
    """
    column = id_column(metadata)
    if column is None:
        return tuple(map(str, range(len(docs))))
    if column not in docs.column_names:
        raise DataError(
            f"task {task}: metadata.id_column names a column {column!r} that its data do not have. "
            f"They have: {', '.join(docs.column_names)}."
        )
    ids = tuple(map(str, docs[column]))
    double = next((id for id, times in Counter(ids).items() if times > 1), None)
    if double is not None:
        raise DataError(
            f"task {task}: column {column!r}, which metadata.id_column names, has {double!r} "
            "several times. Ids must differ."
        )
    return ids
