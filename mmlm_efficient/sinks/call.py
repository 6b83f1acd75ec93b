"""One attention call of a layer: its tensors, plain SDPA on it, and products of any dtype.

Shapes: B samples, H query heads, Hkv key heads, Q query rows, K keys, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Half-precision keys are widened piece by piece; on a CPU a piece stays in the cache.
_WIDENED_BYTES = {"cpu": 4 * 2**20}
_WIDENED_BYTES_ELSEWHERE = 64 * 2**20


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of attention maps, masses, tests and factors.

    Example:
        >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def causal_mask(rows: int, keys: int, device: torch.device) -> Tensor:
    """Bool [rows, keys]: the rows are the last of the keys' positions.

    Example:
        >>> causal_mask(2, 3, torch.device("cpu")).tolist()
        [[True, True, False], [True, True, True]]
    """
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)


@dataclass(frozen=True)
class Call:
    """The tensors of an attention call.

    Attributes:
        query: [B, H, Q, d].
        key: [B, Hkv, K, d]; query heads are grouped by key head.
        value: [B, Hkv, K, d].
        mask: bool [B or 1, 1, Q, K], True = attend; None: the rows are the last Q of K causal
            positions.
        scaling: factor of the scores, such as d ** -0.5.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float

    @property
    def rows(self) -> int:
        """Q."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """K."""
        return self.key.shape[2]

    @property
    def grouping(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def before(self, row: int) -> Call:
        """The rows before ``row``, without the keys that causal rows do not see."""
        if self.mask is not None:
            mask = self.mask[:, :, :row]
            return Call(self.query[:, :, :row], self.key, self.value, mask, self.scaling)
        seen = self.keys - self.rows + row
        key, value = self.key[:, :, :seen], self.value[:, :, :seen]
        return Call(self.query[:, :, :row], key, value, None, self.scaling)

    def after(self, row: int) -> Call:
        """The rows from ``row`` on."""
        mask = None if self.mask is None else self.mask[:, :, row:]
        return Call(self.query[:, :, row:], self.key, self.value, mask, self.scaling)

    def pick(self, rows: Tensor) -> Call:
        """Single rows, int64 [R], with a mask of their own."""
        if self.mask is None:
            last_seen = rows + (self.keys - self.rows)
            mask = (torch.arange(self.keys, device=rows.device) <= last_seen[:, None])[None, None]
        else:
            mask = self.mask.index_select(2, rows)
        query = self.query.index_select(2, rows)
        return Call(query, self.key, self.value, mask, self.scaling)

    def part(self, sample: slice, key_heads: slice) -> Call:
        """Some samples and key heads, with the query heads that belong to them."""
        heads = slice(key_heads.start * self.grouping, key_heads.stop * self.grouping)
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[sample]
        return Call(
            self.query[sample, heads],
            self.key[sample, key_heads],
            self.value[sample, key_heads],
            mask,
            self.scaling,
        )

    def empty_output(self) -> Tensor:
        """Room [B, H, Q, d] for the output; [B, Q, H, d] is contiguous, as after SDPA."""
        batch, heads, rows, _ = self.query.shape
        return self.query.new_empty(batch, rows, heads, self.value.shape[-1]).transpose(1, 2)


def plain_attention(call: Call) -> Tensor:
    """SDPA of a call: [B, H, Q, d]."""
    key, value, mask = call.key, call.value, call.mask
    grouped = call.grouping > 1
    if mask is None and 1 < call.rows < call.keys:
        mask = causal_mask(call.rows, call.keys, key.device)[None, None]
    if grouped and mask is not None and key.device.type != "cpu":
        # The masked kernels of other devices do not group heads.
        key, value = (t.repeat_interleave(call.grouping, dim=1) for t in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        call.query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and call.rows > 1,
        scale=call.scaling,
        enable_gqa=grouped,
    )


def scores(query: Tensor, key: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Scaled scores [B, H, Q, K] in ``dtype``; keys are not repeated.

    Args:
        query: [B, H, Q, d]; key: [B, Hkv, K, d].
        scaling: factor.
        dtype: float32 or float64.
    """
    batch, heads, rows, width = query.shape
    together = heads // key.shape[1] * rows
    queries = query.to(dtype).mul(scaling).reshape(batch * key.shape[1], together, width)
    flat = key.reshape(batch * key.shape[1], key.shape[2], width)
    if flat.dtype != dtype:
        result = queries.new_empty(flat.shape[0], together, flat.shape[1])
        for piece in _pieces(flat, dtype):
            result[..., piece] = torch.bmm(queries, flat[:, piece].to(dtype).transpose(1, 2))
    elif together == 1:
        # One row: a product with a column is several times as fast as one with a row.
        result = torch.bmm(flat, queries.transpose(1, 2))
    else:
        result = torch.bmm(queries, flat.transpose(1, 2))
    return result.view(batch, heads, rows, key.shape[2])


def weighted(probabilities: Tensor, value: Tensor) -> Tensor:
    """Sums [B, H, Q, d] of values [B, Hkv, K, d] under weights [B, H, Q, K], in their dtype."""
    batch, heads, rows, keys = probabilities.shape
    together = heads // value.shape[1] * rows
    maps = probabilities.view(batch * value.shape[1], together, keys)
    flat = value.reshape(batch * value.shape[1], keys, value.shape[-1])
    if flat.dtype == maps.dtype:
        result = torch.bmm(maps, flat)
    else:
        result = maps.new_zeros(flat.shape[0], together, flat.shape[2])
        for piece in _pieces(flat, maps.dtype):
            result.baddbmm_(maps[..., piece], flat[:, piece].to(maps.dtype))
    return result.view(batch, heads, rows, value.shape[-1])


def _pieces(flat: Tensor, dtype: torch.dtype) -> list[slice]:
    """Runs of keys of a [heads, K, d] tensor to widen at a time."""
    size = _WIDENED_BYTES.get(flat.device.type, _WIDENED_BYTES_ELSEWHERE)
    step = max(1, size // max(1, flat.shape[0] * flat.shape[2] * dtype.itemsize))
    return [slice(start, start + step) for start in range(0, flat.shape[1], step)]
