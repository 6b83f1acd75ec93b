"""Station 1, from pixels to the visual tokens of every image: tower, projector, packing.

The tower runs once on all crops of a request. A method may cut patches while it runs (FlowCut),
reduce the tokens of each crop right behind it (VisionZip, VisPruner), or only look at its last
layer. What is left is projected and packed as the model packs whole images; with nothing to prune
the model's own function does all of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from mmlm_efficient.clock import Span
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families import Family
from mmlm_efficient.families.base import Visual, padded_stack
from mmlm_efficient.families.wrapped import own_weights
from mmlm_efficient.packing import crop_of_packed, packed_crops, packed_scores
from mmlm_efficient.pruning.base import PruningMethod, TowerJob
from mmlm_efficient.pruning.observed import Crop, Observed, ObservePass, Sight
from mmlm_efficient.stations.tower import TowerPass, TowerRun
from mmlm_efficient.tokens import CLS_INDEX, VisualTokens, top_positions

if TYPE_CHECKING:
    from mmlm_efficient.prepare import LMMParts

T = TypeVar("T")


@dataclass
class Encoded:
    """The unpruned tower's outcome for the images of a request; it may serve several requests.

    Attributes:
        visuals: the images, then the videos.
        crops: for each of them its tower runs, whole, in front of the projector; None when only
            the packed features are there.
        features: for each of them the packed features [N (+ 1 for CLS), D]; None until needed.
        sights: what was observed, and at which layer.
        layer: 0-based tower layer that was observed.
        pixels: for each, what gives its pixel values [n_crops, 3, H, W].
        caches: for each, what methods found out about it and no request changes.
        span: how long the tower took; None where it did not run for these images.
        observe_s: host seconds of it spent in observing.
    """

    visuals: tuple[Visual, ...]
    crops: list[list[Crop]] | None
    features: list[Tensor] | None
    sights: frozenset[Sight] = frozenset()
    layer: int | None = None
    pixels: Sequence[Callable[[], Tensor]] = ()
    span: Span | None = None
    caches: list[dict[str, Any]] = field(default_factory=list)
    observe_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.caches:
            self.caches = [{} for _ in self.visuals]

    def take(self, images: Sequence[int]) -> Encoded:
        """The same for some of the images, in another order or repeated."""

        def picked(values: Sequence[T]) -> list[T]:
            return [values[image] for image in images]

        return Encoded(
            tuple(picked(self.visuals)),
            None if self.crops is None else picked(self.crops),
            None if self.features is None else picked(self.features),
            self.sights,
            self.layer,
            picked(self.pixels) if self.pixels else (),
            caches=picked(self.caches),
        )


@dataclass
class Tower:
    """What station 1 gives a request.

    Attributes:
        tokens: of every image and video, CLS first where the model keeps it.
        encoded: the unpruned outcome; None when patches were cut while the tower ran.
        run: the pass that ran, for the report.
        visuals: the images and videos.
        pixels: as in `Encoded`.
        span: how long the tower took, pruning inside it included; None where it did not run.
        prune_s: host seconds spent in observing and pruning.
    """

    tokens: list[VisualTokens]
    encoded: Encoded | None
    run: TowerRun | None
    visuals: tuple[Visual, ...]
    pixels: Sequence[Callable[[], Tensor]]
    span: Span | None
    prune_s: float = 0.0


def encode(
    parts: LMMParts,
    inputs: Mapping[str, Any],
    sights: frozenset[Sight] = frozenset(),
    layer: int | None = None,
    *,
    crops: bool | None = None,
    visuals: tuple[Visual, ...] | None = None,
) -> Encoded:
    """Run the unpruned tower once, for one or many requests on the same images.

    Args:
        parts: the model.
        inputs: model inputs with the images; the prompt is not looked at.
        sights: what to observe of the tower.
        layer: 0-based tower layer to observe; None for the one behind the feature.
        crops: whether the tower's own output is needed; None when something is observed.
        visuals: the images and videos of the inputs, where they are known already.

    Returns:
        What `prepare(..., encoded=...)` takes instead of running the tower. It holds on to the
        pixels, which some methods look at.

    Raises:
        PromptError: inputs of another shape than the processor gives.
        SettingsError: the tower has no such layer, or it attends to windows only.
    """
    family = parts.family
    if visuals is None:
        inputs = family.as_tensors(inputs)
        visuals = family.visuals(inputs)
    pixels = _pixels(family, inputs, visuals)
    span = _span(family, inputs)
    if not (bool(sights) if crops is None else crops):
        with own_weights(family.model.model):
            features = family.stock_features(inputs, visuals)
        return Encoded(visuals, None, features, pixels=pixels, span=span.end())
    watched = family.feature_layer if layer is None and sights else layer
    seen: Sequence[Observed] = ()
    observe_s = 0.0
    if sights and watched is not None:
        family.check_observed(watched, "the observed layer")
        tower_pass = ObservePass(watched, sights, family.tower.merge_unit)
        with _running(parts, tower_pass, visuals) as run:
            rows = family.run_tower(inputs, visuals)
        seen, observe_s = tower_pass.seen, run.seconds
    else:
        rows = family.run_tower(inputs, visuals)
    whole = _whole_crops(family, visuals, rows, seen)
    return Encoded(visuals, whole, None, sights, watched, pixels, span.end(), observe_s=observe_s)


def run_tower(
    parts: LMMParts,
    inputs: Mapping[str, Any],
    visuals: tuple[Visual, ...],
    method: PruningMethod | None,
    sights: frozenset[Sight],
    layer: int | None,
    encoded: Encoded | None = None,
) -> Tower:
    """Station 1 of one request.

    Args:
        parts: the model.
        inputs: model inputs with the images.
        visuals: the images and videos.
        method: who decides at the tower, if anybody.
        sights: what this or another method wants to know of the unpruned tower.
        layer: 0-based tower layer to look at; None for the one behind the feature.
        encoded: an earlier outcome to use instead of running the tower.
    """
    family = parts.family
    budgets = [family.tokens_of(visual) for visual in visuals]
    if method is not None:
        budgets = crop_budgets(method, family, visuals)
    busy = method is not None and any(
        budget < size for budget, size in zip(budgets, _sizes(family, visuals), strict=True)
    )
    if method is not None and busy and method.cuts_tower:
        if encoded is not None:
            raise UnsupportedError(
                f"'{method.name}' cuts patches while the tower runs: it cannot use an encoded image"
            )
        return _cut_inside(parts, inputs, method, visuals, budgets)
    condenses = method is not None and busy and method.condenses
    if method is not None and method.condenses and not busy:
        sights = frozenset()
    prune_s = 0.0
    if encoded is None:
        wanted = True if condenses else None
        encoded = encode(parts, inputs, sights, layer, crops=wanted, visuals=visuals)
        prune_s = encoded.observe_s
    elif not sights <= encoded.sights or (sights and layer not in (None, encoded.layer)):
        raise UnsupportedError(
            f"the encoded image holds {sorted(encoded.sights) or 'nothing'} of tower layer "
            f"{encoded.layer}, but the method looks at {sorted(sights)} of layer {layer}: encode "
            "the image with these"
        )
    if method is None or not condenses:
        return replace(_whole(family, encoded), prune_s=prune_s)
    start = time.perf_counter()
    if not family.packs_pruned:
        tokens = [
            _condensed_packed(family, encoded, place, method, budget)
            for place, budget in enumerate(budgets)
        ]
    else:
        condensed = _condensed(encoded, method, budgets)
        tokens = _packed(family, visuals, _projected(family, condensed), method)
    prune_s += time.perf_counter() - start
    return Tower(tokens, encoded, None, visuals, encoded.pixels, encoded.span, prune_s)


def _whole(family: Family, encoded: Encoded) -> Tower:
    """Station 1 where nothing is pruned."""
    tokens = _whole_tokens(family, encoded)
    return Tower(tokens, encoded, None, encoded.visuals, encoded.pixels, encoded.span)


def crop_budgets(method: PruningMethod, family: Family, visuals: Sequence[Visual]) -> list[int]:
    """A tower method's budget of every image: tokens of each of its tower runs, CLS counted; of
    the whole image where nothing can be cut before packing."""
    return list(method.budgets(_sizes(family, visuals)))


def _sizes(family: Family, visuals: Sequence[Visual]) -> list[int]:
    lead = int(family.keeps_cls)
    if not family.packs_pruned:
        return [int((~visual.places.newline).sum()) + lead for visual in visuals]
    return [max(rows * cols for rows, cols in visual.crop_grids) + lead for visual in visuals]


# -- cutting while the tower runs --------------------------------------------------------------


def _cut_inside(
    parts: LMMParts,
    inputs: Mapping[str, Any],
    method: PruningMethod,
    visuals: tuple[Visual, ...],
    budgets: Sequence[int],
) -> Tower:
    """Run the tower under the method's pass and pack what it leaves."""
    family, lead, unit = parts.family, int(parts.family.keeps_cls), parts.family.tower.merge_unit
    lengths = [rows * cols * unit for visual in visuals for rows, cols in visual.crop_grids]
    targets = [
        min((budget - lead) * unit, rows * cols * unit)
        for visual, budget in zip(visuals, budgets, strict=True)
        for rows, cols in visual.crop_grids
    ]
    score_only = not family.packs_pruned
    tower_pass = method.tower_pass(
        TowerJob(
            targets=tuple([1] * len(lengths) if score_only else targets),
            n_patches=max(lengths),
            last_cut_layer=family.last_cut_layer,
            has_cls=family.tower.has_cls,
            lengths=tuple(lengths) if unit > 1 else None,
            groups=_pictures(visuals),
            merge_unit=unit,
            score_only=score_only,
        )
    )
    if tower_pass is None:
        return _whole(family, encode(parts, inputs, visuals=visuals))
    pixels, span = _pixels(family, inputs, visuals), _span(family, inputs)
    with _running(parts, tower_pass, visuals) as run:
        rows = family.run_tower(inputs, visuals)
    span.end()
    if score_only:
        whole = Encoded(visuals, _whole_crops(family, visuals, rows, ()), None)
        tokens = [
            _best(one, packed_scores(family, visual, tower_pass.scores, place, visuals), budget)
            if budget < size
            else one
            for place, (one, visual, budget, size) in enumerate(
                zip(
                    _whole_tokens(family, whole),
                    visuals,
                    budgets,
                    _sizes(family, visuals),
                    strict=True,
                )
            )
        ]
        return Tower(tokens, None, None, visuals, pixels, span, run.seconds)
    crops = [
        _crop(family, features, index.to("cpu"), None) for index, features in run.selected(rows)
    ]
    tokens = _packed(family, visuals, _projected(family, _grouped(visuals, crops)), method)
    return Tower(tokens, None, run, visuals, pixels, span, run.seconds)


