"""Clocks that no request waits for."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from mmlm_efficient.clock import Span


def test_a_span_on_the_cpu() -> None:
    span = Span(torch.device("cpu"))
    assert span.seconds == 0.0
    time.sleep(0.01)
    first = span.end().seconds
    time.sleep(0.01)
    assert 0.01 <= first < 5.0
    assert span.seconds == first


def test_a_span_on_cuda_waits_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = f"event {len(done)}"

        def record(self, stream: Any) -> None:
            done.append(f"record on {stream}")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    span = Span(torch.device("cuda:1")).end()
    assert done == ["record on stream of cuda:1"] * 2
    assert span.seconds == 1.5
    assert span.seconds == 1.5
    assert done[2:] == ["wait"]
