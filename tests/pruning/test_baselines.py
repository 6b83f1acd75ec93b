"""The published baselines through `prepare`: counts, batches, caches, what goes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import (
    DivPrune,
    FastV,
    FlowCut,
    PruningMethod,
    PyramidDrop,
    RandomPruning,
    SparseVLM,
    VisionZip,
    VisPruner,
)
from mmlm_efficient.pruning.divprune import farthest_order
from mmlm_efficient.pruning.visionzip import zip_tokens
from mmlm_efficient.pruning.vispruner import important_and_diverse
from mmlm_efficient.stations.bridge import PaddingSide
from mmlm_efficient.stations.handed import CACHE
from mmlm_efficient.tokens import CLS_INDEX
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
N = tiny.N_PATCHES

METHODS: dict[str, type[PruningMethod]] = {
    "divprune": DivPrune,
    "vispruner": VisPruner,
    "visionzip": VisionZip,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
}
# (prompt, its images): uneven lengths, text only, several and adjacent images.
SAMPLES = [
    (tiny.prompt(1, 5, I, 6, 7), (0,)),
    (tiny.prompt(1, 9, 11), ()),
    (tiny.prompt(1, 5, I, I, 6, 7, 8, 12, 14, I, 9, 10), (1, 2, 3)),
    (tiny.prompt(1, I, 17, 18), (4,)),
]
BUDGETS = (9, 13, 5, 36, 7)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def prepared_samples(
    parts: LMMParts,
    name: str,
    samples: Sequence[int],
    padding_side: PaddingSide = "left",
    **settings: Any,
) -> Prepared:
    """Some of the samples as one batch, each image with its own budget."""
    images = [image for sample in samples for image in SAMPLES[sample][1]]
    prompts = [SAMPLES[sample][0] for sample in samples]
    pixels = tiny.images(5).to(parts.model.dtype)[images] if images else None
    budgets = tuple(BUDGETS[image] for image in images)
    methods = [METHODS[name](keep_tokens=budgets, **settings)] if images else []
    inputs = tiny.batch(prompts, pixels, padding_side)
    return prepare(parts, inputs, methods, padding_side=padding_side)


def forward(prepared: Prepared, **options: Any) -> Any:
    with torch.no_grad(), prepared.active():
        return prepared.parts.model(**prepared.model_inputs, **options)


def generated(prepared: Prepared, **options: Any) -> list[list[int]]:
    with torch.no_grad(), prepared.active():
        ids = prepared.parts.model.generate(**prepared.model_inputs, **GREEDY, **options)
    return [row[-4:] for row in ids.tolist()]


def one_image(
    parts: LMMParts, *methods: PruningMethod, count: int = 1, per_image: int = N
) -> Prepared:
    """One prompt with one image, or with several that text parts."""
    ids = [1, *(part for _ in range(count) for part in (5, I)), 6, 7]
    with torch.no_grad():
        return prepare(
            parts,
            tiny.batch([tiny.prompt(*ids, per_image=per_image)], tiny.images(count)),
            methods,
        )


# What all of them must do


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("tower", "text", "attn"),
    [
        ("clip", "llama", "sdpa"),
        pytest.param("siglip", "qwen2", "eager", marks=pytest.mark.slow),
    ],
)
def test_a_batch_of_uneven_prompts_equals_single_ones(
    tower: str, text: str, attn: str, padding_side: PaddingSide, name: str
) -> None:
    model = tiny.tiny_llava(tower, text, attn=attn)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepared_samples(parts, name, range(4), padding_side)
        logits = forward(together).logits
        reports = together.report().images
        for sample, (_, images) in enumerate(SAMPLES):
            alone = prepared_samples(parts, name, [sample], padding_side)
            want = forward(alone).logits[0]
            got = logits[sample]
            own = got[-len(want) :] if padding_side == "left" else got[: len(want)]
            torch.testing.assert_close(own, want, atol=1e-4, rtol=0)
            for image, report in zip(images, alone.report().images, strict=True):
                assert reports[image].kept.tolist() == report.kept.tolist()
                assert reports[image].merged == report.merged
                assert reports[image].decoder_layer_tokens == report.decoder_layer_tokens


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "text", ["llama", *(pytest.param(t, marks=pytest.mark.slow) for t in ("mistral", "qwen2"))]
)
def test_generation_with_and_without_cache_and_alone(text: str, name: str) -> None:
    model = tiny.tiny_llava("clip", text)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepared_samples(parts, name, range(4))
        cached = generated(together, use_cache=True)
        assert cached == generated(together, use_cache=False)
        for sample in range(4):
            assert generated(prepared_samples(parts, name, [sample])) == [cached[sample]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"keep_tokens": N}, {"keep_tokens": 99}])
@pytest.mark.parametrize("select", ["default", "full"])
def test_keeping_all_is_the_stock_model_to_the_bit(
    select: str, budget: dict[str, Any], name: str
) -> None:
    model = tiny.tiny_llava(select=select)
    per_image = tiny.tokens_per_image(model)
    if budget == {"keep_tokens": N}:
        budget = {"keep_tokens": per_image}
    prompts = [tiny.prompt(1, 5, I, 6, I, per_image=per_image), tiny.prompt(1, 9)]
    inputs = tiny.batch(prompts, tiny.images(2))
    with torch.no_grad(), LMMParts(model) as parts:
        want = model(**inputs)
        prepared = prepare(parts, inputs, [METHODS[name](**budget)])
        got = forward(prepared)
    assert torch.equal(got.logits, want.logits)
    for got_layer, want_layer in zip(got[CACHE].layers, want[CACHE].layers, strict=True):
        assert torch.equal(got_layer.keys, want_layer.keys)
    for report in prepared.report().images:
        assert report.kept.tolist() == list(range(N))
        assert not report.merged


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_sdpa_and_eager_keep_the_same(tower: str, name: str) -> None:
    kept = []
    for attn in ("sdpa", "eager"):
        with torch.no_grad(), LMMParts(tiny.tiny_llava(tower, attn=attn)) as parts:
            prepared = prepared_samples(parts, name, range(4))
            forward(prepared)
            kept.append([(r.kept.tolist(), r.merged) for r in prepared.report().images])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, name: str) -> None:
    model = tiny.tiny_llava().to(dtype)
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepared_samples(parts, name, range(4))
        logits = forward(prepared).logits
        assert logits.dtype == dtype
        assert bool(torch.isfinite(logits[:, -1]).all())
        reports = prepared.report().images
        got = [dict(report.per_station)["layer"] for report in reports]
    # SparseVLM's budget is a mean over layers.
    want = [counts[-1] for counts in map(sparsevlm_counts, BUDGETS)]
    assert got == (want if name == "sparsevlm" else list(BUDGETS))


@pytest.mark.parametrize("name", METHODS)
def test_names_and_papers(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert "arXiv" in method.paper
    assert "tokens of each image" in method.budget_counts
    with pytest.raises(SettingsError, match=f"{name}: give a budget"):
        method()
    message = "keep_tokens has 2 values, but the call has 1"
    with LMMParts(tiny.tiny_llava()) as parts, pytest.raises(SettingsError, match=message):
        one_image(parts, method(keep_tokens=(3, 4)))


# Counts


def sparsevlm_counts(budget: int, n_tokens: int = N) -> list[int]:
    """Tokens entering the four decoder layers, by the published lists and the recycling rule."""
    if budget >= n_tokens:
        return [n_tokens] * 4
    lists = {0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36)}
    lists |= {192: (300, 200, 110), 576: (576, 576, 576)}
    nominal = budget / n_tokens * 576
    low = max(point for point in lists if point < nominal)
    high = min(point for point in lists if point >= nominal)
    weight = (nominal - low) / (high - low)
    left, counts = n_tokens, [n_tokens]
    for less, more in zip(lists[low], lists[high], strict=True):
        keep = max(1, round(n_tokens * (less + weight * (more - less)) / 576))
        if left > keep:
            merged = int(0.3 * (left - keep)) + 1
            left = keep + merged // 10 + 1
        counts.append(left)
    return counts


def test_sparsevlm_counts_are_the_published_ones() -> None:
    """Real tokens behind the cuts of 576: 309, 204, 113 and 312, 117, 39 and 82, 32, 18."""
    assert sparsevlm_counts(192, 576) == [576, 309, 204, 113]
    assert sparsevlm_counts(128, 576) == [576, 312, 117, 39]
    assert sparsevlm_counts(64, 576) == [576, 82, 32, 18]


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("budget", [1, 2, 4, 10, 18, 35])
def test_exact_counts(tower: str, budget: int) -> None:
    def cubic(power: int) -> int:
        return max(budget, int(N * (budget / N) ** (power / 3) + 1e-9))

    want = {
        "divprune": [budget] * 4,
        "vispruner": [budget] * 4,
        "visionzip": [budget] * 4,
        "fastv": [N, N, budget, budget],
        "pyramiddrop": [N, cubic(1), cubic(2), budget],
        "sparsevlm": sparsevlm_counts(budget),
    }
    with torch.no_grad(), LMMParts(tiny.tiny_llava(tower)) as parts:
        for name, method in METHODS.items():
            prepared = one_image(parts, method(keep_tokens=budget))
            forward(prepared)
            report = prepared.report().images[0]
            assert list(report.decoder_layer_tokens) == want[name], name
            n_cls = int(name == "visionzip" and tower == "clip")
            assert len(report.kept) == want[name][-1] - n_cls
            assert len(set(report.kept.tolist())) == len(report.kept)


@pytest.mark.parametrize("name", METHODS)
def test_ratios_are_of_the_image(name: str) -> None:
    """keep_ratio=0.25 of 36 tokens is 9."""
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        reports = []
        for budget in ({"keep_ratio": 0.25}, {"keep_tokens": 9}):
            prepared = one_image(parts, METHODS[name](**budget))
            forward(prepared)
            reports.append(prepared.report().images[0])
        one, two = reports
        assert one.kept.tolist() == two.kept.tolist()
        assert one.decoder_layer_tokens == two.decoder_layer_tokens


# What the tower and bridge methods choose, from the stock tower's own outputs


def tower_outputs(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Relay attention [B, L], head-mean keys [B, L, d] and features [B, L (+ 1), C]."""
    tower = model.model.vision_tower
    outputs = tower(pixels, output_attentions=True, output_hidden_states=True)
    layer = len(tower.encoder.layers) - 2  # the one whose output is the feature
    features, attention = outputs.hidden_states[layer + 1], outputs.attentions[layer]
    module = tower.encoder.layers[layer]
    keys = module.self_attn.k_proj(module.layer_norm1(outputs.hidden_states[layer]))
    keys = keys.view(*keys.shape[:2], 4, -1).mean(dim=2)
    if hasattr(tower.embeddings, "class_embedding"):
        return attention[:, :, 0, 1:].mean(dim=1), keys[:, 1:], features
    return attention.mean(dim=(1, 2)), keys, features


