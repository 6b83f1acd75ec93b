"""LLaVA-NeXT: places of tiles, and the packing of what a pruned tower leaves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families import family_of
from mmlm_efficient.families.anyres import anyres_places
from mmlm_efficient.families.base import Visual
from mmlm_efficient.packing import packed_crops
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, KeepMask, UniformPruning
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_tower import FlowCutPass
from mmlm_efficient.pruning.observed import Crop
from mmlm_efficient.tokens import TokenPlaces
from tests import tiny_families as tiny
from tests.tiny_families import BOS, Shown

GOLDEN = Path(__file__).parents[1] / "golden" / "flowcut" / "anyres_pack.npz"
SIDE, GRID = tiny.NEXT_SIZE, tiny.NEXT_GRID
PATCHES = GRID * GRID
# (height, width) of pictures.
SIZES = ((24, 24), (40, 30), (22, 61), (48, 21), (70, 70), (16, 60))


def shown_cells(size: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """Tiles of a picture and the padding on each side of their grid, by the rule in words.

    Of the resolutions, the one that shows most pixels of the picture, then the one that wastes
    least; the side that the picture does not fill is padded alike on both sides.
    """
    height, width = size
    best: tuple[int, int, tuple[int, int]] | None = None
    for tall, wide in tiny.pinpoints(SIDE):
        scale = min(wide / width, tall / height)
        scaled = int(height * scale) * int(width * scale)
        shown = min(scaled, height * width)
        rank = (shown, shown - tall * wide, (tall, wide))
        if best is None or rank[:2] > best[:2]:
            best = rank
    assert best is not None
    tall, wide = best[2]
    rows, cols = tall // tiny.PATCH, wide // tiny.PATCH
    if width / height > wide / tall:
        return (rows // GRID, cols // GRID), (rows - int(height * cols / width + 1e-6)) // 2, 0
    return (rows // GRID, cols // GRID), 0, (cols - int(width * rows / height + 1e-6)) // 2


def slow_places(size: tuple[int, int]) -> list[tuple[int, int, int, bool, int, int]]:
    """(source, row, col, newline, crop, patch) of every token, put together one by one."""
    (down, across), top, left = shown_cells(size)
    found = [(0, p // GRID, p % GRID, False, 0, p) for p in range(PATCHES)]
    for row in range(top, down * GRID - top):
        for col in range(left, across * GRID - left):
            crop = 1 + row // GRID * across + col // GRID
            patch = row % GRID * GRID + col % GRID
            found.append((1, row - top, col - left, False, crop, patch))
        found.append((1, row - top, across * GRID - 2 * left, True, -1, -1))
    return found


def listed(places: TokenPlaces) -> list[tuple[Any, ...]]:
    """Places as rows."""
    columns = (places.source, places.row, places.col, places.newline, places.crop, places.patch)
    return list(zip(*(column.tolist() for column in columns if column is not None), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_places(size: tuple[int, int]) -> None:
    family = family_of(tiny.tiny_model("llava_next"))
    inputs = tiny.inputs_of("llava_next", [(BOS, Shown(size, 0))], "left")
    (visual,) = family.visuals(inputs)
    want = slow_places(size)
    assert listed(visual.places) == want
    (down, across), top, left = shown_cells(size)
    assert visual.places.shapes == (
        (GRID, GRID),
        (down * GRID - 2 * top, across * GRID - 2 * left),
    )
    assert visual.n_crops == 1 + down * across
    assert family.tokens_of(visual) == int((inputs["input_ids"] == tiny.IMAGE).sum())
    assert not visual.places.video
    # What the places say is what the model's features are.
    with torch.no_grad(), LMMParts(family.model) as parts:
        (packed,) = family.stock_features(inputs, [visual])
        encoded = encode(parts, inputs, crops=True)
        assert encoded.crops is not None
        crops = family.project(torch.stack([crop.features for crop in encoded.crops[0]]))
    for feature, (_, _, _, newline, crop, patch) in zip(packed, want, strict=True):
        assert torch.equal(feature, family.newline if newline else crops[crop, patch])


def test_the_sizes_differ_as_they_should() -> None:
    """Guards the test above: one and several tiles, padding above and beside, and none."""
    found = [shown_cells(size) for size in SIZES]
    assert len({tiles for tiles, _, _ in found}) >= 4
    assert any(left > 0 for _, _, left in found)
    assert any(top > 0 for _, top, _ in found)
    assert any(top == left == 0 for _, top, left in found)


# -- FlowCut -------------------------------------------------------------------------------


def flowcut_crops(model: Any, pixels: Tensor, target: int) -> list[tuple[Tensor, Tensor]]:
    """Of every crop alone: the patches that FlowCut keeps, and their projected features."""
    family = family_of(model)
    # One picture alone: here the reference's maximum over the batch is that over its crops.
    tower_pass = FlowCutPass(
        FlowCut(keep_tokens=target, crop_sync="batch"),
        TowerJob((target,) * len(pixels), PATCHES, family.last_cut_layer, has_cls=True),
    )
    with LMMParts(model) as parts, parts.tower.running(tower_pass) as run:
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(states[family.feature_layer + 1][:, 1:])
    return list(zip(run.kept, features, strict=True))


@pytest.mark.parametrize("keep_newlines", [False, True])
@pytest.mark.parametrize("target", [6, 20])
@pytest.mark.parametrize("size", [(40, 30), (22, 61), (24, 24)])
def test_flowcut_packs_what_the_crops_keep(
    size: tuple[int, int], target: int, keep_newlines: bool
) -> None:
    model = tiny.tiny_model("llava_next")
    inputs = tiny.inputs_of("llava_next", [(BOS, 10, Shown(size, 0), 11)], "left")
    method = FlowCut(keep_tokens=target, keep_newlines=keep_newlines)
    with torch.no_grad():
        want = flowcut_crops(model, inputs["pixel_values"][0], target)
        with LMMParts(model) as parts:
            prepared = prepare(parts, inputs, [method])
    (tokens,), (report,) = prepared.tokens, prepared.report().images
    kept = [set(patches.tolist()) for patches, _ in want]
    assert all(len(patches) == target for patches in kept)
    index, rows = [], []
    full = slow_places(size)
    with_token = {row for source, row, _, _, crop, patch in full if source and patch in kept[crop]}
    for number, (_, row, _, newline, crop, patch) in enumerate(full):
        if newline:
            if keep_newlines and row in with_token:
                index.append(number)
                rows.append(model.model.image_newline)
        elif patch in kept[crop]:
            index.append(number)
            patches, features = want[crop]
            rows.append(features[patches.tolist().index(patch)])
    assert tokens.index.tolist() == report.kept.tolist() == index
    torch.testing.assert_close(tokens.features, torch.stack(rows), atol=1e-4, rtol=0)
    # Of each crop exactly the budget, less what stood in the padded border.
    assert prepared._run is not None
    assert [len(one) for one in prepared._run.kept] == [target] * len(kept)
    assert report.layer_counts[0] == PATCHES * len(kept)
    assert report.layer_counts[-1] == target * len(kept)
    assert report.per_station["tower"] == len(index)


def test_tiles_are_cut_alike_whatever_else_is_in_the_batch() -> None:
    model = tiny.tiny_model("llava_next")
    pictures = [Shown((22, 61), 1), Shown((70, 70), 2), Shown((48, 21), 3)]
    batch = tiny.inputs_of("llava_next", [(BOS, 10, one, 11) for one in pictures], "left")
    method = FlowCut(keep_tokens=5)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepare(parts, batch, [method]).report().images
        for number, one in enumerate(pictures):
            inputs = tiny.inputs_of("llava_next", [(BOS, 10, one, 11)], "left")
            prepared = prepare(parts, inputs, [method])
            (alone,) = prepared.report().images
            assert prepared._run is not None
            counts = prepared._run.layer_counts
            assert all(count == counts[0] for count in counts)
            assert together[number].kept.tolist() == alone.kept.tolist()
            assert together[number].layer_counts == alone.layer_counts


def test_an_image_that_lost_nothing_keeps_its_newlines() -> None:
    """Alone no pass runs at all: beside a pruned image it has to look the same."""
    model = tiny.tiny_model("llava_next")
    prompt = (BOS, Shown((40, 30), 0), 10, Shown((16, 60), 1), 11)
    inputs = tiny.inputs_of("llava_next", [prompt], "left")
    with torch.no_grad(), LMMParts(model) as parts:
        stock = prepare(parts, inputs)
        prepared = prepare(parts, inputs, [FlowCut(keep_tokens=(PATCHES, 5))])
        first, second = prepared.report().images
    assert first.kept.tolist() == list(range(first.n_in))
    assert first.layer_counts == ()
    assert len(second.kept) < second.n_in
    torch.testing.assert_close(
        prepared.tokens[0].features, stock.tokens[0].features, atol=1e-4, rtol=0
    )


def test_crops_of_all_images_in_one_tensor() -> None:
    """transformers takes pixel_values [crops of all, 3, H, W] too."""
    model = tiny.tiny_model("llava_next")
    inputs = tiny.sample_inputs("llava_next", "several")
    with torch.no_grad(), LMMParts(model) as parts:
        counts = [visual.n_crops for visual in parts.family.visuals(inputs)]
        flat = torch.cat(
            [own[:count] for own, count in zip(inputs["pixel_values"], counts, strict=True)]
        )
        for methods in ([], [FlowCut(keep_tokens=5)]):
            want = model(**prepare(parts, inputs, methods).model_inputs).logits
            got = prepare(parts, {**inputs, "pixel_values": flat}, methods)
            assert torch.equal(model(**got.model_inputs).logits, want)


def test_uniform_covers_overview_and_tiles() -> None:
    model = tiny.tiny_model("llava_next")
    inputs = tiny.inputs_of("llava_next", [(BOS, Shown((70, 70), 0), 10)], "left")
    with torch.no_grad(), LMMParts(model) as parts:
        (report,) = prepare(parts, inputs, [UniformPruning(keep_tokens=40)]).report().images
        places = report.places
        (many,) = prepare(parts, inputs, [UniformPruning(keep_tokens=370)]).report().images
    assert places is not None
    assert len(report.kept) == 40
    assert not places.newline[report.kept].any()
    # 36 patches of the overview, 324 of the tiles.
    assert places.source[report.kept].tolist() == [0] * 4 + [1] * 36
    rows = places.row[report.kept][4:]
    assert set(rows.tolist()) == {1, 4, 7, 10, 13, 16}
    assert len(many.kept) == 370


# -- packing by hand -----------------------------------------------------------------------


def packer(tiles: tuple[int, int], size: tuple[int, int], side: int = 336, patch: int = 14) -> Any:
    """The model's own packing for a grid of tiles (down, across), without a model."""
    config = LlavaNextConfig(
        image_grid_pinpoints=[[side * tiles[0], side * tiles[1]]],
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": side,
            "patch_size": patch,
            "hidden_size": 8,
            "num_attention_heads": 2,
        },
    )
    pack = partial(LlavaNextModel.pack_image_features, SimpleNamespace(config=config))

    def packed(values: Tensor, newline: Tensor) -> Tensor:
        features, _ = pack([values], [list(size)], "full", newline)
        return features[0]

    return packed


