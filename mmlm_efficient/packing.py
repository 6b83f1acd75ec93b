"""How the tokens that a tower leaves become the sequence of an image.

Where every token of the unpruned sequence stands is known (`TokenPlaces`), so what is left is
packed by looking its place up: the overview first, then the tiles in raster order of their
stitched grid, without the padded border. Source: FlowCut (arXiv 2505.19536) and VisionZip
(arXiv 2412.04467) pack LLaVA-NeXT this way; unlike VisionZip's code the padded border is removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families import Family
from mmlm_efficient.families.base import Visual
from mmlm_efficient.pruning.observed import Crop, Observed
from mmlm_efficient.tokens import CLS_INDEX, VisualTokens


def packed_crops(
    visual: Visual,
    crops: Sequence[Crop],
    image: int,
    newline: Tensor | None,
    *,
    keep_newlines: bool = False,
) -> VisualTokens:
    """The sequence of an image from what is left of its crops, behind the projector.

    A source of one crop (overview, frame, plain image) keeps the order of its crop. Of a source
    of several crops (tiles) single patches come first in raster order, then the CLS tokens, then
    merged tokens. Newlines are dropped, as in the papers' code; an image of one crop keeps its
    last one, and an image that lost nothing keeps all.

    Args:
        visual: the image.
        crops: its tower runs.
        image: its position in the request.
        newline: the model's newline embedding [D], or None.
        keep_newlines: also keep the newline of every row of tiles that has a token left.
    """
    lookup, sources = places_of_patches(visual), _sources(visual)
    offsets = [0]
    for crop in crops:
        offsets.append(offsets[-1] + len(crop))
    parts = []
    for source in sorted(set(sources)):
        own = [place for place, other in enumerate(sources) if other == source]
        left = [_left(crops[place], lookup[place], offsets[place]) for place in own]
        kind, position, row = (torch.cat(column) for column in zip(*left, strict=True))
        if len(own) > 1:
            # Stable: CLS and merged tokens stay in the order of their crops.
            order = torch.argsort(torch.where(kind == 0, position, 0), stable=True)
            order = order[torch.argsort(kind[order], stable=True)]
            position, row = position[order], row[order]
        parts.append((position, row))
    index, row = (torch.cat(column) for column in zip(*parts, strict=True))
    features = torch.cat([crop.features for crop in crops])
    tokens = VisualTokens(
        features=features[row.to(features.device)],
        index=index,
        places=visual.places,
        image=image,
        members=_members(crops, lookup, row),
    )
    whole = all(
        crop.members is None and int((crop.index != CLS_INDEX).sum()) == rows * cols
        for crop, (rows, cols) in zip(crops, visual.crop_grids, strict=True)
    )
    ends = _newlines(visual, tokens, keep_newlines, whole)
    return tokens if newline is None or not len(ends) else _with_newlines(tokens, ends, newline)


def places_of_patches(visual: Visual) -> Tensor:
    """int64 [n_crops, L], position among the image's tokens of each patch, -1 if unpadding
    removes it.

    Raises:
        UnsupportedError: the image's tokens are no single patches.
    """
    places = visual.places
    if places.crop is None or places.patch is None:
        raise UnsupportedError("tokens of this image were resized and stand for no single patch")
    longest = max(rows * cols for rows, cols in visual.crop_grids)
    lookup = torch.full((visual.n_crops, longest), -1)
    shown = (~places.newline).nonzero().squeeze(1)
    lookup[places.crop[shown], places.patch[shown]] = shown
    return lookup


def _sources(visual: Visual) -> list[int]:
    """The source that each crop belongs to."""
    places = visual.places
    shown = ~places.newline
    # A tile that unpadding removes altogether is one of the last source, too.
    crops = torch.full((visual.n_crops,), int(places.source[shown].max()))
    if places.crop is not None:
        crops[places.crop[shown]] = places.source[shown]
    return crops.tolist()


def _left(crop: Crop, lookup: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a crop's tokens that unpadding leaves: kind (0 patch, 1 CLS, 2 merged), position among
    the image's tokens (CLS_INDEX for CLS), row in the features of all crops."""
    is_cls = crop.index == CLS_INDEX
    position = torch.where(is_cls, CLS_INDEX, lookup[crop.index.clamp(min=0)])
    kind = is_cls.long()
    if crop.members is not None:
        merged = torch.tensor([len(group) > 1 for group in crop.members])
        kind = torch.where(merged & ~is_cls, 2, kind)
        # A merged token whose own place is unpadded away stands at its first member that is not.
        hidden = (merged & (position < 0)).nonzero().squeeze(1).tolist()
        places = lookup.tolist() if hidden else []
        for row in hidden:
            shown = (places[one] for one in crop.members[row] if places[one] >= 0)
            position[row] = next(shown, -1)
    row = torch.arange(offset, offset + len(crop))
    stays = (position >= 0) | is_cls
    return kind[stays], position[stays], row[stays]


