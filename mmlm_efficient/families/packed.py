"""The pieces of a packed vision tower: Qwen2-VL's and Qwen2.5-VL's, see the tower station."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PackedTowerParts:
    """The pieces of a packed vision tower that its station hooks.

    Attributes:
        blocks: in order; each maps hidden states [S, C] to the same shape.
        attentions: the self-attention module of each block.
        qkv: fused projection of each block, giving [S, 3 * C]: query, key, value.
        heads: attention heads.
        merger: module at the end of the tower that makes [S / merge_unit, D] of [S, C].
        merge_unit: consecutive patches that become one visual token.
        config: the tower's config.
        full_attention: blocks that attend to the whole slice, all others to windows of it; None
            when there are no windows.
    """

    blocks: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    qkv: Sequence[nn.Module]
    heads: int
    merger: nn.Module
    merge_unit: int
    config: Any
    full_attention: frozenset[int] | None = None

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The blocks, by the name that the hooks know."""
        return self.blocks

    @property
    def projections(self) -> Sequence[tuple[nn.Module]]:
        """The one projection of each block, as the hooks know them."""
        return [(projection,) for projection in self.qkv]

    @property
    def has_cls(self) -> bool:
        """These towers have no CLS token."""
        return False


def packed_tower_parts(tower: nn.Module) -> PackedTowerParts:
    """The parts of the vision tower of a Qwen2-VL or Qwen2.5-VL model."""
    module: Any = tower
    blocks = list(module.blocks)
    full = getattr(module.config, "fullatt_block_indexes", None)
    return PackedTowerParts(
        blocks=blocks,
        attentions=[block.attn for block in blocks],
        qkv=[block.attn.qkv for block in blocks],
        heads=int(module.config.num_heads),
        merger=module.merger,
        merge_unit=int(module.config.spatial_merge_size) ** 2,
        config=module.config,
        full_attention=None if full is None else frozenset(full),
    )
