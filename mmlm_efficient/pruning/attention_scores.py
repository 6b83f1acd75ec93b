"""Attention weights that pruning methods rank by, without storing a tower's or decoder's maps.

Sources: the rows that FastV (arXiv 2403.06764), SparseVLM (arXiv 2410.04417), VisionZip
(arXiv 2412.04467) and VisPruner (arXiv 2412.01818) read. Fused attention kernels return no weights;
these functions recompute just the rows or means that a method needs, from queries and keys. All of
them compute in float32 whatever the model's dtype, and under autocast.

Shapes: B images, L tokens (padding included), S keys, h heads, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError


def float_products(equation: str, left: Tensor, right: Tensor) -> Tensor:
    """``torch.einsum`` of two tensors in float32, also where autocast would make it half precision.

    Example:
        >>> ones = torch.ones(2, 3, dtype=torch.bfloat16)
        >>> float_products("ad,bd->ab", ones, ones).dtype
        torch.float32
    """
    with torch.autocast(left.device.type, enabled=False):
        return torch.einsum(equation, left.float(), right.float())


def _masked_softmax(logits: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the last dimension; what is not visible gets 0, also where nothing is."""
    if visible is None:
        return logits.softmax(dim=-1)
    weights = logits.masked_fill(~visible, -math.inf).softmax(dim=-1)
    # A row that sees nothing is NaN here.
    return weights.masked_fill(~visible, 0.0)


def query_attention(query: Tensor, keys: Tensor, scaling: float, visible: Tensor | None) -> Tensor:
    """Head-averaged attention of some queries over all keys that they may see.

    Args:
        query: [h, q, d] rotated queries.
        keys: [h, S, d] rotated keys, repeated to the number of query heads.
        scaling: factor on the dot products, such as d ** -0.5.
        visible: bool [q, S], True where a query may see a key (causal mask and padding); None when
            every query sees every key.

    Returns:
        float32 [q, S]; each row sums to 1, or is 0 for a query that sees no key.

    Example:
        >>> query, keys = torch.ones(1, 1, 2), torch.zeros(1, 4, 2)
        >>> query_attention(query, keys, 1.0, torch.tensor([[True, True, False, False]])).tolist()
        [[0.5, 0.5, 0.0, 0.0]]
    """
    logits = float_products("hqd,hsd->hqs", query, keys) * scaling
    return _masked_softmax(logits, visible).mean(dim=0)


def mean_received(
    query: Tensor, key: Tensor, scale: float, valid: Tensor | None, chunk: int = 128
) -> Tensor:
    """Attention that each token receives: the mean over queries and heads.

    The ranking of towers without CLS. Queries are taken in chunks, so that at most
    [B, h, chunk, L] weights are held.

    Args:
        query: [B, L, h, d]; key: [B, L, h, d].
        scale: factor on the dot products, such as d ** -0.5.
        valid: bool [B, L], False on padding, which neither asks nor receives; or None.
        chunk: queries at a time, at least 1; it does not change the result.

    Returns:
        float32 [B, L]; each row sums to 1, padding has 0.

    Raises:
        SettingsError: chunk is below 1.
    """
    if chunk < 1:
        raise SettingsError(f"chunk must be an integer >= 1 (queries at a time), got {chunk}")
    n_images, n_tokens = query.shape[:2]
    total = torch.zeros(n_images, n_tokens, dtype=torch.float32, device=query.device)
    visible = None if valid is None else valid[:, None, None, :]
    for part in (slice(start, start + chunk) for start in range(0, n_tokens, chunk)):
        logits = float_products("bqhd,blhd->bhql", query[:, part], key) * scale
        weights = _masked_softmax(logits, visible).mean(dim=1)
        if valid is not None:
            weights = weights * valid[:, part, None]
        total += weights.sum(dim=1)
    if valid is None:
        return total / n_tokens
    return total / valid.sum(dim=1, keepdim=True).clamp(min=1)


def head_mean_map(query: Tensor, key: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    """Head-averaged attention map, accumulated head by head.

    Args:
        query: [B, L, h, d]; key: [B, L, h, d].
        scale: factor on the dot products, such as d ** -0.5.
        valid: bool [B, L], False on padding, whose rows and columns are 0; or None.

    Returns:
        float32 [B, L, L], queries by keys; the rows of tokens sum to 1.

    Example:
        >>> head_mean_map(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0.5, None).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    n_images, n_tokens, heads = query.shape[:3]
    total = torch.zeros(n_images, n_tokens, n_tokens, dtype=torch.float32, device=query.device)
    visible = None if valid is None else valid[:, None, :]
    for head in range(heads):
        logits = float_products("bqd,bld->bql", query[:, :, head], key[:, :, head]) * scale
        total += _masked_softmax(logits, visible)
    total /= heads
    return total if valid is None else total.masked_fill(~valid.unsqueeze(-1), 0.0)
