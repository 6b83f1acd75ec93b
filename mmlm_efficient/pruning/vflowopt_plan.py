"""VFlowOpt's counts and its first stage, without any model: which tokens stay, which are merged.

Source: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", ICCV 2025, arXiv 2508.05211. Stage 0 acts before the language model: the least
important tokens are merged ("recycled") within spatial cells. Stages 1 and 2 cut inside it.

Shapes: L packed tokens of one image (newlines included), D feature width, M merged tokens,
G cells, K0 tokens after stage 0. Ratios are kept fractions in (0, 1]. Segments are the numbers of
decoder layers before stage 1, between the stages and after stage 2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.groups import group_members, group_sums, on_cpu

logger = logging.getLogger("mmlm_efficient.pruning")

Segments = tuple[int, int, int]

# Smallest cumulative ratio after stage 2, relative to an even spread: keeps r2 above zero.
_LEAST_LAST = 1e-6
# Room for rounding when a ratio is compared with a bound.
_SLACK = 1e-9
# How far cells may move stage 0 off its budget without a word: a share of it, and tokens.
_MISS, _MISS_TOKENS = 0.1, 1


@dataclass(frozen=True)
class StageZero:
    """What stage 0 does to the packed tokens of one image; positions are among those L tokens.

    Always ``n_kept == n_tokens - n_low + n_cells``.

    Attributes:
        kept: int64 [K0], plain tokens and carriers, ascending.
        carriers: int64 [G], by cell number: the position where a cell's merged feature goes.
        members: int64 [M], all merged tokens (carriers included), ascending.
        cell: int64 [M], cell number of each of them, 0..G-1 by source, row and column.
        n_tokens: L.
        n_drop: tokens that the keep ratio takes away.
        n_rec: extra tokens merged, the nominal number of cells.
        n_low: tokens that are not plain: merged, or dropped when nothing is recycled.
    """

    kept: Tensor
    carriers: Tensor
    members: Tensor
    cell: Tensor
    n_tokens: int
    n_drop: int
    n_rec: int
    n_low: int

    @property
    def n_cells(self) -> int:
        """G, the number of merged features."""
        return len(self.carriers)

    @property
    def n_kept(self) -> int:
        """K0, the number of tokens that go on."""
        return len(self.kept)

    @property
    def is_identity(self) -> bool:
        """Whether every token passes untouched."""
        return self.n_low == 0


def stage_count(n: int, ratio: float) -> int:
    """Tokens that stay: n - round(n * (1 - ratio)), half to even, at least 1 (of n > 0).

    Raises:
        SettingsError: the ratio is outside (0, 1].

    Example:
        >>> stage_count(6, 0.5), stage_count(3, 0.7), stage_count(3, 0.01)
        (3, 2, 1)
    """
    _check_ratio("the keep ratio of a stage", ratio)
    return min(n, max(1, n - round(n * (1 - ratio))))


def stage_zero(
    importance: Tensor,
    keep_ratio: float,
    grid_size: float | None,
    source: Tensor,
    row: Tensor,
    col: Tensor,
    pinned: Tensor,
    exact_budget: bool = False,
    n_keep: int | None = None,
) -> StageZero:
    """Plan stage 0 of one image. Waits for the device to count the cells.

    Where cells move the number of tokens by more than a tenth of the budget, it says so in the log.

    Args:
        importance: [L], finite.
        keep_ratio: nominal kept fraction. Where it drops no token, as 1 does, none is merged
            either.
        grid_size: side of a merging cell in tokens, at least 1, may be fractional; None merges
            nothing: the least important tokens are dropped.
        source: int64 [L], which grid a token lies on: 0 overview, 1 stitched tiles.
        row, col: int64 [L], place on that grid; newlines count as a column.
        pinned: bool [L], tokens that rank above all others (newlines).
        exact_budget: keep exactly the nominal number of tokens, carriers counted; otherwise
            ragged cells make it a little more.
        n_keep: nominal number of tokens to keep, in place of ``keep_ratio``.

    Raises:
        SettingsError: a setting is out of range, there is no token, or the exact budget has
            fewer tokens than the image has cells.
    """
    n_tokens = len(importance)
    _check_stage_zero(n_tokens, keep_ratio, grid_size, n_keep)
    target = _target(n_tokens, keep_ratio, n_keep, exact_budget)
    n_drop = n_tokens - target
    places = torch.arange(n_tokens, device=importance.device)
    none = places[:0]
    if n_drop == 0:
        return StageZero(places, none, none, none, n_tokens, 0, 0, 0)
    order = _ranking(importance, pinned)
    if grid_size is None:
        kept = order[:target].sort().values
        return StageZero(kept, none, none, none, n_tokens, n_drop, 0, n_drop)
    n_rec = int(n_tokens / (grid_size * grid_size))
    n_low = min(n_tokens, n_drop + n_rec)
    key = _cell_keys(source, row, col, grid_size)
    if exact_budget:
        n_low = _exact_low(key[order], n_low, target, grid_size, source)
    plain, members = order[: n_tokens - n_low], order[n_tokens - n_low :].sort().values
    numbers, cell = torch.unique(key[members], return_inverse=True)
    rank = torch.empty_like(places).index_copy_(0, order, places)
    best = rank.new_full((len(numbers),), n_tokens)
    carriers = order[best.scatter_reduce_(0, cell, rank[members], "amin")]
    kept = torch.cat([plain, carriers]).sort().values
    _warn_missed(len(kept), target, n_tokens, grid_size)
    return StageZero(kept, carriers, members, cell, n_tokens, n_drop, n_rec, n_low)


def recycle(features: Tensor, importance: Tensor, plan: StageZero) -> Tensor:
    """Features after stage 0: plain ones as they are, carriers with their cell's weighted mean.

    A cell's weights are the importances of its members; equal weights where one of them is
    negative or their sum is not positive.

    Args:
        features: [L, D].
        importance: [L], the map that the plan was made from.
        plan: of the same L tokens.

    Returns:
        [K0, D] in the dtype of the features; the features themselves when nothing is cut.
    """
    if plan.is_identity:
        return features
    kept = features.index_select(0, plan.kept)
    if plan.n_cells == 0:
        return kept
    weight = importance[plan.members].float()
    weight = torch.where(_unusable(weight, plan)[plan.cell], torch.ones_like(weight), weight)
    # Normalised first: a cell of one token keeps its feature bit for bit.
    weight = weight / _cell_sums(weight, plan)[plan.cell]
    merged = _cell_sums(features[plan.members].float() * weight.unsqueeze(-1), plan)
    spots = torch.searchsorted(plan.kept, plan.carriers)
    # In place: autocast would handle the other form, and refuses float16 there on the CPU.
    return kept.index_copy_(0, spots, merged.to(features.dtype))


def members_of(plan: StageZero) -> tuple[tuple[int, ...], ...]:
    """Original positions merged into each kept token; a plain token stands for itself alone."""
    kept, carriers, members, cell = on_cpu(plan.kept, plan.carriers, plan.members, plan.cell)
    groups = group_members(members, cell, plan.n_cells)
    merged = dict(zip(carriers.tolist(), groups, strict=True))
    return tuple(merged.get(position, (position,)) for position in kept.tolist())


def _check_ratio(name: str, ratio: float) -> None:
    """Refuse a ratio outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise SettingsError(f"{name} is {ratio}; it must be in (0, 1]")