def visual_of(tiles: tuple[int, int], size: tuple[int, int], side: int = 336) -> Visual:
    """An image of tiles (down, across), patches of 14 pixels."""
    count, grid = 1 + tiles[0] * tiles[1], (side // 14, side // 14)
    places = anyres_places(packer(tiles, size, side), count, grid, exact=True)
    return Visual("image", (grid,) * count, places, size)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_packing_equals_the_reference(case: str) -> None:
    golden = np.load(GOLDEN)
    data = {
        name: torch.from_numpy(golden[f"{case}/{name}"])
        for name in ("grid_wh", "orig_wh", "keep", "feat", "packed", "mask_positions_after_unpad")
    }
    (across, down), (width, height) = data["grid_wh"].tolist(), data["orig_wh"].tolist()
    visual = visual_of((down, across), (height, width))
    overview = Crop(torch.full((3, 2), 7.0), torch.tensor([0, 5, 9]))
    tiles = [
        Crop(features, index) for features, index in zip(data["feat"], data["keep"], strict=True)
    ]
    tokens = packed_crops(visual, [overview, *tiles], 0, torch.ones(2))
    assert tokens.index[:3].tolist() == [0, 5, 9]
    assert torch.equal(tokens.features[:3], overview.features)
    assert torch.equal(tokens.features[3:], data["packed"])
    places = visual.places
    assert places.crop is not None
    assert places.patch is not None
    crop, patch = places.crop[tokens.index[3:]] - 1, places.patch[tokens.index[3:]]
    row = crop // across * 24 + patch // 24
    col = crop % across * 24 + patch % 24
    position = row * 24 * across + col
    assert position.tolist() == data["mask_positions_after_unpad"].tolist()


def test_unpadding_rounds_as_transformers_does() -> None:
    """The reference code cuts 41.99999... rows to 41, transformers has 42: the model decides."""
    differing: list[tuple[int, int, int]] = []
    for height in range(20, 400):
        for width in range(height, 400):
            scaled = height * (48 / width)
            if int(scaled) != int(round(scaled, 7)):
                differing.append((height, width, round(scaled)))
    assert differing
    for height, width, rows in differing[:5]:
        visual = visual_of((2, 2), (height, width))
        padding = (48 - rows) // 2
        assert visual.places.shapes[1] == (48 - 2 * padding, 48)


def test_a_tile_that_unpadding_removes() -> None:
    """A wide picture in a high column of tiles: only the middle one shows anything."""
    visual = visual_of((3, 1), (40, 400))
    assert visual.places.crop is not None
    assert set(visual.places.crop.tolist()) == {0, 2, -1}
    crops = [Crop(torch.full((4, 2), float(n)), torch.arange(0, 576, 150)) for n in range(4)]
    tokens = packed_crops(visual, crops, 0, torch.ones(2))
    assert tokens.features[:4, 0].tolist() == [0.0] * 4
    assert set(tokens.features[4:, 0].tolist()) <= {2.0}
    assert tokens.ordered


def test_a_clip_tower_must_drop_cls() -> None:
    with pytest.raises(UnsupportedError, match="cannot be stitched"):
        family_of(tiny.tiny_model("llava_next", vision_feature_select_strategy="full"))


def test_a_mask_of_the_overview_alone_is_refused() -> None:
    model = tiny.tiny_model("llava_next")
    inputs = tiny.sample_inputs("llava_next", "one")
    with LMMParts(model) as parts, torch.no_grad():
        rows, cols = prepare(parts, inputs).tokens[0].grid
        mask = torch.ones(rows, cols, dtype=torch.bool)
        with pytest.raises(SettingsError, match="tiles or frames.*a flat mask of that length"):
            prepare(parts, inputs, [KeepMask(mask=mask)])
