"""Metrics of a task's YAML, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from eval.task import Metric
from eval.task_yaml import Function
from mmlm_efficient.errors import DataError


def metrics_of(values: Mapping[str, Any], where: str) -> tuple[Metric, ...]:
    """The metrics of a task, in order; exact_match where it names none.

    Args:
        values: of a `TaskYaml` in the supported subset.
        where: the YAML, for messages.

    Raises:
        DataError: none, one twice, or a value of a wrong type.
    """
    default = [] if "process_results" in values else [{"metric": "exact_match"}]
    metrics = []
    for given in values.get("metric_list", default):
        higher = given.get("higher_is_better", True)
        if not isinstance(higher, bool):
            raise DataError(f"{where}: metric_list: higher_is_better is true or false: {higher!r}")
        how = given.get("aggregation", "mean")
        name = how.text.rpartition(".")[2] if isinstance(how, Function) else "mean"
        metrics.append(Metric(given["metric"], higher, name))
        _check_options(given, where)
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"{where}: metric_list: names {', '.join(names) or 'nothing'}. Name every metric that "
            "process_results gives once."
        )
    return tuple(metrics)


def match_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What exact_match is told, such as ignore_case."""
    known = ("metric", "aggregation", "higher_is_better")
    given = values.get("metric_list", [{}])[0]
    return {key: value for key, value in given.items() if key not in known}


def _check_options(given: Mapping[str, Any], where: str) -> None:
    for key, value in given.items():
        if key.startswith("ignore_") and not isinstance(value, bool):
            raise DataError(f"{where}: metric_list: {key} is true or false, not {value!r}.")
        if key == "regexes_to_ignore":
            for pattern in value if isinstance(value, list) else [None]:
                _check_pattern(pattern, where)


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str):
        raise DataError(f"{where}: metric_list: regexes_to_ignore is a list of patterns.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"{where}: metric_list: {pattern!r} is not a pattern: {error}.") from error
