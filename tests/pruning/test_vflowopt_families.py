"""VFlowOpt on every family: tiles, newlines, videos; and which methods go with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from eval.engine import Engine
from eval.task import Sample
from mmlm_efficient import EfficientLMM
from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.loading import load
from mmlm_efficient.prepare import LMMParts, Prepared, check_methods, prepare
from mmlm_efficient.pruning import METHODS, VFlowOpt
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.vflowopt_plan import stage_count, together
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.tokens import VisualTokens
from tests import tiny, tiny_families
from tests.tiny_vflowopt import DEPTH, RATIOS, SIDE, STATS, vflowopt

EVERY = [
    pytest.param(family, case, id=f"{family}-{case}")
    for family in tiny_families.FAMILIES
    for case in tiny_families.cases(family)
    if case != "text"
]


@pytest.fixture(scope="module")
def models() -> dict[str, LMMParts]:
    return {
        family: LMMParts(tiny_families.tiny_model(family), STATS, name=f"tiny-{family}")
        for family in tiny_families.FAMILIES
    }


def ready(parts: LMMParts, inputs: dict[str, Tensor], method: VFlowOpt) -> Prepared:
    with torch.no_grad():
        return prepare(parts, inputs, [method])


@torch.no_grad()
def prefilled(parts: LMMParts, prepared: Prepared) -> tuple[Tensor, list[int]]:
    """Logits of the last prompt tokens, and the length of every layer's cache."""
    cache = DynamicCache()
    with prepared.active():
        logits = parts.model(**prepared.model_inputs, **{CACHE: cache}).logits
    return logits[:, -1], [cache.get_seq_length(layer) for layer in range(DEPTH)]


def merges(tokens: VisualTokens, n_together: int) -> bool:
    return n_together == 1 and not tokens.places.video


def n_cells(tokens: VisualTokens, low: set[int]) -> int:
    """Cells that the low tokens of an image lie in."""
    places = tokens.places
    return len(
        {
            (
                int(places.source[one]),
                math.floor(int(places.row[one]) / SIDE),
                math.floor(int(places.col[one]) / SIDE),
            )
            for one in low
        }
    )


@pytest.mark.parametrize(("family", "case"), EVERY)
def test_counts_newlines_and_caches(models: dict[str, LMMParts], family: str, case: str) -> None:
    parts = models[family]
    inputs = tiny_families.sample_inputs(family, case)
    prepared = ready(parts, inputs, vflowopt())
    logits, lengths = prefilled(parts, prepared)
    assert bool(logits.isfinite().all())
    reports = prepared.report().images
    together = [[r.image for r in reports if r.sample == one] for one in range(len(logits))]
    entering = torch.zeros(len(logits), DEPTH, dtype=torch.long)
    for tokens, report in zip(prepared.tokens, reports, strict=True):
        n, n_together = tokens.n_in, len(together[report.sample])
        newline = set(tokens.places.newline.nonzero().flatten().tolist())
        n_low = round(n * (1 - RATIOS[0]))
        if merges(tokens, n_together):
            n_low = min(n, n_low + int(n / SIDE**2))
            assert tokens.members is not None
            stand = dict(zip(tokens.index.tolist(), tokens.members, strict=True))
            assert sorted(place for own in stand.values() for place in own) == list(range(n))
            assert tokens.scores is not None
            order = tokens.scores.sort(descending=True, stable=True).indices
            plain = set(tokens.index[order[: n - n_low]].tolist())
            assert all(stand[place] == (place,) for place in plain)
            assert len(tokens) == n - n_low + n_cells(tokens, set(range(n)) - plain)
        else:
            assert tokens.members is None
            assert len(tokens) == n - n_low
        # Newlines rank above everything, from the first stage to the last.
        kept = set(report.kept.tolist())
        assert newline <= kept or kept <= newline
        entering[report.sample] += torch.tensor(report.decoder_layer_tokens)
    for sample, images in enumerate(together):
        first, second, _, last = entering[sample].tolist()
        assert first == sum(len(prepared.tokens[image]) for image in images)
        if images:
            assert second == first - round(first * (1 - RATIOS[1]))
            assert last == second - round(second * (1 - RATIOS[2]))
    words = prepared.layout.mask.sum(1) - entering[:, 0]
    assert lengths == (words[:, None] + entering).max(0).values.tolist()


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("case", ["uneven", "several"])
def test_a_prompt_alone_and_in_a_batch(models: dict[str, LMMParts], family: str, case: str) -> None:
    parts, method = models[family], vflowopt(entropy_weight=0.5)
    batch = ready(parts, tiny_families.sample_inputs(family, case), method)
    logits, _ = prefilled(parts, batch)
    reports = batch.report().images
    for sample in range(len(logits)):
        inputs = tiny_families.sample_inputs(family, case, sample=sample)
        alone = ready(parts, inputs, method)
        want, _ = prefilled(parts, alone)
        torch.testing.assert_close(logits[sample], want[0], atol=2e-4, rtol=0)
        own = [report for report in reports if report.sample == sample]
        for report, other in zip(own, alone.report().images, strict=True):
            assert report.kept.equal(other.kept)
            assert report.merged == other.merged


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_nothing_to_prune_is_bit_identical(models: dict[str, LMMParts], family: str) -> None:
    parts, inputs = models[family], tiny_families.sample_inputs(family, "uneven")
    with torch.no_grad():
        want = parts.model(**inputs).logits
        prepared = ready(parts, inputs, VFlowOpt(keep_ratio=1.0))
        with prepared.active():
            assert parts.model(**prepared.model_inputs).logits.equal(want)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_positions_behind_the_cuts_are_the_prompts(
    models: dict[str, LMMParts], family: str
) -> None:
    """Rotary tables of the last layer are rows of those of the first."""
    parts, seen = models[family], []
    layers = parts.family.decoder.layers

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"][0])

    handles = [
        layers[layer].register_forward_pre_hook(watch, with_kwargs=True) for layer in (0, DEPTH - 1)
    ]
    prepared = ready(parts, tiny_families.sample_inputs(family, "one"), vflowopt())
    prefilled(parts, prepared)
    for handle in handles:
        handle.remove()
    first, last = seen
    request = prepared._request
    assert request is not None
    assert last.shape[-2] < first.shape[-2]
    torch.testing.assert_close(last[0], first[0, request.layout.origin[0]], atol=0, rtol=0)


