"""Clocks around the phases of a request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Stopwatch:
    """Reads the clock once a device has finished its queue.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """The clock, in seconds; only differences mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


class Span:
    """How long a piece of work takes on its device; reading it waits, starting and ending do not.

    Args:
        device: where the work runs, from now on.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[Any, Any] | None = None
        self._stream: Any = None
        self._seconds: float | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            event: Any = torch.cuda.Event
            self._events = event(enable_timing=True), event(enable_timing=True)
            self._events[0].record(self._stream)
        self._start = time.perf_counter()

    def end(self) -> Span:
        """The work is queued (on a CPU, done)."""
        if self._events is None:
            self._seconds = time.perf_counter() - self._start
        else:
            self._events[1].record(self._stream)
        return self

    @property
    def seconds(self) -> float:
        """Seconds between start and end: on CUDA those of the device's own clock, elsewhere the
        host's. 0 before the end."""
        if self._seconds is None and self._events is not None:
            first, last = self._events
            last.synchronize()
            self._seconds = first.elapsed_time(last) / 1e3
        return 0.0 if self._seconds is None else self._seconds


class Watch(StoppingCriteria):
    """Looks on while tokens are generated: notes when the first one came, and can call a halt.

    As a stopping criterion it sees every step of generate() and changes none of its numbers.

    Attributes:
        first_token_s: clock when the first new token was there, seconds; None before.
        cancelled: set it to stop after the current step.
        criteria: the caller's, which may end single rows of the batch. They are asked here,
            because what generate() appends to a row that ended may look like an end token.
        stop_strings: those that look for them, asked for the same reason.
        ended: for each row that one of them ended, the columns it had then.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.first_token_s: float | None = None
        self.cancelled = False
        self.criteria: Sequence[Callable[..., Any]] = ()
        self.stop_strings: Sequence[Callable[..., Any]] = ()
        self.ended: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Bool [batch]: rows that end now; all of them once cancelled."""
        if self.first_token_s is None:
            self.first_token_s = self.stopwatch.now()
        rows, columns = input_ids.shape
        done = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        for criterion in (*self.criteria, *self.stop_strings):
            done = done | criterion(input_ids, scores, **kwargs)
        if self.criteria or self.stop_strings:
            for row in done.nonzero().flatten().tolist():
                self.ended.setdefault(row, columns)
        return done | self.cancelled

    def ends_of(self, sequences: Tensor, width: int) -> dict[int, int]:
        """For each finished row that ends with a stop string, the columns up to its end.

        Args:
            sequences: int64 [B, width + new].
            width: columns of the prompt.
        """
        ended: dict[int, int] = {}
        for columns in range(width + 1, sequences.shape[1] + 1):
            for criterion in self.stop_strings:
                for row in criterion(sequences[:, :columns], None).nonzero().flatten().tolist():
                    ended.setdefault(row, columns)
        return ended
