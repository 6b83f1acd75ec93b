"""VFlowOpt inside whole models: identity, causality, caches, batches, several requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.stations.handed import CACHE
from tests import tiny
from tests.tiny_vflowopt import (
    DEPTH,
    IMAGES_OF,
    LAYERS,
    ONE,
    PROMPTS,
    STATS,
    I,
    N,
    generated,
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


# -- nothing to prune --------------------------------------------------------------------------

WHOLE = [
    VFlowOpt(keep_ratio=1.0),
    VFlowOpt(keep_tokens=N),
    VFlowOpt(stage_keep_ratios=(1.0, 1.0, 1.0)),
    VFlowOpt(keep_ratio=1.0, position_ids="original", entropy_weight=0.5, profile="none"),
]


@pytest.mark.parametrize("method", WHOLE, ids=range(len(WHOLE)))
def test_nothing_to_prune_is_bit_identical(model: Any, method: VFlowOpt) -> None:
    stock = tiny.tiny_llava()
    inputs = tiny.batch(PROMPTS, tiny.images(5))
    with torch.no_grad(), LMMParts(tiny.tiny_llava()) as parts:
        prepared = prepare(parts, inputs, [method])
        want = stock(**inputs, output_hidden_states=True)
        with prepared.active():
            got = parts.model(**prepared.model_inputs, output_hidden_states=True)
        assert got.logits.equal(want.logits)
        for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
            assert ours.equal(theirs)
        ids = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert (
            generated(parts.model, prepared)[0] == ids[:, inputs["input_ids"].shape[1] :].tolist()
        )
    assert [report.kept.tolist() for report in prepared.report().images] == [list(range(N))] * 5


def test_a_whole_image_beside_pruned_ones(model: Any, parts: LMMParts) -> None:
    method = VFlowOpt(keep_ratio=(1.0, 0.5), profile="none", stage_layers=LAYERS)
    prompts = [tiny.prompt(1, I, 5), tiny.prompt(1, I, 6)]
    _, (whole, half) = outcome(model, ready(parts, method, prompts))
    assert whole.decoder_layer_tokens == (N,) * DEPTH
    assert half.mean_decoder_tokens == pytest.approx(N / 2, abs=1)


def test_the_calibrations_objective_is_1_when_nothing_is_pruned(parts: LMMParts) -> None:
    from mmlm_efficient.calibration.vflowopt import last_state

    inputs = tiny.batch(ONE, tiny.images(1))

    def cosine(method: VFlowOpt) -> float:
        with torch.no_grad():
            full, pruned = (last_state(parts, inputs, own) for own in ((), (method,)))
        return float(torch.cosine_similarity(full, pruned, dim=0))

    assert cosine(vflowopt(stage_keep_ratios=(1.0, 1.0, 1.0))) == pytest.approx(1.0, abs=1e-6)
    assert cosine(vflowopt()) < 0.9999


# -- inside the language model -----------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_no_row_of_any_layer_sees_a_later_token(attn: str) -> None:
    model = tiny.tiny_llava(attn=attn)
    rows: list[Tensor] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda _, __, output: rows.append(output))
    with LMMParts(model) as parts:
        for last in (7, 50):
            outcome(model, ready(parts, vflowopt(), [tiny.prompt(1, 5, I, 6, 9, last)]))
    first, second = rows[:DEPTH], rows[DEPTH:]
    # The outputs of layers 0 and 2 are what their cuts leave.
    assert len({one.shape[1] for one in first}) == 2
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one[:, :-1], other[:, :-1], atol=1e-6, rtol=0)
        assert float((one[:, -1] - other[:, -1]).abs().max()) > 1e-2


@torch.no_grad()
def test_more_tokens_on_the_cache_prune_nothing(model: Any, parts: LMMParts) -> None:
    """Five tokens of a next turn at once, and one by one; positions go on behind the prompt."""
    prepared = ready(parts, vflowopt())
    n_prompt = prepared.model_inputs["input_ids"].shape[1]
    more = torch.tensor([[11, 12, 13, 14, 15]])
    seen: list[Tensor] = []

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][0])

    last = model.model.language_model.layers[-1]
    results = []
    for chunks in ([more], list(more.split(1, dim=1))):
        cache, logits = DynamicCache(), []
        with prepared.active():
            model(**prepared.model_inputs, **{CACHE: cache})
            before = [cache.get_seq_length(layer) for layer in range(DEPTH)]
            handle = last.register_forward_pre_hook(watch, with_kwargs=True)
            for chunk in chunks:
                logits.append(model(input_ids=chunk, **{CACHE: cache}).logits)
            handle.remove()
        after = [cache.get_seq_length(layer) for layer in range(DEPTH)]
        assert [new - old for new, old in zip(after, before, strict=True)] == [5] * DEPTH
        assert torch.cat(seen).tolist() == list(range(n_prompt, n_prompt + 5))
        seen.clear()
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompts", [ONE, PROMPTS], ids=["one", "batch"])
def test_with_and_without_a_cache(model: Any, parts: LMMParts, prompts: list[list[int]]) -> None:
    prepared = ready(parts, vflowopt(), prompts)
    ids, logits = generated(model, prepared)
    plain_ids, plain_logits = generated(model, prepared, use_cache=False)
    assert ids == plain_ids
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=0)


def test_sdpa_and_eager_agree() -> None:
    found = []
    for attn in ("sdpa", "eager"):
        with LMMParts(tiny.tiny_llava(attn=attn)) as parts:
            prepared = ready(parts, vflowopt(), PROMPTS)
            ids, logits = generated(parts.model, prepared)
            kept = [report.kept.tolist() for report in prepared.report().images]
        found.append((ids, kept, logits))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-4, rtol=0)


def test_bfloat16(model: Any, parts: LMMParts) -> None:
    _, want = outcome(model, ready(parts, vflowopt(), PROMPTS))
    with LMMParts(tiny.tiny_llava().bfloat16()) as half:
        prepared = ready(half, vflowopt(), PROMPTS, tiny.images(5).bfloat16())
        logits, reports = outcome(half.model, prepared)
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())
    for tokens, report, other in zip(prepared.tokens, reports, want, strict=True):
        assert tokens.features.dtype == torch.bfloat16
        assert tokens.scores is not None
        assert tokens.scores.dtype == torch.float32
        # Coarser attention may move a token or two across a boundary.
        common = set(report.kept.tolist()) & set(other.kept.tolist())
        assert len(common) >= 0.6 * len(other.kept)


def test_a_static_cache_is_refused(model: Any, parts: LMMParts) -> None:
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    prepared = ready(parts, vflowopt())
    match = "StaticCache cannot hold"
    with torch.no_grad(), prepared.active(), pytest.raises(UnsupportedError, match=match):
        model(**prepared.model_inputs, **{CACHE: cache})


# -- batches -----------------------------------------------------------------------------------

# A mean of every image of a call; images of one prompt share theirs.
BUDGETS = (0.5, 0.35, 0.35, 0.35, 0.7)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_prompt_alone_and_in_a_batch(model: Any, parts: LMMParts, padding_side: Any) -> None:
    settings: dict[str, Any] = {"stage_keep_ratios": None, "stage_layers": (2, 3)}
    pixels = tiny.images(5)
    batched = ready(
        parts,
        vflowopt(keep_ratio=BUDGETS, profile="none", **settings),
        PROMPTS,
        pixels,
        padding_side=padding_side,
    )
    with torch.no_grad(), batched.active():
        logits = model(**batched.model_inputs).logits
    reports = batched.report().images
    left = batched._request.layout.mask if batched._request is not None else batched.layout.mask
    if padding_side == "left":
        ids, _ = generated(model, batched)
    for sample, images in enumerate(IMAGES_OF):
        budgets = tuple(BUDGETS[image] for image in images)
        own = vflowopt(keep_ratio=budgets or 0.5, profile="none", **settings)
        alone = ready(parts, own, [PROMPTS[sample]], pixels[list(images)] if images else None)
        want, want_reports = outcome(model, alone)
        last = int(left[sample].nonzero()[-1])
        torch.testing.assert_close(logits[sample, last], want[0], atol=1e-4, rtol=0)
        for image, report in zip(images, want_reports, strict=True):
            assert reports[image].kept.equal(report.kept)
            assert reports[image].merged == report.merged
            assert reports[image].decoder_layer_tokens == report.decoder_layer_tokens
            assert reports[image].sample == sample
        if padding_side == "left":
            assert ids[sample] == generated(model, alone)[0][0]


def test_budgets_are_met_on_average(model: Any, parts: LMMParts) -> None:
    method = VFlowOpt(
        keep_ratio=(0.3, 0.6, 0.8), profile="none", merge_grid_size="off", stage_layers=(1, 2)
    )
    prompts = [tiny.prompt(1, I, 5), tiny.prompt(1, I, 6), tiny.prompt(1, I, 7)]
    _, reports = outcome(model, ready(parts, method, prompts))
    means = [report.mean_decoder_tokens / N for report in reports]
    assert means == pytest.approx([0.3, 0.6, 0.8], abs=0.03)


def test_images_of_one_prompt_are_ranked_together(model: Any, parts: LMMParts) -> None:
    method = vflowopt(stage_keep_ratios=(0.5, 0.6, 0.5))
    prompt = [tiny.prompt(1, 5, I, 6, I, 7, I, 8, 9)]
    prepared = ready(parts, method, prompt, tiny.images(3, seed=2))
    scores: dict[tuple[int, int], float] = {}
    for tokens in prepared.tokens:
        # Nothing is merged: the best half of every image stays.
        assert tokens.members is None
        assert len(tokens) == N - round(N / 2)
        assert tokens.scores is not None
        pairs = zip(tokens.index.tolist(), tokens.scores.tolist(), strict=True)
        scores |= {(tokens.image, place): score for place, score in pairs}
    _, reports = outcome(model, prepared)
    total = 3 * (N - round(N / 2))
    for stage, (layer, ratio) in enumerate(((1, 0.6), (3, 0.5))):
        total -= round(total * (1 - ratio))
        assert sum(report.decoder_layer_tokens[layer] for report in reports) == total, stage
    kept = {(r.image, place) for r in reports for place in r.kept.tolist()}
    order = sorted(scores, key=lambda one: (-scores[one], one))
    assert kept == set(order[:total])
    assert len({len(report.kept) for report in reports}) > 1
    assert all(report.merged == {} for report in reports)


@pytest.mark.parametrize("budgets", [(0.5, 0.8), (0.3, 1.0)])
def test_images_of_one_prompt_may_have_their_own_budgets(
    model: Any, parts: LMMParts, budgets: tuple[float, float]
) -> None:
    method = VFlowOpt(keep_ratio=budgets, profile="none", stage_layers=LAYERS)
    _, reports = outcome(model, ready(parts, method, [tiny.prompt(1, I, 5, I, 6)]))
    for report, budget in zip(reports, budgets, strict=True):
        r0 = min(1.0, 1.1 * budget)
        assert report.decoder_layer_tokens[0] == N - round(N * (1 - r0))
    mean = sum(report.mean_decoder_tokens for report in reports)
    assert mean == pytest.approx(sum(budgets) * N, abs=1.5)


@pytest.mark.parametrize("budgets", [{"keep_ratio": (1.0,)}, {"keep_tokens": (9, 9, 9)}])
def test_one_budget_per_image(parts: LMMParts, budgets: dict[str, Any]) -> None:
    method = VFlowOpt(profile="none", **budgets)
    with pytest.raises(SettingsError, match=r"values, but the call has 2 image\(s\)"):
        ready(parts, method, [tiny.prompt(1, I, 5), tiny.prompt(1, I, 6)])


def test_requests_do_not_interact(model: Any, parts: LMMParts) -> None:
    """One after the other, interleaved, at the same time, and text alone behind them."""
    methods = [vflowopt(), vflowopt(stage_keep_ratios=(0.4, 0.5, 1.0), stage_layers=(2, 3))]
    pixels = [tiny.images(1, seed=seed) for seed in (5, 6)]
    alone = [
        generated(model, ready(parts, method, ONE, own))[0]
        for method, own in zip(methods, pixels, strict=True)
    ]
    assert alone[0] != alone[1]
    both = [ready(parts, method, ONE, own) for method, own in zip(methods, pixels, strict=True)]
    assert [generated(model, one)[0] for one in reversed(both)] == alone[::-1]
    with ThreadPoolExecutor(2) as pool:
        assert [found[0] for found in pool.map(lambda one: generated(model, one), both)] == alone
    text = ready(parts, methods[0], [tiny.prompt(1, 9, 11)])
    stock = tiny.tiny_llava().generate(
        **tiny.batch([tiny.prompt(1, 9, 11)]), max_new_tokens=5, do_sample=False
    )
    assert generated(model, text)[0] == stock[:, 3:].tolist()