def _pictures(visuals: Sequence[Visual]) -> tuple[int, ...]:
    """For each tower run a number of the picture it is a part of; every frame is one of its own."""
    numbers: list[int] = []
    for visual in visuals:
        first = len(numbers)
        frames = visual.kind == "video"
        numbers += [first + (crop if frames else 0) for crop in range(visual.n_crops)]
    return tuple(numbers)


def _best(tokens: VisualTokens, scores: Tensor, budget: int) -> VisualTokens:
    """The best tokens of a packed image; newlines score -inf."""
    return tokens.take(top_positions(scores.to("cpu"), budget))


# -- reducing behind the tower -----------------------------------------------------------------


def _condensed(encoded: Encoded, method: PruningMethod, budgets: Sequence[int]) -> list[list[Crop]]:
    """Every crop of every image reduced to its image's budget."""
    return [
        [method.condense(crop, budget) if budget < len(crop) else crop for crop in own]
        for own, budget in zip(encoded.crops or [], budgets, strict=True)
    ]


def _condensed_packed(
    family: Family, encoded: Encoded, place: int, method: PruningMethod, budget: int
) -> VisualTokens:
    """An image that is packed first, reduced as one crop without its newlines."""
    tokens = _whole_tokens(family, encoded.take([place]))[0]
    visual, crops = encoded.visuals[place], (encoded.crops or [])[place]
    crop = crop_of_packed(family, visual, tokens, crops)
    if budget >= len(crop):
        return replace(tokens, image=place)
    crop = method.condense(crop, budget)
    return VisualTokens(crop.features, crop.index, visual.places, place, crop.members)


