"""What holds for every family: nothing pruned is the stock model, batches change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.families import FAMILIES, family_of
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import (
    FlowCut,
    KeepMask,
    NoPruning,
    PruningMethod,
    RandomPruning,
    UniformPruning,
)
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.stations.bridge import PaddingSide
from tests import tiny_families as tiny
from tests.tiny_families import BOS, IMAGE, VIDEO, Shown

PAIRS = [(family, case) for family in tiny.FAMILIES for case in tiny.cases(family)]
SHOWING = [(family, case) for family, case in PAIRS if case != "text"]
BATCHES = [(family, case) for family, case in SHOWING if case != "one"]


def nothing_to_prune(n_tokens: Sequence[int]) -> list[list[Method]]:
    """Methods that leave images of so many tokens whole."""
    whole = KeepMask(mask=[list(range(count)) for count in n_tokens]) if n_tokens else NoPruning()
    return [
        [],
        [NoPruning()],
        [FlowCut(keep_ratio=1.0)],
        [FlowCut(keep_tokens=9999, llm_prune_layer=1, llm_keep_tokens=9999)],
        [RandomPruning(keep_ratio=1.0), FlowCut(keep_ratio=1.0)],
        [UniformPruning(keep_ratio=1.0)],
        [whole],
    ]


def generated(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and stacked logits of a short greedy generation."""
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize(
    ("attn", "side"),
    [
        ("sdpa", "left"),
        pytest.param("sdpa", "right", marks=pytest.mark.slow),
        pytest.param("eager", "left", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_nothing_to_prune_is_bit_identical(
    family: str, case: str, attn: str, side: PaddingSide
) -> None:
    stock, model = tiny.tiny_model(family, attn), tiny.tiny_model(family, attn)
    inputs = tiny.sample_inputs(family, case, side)
    with torch.no_grad(), LMMParts(model) as parts:
        want_logits = stock(**inputs).logits
        want_ids, want_steps = generated(stock, dict(inputs))
        counts = [len(visual.places) for visual in parts.family.visuals(inputs)]
        for methods in nothing_to_prune(counts):
            prepared = prepare(parts, inputs, methods, padding_side=side)
            with prepared.active():
                assert torch.equal(model(**prepared.model_inputs).logits, want_logits)
                ids, steps = generated(model, prepared.model_inputs)
            assert torch.equal(ids, want_ids)
            assert torch.equal(steps, want_steps)
            for report, count in zip(prepared.report().images, counts, strict=True):
                assert report.kept.tolist() == list(range(count))
                assert set(report.per_station.values()) == {count}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_results_depend_on_image_video_and_prompt(family: str) -> None:
    """Guards the tests here: a model that ignores its input would pass them all."""
    model = tiny.tiny_model(family)

    def last(*prompt: int | Shown) -> Tensor:
        with torch.no_grad():
            return model(**tiny.inputs_of(family, [prompt], "left")).logits[0, -1]

    base = last(BOS, 10, Shown((40, 30), 0), 11, 12)
    others = [
        last(BOS, 10, Shown((40, 30), 1), 11, 12),
        last(BOS, 20, Shown((40, 30), 0), 11, 12),
    ]
    if family in tiny.WITH_VIDEO:
        video = [last(BOS, Shown((4, 6), seed, frames=2), 11) for seed in (0, 1)]
        assert float((video[0] - video[1]).abs().max()) > 1e-2
    for other in others:
        assert float((base - other).abs().max()) > 1e-2


# -- batches -------------------------------------------------------------------------------


def numbers_of(case: str) -> list[list[int]]:
    """For every prompt of a case, the numbers in the batch of what it shows: pictures first."""
    shown = [(sample, one) for sample, own in enumerate(tiny.shown_of(case)) for one in own]
    order = [pair for pair in shown if pair[1].frames is None]
    order += [pair for pair in shown if pair[1].frames is not None]
    return [
        [number for number, (sample, _) in enumerate(order) if sample == wanted]
        for wanted in range(len(tiny.CASES[case]))
    ]


# Another budget for every image of a batch, and for the last decoder layers too.
BUDGETS, LAST = (6, 3, 11, 4, 7), (2, 3, 5, 1, 7)


def method(name: str, numbers: Sequence[int]) -> PruningMethod:
    """A method with the budgets of some of a batch's images."""
    tokens = tuple(BUDGETS[number] for number in numbers)
    last = tuple(LAST[number] for number in numbers)
    if name == "flowcut":
        return FlowCut(keep_tokens=tokens)
    if name == "original":
        return FlowCut(keep_tokens=tokens, position_ids="original")
    if name == "two_stage":
        return FlowCut(keep_tokens=tokens, llm_prune_layer=1, llm_keep_tokens=last)
    if name == "layer":
        return FlowCut(keep_ratio=1.0, llm_prune_layer=1, llm_keep_tokens=last)
    if name == "random":
        return RandomPruning(keep_tokens=tokens, seed=3)
    if name == "uniform":
        return UniformPruning(keep_tokens=tokens)
    return KeepMask(mask=[list(range(number, 12, 2)) for number in numbers])


METHODS = ("flowcut", "original", "two_stage", "layer", "random", "uniform", "keep_mask")


def kept_of(prepared: Prepared) -> list[dict[str, Any]]:
    """What a request did to each image, comparable."""
    return [
        {
            "kept": report.kept.tolist(),
            "per_station": report.per_station,
            "layers": report.decoder_layer_tokens,
            "tower": report.layer_counts,
            "cut": None if report.cut_layer is None else report.cut_layer.tolist(),
            "grid": report.grid,
        }
        for report in prepared.report().images
    ]


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "case"), BATCHES)
def test_forward_equals_single(family: str, case: str, name: str, side: PaddingSide) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, case, side)
    numbers = numbers_of(case)
    everything = sorted(number for own in numbers for number in own)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepare(parts, inputs, [method(name, everything)], padding_side=side)
        with together.active():
            logits = model(**together.model_inputs).logits
        found = kept_of(together)
        for sample, own in enumerate(numbers):
            single = tiny.sample_inputs(family, case, side, sample)
            alone = prepare(parts, single, [method(name, own)] if own else [])
            with alone.active():
                want = model(**alone.model_inputs).logits[0]
            got = logits[sample]
            got = got[-len(want) :] if side == "left" else got[: len(want)]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
            assert kept_of(alone) == [found[number] for number in own]
            assert all(together.report().images[number].sample == sample for number in own)


