"""The machine in words, and its memory marks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmlm_efficient import machine
from mmlm_efficient.machine import PeakMemory, peak_resident_bytes, provenance

CPU = torch.device("cpu")
ELEMENTS = 1 << 20
BYTES = 4 * ELEMENTS


def fresh(code: str) -> list[int]:
    """Numbers that a process of its own prints: there is no freed memory to use again."""
    head = "import torch; from mmlm_efficient.machine import PeakMemory, peak_resident_bytes\n"
    run = subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, check=True
    )
    if "None" in run.stdout:
        pytest.skip("the high-water mark cannot be reset here")
    return [int(word) for word in run.stdout.split()]


def test_resident_peak_sees_at_least_what_is_touched() -> None:
    [peak] = fresh(f"print(peak_resident_bytes(lambda: torch.ones({32 * ELEMENTS}).sum()))")
    assert 0.9 * 32 * BYTES < peak < 1.5 * 32 * BYTES


def test_resident_peak_is_none_where_it_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_status_bytes", lambda field: None)
    assert peak_resident_bytes(lambda: None) is None


def test_provenance_names_the_machine() -> None:
    head = provenance(CPU)
    assert head["hardware"]["cpu"]
    assert head["hardware"]["device"] == "cpu"
    assert head["versions"]["torch"] == torch.__version__
    assert head["threads"] == torch.get_num_threads()
    line = machine.machine_line(head)
    assert head["hardware"]["cpu"] in line
    assert head["date"][:10] in line


def test_the_peak_of_a_piece_of_work_is_its_own() -> None:
    before, high, after = fresh(
        "peak = PeakMemory(torch.device('cpu'))\n"
        "peak.reset(); print(peak.read())\n"
        f"torch.ones({32 * ELEMENTS}).sum(); print(peak.read())\n"
        "peak.reset(); print(peak.read())"
    )
    assert high >= before + 0.9 * 32 * BYTES
    assert after < high - 0.5 * 32 * BYTES


def test_no_peak_where_it_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(CPU)
    peak.reset()
    assert peak.read() is None
