"""SparseVLM's arithmetic and the attention rows and means that baselines rank by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.pruning.attention_scores import mean_received, query_attention
from mmlm_efficient.pruning.sparsevlm_scores import (
    Clusters,
    cut_layers,
    density_peaks,
    merged_features,
    rater_columns,
    recycle_plan,
    schedule,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "flowcut" / "baselines.npz"


def test_rater_columns_toy() -> None:
    """Shares of the two visual tokens: (1, 1, 1) / 3 and (4, 1, 1) / 6; means 1/2, 1/4, 1/4."""
    visual = torch.tensor([[0.0], [math.log(4)]])
    text = torch.tensor([[1.0], [0.0], [0.0]])
    assert rater_columns(text, visual).tolist() == [True, False, False]
    assert rater_columns(text.flip(0).half(), visual.half()).tolist() == [False, False, True]


def test_rater_columns_all_rate_when_none_stands_out() -> None:
    assert rater_columns(torch.ones(1, 4), torch.randn(5, 4)).tolist() == [True]
    for count in (2, 3, 7):
        assert rater_columns(torch.ones(count, 4), torch.ones(5, 4)).all()


@pytest.mark.parametrize(("text", "visual"), [(0, 3), (3, 0)])
def test_rater_columns_need_text_and_image(text: int, visual: int) -> None:
    with pytest.raises(PromptError, match=f"has {text} such text and {visual} visual"):
        rater_columns(torch.ones(text, 2), torch.ones(visual, 2))


@pytest.mark.parametrize("seed", [0, 1])
def test_density_peaks_golden(seed: int) -> None:
    with np.load(GOLDEN) as file:
        dropped = torch.from_numpy(file[f"sparsevlm/s{seed}/dropped"])[0]
        want = torch.from_numpy(file[f"sparsevlm/s{seed}/merged3"])[0]
    merged = merged_features(dropped, density_peaks(dropped, 3))
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-5)


def test_density_peaks_toy() -> None:
    """Sorted values 0, .1, .3, 1, 1.2, 2 have, with three neighbours (themselves included),

    -log density .033, .017, .043, .177, .227, .547, separation .1, 2, .2, .7, .2, .8 and
    products .097, 1.967, .192, .587, .159, .463: the centres are .1, then 1, then 2.
    """
    hidden = torch.tensor([[2.0], [1.0], [0.0], [1.2], [0.1], [0.3]])
    clusters = density_peaks(hidden, 3)
    assert clusters.centres.tolist() == [4, 1, 0]
    assert clusters.assignment.tolist() == [2, 1, 0, 1, 0, 0]
    assert clusters.members == ((2, 4, 5), (1, 3), (0,))
    want = torch.tensor([[0.4 / 3], [1.1], [2.0]])
    torch.testing.assert_close(merged_features(hidden, clusters), want, rtol=0, atol=1e-5)


def test_density_peaks_ties_take_the_lower_index() -> None:
    """Equal tokens: the first ones are the centres, the others join the first."""
    clusters = density_peaks(torch.full((5, 3), 0.7), 3)
    assert clusters.centres.tolist() == [0, 1, 2]
    assert clusters.members == ((0, 3, 4), (1,), (2,))
    # With one cluster every density is 1 (only the token itself counts).
    torch.manual_seed(0)
    assert density_peaks(torch.randn(6, 3), 1).centres.tolist() == [0]


def test_density_peaks_of_far_apart_tokens_do_not_underflow() -> None:
    """Each exp(-distance squared) is below float32's smallest number; the ranking remains."""
    hidden = torch.tensor([[445.0], [330.0], [220.0], [100.0], [0.0]])
    assert density_peaks(hidden, 2).centres.tolist() == [3, 4]


def test_density_peaks_every_cluster_has_its_centre() -> None:
    torch.manual_seed(1)
    clusters = density_peaks(torch.randn(12, 4).repeat(2, 1), 8)
    assert sorted(sum(clusters.members, ())) == list(range(24))
    for centre, group in zip(clusters.centres.tolist(), clusters.members, strict=True):
        assert centre in group


@pytest.mark.parametrize("count", [0, 4])
def test_density_peaks_refuse_an_impossible_count(count: int) -> None:
    with pytest.raises(SettingsError, match=rf"{count} clusters of 3 tokens: .* 1\.\.3"):
        density_peaks(torch.eye(3), count)


@pytest.mark.parametrize(
    ("dropped", "recycled", "clusters"),
    [(0, 0, 0), (1, 1, 1), (3, 1, 1), (4, 2, 1), (29, 9, 1), (30, 10, 2), (276, 83, 9)],
)
def test_recycle_plan_counts(dropped: int, recycled: int, clusters: int) -> None:
    torch.manual_seed(2)
    relevance, hidden = torch.rand(dropped), torch.randn(dropped, 4)
    plan = recycle_plan(relevance, hidden)
    top = sorted(relevance.argsort(descending=True)[:recycled].tolist())
    assert plan.positions.tolist() == top
    assert len(plan.centres) == clusters
    assert sorted(sum(plan.members, ())) == top
    assert merged_features(hidden, plan).shape == (clusters, 4)


def test_recycle_plan_positions_are_those_of_the_dropped() -> None:
    """Thirty dropped, the ten at 20..29 recycled: two groups around -1 and +1."""
    relevance = torch.cat([torch.zeros(20), torch.ones(10)])
    hidden = torch.full((30, 1), 100.0)
    hidden[20:, 0] = torch.tensor([-1.0, 1.0, -1.1, 1.2, -0.8, 0.7, -1.4, 1.5, -0.5, 1.1])
    plan = recycle_plan(relevance, hidden)
    assert {group[0] % 2: group for group in plan.members} == {
        0: (20, 22, 24, 26, 28),
        1: (21, 23, 25, 27, 29),
    }
    for centre, group in zip(plan.centres.tolist(), plan.members, strict=True):
        assert centre in group
    merged = sorted(merged_features(hidden, plan).squeeze(1).tolist())
    assert merged == pytest.approx([-4.8 / 5, 5.5 / 5], abs=1e-5)


