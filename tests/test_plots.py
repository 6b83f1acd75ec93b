"""Pictures of kept tokens: exact pixels, sizes, files, and errors in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmlm_efficient import load_video, plot_grids, plots
from mmlm_efficient.errors import MediaError, MissingExtraError, SettingsError
from mmlm_efficient.plot_grids import token_grids
from mmlm_efficient.plots import MARGIN_PX, Panel, cut_map, kept_tokens, kept_tokens_panel
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.tokens import ImageReport, TokenPlaces
from tests.tiny import IMAGE_TOKEN, batch, images, prompt, tiny_llava

GRID = (3, 4)
N = 12
CELL = plots.PICTURE_PX // 4


def report(kept: list[int], **changes: Any) -> ImageReport:
    fields: dict[str, Any] = {
        "image": 0,
        "sample": 0,
        "grid": GRID,
        "n_in": N,
        "kept": torch.tensor(kept, dtype=torch.long),
        "per_station": {},
        **changes,
    }
    return ImageReport(**fields)


def colours() -> np.ndarray:
    """One colour per patch, uint8 [N, 3], none of them dark."""
    return np.random.default_rng(5).integers(100, 256, size=(N, 3)).astype(np.uint8)


def picture(patch_px: int = 16) -> Image.Image:
    cells = colours().reshape(*GRID, 3).repeat(patch_px, 0).repeat(patch_px, 1)
    return Image.fromarray(cells)


def inside(drawing: Image.Image, patch: int, left: int = MARGIN_PX, top: int = MARGIN_PX):
    """Pixels of a drawn patch without its lines."""
    row, col = divmod(patch, GRID[1])
    pixels = np.asarray(drawing)[top + row * CELL :, left + col * CELL :]
    return pixels[2 : CELL - 2, 2 : CELL - 2].reshape(-1, 3)


def test_kept_patches_keep_their_colours_and_others_are_dimmed() -> None:
    drawing = kept_tokens(picture(), report([0, 5, 11]))
    for patch in range(N):
        pixels, colour = inside(drawing, patch), colours()[patch]
        if patch in (0, 5, 11):
            assert (pixels == colour).all()
        else:
            grey = colour.mean() * plots.DIMMED
            assert np.abs(pixels - grey).max() <= 1


def test_grid_lines_and_outline() -> None:
    drawing = np.asarray(kept_tokens(picture(), report([0])))
    # Between the kept patch 0 and the pruned patch 1, and between two pruned patches.
    assert tuple(drawing[MARGIN_PX + CELL // 2, MARGIN_PX + CELL]) == plots.OUTLINE
    line = drawing[MARGIN_PX + CELL // 2, MARGIN_PX + 2 * CELL].astype(int)
    after = drawing[MARGIN_PX + CELL // 2, MARGIN_PX + 2 * CELL + 2].astype(int)
    assert np.abs(line - (after + 128) // 2).max() <= 1


@pytest.mark.parametrize("scale", [1, 3, 100])
def test_size_of_the_picture_does_not_matter(scale: int) -> None:
    small = kept_tokens(picture(patch_px=scale), report([2, 3]))
    assert (inside(small, 2) == colours()[2]).all()


def test_a_wide_picture_is_cropped_as_clip_does_or_stretched() -> None:
    square = Image.fromarray(np.full((30, 40, 3), 200, np.uint8))
    wide = Image.new("RGB", (100, 30), (10, 20, 30))
    wide.paste(square, (30, 0))
    everything = report(list(range(N)))
    cropped = kept_tokens(wide, everything)
    assert all((inside(cropped, patch) == 200).all() for patch in range(N))
    stretched = kept_tokens(wide, everything, fit="stretch")
    assert (inside(stretched, 0) == (10, 20, 30)).all()
    with pytest.raises(SettingsError, match="fit must be 'crop' or 'stretch'"):
        kept_tokens(wide, everything, fit="squash")  # type: ignore[arg-type]


def test_merged_patches_show_in_the_colour_of_their_token() -> None:
    drawing = kept_tokens(picture(), report([0, 7]), members=[(0, 1, 2), (7,)])
    assert (inside(drawing, 0) == colours()[0]).all()
    for patch in (1, 2):
        expected = 0.6 * colours()[patch] + 0.4 * np.asarray(plots.GROUPS[0])
        assert np.abs(inside(drawing, patch) - expected).max() <= 1
    grey = colours()[3].mean() * plots.DIMMED
    assert np.abs(inside(drawing, 3) - grey).max() <= 1


def test_merged_patches_of_the_report_show_too() -> None:
    given = [(0, 1, 2), (7,)]
    by_hand = np.asarray(kept_tokens(picture(), report([0, 7]), members=given))
    reported = report([0, 7], merged={0: (0, 1, 2)})
    assert (np.asarray(kept_tokens(picture(), reported)) == by_hand).all()
    # What is given by hand wins.
    other = report([0, 7], merged={0: (0, 5)})
    assert (np.asarray(kept_tokens(picture(), other, members=given)) == by_hand).all()
    with pytest.raises(SettingsError, match="members of image 0 names patch 12"):
        kept_tokens(picture(), report([0], merged={0: (0, 12)}))


def test_padded_pictures() -> None:
    grid = report(list(range(16)), grid=(4, 4), n_in=16)
    wide = Image.new("RGB", (80, 40), (10, 200, 30))
    drawn = np.asarray(kept_tokens(wide, grid, fit="pad"))[MARGIN_PX:, MARGIN_PX:]
    cell = plots.PICTURE_PX // 4
    colours_down = [drawn[row * cell + 5, 5].tolist() for row in range(4)]
    grey = list(plot_grids.PADDING)
    assert colours_down == [grey, [10, 200, 30], [10, 200, 30], grey]


# Tiles, newlines, frames


def tiled() -> TokenPlaces:
    """An overview of 2 x 2 and tiles of 2 x 3 with a newline per row: 12 tokens."""
    return TokenPlaces(
        source=torch.tensor([0] * 4 + [1] * 8),
        row=torch.tensor([0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]),
        col=torch.tensor([0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]),
        newline=torch.tensor([False] * 7 + [True] + [False] * 3 + [True]),
        shapes=((2, 2), (2, 3)),
        crop=None,
        patch=None,
    )


def frames_places(frames: int) -> TokenPlaces:
    """Frames of 1 x 2 tokens and a newline at the end."""
    n_tokens = 2 * frames + 1
    index = torch.arange(n_tokens)
    return TokenPlaces(
        source=index // 2,
        row=torch.zeros_like(index),
        col=index % 2,
        newline=index == n_tokens - 1,
        shapes=((1, 2),) * frames,
        crop=None,
        patch=None,
        video=True,
    )


def test_token_grids() -> None:
    overview, tiles = token_grids(report([0], places=tiled()))
    assert overview.index.tolist() == [[0, 1], [2, 3]]
    assert overview.newlines.tolist() == [-1, -1]
    assert tiles.index.tolist() == [[4, 5, 6], [8, 9, 10]]
    assert tiles.newlines.tolist() == [7, 11]
    video = token_grids(report([0], n_in=5, places=frames_places(2)))
    assert [one.index.tolist() for one in video] == [[[0, 1]], [[2, 3]]]
    with pytest.raises(SettingsError, match="places of 12 tokens, but n_in=13"):
        token_grids(report([0], n_in=13, places=tiled()))


def test_tiles_stand_beside_their_overview() -> None:
    colour = (240, 160, 80)
    image = Image.new("RGB", (90, 60), colour)
    drawn = np.asarray(kept_tokens(image, report([3, 4, 7, 10], places=tiled())))
    drawn = drawn[MARGIN_PX:, MARGIN_PX:]
    dim = round(np.mean(colour) * plots.DIMMED)
    small, large = plot_grids.OVERVIEW_PX // 2, plots.PICTURE_PX // 3

    def at(left: int, row: int, col: int, cell: int) -> list[int]:
        return [int(v) for v in drawn[row * cell + cell // 2, left + col * cell + cell // 2]]

    overview = [at(0, row, col, small) for row in (0, 1) for col in (0, 1)]
    assert overview == [[dim] * 3, [dim] * 3, [dim] * 3, list(colour)]
    left = plot_grids.OVERVIEW_PX + MARGIN_PX
    tiles = [at(left, row, col, large) for row in (0, 1) for col in (0, 1, 2)]
    assert tiles == [list(colour), *[[dim] * 3] * 4, list(colour)]
    ends = [drawn[row * large + large // 2, left + 3 * large + 3].tolist() for row in (0, 1)]
    assert ends == [list(plot_grids.NEWLINE_KEPT), list(plot_grids.NEWLINE_CUT)]


def test_a_video_is_a_strip_of_frames() -> None:
    shades = [60 + 18 * number for number in range(10)]
    frames = [Image.new("RGB", (40, 20), (shade, shade, shade)) for shade in shades]
    everything = report(list(range(21)), n_in=21, places=frames_places(10))
    drawings = [
        np.asarray(kept_tokens(given, everything)) for given in (frames, load_video(frames))
    ]
    assert (drawings[0] == drawings[1]).all()
    width, height = plot_grids.FRAME_PX, plot_grids.FRAME_PX // 2
    for number, shade in enumerate(shades):
        row, col = divmod(number, plot_grids.FRAMES_PER_ROW)
        top = MARGIN_PX + row * (height + MARGIN_PX) + height // 2
        left = MARGIN_PX + col * (width + MARGIN_PX) + width // 4
        assert drawings[0][top, left].tolist() == [shade] * 3
    # Of frames that share their tokens, the first.
    pairs = report(list(range(11)), n_in=11, places=frames_places(5))
    drawn = np.asarray(kept_tokens(frames[:9], pairs))
    left = MARGIN_PX + width + MARGIN_PX + width // 4
    assert drawn[MARGIN_PX + height // 2, left].tolist() == [shades[2]] * 3


def test_cut_map_of_tiles_leaves_newlines_out() -> None:
    layers = torch.tensor([1, 1, -1, -1, 2, 2, -1, -1, -1, -1, -1, -1])
    given = report([2, 3, 6, 8, 9, 10], places=tiled(), cut_layer=layers)
    drawn = np.asarray(cut_map(Image.new("RGB", (90, 60), (9, 9, 9)), given))
    assert not (drawn == plots.DECODER_CUT).all(-1).any()


def test_panel_places_pictures_in_rows() -> None:
    panels = [Panel(picture(), report([place]), f"random 1 of 12 ({place})") for place in range(5)]
    drawing = kept_tokens_panel(panels, columns=3, title="Kept tokens")
    width, height = 4 * CELL, 3 * CELL
    assert drawing.size[0] == 3 * (width + MARGIN_PX) + MARGIN_PX
    head = 2 * MARGIN_PX + plots.LINE_PX
    step = height + plots.LINE_PX + MARGIN_PX
    assert drawing.size[1] == head + 2 * step
    for place in range(5):
        row, column = divmod(place, 3)
        left, top = MARGIN_PX + column * (width + MARGIN_PX), head + row * step
        assert (inside(drawing, place, left, top) == colours()[place]).all()
        assert not (inside(drawing, 11, left, top) == colours()[11]).all()
    # Something is written under the picture: the caption.
    assert np.asarray(drawing)[head + height : head + height + plots.LINE_PX].min() < 100


def test_panels_of_different_grids() -> None:
    other = report([0], grid=(2, 2), n_in=4)
    drawing = kept_tokens_panel([Panel(picture(), report([1])), Panel(picture(), other)])
    assert (inside(drawing, 1) == colours()[1]).all()


def test_cut_map_colours_patches_by_layer() -> None:
    layers = torch.tensor([1, 1, 3, 3, 3, 3, -1, -1, -1, -1, -1, -1])
    drawing = cut_map(picture(), report([6, 7, 8, 9, 10], cut_layer=layers), title="FlowCut")
    top = 2 * MARGIN_PX + plots.LINE_PX
    for patch in (6, 7, 8, 9, 10):
        assert (inside(drawing, patch, top=top) == colours()[patch]).all()
    early, late, decoder = (
        np.median(inside(drawing, patch, top=top), axis=0) - 0.35 * colours()[patch].mean()
        for patch in (0, 2, 11)
    )
    assert np.abs(early - late).max() > 20
    assert np.abs(decoder - 0.65 * np.asarray(plots.DECODER_CUT)).max() <= 2
    same = np.median(inside(drawing, 1, top=top), axis=0) - 0.35 * colours()[1].mean()
    assert np.abs(same - early).max() <= 2
    # The legend stands at the right.
    legend = np.asarray(drawing)[top:, MARGIN_PX * 2 + 4 * CELL :]
    assert (legend == plots.DECODER_CUT).all(-1).any()
    assert legend.min() < 100


def test_cut_map_with_nothing_cut_in_the_tower() -> None:
    with pytest.raises(SettingsError, match="was not pruned inside the tower"):
        cut_map(picture(), report([0]))
    drawing = cut_map(picture(), report(list(range(N)), cut_layer=torch.full((N,), -1)))
    assert (inside(drawing, 3) == colours()[3]).all()


def test_file_is_written_whole_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "kept.png"
    drawing = kept_tokens(picture(), report([4]), path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert np.array_equal(np.asarray(written.convert("RGB")), np.asarray(drawing))
    assert [file.name for file in path.parent.iterdir()] == ["kept.png"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.png"
    path.write_bytes(b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmlm_efficient.plots.os.replace", full_disk)
    with pytest.raises(MediaError, match="No space left on device"):
        kept_tokens(picture(), report([4]), path)
    with pytest.raises(MediaError) as caught:
        kept_tokens(picture(), report([4]), "/proc/kept.png")
    assert str(caught.value) == "/proc/kept.png: cannot be written (No such file or directory)."
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.png"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kept_tokens(picture(), report([0]), "kept.jpg"), SettingsError, "'.png'"),
        (lambda: kept_tokens(picture(), report([0], n_in=13)), SettingsError, "3 x 4 patches"),
        (lambda: kept_tokens(picture(), report([0], grid=(0, 4))), SettingsError, "0 x 4 patches"),
        (lambda: kept_tokens(picture(), report([12])), SettingsError, "allowed are 0 to 11"),
        (lambda: kept_tokens(picture(), report([-1])), SettingsError, "allowed are 0 to 11"),
        (
            lambda: kept_tokens(picture(), report([0]), members=[(0, 12)]),
            SettingsError,
            "members of image 0 names patch 12",
        ),
        (
            lambda: cut_map(picture(), report([0], cut_layer=torch.zeros(5))),
            SettingsError,
            r"shape \[5\], expected \[12\]",
        ),
        (
            lambda: kept_tokens([picture()], report([0])),
            SettingsError,
            "is of one picture: give that",
        ),
        (
            lambda: kept_tokens(picture(), report([0], n_in=5, places=frames_places(2))),
            SettingsError,
            "is of a video: give its frames",
        ),
        (
            lambda: kept_tokens([picture()] * 3, report([0], n_in=9, places=frames_places(4))),
            SettingsError,
            "is of 4 frames or pairs of frames, but 3 frames were given",
        ),
        (lambda: kept_tokens("no such.png", report([0])), MediaError, "no such file"),
        (lambda: kept_tokens(np.zeros((0, 4, 3), np.uint8), report([0])), MediaError, "no pixels"),
        (lambda: kept_tokens_panel([]), SettingsError, "panels is empty"),
        (
            lambda: kept_tokens_panel([Panel(picture(), report([0]))], columns=0),
            SettingsError,
            "columns must be at least 1",
        ),
    ],
)
def test_errors_say_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)

    class Hidden:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"mmlm-efficient\[plots\]"):
        kept_tokens(picture(), report([0]))


def test_dollars_in_captions_are_plain_text() -> None:
    kept_tokens_panel([Panel(picture(), report([0]), "costs $1 or $x_")], title="$a$")


def test_report_of_a_real_request() -> None:
    inputs = batch([prompt(1, IMAGE_TOKEN, 5)], images(1))
    with LMMParts(tiny_llava()) as parts, torch.no_grad():
        prepared = prepare(parts, inputs, [FlowCut(keep_tokens=7)])
    (found,) = prepared.report().images
    assert found.cut_layer is not None
    drawing = np.asarray(kept_tokens(Image.new("RGB", (60, 60), (250, 200, 150)), found))
    coloured = (drawing == (250, 200, 150)).all(-1).sum()
    cell = plots.PICTURE_PX // found.grid[0]
    assert 7 * (cell - 2) ** 2 <= coloured <= 7 * cell**2
    cut_map(Image.new("RGB", (60, 60)), found)
