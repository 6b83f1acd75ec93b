"""LLaVA-OneVision: places of tiles, plain images and videos, and choosing among packed tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import PromptError, UnsupportedError
from mmlm_efficient.families import family_of
from mmlm_efficient.families.base import Visual
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, RandomPruning, UniformPruning
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass
from tests import tiny_families as tiny
from tests.tiny import vision_config
from tests.tiny_families import BOS, Shown

SIDE, GRID, POOLED = tiny.ONEVISION_SIZE, tiny.ONEVISION_GRID, tiny.POOLED_GRID
PATCHES = GRID * GRID
# Sizes of pictures, and rows and columns of the grid that is shown behind the overview.
SIZES = {(20, 20): (5, 5), (40, 40): (10, 10), (60, 20): (15, 5), (58, 60): (10, 10)}


def field(family: Any, visual: Visual) -> Tensor:
    """Packed values [N] of crops whose value is 100 down and 1 across the whole picture."""
    side = math.isqrt(visual.n_crops)
    values = torch.zeros(visual.n_crops, PATCHES, 1)
    index = torch.arange(PATCHES)
    values[0, :, 0] = 100 * (index // GRID) + index % GRID
    for tile in range(visual.n_crops - 1):
        down, across = tile // side, tile % side
        row, col = down * GRID + index // GRID, across * GRID + index % GRID
        values[1 + tile, :, 0] = 100 * row + col
    return family.pack(values, visual, torch.tensor([-7.0]))[:, 0]


@pytest.mark.parametrize("size", SIZES)
def test_places_of_tiles(size: tuple[int, int]) -> None:
    family = family_of(tiny.tiny_model("llava_onevision"))
    inputs = tiny.inputs_of("llava_onevision", [(BOS, Shown(size, 0))], "left")
    (visual,) = family.visuals(inputs)
    rows, cols = SIZES[size]
    places = visual.places
    cells = [(0, p // GRID, p % GRID, False) for p in range(PATCHES)]
    cells += [(1, row, col, col == cols) for row in range(rows) for col in range(cols + 1)]
    columns = (places.source, places.row, places.col, places.newline)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == cells
    assert places.shapes == ((GRID, GRID), (rows, cols))
    # Tokens may be resized: they are no single patches.
    assert places.crop is None
    assert places.patch is None
    assert family.tokens_of(visual) == int((inputs["input_ids"] == tiny.IMAGE).sum())


@pytest.mark.parametrize("size", [(40, 40), (58, 60)])
def test_places_are_where_the_features_come_from(size: tuple[int, int]) -> None:
    """A value that grows down and across the picture grows with row and column."""
    family = family_of(tiny.tiny_model("llava_onevision"))
    inputs = tiny.inputs_of("llava_onevision", [(BOS, Shown(size, 0))], "left")
    (visual,) = family.visuals(inputs)
    packed, places = field(family, visual), visual.places
    assert (packed[places.newline] == -7.0).all()
    shown = ~places.newline & (places.source == 1)
    # (10, 10) of 10 patches, or of 15 shrunk to two thirds (three patches to two tokens).
    step = (math.isqrt(visual.n_crops) * GRID) / places.shapes[1][0]
    row = (packed[shown] / 100).floor()
    want = (places.row[shown] + 0.5) * step - 0.5
    assert float((row - want).abs().max()) <= 0.76
    by_cell = packed[shown].view(places.shapes[1])
    assert (by_cell.diff(dim=0) > 0).all()
    assert (by_cell.diff(dim=1) > 0).all()


def test_places_of_images_of_one_prompt_and_of_videos() -> None:
    family = family_of(tiny.tiny_model("llava_onevision"))
    inputs = tiny.sample_inputs("llava_onevision", "several")
    visuals = family.visuals(inputs)
    assert [visual.n_crops for visual in visuals] == [1, 1, 1, 5]
    plain = visuals[0].places
    assert plain.shapes == ((GRID, GRID),)
    assert plain.newline.tolist() == [False] * PATCHES + [True]
    assert (int(plain.row[-1]), int(plain.col[-1])) == (GRID - 1, GRID)
    inputs = tiny.sample_inputs("llava_onevision", "video")
    video = family.visuals(inputs)[1]
    places = video.places
    assert (video.kind, video.n_crops, places.video) == ("video", 3, True)
    assert places.shapes == ((POOLED, POOLED),) * 3
    assert places.source.tolist() == [0] * 9 + [1] * 9 + [2] * 9 + [3]
    assert places.row[9:18].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert places.col[9:18].tolist() == [0, 1, 2] * 3
    assert places.newline.tolist() == [False] * 27 + [True]
    values = torch.zeros(3, PATCHES, 2)
    values[..., 0] = torch.arange(3).unsqueeze(1)
    values[..., 1] = torch.arange(PATCHES) // GRID
    packed = family.pack(values, video, torch.full((2,), -7.0))
    assert packed[:-1, 0].tolist() == places.source[:-1].tolist()
    assert (packed[:-1, 1].view(3, 3, 3).diff(dim=1) > 0).all()
    assert packed[-1].tolist() == [-7.0, -7.0]


@pytest.mark.parametrize("case", ["one", "uneven", "several", "video", "mixed"])
def test_packing_gives_the_models_own_features(case: str) -> None:
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.sample_inputs("llava_onevision", case)
    with torch.no_grad(), LMMParts(model) as parts:
        visuals = parts.family.visuals(inputs)
        stock = parts.family.stock_features(inputs, visuals)
        encoded = encode(parts, inputs, crops=True)
        assert encoded.crops is not None
        for visual, crops, want in zip(visuals, encoded.crops, stock, strict=True):
            values = parts.family.project(torch.stack([crop.features for crop in crops]))
            got = parts.family.pack(values, visual, parts.family.newline)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# -- FlowCut: the tower only scores ----------------------------------------------------------


def tower_scores(model: Any, pixels: Tensor) -> Tensor:
    """FlowCut's last scores [n, PATCHES] of crops, nothing cut."""
    family = family_of(model)
    job = TowerJob(
        (1,) * len(pixels), PATCHES, family.last_cut_layer, has_cls=False, score_only=True
    )
    tower_pass = FlowCutPass(FlowCut(keep_tokens=1), job)
    with LMMParts(model) as parts, parts.tower.running(tower_pass) as run:
        model.model.vision_tower(pixels)
        assert {tuple(counts) for counts in run.layer_counts} == {(PATCHES,) * 6}
    assert tower_pass.scores is not None
    return tower_pass.scores