def _members(
    crops: Sequence[Crop], lookup: Tensor, rows: Tensor
) -> tuple[tuple[int, ...], ...] | None:
    """Positions that each token stands for; None when nothing was merged."""
    if all(crop.members is None for crop in crops):
        return None
    groups: list[tuple[int, ...]] = []
    for crop, positions in zip(crops, lookup.tolist(), strict=True):
        given = crop.members or tuple((one,) for one in crop.index.tolist())
        for group in given:
            shown = (positions[one] for one in group if one != CLS_INDEX)
            groups.append(tuple(sorted(position for position in shown if position >= 0)))
    return tuple(groups[row] for row in rows.tolist())


def _newlines(visual: Visual, tokens: VisualTokens, keep: bool, whole: bool) -> Tensor:
    """Positions of the newline tokens that stay."""
    places = visual.places
    ends = places.newline.nonzero().squeeze(1)
    if whole or visual.n_crops == 1 or not len(ends):
        return ends
    if not keep:
        return ends[:0]
    left = tokens.index[tokens.index >= 0]
    rows = torch.unique(places.row[left[places.source[left] == 1]])
    return ends[torch.isin(places.row[ends], rows)]


def _with_newlines(tokens: VisualTokens, ends: Tensor, newline: Tensor) -> VisualTokens:
    """Newline tokens sorted in among the others; merged tokens and CLS stay behind them."""
    features = torch.cat([tokens.features, newline.to(tokens.features).expand(len(ends), -1)])
    index = torch.cat([tokens.index, ends])
    members = tokens.members
    if members is not None:
        members = (*members, *((int(end),) for end in ends))
    order = torch.argsort(index) if tokens.ordered else torch.arange(len(index))
    if members is not None:
        members = tuple(members[place] for place in order.tolist())
    return VisualTokens(
        features[order.to(features.device)], index[order], tokens.places, tokens.image, members
    )


def packed_scores(
    family: Family,
    visual: Visual,
    scores: Tensor | None,
    place: int,
    visuals: Sequence[Visual],
) -> Tensor:
    """Scores of patches in the order of an image's tokens, -inf on newlines.

    Args:
        family: of the model.
        visual: the image.
        scores: float32 [all crops, L].
        place: of the image among the visuals.
        visuals: of the request.
    """
    if scores is None:
        raise UnsupportedError("the tower pass left no scores to choose by")
    first = sum(other.n_crops for other in visuals[:place])
    own = scores[first : first + visual.n_crops].float().unsqueeze(-1)
    packed = family.pack(own, visual, own.new_zeros(1)).squeeze(-1)
    return packed.masked_fill(visual.places.newline.to(packed.device), -torch.inf)


def crop_of_packed(
    family: Family, visual: Visual, tokens: VisualTokens, crops: Sequence[Crop]
) -> Crop:
    """A packed image as one crop without newlines: features behind the projector, what was
    observed packed like them."""
    shown = (~visual.places.newline).nonzero().squeeze(1)

    def packed(values: Sequence[Tensor | None]) -> Tensor | None:
        given = [value for value in values if value is not None]
        if not given:
            return None
        stacked = torch.stack(given)
        flat = stacked.unsqueeze(-1) if stacked.ndim == 2 else stacked
        result = family.pack(flat, visual, None)[shown.to(flat.device)]
        return result.squeeze(-1) if stacked.ndim == 2 else result

    seen = [crop.observed for crop in crops]
    observed = Observed(
        packed([None if one is None else one.relay for one in seen]),
        packed([None if one is None else one.keys for one in seen]),
        None,
    )
    lead = int((tokens.index == CLS_INDEX).sum())
    features = tokens.features[lead:][shown.to(tokens.features.device)]
    return Crop(features, shown, observed)