# Their images have other numbers of tokens in the case "several".
SIZES = ("llava_next", "qwen2_vl", "qwen2_5_vl")


def test_ratios_of_a_prompt_spend_its_images_budgets() -> None:
    images = [(100, (0.5, 1.0, 0.5)), (300, (0.5, 0.5, 1.0)), (40, (1.0, 1.0, 1.0))]
    r0, r1, r2 = together(images)
    assert 440 * r0 == pytest.approx(50 + 150 + 40)
    assert 440 * r0 * r1 == pytest.approx(50 + 75 + 40)
    assert 440 * r0 * r1 * r2 == pytest.approx(25 + 75 + 40)
    same = (0.3, 0.7, 0.9)
    assert together([(7, same), (13, same)]) == same


@pytest.mark.parametrize("n_keep", [8, 18, 40])
@pytest.mark.parametrize("family", SIZES)
def test_one_number_for_pictures_of_different_sizes(
    models: dict[str, LMMParts], family: str, n_keep: int
) -> None:
    method = VFlowOpt(keep_tokens=n_keep, profile="none", stage_layers=(1, 3))
    parts = models[family]
    inputs = tiny_families.sample_inputs(family, "several")
    prepared = ready(parts, inputs, method)
    logits, _ = prefilled(parts, prepared)
    reports = [one for one in prepared.report().images if one.sample == 0]
    sizes = [len(tokens.places) for tokens in prepared.tokens if tokens.image < 3]
    assert len(set(sizes)) > 1
    # Stage 0, per image; stages 1 and 2, together.
    schedules = [method.schedule(parts.identity, at, n)[1] for at, n in enumerate(sizes)]
    ratios = [schedule.stage_keep_ratios for schedule in schedules]
    first = [stage_count(n, own[0]) for n, own in zip(sizes, ratios, strict=True)]
    assert [report.decoder_layer_tokens[0] for report in reports] == first
    _, r1, r2 = together(list(zip(sizes, ratios, strict=True)))
    totals = [sum(first), stage_count(sum(first), r1)]
    totals.append(stage_count(totals[1], r2))
    layers = [sum(report.decoder_layer_tokens[layer] for report in reports) for layer in range(4)]
    assert layers == [totals[0], totals[1], totals[1], totals[2]]
    # Half a token per rounding: of every image at stage 0, of the prompt behind it.
    mean = sum(report.mean_decoder_tokens for report in reports)
    assert mean == pytest.approx(sum(min(n_keep, n) for n in sizes), abs=2.0)
    alone = ready(parts, tiny_families.sample_inputs(family, "several", sample=0), method)
    own_logits, _ = prefilled(parts, alone)
    torch.testing.assert_close(logits[0], own_logits[0], atol=1e-4, rtol=0)
    for report, own in zip(reports, alone.report().images, strict=True):
        assert report.kept.equal(own.kept)
        assert report.decoder_layer_tokens == own.decoder_layer_tokens


