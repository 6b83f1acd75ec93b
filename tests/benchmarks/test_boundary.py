"""The benchmark of the wrapper beside the stock model: its figures, measured small."""

from __future__ import annotations

from benchmarks import boundary
from mmlm_efficient import load


def test_small_figures() -> None:
    with load("pocket", dtype="float32") as lmm:
        decode = boundary.decode_ms(lmm, 3)
        # A finished stream holds less than one copy of the features of a picture.
        assert boundary.held_bytes(lmm) < 144 * 192 * 4
    assert set(boundary.METHODS) < set(decode)
    assert min(decode.values()) > 0
    dropped = boundary.dropped(2)
    assert dropped["hooks_left"] == 0
    assert dropped["ms_per_wrapper"] > 0


def test_medians_of_rounds() -> None:
    rounds = [{"a": 1.0, "b": {"c": value}} for value in (3.0, 5.0, 4.0)]
    assert boundary._medians(rounds) == {"a": 1.0, "b": {"c": 4.0}}
