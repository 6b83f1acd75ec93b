"""VFlowOpt's importance map, without any model: pure functions on small tensors.

Source: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", ICCV 2025, arXiv 2508.05211: attention relevance calibrated by anchor tokens, plus
the entropy of each patch's grey levels. Everything is computed in float32 whatever the model's
dtype.

Shapes: C crops, N tokens of one crop, H x W pixels of the tower's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError

GREY_LEVELS = 256
# Pixels per histogram step: bounds the int64 indices to 8 MiB whatever the number of crops.
_CHUNK_PIXELS = 2**20
_RELEASED_EPSILON = 1e-10


@dataclass(frozen=True)
class Anchors:
    """The tokens whose attention rows say what matters.

    Attributes:
        mask: bool [.., N], at least one True per crop.
        fallback: bool [..], True where no token passed the threshold and the one that receives
            the most attention stands in.
    """

    mask: Tensor
    fallback: Tensor


def received_attention(attention: Tensor) -> Tensor:
    """How much attention each token gets, averaged over the queries.

    Args:
        attention: [.., N, N] head-mean softmax attention (query, key); rows sum to 1.

    Returns:
        float32 [.., N]; its mean over the tokens is 1 / N.
    """
    return attention.float().mean(dim=-2)


def anchors(received: Tensor, threshold: float) -> Anchors:
    """Tokens that receive more than ``threshold`` times the mean attention of their crop.

    Args:
        received: [.., N] received attention.
        threshold: at least 0; 0 selects every token.

    Raises:
        SettingsError: the threshold is negative or not finite.

    Example:
        >>> found = anchors(torch.tensor([0.4, 0.15, 0.225, 0.225]), 2.0)
        >>> found.mask.tolist(), found.fallback.tolist()
        ([True, False, False, False], True)
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise SettingsError(
            f"anchor_threshold is {threshold}; it must be a finite number of at least 0"
        )
    received = received.float()
    if threshold == 0:
        # Also the tokens that receive nothing at all, which "more than 0" would leave out.
        mask = torch.ones_like(received, dtype=torch.bool)
    else:
        mask = received > threshold * received.mean(dim=-1, keepdim=True)
    fallback = ~mask.any(dim=-1)
    # argmax returns the first of equal maxima.
    strongest = torch.zeros_like(mask).scatter(-1, received.argmax(dim=-1, keepdim=True), True)
    return Anchors(mask | (fallback.unsqueeze(-1) & strongest), fallback)


def relevance(attention: Tensor, threshold: float, found: Anchors | None = None) -> Tensor:
    """Attention that each token gets from its crop's anchors, averaged over them.

    Args:
        attention: [.., N, N] head-mean softmax attention (query, key); rows sum to 1.
        threshold: see :func:`anchors`; with 0 the result is the received attention.
        found: the anchors at this threshold, where they are known already.

    Returns:
        float32 [.., N], at least 0; sums to 1 per crop.

    Raises:
        SettingsError: the threshold is negative or not finite.
    """
    attention = attention.float()
    if found is None:
        found = anchors(received_attention(attention), threshold)
    mask = found.mask
    # Not a matrix product: that would become half precision under autocast.
    total = (attention * mask.unsqueeze(-1)).sum(dim=-2)
    return total / mask.sum(dim=-1, keepdim=True)


