"""The machine in words, and its memory marks."""

from __future__ import annotations

import pytest
import torch

from mmlm_efficient import machine
from mmlm_efficient.machine import PeakMemory, peak_resident_bytes, provenance

CPU = torch.device("cpu")
ELEMENTS = 1 << 20
BYTES = 4 * ELEMENTS


def test_resident_peak_sees_at_least_what_is_touched() -> None:
    peak = peak_resident_bytes(lambda: torch.ones(32 * ELEMENTS).sum())
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
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
    peak = PeakMemory(CPU)
    peak.reset()
    before = peak.read()
    if before is None:
        pytest.skip("the high-water mark cannot be reset here")
    torch.ones(32 * ELEMENTS).sum()
    high = peak.read()
    assert high is not None
    assert high >= before + 0.9 * 32 * BYTES
    peak.reset()
    after = peak.read()
    assert after is not None
    assert after < high - 0.5 * 32 * BYTES


def test_no_peak_where_it_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(CPU)
    peak.reset()
    assert peak.read() is None
