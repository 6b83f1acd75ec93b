"""Attention that also returns the log-sum-exp of its scores, which public SDPA keeps to itself.

On the CPU the kernel behind SDPA is called for it; it is private to torch, so this is the only
place that names it, and where it is missing or does not take the shapes an explicit softmax in
row chunks gives the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlm_efficient.sinks.call import Call, causal_mask, compute_dtype, scores, weighted

_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_MAP_BYTES = 32 * 2**20


def attention_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """Attention of a call, and the natural-log log-sum-exp of its scaled scores.

    Returns:
        Output [B, H, Q, d] in the query's dtype; log-sum-exp [B, H, Q] in float32 (float64 for
        float64). A row that sees no key: output 0, and some finite log-sum-exp.
    """
    square = call.mask is None and call.rows == call.keys
    mask = call.mask
    if mask is None and call.rows > 1 and not square:
        mask = causal_mask(call.rows, call.keys, call.key.device)[None, None]
    if _KERNEL is None or not _kernel_takes(call):
        return _explicit(call, mask)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=call.query.dtype, device=mask.device)
        bias.masked_fill_(~mask, -math.inf)
        bias = bias.expand(call.query.shape[0], 1, call.rows, call.keys)
    causal = square and call.rows > 1
    output, lse = _KERNEL(
        call.query, call.key, call.value, 0.0, causal, attn_mask=bias, scale=call.scaling
    )
    return output, lse


def _kernel_takes(call: Call) -> bool:
    """Whether the kernel, which checks little itself, can run these tensors."""
    tensors = (call.query, call.key, call.value)
    return (
        call.query.device.type == "cpu"
        and call.query.shape[-1] == call.value.shape[-1]
        and all(tensor.numel() > 0 for tensor in tensors)
        and all(tensor.stride(-1) == 1 for tensor in tensors)
    )


def _explicit(call: Call, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in plain tensor operations, a few rows at a time."""
    batch, heads, rows, _ = call.query.shape
    dtype = compute_dtype(call.query.dtype)
    if mask is None and rows > 1:
        mask = causal_mask(rows, call.keys, call.key.device)[None, None]
    if mask is not None:
        mask = mask.expand(-1, -1, rows, -1)
    output = call.empty_output()
    lse = call.query.new_empty(batch, heads, rows, dtype=dtype)
    step = max(1, _MAP_BYTES // max(1, batch * heads * call.keys * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        chunk = scores(call.query[:, :, part], call.key, call.scaling, dtype)
        if mask is not None:
            chunk.masked_fill_(~mask[:, :, part], -math.inf)
        total = chunk.logsumexp(dim=-1, keepdim=True)
        # A row without keys: exp(-inf - 0) = 0 everywhere.
        total = total.masked_fill(total == -math.inf, 0.0)
        output[:, :, part] = weighted(chunk.sub_(total).exp_(), call.value)
        lse[:, :, part] = total.squeeze(-1)
    return output, lse
