"""What VFlowOpt keeps, merges and refuses, checked against independent computations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import LMMParts
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.stations.handed import CACHE
from tests import tiny
from tests.tiny_vflowopt import (
    DEPTH,
    ONE,
    PROMPTS,
    RATIOS,
    SIDE,
    STATS,
    G,
    I,
    N,
    outcome,
    ready,
    vflowopt,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_llava()


@pytest.fixture(scope="module")
def parts(model: Any) -> LMMParts:
    return LMMParts(model, STATS, name="tiny")


# -- the map, the counts and the provenance --------------------------------------------------


@torch.no_grad()
def tower_map(tower: str, pixels: Tensor, layer: int) -> Tensor:
    """Head-mean attention [B, N, N] among the patches, from the tower's own eager attention."""
    module = tiny.tiny_llava(tower, attn="eager").model.vision_tower
    attention = module(pixels, output_attentions=True).attentions[layer].mean(dim=1)
    lead = attention.shape[-1] - N
    attention = attention[:, lead:, lead:]
    return attention / attention.sum(dim=-1, keepdim=True)


def relevance_of(attention: Tensor, threshold: float) -> Tensor:
    received = attention.mean(dim=0)
    chosen = received > threshold / N
    return attention[chosen].mean(dim=0)


def staged(scores: Tensor, ratios: Sequence[float], side: float) -> tuple[Any, Any, list[set[int]]]:
    """Plain tokens, cells (carrier to members) and kept sets of the three stages, in Python."""
    order = sorted(range(N), key=lambda place: (-float(scores[place]), place))
    low = min(N, round(N * (1 - ratios[0])) + int(N / side**2))
    plain, cells = set(order[: N - low]), {}
    for place in order[N - low :]:
        cells.setdefault((place // G // side, place % G // side), []).append(place)
    carriers = {members[0]: tuple(sorted(members)) for members in cells.values()}
    kept = [plain | set(carriers)]
    for ratio in ratios[1:]:
        n = len(kept[-1])
        left = [place for place in order if place in kept[-1]]
        kept.append(set(left[: n - round(n * (1 - ratio))]))
    return plain, carriers, kept


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize(("tower", "layer"), [("clip", 4), ("siglip", 4)])
def test_every_stage_keeps_what_the_towers_attention_says(
    tower: str, layer: int, text: str
) -> None:
    pixels = tiny.images(1, seed=3)
    model = tiny.tiny_llava(tower, text)
    scores = relevance_of(tower_map(tower, pixels, layer)[0], 1.0)
    plain, carriers, kept = staged(scores, RATIOS, SIDE)
    assert len(carriers) > 3
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = ready(parts, vflowopt(), pixels=pixels)
        (tokens,) = prepared.tokens
        stock = model.get_image_features(pixels).pooler_output[0]
        cache = DynamicCache()
        with prepared.active():
            model(**prepared.model_inputs, **{CACHE: cache})
        (report,) = prepared.report().images
    # Stage 0: the set, the merged features and what they stand for.
    assert set(tokens.index.tolist()) == kept[0]
    assert tokens.scores is not None
    torch.testing.assert_close(tokens.scores, scores[tokens.index], atol=1e-5, rtol=0)
    for place, feature in zip(tokens.index.tolist(), tokens.features, strict=True):
        members = list(carriers.get(place, (place,)))
        weight = scores[members] / scores[members].sum()
        torch.testing.assert_close(feature, weight @ stock[members], atol=2e-4, rtol=0)
        if place in plain:
            assert feature.equal(stock[place])
    # Stages 1 and 2.
    counts = [len(one) for one in kept]
    assert len(set(counts)) == 3
    assert list(report.decoder_layer_tokens) == [counts[0], counts[1], counts[1], counts[2]]
    words = len(ONE[0]) - N
    lengths = [cache.get_seq_length(layer) for layer in range(DEPTH)]
    assert lengths == [words + count for count in report.decoder_layer_tokens]
    assert report.per_station == {"tower": N, "bridge": counts[0], "layer": counts[2]}
    assert set(report.kept.tolist()) == kept[2]
    want = {c: m for c, m in carriers.items() if len(m) > 1 and c in kept[2]}
    assert report.merged == want


@pytest.mark.parametrize(("threshold", "fallback"), [(1.0, False), (1e5, True)])
def test_the_report_tells_the_anchors(parts: LMMParts, threshold: float, fallback: bool) -> None:
    pixels = tiny.images(1, seed=3)
    with torch.no_grad():
        prepared = ready(parts, vflowopt(anchor_threshold=threshold), pixels=pixels)
        notes = prepared.report().images[0].notes
    received = tower_map("clip", pixels, 4)[0].mean(dim=0)
    count = 1 if fallback else int((received > threshold / N).sum())
    assert notes["anchors_per_crop"] == (count,)
    assert notes["anchor_fallback"] is fallback
    assert notes["recycled_tokens"] > 0


def test_merged_tokens_cover_all_low_tokens_that_are_still_represented(
    model: Any, parts: LMMParts
) -> None:
    for ratios in ((0.6, 1.0, 1.0), RATIOS, (0.3, 0.9, 0.9)):
        prepared = ready(parts, vflowopt(stage_keep_ratios=ratios))
        _, (report,) = outcome(model, prepared)
        (tokens,) = prepared.tokens
        assert tokens.members is not None
        everything = [place for members in tokens.members for place in members]
        assert sorted(everything) == list(range(N))
        left = set(report.kept.tolist())
        represented = [
            place
            for carrier, members in zip(tokens.index.tolist(), tokens.members, strict=True)
            for place in members
            if carrier in left
        ]
        told = [place for members in report.merged.values() for place in members]
        alone = left - set(report.merged)
        assert sorted([*told, *alone]) == sorted(represented)
        if ratios[1] == 1.0:
            assert sorted(represented) == list(range(N))


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_attention_layer(layer: int, parts: LMMParts) -> None:
    pixels = tiny.images(1, seed=3)
    scores = relevance_of(tower_map("clip", pixels, layer)[0], 1.0)
    prepared = ready(parts, vflowopt(attention_layer=layer), pixels=pixels)
    assert set(prepared.tokens[0].index.tolist()) == staged(scores, RATIOS, SIDE)[2][0]


def test_attention_layer_too_deep(parts: LMMParts) -> None:
    with pytest.raises(SettingsError, match=r"attention_layer=6.* 6 layers: give 0 to 5"):
        ready(parts, vflowopt(attention_layer=6))


def test_smaller_ratios_inside_the_model_keep_subsets(model: Any, parts: LMMParts) -> None:
    for stage in (1, 2):
        kept = []
        for ratio in (0.9, 0.6, 0.2):
            ratios = [0.7, 1.0, 1.0]
            ratios[stage] = ratio
            prepared = ready(parts, vflowopt(stage_keep_ratios=tuple(ratios)))
            kept.append(set(outcome(model, prepared)[1][0].kept.tolist()))
        assert kept[0] > kept[1] > kept[2]


def test_one_token_survives_the_smallest_ratios(model: Any, parts: LMMParts) -> None:
    method = vflowopt(stage_keep_ratios=(0.01, 0.01, 0.01), merge_grid_size="off")
    logits, reports = outcome(model, ready(parts, method, PROMPTS))
    assert bool(logits.isfinite().all())
    # The three images of one prompt are ranked together from stage 1 on.
    assert [report.decoder_layer_tokens[0] for report in reports] == [1] * 5
    assert [len(reports[image].kept) for image in (0, 4)] == [1, 1]
    assert sum(len(report.kept) for report in reports[1:4]) == 1


@pytest.mark.parametrize("weight", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 1e6])
def test_nothing_ever_becomes_nan(
    model: Any, parts: LMMParts, threshold: float, weight: float
) -> None:
    method = vflowopt(anchor_threshold=threshold, entropy_weight=weight, merge_grid_size=1.5)
    flat = torch.cat([torch.zeros(1, 3, 24, 24), torch.full((1, 3, 24, 24), 1.5)])
    prompts = [tiny.prompt(1, I, 5), tiny.prompt(1, I, 6, 7)]
    prepared = ready(parts, method, prompts, flat)
    for tokens in prepared.tokens:
        assert bool(tokens.features.isfinite().all())
        assert tokens.scores is not None
        assert bool(tokens.scores.isfinite().all())
    logits, reports = outcome(model, prepared)
    assert bool(logits.isfinite().all())
    assert all(report.kept.diff().min() > 0 for report in reports)


# -- options -----------------------------------------------------------------------------------


def test_entropy_changes_the_ranking_and_needs_the_processors_numbers(parts: LMMParts) -> None:
    pixels = torch.zeros(1, 3, 24, 24)
    pixels[..., 12:] = tiny.images(1)[..., 12:]
    plain, more, less = (
        ready(parts, vflowopt(entropy_weight=w, stage_keep_ratios=(1.0, 0.5, 1.0)), pixels=pixels)
        .tokens[0]
        .scores
        for w in (0.0, 1.0, -0.5)
    )
    assert plain is not None
    assert more is not None
    assert less is not None
    assert float(plain.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(more.sum()) == pytest.approx(2.0, abs=1e-5)
    torch.testing.assert_close(less, plain - 0.5 * (more - plain), atol=1e-6, rtol=0)
    # The flat half has entropy 0; that of the noisy half is above.
    bonus = (more - plain).view(G, G)
    flat, noisy = bonus[:, : G // 2], bonus[:, G // 2 :]
    assert float(flat.max() - flat.min()) < 1e-6
    assert float(noisy.min()) > 10 * float(flat.max())
    with LMMParts(tiny.tiny_llava()) as bare:
        with pytest.raises(SettingsError, match="image processor's mean and deviation"):
            ready(bare, vflowopt(entropy_weight=0.5))
        ready(bare, vflowopt(entropy_weight=0.5, entropy_mode="released"))


def test_entropy_modes_differ(parts: LMMParts) -> None:
    """Half of a patch at 0 and half at 128: one bit, or none where values wrap around."""
    ratios = (1.0, 0.5, 1.0)
    level = (torch.tensor([0.0, 128 / 255]) - 0.5) / 0.25
    pixels = torch.full((1, 3, 24, 24), float(level[0]))
    pixels[..., :4, 2:4] = float(level[1])
    with LMMParts(tiny.tiny_llava(), ((0.5,) * 3, (0.25,) * 3)) as own:
        scores = [
            ready(
                own,
                vflowopt(entropy_weight=weight, entropy_mode=mode, stage_keep_ratios=ratios),
                pixels=pixels,
            )
            .tokens[0]
            .scores
            for weight, mode in ((0.0, "grayscale"), (1.0, "grayscale"), (1.0, "released"))
        ]
    plain, grey, released = (one for one in scores if one is not None)
    bonus = torch.zeros(N)
    bonus[0] = 1.0
    torch.testing.assert_close(grey - plain, bonus.softmax(0), atol=1e-6, rtol=0)
    assert not torch.allclose(released, grey, atol=1e-4)


def test_protected_tokens_rank_by_their_cells_total(model: Any, parts: LMMParts) -> None:
    plain, protected = (
        ready(parts, vflowopt(protect_recycled=own)).tokens[0] for own in (False, True)
    )
    assert plain.index.equal(protected.index)
    assert plain.features.equal(protected.features)
    whole = ready(parts, vflowopt(stage_keep_ratios=(1.0, 0.5, 1.0))).tokens[0].scores
    assert whole is not None
    assert plain.members is not None
    assert plain.scores is not None
    assert protected.scores is not None
    for spot, members in enumerate(plain.members):
        assert float(plain.scores[spot]) == float(whole[list(members)].max())
        total = float(whole[list(members)].sum())
        assert float(protected.scores[spot]) == pytest.approx(total, abs=1e-6)
    _, (one,) = outcome(model, ready(parts, vflowopt()))
    _, (other,) = outcome(model, ready(parts, vflowopt(protect_recycled=True)))
    assert len(other.merged) > len(one.merged)


@pytest.mark.parametrize("grid", [1.0, 2.0, 3.0, 9.0])
def test_exact_budget(model: Any, parts: LMMParts, grid: float) -> None:
    for ratio in (0.1, 0.4, 0.8):
        method = vflowopt(
            stage_keep_ratios=(ratio, 1.0, 1.0), merge_grid_size=grid, exact_budget=True
        )
        (report,) = outcome(model, ready(parts, method))[1]
        assert report.decoder_layer_tokens == (round(ratio * N),) * DEPTH
        assert report.merged


def test_without_recycling_tokens_are_dropped(model: Any, parts: LMMParts) -> None:
    prepared = ready(parts, vflowopt(merge_grid_size="off"))
    (tokens,) = prepared.tokens
    stock = ready(parts, VFlowOpt(keep_ratio=1.0)).tokens[0].features
    assert len(tokens) == N - round(N * 0.4)
    assert tokens.members is None
    torch.testing.assert_close(tokens.features, stock[tokens.index], atol=1e-6, rtol=0)
    assert outcome(model, prepared)[1][0].merged == {}


def test_keep_tokens_is_the_mean_over_the_layers(model: Any, parts: LMMParts) -> None:
    method = VFlowOpt(keep_tokens=12, profile="none", merge_grid_size="off", stage_layers=(1, 2))
    (report,) = outcome(model, ready(parts, method))[1]
    assert report.mean_decoder_tokens == pytest.approx(12, abs=0.75)
    same = VFlowOpt(keep_ratio=12 / N, profile="none", merge_grid_size="off", stage_layers=(1, 2))
    (other,) = outcome(model, ready(parts, same))[1]
    assert other.decoder_layer_tokens == report.decoder_layer_tokens
    assert other.kept.equal(report.kept)


@pytest.mark.parametrize("position_ids", ["auto", "compact", "original"])
def test_positions(position_ids: str) -> None:
    """Renumbered in front of the model, or not; inside it tokens keep what they had."""
    model, seen = tiny.tiny_llava(), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
        )
    with LMMParts(model) as parts:
        prepared = ready(parts, vflowopt(position_ids=position_ids))
        (report,) = outcome(model, prepared)[1]
    (tokens,) = prepared.tokens
    end = 2 + len(tokens) if position_ids != "original" else 2 + N
    place = torch.arange(len(tokens)) if position_ids != "original" else tokens.index
    want = torch.cat([torch.arange(2), place + 2, torch.arange(end, end + 2)])
    assert seen[0].tolist() == want.tolist()
    left = torch.isin(tokens.index, report.kept)
    want = torch.cat([torch.arange(2), place[left] + 2, torch.arange(end, end + 2)])
    # The hooks here were there first, and see what the model gives its layers.
    assert len(tokens) > len(report.kept)
    request = prepared._request
    assert request is not None
    origin = seen[0][request.layout.origin[0]]
    assert origin.tolist() == want.tolist()


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give a budget"),
        ({"keep_ratio": 0.0}, r"keep_ratio must be a number in \(0, 1\], got 0.0"),
        ({"keep_ratio": 1.2}, r"keep_ratio must be a number in \(0, 1\], got 1.2"),
        ({"keep_tokens": 0}, "keep_tokens must be an integer >= 1"),
        ({"keep_ratio": 0.5, "keep_tokens": 9}, "both given"),
        ({"stage_keep_ratios": (0.5, 0.0, 1.0)}, r"three numbers in \(0, 1\], got \[0.5, 0.0"),
        ({"stage_keep_ratios": (0.5, 1.1, 1.0)}, r"three numbers in \(0, 1\]"),
        ({"stage_keep_ratios": (0.5, 1.0)}, "stage_keep_ratios"),
        ({"keep_ratio": 0.5, "stage_layers": (0, 2)}, "layer 0 is never cut"),
        ({"keep_ratio": 0.5, "stage_layers": (3, 2)}, r"must be rising.*got \[3, 2\]"),
        ({"keep_ratio": 0.5, "stage_layers": (2, 2)}, "must be rising"),
        ({"keep_ratio": 0.5, "entropy_weight": 1.1}, "entropy_weight"),
        ({"keep_ratio": 0.5, "entropy_weight": float("nan")}, "entropy_weight"),
        ({"keep_ratio": 0.5, "anchor_threshold": -1.0}, "anchor_threshold"),
        ({"keep_ratio": 0.5, "anchor_threshold": float("inf")}, "anchor_threshold"),
        ({"keep_ratio": 0.5, "merge_grid_size": 0.5}, "at least 1 or 'off', got 0.5"),
        ({"keep_ratio": 0.5, "merge_grid_size": True}, "at least 1 or 'off', got True"),
        ({"keep_ratio": 0.5, "merge_grid_size": float("nan")}, "merge_grid_size"),
        ({"keep_ratio": 0.5, "attention_layer": -1}, "attention_layer"),
        ({"keep_ratio": 0.5, "entropy_mode": "grey"}, "entropy_mode"),
        ({"keep_ratio": 0.5, "profile": ""}, "profile"),
        ({"keep_ratio": 0.5, "merge_grid": 3}, "did you mean 'merge_grid_size'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        VFlowOpt(**settings)


def test_off_in_yaml_is_a_boolean() -> None:
    assert VFlowOpt(keep_ratio=0.5, merge_grid_size=False).merge_grid_size == "off"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage_layers": (1, 4)}, r"stage_layers are \[1, 4\].*1\.\.3.*4 decoder layers"),
        ({"stage_layers": (7, 9)}, r"stage_layers are \[7, 9\].*1\.\.3"),
        ({"keep_ratio": 0.5}, r"keep 0\.4\d+ .*over 4 decoder layers, but keep_ratio is 0.5000"),
        ({"profile": "no-such"}, "neither a file nor a built-in profile"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_tower_runs(
    parts: LMMParts, settings: dict[str, Any], message: str
) -> None:
    ran: list[int] = []
    tower = parts.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(SettingsError, match=message):
            ready(parts, vflowopt(**settings))
        assert ran == []
        # Without an image the method has nothing to say.
        ready(parts, vflowopt(**settings), [tiny.prompt(1, 9, 11)])
    finally:
        handle.remove()


def test_two_decoder_layers_are_too_few() -> None:
    model = tiny.tiny_llava(language={"num_hidden_layers": 2})
    match = "2 decoder layers; two stages inside it need"
    with LMMParts(model) as parts, pytest.raises(SettingsError, match=match):
        ready(parts, VFlowOpt(keep_ratio=0.5))