def patch_entropy(pixels: Tensor, patch_px: int) -> Tensor:
    """Entropy of each patch's 8-bit grey levels (mode ``grayscale``).

    Args:
        pixels: uint8 [C, 3, H, W] RGB.
        patch_px: side of a square patch; rows and columns beyond the last full patch are unused.

    Returns:
        float32 [C, N] bits in [0, log2(min(256, patch_px ** 2))], patches in raster order.

    Raises:
        SettingsError: the pixels are not uint8 RGB, or smaller than one patch.

    Example:
        >>> half = torch.zeros(1, 3, 14, 14, dtype=torch.uint8)
        >>> half[..., 7:] = 128
        >>> patch_entropy(half, 14).tolist()
        [[1.0]]
    """
    if pixels.dtype != torch.uint8:
        raise SettingsError(
            f"patch entropy needs uint8 pixels, got {pixels.dtype}; recover them from the tower's "
            "input with recovered_pixels()"
        )
    _check_pixels(pixels, patch_px)
    total = pixels.sum(dim=1, dtype=torch.int32)
    # A third of an integer is never halfway: adding 1 before the floor rounds to nearest.
    return _histogram_entropy((total + 1) // 3, patch_px, epsilon=0.0)


def released_entropy(pixel_values: Tensor, patch_px: int) -> Tensor:
    """Entropy of each patch as the reference code computes it (mode ``released``).

    That code turns the normalised input (-1..1) itself into 8-bit levels, where negative values
    wrap around: intensities v and v + 128 fall together. For comparisons with it only.

    Args:
        pixel_values: float [C, 3, H, W], the tower's input in the dtype the tower gets.
        patch_px: side of a square patch; rows and columns beyond the last full patch are unused.

    Returns:
        float32 [C, N] bits, patches in raster order.

    Raises:
        SettingsError: the input is not floating point RGB, or smaller than one patch.
    """
    if not pixel_values.is_floating_point():
        raise SettingsError(
            f"released entropy needs the tower's floating point input, got {pixel_values.dtype}"
        )
    _check_pixels(pixel_values, patch_px)
    # In the input's own dtype: which values truncation pulls down depends on it.
    levels = (pixel_values * 255).trunc().to(torch.int32).remainder(GREY_LEVELS)
    total = levels.sum(dim=1, dtype=torch.int32)
    # round(0.3333 * total) in integers; no total up to 765 is halfway.
    return _histogram_entropy((3333 * total + 5000) // 10000, patch_px, _RELEASED_EPSILON)


def importance(
    attention: Tensor, threshold: float, entropy_weight: float, entropy: Tensor | None = None
) -> Tensor:
    """The importance map: relevance + entropy_weight * softmax of the entropies of a crop.

    Args:
        attention: [C, N, N] head-mean softmax attention (query, key); rows sum to 1.
        threshold: see :func:`anchors`.
        entropy_weight: in [-1, 1]; 0 leaves the entropy out.
        entropy: [C, N] bits; may be None when the weight is 0.

    Returns:
        float32 [C, N], finite; sums to 1 + entropy_weight per crop.

    Raises:
        SettingsError: a setting is out of range, or the entropies are missing or do not fit.
    """
    return with_entropy(relevance(attention, threshold), entropy_weight, entropy)


def with_entropy(score: Tensor, entropy_weight: float, entropy: Tensor | None = None) -> Tensor:
    """The importance of tokens whose relevance is known.

    Args:
        score: float32 [C, N], see :func:`relevance`.
        entropy_weight, entropy: as in :func:`importance`.

    Raises:
        SettingsError: the weight is out of range, or the entropies are missing or do not fit.
    """
    if not -1 <= entropy_weight <= 1:
        raise SettingsError(f"entropy_weight is {entropy_weight}; it must be in [-1, 1]")
    if entropy_weight == 0:
        return score
    if entropy is None or entropy.shape != score.shape:
        got = "none" if entropy is None else f"shape {tuple(entropy.shape)}"
        raise SettingsError(
            f"entropy_weight {entropy_weight} needs one entropy per token, shape "
            f"{tuple(score.shape)}; got {got}. With entropy_weight 0 none is needed"
        )
    return score + entropy_weight * entropy.float().softmax(dim=-1)


def recovered_pixels(
    pixel_values: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float = 1 / 255,
) -> Tensor:
    """The 8-bit pixels behind an image processor's output.

    Args:
        pixel_values: float [C, 3, H, W], (pixel * rescale_factor - mean) / std.
        mean, std: per channel, as in the image processor's settings.
        rescale_factor: the image processor's.

    Returns:
        uint8 [C, 3, H, W], the nearest level to each value. Exact for float32 and float16 inputs
        with the usual settings; for bfloat16 ones as long as its steps are finer than those of
        the levels, 1 / (255 * std): with a mean and deviation of 0.5 and with those of ImageNet
        everywhere, with CLIP's up to values of 2, which leaves one level of blue off by one
        (above 2, bfloat16 stores two neighbouring levels alike).

    Raises:
        SettingsError: mean or std does not have one value per channel.

    Example:
        >>> black = torch.full((1, 3, 1, 1), -1.0)
        >>> recovered_pixels(black, [0.5] * 3, [0.5] * 3).flatten().tolist()
        [0, 0, 0]
    """
    channels = pixel_values.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise SettingsError(
            f"image_mean has {len(mean)} and image_std {len(std)} values; the pixels have "
            f"{channels} channels and need one each"
        )
    values = pixel_values.float()
    scale = values.new_tensor(list(std)).view(-1, 1, 1)
    offset = values.new_tensor(list(mean)).view(-1, 1, 1)
    levels = ((values * scale + offset) / rescale_factor).round()
    return levels.clamp(0, GREY_LEVELS - 1).to(torch.uint8)


def _check_pixels(pixels: Tensor, patch_px: int) -> None:
    """Refuse anything but [C, 3, H, W] that holds a full patch."""
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise SettingsError(
            f"patch entropy needs RGB pixels [crops, 3, height, width], got {tuple(pixels.shape)}"
        )
    if not 1 <= patch_px <= min(pixels.shape[-2:]):
        raise SettingsError(
            f"patch_px is {patch_px}; it must be in 1..{min(pixels.shape[-2:])}, the smaller side "
            "of the image"
        )


def _histogram_entropy(levels: Tensor, patch_px: int, epsilon: float) -> Tensor:
    """Entropy in bits, -sum p log2(p + epsilon), of each patch of integer levels [C, H, W]."""
    crops, height, width = levels.shape
    rows, cols = height // patch_px, width // patch_px
    levels = levels[:, : rows * patch_px, : cols * patch_px].to(torch.uint8)
    patches = levels.reshape(crops, rows, patch_px, cols, patch_px).transpose(2, 3)
    patches = patches.reshape(crops * rows * cols, patch_px**2)
    parts: list[Tensor] = []
    # Over blocks of patches, to bound the memory; a block of a usual image holds thousands.
    for block in torch.split(patches, max(1, _CHUNK_PIXELS // patch_px**2)):
        counts = torch.zeros(len(block), GREY_LEVELS, dtype=torch.float32, device=block.device)
        share = counts.scatter_add_(
            1, block.long(), torch.ones_like(block, dtype=torch.float32)
        ) / float(patch_px**2)
        parts.append(-torch.xlogy(share, share + epsilon).sum(dim=-1) / math.log(2))
    # Adding 0 turns the -0.0 of flat patches into 0.0.
    return torch.cat(parts).reshape(crops, rows * cols) + 0.0
