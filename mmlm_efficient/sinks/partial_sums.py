"""VAR without any map: ordinary attention, and what a redistribution adds to it.

With u the output of the attention within the receivers (visual keys that are no sinks) alone,

    o' = o - p sum over payers of a v + p (sum over payers of a) u,

so a changed row needs its ordinary output o and log-sum-exp, the receivers' output and
log-sum-exp, and the few columns of the sinks. Index lists: for the CPU. In half precision the
parts are rounded before they are joined, which is less exact than a map.
Shapes as in :mod:`mmlm_efficient.sinks.call`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmlm_efficient.sinks.call import Call, causal_mask, scores, weighted
from mmlm_efficient.sinks.lse import attention_with_lse
from mmlm_efficient.sinks.redistribution import Decision, Groups, Rule, decide


def change_rows(
    call: Call, groups: Groups, eligible: Tensor, rule: Rule, output: Tensor, lse: Tensor
) -> Decision:
    """Applies VAR to the ordinary attention of a call, in place.

    Args:
        call: the rows that may change.
        groups: the first N <= K keys.
        eligible: bool [B, Q].
        rule: the thresholds.
        output, lse: ordinary attention [B, H, Q, d] and log-sum-exp [B, H, Q] of the rows.
    """
    own, own_lse = _receivers(call, groups)
    paid, visual_mass, text_mass = _payers(call, groups, lse)
    masses = torch.stack((visual_mass, (own_lse - lse).exp(), text_mass), dim=1)
    decision = decide(masses, groups.counts(call.rows, call.keys, call.mask), eligible, rule)
    change = decision.moved.unsqueeze(-1) * own - paid * rule.redistribute_fraction
    # In unselected rows the change may be inf or nan.
    output.copy_(torch.where(decision.selected.unsqueeze(-1), output + change, output))
    return decision


def _receivers(call: Call, groups: Groups) -> tuple[Tensor, Tensor]:
    """Attention within the receivers: output [B, H, Q, d], log-sum-exp [B, H, Q]."""
    low, high = groups.receiver_span
    mask = groups.receivers[:, None, None, low:high]
    if call.mask is not None:
        mask = mask & call.mask[..., low:high]
    elif high > call.keys - call.rows + 1:
        mask = mask & causal_mask(call.rows, call.keys, mask.device)[:, low:high]
    key, value = call.key[:, :, low:high], call.value[:, :, low:high]
    return attention_with_lse(Call(call.query, key, value, mask, call.scaling))


def _payers(call: Call, groups: Groups, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What sinks contribute: output [B, H, Q, d], visual and text mass [B, H, Q]."""
    index, real = groups.payer_index
    picked = index[:, None, :, None]
    key, value = (
        tensor.gather(2, picked.expand(-1, tensor.shape[1], -1, tensor.shape[3])).to(lse.dtype)
        for tensor in (call.key, call.value)
    )
    hidden = ~real[:, None, None]
    if call.mask is not None:
        mask = call.mask.expand(index.shape[0], -1, -1, -1)
        hidden = hidden | ~mask.gather(3, index[:, None, None].expand(-1, 1, call.rows, -1))
    else:
        last_seen = torch.arange(call.keys - call.rows, call.keys, device=index.device)
        hidden = hidden | (index[:, None, None] > last_seen[:, None])
    columns = scores(call.query, key, call.scaling, lse.dtype).masked_fill_(hidden, -math.inf)
    weights = columns.sub_(lse.unsqueeze(-1)).exp_()
    visual = groups.visual_sinks.gather(1, index)[:, None, None]
    return (
        weighted(weights, value),
        torch.where(visual, weights, 0.0).sum(dim=-1),
        torch.where(visual, 0.0, weights).sum(dim=-1),
    )