def test_an_evaluation_row_over_pictures_of_different_sizes() -> None:
    pictures = [tiny_families.picture(size, 5) for size in ((40, 30), (16, 60), (64, 64))]
    samples = [
        Sample("a", "w10 w11", tuple(pictures), generation={"max_new_tokens": 2}),
        Sample("b", "w12", tuple(pictures[1:]), generation={"max_new_tokens": 2}),
    ]
    model = tiny_families.tiny_model("llava_next")
    with EfficientLMM(model, tiny_families.tiny_processor("llava_next")) as lmm:
        outcomes = Engine(lmm).answer(samples, (VFlowOpt(keep_tokens=40, profile="none"),))
    assert [one.error for one in outcomes] == [None, None]
    means = [one.usage["visual_tokens_mean"] for one in outcomes]
    assert means == pytest.approx([120, 80], abs=2.0)


def test_an_encoded_image_must_hold_what_is_looked_at(models: dict[str, LMMParts]) -> None:
    parts, inputs = models["llava_onevision"], tiny_families.sample_inputs("llava_onevision", "one")
    with torch.no_grad():
        plain = encode(parts, inputs)
        seen = encode(parts, inputs, VFlowOpt.observes)
        got = prepare(parts, inputs, [vflowopt()], encoded=seen).tokens[0]
        want = prepare(parts, inputs, [vflowopt()]).tokens[0]
        assert got.index.equal(want.index)
        assert got.features.equal(want.features)
        # The entropy of the pixels is found once.
        assert list(seen.caches[0]) == []
        for _ in range(2):
            prepare(parts, inputs, [vflowopt(entropy_weight=0.5)], encoded=seen)
        assert list(seen.caches[0]) == ["entropy grayscale"]
        for method, encoded in ((vflowopt(), plain), (vflowopt(attention_layer=1), seen)):
            with pytest.raises(UnsupportedError, match="encode the image with these"):
                prepare(parts, inputs, [method], encoded=encoded)
        prepare(parts, inputs, [VFlowOpt(keep_ratio=1.0)], encoded=plain)


def test_pocket_gets_its_own_profile(caplog: pytest.LogCaptureFixture) -> None:
    picture = tiny_families.picture((96, 96), 3)
    with load("pocket") as lmm:
        assert isinstance(lmm, EfficientLMM)
        for ratio in (0.0625, 0.25, 0.4):
            method = VFlowOpt(keep_ratio=ratio)
            answer = lmm.ask("what is there?", picture, methods=method)
            (report,) = answer.report.images
            assert report.mean_decoder_tokens == pytest.approx(ratio * report.n_in, abs=1.5)
    assert not [record for record in caplog.records if "vflowopt" in record.message]


# -- with other methods ------------------------------------------------------------------------


def other(name: str) -> Method:
    """A method with settings that make it decide something."""
    if name == "keep_mask":
        return METHODS[name](mask=torch.ones(tiny.GRID, tiny.GRID, dtype=torch.bool))
    return METHODS[name](keep_ratio=0.5)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, cls in METHODS.items()
        if issubclass(cls, PruningMethod) and name != "vflowopt"
    ],
)
def test_no_second_pruning_method_beside_it(name: str) -> None:
    """One cuts the tower that it looks at, or decides where it does."""
    second = other(name)
    for methods in ([second, VFlowOpt(keep_ratio=0.5)], [VFlowOpt(keep_ratio=0.5), second]):
        with pytest.raises(SettingsError, match="use one of them") as caught:
            check_methods(methods)
        assert f"'{name}'" in str(caught.value)
        assert "'vflowopt'" in str(caught.value)


def test_beside_no_pruning() -> None:
    check_methods([METHODS["none"](), VFlowOpt(keep_ratio=0.5)])
    with pytest.raises(SettingsError, match="'vflowopt' and 'vflowopt' both decide"):
        check_methods([VFlowOpt(keep_ratio=0.5), VFlowOpt(keep_ratio=0.25)])
