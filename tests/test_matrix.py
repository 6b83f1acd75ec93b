"""Every method on every family: the same contract for all pairs.

With nothing to prune a method is bit-identical to the stock model; it keeps exactly what it says;
a prompt's result does not depend on its batch or on the cache; and the report knows where every
token that is left came from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import METHODS, KeepMask, NoPruning, VFlowOpt
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.pyramiddrop import stage_counts
from mmlm_efficient.pruning.sparsevlm import SparseVLM
from mmlm_efficient.tokens import ImageReport
from tests import tiny, tiny_families

FAMILIES = ("llava", *tiny_families.FAMILIES)
NAMES = [
    name for name, cls in METHODS.items() if issubclass(cls, PruningMethod) and name != "keep_mask"
]
PAIRS = [
    pytest.param(name, family, id=f"{name}-{family}")
    for name in NAMES
    for family in FAMILIES
    if METHODS[name].families == "all" or family in METHODS[name].families
]
NEW_TOKENS = 4
LLAVA = [
    (tiny.prompt(1, 5, tiny.IMAGE_TOKEN, 6, 7), 1),
    (tiny.prompt(1, 9, 11), 0),
    (tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 10, 12, 14), 1),
    (tiny.prompt(1, 5, 13, tiny.IMAGE_TOKEN, 17), 1),
]


@functools.cache
def parts_of(family: str) -> LMMParts:
    """One tiny model per family for all tests here."""
    model = tiny.tiny_llava() if family == "llava" else tiny_families.tiny_model(family)
    return LMMParts(model)


def inputs_of(family: str, sample: int | None = None) -> dict[str, torch.Tensor]:
    """Four prompts of uneven length, one without a picture; or one of them."""
    if family != "llava":
        return tiny_families.sample_inputs(family, "uneven", sample=sample)
    if sample is None:
        return tiny.batch([ids for ids, _ in LLAVA], tiny.images(3))
    first = sum(count for _, count in LLAVA[:sample])
    ids, count = LLAVA[sample]
    return tiny.batch([ids], tiny.images(3)[first : first + count] if count else None)


def method(name: str, ratio: float) -> PruningMethod:
    """The method with a budget; VFlowOpt counts exactly when asked to."""
    settings: dict[str, Any] = {}
    if name == "vflowopt":
        settings = {"exact_budget": True, "profile": "none", "merge_grid_size": 3.0}
    made = METHODS[name](keep_ratio=ratio, **settings)
    assert isinstance(made, PruningMethod)
    return made


def logits_of(prepared: Prepared) -> torch.Tensor:
    """Logits of one forward."""
    with prepared.active():
        output: torch.Tensor = prepared.parts.model(**prepared.model_inputs).logits
    return output


def generated(prepared: Prepared, **options: Any) -> list[list[int]]:
    """A few greedy tokens for each prompt; no placeholders among them."""
    family = prepared.parts.family
    with prepared.active():
        ids = prepared.parts.model.generate(
            **prepared.model_inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            suppress_tokens=list(family.placeholders.values()),
            **options,
        )
    tokens: list[list[int]] = ids[:, -NEW_TOKENS:].tolist()
    return tokens


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_nothing_to_prune_is_bit_identical(name: str, family: str) -> None:
    parts, inputs = parts_of(family), inputs_of(family)
    with torch.no_grad():
        want = parts.model(**inputs).logits
        prepared = prepare(parts, inputs, [method(name, 1.0)])
        assert torch.equal(logits_of(prepared), want)
        stock = prepare(parts, inputs, [NoPruning()])
        assert generated(prepared) == generated(stock)


@pytest.mark.parametrize("ratio", [0.5, 0.2])
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_exact_counts_and_provenance(name: str, family: str, ratio: float) -> None:
    parts = parts_of(family)
    chosen = method(name, ratio)
    with torch.no_grad():
        prepared = prepare(parts, inputs_of(family), [chosen])
        logits_of(prepared)
        report = prepared.report()
    assert len(report.images) == 3
    for image in report.images:
        COUNTS[chosen.stations](name, chosen, family, image, ratio)
        check_provenance(image, keeps_cls=name == "visionzip" and family in ("llava", "llava_next"))
    lengths = prepared.layout.mask.sum(dim=1).tolist()
    stock = inputs_of(family)["attention_mask"].sum(dim=1).tolist()
    for sample, (left, before) in enumerate(zip(lengths, stock, strict=True)):
        gone = sum(
            before_image - image.per_station["bridge"]
            for image, before_image in zip(report.images, prepared.stock_tokens, strict=True)
            if image.sample == sample
        )
        assert left == before - gone


def check_provenance(image: ImageReport, *, keeps_cls: bool) -> None:
    """Every token that is left is known, once, and merged ones know their members."""
    kept = image.kept.tolist()
    assert kept == sorted(set(kept))
    assert all(0 <= one < image.n_in for one in kept)
    n_cls = 0
    if keeps_cls and image.places is not None:
        crops = image.places.crop
        n_cls = 1 if crops is None else int(crops.max()) + 1
    assert len(kept) + n_cls == image.per_station["layer"]
    assert set(image.merged) <= set(kept)
    for carrier, group in image.merged.items():
        assert carrier in group
        assert len(group) > 1
        assert list(group) == sorted(set(group))
    assert image.decoder_layer_tokens[0] == image.per_station["bridge"]
    assert list(image.decoder_layer_tokens) == sorted(image.decoder_layer_tokens, reverse=True)


def share(ratio: float, count: int) -> int:
    """What a ratio keeps of a number of tokens."""
    return max(1, math.floor(ratio * count + 1e-9))


def count_bridge(
    name: str, chosen: PruningMethod, family: str, image: ImageReport, ratio: float
) -> None:
    """Bridge methods keep their share of the image's tokens."""
    want = share(ratio, image.n_in)
    assert image.per_station["bridge"] == image.per_station["layer"] == want


