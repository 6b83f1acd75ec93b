"""Tiny random vision towers of Qwen2-VL and Qwen2.5-VL, and a slow reference of what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

TOWERS = ("qwen2_vl", "qwen2_5_vl")
DEPTH = 6
HEADS = 2
PATCH = 4
# A window of Qwen2.5-VL: 4 x 4 patches, 2 x 2 visual tokens.
WINDOW = 16
FULL = (2, 5)
GRIDS = ((1, 10, 6), (2, 4, 8), (1, 6, 6), (1, 2, 2))


def tower(kind: str, attn: str = "sdpa", seed: int = 0) -> Any:
    """A random tower in eval mode whose attention is far from uniform."""
    torch.manual_seed(seed)
    common = {"depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH, "hidden_size": 16}
    model: Any
    if kind == "qwen2_vl":
        model = Qwen2VisionTransformerPretrainedModel(
            Qwen2VLVisionConfig(embed_dim=16, mlp_ratio=1, attn_implementation=attn, **common)
        )
    else:
        model = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                intermediate_size=24,
                out_hidden_size=16,
                window_size=WINDOW,
                fullatt_block_indexes=list(FULL),
                attn_implementation=attn,
                **common,
            )
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(20.0 if "qkv" in name else 10.0)
    return model.eval()


def pixels(grids: Sequence[tuple[int, int, int]], seed: int = 0) -> Tensor:
    """Flattened random patches [S, 96] of images; each image has numbers of its own."""
    parts = []
    for place, (steps, rows, cols) in enumerate(grids):
        generator = torch.Generator().manual_seed(100 * seed + place)
        parts.append(torch.randn(steps * rows * cols, 96, generator=generator))
    return torch.cat(parts)


@dataclass
class Slow:
    """What the slow reference saw; rows in the processor's order.

    Attributes:
        alive: for each layer, the patches that entered it.
        query, key, value: for each layer [L, C], rotated where the tower rotates.
        merged: merged rows, four consecutive survivors each.
    """

    alive: list[Tensor] = field(default_factory=list)
    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    merged: Tensor = field(default_factory=lambda: torch.empty(0))


def places(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """(slice, row, col) [S, 3] of every patch, in the order of the processor."""
    found, number = [], 0
    for steps, rows, cols in grids:
        for _ in range(steps):
            for row in range(0, rows, 2):
                for col in range(0, cols, 2):
                    found += [(number, row + r, col + c) for r in (0, 1) for c in (0, 1)]
            number += 1
    return torch.tensor(found)


@torch.no_grad()
def slow_forward(
    model: Any,
    patches: Tensor,
    grids: Sequence[tuple[int, int, int]],
    left: Mapping[int, Tensor],
) -> Slow:
    """The tower with dense masks over the surviving patches, in the processor's order.

    Args:
        left: for layers with a cut, which of all patches are left after it.
    """
    place = places(grids)
    window = place.clone()
    window[:, 1:] //= WINDOW // PATCH
    hidden = model.patch_embed(patches)
    cos, sin = model.rotary_pos_emb(hidden, place[:, 1:])
    alive = torch.arange(len(patches))
    seen = Slow()
    for layer, block in enumerate(model.blocks):
        windowed = hasattr(model.config, "window_size") and layer not in FULL
        group = (window if windowed else place[:, :1])[alive]
        allowed = (group.unsqueeze(0) == group.unsqueeze(1)).all(-1)
        query, key, value = block.attn.qkv(block.norm1(hidden)).chunk(3, dim=-1)
        query, key = (_turned(part, cos[alive], sin[alive]) for part in (query, key))
        out = []
        for q, k, v in zip(*(part.chunk(HEADS, -1) for part in (query, key, value)), strict=True):
            logits = (q @ k.T) * q.shape[-1] ** -0.5
            out.append(logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v)
        hidden = hidden + block.attn.proj(torch.cat(out, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
        for record, part in zip(
            (seen.alive, seen.query, seen.key, seen.value), (alive, query, key, value), strict=True
        ):
            record.append(part)
        if layer in left:
            hidden = hidden[torch.isin(alive, left[layer])]
            alive = alive[torch.isin(alive, left[layer])]
    seen.merged = model.merger(hidden)
    return seen


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows [L, C] with every head's pairs (j, j + d/2) turned by their angle."""
    parts = []
    for head in rows.chunk(HEADS, -1):
        half = head.shape[-1] // 2
        a, b = head[:, :half], head[:, half:]
        parts += [a * cos[:, :half] - b * sin[:, :half], b * cos[:, half:] + a * sin[:, half:]]
    return torch.cat(parts, -1)
