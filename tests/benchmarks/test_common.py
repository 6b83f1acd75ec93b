"""Timing, memory and files of the benchmarks, on things whose answer is known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import common
from benchmarks.common import interleaved, peak_tensor_bytes, positive, ratio, summary
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import peak_resident_bytes, provenance

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


def test_resident_peak_sees_at_least_what_is_touched() -> None:
    peak = peak_resident_bytes(lambda: torch.ones(32 * ELEMENTS).sum())
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.9 * 32 * BYTES < peak < 1.5 * 32 * BYTES


def test_resident_peak_is_none_where_it_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "_status_bytes", lambda field: None)
    assert peak_resident_bytes(lambda: None) is None


def test_provenance_names_the_machine() -> None:
    head = provenance(CPU)
    assert head["hardware"]["cpu"]
    assert head["hardware"]["device"] == "cpu"
    assert head["versions"]["torch"] == torch.__version__
    assert head["threads"] == torch.get_num_threads()
    line = common.machine_line(head)
    assert head["hardware"]["cpu"] in line
    assert head["date"][:10] in line


def test_a_result_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results" / "one.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common.os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_positive() -> None:
    assert positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        positive("0")
