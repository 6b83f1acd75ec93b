"""Timing, memory and files of the benchmarks, on things whose answer is known."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import common
from benchmarks.common import interleaved, peak_tensor_bytes, positive, ratio, summary

CPU = torch.device("cpu")
ELEMENTS = 1 << 20
BYTES = 4 * ELEMENTS


def test_cases_take_turns_and_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.gc, "collect", lambda: 0)  # slow in a process full of tests
    order: list[str] = []

    def case(name: str):
        def run() -> dict[str, float]:
            order.append(name)
            return {"seconds": float(len(order))}

        return run

    measured = interleaved({"a": case("a"), "b": case("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert measured == {
        "a": [{"seconds": 3.0}, {"seconds": 5.0}],
        "b": [{"seconds": 4.0}, {"seconds": 6.0}],
    }


def test_ratio_is_of_medians_with_the_extremes_of_the_rounds() -> None:
    assert ratio([1.0, 3.0, 2.0], [2.0, 4.0, 2.0]) == {
        "of_medians": 1.0,
        "lowest_round": 0.5,
        "highest_round": 1.0,
    }
    assert summary([0.3, 0.1, 0.2])["median_s"] == 0.2


def test_peak_of_tensors_is_exact() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(ELEMENTS)
        second = first + 1  # two at once
        del first
        third = second * 2  # two at once again
        return third

    # A few bytes more for the two scalars.
    assert 2 * BYTES <= peak_tensor_bytes(call, CPU) < 2 * BYTES + 64
    assert peak_tensor_bytes(lambda: None, CPU) == 0


def test_positive() -> None:
    assert positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive("0")
