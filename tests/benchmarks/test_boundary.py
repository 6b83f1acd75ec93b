"""The benchmark of the wrapper beside the stock model: a small run of two checkouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import boundary
from benchmarks.common import ROOT, read_json


@pytest.mark.slow
def test_small_run_of_two_checkouts(tmp_path: Path) -> None:
    """This checkout stands in for the earlier one, too."""
    out = tmp_path / "boundary.json"
    sizes = ["--tokens", "3", "--wrappers", "2", "--repeats", "1"]
    assert boundary.main([*sizes, "--before", str(ROOT), "--out", str(out)]) == 0
    result = read_json(out)
    for side in ("before", "after"):
        assert result[side]["compile"]["stock"] == {"graphs": 1, "breaks": 0}
        assert result[side]["decode_to_stock"]["stock"] == 1
        assert set(boundary.METHODS) < set(result[side]["decode_ms_per_token"])
        assert result[side]["dropped_wrappers"]["ms_per_wrapper"] > 0
    assert result["before"].keys() == result["after"].keys()
