"""FlowCut's maths on hand-computed examples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_scores import (
    accumulated,
    entropy_ratio,
    fused_score,
    normalised,
    prune_amount,
    query_scores,
    relay_weights,
    value_norm,
)
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass
from mmlm_efficient.stations.tower import TowerRows
from mmlm_efficient.tokens import top_positions

ATTENTION = torch.tensor([[0.30, 0.20, 0.10, 0.10, 0.05, 0.05, 0.05, 0.05]])
SHARES = [1 / 3, 2 / 9, 1 / 9, 1 / 9] + [1 / 18] * 4


def ratio(attention: torch.Tensor) -> float:
    return float(entropy_ratio(normalised(attention), torch.tensor([attention.shape[1]]))[0])


def test_toy_count() -> None:
    torch.testing.assert_close(normalised(ATTENTION), torch.tensor([SHARES]))
    rho = ratio(ATTENTION)
    assert rho == pytest.approx(0.880535, abs=1e-6)
    for target, remaining, amount, keep in (
        (2, 4, 0.673976, 7),
        (2, 2, 0.953147, 7),
        (4, 4, 0.449317, 8),
    ):
        got = prune_amount(8, target, remaining, rho)
        assert got == pytest.approx(amount, abs=1e-5)
        assert 8 - round(got) == keep


@pytest.mark.parametrize(
    ("sync", "groups", "counts"),
    [
        ("batch", None, [7, 7]),
        ("image", None, [7, 8]),
        ("image", (0, 1), [7, 8]),
        ("image", (0, 0), [7, 7]),
    ],
)
def test_toy_count_of_a_batch(sync: str, groups: tuple[int, ...] | None, counts: list[int]) -> None:
    """The toy image beside a uniform one: only a common maximum cuts the uniform image."""
    job = TowerJob((2, 2), 8, last_cut_layer=4, has_cls=True, groups=groups)
    tower_pass = FlowCutPass(FlowCut(keep_tokens=2, crop_sync=sync), job)
    tower_pass.begin(2, 8)
    uniform = torch.full((1, 8), 0.1)
    # One head of width 1: with query 1 the key logits are the logarithms of the weights.
    weights = torch.cat([ATTENTION, uniform])
    weights = torch.cat([1 - weights.sum(1, keepdim=True), weights], dim=1)
    keys = weights.log().unsqueeze(-1)
    ones = torch.ones(2, 9, 1)
    tower_pass.observe(TowerRows(0, ones, keys, ones, heads=1, has_cls=True, valid=None))
    keep = tower_pass.cut(0)
    assert keep is not None
    assert [len(positions) for positions in keep] == counts
    assert tower_pass.entropy_ratios[1] == pytest.approx([1.0])


def test_toy_score() -> None:
    semantic = normalised(torch.tensor([[0.02, 0.02, 0.06, 0.04, 0.01, 0.03, 0.01, 0.01]]))
    norm = torch.tensor([[1.0, 2, 4, 2, 1, 3, 2, 8]])
    score = fused_score(normalised(ATTENTION), semantic, norm)
    want = [0.433333, 0.644444, 1.644444, 0.622222, 0.105556, 0.616667, 0.211111, 0.844444]
    torch.testing.assert_close(score, torch.tensor([want]), atol=1e-5, rtol=0)
    history = torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.5, 0.1]])
    total = accumulated(history, score, 0.5)
    want = [0.466667, 0.572222, 1.072222, 0.361111, 0.102778, 0.358333, 0.355556, 0.472222]
    torch.testing.assert_close(total, torch.tensor([want]), atol=1e-5, rtol=0)
    assert top_positions(total[0], 7).tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert top_positions(total[0], 6).tolist() == [0, 1, 2, 3, 5, 7]


def test_uniform_attention_prunes_nothing_and_one_hot_most() -> None:
    uniform, one_hot = torch.full((1, 50), 0.02), torch.zeros(1, 50)
    one_hot[0, 7] = 0.4
    assert ratio(uniform) == pytest.approx(1.0)
    assert round(prune_amount(50, 10, 4, 1.0)) == 0
    assert ratio(one_hot) == 0.0
    assert round(prune_amount(50, 10, 4, 0.0)) == round(40 / math.sqrt(4))


def test_equal_scores_keep_the_lowest_positions() -> None:
    assert top_positions(torch.zeros(600), 5).tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_top_positions_is_a_stable_selection(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    assert top_positions(torch.tensor(values), keep).tolist() == sorted(order[:keep])


def test_relay_weights_ignore_padding() -> None:
    torch.manual_seed(0)
    relay, tokens = torch.randn(2, 3, 4), torch.randn(2, 6, 3, 4)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    weights = relay_weights(relay, tokens, 0.5, valid)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    assert weights[1, 4:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights[1:, :4], relay_weights(relay[1:], tokens[1:, :4], 0.5, None))


def test_value_norm_is_the_norm_of_the_head_mean() -> None:
    values = torch.tensor([[[[1.0, -2.0], [-1.0, 4.0]]]])
    assert value_norm(values).tolist() == [[1.0]]


def test_zero_weights_stay_zero() -> None:
    assert normalised(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert ratio(torch.zeros(1, 3)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_half_precision_never_gives_nan(dtype: torch.dtype, scale: float) -> None:
    """Constant images, and values so large that the similarity underflows."""
    rows = torch.full((1, 9, 8), 1.0, dtype=dtype) * scale
    rows[:, 0] *= 2
    job = TowerJob((2,), 8, last_cut_layer=2, has_cls=True)
    tower_pass = FlowCutPass(FlowCut(keep_tokens=2), job)
    tower_pass.begin(1, 8)
    tower_pass.observe(TowerRows(0, rows, rows, rows, heads=2, has_cls=True, valid=None))
    assert tower_pass.scores is not None
    assert tower_pass.scores.dtype == torch.float32
    assert bool(torch.isfinite(tower_pass.scores).all())
    tower_pass.cut(0)


def test_query_scores_sum_to_one_and_ignore_value_scale_without_semantics() -> None:
    torch.manual_seed(1)
    query, value = torch.randn(4, 8), torch.randn(4, 8)
    keys, values = torch.randn(4, 12, 8), torch.randn(4, 12, 8)
    scores = query_scores(query, value, keys, values, 8**-0.5)
    assert float(scores.relation.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(scores.semantic.sum()) == pytest.approx(1.0, abs=1e-6)
    one = fused_score(scores.relation, None, scores.norm)
    three = query_scores(query, 3 * value, keys, 3 * values, 8**-0.5)
    other = fused_score(three.relation, None, three.norm)
    assert one.argsort().tolist() == other.argsort().tolist()


def test_fused_score_needs_a_term() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        fused_score(None, None, None)
    norm = torch.ones(1, 2)
    assert fused_score(None, None, norm) is norm
