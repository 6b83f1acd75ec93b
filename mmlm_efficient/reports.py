"""What happened to one image, put together from what the stations remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmlm_efficient.stations.layer import LayerRequest
from mmlm_efficient.stations.tower import TowerRun
from mmlm_efficient.tokens import CLS_INDEX, ImageReport, TokenPlaces, VisualTokens, kept_patches


@dataclass(frozen=True)
class CropRuns:
    """The tower runs of one image under a pass that cut patches.

    Attributes:
        run: the pass's outcome for all images.
        first: number of the image's first crop among all; count: how many it has.
        merge_unit: patches per visual token.
    """

    run: TowerRun
    first: int
    count: int
    merge_unit: int


def image_report(
    tokens: VisualTokens,
    sample: int,
    n_tower: int,
    n_layers: int,
    request: LayerRequest | None,
    crops: CropRuns | None,
) -> ImageReport:
    """The report of one image.

    Args:
        tokens: its tokens where they entered the language model.
        sample: its prompt.
        n_tower: its tokens behind the tower.
        n_layers: decoder layers.
        request: what was cut inside the decoder, if anything.
        crops: its runs of a tower whose patches were cut, if any were.
    """
    image, index = tokens.image, tokens.index
    groups = _groups(tokens)
    cuts: list[tuple[int, int]] = []
    if request is not None:
        groups |= _groups_in_decoder(tokens, groups, request.members.get(image, {}))
        if image in request.kept:
            index = index[request.kept[image].to(index.device)]
        cuts = list(zip(request.cut_layers, request.counts.get(image, []), strict=False))
    per_layer, entering = [], len(tokens)
    for layer in range(n_layers):
        per_layer.append(entering)
        entering = next((left for cut, left in cuts if cut == layer), entering)
    left = set(index.tolist())
    return ImageReport(
        image=image,
        sample=sample,
        grid=tokens.grid,
        n_in=tokens.n_in,
        kept=kept_patches(index),
        per_station={"tower": n_tower, "bridge": len(tokens), "layer": entering},
        decoder_layer_tokens=tuple(per_layer),
        places=tokens.places,
        notes=tokens.notes,
        merged={carrier: group for carrier, group in groups.items() if carrier in left},
        **({} if crops is None else _tower_details(tokens, crops)),
    )


def _groups(tokens: VisualTokens) -> dict[int, tuple[int, ...]]:
    """Members of the merged tokens among an image's tokens, by index."""
    if tokens.members is None:
        return {}
    pairs = zip(tokens.index.tolist(), tokens.members, strict=True)
    return {index: group for index, group in pairs if len(group) > 1}


def _groups_in_decoder(
    tokens: VisualTokens,
    before: dict[int, tuple[int, ...]],
    members: dict[int, tuple[int, ...]],
) -> dict[int, tuple[int, ...]]:
    """The same of tokens that were merged inside the decoder, all the way to the patches."""
    index = tokens.index.tolist()
    merged = {}
    for carrier, group in members.items():
        ids = [index[position] for position in group]
        everything = {one for i in ids for one in before.get(i, (i,)) if one != CLS_INDEX}
        merged[index[carrier]] = tuple(sorted(everything))
    return merged


def _tower_details(tokens: VisualTokens, crops: CropRuns) -> dict[str, Any]:
    """What the pass inside the tower did to an image that it pruned."""
    run, tower_pass, unit = crops.run, crops.run.tower_pass, crops.merge_unit
    own = range(crops.first, crops.first + crops.count)
    # An image with nothing to prune reports as if alone, when no pass runs at all.
    if all(len(run.kept[crop]) == run.layer_counts[crop][0] for crop in own):
        return {}
    counts = [run.layer_counts[crop] for crop in own]
    rows = slice(own.start, own.stop)
    details: dict[str, Any] = {
        "layer_counts": tuple(sum(layer) for layer in zip(*counts, strict=True)),
        "cut_layer": _by_token(run.cut_layer[rows, ::unit], tokens.places, -1),
    }
    if tower_pass.scores is not None:
        scores = tower_pass.scores[rows, ::unit].detach()
        details["scores"] = _by_token(scores, tokens.places, 0.0)
    if tower_pass.entropy_ratios:
        details["entropy_ratios"] = tuple(
            ratio for crop in own for ratio in tower_pass.entropy_ratios[crop]
        )
    return details


def _by_token(values: Tensor, places: TokenPlaces, newline: float) -> Tensor:
    """Values [n_crops, L] of patches, one per token of the image, on the CPU."""
    values = values.to("cpu")
    if places.crop is None or places.patch is None:
        return values[0]
    shown = ~places.newline
    result = torch.full((len(places),), newline, dtype=values.dtype)
    result[shown] = values[places.crop[shown], places.patch[shown]]
    return result