@pytest.mark.parametrize(
    ("tower", "select"), [("clip", "default"), ("clip", "full"), ("siglip", "full")]
)
@pytest.mark.parametrize("ratio", [0.5, 0.0, 1.0])
def test_vispruner_against_the_stock_tower(tower: str, select: str, ratio: float) -> None:
    model = tiny.tiny_llava(tower, select=select, attn="eager")
    lead = int(tower == "clip" and select == "full")
    with torch.no_grad(), LMMParts(model) as parts:
        method = VisPruner(keep_tokens=(11, 6), important_ratio=ratio)
        prepared = one_image(parts, method, count=2, per_image=N + lead)
        relay, _, features = tower_outputs(model, tiny.images(2))
        patches = features[:, int(tower == "clip") :]
        for image, tokens in enumerate(prepared.tokens):
            budget = (11, 6)[image] - lead
            keep = important_and_diverse(relay[image], patches[image], budget, ratio)
            assert tokens.index.tolist() == [CLS_INDEX] * lead + keep.tolist()
            own = torch.cat([features[image, :lead], patches[image, keep]])
            want = model.model.multi_modal_projector(own)
            torch.testing.assert_close(tokens.features, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("tower", "select"), [("clip", "default"), ("clip", "full"), ("siglip", "full")]
)
@pytest.mark.parametrize("contextual", [None, 0, 3])
def test_visionzip_against_the_stock_tower(tower: str, select: str, contextual: int | None) -> None:
    model = tiny.tiny_llava(tower, select=select, attn="eager")
    n_cls, lead = int(tower == "clip"), int(tower == "clip" and select == "full")
    with torch.no_grad(), LMMParts(model) as parts:
        method = VisionZip(keep_tokens=(13, 5), contextual_tokens=contextual)
        prepared = one_image(parts, method, count=2, per_image=N + lead)
        relay, keys, features = tower_outputs(model, tiny.images(2))
        for image, tokens in enumerate(prepared.tokens):
            merged = (2, 1)[image] if contextual is None else contextual  # 10/64 of 13 and 5
            dominant = (13, 5)[image] - merged - n_cls
            patches = features[image, n_cls:]
            zipped = zip_tokens(relay[image], keys[image], patches, dominant, merged)
            own = torch.cat([features[image, :n_cls], patches[zipped.dominant], zipped.contextual])
            want = model.model.multi_modal_projector(own)
            torch.testing.assert_close(tokens.features, want, atol=1e-4, rtol=1e-4)
            places = zipped.dominant.tolist() + zipped.anchors.tolist()
            assert tokens.index.tolist() == [CLS_INDEX] * n_cls + places
            # Every patch is kept or merged into one token, unless nothing is merged.
            report = prepared.report().images[image]
            assert report.kept.tolist() == sorted(places)
            groups = {
                anchor: group
                for anchor, group in zip(zipped.anchors.tolist(), zipped.members, strict=True)
                if len(group) > 1
            }
            assert report.merged == groups
            alone = set(places) - set(groups)
            covered = sorted([*alone, *(one for group in groups.values() for one in group)])
            assert covered == (list(range(N)) if merged else sorted(places))


