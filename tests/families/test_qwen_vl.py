"""Qwen2-VL and Qwen2.5-VL: packed towers, and positions along time, rows and columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.families import family_of
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import FlowCut, KeepMask, PruningMethod, RandomPruning
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_packed import PackedFlowCutPass
from mmlm_efficient.stations.bridge import PaddingSide
from mmlm_efficient.stations.packed_tower import PackedTowerStation, slices_of
from tests import tiny_families as tiny
from tests.tiny_families import BOS, IMAGE, VIDEO, Shown

both = pytest.mark.parametrize("family", tiny.QWEN)


def slow_positions(family: str, prompt: tiny.Prompt) -> list[tuple[int, int, int]]:
    """(time, row, col) of every token of a prompt, by the rule in words: text counts up along all
    axes; an image or video starts where the text stopped, counts its temporal steps (of
    Qwen2.5-VL, in ticks of a quarter second), rows and columns; text goes on behind the longest
    side of its grid."""
    found: list[tuple[int, int, int]] = []
    now = 0
    for part in prompt:
        if isinstance(part, int):
            found.append((now, now, now))
            now += 1
            continue
        # The token that begins it.
        found.append((now, now, now))
        now += 1
        inputs = tiny.inputs_of(family, [(part,)], "left")
        grid = inputs["image_grid_thw" if part.frames is None else "video_grid_thw"][0].tolist()
        steps, rows, cols = grid[0], grid[1] // 2, grid[2] // 2
        tick = 1
        if family == "qwen2_5_vl" and part.frames is not None:
            tick = int(4 * tiny.SECONDS_PER_STEP)
        found += [
            (now + step * tick, now + row, now + col)
            for step in range(steps)
            for row in range(rows)
            for col in range(cols)
        ]
        now += max(rows, cols)
        # And the one that ends it.
        found.append((now, now, now))
        now += 1
    return found


@both
def test_places_and_pictures(family: str) -> None:
    bound = family_of(tiny.tiny_model(family))
    inputs = tiny.sample_inputs(family, "mixed")
    visuals = bound.visuals(inputs)
    assert [visual.kind for visual in visuals] == ["image"] * 3 + ["video"] * 2
    video = visuals[3]
    assert (video.n_crops, video.crop_grids) == (2, ((2, 3),) * 2)
    places = video.places
    assert places.video
    assert places.shapes == ((2, 3), (2, 3))
    assert places.source.tolist() == [0] * 6 + [1] * 6
    assert places.row.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert places.col.tolist() == [0, 1, 2] * 4
    assert not places.newline.any()
    assert places.crop is not None
    assert places.patch is not None
    assert places.crop.tolist() == places.source.tolist()
    assert places.patch.tolist() == list(range(6)) * 2
    # The picture that was cut into patches comes back.
    pictures = bound.crop_pixels(inputs, visuals)
    processor = tiny.tiny_processor(family)
    for shown, got, visual in zip(
        [one for own in tiny.shown_of("mixed") for one in own if one.frames is None],
        pictures,
        visuals,
        strict=False,
    ):
        rows, cols = visual.crop_grids[0]
        size = (8 * rows, 8 * cols)
        assert got.shape == (1, 3, *size)
        image = tiny.picture(shown.size, shown.seed)
        plain = processor.image_processor(image, return_tensors="pt", patch_size=1, merge_size=8)
        grid = plain["image_grid_thw"][0].tolist()
        assert tuple(grid[1:]) == size
        # One pixel per patch: 8 x 8 squares in raster order, two frames that are the same.
        pixels = plain["pixel_values"].view(rows, cols, 8, 8, 3, 2)[..., 0]
        want = pixels.permute(4, 0, 2, 1, 3).reshape(3, *size)
        assert torch.equal(got[0], want)


@both
def test_tokens_are_squares_in_raster_order(family: str) -> None:
    """Features of one changed square of patches change at its token alone in front of layer 0."""
    model = tiny.tiny_model(family)
    bound = family_of(model)
    inputs = tiny.inputs_of(family, [(BOS, Shown((40, 30), 0))], "left")
    (visual,) = bound.visuals(inputs)
    places = visual.places
    rows, cols = visual.crop_grids[0]
    for token in (0, 3, rows * cols - 1):
        changed = inputs["pixel_values"].clone()
        changed[4 * token : 4 * token + 4] = 0.0
        (before,) = bound.crop_pixels(inputs, [visual])
        (after,) = bound.crop_pixels({**inputs, "pixel_values": changed}, [visual])
        differs = (before != after)[0].any(dim=0).nonzero()
        row, col = int(places.row[token]), int(places.col[token])
        assert differs.min(dim=0).values.tolist() == [8 * row, 8 * col]
        assert differs.max(dim=0).values.tolist() == [8 * row + 7, 8 * col + 7]


# -- positions -----------------------------------------------------------------------------


def methods_of(name: str) -> list[PruningMethod]:
    """Methods of the tests of positions."""
    return {
        "random": [RandomPruning(keep_tokens=3)],
        "original": [RandomPruning(keep_tokens=3, position_ids="original")],
        "keep_mask": [KeepMask(mask=[0, 2, 5])],
        "flowcut": [FlowCut(keep_tokens=3)],
        "tower_and_bridge": [FlowCut(keep_tokens=5), RandomPruning(keep_tokens=3)],
    }[name]


def expected_axes(family: str, case: str, prepared: Prepared) -> list[Tensor]:
    """For every prompt, positions [3, n] of the tokens that are left, from the slow ones."""
    found = []
    for sample, prompt in enumerate(tiny.CASES[case]):
        positions = torch.tensor(slow_positions(family, prompt)).T
        ids = tiny.sample_inputs(family, case, sample=sample)["input_ids"][0]
        keep = torch.ones(len(ids), dtype=torch.bool)
        order = sorted((block.start, block.image) for block in prepared.layout.blocks[sample])
        starts = [
            column
            for column in range(len(ids))
            if int(ids[column]) in (IMAGE, VIDEO)
            and (column == 0 or ids[column - 1] != ids[column])
        ]
        for start, (_, image) in zip(starts, order, strict=True):
            tokens = prepared.tokens[image]
            keep[start : start + tokens.n_in] = False
            keep[start + tokens.index] = True
        found.append(positions[:, keep])
    return found


@both
@pytest.mark.parametrize("name", ["random", "original", "keep_mask", "flowcut", "tower_and_bridge"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["uneven", "several", "video", "mixed"])
def test_kept_tokens_keep_their_positions(
    family: str, case: str, side: PaddingSide, name: str
) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, case, side)
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(parts, inputs, methods_of(name), padding_side=side)
    got = prepared.model_inputs["position_ids"]
    mask = prepared.model_inputs["attention_mask"].bool()
    assert got.shape == (3, *mask.shape)
    for sample, want in enumerate(expected_axes(family, case, prepared)):
        assert got[:, sample, mask[sample]].tolist() == want.tolist()
    stock, _ = model.model.get_rope_index(**inputs)
    real = inputs["attention_mask"].bool()
    # The slow rule is the model's own.
    for sample, prompt in enumerate(tiny.CASES[case]):
        assert stock[:, sample, real[sample]].T.tolist() == [
            list(one) for one in slow_positions(family, prompt)
        ]


def decoder_positions(model: Any, seen: list[Tensor]) -> Any:
    """Note the position ids of every forward of the language model."""

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"][-3:])

    return model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)


@both
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["random", "flowcut"])
def test_decoding_goes_on_behind_the_uncut_prompt(family: str, name: str, beams: int) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "mixed")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    stock: list[Tensor] = []
    pruned: list[Tensor] = []
    with torch.no_grad(), LMMParts(model) as parts:
        handle = decoder_positions(model, stock)
        model.generate(**inputs, **options)
        handle.remove()
        prepared = prepare(parts, inputs, methods_of(name))
        handle = decoder_positions(model, pruned)
        model.generate(**prepared.model_inputs, **options)
        handle.remove()
    assert len(stock) == len(pruned) == 4
    assert pruned[0].shape[2] < stock[0].shape[2]
    for want, got in zip(stock[1:], pruned[1:], strict=True):
        assert got.shape == (3, 3 * beams, 1)
        assert got.tolist() == want.tolist()
    ends = torch.tensor([slow_positions(family, prompt)[-1][0] for prompt in tiny.CASES["mixed"]])
    assert pruned[1][0, ::beams, 0].tolist() == (ends + 1).tolist()


@both
def test_compact_positions_are_refused(family: str) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "one")
    with LMMParts(model) as parts:
        for method in (
            RandomPruning(keep_tokens=3, position_ids="compact"),
            FlowCut(keep_tokens=3, position_ids="compact"),
        ):
            with pytest.raises(SettingsError, match="has no meaning in a model"):
                prepare(parts, inputs, [method])


@both
def test_positions_of_the_caller(family: str) -> None:
    """[B, S] count alike along all axes; [3, B, S] and [4, B, S] are taken as they are."""
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "several")
    n_samples, length = inputs["input_ids"].shape
    flat = torch.arange(length).repeat(n_samples, 1) * 2
    three = torch.stack([flat, flat + 1, flat + 2])
    four = torch.cat([flat[None], three])
    method = KeepMask(mask=[1, 4])
    with torch.no_grad(), LMMParts(model) as parts:
        for given, axes in (
            (flat, flat.expand(3, -1, -1)),
            (flat[:1], flat.expand(3, -1, -1)),
            (three, three),
            (three[:, :1], three),
            (four, three),
        ):
            prepared = prepare(parts, {**inputs, "position_ids": given}, [method])
            got, mask = prepared.model_inputs["position_ids"], prepared.layout.mask
            for sample in range(n_samples):
                origin = prepared.layout.origin[sample, mask[sample]]
                assert torch.equal(got[:, sample, mask[sample]], axes[:, sample, origin])
            stock = prepare(parts, {**inputs, "position_ids": given})
            want = model(**inputs, position_ids=given).logits
            assert torch.equal(model(**stock.model_inputs).logits, want)
        for wrong in (flat[:, :-1], torch.stack([flat, flat]), flat.flatten()):
            with pytest.raises(PromptError, match="one row per axis"):
                prepare(parts, {**inputs, "position_ids": wrong}, [method])


@both
def test_missing_kinds_of_tokens_are_refused_where_tokens_are_cut(family: str) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "several")
    kinds = inputs.pop("mm_token_type_ids")
    with torch.no_grad(), LMMParts(model) as parts:
        for given in ({}, {"mm_token_type_ids": kinds[:, 1:]}):
            with pytest.raises(PromptError, match="mm_token_type_ids: got"):
                prepare(parts, {**inputs, **given}, [RandomPruning(keep_tokens=3)])
        # The stock model runs without them.
        want = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        got = model.generate(
            **prepare(parts, inputs).model_inputs, max_new_tokens=3, do_sample=False
        )
        assert torch.equal(got, want)


@both
def test_text_that_is_too_long(family: str) -> None:
    model = tiny.tiny_model(family)
    ids = torch.full((1, 2049), 10)
    with LMMParts(model) as parts, pytest.raises(PromptError, match="takes 2049 positions"):
        prepare(parts, {"input_ids": ids}, [RandomPruning(keep_tokens=3)])


# -- FlowCut -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("alignment", ["window", "reference"])
def test_flowcut_equals_a_pass_over_the_tower(family: str, alignment: Any) -> None:
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, "mixed")
    grids = torch.cat([inputs["image_grid_thw"], inputs["video_grid_thw"]])
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values_videos"]])
    slices = slices_of(grids)
    lengths = tuple(rows * cols for rows, cols in slices)
    # Images and videos, each temporal step with the budget of its video.
    budgets = (7, 4, 9, 3, 5)
    per_slice = (7, 4, 9, 3, 3, 5, 5)
    method = FlowCut(keep_tokens=budgets, merge_alignment=alignment)
    job = TowerJob(
        tuple(4 * budget for budget in per_slice),
        max(lengths),
        5,
        has_cls=False,
        lengths=lengths,
        merge_unit=4,
    )
    with torch.no_grad(), LMMParts(model) as parts:
        tower_pass = PackedFlowCutPass(method, job, alignment)
        assert isinstance(parts.tower, PackedTowerStation)
        with parts.tower.running(tower_pass, slices) as run:
            merged = model.model.visual(pixels, grid_thw=grids).pooler_output
        want = run.select(merged)
        prepared = prepare(parts, inputs, [method])
    features = [torch.cat(want[first:stop]) for first, stop in ((0, 1), (1, 2), (2, 3))]
    features += [torch.cat(want[3:5]), torch.cat(want[5:7])]
    for tokens, own in zip(prepared.tokens, features, strict=True):
        torch.testing.assert_close(tokens.features, own, atol=1e-5, rtol=0)
    reports = prepared.report().images
    assert [len(report.kept) for report in reports] == [7, 4, 9, 6, 10]
    for report, budget in zip(reports, budgets, strict=True):
        places = report.places
        assert places is not None
        for step in range(len(places.shapes)):
            assert int((places.source[report.kept] == step).sum()) == budget
        if alignment == "window":
            assert report.cut_layer is not None
            alive = (report.cut_layer == -1).nonzero().squeeze(1)
            assert alive.tolist() == report.kept.tolist()


@both
@pytest.mark.parametrize("case", ["several", "mixed"])
def test_stage_b_keeps_original_positions(family: str, case: str) -> None:
    """Cut behind layer 1: layers 2 and 3 see exactly the tables of the tokens that are left."""
    model = tiny.tiny_model(family)
    inputs = tiny.sample_inputs(family, case)
    method = FlowCut(keep_tokens=5, llm_prune_layer=1, llm_keep_tokens=2)
    tables: list[Tensor] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        tables.append(kwargs["position_embeddings"][0])

    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(parts, inputs, [method])
        handles = [
            layer.register_forward_pre_hook(note, with_kwargs=True)
            for layer in model.model.language_model.layers
        ]
        with prepared.active():
            model(**prepared.model_inputs)
            prefill, request = list(tables), prepared._request
            assert request is not None
            tables.clear()
            model.generate(**prepared.model_inputs, max_new_tokens=3, do_sample=False)
        for handle in handles:
            handle.remove()
    mask, origin = request.layout.mask, request.layout.origin
    for layer in (2, 3):
        for sample in range(len(mask)):
            real = mask[sample]
            want = prefill[0][sample, origin[sample, real]]
            assert torch.equal(prefill[layer][sample, real], want)
    for report in prepared.report().images:
        assert len(report.kept) == 2
        entering = min(report.n_in, report.per_station["bridge"])
        assert report.decoder_layer_tokens == (entering, entering, 2, 2)
    # Three forwards: new tokens have one position, whatever the layer.
    for forward in (1, 2):
        for layer in range(1, 4):
            assert torch.equal(tables[4 * forward + layer], tables[4 * forward])
