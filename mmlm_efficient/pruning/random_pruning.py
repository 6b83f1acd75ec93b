"""Baseline: keep random tokens."""

from __future__ import annotations

import zlib
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.tokens import VisualTokens


class RandomPruning(PruningMethod):
    """Keep a random set of tokens per image, fixed by the seed and the image's pixels.

    One image always gets the same set, whatever else is in the batch. 8-bit pictures get it in
    float32, bfloat16 and float16 alike, other pixels in float32 and bfloat16. Different pictures
    get different sets, unless they differ in nothing but brightness, contrast or tint.
    A larger budget keeps a superset.
    """

    name: ClassVar[str] = "random"
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)
    looks_at: ClassVar[str] = "nothing; a random order fixed by seed and pixels"

    seed: int = Field(0, ge=0, lt=2**32, description="seed of the choice, in [0, 2**32)")

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """The first tokens of a random order of the image's tokens."""
        # One 32-bit number from both: torch's CPU generator ignores higher bits of a seed.
        number = zlib.crc32(_levels(pixels).tobytes(), self.seed)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(number))
        return torch.sort(order[:budget]).values


def _levels(pixels: Tensor) -> npt.NDArray[np.uint16]:
    """Pixels as the ranks of their values in their channel: the same in every dtype.

    Values differ between dtypes, their order does not, as long as all keep them apart. bfloat16
    keeps the levels of 8-bit pictures apart up to 2 (with the usual deviations of 0.22 to 0.5);
    the few brightest, above 2, count as one.

    Args:
        pixels: [channels, H, W], normalised.

    Returns:
        uint16 [channels, H, W], ranks from 1.
    """
    rough = pixels.detach().to("cpu", torch.bfloat16).float().nan_to_num().clamp(-2.0, 2.0)
    places = ((rough.numpy() + 2.0) * 2**14).astype(np.int32)
    levels = np.empty(places.shape, np.uint16)
    for channel, place in enumerate(places):
        present = np.zeros(2**16 + 1, np.uint16)
        present[place] = 1
        levels[channel] = present.cumsum(dtype=np.uint16)[place]
    return levels
