"""The maths of FlowCut, without any model: pure functions on small tensors.

Source: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
arXiv 2505.19536, and its reference code (TungChintao/FlowCut, Apache-2.0), whose numbers these
functions reproduce. All of them compute in float32 whatever the model's dtype, and under autocast.

Shapes: B images, L tokens (padding included), h heads, d head width, N patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _products(equation: str, relay: Tensor, tokens: Tensor) -> Tensor:
    """``torch.einsum`` in float32, also where autocast would make it half precision."""
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum(equation, relay.float(), tokens.float())


def relay_weights(relay: Tensor, tokens: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    """Head-averaged softmax of a relay token's dot products with all tokens.

    Args:
        relay: [B, h, d] query (or value) of the relay token.
        tokens: [B, L, h, d] keys (or values).
        scale: factor on the dot products, such as d ** -0.5.
        valid: bool [B, L], False on padding; or None.

    Returns:
        float32 [B, L]; each row sums to 1, padding has weight 0.
    """
    logits = _products("bhd,blhd->bhl", relay, tokens) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(1), -math.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def normalised(weights: Tensor) -> Tensor:
    """Weights [B, N] divided by their row sums; rows that sum to zero stay zero.

    Example:
        >>> normalised(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total, torch.zeros_like(weights))


def value_norm(values: Tensor) -> Tensor:
    """Information density: L1 norm of the head-averaged value vector.

    Args:
        values: [B, L, h, d].

    Returns:
        float32 [B, L].
    """
    return values.float().mean(dim=2).abs().sum(dim=-1)


def fused_score(attention: Tensor | None, semantic: Tensor | None, norm: Tensor | None) -> Tensor:
    """(attention + semantic) * norm, leaving out the terms that are None.

    Args:
        attention: normalised attention strength [B, N].
        semantic: normalised semantic similarity [B, N].
        norm: information density [B, N].
    """
    terms = [term for term in (attention, semantic) if term is not None]
    if not terms and norm is None:
        raise ValueError("at least one term is needed")
    if not terms:
        return norm if norm is not None else torch.empty(0)
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    return total if norm is None else total * norm


def accumulated(history: Tensor | None, score: Tensor, momentum: float) -> Tensor:
    """Running score: momentum * history + (1 - momentum) * score; the first score as it is."""
    return score if history is None else momentum * history + (1.0 - momentum) * score


def entropy_ratio(attention: Tensor, counts: Tensor) -> Tensor:
    """Entropy of normalised attention strengths relative to the uniform one's.

    Args:
        attention: [B, N], rows sum to 1; padding is 0 (0 ln 0 = 0).
        counts: [B] patches of each image.

    Returns:
        float32 [B] in [0, 1]: 1 for uniform attention, 0 for all attention on one patch.
    """
    entropy = -torch.xlogy(attention, attention).sum(dim=-1)
    return entropy / counts.clamp(min=2).float().log()


def prune_amount(n_patches: int, target: int, remaining: int, ratio: float) -> float:
    """How many patches an adaptive cut should remove, before rounding.

    Args:
        n_patches: patches now.
        target: patches to keep in the end.
        remaining: layers up to the forced last cut, at least 1.
        ratio: entropy ratio of this layer.
    """
    return (n_patches - target) / math.sqrt(remaining) * (1.0 - ratio * ratio)


@dataclass(frozen=True)
class QueryScores:
    """Stage B, inside the language model: scores [V] of the visual tokens of one image.

    Attributes:
        relation: softmax over the image's tokens of the last prompt token's attention logits.
        semantic: the same with value vectors.
        norm: L1 norm of the head-averaged value vector.
        score: (relation + semantic) * norm.
    """

    relation: Tensor
    semantic: Tensor
    norm: Tensor
    score: Tensor


def query_scores(
    query: Tensor, value: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> QueryScores:
    """Scores of visual tokens for the last prompt token.

    Args:
        query: [h, d] rotated query of the last prompt token; value: [h, d] its value.
        keys: [h, V, d] rotated keys of the visual tokens; values: [h, V, d].
        scaling: d ** -0.5; unlike in the tower, the value products are scaled too.
    """

    def softmax(relay: Tensor, tokens: Tensor) -> Tensor:
        logits = _products("hd,hvd->hv", relay, tokens) * scaling
        return logits.softmax(dim=-1).mean(dim=0)

    relation, semantic = softmax(query, keys), softmax(value, values)
    norm = values.float().mean(dim=0).abs().sum(dim=-1)
    return QueryScores(relation, semantic, norm, (relation + semantic) * norm)
