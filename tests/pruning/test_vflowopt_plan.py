"""VFlowOpt's counts, stage 0 and recycling on hand-computed examples and recorded arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.vflowopt_plan import (
    Segments,
    StageZero,
    achieved_ratio,
    default_stage_layers,
    members_of,
    ratios_from_cumulative,
    recycle,
    segments,
    solve_last_ratio,
    stage_count,
    stage_zero,
    untuned,
)
from mmlm_efficient.tokens import top_positions

GOLDEN = Path(__file__).parents[1] / "golden" / "vflowopt"
PAPER: Segments = (9, 9, 10)
TOY_MAP = torch.tensor([0.05, 0.20, 0.02, 0.10, 0.15, 0.03, 0.01, 0.30, 0.14])
TOY_FEATURES = torch.arange(1.0, 10.0).unsqueeze(1)


def load(name: str) -> dict[str, Tensor]:
    """One recorded file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays: dict[str, np.ndarray[Any, Any]] = dict(file)
    return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def layout(overview: int, n_tiles: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source, row, column and newline flag of an overview (side) and tile rows with newlines."""
    first, tiles = torch.arange(overview**2), torch.arange(n_tiles)
    source = torch.cat([torch.zeros_like(first), torch.ones_like(tiles)])
    row = torch.cat([first // max(overview, 1), tiles // width])
    col = torch.cat([first % max(overview, 1), tiles % width])
    return source, row, col, (source == 1) & (col == width - 1)


def plan_grid(
    scores: Tensor,
    ratio: float,
    grid_size: float | None,
    overview: int = 3,
    width: int = 1,
    exact_budget: bool = False,
    n_keep: int | None = None,
) -> StageZero:
    """The plan of one packed image."""
    places = layout(overview, len(scores) - overview**2, width)
    return stage_zero(scores, ratio, grid_size, *places, exact_budget, n_keep)


def groups(plan: StageZero) -> set[tuple[int, ...]]:
    """Members of each cell."""
    carriers = set(plan.carriers.tolist())
    pairs = zip(plan.kept.tolist(), members_of(plan), strict=True)
    return {members for position, members in pairs if position in carriers}


def test_toy_recycling() -> None:
    plan = plan_grid(TOY_MAP, 4 / 9, 2.0)
    assert (plan.n_tokens, plan.n_drop, plan.n_rec, plan.n_low) == (9, 5, 2, 7)
    assert (plan.n_cells, plan.n_kept) == (4, 6)
    assert plan.kept.tolist() == [1, 4, 5, 6, 7, 8]
    assert plan.carriers.tolist() == [4, 5, 6, 8]
    assert members_of(plan) == ((1,), (0, 3, 4), (2, 5), (6,), (7,), (8,))
    out = recycle(TOY_FEATURES, TOY_MAP, plan)
    torch.testing.assert_close(out[:, 0], torch.tensor([2.0, 4.0, 4.8, 7.0, 8.0, 9.0]))
    assert TOY_MAP[plan.kept].tolist() == pytest.approx([0.20, 0.15, 0.03, 0.01, 0.30, 0.14])
    left = plan.kept
    for ratio, want in ((0.5, [1, 4, 7]), (0.7, [1, 7])):
        left = left[top_positions(TOY_MAP[left], stage_count(len(left), ratio))]
        assert left.tolist() == want


def test_toy_exact_budget() -> None:
    """Two fewer plain tokens: 7 joins the cell of 6, and 1 the one of 0, 3 and 4."""
    plan = plan_grid(TOY_MAP, 4 / 9, 2.0, exact_budget=True)
    assert (plan.n_kept, plan.n_low, plan.n_cells) == (4, 9, 4)
    assert groups(plan) == {(0, 1, 3, 4), (2, 5), (6, 7), (8,)}
    assert plan.carriers.tolist() == [1, 5, 7, 8]
    for n_keep, n_low in ((5, 8), (7, 5), (8, 3)):  # of 5 and 6 that leave 7, the nearer to 4
        plan = plan_grid(TOY_MAP, 0.1, 2.0, exact_budget=True, n_keep=n_keep)
        assert (plan.n_kept, plan.n_low) == (n_keep, n_low)


def test_exact_budget_also_keeps_more_when_cells_are_few() -> None:
    """n_rec is 4 but the 7 low tokens lie in two cells; of 4 and 5 that leave 13, 5 is nearer."""
    scores = 0.9 + torch.arange(16) / 100
    scores[[0, 1, 4, 5, 2]] = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05])
    free = plan_grid(scores, 13 / 16, 2.0, overview=4)
    assert (free.n_low, free.n_cells, free.n_kept) == (7, 2, 11)
    exact = plan_grid(scores, 13 / 16, 2.0, overview=4, exact_budget=True)
    assert exact.n_kept == 13
    assert groups(exact) == {(0, 1, 4, 5), (2,)}


def test_exact_budget_below_the_number_of_cells_is_refused() -> None:
    with pytest.raises(SettingsError, match="3 of 9 tokens are to stay.* leave at least 4"):
        plan_grid(TOY_MAP, 3 / 9, 2.0, exact_budget=True)


def test_exact_budget_below_the_number_of_grids_names_what_helps() -> None:
    """An overview of 4 tokens and a tile of 12: two grids, one token."""
    with pytest.raises(SettingsError, match="1 of 16 .* 2 grids.*merge_grid_size='off'") as raised:
        plan_grid(torch.arange(16) / 16, 1 / 16, 99.0, overview=2, exact_budget=True)
    assert "Raise merge_grid_size" not in str(raised.value)


def test_a_missed_budget_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Cells of one token keep everything; those of the toy example are on the budget."""
    plan_grid(TOY_MAP, 4 / 9, 2.0, exact_budget=True)
    plan_grid(TOY_MAP, 4 / 9, None)
    plan_grid(TOY_MAP, 1.0, 1.0)
    assert not caplog.records
    assert plan_grid(TOY_MAP, 4 / 9, 1.0).n_kept == 9
    assert len(caplog.records) == 1
    for part in ("keeps 9 of the 9 tokens", "asks for 4", "merge_grid_size=1", "exact_budget=True"):
        assert part in caplog.text


def test_ratio_one_passes_everything_bit_for_bit() -> None:
    features = torch.randn(9, 5).half()
    plans = (
        plan_grid(TOY_MAP, 1.0, 2.0),
        plan_grid(TOY_MAP, 1.0, 2.0, exact_budget=True),
        plan_grid(TOY_MAP, 0.5, 2.0, n_keep=12),
    )
    for plan in plans:
        assert plan.is_identity
        assert plan.kept.tolist() == list(range(9))
        assert (plan.n_drop, plan.n_rec, plan.n_cells) == (0, 0, 0)
        assert recycle(features, TOY_MAP, plan).equal(features)
        assert members_of(plan) == tuple((place,) for place in range(9))


def test_without_a_grid_the_top_tokens_stay() -> None:
    plan = plan_grid(TOY_MAP, 4 / 9, None)
    assert plan.kept.tolist() == [1, 4, 7, 8]
    assert (plan.n_drop, plan.n_rec, plan.n_low, plan.n_cells) == (5, 0, 5, 0)
    assert recycle(TOY_FEATURES, TOY_MAP, plan)[:, 0].tolist() == [2.0, 5.0, 8.0, 9.0]
    assert members_of(plan) == ((1,), (4,), (7,), (8,))
    assert plan_grid(TOY_MAP, 0.01, None).kept.tolist() == [7]
    # 9 * 0.5 = 4.5 is rounded to even either way: 9 - 4 tokens stay, or exactly 4.
    assert plan_grid(TOY_MAP, 0.5, None).n_kept == 5
    assert plan_grid(TOY_MAP, 0.5, None, exact_budget=True).n_kept == 4


def test_ties_keep_the_lower_position_and_merge_into_it() -> None:
    plan = plan_grid(torch.full((9,), 0.1), 4 / 9, 3.0)
    assert plan.kept.tolist() == [0, 1, 2, 3]
    assert plan.carriers.tolist() == [3]
    assert plan.members.tolist() == [3, 4, 5, 6, 7, 8]


def test_newlines_outrank_larger_scores_and_their_column_counts() -> None:
    """Overview 2x2, then two rows of two patches and a newline."""
    scores = torch.tensor([3.0, 4, 5, 6, 7, 8, 1, 9, 10, 1])
    plan = plan_grid(scores, 0.2, None, overview=2, width=3)
    assert plan.kept.tolist() == [6, 9]
    merged = plan_grid(scores, 0.2, 4.0, overview=2, width=3)
    assert groups(merged) == {(0, 1, 2, 3), (4, 5, 7, 8)}
    every = plan_grid(scores, 0.01, 1.5, overview=2, width=3)
    # All ten merged: rows 0 and 1 share a cell, as do columns 0 and 1, but not the newline's.
    assert groups(every) == {(0, 1, 2, 3), (4, 5, 7, 8), (6, 9)}


USABLE = [([0.1, 0.1, 0.1, 0.3], 8.0), ([0.0, 0.0, 0.0, 0.4], 9.0)]
UNUSABLE = [([0.0] * 4, 7.5), ([-0.5, 0.2, 0.6, 0.1], 7.5), ([-1.0, 0.2, 0.2, 0.6], 7.5)]


@pytest.mark.parametrize(("weights", "want"), USABLE + UNUSABLE)
def test_cells_without_usable_weights_are_averaged(weights: list[float], want: float) -> None:
    """The last four of nine tokens are one cell, with features 6 to 9."""
    scores = torch.tensor([5.0] * 5 + weights)
    plan = plan_grid(scores, 6 / 9, 3.0)
    assert groups(plan) == {(5, 6, 7, 8)}
    out = recycle(TOY_FEATURES, scores, plan)[:, 0].tolist()
    assert out == pytest.approx([1, 2, 3, 4, 5, want])


@pytest.mark.parametrize("budget", ["b0", "b1", "b2"])
def test_recorded_anyres_image(budget: str) -> None:
    arrays = load("recycle_anyres")
    scores, features = arrays["s0_packed_importance"], arrays["s0_packed_features"]
    want = {name: arrays[f"s0_{budget}_{name}"] for name in ("keep_mask", "group_id", "counts")}
    ratio, grid_size = arrays[f"s0_{budget}_ratio_a"].tolist()
    width = int(arrays["s0_packed_row_width"])
    plan = plan_grid(scores, ratio, grid_size, overview=27, width=width)
    counts = [plan.n_tokens, plan.n_drop, plan.n_rec, plan.n_low, plan.n_cells, plan.n_kept]
    assert counts == want["counts"].tolist()
    assert plan.kept.equal(want["keep_mask"].nonzero().flatten())
    group_id = want["group_id"]
    assert plan.members.equal((group_id >= 0).nonzero().flatten())
    theirs = [(group_id == g).nonzero().flatten() for g in range(plan.n_cells)]
    assert groups(plan) == {tuple(group.tolist()) for group in theirs}
    recycled = arrays[f"s0_{budget}_recycled_index"].tolist()
    merged = dict(zip(plan.kept.tolist(), members_of(plan), strict=True))
    assert [merged[place] for place in recycled] == [tuple(group.tolist()) for group in theirs]
    out = recycle(features, scores, plan)
    torch.testing.assert_close(out, arrays[f"s0_{budget}_out_tokens"], atol=1e-5, rtol=0)
    assert scores[plan.kept].equal(arrays[f"s0_{budget}_out_importance"])
    # The same image on an exact budget.
    exact = plan_grid(scores, ratio, grid_size, overview=27, width=width, exact_budget=True)
    assert exact.n_kept == round(ratio * plan.n_tokens)


@pytest.mark.parametrize(("budget", "ratio"), [("b0", 0.25), ("b1", 0.1)])
def test_recorded_video_and_images(budget: str, ratio: float) -> None:
    arrays = load("video_multi")
    features, scores = arrays["s0_features"], arrays["s0_importance"]

    def pooled(frames: Tensor) -> Tensor:
        square = frames.transpose(1, 2).reshape(3, -1, 27, 27)
        small = interpolate(square, (14, 14), mode="bilinear", align_corners=False)
        return small.flatten(2).transpose(1, 2).flatten(0, 1)

    packed = torch.cat([pooled(features), arrays["s0_newline"][None]])
    ranked = torch.cat([pooled(scores.unsqueeze(-1))[:, 0], torch.ones(1)])
    places = torch.zeros(len(ranked), dtype=torch.long)
    newline = torch.arange(len(ranked)) == len(ranked) - 1
    plan = stage_zero(ranked, ratio, None, places, places, places, newline)
    prefix = f"s0_video_{budget}"
    assert plan.kept.equal(arrays[f"{prefix}_keep_mask"].nonzero().flatten())
    out = recycle(packed, ranked, plan)
    torch.testing.assert_close(out, arrays[f"{prefix}_out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(ranked[plan.kept], arrays[f"{prefix}_out_importance"])

    prefix = f"s0_multi_{budget}"
    plans = [plan_grid(image, ratio, None, overview=27) for image in scores]
    for image, single in enumerate(plans):
        assert single.kept.equal(arrays[f"{prefix}_keep_mask"][image].nonzero().flatten())
        kept = recycle(features[image], scores[image], single)
        assert kept.equal(arrays[f"{prefix}_out_tokens"][image])
    left = [scores[image][single.kept] for image, single in enumerate(plans)]
    assert torch.cat(left).equal(arrays[f"{prefix}_out_importance"])


def test_recorded_budgets() -> None:
    arrays = load("budget")
    for budget, r0, r1, r2, achieved in arrays["table"].tolist():
        solved = solve_last_ratio(budget, r0, r1, PAPER)
        assert solved == pytest.approx(r2, abs=1e-12)
        assert achieved_ratio(r0, r1, solved, PAPER) == pytest.approx(achieved, abs=1e-12)
    for budget, r0, r1, r2 in arrays["published"].tolist():
        assert achieved_ratio(r0, r1, r2, PAPER) == pytest.approx(budget, abs=1e-3)


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores of a packed image with its overview side and tile row width."""
    overview, rows, width = (
        draw(st.integers(0, 5)),
        draw(st.integers(0, 5)),
        draw(st.integers(2, 6)),
    )
    n_tokens = overview**2 + rows * width
    assume(n_tokens > 0)
    values = draw(st.lists(st.integers(-2, 30), min_size=n_tokens, max_size=n_tokens))
    scores = torch.tensor(values, dtype=torch.float32) / 31
    return scores.masked_fill(layout(overview, rows * width, width)[3], 1.0), overview, width


def cells(n_tokens: int, overview: int, width: int, grid_size: float) -> list[tuple[int, int, int]]:
    """The cell of every packed token."""
    source, row, col, _ = layout(overview, n_tokens - overview**2, width)
    side = np.float32(grid_size)
    return [
        (s, int(np.float32(r) / side), int(np.float32(c) / side))
        for s, r, c in zip(source.tolist(), row.tolist(), col.tolist(), strict=True)
    ]


RATIOS = st.floats(0.01, 1)
GRIDS = st.one_of(st.none(), st.floats(1, 9))


@settings(max_examples=150, deadline=None)
@given(images(), RATIOS, GRIDS, st.booleans())
def test_counts_order_and_groups(
    image: tuple[Tensor, int, int], ratio: float, grid_size: float | None, exact: bool
) -> None:
    scores, overview, width = image
    n_tokens = len(scores)
    target = max(1, round(ratio * n_tokens))
    if exact and grid_size is not None and target < n_tokens:
        n_cells = len(set(cells(n_tokens, overview, width, grid_size)))
        if n_cells > target:
            with pytest.raises(SettingsError, match=f"leave at least {n_cells}"):
                plan_grid(scores, ratio, grid_size, overview, width, exact)
            return
    plan = plan_grid(scores, ratio, grid_size, overview, width, exact)
    kept = plan.kept.tolist()
    assert 1 <= plan.n_kept == n_tokens - plan.n_low + plan.n_cells
    assert kept == sorted(set(kept))
    assert plan.carriers.dtype == plan.kept.dtype == plan.members.dtype == torch.int64
    if exact:
        assert plan.n_kept == target
    else:
        assert n_tokens - plan.n_drop == stage_count(n_tokens, ratio)
    standing = members_of(plan)
    flat = sorted(place for members in standing for place in members)
    assert len(flat) == len(set(flat))
    if plan.is_identity or grid_size is not None:
        assert flat == list(range(n_tokens))
    for place, members in zip(kept, standing, strict=True):
        assert place in members
    # Every merged token ranks below every plain one; newlines go last.
    pinned = layout(overview, n_tokens - overview**2, width)[3]
    plain = sorted(set(kept) - set(plan.carriers.tolist()))
    low = sorted(set(range(n_tokens)) - set(plain)) if not plan.is_identity else []
    key = [(not pinned[place], -float(scores[place]), place) for place in range(n_tokens)]
    if plain and low:
        assert max(key[place] for place in plain) < min(key[place] for place in low)
    for place, members in zip(kept, standing, strict=True):
        assert key[place] == min(key[member] for member in members)


@settings(max_examples=100, deadline=None)
@given(images(), RATIOS, st.floats(1, 9))
def test_cells_are_the_spatial_neighbours(
    image: tuple[Tensor, int, int], ratio: float, grid_size: float
) -> None:
    scores, overview, width = image
    plan = plan_grid(scores, ratio, grid_size, overview, width)
    cell_of = cells(len(scores), overview, width, grid_size)
    want: dict[tuple[int, int, int], list[int]] = {}
    for place in plan.members.tolist():
        want.setdefault(cell_of[place], []).append(place)
    assert groups(plan) == {tuple(members) for members in want.values()}


@settings(max_examples=100, deadline=None)
@given(images(), RATIOS, st.floats(1, 9), st.integers(0, 99))
def test_recycling_conserves(
    image: tuple[Tensor, int, int], ratio: float, grid_size: float, seed: int
) -> None:
    scores, overview, width = image
    scores = scores.abs() + 0.01
    plan = plan_grid(scores, ratio, grid_size, overview, width)
    features = torch.randn(len(scores), 3, generator=torch.Generator().manual_seed(seed))
    out = recycle(features, scores, plan)
    mass = torch.stack([scores[list(members)].sum() for members in members_of(plan)])
    torch.testing.assert_close(
        (mass[:, None] * out).sum(0), (scores[:, None] * features).sum(0), atol=1e-4, rtol=1e-5
    )
    for spot, (place, members) in enumerate(zip(plan.kept.tolist(), members_of(plan), strict=True)):
        if len(members) == 1:
            assert out[spot].equal(features[place])
    # Equal features stay what they are.
    same = features[:1].expand(len(scores), 3)
    torch.testing.assert_close(
        recycle(same, scores, plan), same[: plan.n_kept], atol=1e-6, rtol=1e-5
    )


@settings(max_examples=100, deadline=None)
@given(images(), RATIOS, RATIOS, GRIDS)
def test_smaller_ratios_keep_subsets_of_the_plain_tokens(
    image: tuple[Tensor, int, int], one: float, other: float, grid_size: float | None
) -> None:
    scores, overview, width = image

    def plain(ratio: float, values: Tensor = scores) -> set[int]:
        plan = plan_grid(values, ratio, grid_size, overview, width)
        return set(plan.kept.tolist()) - set(plan.carriers.tolist())

    low, high = sorted((one, other))
    assert plain(low) <= plain(high)
    assert plain(low, scores * 0.3) == plain(low)
    assert plain(low, scores + 1.0) == plain(low)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10_000), RATIOS, RATIOS)
def test_stage_counts(n: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 1 <= stage_count(n, low) <= stage_count(n, high) <= n
    assert stage_count(n, 1.0) == n
    assert abs(stage_count(n, high) - n * high) <= max(0.5, 1 - n * high) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_keep_their_dtype_and_are_averaged_in_float32(dtype: torch.dtype) -> None:
    features = torch.full((9, 2), 40_000.0 if dtype == torch.float16 else 3.0, dtype=dtype)
    plan = plan_grid(TOY_MAP, 4 / 9, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recycle(features, TOY_MAP.to(dtype), plan)
    assert out.dtype == dtype
    assert out.equal(features[: plan.n_kept])


def test_gradients_flow_to_every_merged_token() -> None:
    features = TOY_FEATURES.clone().requires_grad_()
    out = recycle(features, TOY_MAP, plan_grid(TOY_MAP, 4 / 9, 2.0))
    (grad,) = torch.autograd.grad(out.sum(), features)
    want = torch.tensor([1 / 6, 1, 0.4, 1 / 3, 0.5, 0.6, 1, 1, 1])
    torch.testing.assert_close(grad[:, 0], want)


def test_toy_budget() -> None:
    r2 = solve_last_ratio(0.25, 0.3, 0.8, PAPER)
    assert r2 == pytest.approx(0.891667, abs=1e-6)
    assert achieved_ratio(0.3, 0.8, r2, PAPER) == pytest.approx(0.25, abs=1e-12)
    clipped = solve_last_ratio(0.25, 0.25, 0.5333, PAPER)
    assert clipped == 1.0
    assert achieved_ratio(0.25, 0.5333, clipped, PAPER) == pytest.approx(0.171, abs=5e-4)


def test_an_infeasible_first_ratio_names_its_limit() -> None:
    with pytest.raises(SettingsError, match="r0 must be below 0.388889"):
        solve_last_ratio(0.25, 0.5, 1.0, PAPER)
    assert 0 < solve_last_ratio(0.25, 0.38888, 1.0, PAPER) < 1e-3
    with pytest.raises(SettingsError, match="before stage 2"):
        solve_last_ratio(0.25, 0.38889, 1.0, PAPER)


@given(st.integers(3, 200))
def test_default_stage_layers_are_valid(depth: int) -> None:
    parts = segments(default_stage_layers(depth), depth)
    assert min(parts) >= 1
    assert sum(parts) == depth
    assert 0 < untuned(0.5, parts).stage_keep_ratios[2] <= 1


def test_stage_layers_out_of_range_are_refused() -> None:
    assert default_stage_layers(28) == (9, 18)
    assert segments((1, 2), 3) == (1, 1, 1)
    for layers in ((0, 2), (2, 2), (3, 2), (1, 4)):
        with pytest.raises(SettingsError, match=r"rising and in 1\.\.3"):
            segments(layers, 4)
    with pytest.raises(SettingsError, match="2 decoder layers"):
        default_stage_layers(2)


def test_untuned_schedule() -> None:
    schedule = untuned(0.25, PAPER)
    r0, r1, r2 = schedule.stage_keep_ratios
    assert [r0, r1] == pytest.approx([0.275, 1.0])
    assert r2 == pytest.approx((7 - 18 * 0.275) / 10 / 0.275)
    assert achieved_ratio(r0, r1, r2, PAPER) == pytest.approx(0.25)
    others = (schedule.anchor_threshold, schedule.entropy_weight, schedule.merge_grid_size)
    assert others == (2.0, 0.0, 16.0)
    assert untuned(0.95, PAPER).stage_keep_ratios[0] == 1.0
    with pytest.raises(SettingsError, match="before stage 2"):
        untuned(0.25, (14, 13, 1))


def test_toy_cumulative_ratios() -> None:
    """B = 0.25, c0 = 0.3: c1 lies between 4.3 / 19 and 0.3."""
    even = 4.3 / 19
    assert ratios_from_cumulative(0.25, 0.3, 0.0, PAPER) == pytest.approx((0.3, even / 0.3, 1.0))
    assert ratios_from_cumulative(0.25, 0.3, 1.0, PAPER) == pytest.approx((0.3, 1.0, 0.16 / 0.3))
    assert ratios_from_cumulative(0.25, 0.25, 0.7, PAPER) == pytest.approx((0.25, 1.0, 1.0))
    # Here the last segment alone limits c1: the spec's end of the interval leaves it nothing.
    r0, r1, r2 = ratios_from_cumulative(0.25, 0.45, 1.0, PAPER)
    assert r0 * r1 == pytest.approx((7 - 9 * 0.45) / 9, rel=1e-5)
    assert 0 < r2 < 1e-5


@settings(max_examples=300, deadline=None)
@given(st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1), st.integers(3, 80), st.data())
def test_cumulative_ratios_are_always_on_budget(
    budget: float, place: float, u: float, depth: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, depth - 2))
    parts = segments((first, data.draw(st.integers(first + 1, depth - 1))), depth)
    c0 = budget + place * (min(1.0, 1.5 * budget) - budget)
    if sum(parts) * budget <= parts[0] * c0:
        with pytest.raises(SettingsError, match="before stage 1"):
            ratios_from_cumulative(budget, c0, u, parts)
        return
    ratios = ratios_from_cumulative(budget, c0, u, parts)
    assert all(0 < ratio <= 1 for ratio in ratios)
    assert ratios[0] == pytest.approx(c0)
    assert achieved_ratio(*ratios, parts) == pytest.approx(budget, rel=1e-9)


def test_bad_input_is_refused() -> None:
    for ratio in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match="must be in \\(0, 1\\]"):
            stage_count(5, ratio)
        with pytest.raises(SettingsError, match="stage 0 is"):
            plan_grid(TOY_MAP, ratio, 2.0)
        with pytest.raises(SettingsError, match="keep_ratio is"):
            untuned(ratio, PAPER)
        with pytest.raises(SettingsError, match="r1 is"):
            solve_last_ratio(0.5, 0.5, ratio, PAPER)
    for grid_size in (0.9, math.nan, math.inf):
        with pytest.raises(SettingsError, match="merge_grid_size is"):
            plan_grid(TOY_MAP, 0.5, grid_size)
    with pytest.raises(SettingsError, match="at least 1 must stay"):
        plan_grid(TOY_MAP, 0.5, 2.0, n_keep=0)
    with pytest.raises(SettingsError, match="no visual token"):
        plan_grid(TOY_MAP[:0], 0.5, 2.0, overview=0)
    with pytest.raises(SettingsError, match="u is 1.5"):
        ratios_from_cumulative(0.25, 0.3, 1.5, PAPER)
    with pytest.raises(SettingsError, match="from keep_ratio to 1"):
        ratios_from_cumulative(0.25, 0.2, 0.5, PAPER)
    with pytest.raises(SettingsError, match="before stage 1"):
        ratios_from_cumulative(0.25, 0.9, 0.5, PAPER)
