"""Images cut into tiles (anyres): where every token stands once a model has packed them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmlm_efficient.tokens import TokenPlaces

# Nothing that is packed for its place is negative, so newlines can be told by it.
_NEWLINE = -1.0


def anyres_places(
    pack: Callable[[Tensor, Tensor], Tensor], n_crops: int, grid: tuple[int, int], *, exact: bool
) -> TokenPlaces:
    """The places of an image with an overview and tiles, read off the model's own packing.

    The numbers of crops and patches go through the packing in place of features, so that the
    result cannot disagree with what the model does.

    Args:
        pack: packs values [n_crops, patches, 2] with a newline [2] to [N, 2].
        n_crops: the overview, then the tiles; 1 for an image without tiles.
        grid: (rows, cols) of patches of a crop.
        exact: whether packed tokens are single patches; False where they may be resized.
    """
    rows, cols = grid
    n_patches = rows * cols
    values = torch.empty(n_crops, n_patches, 2)
    values[..., 0] = torch.arange(n_crops).unsqueeze(1)
    values[..., 1] = torch.arange(n_patches)
    packed = pack(values, torch.full((2,), _NEWLINE))
    newline = packed[:, 1] == _NEWLINE
    n_tokens = len(packed)
    index = torch.arange(n_tokens)
    source, row, col = (torch.zeros(n_tokens, dtype=torch.long) for _ in range(3))
    shapes = [grid]
    row[:n_patches], col[:n_patches] = index[:n_patches] // cols, index[:n_patches] % cols
    if n_crops > 1:
        width = int(newline[n_patches:].nonzero()[0]) + 1
        behind = index[n_patches:] - n_patches
        source[n_patches:] = 1
        row[n_patches:], col[n_patches:] = behind // width, behind % width
        shapes.append((len(behind) // width, width - 1))
    else:
        # One newline ends an image without tiles.
        row[n_patches:], col[n_patches:] = rows - 1, cols
    crop, patch = packed[:, 0].long(), packed[:, 1].long()
    return TokenPlaces(
        source, row, col, newline, tuple(shapes), crop if exact else None, patch if exact else None
    )