@pytest.mark.parametrize("budget", [1, 9, 40])
@pytest.mark.parametrize("size", [(40, 40), (58, 60)])
def test_flowcut_keeps_the_best_packed_tokens(size: tuple[int, int], budget: int) -> None:
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.inputs_of("llava_onevision", [(BOS, 10, Shown(size, 0), 11)], "left")
    with torch.no_grad():
        scores = tower_scores(model, inputs["pixel_values"][0])
        # The model packs scores as it packs features.
        packed, _ = model.model.pack_image_features(
            [scores.unsqueeze(-1)],
            inputs["image_sizes"],
            image_newline=torch.tensor([-1.0]),
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
        flat = packed[0].squeeze(-1)
        best = sorted(range(len(flat)), key=lambda token: -float(flat[token]))[:budget]
        stock = model.model.get_image_features(
            inputs["pixel_values"],
            inputs["image_sizes"],
            batch_num_images=inputs["batch_num_images"],
        ).pooler_output[0]
        with LMMParts(model) as parts:
            prepared = prepare(parts, inputs, [FlowCut(keep_tokens=budget)])
    (tokens,), (report,) = prepared.tokens, prepared.report().images
    assert tokens.index.tolist() == report.kept.tolist() == sorted(best)
    assert report.places is not None
    assert not report.places.newline[report.kept].any()
    torch.testing.assert_close(tokens.features, stock[tokens.index], atol=1e-4, rtol=0)
    assert report.per_station == {"tower": budget, "bridge": budget, "layer": budget}


def test_flowcut_on_a_video_counts_and_keeps_no_newline() -> None:
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.sample_inputs("llava_onevision", "mixed")
    with torch.no_grad(), LMMParts(model) as parts:
        stock = prepare(parts, inputs)
        budgets = (7, 3, 130, 5, 18)
        prepared = prepare(parts, inputs, [FlowCut(keep_tokens=budgets)])
        half = prepare(parts, inputs, [FlowCut(keep_ratio=0.5)]).report().images
    reports = prepared.report().images
    assert [len(report.kept) for report in reports] == [7, 3, 130, 5, 19]
    for number, (tokens, whole) in enumerate(zip(prepared.tokens, stock.tokens, strict=True)):
        places = tokens.places
        # As in a request of its own, an image with nothing to prune keeps its newlines.
        if len(tokens) == len(whole):
            assert number in (2, 4)
        else:
            assert not places.newline[tokens.index].any()
        torch.testing.assert_close(tokens.features, whole.features[tokens.index], atol=1e-4, rtol=0)
    # A share of the tokens that show something.
    shown = [int((~tokens.places.newline).sum()) for tokens in stock.tokens]
    assert [len(report.kept) for report in half] == [count // 2 for count in shown]


def test_bridge_methods_count_newlines_as_tokens() -> None:
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.sample_inputs("llava_onevision", "video")
    with torch.no_grad(), LMMParts(model) as parts:
        (random, _) = prepare(parts, inputs, [RandomPruning(keep_tokens=27)]).report().images
        (uniform, _) = prepare(parts, inputs, [UniformPruning(keep_tokens=6)]).report().images
    assert len(random.kept) == 27
    assert uniform.places is not None
    # Two tokens of each frame.
    assert uniform.places.source[uniform.kept].tolist() == [0, 0, 1, 1, 2, 2]


# -- inputs --------------------------------------------------------------------------------


def test_images_without_their_numbers_are_tiled() -> None:
    """As transformers does for callers that leave batch_num_images out."""
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.inputs_of("llava_onevision", [(BOS, Shown((40, 30), 0), 11)], "left")
    without = {name: value for name, value in inputs.items() if name != "batch_num_images"}
    with torch.no_grad(), LMMParts(model) as parts:
        for methods in ([], [FlowCut(keep_tokens=4)]):
            want = model(**prepare(parts, inputs, methods).model_inputs).logits
            got = model(**prepare(parts, without, methods).model_inputs).logits
            assert torch.equal(got, want)


def test_numbers_of_images_must_add_up() -> None:
    model = tiny.tiny_model("llava_onevision")
    inputs = tiny.sample_inputs("llava_onevision", "several")
    inputs["batch_num_images"] = torch.tensor([3, 2])
    with (
        LMMParts(model) as parts,
        pytest.raises(PromptError, match=r"batch_num_images adds up to 5 image\(s\)"),
    ):
        prepare(parts, inputs, [FlowCut(keep_tokens=4)])


def test_a_clip_tower_must_drop_cls() -> None:
    clip = vision_config("clip", image_size=SIDE)
    assert family_of(
        tiny.tiny_model(
            "llava_onevision", vision_config=clip, vision_feature_select_strategy="default"
        )
    ).tower.has_cls
    with pytest.raises(UnsupportedError, match="cannot be stitched"):
        family_of(tiny.tiny_model("llava_onevision", vision_config=clip))