# -- parts -------------------------------------------------------------------------------------


def _pixels(
    family: Family, inputs: Mapping[str, Any], visuals: Sequence[Visual]
) -> list[Callable[[], Tensor]]:
    """For each visual what gives its pixels; those of all are put together at the first call."""
    # A copy: what the tower uses up is taken from a request's inputs later.
    inputs, found = dict(inputs), cast("list[Tensor]", [])

    def pixels(place: int) -> Tensor:
        if not found:
            found.extend(family.crop_pixels(inputs, visuals))
        return found[place]

    return [partial(pixels, place) for place in range(len(visuals))]


def _span(family: Family, inputs: Mapping[str, Any]) -> Span:
    """The clock of a tower that starts to run."""
    given = [inputs.get(name) for name in family.pixel_inputs]
    devices = [one.device for one in given if isinstance(one, Tensor)]
    return Span(devices[0] if devices else torch.device("cpu"))


def _running(parts: LMMParts, tower_pass: TowerPass, visuals: Sequence[Visual]) -> Any:
    """The tower station with a pass, in this thread."""
    side = math.isqrt(parts.family.tower.merge_unit)
    grids = [grid for visual in visuals for grid in visual.crop_grids]
    return parts.tower.running(tower_pass, [(rows * side, cols * side) for rows, cols in grids])


