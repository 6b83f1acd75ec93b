"""What the methods that cut inside the language model share: attention of the prompt to an image,
budgets that mean the same alone and behind another method, checks of layers.

Only the rows of the tokens that rank are computed, in float32, from a layer's queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.attention_scores import query_attention
from mmlm_efficient.pruning.base import PruningMethod
from mmlm_efficient.stations.layer_rows import SampleRows

_ROWS = 64
"""Queries at a time: at most so many rows of attention weights are held."""


def prompt_attention(
    rows: SampleRows, queries: Tensor, columns: Tensor, *, causal: bool = True
) -> Tensor:
    """Attention of some prompt tokens to some visual tokens, mean over heads and queries.

    Each query's softmax runs over all tokens of the prompt that it sees, so the result need not
    sum to 1. A sliding window is not looked at: tokens outside of it are rated too. Keys and the
    rows of queries are kept for the prompt's other images (`SampleRows.shared`).

    Args:
        rows: queries and keys of one prompt at one layer.
        queries: int64 [Q] columns of the tokens that ask, at least one; best on the CPU.
        columns: int64 [V] columns of visual tokens.
        causal: a query sees the tokens up to itself; otherwise all.

    Returns:
        float32 [V].
    """
    asking: list[int] = queries.tolist()
    known = rows.shared.attention
    missing = [column for column in asking if (column, causal) not in known]
    for start in range(0, len(missing), _ROWS):
        part = missing[start : start + _ROWS]
        own = torch.tensor(part)
        visible = rows.columns <= own.to(rows.columns.device).unsqueeze(1) if causal else None
        weights = query_attention(rows.query(own), rows.prompt_keys(), rows.scaling, visible)
        known.update(zip([(column, causal) for column in part], weights.unbind(0), strict=True))
    places = torch.searchsorted(rows.columns, columns)
    return torch.stack([known[column, causal][places] for column in asking]).mean(dim=0)


def last_token_attention(rows: SampleRows, columns: Tensor) -> Tensor:
    """Attention of the last prompt token to an image's tokens, float32 [V]: a `LayerScorer`."""
    return prompt_attention(rows, torch.tensor([rows.last]), columns)


def shares(
    method: PruningMethod, budgets: Sequence[int], stock: Sequence[int]
) -> tuple[float, ...]:
    """The share of its unpruned tokens that each image's budget is, in (0, 1].

    Args:
        method: the settings; a ratio is taken as it is.
        budgets: `method.budgets(stock)`, which tells of a budget that prunes nothing.
        stock: tokens of each image before anything was pruned.
    """
    ratio = method.keep_ratio
    if ratio is None:
        return tuple(budget / count for budget, count in zip(budgets, stock, strict=True))
    return ratio if isinstance(ratio, tuple) else (ratio,) * len(stock)


def check_ascending(field: str, layers: Sequence[int], lowest: int) -> None:
    """Refuse layers that do not ascend.

    Args:
        field: name of the setting.
        layers: its value.
        lowest: smallest layer allowed.

    Raises:
        SettingsError: the layers start below the lowest one or do not ascend strictly.
    """
    falling = any(later <= earlier for earlier, later in pairwise(layers))
    if not layers or layers[0] < lowest or falling:
        raise SettingsError(
            f"{field} must be decoder layers (0-based) in ascending order, each once and >= "
            f"{lowest}, got {list(layers)}"
        )


def check_depth(field: str, layers: Sequence[int], n_layers: int) -> None:
    """Refuse layers that the language model does not have.

    Raises:
        SettingsError: the last of the ascending layers is beyond the model's last.
    """
    if layers[-1] >= n_layers:
        raise SettingsError(
            f"{field}={layers[-1] if len(layers) == 1 else list(layers)}, but the language model "
            f"has {n_layers} layers: give at most {n_layers - 1}"
        )