def test_divprune_keeps_the_farthest() -> None:
    model = tiny.tiny_llava()
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = one_image(parts, DivPrune(keep_tokens=(10, 4)), count=2)
        features = model.model.get_image_features(tiny.images(2)).pooler_output
    for image, (tokens, budget) in enumerate(zip(prepared.tokens, (10, 4), strict=True)):
        order = farthest_order(features[image], budget)
        assert tokens.index.tolist() == sorted(order.tolist())


def test_a_kept_cls_token_is_one_of_the_budget() -> None:
    with torch.no_grad(), LMMParts(tiny.tiny_llava(select="full")) as parts:
        for method in (DivPrune, VisPruner, VisionZip):
            for budget in (1, 4):
                tokens = one_image(parts, method(keep_tokens=budget), per_image=N + 1).tokens[0]
                assert len(tokens) == budget
                assert int(tokens.index[0]) == CLS_INDEX


# Settings


@pytest.mark.parametrize("budget", [3, 4])
def test_contextual_tokens_leave_a_dominant_one(budget: int) -> None:
    with pytest.raises(SettingsError, match="contextual_tokens=4 leaves no dominant token"):
        VisionZip(keep_tokens=(9, budget), contextual_tokens=4)
    with LMMParts(tiny.tiny_llava()) as parts, pytest.raises(SettingsError, match="budget of 3"):
        one_image(parts, VisionZip(keep_ratio=0.1, contextual_tokens=4))