def _crop(family: Family, rows: Tensor, index: Tensor, observed: Observed | None) -> Crop:
    """A crop of tower rows, CLS first where the tower has one; CLS stays a token if the model
    keeps it."""
    lead = int(family.tower.has_cls)
    cls = rows[0] if lead else None
    if family.keeps_cls:
        return Crop(rows, torch.cat([torch.tensor([CLS_INDEX]), index]), observed, cls)
    return Crop(rows[lead:], index, observed, cls)


def _whole_crops(
    family: Family,
    visuals: Sequence[Visual],
    rows: Sequence[Tensor],
    seen: Sequence[Observed],
) -> list[list[Crop]]:
    lead = int(family.tower.has_cls)
    crops = [
        _crop(family, own, torch.arange(len(own) - lead), seen[place] if seen else None)
        for place, own in enumerate(rows)
    ]
    return _grouped(visuals, crops)


def _grouped(visuals: Sequence[Visual], crops: Sequence[Crop]) -> list[list[Crop]]:
    """Crops by the image that they belong to."""
    grouped, first = [], 0
    for visual in visuals:
        grouped.append(list(crops[first : first + visual.n_crops]))
        first += visual.n_crops
    return grouped


def _projected(family: Family, crops: Sequence[Sequence[Crop]]) -> list[list[Crop]]:
    """Crops behind the projector, all projected together."""
    flat = [crop for own in crops for crop in own]
    if not flat:
        return [[] for _ in crops]
    if len({len(crop) for crop in flat}) == 1:
        projected = family.project(torch.stack([crop.features for crop in flat]))
    else:
        projected = family.project(padded_stack([crop.features for crop in flat]))
    rows = iter(projected)
    return [
        [
            Crop(next(rows)[: len(crop)], crop.index, crop.observed, crop.cls, crop.members)
            for crop in own
        ]
        for own in crops
    ]


def _packed(
    family: Family,
    visuals: Sequence[Visual],
    crops: Sequence[Sequence[Crop]],
    method: PruningMethod,
) -> list[VisualTokens]:
    return [
        packed_crops(visual, own, place, family.newline, keep_newlines=method.keeps_newlines)
        for place, (visual, own) in enumerate(zip(visuals, crops, strict=True))
    ]


def _whole_tokens(family: Family, encoded: Encoded) -> list[VisualTokens]:
    """All tokens of every image, as the model packs them."""
    if encoded.features is None:
        projected = _projected(family, encoded.crops or [])
        encoded.features = [
            _stock_packed(family, visual, own)
            for visual, own in zip(encoded.visuals, projected, strict=True)
        ]
    cls = torch.full((int(family.keeps_cls),), CLS_INDEX)
    return [
        VisualTokens(
            features, torch.cat([cls, torch.arange(len(visual.places))]), visual.places, place
        )
        for place, (features, visual) in enumerate(
            zip(encoded.features, encoded.visuals, strict=True)
        )
    ]


def _stock_packed(family: Family, visual: Visual, crops: Sequence[Crop]) -> Tensor:
    values = torch.stack([crop.features for crop in crops])
    newline = family.newline
    return family.pack(values, visual, None if newline is None else newline.to(values))
