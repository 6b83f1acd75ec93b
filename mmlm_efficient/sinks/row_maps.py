"""VAR by the attention map of the changed rows only, a block of heads or rows at a time.

Masks instead of index lists, so nothing waits for the device. Any dtype: the map is float32 in
half precision. Shapes as in :mod:`mmlm_efficient.sinks.call`; all rows of the call may change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmlm_efficient.sinks.call import Call, compute_dtype, scores, weighted
from mmlm_efficient.sinks.redistribution import (
    Decision,
    Groups,
    Rule,
    decide,
    group_masses,
    scale_,
)

# Map and factors of a block together.
_BLOCK_BYTES = 64 * 2**20
# On a CPU: a map of about this size stays in the cache from its scores to its output.
_CACHED_BYTES = 3 * 2**20


def write_rows(
    call: Call, groups: Groups, eligible: Tensor, rule: Rule, row_chunk: int | None, output: Tensor
) -> Decision:
    """Writes the rows of a call under VAR into ``output``.

    Args:
        call: the rows.
        groups: the first N <= K keys.
        eligible: bool [B, Q].
        rule: the thresholds.
        row_chunk: rows of a map at a time; None: as many as fit into 64 MiB.
        output: [B, H, Q, d] of the query's dtype.
    """
    counts = groups.counts(call.rows, call.keys, call.mask)
    counts = counts.expand(-1, -1, call.rows)
    blocks = _blocks(call)
    if len(blocks) == 1:
        return _write(call, groups, counts, eligible, rule, row_chunk, output)
    samples = [groups.of(slice(number, number + 1)) for number in range(counts.shape[0])]
    done: list[list[Decision]] = [[] for _ in samples]
    for number, key_heads in blocks:
        sample = slice(number, number + 1)
        part = call.part(sample, key_heads)
        heads = slice(key_heads.start * call.grouping, key_heads.stop * call.grouping)
        room = output[sample, heads]
        arguments = (counts[sample], eligible[sample], rule, row_chunk, room)
        done[number].append(_write(part, samples[number], *arguments))
    return Decision.joined([Decision.joined(parts, dim=1) for parts in done], dim=0)


def _blocks(call: Call) -> list[tuple[int, slice]]:
    """Samples and runs of key heads to do at a time; on a CPU, as much as its cache holds."""
    batch, key_heads = call.key.shape[:2]
    size = call.grouping * call.rows * call.keys * compute_dtype(call.query.dtype).itemsize
    if call.query.device.type != "cpu" or batch * key_heads * size <= _CACHED_BYTES:
        return [(0, slice(0, key_heads))]
    step = max(1, _CACHED_BYTES // size)
    starts = range(0, key_heads, step)
    runs = [slice(start, min(start + step, key_heads)) for start in starts]
    return [(sample, run) for sample in range(batch) for run in runs]


def _write(
    call: Call,
    groups: Groups,
    counts: Tensor,
    eligible: Tensor,
    rule: Rule,
    row_chunk: int | None,
    output: Tensor,
) -> Decision:
    batch, heads = call.query.shape[:2]
    dtype = compute_dtype(call.query.dtype)
    step = row_chunk or max(1, _BLOCK_BYTES // (2 * batch * heads * call.keys * dtype.itemsize))
    decisions = []
    for start in range(0, call.rows, step):
        part = slice(start, start + step)
        hidden = None if call.mask is None else ~call.mask[:, :, part]
        probabilities = _softmax(
            scores(call.query[:, :, part], call.key, call.scaling, dtype),
            hidden,
            call.keys - call.rows + start,
        )
        masses = group_masses(probabilities, groups)
        decision = decide(masses, counts[:, :, part], eligible[:, part], rule)
        scale_(probabilities, decision, groups)
        piece = weighted(probabilities, call.value)
        if hidden is not None:
            piece.masked_fill_(hidden.all(dim=-1, keepdim=True), 0.0)
        output[:, :, part] = piece
        decisions.append(decision)
    return Decision.joined(decisions, dim=2)


def _softmax(logits: Tensor, hidden: Tensor | None, first: int) -> Tensor:
    """Softmax of scores [B, H, Q, K], which are overwritten.

    Args:
        logits: the rows.
        hidden: bool [B or 1, 1, Q, K]; None: causal, the first row at position ``first``.

    A row that sees nothing becomes uniform rather than nan.
    """
    lowest = torch.finfo(logits.dtype).min
    if hidden is not None:
        logits.masked_fill_(hidden, lowest)
    elif first + 1 < logits.shape[-1]:
        ahead = logits[..., first:]
        seen = torch.ones(ahead.shape[-2:], dtype=torch.bool, device=logits.device).tril_()
        ahead.masked_fill_(~seen, lowest)
    return logits.softmax(dim=-1)