def count_tower(
    name: str, chosen: PruningMethod, family: str, image: ImageReport, ratio: float
) -> None:
    """Tower methods keep their share of every tower run, less the padded border of tiles."""
    places = image.places
    assert places is not None
    if family == "llava_onevision":
        assert image.per_station["layer"] == share(ratio, int((~places.newline).sum()))
        return
    assert places.crop is not None
    assert places.patch is not None
    if family != "llava_next":
        assert image.per_station["layer"] == share(ratio, image.n_in)
        return
    patches = image.grid[0] * image.grid[1]
    n_crops = int(places.crop.max()) + 1
    per_crop = share(ratio, patches)
    assert image.per_station["layer"] <= n_crops * per_crop
    cls = int(name == "visionzip")
    overview = int((places.source[image.kept] == 0).sum())
    assert overview + cls == per_crop
    for crop in range(1, n_crops):
        shown = int((places.crop == crop).sum())
        left = int((places.crop[image.kept] == crop).sum())
        assert left + cls <= per_crop
        if shown == patches:
            assert left + cls == per_crop


def count_layer(
    name: str, chosen: PruningMethod, family: str, image: ImageReport, ratio: float
) -> None:
    """Decoder methods: the published number at every cut."""
    total, layers = image.n_in, list(image.decoder_layer_tokens)
    assert image.per_station["bridge"] == layers[0] == total
    if name == "fastv":
        assert layers == [total, total, share(ratio, total), share(ratio, total)]
    elif name == "pyramiddrop":
        want = stage_counts(total, share(ratio, total), ratio, 3)
        assert layers == [total, *want]
        assert want[-1] == share(ratio, total)
    else:
        assert isinstance(chosen, SparseVLM)
        left, want = total, [total]
        for keep in chosen.stage_counts([total])[0]:
            if left > keep:
                dropped = left - min(keep, left - 1)
                left = min(keep, left - 1) + (math.floor(0.3 * dropped) + 1) // 10 + 1
            want.append(left)
        # Four layers, cut after the first three.
        assert [*layers, image.per_station["layer"]][: len(want)] == want


