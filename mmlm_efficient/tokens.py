"""Visual tokens that remember where they came from, and the report of one request.

A token's *index* is the raster index of its own patch in the image's full token grid
(row ``index // cols``, column ``index % cols``). The tower's CLS token, which some models feed to
the language model (``vision_feature_select_strategy="full"``), has no patch: its index is
:data:`CLS_INDEX`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLS_INDEX = -1


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image or frame at some point of the path.

    Attributes:
        features: [T, C] token features.
        index: int64 [T], raster index of each token's own patch; ascending for a pure selection.
        grid: (rows, cols) of the full token grid.
        image: position of the image in the request.
        members: all original patches merged into each token, or None when each token stands
            for its own patch alone.
    """

    features: Tensor
    index: Tensor
    grid: tuple[int, int]
    image: int
    members: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return int(self.index.shape[0])

    @property
    def n_in(self) -> int:
        """Patches of the full grid, before anything was pruned."""
        return self.grid[0] * self.grid[1]

    def take(self, keep: Tensor) -> VisualTokens:
        """Keep some tokens.

        Args:
            keep: int64 [K], positions among the current tokens (not patch indices), ascending.

        Returns:
            The kept tokens with their provenance.

        Example:
            >>> tokens = VisualTokens(torch.ones(4, 2), torch.arange(4), (2, 2), image=0)
            >>> tokens.take(torch.tensor([1, 3])).index.tolist()
            [1, 3]
        """
        members = self.members
        if members is not None:
            members = tuple(members[position] for position in keep.tolist())
        return VisualTokens(
            features=self.features[keep.to(self.features.device)],
            index=self.index[keep.to(self.index.device)],
            grid=self.grid,
            image=self.image,
            members=members,
        )


@dataclass(frozen=True)
class ImageReport:
    """What happened to the visual tokens of one image.

    Attributes:
        image: position of the image in the request.
        sample: position of its prompt in the batch.
        grid: (rows, cols) of the full token grid.
        n_in: patches of the full grid.
        kept: int64 [K] on the CPU, original patch indices that reach the last decoder layer,
            ascending (CLS not listed).
        per_station: visual tokens (CLS counted) leaving "tower", "bridge" and "layer".
        scores: float32 [n_in] last importance score of each patch, or None.
        layer_counts: patches entering each tower layer; empty when the tower was not pruned.
        cut_layer: int64 [n_in] tower layer after which each patch was cut, -1 = kept; or None.
        entropy_ratios: FlowCut's entropy ratio at each adaptive cut of the tower, in [0, 1].
        decoder_layer_tokens: visual tokens (CLS counted) entering each decoder layer.
    """

    image: int
    sample: int
    grid: tuple[int, int]
    n_in: int
    kept: Tensor
    per_station: Mapping[str, int]
    scores: Tensor | None = None
    layer_counts: tuple[int, ...] = ()
    cut_layer: Tensor | None = None
    entropy_ratios: tuple[float, ...] = ()
    decoder_layer_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class PruningReport:
    """What one request did to its images.

    Attributes:
        images: one report per image, in the order of the request.
        seconds: host seconds: "tower_s" (tower and projector, pruning inside it included) and
            "prune_s" (all scoring and cutting, that inside the tower included).
        methods: names of the methods of the request.
    """

    images: tuple[ImageReport, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    methods: tuple[str, ...] = ()


def kept_patches(index: Tensor) -> Tensor:
    """The patch indices among token indices (CLS dropped), ascending, on the CPU.

    Args:
        index: int64 [T] token indices.

    Example:
        >>> kept_patches(torch.tensor([-1, 4, 2])).tolist()
        [2, 4]
    """
    index = index.detach().to("cpu")
    return torch.sort(index[index != CLS_INDEX]).values


def top_positions(scores: Tensor, keep: int) -> Tensor:
    """Positions of the largest scores, ascending; among equal scores the lower position wins.

    Args:
        scores: [N].
        keep: how many, at most N.

    Returns:
        int64 [keep].

    Example:
        >>> top_positions(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist()
        [1, 2]
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.sort(order[:keep]).values