def test_merged_features_divide_by_a_little_more_than_the_count() -> None:
    plan = Clusters(torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0, 0]))
    hidden = torch.tensor([[1e6], [7.0], [3e6]])
    assert float(merged_features(hidden, plan)) == pytest.approx(4e6 / (2 + 1e-6), abs=0.3)
    assert merged_features(hidden.bfloat16(), plan).dtype == torch.bfloat16


def test_recycle_plan_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="each of the 3 dropped"):
        recycle_plan(torch.ones(4), torch.eye(3))


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (192, [300, 200, 110]),
        (128, [303, 110, 36]),
        (96, [238, 48, 26]),
        (64, [66, 30, 17]),
        (576, [576, 576, 576]),
        (80, [152, 39, 21.5]),
        (32, [33, 15, 8.5]),
        (384, [438, 388, 343]),
    ],
)
def test_schedule(tokens: int, kept: list[float]) -> None:
    assert [576 * share for share in schedule(tokens / 576)] == pytest.approx(kept, abs=1e-9)


def test_schedule_never_grows() -> None:
    for step in range(1, 1001):
        first, second, third = schedule(step / 1000)
        assert 1.0 >= first >= second >= third > 0.0
    assert schedule(1.0) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, math.nan])
def test_schedule_refuses_a_bad_ratio(ratio: float) -> None:
    with pytest.raises(SettingsError, match=r"keep_ratio must be a number in \(0, 1\]"):
        schedule(ratio)


def test_cut_layers() -> None:
    assert cut_layers(32) == (2, 6, 15)
    assert cut_layers(40) == (2, 8, 19)
    assert cut_layers(28) == (2, 5, 13)
    assert cut_layers(6) == (0, 1, 3)
    for depth in range(4, 129):
        first, second, third = cut_layers(depth)
        assert 0 <= first < second < third < depth - 1
    with pytest.raises(SettingsError, match="at least 4, the model has 3"):
        cut_layers(3)


# Attention rows and means


def test_query_attention_toy() -> None:
    """Two heads with weights (1, 3) / 4 and (1, 1) / 2; then the second key is hidden."""
    keys = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log().unsqueeze(-1)
    query = torch.full((2, 1, 1), 2.0)
    got = query_attention(query, keys, 0.5, None)
    torch.testing.assert_close(got, torch.tensor([[0.375, 0.625]]))
    visible = torch.tensor([[True, False], [False, False], [True, True]])
    got = query_attention(query.expand(2, 3, 1), keys, 0.5, visible)
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.375, 0.625]]))


def test_query_attention_is_float32_also_under_autocast() -> None:
    torch.manual_seed(3)
    query, keys = torch.randn(4, 3, 8), torch.randn(4, 9, 8)
    want = query_attention(query, keys, 0.3, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(query_attention(query, keys, 0.3, None), want)
    assert query_attention(query.half(), keys.half(), 0.3, None).dtype == torch.float32
    torch.testing.assert_close(want.sum(dim=1), torch.ones(3))


def eager_map(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The head-averaged map, all heads at once."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    return (query @ key.transpose(2, 3) * scale).softmax(dim=-1).mean(dim=1)


@pytest.fixture
def heads() -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [2, 7, 3, 4]; the second image has 5 tokens."""
    torch.manual_seed(4)
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    return torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4), valid


@pytest.mark.parametrize("chunk", [1, 3, 7, 128])
def test_mean_received(heads: tuple[Tensor, Tensor, Tensor], chunk: int) -> None:
    query, key, valid = heads
    want = eager_map(query, key, 0.5).mean(dim=1)
    torch.testing.assert_close(mean_received(query, key, 0.5, None, chunk), want)
    got = mean_received(query, key, 0.5, valid, chunk)
    torch.testing.assert_close(got[0], want[0])
    short = eager_map(query[1:, :5], key[1:, :5], 0.5).mean(dim=1)
    torch.testing.assert_close(got[1:, :5], short)
    assert got[1, 5:].tolist() == [0.0, 0.0]


def test_mean_received_toy() -> None:
    """Query 0 weighs the keys (1, 3) / 4, query 1 evenly: key 0 receives (1/4 + 1/2) / 2."""
    query = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    key = torch.tensor([1.0, 3.0]).log().reshape(1, 2, 1, 1)
    got = mean_received(query, key, 1.0, None)
    torch.testing.assert_close(got, torch.tensor([[0.375, 0.625]]))


def test_an_image_of_padding_alone_gets_zeros() -> None:
    rows, nothing = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, dtype=torch.bool)
    assert mean_received(rows, rows, 1.0, nothing).tolist() == [[0.0, 0.0, 0.0]]


class Largest(TorchDispatchMode):
    """The most elements that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_maps_of_all_heads_are_never_held() -> None:
    rows = torch.randn(1, 64, 8, 2)
    with Largest() as largest:
        mean_received(rows, rows, 0.7, None, chunk=8)
    assert largest.elements == 8 * 8 * 64


@pytest.mark.parametrize("chunk", [0, -4])
def test_mean_received_refuses_a_bad_chunk(chunk: int) -> None:
    with pytest.raises(SettingsError, match=f"chunk must be an integer >= 1 .*got {chunk}"):
        mean_received(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), 1.0, None, chunk)