def test_visionzip_has_no_place_for_the_cls_token() -> None:
    method = VisionZip(keep_tokens=9, position_ids="original")
    message = "visionzip: the CLS token that is kept has no position"
    with LMMParts(tiny.tiny_llava()) as parts, pytest.raises(SettingsError, match=message):
        one_image(parts, method)
    for tower, select in (("siglip", "full"), ("clip", "full")):
        model = tiny.tiny_llava(tower, select=select)
        per_image = tiny.tokens_per_image(model)
        with LMMParts(model) as parts:
            prepared = one_image(parts, method, per_image=per_image)
            places = (prepared.tokens[0].index + per_image - N + 2).tolist()
            stop = per_image + 2
            want = [0, 1, *places, stop, stop + 1]
            assert prepared.model_inputs["position_ids"][0].tolist() == want
            assert generated(prepared, use_cache=True) == generated(prepared, use_cache=False)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_important_ratio_range(ratio: float) -> None:
    with pytest.raises(SettingsError, match="vispruner: important_ratio"):
        VisPruner(keep_tokens=4, important_ratio=ratio)


# What goes together


CLASHES: list[tuple[PruningMethod, PruningMethod, str]] = [
    (FastV(keep_tokens=4), PyramidDrop(keep_tokens=4), "'fastv' and 'pyramiddrop' both.*layer"),
    (SparseVLM(keep_tokens=4), FastV(keep_tokens=4), "'sparsevlm' and 'fastv' both.*layer"),
    (
        FlowCut(keep_tokens=9, llm_prune_layer=1, llm_keep_tokens=4),
        FastV(keep_tokens=4),
        "'flowcut' and 'fastv' both.*layer",
    ),
    (VisionZip(keep_tokens=4), VisPruner(keep_tokens=4), "'visionzip' and 'vispruner' both.*tower"),
    (FlowCut(keep_tokens=4), VisionZip(keep_tokens=4), "'flowcut' and 'visionzip' both.*tower"),
    (DivPrune(keep_tokens=4), RandomPruning(keep_tokens=4), "'divprune' and 'random' both.*bridge"),
]


