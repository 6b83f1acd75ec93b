"""Baseline: keep an even grid of tokens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.tokens import VisualTokens


class UniformPruning(PruningMethod):
    """Keep tokens spread evenly over the rows and columns of the image.

    Overview and tiles, or the frames of a video, get shares of the budget by their sizes.
    """

    name: ClassVar[str] = "uniform"
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)
    looks_at: ClassVar[str] = "places only"

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """An even grid; every n-th token when an earlier station broke the grid, or when so many
        are kept that newlines are among them."""
        places = tokens.places
        shown = int((~places.newline).sum())
        if len(tokens) < tokens.n_in or not 0 < budget <= shown:
            return torch.tensor(_spread(len(tokens), budget), dtype=torch.long)
        parts, done = [], 0
        for source, (rows, cols) in enumerate(places.shapes):
            own = (done + rows * cols) * budget // shown - done * budget // shown
            done += rows * cols
            if own > 0:
                cells = (~places.newline & (places.source == source)).nonzero().squeeze(1)
                parts.append(cells[even_grid(rows, cols, own)])
        return torch.cat(parts)


def even_grid(rows: int, cols: int, count: int) -> Tensor:
    """Raster indices of exactly `count` cells spread evenly over a rows x cols grid.

    Args:
        rows, cols: size of the grid.
        count: cells to take, at most rows * cols.

    Returns:
        int64 [count], ascending.

    Example:
        >>> even_grid(4, 4, 4).tolist()
        [5, 7, 13, 15]
    """
    fewest = math.ceil(count / cols)
    used_rows = min(max(round(math.sqrt(count * rows / cols)), fewest), rows, count)
    indices: list[int] = []
    for line, row in enumerate(_spread(rows, used_rows)):
        in_row = (line + 1) * count // used_rows - line * count // used_rows
        indices.extend(row * cols + col for col in _spread(cols, in_row))
    return torch.tensor(indices, dtype=torch.long)


def _spread(length: int, count: int) -> list[int]:
    """`count` distinct places spread evenly over range(length), each in the middle of its share."""
    return [(2 * place + 1) * length // (2 * count) for place in range(count)]