def _check_stage_zero(
    n_tokens: int, keep_ratio: float, grid_size: float | None, n_keep: int | None
) -> None:
    """Refuse settings that no plan can follow."""
    if n_tokens == 0:
        raise SettingsError("there is no visual token to plan for; VFlowOpt needs an image")
    _check_ratio("the keep ratio of stage 0", keep_ratio)
    if grid_size is not None and not (math.isfinite(grid_size) and grid_size >= 1):
        raise SettingsError(
            f"merge_grid_size is {grid_size}; it must be at least 1 (tokens), or null for no "
            "recycling"
        )
    if n_keep is not None and n_keep < 1:
        raise SettingsError(f"{n_keep} tokens to keep; at least 1 must stay")


def _target(n_tokens: int, keep_ratio: float, n_keep: int | None, exact_budget: bool) -> int:
    """Nominal number of kept tokens, in 1..L."""
    if n_keep is not None:
        return min(n_tokens, n_keep)
    if exact_budget:
        return max(1, round(n_tokens * keep_ratio))
    return stage_count(n_tokens, keep_ratio)


def _ranking(importance: Tensor, pinned: Tensor) -> Tensor:
    """Positions by falling importance, pinned ones first; the lower position wins a tie."""
    score = importance.float().masked_fill(pinned, math.inf)
    return torch.sort(score, descending=True, stable=True).indices


