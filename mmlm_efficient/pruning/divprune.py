"""DivPrune: keep the tokens that are farthest from each other.

Source: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
arXiv 2503.02175, the rule of its section on max-min diversity. Implemented from that rule alone
(the authors' code has a non-commercial licence). The prompt plays no part.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.attention_scores import float_products
from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.tokens import VisualTokens

WHOLE_MATRIX_TOKENS = 2048
"""Up to so many tokens the whole V x V matrix is held (16 MiB); beyond, blocks of its rows."""

_SAME = 1e-6
"""Cosine distances below float32's rounding error are 0, so that duplicates tie exactly."""


class DivPrune(PruningMethod):
    """Keep the tokens of each image that are farthest from each other.

    All tokens count and may leave, the newlines of a tiled image among them. The paper rounds a
    ratio's count, here it is rounded down as everywhere.

    Example:
        >>> DivPrune(keep_ratio=0.098).budget(0, 576)
        56
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models "
        "(arXiv 2503.02175)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)
    looks_at: ClassVar[str] = "cosines between the projected tokens"
    budget_counts: ClassVar[str] = "tokens of each image, newlines among them"

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """The tokens of `farthest_order`, in the order of the image."""
        if budget == 0:  # a CLS token that the model keeps has taken it all
            return torch.empty(0, dtype=torch.long)
        return torch.sort(farthest_order(tokens.features, budget)).values


def _distances(rows: Tensor, units: Tensor) -> Tensor:
    """1 - cosine of unit rows [R, D] to all unit tokens [V, D], float32 [R, V]."""
    distance = 1.0 - float_products("rd,vd->rv", rows, units)
    return distance.masked_fill(distance < _SAME, 0.0)


def _nearest_other(units: Tensor, matrix: Tensor | None) -> Tensor:
    """Distance [V] of each token to its nearest other token, infinite for a single token."""
    if matrix is not None:
        own = torch.eye(len(units), dtype=torch.bool, device=units.device)
        return matrix.masked_fill(own, math.inf).amin(dim=1)
    nearest = []
    block = max(1, WHOLE_MATRIX_TOKENS**2 // len(units))
    for start in range(0, len(units), block):
        rows = _distances(units[start : start + block], units)
        # The diagonal of the matrix, seen from this block.
        rows.diagonal(offset=start).fill_(math.inf)
        nearest.append(rows.amin(dim=1))
    return torch.cat(nearest)


def farthest_order(features: Tensor, n: int) -> Tensor:
    """The n tokens that DivPrune keeps, in the order in which it picks them.

    First the token whose nearest other token is farthest, then again and again the token that is
    farthest from all picked ones, by cosine distance. Fewer picks are a prefix of more picks. Among
    equal distances the lowest index wins, so all-equal tokens give 0..n-1. A zero vector has
    distance 1 to every token.

    Args:
        features: [V, D] projected visual tokens.
        n: how many to pick, 1..V.

    Returns:
        int64 [n] positions in the order of selection, all different.

    Raises:
        SettingsError: n is out of range.

    Example:
        >>> farthest_order(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 2).tolist()
        [2, 0]
    """
    n_tokens = len(features)
    if not 1 <= n <= n_tokens:
        raise SettingsError(
            f"DivPrune cannot pick {n} of {n_tokens} visual tokens: give a number in 1..{n_tokens}"
        )
    units = functional.normalize(features.detach().float(), dim=1)
    matrix = _distances(units, units) if n_tokens <= WHOLE_MATRIX_TOKENS else None
    picked = torch.zeros(n_tokens, dtype=torch.bool, device=features.device)
    pick = _nearest_other(units, matrix).argmax(dim=0, keepdim=True)
    order = [pick]
    nearest = torch.full((n_tokens,), math.inf, device=features.device)
    # Picks stay tensors: nothing waits for the device inside the loop.
    for _ in range(n - 1):
        picked.index_fill_(0, pick, True)
        if matrix is not None:
            row = matrix.index_select(0, pick)
        else:
            row = _distances(units.index_select(0, pick), units)
        nearest = torch.minimum(nearest, row[0])
        pick = nearest.masked_fill(picked, -math.inf).argmax(dim=0, keepdim=True)
        order.append(pick)
    return torch.cat(order)