@pytest.mark.parametrize("name", ["flowcut", "two_stage", "random"])
@pytest.mark.parametrize(
    ("family", "case"),
    [(f, "mixed" if f in tiny.WITH_VIDEO else "several") for f in tiny.FAMILIES],
)
def test_generate_equals_single_with_and_without_cache(family: str, case: str, name: str) -> None:
    model = tiny.tiny_model(family)
    numbers = numbers_of(case)
    everything = sorted(number for own in numbers for number in own)
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        # A generated placeholder would ask for features when the whole sequence runs again.
        "suppress_tokens": [IMAGE, VIDEO],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    inputs = tiny.sample_inputs(family, case)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepare(parts, inputs, [method(name, everything)])
        with together.active():
            cached = model.generate(**together.model_inputs, **options)
            again = model.generate(**together.model_inputs, use_cache=False, **options)
        assert torch.equal(cached.sequences, again.sequences)
        torch.testing.assert_close(
            torch.stack(cached.logits), torch.stack(again.logits), atol=1e-4, rtol=0
        )
        for sample, own in enumerate(numbers):
            single = tiny.sample_inputs(family, case, sample=sample)
            alone = prepare(parts, single, [method(name, own)] if own else [])
            with alone.active():
                want = model.generate(**alone.model_inputs, **options)
            assert cached.sequences[sample, -5:].tolist() == want.sequences[0, -5:].tolist()
            for got_step, want_step in zip(cached.logits, want.logits, strict=True):
                torch.testing.assert_close(got_step[sample], want_step[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["none", "flowcut", "two_stage", "random"])
@pytest.mark.parametrize(
    ("family", "case"), [pair for pair in PAIRS if pair[1] in ("several", "video")]
)
def test_beams_of_a_batch_equal_those_of_single_prompts(family: str, case: str, name: str) -> None:
    model = tiny.tiny_model(family)
    numbers = numbers_of(case)
    everything = sorted(number for own in numbers for number in own)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "num_beams": 3,
        "num_return_sequences": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with torch.no_grad(), LMMParts(model) as parts:
        methods = [] if name == "none" else [method(name, everything)]
        together = prepare(parts, tiny.sample_inputs(family, case), methods)
        with together.active():
            got = model.generate(**together.model_inputs, **options)
        for sample, own in enumerate(numbers):
            methods = [] if name == "none" or not own else [method(name, own)]
            alone = prepare(parts, tiny.sample_inputs(family, case, sample=sample), methods)
            with alone.active():
                want = model.generate(**alone.model_inputs, **options)
            rows = slice(3 * sample, 3 * sample + 3)
            torch.testing.assert_close(
                got.sequences_scores[rows], want.sequences_scores, atol=1e-4, rtol=0
            )
            assert got.sequences[rows, -4:].tolist() == want.sequences[:, -4:].tolist()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "case"), SHOWING)
