"""The progress of a task: answers done, time left, and how each row stands.

A bar on a terminal; a line now and then in a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from eval.record import Record
from eval.task import Task

_ROWS_SHOWN = 4
# Between two lines of a log.
_LINE_EVERY_S = 30.0


class TaskBar:
    """Counts a task's records on standard error.

    Args:
        task: names the bar; its first metric is the running figure.
        total: records that the task will have.
        before: records of an earlier run that this one goes on with.
    """

    def __init__(self, task: Task, total: int, before: Iterable[Record]) -> None:
        self._name, self._total = task.name, total
        self._metric = task.metrics[0].name
        self._sums: dict[str, tuple[float, int]] = {}
        self._shares = True
        self._failed = 0
        before = [one for one in before if one["ok"]]
        self._bar: Any = tqdm(
            total=total,
            initial=len(before),
            desc=task.name,
            unit="answer",
            file=sys.stderr,
            disable=None,
        )
        self._count(before)
        self._done = len(before)
        self._asked = 0
        self._began_s = self._said_s = time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        """Count new records."""
        records = list(records)
        self._count(records)
        self._bar.update(len(records))
        self._done += len(records)
        self._asked += len(records)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._said_s >= _LINE_EVERY_S:
            self._write_line(now_s)

    def _write_line(self, now_s: float) -> None:
        self._said_s = now_s
        sys.stderr.write(f"{self._line(now_s - self._began_s)}\n")
        sys.stderr.flush()

    def _line(self, elapsed_s: float) -> str:
        """Such as "pocket: 120 of 500 answers, 1:10 left; none 93.8 %"."""
        left_s = (self._total - self._done) * elapsed_s / max(1, self._asked)
        left = tqdm.format_interval(left_s)
        return (
            f"{self._name}: {self._done} of {self._total} answers, {left} left; {self.standing()}"
        )

    def _count(self, records: Iterable[Record]) -> None:
        for record in records:
            if not record["ok"]:
                self._failed += 1
                continue
            item = record["scores"].get(self._metric)
            if isinstance(item, int | float):
                total, count = self._sums.get(record["row"], (0.0, 0))
                self._sums[record["row"]] = (total + item, count + 1)
                self._shares = self._shares and 0 <= item <= 1
        self._bar.set_postfix_str(self.standing(), refresh=False)

    def standing(self) -> str:
        """The running means, such as "none 93.8 %, flowcut:36 90.1 %"."""
        means = [
            f"{row} {100 * total / count:.1f} %" if self._shares else f"{row} {total / count:.3g}"
            for row, (total, count) in self._sums.items()
        ]
        shown = means[:_ROWS_SHOWN] + ["..."] * (len(means) > _ROWS_SHOWN)
        return ", ".join(shown + [f"{self._failed} failed"] * (self._failed > 0))

    def __enter__(self) -> TaskBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.disable and self._asked:
            self._write_line(time.monotonic())
        self._bar.close()
