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

# Attention weights held at a time where several images could share a step: 64 MiB, and of
# single rows 16 MiB.
_MOST_WEIGHTS = 2**24
_MOST_ROW_WEIGHTS = 2**22


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

    The ranking of towers without CLS. Queries are taken in chunks, and images in groups, so that
    at most [h, chunk, L] weights are held, or 64 MiB where those of several images are less.

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
    n_tokens, heads = query.shape[1:3]
    together = max(1, _MOST_WEIGHTS // (heads * min(chunk, n_tokens) * n_tokens))
    groups = [
        _received(
            query[first : first + together],
            key[first : first + together],
            scale,
            None if valid is None else valid[first : first + together],
            chunk,
        )
        for first in range(0, len(query), together)
    ]
    return groups[0] if len(groups) == 1 else torch.cat(groups)


def _received(query: Tensor, key: Tensor, scale: float, valid: Tensor | None, chunk: int) -> Tensor:
    """`mean_received` of images whose weights fit together."""
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


def token_map(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    lead: int = 0,
    unit: int = 1,
    chunk: int | None = None,
) -> Tensor:
    """Head-averaged attention among the tokens that a tower makes of its patches.

    Rows are taken in chunks and head by head; what several patches become one token is averaged
    chunk by chunk, so that beside the result only [B, chunk, L] weights are held, never a map of
    patches.

    Args:
        query: [B, L, h, d]; key: [B, L, h, d]; no padding.
        scale: factor on the dot products, such as d ** -0.5.
        lead: leading tokens (CLS) that take part in the softmax and are then left out.
        unit: consecutive patches that become one token; L - lead is a multiple of it.
        chunk: rows at a time, at least 1, rounded up to whole tokens; None bounds the weights
            held to 16 MiB. It does not change the result.

    Returns:
        float32 [B, N, N] of N = (L - lead) / unit tokens, queries by keys; rows sum to 1 (again).

    Raises:
        SettingsError: chunk is below 1.

    Example:
        >>> token_map(torch.ones(1, 4, 3, 4), torch.ones(1, 4, 3, 4), 0.5, unit=2).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    if chunk is not None and chunk < 1:
        raise SettingsError(f"chunk must be an integer >= 1 (rows at a time), got {chunk}")
    n_images, length, heads = query.shape[:3]
    n_tokens = (length - lead) // unit
    if chunk is None:
        chunk = max(1, _MOST_ROW_WEIGHTS // (n_images * length))
    step = -(-chunk // unit)  # tokens at a time
    result = torch.empty(n_images, n_tokens, n_tokens, dtype=torch.float32, device=query.device)
    for first in range(0, n_tokens, step):
        rows = slice(lead + first * unit, lead + min(first + step, n_tokens) * unit)
        total: Tensor | None = None
        for head in range(heads):
            logits = float_products("bqd,bld->bql", query[:, rows, head], key[:, :, head])
            weights = logits.mul_(scale).softmax(dim=-1)
            total = weights if total is None else total.add_(weights)
        if total is None:
            raise ValueError("a tower has at least one attention head")
        part = total[..., lead:]
        if unit > 1:
            part = part.reshape(n_images, -1, n_tokens, unit).mean(dim=3)
            part = part.view(n_images, -1, unit, n_tokens).mean(dim=2)
        share = part.sum(dim=-1, keepdim=True)
        even = 1.0 / n_tokens  # where all attention went to what was left out
        result[:, first : first + step] = part.div_(share).masked_fill_(~(share > 0), even)
    return result