def test_reports_are_complete(family: str, case: str, name: str) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, case)
    with torch.no_grad(), LMMParts(model) as parts:
        visuals = parts.family.visuals(inputs)
        chosen = method(name, range(len(visuals)))
        prepared = prepare(parts, inputs, [chosen])
        with prepared.active():
            model(**prepared.model_inputs)
        tower_layers = len(parts.family.tower.layers)
    for number, (report, visual) in enumerate(zip(prepared.report().images, visuals, strict=True)):
        n_in = len(visual.places)
        kept = report.kept
        assert report.image == number
        assert report.n_in == n_in
        assert report.places is not None
        assert len(report.places) == n_in
        assert report.places.shapes == visual.places.shapes
        assert report.grid == visual.places.shapes[0]
        assert (kept.diff() > 0).all()
        assert 0 <= int(kept[0]) <= int(kept[-1]) < n_in
        assert len(kept) == report.per_station["layer"] == report.decoder_layer_tokens[-1]
        assert report.decoder_layer_tokens[0] == report.per_station["bridge"]
        assert len(report.decoder_layer_tokens) == 4
        assert report.merged == {}
        if name in ("random", "uniform"):
            assert len(kept) == BUDGETS[number]
            assert report.per_station["tower"] == n_in
        if name == "keep_mask":
            assert kept.tolist() == list(range(number, 12, 2))
        if name in ("layer", "two_stage"):
            assert len(kept) == min(LAST[number], report.per_station["bridge"])
        cuts_inside = name in ("flowcut", "original", "two_stage") and parts.family.packs_pruned
        if not cuts_inside or report.per_station["tower"] == n_in:
            assert report.cut_layer is None
            assert report.layer_counts == ()
            continue
        assert report.cut_layer is not None
        assert report.scores is not None
        assert report.cut_layer.shape == report.scores.shape == (n_in,)
        assert len(report.layer_counts) == tower_layers
        assert list(report.layer_counts) == sorted(report.layer_counts, reverse=True)
        bridge = (prepared.tokens[number].index).tolist()
        shown = ~visual.places.newline
        assert bridge == (shown & (report.cut_layer == -1)).nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("name", ["random", "keep_mask", "layer"])
