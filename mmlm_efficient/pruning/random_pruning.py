"""Baseline: keep random tokens."""

from __future__ import annotations

import zlib
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.tokens import VisualTokens


class RandomPruning(PruningMethod):
    """Keep a random set of tokens per image, fixed by the seed and the image's pixels.

    Two images get different sets, one image always the same, whatever else is in the batch.
    A larger budget keeps a superset.
    """

    name: ClassVar[str] = "random"
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the choice, in [0, 2**32)")

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """The first tokens of a random order of the image's tokens."""
        content = pixels.detach().float().cpu().contiguous().numpy().tobytes()
        # One 32-bit number from both: torch's CPU generator ignores higher bits of a seed.
        generator = torch.Generator().manual_seed(zlib.crc32(content, self.seed))
        order = torch.randperm(len(tokens), generator=generator)
        return torch.sort(order[:budget]).values
