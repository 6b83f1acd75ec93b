"""Scores of answers that need no function of the task, and items that survive JSON."""

from __future__ import annotations

import inspect
import json
import math
import re
import string
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from mmlm_efficient.errors import DataError


def exact_match(
    answer: str,
    targets: Sequence[str],
    *,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
    regexes_to_ignore: Sequence[str] | None = None,
) -> float:
    """1 when the answer is one of the targets, else 0; as lmms-eval's metric of this name.

    Args:
        answer: what the model said; blanks around it do not count.
        targets: the right answers.
        ignore_case, ignore_punctuation, ignore_numbers: what does not count.
        regexes_to_ignore: patterns whose matches are removed first.

    Example:
        >>> exact_match("A cat. ", ["a cat"], ignore_case=True, ignore_punctuation=True)
        1.0
    """

    def plain(text: str) -> str:
        for pattern in regexes_to_ignore or ():
            text = re.sub(pattern, "", text)
        text = text.lower() if ignore_case else text
        if ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        if ignore_numbers:
            text = text.translate(str.maketrans("", "", string.digits))
        return text

    said = plain(answer.strip())
    return float(any(plain(target) == said for target in targets))


def parameters_of(function: Callable[..., Any]) -> Collection[str]:
    """Names of a function's parameters; none for those of Python that do not tell, such as max.

    Example:
        >>> list(parameters_of(mean)), list(parameters_of(max))
        (['items'], [])
    """
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


def mean(items: Sequence[Any]) -> float:
    """Plain mean of numbers, at least one."""
    return math.fsum(items) / len(items)


def number(value: Any, where: str) -> float:
    """An item of a metric whose figure is the mean.

    Raises:
        DataError: not a finite number.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise DataError(
            f"{where}: {value!r:.80} is not a finite number, which a metric with aggregation mean "
            "needs."
        )
    return float(value)


def plain_json(value: Any, where: str) -> Any:
    """The value as JSON gives it back: tuples as lists, numbers of numpy as Python's.

    Raises:
        DataError: JSON cannot hold it.

    Example:
        >>> plain_json({"box": (np.float64(0.5), 1)}, "row 1")
        {'box': [0.5, 1]}
    """
    try:
        return json.loads(json.dumps(value, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {value!r:.80} cannot be written as JSON ({error}). Use texts, finite "
            "numbers, lists and mappings."
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