def count_vflowopt(
    name: str, chosen: PruningMethod, family: str, image: ImageReport, ratio: float
) -> None:
    """VFlowOpt: stage 0 exactly its share, then half-to-even rounding at two layers."""
    assert isinstance(chosen, VFlowOpt)
    identity = parts_of(family).identity
    layers, schedule = chosen.schedule(identity, image.image, image.n_in)
    left = round(schedule.stage_keep_ratios[0] * image.n_in)
    counts = [left]
    for ratio_of_stage in schedule.stage_keep_ratios[1:]:
        left = max(1, left - round(left * (1 - ratio_of_stage)))
        counts.append(left)
    per_layer = image.decoder_layer_tokens
    assert [per_layer[0], *(per_layer[layer] for layer in layers)] == counts


COUNTS: dict[tuple[str, ...], Callable[..., None]] = {
    ("bridge",): count_bridge,
    ("tower",): count_tower,
    ("tower", "layer"): count_tower,
    ("layer",): count_layer,
    ("bridge", "layer"): count_vflowopt,
}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_batch_equals_single_and_the_cache_changes_nothing(name: str, family: str) -> None:
    parts, chosen = parts_of(family), method(name, 0.3)
    with torch.no_grad():
        together = prepare(parts, inputs_of(family), [chosen])
        logits = logits_of(together)
        reports = together.report().images
        tokens = generated(together)
        assert generated(prepare(parts, inputs_of(family), [chosen]), use_cache=False) == tokens
        image = 0
        for sample in range(4):
            methods = [] if sample == 1 else [chosen]
            alone = prepare(parts, inputs_of(family, sample), methods)
            want = logits_of(alone)[0, -1]
            torch.testing.assert_close(logits[sample, -1], want, atol=2e-4, rtol=1e-4)
            assert tokens[sample] == generated(alone)[0]
            for own in alone.report().images:
                assert reports[image].kept.tolist() == own.kept.tolist()
                assert reports[image].decoder_layer_tokens == own.decoder_layer_tokens
                assert reports[image].merged == own.merged
                image += 1
        assert image == len(reports) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_keeps_what_it_names(family: str) -> None:
    parts, inputs = parts_of(family), inputs_of(family)
    with torch.no_grad():
        counts = prepare(parts, inputs).stock_tokens
        chosen = [list(range(0, count, image + 2)) for image, count in enumerate(counts)]
        prepared = prepare(parts, inputs, [KeepMask(mask=chosen)])
        logits_of(prepared)
        for image, want in zip(prepared.report().images, chosen, strict=True):
            assert image.kept.tolist() == want


COMBINATIONS: list[tuple[str, list[Method]]] = [
    ("flowcut + fastv", [METHODS["flowcut"](keep_ratio=0.5), METHODS["fastv"](keep_ratio=0.2)]),
    (
        "visionzip + pyramiddrop",
        [METHODS["visionzip"](keep_ratio=0.5), METHODS["pyramiddrop"](keep_ratio=0.1)],
    ),
    ("divprune + fastv", [METHODS["divprune"](keep_ratio=0.5), METHODS["fastv"](keep_ratio=0.2)]),
    (
        "vispruner + uniform + sparsevlm",
        [
            METHODS["vispruner"](keep_ratio=0.6),
            METHODS["uniform"](keep_ratio=0.7),
            METHODS["sparsevlm"](keep_ratio=0.2),
        ],
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "methods", [both for _, both in COMBINATIONS], ids=[name for name, _ in COMBINATIONS]
)
def test_methods_at_different_stations_compose(methods: list[Method], family: str) -> None:
    parts = parts_of(family)
    with torch.no_grad():
        together = prepare(parts, inputs_of(family), methods)
        logits = logits_of(together)
        for image in together.report().images:
            before, after = image.per_station["bridge"], image.per_station["layer"]
            assert after <= before < image.n_in
            if methods[-1].name in ("fastv", "pyramiddrop"):
                ratio = methods[-1].keep_ratio  # type: ignore[attr-defined]
                assert after == min(before, share(ratio, together.stock_tokens[image.image]))
        alone = prepare(parts, inputs_of(family, 3), methods)
        want = logits_of(alone)[0, -1]
    torch.testing.assert_close(logits[3, -1], want, atol=2e-4, rtol=1e-4)
