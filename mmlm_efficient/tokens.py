"""Visual tokens that remember where they came from, and the report of one request.

A token's *index* is its position among the unpruned tokens of its image; of a plain image that is
the raster index of its patch (row ``index // cols``, column ``index % cols``), of others
:class:`TokenPlaces` says where it stands. The tower's CLS token, which some models feed to the
language model (``vision_feature_select_strategy="full"``), has no patch: its index is
:data:`CLS_INDEX`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CLS_INDEX = -1


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of one unpruned image or video stand, in the order of its prompt block.

    A plain image is one grid. An image cut into tiles has two sources: the overview and the
    stitched tiles. A video has one source per frame. CLS is not among the tokens.

    Attributes:
        source: int64 [N], which grid a token belongs to.
        row, col: int64 [N], its place in that grid; a newline token stands behind its row's last
            column, and a video's last newline in a source of its own.
        newline: bool [N], tokens that show no patch but end a row (or a video).
        shapes: (rows, cols) of every grid, newline columns not counted.
        crop, patch: int64 [N], the tower run of the image and the token of it that each token
            is; -1 for newlines. None where tokens were resized after the tower and stand for no
            single patch.
        video: the sources are frames.
    """

    source: Tensor
    row: Tensor
    col: Tensor
    newline: Tensor
    shapes: tuple[tuple[int, int], ...]
    crop: Tensor | None
    patch: Tensor | None
    video: bool = False

    @classmethod
    def grid(cls, rows: int, cols: int) -> TokenPlaces:
        """The places of an image that is one grid of patches.

        Example:
            >>> TokenPlaces.grid(2, 3).row.tolist()
            [0, 0, 0, 1, 1, 1]
        """
        index = torch.arange(rows * cols)
        zeros = torch.zeros_like(index)
        newline = torch.zeros(rows * cols, dtype=torch.bool)
        shapes = ((rows, cols),)
        return cls(zeros, index // cols, index % cols, newline, shapes, zeros, index)

    def __len__(self) -> int:
        return int(self.source.shape[0])


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one image or video at some point of the path.

    Attributes:
        features: [T, C] token features.
        index: int64 [T], position of each token among the image's unpruned tokens (of a plain
            image, the raster index of its patch), :data:`CLS_INDEX` for CLS; ascending for a
            pure selection.
        places: where the unpruned tokens stand.
        image: position of the image in the request.
        members: all unpruned tokens merged into each token, or None when each token stands
            for itself alone.
        scores: float32 [T], importance that later stations may use, or None.
        notes: what the method found out about the image, for the report.
    """

    features: Tensor
    index: Tensor
    places: TokenPlaces
    image: int
    members: tuple[tuple[int, ...], ...] | None = None
    scores: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.index.shape[0])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of the first grid: the whole image, its overview, or the first frame."""
        return self.places.shapes[0]

    @property
    def n_in(self) -> int:
        """Tokens before anything was pruned, CLS not counted."""
        return len(self.places)

    @property
    def ordered(self) -> bool:
        """Whether the tokens are a selection in the order of the prompt, CLS first if at all."""
        return bool((self.index.diff() > 0).all())

    def take(self, keep: Tensor) -> VisualTokens:
        """Keep some tokens.

        Args:
            keep: int64 [K], positions among the current tokens (not patch indices), ascending.

        Returns:
            The kept tokens with their provenance.

        Example:
            >>> places = TokenPlaces.grid(2, 2)
            >>> tokens = VisualTokens(torch.ones(4, 2), torch.arange(4), places, image=0)
            >>> tokens.take(torch.tensor([1, 3])).index.tolist()
            [1, 3]
        """
        members = self.members
        if members is not None:
            members = tuple(members[position] for position in keep.tolist())
        return VisualTokens(
            features=self.features[keep.to(self.features.device)],
            index=self.index[keep.to(self.index.device)],
            places=self.places,
            image=self.image,
            members=members,
            scores=None if self.scores is None else self.scores[keep.to(self.scores.device)],
            notes=self.notes,
        )