def _cell_keys(source: Tensor, row: Tensor, col: Tensor, grid_size: float) -> Tensor:
    """One integer per spatial cell, int64 [L], rising with source, row and column."""
    # float32 like the reference; a tensor, as devices divide by a plain number differently.
    side = torch.full((1,), grid_size, dtype=torch.float32, device=row.device)
    rows, cols = (torch.floor(place.float() / side).long() for place in (row, col))
    return (source * (rows.max() + 1) + rows) * (cols.max() + 1) + cols


def _warn_missed(n_kept: int, target: int, n_tokens: int, grid_size: float) -> None:
    """Say that cells moved stage 0 far off its budget."""
    if abs(n_kept - target) > max(_MISS_TOKENS, _MISS * target):
        logger.warning(
            "vflowopt: stage 0 keeps %d of the %d tokens of an image where its ratio asks for %d: "
            "merging cells of side merge_grid_size=%g do not fit. Set exact_budget=True to keep "
            "exactly its share, or another merge_grid_size",
            n_kept,
            n_tokens,
            target,
            grid_size,
        )


def _exact_low(
    ranked_key: Tensor, n_low: int, target: int, grid_size: float, source: Tensor
) -> int:
    """How many tokens are merged so that plain tokens and cells are ``target`` together.

    Args:
        ranked_key: int64 [L], cell keys, most important token first.
        n_low: the nominal number; the answer is the nearest one in the needed direction.
        target: tokens after stage 0.
        grid_size, source: for the message.
    """
    n_tokens = len(ranked_key)
    numbers, cell = torch.unique(ranked_key.flip(0), return_inverse=True)
    # A cell opens with its least important token: count the cells of the n lowest, for every n.
    places = torch.arange(n_tokens, device=cell.device)
    opens = places.new_full((len(numbers),), n_tokens)
    opens.scatter_reduce_(0, cell, places, "amin")
    opened = torch.zeros_like(places).index_fill_(0, opens, 1).cumsum(0)
    # What stays falls by 0 or 1 with every token more; the first place is for none merged.
    stays = torch.cat([places[:1] + n_tokens, n_tokens - 1 - places + opened])
    if (least := int(stays[-1])) > target:
        wanted = (
            f"exact_budget: {target} of {n_tokens} tokens are to stay, but merging cells of side "
            f"{grid_size} leave at least {least}."
        )
        grids = len(torch.unique(source))
        if grids > target:
            raise SettingsError(
                f"{wanted} The image has {grids} grids (overview, tiles, newline columns), and "
                "each leaves at least one token however large its cells are: raise the keep "
                "ratio, set merge_grid_size='off' to drop tokens instead of merging them, or "
                "turn exact_budget off"
            )
        raise SettingsError(
            f"{wanted} Raise merge_grid_size or the keep ratio, or turn exact_budget off"
        )
    first, last = int((stays > target).sum()), int((stays >= target).sum()) - 1
    return min(max(n_low, first), last)


def _cell_sums(values: Tensor, plan: StageZero) -> Tensor:
    """Sums [G, ..] over the members [M, ..] of each cell."""
    return group_sums(values, plan.cell, plan.n_cells)[0]


