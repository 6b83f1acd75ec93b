"""How reports write numbers: percent or raw, intervals, milliseconds, bytes; a dash for none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DASH = "–"
MINUS = "−"
KIB = 1024

Mark = Literal["", "better", "worse"]


@dataclass(frozen=True)
class Scale:
    """How the figures of one metric are written.

    Attributes:
        percent: shares of 1 are written as percent, others as they are.
        decimals: digits behind the point.
    """

    percent: bool
    decimals: int = 1

    @classmethod
    def of(cls, values: Iterable[float | None], percent: bool | None = None) -> Scale:
        """The scale of a metric from its values.

        Args:
            values: of all rows.
            percent: whether they are shares of 1, as the task's result says; where it says
                nothing, they are if all of them lie in 0 to 1. Values outside never are.

        Example:
            >>> Scale.of([0.831, None]).score(0.831), Scale.of([1510.7]).score(1510.7)
            ('83.1', '1,510.7')
            >>> Scale.of([0.4], percent=False).score(0.4)
            '0.400'
        """
        found = [value for value in values if value is not None]
        if percent is not False and all(0 <= value <= 1 for value in found):
            return cls(percent=True)
        largest = max((abs(value) for value in found), default=0.0)
        return cls(percent=False, decimals=1 if largest >= 100 else 2 if largest >= 10 else 3)

    @property
    def unit(self) -> str:
        """Of a difference, in words: "points", or nothing."""
        return " points" if self.percent else ""

    def named(self, metric: str) -> str:
        """Head of a column."""
        return f"{metric}, %" if self.percent else metric

    def number(self, value: float) -> float:
        """The value as it is written."""
        return value * 100 if self.percent else value

    def score(self, value: float | None) -> str:
        """A figure, without its unit."""
        return DASH if value is None else _minus(f"{self.number(value):,.{self.decimals}f}")

    def with_unit(self, value: float | None) -> str:
        """A figure in a sentence: "83.1 %"."""
        return f"{self.score(value)} %" if self.percent and value is not None else self.score(value)

    def signed(self, value: float | None) -> str:
        """A difference: "+1.2", "−3.7", "0.0".

        Example:
            >>> Scale(percent=True).signed(-0.0371), Scale(percent=True).signed(-0.0001)
            ('−3.7', '0.0')
        """
        if value is None:
            return DASH
        text = f"{self.number(value):+,.{self.decimals}f}"
        return text[1:] if not text.strip("+-0.,") else _minus(text)

    def interval(self, ends: Sequence[float] | None, *, signed: bool = False) -> str:
        """Both ends of an interval; empty where there is none."""
        if ends is None:
            return ""
        write = self.signed if signed else self.score
        return f"{write(ends[0])} to {write(ends[1])}"


def task_scale(task: Mapping[str, Any]) -> Scale:
    """The scale of a task's own metric, of all its rows."""
    return Scale.of((score_of(task, row) for row in task["rows"]), task.get("percent"))


def score_of(task: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """What a row scored in the task's own metric; None if nothing of it finished."""
    value = metric_of(task, row).get("value")
    return None if value is None else float(value)


def metric_of(task: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row's {"value", "interval"} in the task's own metric; empty if nothing of it finished."""
    found: Mapping[str, Any] | None = (row.get("metrics") or {}).get(task["metric"])
    return found or {}


def mark_of(interval: Sequence[float] | None, *, higher_is_better: bool) -> Mark:
    """Whether a difference is one: "better" or "worse" if its interval leaves 0 out."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return ""
    return "better" if (interval[0] > 0) == higher_is_better else "worse"


def count(value: float | None) -> str:
    """A number of things, or a mean of such: "144", "36.5", "1,024"."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole: "25 %"; empty if one is not known."""
    if part is None or not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent >= 9.5 else f"{percent:.1f} %"


def times(value: float | None, base: float | None) -> str:
    """A ratio: "0.62×"; empty if one is not known."""
    return "" if value is None or not base else f"{value / base:.2f}×"


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds, three digits: "0.85", "84.2", "1,234".

    Example:
        >>> milliseconds(0.0842), milliseconds(1.2341), milliseconds(None)
        ('84.2', '1,234', '–')
    """
    return DASH if seconds is None else digits(seconds * 1e3)


def digits(value: float | None) -> str:
    """A measured number, three digits or all before the point."""
    if value is None:
        return DASH
    size = abs(value)
    return f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def size(n_bytes: float | None) -> str:
    """Bytes in a unit that fits.

    Example:
        >>> size(300), size(3 * 1024**2), size(None)
        ('300 B', '3.00 MiB', '–')
    """
    if n_bytes is None:
        return DASH
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < KIB:
            break
        value, unit = value / KIB, larger
    return f"{value:.0f} B" if unit == "B" else f"{digits(value)} {unit}"


def duration(seconds: float | None) -> str:
    """A time for people: "48 s", "7 min 03 s", "2 h 05 min"."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(number: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 sample", "2 samples"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def file_name(name: str) -> str:
    """A name of a task or sample as part of a file's name.

    Example:
        >>> file_name("docs/val: 7")
        'docs_val__7'
    """
    return re.sub(r"[^\w.+-]", "_", name)[:120]


def in_words(value: Any) -> str:
    """A target of a task as text."""
    if value is None:
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(in_words(one) for one in value)
    return str(value)


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