@pytest.mark.parametrize(("family", "case"), BATCHES)
def test_encoded_images_serve_another_request(family: str, case: str, name: str) -> None:
    """The tower's outcome instead of pixels: bit-identical, for the same and for other methods."""
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, case)
    with torch.no_grad(), LMMParts(model) as parts:
        encoded = encode(parts, inputs)
        text = {key: inputs[key] for key in inputs if key not in parts.family.consumed}
        assert not set(text) & set(parts.family.pixel_inputs)
        numbers = range(len(encoded.visuals))
        for methods in ([], [method(name, numbers)]):
            want, got = (
                prepare(parts, inputs, methods),
                prepare(parts, text, methods, encoded=encoded),
            )
            with want.active():
                logits = model(**want.model_inputs).logits
            with got.active():
                assert torch.equal(model(**got.model_inputs).logits, logits)
            assert kept_of(got) == kept_of(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    case = "mixed" if family in tiny.WITH_VIDEO else "several"
    stock, model = (tiny.tiny_model(family).to(dtype) for _ in range(2))
    inputs = {
        name: value.to(dtype) if name.startswith("pixel_values") else value
        for name, value in tiny.sample_inputs(family, case).items()
    }
    with torch.no_grad(), LMMParts(model) as parts:
        want = stock(**inputs).logits
        assert torch.equal(model(**prepare(parts, inputs).model_inputs).logits, want)
        numbers = range(len(parts.family.visuals(inputs)))
        for name in METHODS:
            prepared = prepare(parts, inputs, [method(name, numbers)])
            with prepared.active():
                logits = model(**prepared.model_inputs).logits
            assert logits.dtype == dtype
            assert logits.isfinite().all()
            assert all(tokens.features.dtype == dtype for tokens in prepared.tokens)


# -- families ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_recognises_its_models(family: str) -> None:
    found = family_of(tiny.tiny_model(family))
    assert found.name == family
    assert type(found) in FAMILIES
    assert found.max_context == 2048
    assert set(found.placeholders) == ({"image"} if family == "llava_next" else {"image", "video"})
    assert found.axes == (family in tiny.QWEN)
    assert (found.decoder.heads, found.decoder.kv_heads, found.decoder.head_dim) == (4, 2, 8)
    assert found.identity("x").decoder_width == 32


# -- inputs that do not fit ----------------------------------------------------------------


@pytest.mark.parametrize("methods", [[], [RandomPruning(keep_tokens=3)]], ids=["stock", "random"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_inputs_that_do_not_fit_are_refused(family: str, methods: list[Method]) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "several")
    beside = "image_grid_thw" if family in tiny.QWEN else "image_sizes"
    ids = inputs["input_ids"].clone()
    first = int((ids[0] == IMAGE).nonzero()[0])
    ids[0, first] = 20
    text = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 20)
    broken: list[tuple[str, dict[str, Any]]] = [
        ("pixel_values", {"pixel_values": inputs["pixel_values"][0]}),
        ("pixel_values", {"pixel_values": inputs["pixel_values"][:-1]}),
        (beside, {beside: None}),
        (beside, {beside: inputs[beside][:, :1]}),
        ("pixel_values", {beside: inputs[beside][:-1], "batch_num_images": None}),
        ("placeholders", {"input_ids": ids}),
        (r"4 image\(s\)", {"input_ids": text}),
        (
            r"were given",
            {"pixel_values": None, "image_grid_thw": None, "image_sizes": None},
        ),
    ]
    with torch.no_grad(), LMMParts(model) as parts:
        prepare(parts, inputs, methods)
        for message, change in broken:
            with pytest.raises(PromptError, match=message):
                prepare(parts, {**inputs, **change}, methods)
        with pytest.raises(SettingsError, match=r"the call has 4 image\(s\)"):
            prepare(parts, inputs, [RandomPruning(keep_tokens=(1, 2))])


@pytest.mark.parametrize("family", tiny.WITH_VIDEO)
def test_videos_that_do_not_fit_are_refused(family: str) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "mixed")
    videos = inputs["pixel_values_videos"]
    broken: list[tuple[str, dict[str, Any]]] = [
        ("pixel_values_videos", {"pixel_values_videos": videos[0]}),
        ("counterpart|video_grid_thw", {"pixel_values_videos": videos[:1]}),
        ("were given", {"pixel_values_videos": None}),
        ("were given", {"pixel_values": None, "image_grid_thw": None, "image_sizes": None}),
    ]
    with torch.no_grad(), LMMParts(model) as parts:
        prepare(parts, inputs, [])
        for message, change in broken:
            with pytest.raises(PromptError, match=message):
                prepare(parts, {**inputs, **change}, [FlowCut(keep_tokens=3)])