def _unusable(weight: Tensor, plan: StageZero) -> Tensor:
    """bool [G]: the cell has a negative weight or no positive sum."""
    negatives = _cell_sums((weight < 0).float(), plan)
    return (negatives > 0) | (_cell_sums(weight, plan) <= 0)


@dataclass(frozen=True)
class Schedule:
    """The hyperparameters of one model and budget.

    Attributes:
        stage_keep_ratios: kept fractions of stages 0, 1 and 2, each in (0, 1].
        anchor_threshold: at least 0.
        entropy_weight: in [-1, 1].
        merge_grid_size: at least 1 (tokens); None merges nothing.
        exact_budget: stage 0 keeps exactly its share, whatever the cells.
    """

    stage_keep_ratios: tuple[float, float, float]
    anchor_threshold: float
    entropy_weight: float
    merge_grid_size: float | None
    exact_budget: bool = False


def fitting_grid(grid_size: float, shapes: Sequence[tuple[int, int]], n_keep: int) -> float:
    """A cell size at which an image has no more cells than it may keep tokens.

    Args:
        grid_size: wanted side of a cell; larger ones are tried until the cells fit.
        shapes: (rows, cols) of the image's grids, newline columns counted.
        n_keep: tokens that may be left.

    Example:
        >>> fitting_grid(2.0, [(12, 12)], 40), fitting_grid(2.0, [(12, 12)], 9)
        (2.0, 4.8828125)
    """

    def cells(side: float) -> int:
        return sum(math.ceil(rows / side) * math.ceil(cols / side) for rows, cols in shapes)

    while cells(grid_size) > max(n_keep, len(shapes)):
        grid_size *= 1.25
    return grid_size


def default_stage_layers(depth: int) -> tuple[int, int]:
    """Layers whose input stages 1 and 2 cut: 9 and 18 of 28, scaled to another depth.

    Raises:
        SettingsError: fewer than 3 layers.

    Example:
        >>> default_stage_layers(28), default_stage_layers(32), default_stage_layers(3)
        ((9, 18), (10, 21), (1, 2))
    """
    if depth < 3:
        raise SettingsError(
            f"the language model has {depth} decoder layers; two stages inside it need at least 3"
        )
    first = min(max(1, round(depth * 9 / 28)), depth - 2)
    return first, min(max(first + 1, round(depth * 18 / 28)), depth - 1)


def segments(stage_layers: tuple[int, int], n_layers: int) -> Segments:
    """Numbers of decoder layers before stage 1, between the stages, and after stage 2.

    Args:
        stage_layers: 0-based layers whose input is cut, 1 <= k1 < k2 < n_layers.
        n_layers: depth of the language model.

    Raises:
        SettingsError: the layers are out of range or out of order.

    Example:
        >>> segments((9, 18), 28)
        (9, 9, 10)
    """
    first, second = stage_layers
    if not 1 <= first < second < n_layers:
        raise SettingsError(
            f"stage_layers are [{first}, {second}]; they must be rising and in 1..{n_layers - 1}, "
            f"as the language model has {n_layers} decoder layers and layer 0 is never cut"
        )
    return first, second - first, n_layers - second


def achieved_ratio(r0: float, r1: float, r2: float, segments: Segments) -> float:
    """Kept fraction of the image tokens, averaged over the decoder layers.

    Example:
        >>> round(achieved_ratio(0.3, 0.8, 0.891667, (9, 9, 10)), 6)
        0.25
    """
    l0, l1, l2 = segments
    return (r0 * l0 + r0 * r1 * l1 + r0 * r1 * r2 * l2) / (l0 + l1 + l2)


