"""Images cut into tiles (anyres): where every token stands once a model has packed them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError
from mmlm_efficient.families.base import whole_numbers
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
    # Counted in float32 whatever torch's default is: others do not hold all of the numbers.
    values = torch.empty(n_crops, n_patches, 2, dtype=torch.float32)
    values[..., 0] = torch.arange(n_crops).unsqueeze(1)
    values[..., 1] = torch.arange(n_patches)
    packed = pack(values, values.new_full((2,), _NEWLINE))
    newline = packed[:, 1] == _NEWLINE
    n_tokens = len(packed)
    index = torch.arange(n_tokens)
    source, row, col = (torch.zeros(n_tokens, dtype=torch.long) for _ in range(3))
    shapes = [grid]
    row[:n_patches], col[:n_patches] = index[:n_patches] // cols, index[:n_patches] % cols
    if n_crops > 1:
        # A picture that is nothing but padding beside its tiles leaves no row of them.
        ends = newline[n_patches:].nonzero()
        width = int(ends[0]) + 1 if len(ends) else 1
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


def sizes_of(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of every picture, from image_sizes beside pixel_values.

    Args:
        inputs: model inputs with pixel_values [n, crops, 3, H, W] or [crops of all, 3, H, W].

    Raises:
        PromptError: inputs of another shape than the processor gives, or sizes below 1.
    """
    pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
    sizes = None if given is None else whole_numbers("image_sizes", given)
    if pixels.ndim not in (4, 5) or sizes is None or sizes.ndim != 2 or sizes.shape[1] != 2:
        shape = None if sizes is None else list(sizes.shape)
        raise PromptError(
            "pixel_values must have shape [n_images, crops, 3, height, width] and image_sizes "
            f"[n_images, 2], got {list(pixels.shape)} and {shape}. Give what the processor "
            "returns."
        )
    rows = sizes.tolist()
    if any(side < 1 for row in rows for side in row):
        raise PromptError(
            f"image_sizes {rows}: heights and widths are pixels, at least 1. Give what the "
            "processor returns."
        )
    return [(int(height), int(width)) for height, width in rows]


def check_crops(pixels: Tensor, counts: Sequence[int]) -> None:
    """Refuse pixels of another number of crops than the images have.

    Args:
        pixels: [n, crops, 3, H, W], or [crops of all, 3, H, W].
        counts: crops of every image.

    Raises:
        PromptError: the numbers differ.
    """
    if pixels.ndim == 5:
        fits = len(pixels) == len(counts) and pixels.shape[1] >= max(counts, default=0)
    else:
        fits = len(pixels) == sum(counts)
    if not fits:
        raise PromptError(
            f"pixel_values {list(pixels.shape)} do not match the {len(counts)} image(s) of "
            f"image_sizes, which have {list(counts)} crops. Give what the processor returns."
        )


def crops_of(pixels: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The crops [n, 3, H, W] of every image, without the padding behind images of fewer."""
    if pixels.ndim == 4:
        return list(torch.split(pixels, list(counts)))
    return [own[:count] for own, count in zip(pixels, counts, strict=True)]