@pytest.mark.parametrize(("one", "two", "message"), CLASHES)
def test_clashes_are_refused(one: PruningMethod, two: PruningMethod, message: str) -> None:
    with LMMParts(tiny.tiny_llava()) as parts, pytest.raises(SettingsError, match=message):
        one_image(parts, one, two)


def test_flowcut_and_fastv() -> None:
    """FastV's ratio is of the 36 unpruned tokens; 9 of the 12 that FlowCut leaves stay."""
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        alone = one_image(parts, FlowCut(keep_tokens=12), count=2)
        both = one_image(parts, FlowCut(keep_tokens=12), FastV(keep_ratio=0.25), count=2)
        cached = generated(both)
        assert cached == generated(both, use_cache=False)
        for one, two in zip(alone.report().images, both.report().images, strict=True):
            assert dict(two.per_station) == {"tower": 12, "bridge": 12, "layer": 9}
            assert two.decoder_layer_tokens == (12, 12, 9, 9)
            assert set(two.kept.tolist()) < set(one.kept.tolist())
        # With more wanted than are left, nothing happens in the decoder.
        idle = one_image(parts, FlowCut(keep_tokens=12), FastV(keep_ratio=0.5), count=2)
        assert not idle.cuts_layers
        assert torch.equal(forward(idle).logits, forward(alone).logits)


def test_visionzip_and_fastv() -> None:
    """Merged tokens that FastV keeps still name the patches that they stand for."""
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        zipped = VisionZip(keep_tokens=12, contextual_tokens=6)
        alone = one_image(parts, zipped).report().images[0]
        both = one_image(parts, zipped, FastV(keep_tokens=8, layer=1))
        assert generated(both) == generated(both, use_cache=False)
        report = both.report().images[0]
    assert report.decoder_layer_tokens == (12, 8, 8, 8)
    assert set(report.kept.tolist()) < set(alone.kept.tolist())
    assert len(alone.merged) > len(report.merged) > 0
    assert report.merged == {i: alone.merged[i] for i in report.kept.tolist() if i in alone.merged}


def test_divprune_and_pyramiddrop() -> None:
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        alone = one_image(parts, DivPrune(keep_tokens=(15, 20)), count=2).report().images
        methods = (DivPrune(keep_tokens=(15, 20)), PyramidDrop(keep_ratio=0.125))
        both = one_image(parts, *methods, count=2)
        assert generated(both) == generated(both, use_cache=False)
        reports = both.report().images
    # The stages leave 18, 9 and 4 of 36: the first finds only 15 tokens of image 0.
    assert reports[0].decoder_layer_tokens == (15, 15, 9, 4)
    assert reports[1].decoder_layer_tokens == (20, 18, 9, 4)
    for one, two in zip(alone, reports, strict=True):
        assert set(two.kept.tolist()) < set(one.kept.tolist())


def test_visionzip_and_sparsevlm_merge_twice() -> None:
    """Patches merged behind the tower come along when their token is merged again."""
    with torch.no_grad(), LMMParts(tiny.tiny_llava("siglip")) as parts:
        zipped = VisionZip(keep_tokens=30, contextual_tokens=20)
        both = one_image(parts, zipped, SparseVLM(stage_keep_tokens=(5, 5, 2)))
        assert generated(both) == generated(both, use_cache=False)
        report, first = both.report().images[0], both.tokens[0]
        request = both._request
    assert request is not None
    assert first.members is not None
    stands_for = dict(enumerate(first.members))
    assert sorted(one for group in stands_for.values() for one in group) == list(range(N))
    members = request.members[0]
    assert any(len(group) > 1 for group in members.values())
    for carrier, group in members.items():
        want = sorted(patch for token in group for patch in stands_for[token])
        assert list(report.merged[int(first.index[carrier])]) == want


def test_encoded_images_must_have_what_the_method_looks_at() -> None:
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        inputs = tiny.batch([tiny.prompt(1, I, 6)], tiny.images(1))
        encoded = encode(parts, inputs, VisionZip.observes)
        for method in (VisionZip(keep_tokens=9), VisPruner(keep_tokens=9), DivPrune(keep_tokens=9)):
            got = prepare(parts, inputs, [method], encoded=encoded)
            want = prepare(parts, inputs, [method])
            assert torch.equal(got.tokens[0].features, want.tokens[0].features)
        bare = encode(parts, inputs)
        with pytest.raises(UnsupportedError, match="looks at .'relay'. of layer 4"):
            prepare(parts, inputs, [VisPruner(keep_tokens=9)], encoded=bare)