def solve_last_ratio(budget: float, r0: float, r1: float, segments: Segments) -> float:
    """The ratio of stage 2 that spends the budget, at most 1 (the rest then stays unspent).

    Args:
        budget: kept fraction averaged over the decoder layers, (0, 1].
        r0, r1: ratios of stages 0 and 1.
        segments: see :func:`segments`.

    Raises:
        SettingsError: a ratio is outside (0, 1], or the first two spend the whole budget.

    Example:
        >>> round(solve_last_ratio(0.25, 0.3, 0.8, (9, 9, 10)), 6)
        0.891667
    """
    for name, ratio in (("keep_ratio", budget), ("r0", r0), ("r1", r1)):
        _check_ratio(name, ratio)
    l0, l1, l2 = segments
    rest = sum(segments) * budget - r0 * l0 - r0 * r1 * l1
    if rest <= 0:
        limit = sum(segments) * budget / (l0 + r1 * l1)
        raise SettingsError(
            f"r0 {r0:.6g} and r1 {r1:.6g} spend the whole keep_ratio {budget:.6g} before stage 2; "
            f"with this r1, r0 must be below {limit:.6g}"
        )
    return min(1.0, rest / l2 / (r0 * r1))


def ratios_from_cumulative(
    budget: float, c0: float, u: float, segments: Segments
) -> tuple[float, float, float]:
    """Stage ratios that spend the budget exactly, from two free numbers.

    Args:
        budget: kept fraction averaged over the decoder layers, (0, 1].
        c0: kept fraction after stage 0, in [budget, 1]; the search takes at most 1.5 * budget.
        u: in [0, 1], place of the fraction kept after stage 1 in its feasible interval: 0 makes
            it the same in the last two segments, 1 as large as possible.
        segments: see :func:`segments`.

    Returns:
        (r0, r1, r2), each in (0, 1].

    Raises:
        SettingsError: an argument is out of range, or c0 alone spends the budget.
    """
    _check_ratio("keep_ratio", budget)
    if not 0 <= u <= 1:
        raise SettingsError(f"u is {u}; it must be in [0, 1]")
    if not budget - _SLACK <= c0 <= 1 + _SLACK:
        raise SettingsError(f"c0 is {c0}; it must be in [{budget}, 1], from keep_ratio to 1")
    c0 = min(max(c0, budget), 1.0)
    l0, l1, l2 = segments
    rest = sum(segments) * budget - l0 * c0
    if rest <= 0:
        raise SettingsError(
            f"c0 {c0:.6g} spends the whole keep_ratio {budget:.6g} before stage 1; it must be "
            f"below {sum(segments) * budget / l0:.6g}"
        )
    even = min(c0, rest / (l1 + l2))
    # Something must be left for the last segment.
    c1 = even + u * (max(even, min(c0, (rest - l2 * _LEAST_LAST * even) / l1)) - even)
    c2 = (rest - l1 * c1) / l2
    return c0, min(1.0, c1 / c0), min(1.0, c2 / c1)


def together(
    images: Sequence[tuple[int, tuple[float, float, float]]],
) -> tuple[float, float, float]:
    """Stage ratios at which a prompt keeps what its images' own ratios keep of them together.

    Stages 1 and 2 rank the images of a prompt together, so they need one ratio; the mean over
    the decoder layers is then the images' budgets together.

    Args:
        images: tokens before pruning and the stage ratios of each image.

    Example:
        >>> together([(100, (0.5, 1.0, 0.5)), (300, (0.5, 0.5, 1.0))])
        (0.5, 0.625, 0.8)
    """
    first = images[0][1]
    if all(ratios == first for _, ratios in images):
        return first
    left = [[n * math.prod(ratios[:stages]) for stages in range(4)] for n, ratios in images]
    total, *kept = (sum(stage) for stage in zip(*left, strict=True))
    return kept[0] / total, kept[1] / kept[0], kept[2] / kept[1]


def untuned(budget: float, segments: Segments) -> Schedule:
    """The schedule of a model for which none was tuned.

    Raises:
        SettingsError: the budget is outside (0, 1], or the stages lie so late that the first
            spends it.

    Example:
        >>> untuned(1.0, (9, 9, 10)).stage_keep_ratios
        (1.0, 1.0, 1.0)
    """
    _check_ratio("keep_ratio", budget)
    r0 = min(1.0, 1.1 * budget)
    r2 = solve_last_ratio(budget, r0, 1.0, segments)
    return Schedule((r0, 1.0, r2), anchor_threshold=2.0, entropy_weight=0.0, merge_grid_size=16.0)