@dataclass(frozen=True)
class ImageReport:
    """What happened to the visual tokens of one image.

    Attributes:
        image: position of the image in the request.
        sample: position of its prompt in the batch.
        grid: (rows, cols) of the full token grid; of the overview where there are tiles, of the
            first frame of a video.
        n_in: tokens before pruning, CLS not counted.
        kept: int64 [K] on the CPU, indices of the tokens that reach the last decoder layer, each
            merged token as the one that carries it; ascending (CLS not listed).
        per_station: visual tokens (CLS counted) leaving "tower", "bridge" and "layer".
        scores: float32 [n_in] last importance score of each patch of the tower, or None.
        layer_counts: patches entering each tower layer; empty when the tower was not pruned.
        cut_layer: int64 [n_in] tower layer after which each patch was cut, -1 = kept; or None.
        entropy_ratios: FlowCut's entropy ratio at each adaptive cut of the tower, in [0, 1].
        decoder_layer_tokens: visual tokens (CLS counted) entering each decoder layer.
        places: where the unpruned tokens stand; None in reports made by hand of a plain grid.
        merged: for each kept token that stands for several, its index and all its members.
        notes: what the method says about the image; VFlowOpt: "anchors_per_crop",
            "anchor_fallback" (a crop had no anchor, its most attended token stood in),
            "recycled_tokens" (merged ones behind stage 0).
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
    places: TokenPlaces | None = None
    merged: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean_decoder_tokens(self) -> float:
        """Visual tokens entering a decoder layer, averaged over the layers."""
        per_layer = self.decoder_layer_tokens
        return sum(per_layer) / len(per_layer) if per_layer else float(len(self.kept))


@dataclass(frozen=True)
class ImageAttention:
    """Attention that the last token of a prompt gives to one image in one decoder layer.

    Attributes:
        index: int64 [N] on the CPU, the image's tokens in this layer as indices among its unpruned
            tokens, each merged token as the one that carries it; :data:`CLS_INDEX` for CLS.
        sink: bool [N], which of them are sinks.
        before, after: float32 [heads, N], shares of the row, without VAR and with it.
    """

    index: Tensor
    sink: Tensor
    before: Tensor
    after: Tensor

    @property
    def sinks(self) -> tuple[int, ...]:
        """Indices of the sinks, ascending."""
        return tuple(sorted(self.index[self.sink].tolist()))


@dataclass(frozen=True)
class LayerRedistribution:
    """What VAR did in one decoder layer of one prompt; see `VAR.return_stats`.

    Attributes:
        sample: position of the prompt in the batch.
        layer: decoder layer.
        images: by position of the image in the request.
        text_sinks: places of text sinks in the prompt as it entered the language model, padding
            not counted.
        rows: text tokens of the prompt behind its first visual token, whose rows might change.
        changed: for each head, how many of those rows changed.
        moved: attention that changed hands in a changed row, mean, a share of the row.
        gain: largest factor of a visual token that is no sink; 1 when nothing changed.
        decoded: for each generated token that ran (all but the last), heads whose row changed;
            empty with beams.
    """

    sample: int
    layer: int
    images: Mapping[int, ImageAttention]
    text_sinks: tuple[int, ...]
    rows: int
    changed: tuple[int, ...]
    moved: float
    gain: float
    decoded: tuple[int, ...] = ()

    @property
    def sinks(self) -> dict[int, tuple[int, ...]]:
        """Indices of the visual sinks by image."""
        return {image: one.sinks for image, one in self.images.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the maps: of them the mean attention to sinks and to other tokens."""
        shares = {}
        for name in ("before", "after"):
            maps = [(getattr(one, name).mean(dim=0), one.sink) for one in self.images.values()]
            shares[name] = {
                "sinks": sum(float(row[sink].sum()) for row, sink in maps),
                "others": sum(float(row[~sink].sum()) for row, sink in maps),
            }
        return {
            "layer": self.layer,
            "sinks": {str(image): list(sinks) for image, sinks in self.sinks.items()},
            "text_sinks": list(self.text_sinks),
            "rows": self.rows,
            "changed": list(self.changed),
            "moved": self.moved,
            "gain": self.gain,
            "decoded": list(self.decoded),
            "last_token_attention": shares,
        }


@dataclass(frozen=True)
class PruningReport:
    """What one request did to its images.

    Attributes:
        images: one report per image, in the order of the request.
        seconds: "tower_s" (tower and projector, pruning inside it included; on CUDA by the
            device's own clock, which no request waits for) and "prune_s" (host seconds of all
            scoring and cutting, that inside the tower included).
        methods: names of the methods of the request.
        redistribution: what VAR did with `return_stats`: of each prompt with images, one entry per
            decoder layer that it may change; otherwise empty.
    """

    images: tuple[ImageReport, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    redistribution: tuple[LayerRedistribution, ...] = ()


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
