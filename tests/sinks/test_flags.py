"""Sink scores and flags against hand-computed and golden values, and their limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.sinks.flags import (
    checked_dims,
    checked_threshold,
    default_threshold,
    relative_activations,
    sink_flags,
    sink_scores,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "var" / "functions.npz"
CASES = ["c0", "c1", "c3"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", CASES)
def test_golden_scores_and_sinks(golden: dict[str, Any], case: str) -> None:
    hidden = torch.from_numpy(golden[f"{case}__hidden"])
    dims = [int(dim) for dim in golden["sink_dims"]]
    scores = sink_scores(hidden, dims)
    torch.testing.assert_close(
        scores, torch.from_numpy(golden[f"{case}__phi"]), atol=1e-5, rtol=1e-6
    )
    everything = torch.ones(len(hidden), dtype=torch.bool)
    flags = sink_flags(hidden, dims, float(golden[f"{case}__tau"]), everything)
    assert flags.nonzero().squeeze(1).tolist() == golden[f"{case}__sink_indices"].tolist()


def test_toy_example() -> None:
    states = torch.tensor([[[3.0, 1.0, 1.0, 1.0], [1.0, -3.0, 1.0, 1.0]]])
    expected = torch.tensor([[3 / math.sqrt(3 + 1e-6), 1 / math.sqrt(3 + 1e-6)]])
    torch.testing.assert_close(sink_scores(states, [0]), expected, atol=1e-7, rtol=0)
    # Of several dimensions the largest counts, whatever its sign.
    torch.testing.assert_close(
        sink_scores(states, [0, 1]), expected[:, :1].expand(1, 2), atol=1e-7, rtol=0
    )


def test_the_comparison_is_strict_and_padding_is_never_a_sink() -> None:
    states = torch.tensor([[3.0, 1.0, 1.0, 1.0]]).repeat(3, 1)
    score = float(sink_scores(states, [0])[0])
    visible = torch.tensor([True, False, True])
    assert sink_flags(states, [0], score, visible).tolist() == [False] * 3
    below = math.nextafter(score, 0.0)
    assert sink_flags(states, [0], below - 1e-6, visible).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_model(dtype: torch.dtype) -> None:
    # Squared, these overflow float16.
    states = (torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 900).to(dtype)
    scores = sink_scores(states, [3, 7])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, sink_scores(states.float(), [3, 7]))
    assert bool((scores <= math.sqrt(16)).all())


def test_scale_does_not_matter_and_all_dimensions_agree() -> None:
    states = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        sink_scores(states * 1000, [2, 5]), sink_scores(states * 10, [2, 5]), atol=1e-5, rtol=1e-5
    )
    every = relative_activations(states)
    torch.testing.assert_close(sink_scores(states, [2, 5]), every[..., [2, 5]].amax(dim=-1))


def test_one_dimension_alone_reaches_the_limit() -> None:
    state = torch.zeros(1, 192)
    state[0, 11] = 1e4
    assert float(sink_scores(state, [11])) == pytest.approx(math.sqrt(192), rel=1e-6)


def test_default_threshold_is_the_papers_where_the_paper_measured() -> None:
    assert [default_threshold(width) for width in (3584, 4096, 5120, 8192)] == [20.0] * 4
    for width in (1, 192, 896, 1536, 2048):
        threshold = default_threshold(width)
        assert threshold < math.sqrt(width)
        assert threshold**2 / width == pytest.approx(400 / 4096)
        assert checked_threshold(None, width) == threshold


@pytest.mark.parametrize("threshold", [0, -1.0, 13.857, 20, math.inf, math.nan, True, "20"])
def test_thresholds_out_of_reach_are_refused(threshold: Any) -> None:
    with pytest.raises(SettingsError, match=r"sink_threshold must be .*sqrt\(192\) = 13.86"):
        checked_threshold(threshold, 192)


def test_a_threshold_within_reach_is_taken() -> None:
    assert checked_threshold(13, 192) == 13.0
    assert checked_threshold(20.0, 401) == 20.0


@pytest.mark.parametrize("dims", [[], [1, 1], [True], [1.0], ["1"]])
def test_dims_that_are_no_different_integers_are_refused(dims: Any) -> None:
    with pytest.raises(SettingsError, match="sink_dims must be one or more different integers"):
        checked_dims(dims, 8)


@pytest.mark.parametrize("dim", [-1, 8])
def test_dims_that_the_model_does_not_have_are_refused(dim: int) -> None:
    with pytest.raises(SettingsError, match=f"sink_dims: {dim} .* give 0 to 7"):
        checked_dims([0, dim], 8)
    assert checked_dims([7, 0], 8) == (7, 0)
