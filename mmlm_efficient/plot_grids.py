"""The pixels of the drawings in `plots`: pictures laid out as the grids of tokens made of them.

A plain image is one grid. An image with tiles is drawn twice, as the small overview and as the
grid of all tiles beside it; a video is a strip of its frames. Newline tokens, which show nothing,
are a narrow column behind their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Fit
from mmlm_efficient.media import ImageSource, load_image
from mmlm_efficient.tokens import ImageReport
from mmlm_efficient.video.reader import Video

Pixels: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]
Shown: TypeAlias = "ImageSource | Sequence[ImageSource] | Video"

PICTURE_PX = 288  # longer side of one drawn picture, about
OVERVIEW_PX = PICTURE_PX // 2
FRAME_PX = 112
FRAMES_PER_ROW = 8
MARGIN_PX = 8
GRID_LINE = (128, 128, 128)
OUTLINE = (255, 212, 0)
PADDING = (128, 128, 128)
NEWLINE_KEPT, NEWLINE_CUT = (214, 214, 214), (48, 48, 48)


@dataclass(frozen=True)
class TokenGrid:
    """One grid of tokens.

    Attributes:
        index: int64 [rows, cols], the token of each cell.
        newlines: int64 [rows], the newline token behind each row, -1 where there is none.
    """

    index: npt.NDArray[np.int64]
    newlines: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cells:
    """One grid with the picture that it shows; what a paint gets.

    Attributes:
        index: int64 [rows, cols], the token of each cell.
        base: uint8 [rows * size, cols * size, 3], the picture.
        size: side of a cell in pixels.
    """

    index: npt.NDArray[np.int64]
    base: Pixels
    size: int

    def enlarged(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of tokens [n_in, ...] over the pixels of their cells."""
        return values[self.index].repeat(self.size, axis=0).repeat(self.size, axis=1)


def token_grids(report: ImageReport) -> list[TokenGrid]:
    """The grids of an image's or video's unpruned tokens.

    Raises:
        SettingsError: the report does not fit together.
    """
    places = report.places
    if places is None:
        rows, cols = report.grid
        if rows < 1 or cols < 1 or rows * cols != report.n_in:
            raise SettingsError(
                f"the report of image {report.image} has a grid of {rows} x {cols} patches, but "
                f"n_in={report.n_in}: the two must agree"
            )
        index = np.arange(report.n_in, dtype=np.int64).reshape(rows, cols)
        return [TokenGrid(index, np.full(rows, -1, np.int64))]
    if len(places) != report.n_in:
        raise SettingsError(
            f"the report of image {report.image} has places of {len(places)} tokens, but "
            f"n_in={report.n_in}: the two must agree"
        )
    source, row, col = (one.cpu().numpy() for one in (places.source, places.row, places.col))
    newline, token = places.newline.cpu().numpy(), np.arange(report.n_in)
    grids = []
    for number, (rows, cols) in enumerate(places.shapes):
        cells, ends = (source == number) & ~newline, (source == number) & newline
        index = np.full((rows, cols), -1, np.int64)
        index[row[cells], col[cells]] = token[cells]
        newlines = np.full(rows, -1, np.int64)
        newlines[row[ends]] = token[ends]
        if index.size:
            grids.append(TokenGrid(index, newlines))
    return grids


def drawing(
    shown: Shown, report: ImageReport, fit: Fit, kept: Mask, paint: Callable[[Cells], Pixels]
) -> Pixels:
    """All grids of an image or video, painted, uint8 [height, width, 3].

    Args:
        shown: the picture, or the frames of a video.
        report: what happened to it.
        fit: how a picture that is one grid was made to fit it.
        kept: bool [n_in].
        paint: the pixels of one grid, without lines.

    Raises:
        SettingsError: pictures, report and fit do not go together.
    """
    if fit not in ("crop", "stretch", "pad"):
        raise SettingsError(f"fit must be 'crop' or 'stretch' or 'pad', got {fit!r}")
    grids = token_grids(report)
    pictures = _pictures(shown, report, len(grids))
    video, several = is_video(report), len(grids) > 1
    parts = []
    for number, (grid, picture) in enumerate(zip(grids, pictures, strict=True)):
        side = FRAME_PX if video else OVERVIEW_PX if several and number == 0 else PICTURE_PX
        own = fit
        if video or several:
            own = "stretch"  # overviews, tiles and frames show the whole picture
        elif (grid.newlines >= 0).any():
            own = "pad"  # a picture beside others in its prompt
        shape = grid.index.shape
        cell = max(4 if video else 6, side // max(shape))
        base = fitted(picture, (shape[0], shape[1]), own, cell)
        painted = paint(Cells(grid.index, base, cell))
        lined = _with_lines(painted, kept[grid.index], cell)
        parts.append(np.concatenate([lined, *_newline_column(grid.newlines, kept, cell)], axis=1))
    return strip(parts, FRAMES_PER_ROW)


def is_video(report: ImageReport) -> bool:
    """Whether the tokens are those of a video, as frames that share one report."""
    return report.places is not None and report.places.video


def _pictures(shown: Shown, report: ImageReport, n_grids: int) -> list[ImageSource]:
    """The picture of every grid; of frames that were joined to one grid, the first."""
    frames = shown.frames if isinstance(shown, Video) else shown
    if not is_video(report):
        if isinstance(frames, list | tuple):
            raise SettingsError(
                f"the report of image {report.image} is of one picture: give that, not a list"
            )
        return [frames] * n_grids  # type: ignore[list-item]
    if not isinstance(frames, list | tuple):
        raise SettingsError(
            f"the report of image {report.image} is of a video: give its frames as a list, or the "
            "Video that load_video returns"
        )
    joined = -(-len(frames) // n_grids)
    if joined < 1 or -(-len(frames) // joined) != n_grids:
        raise SettingsError(
            f"the report of image {report.image} is of {n_grids} frames or pairs of frames, but "
            f"{len(frames)} frames were given: give those that the model was asked about"
        )
    return list(frames[::joined])


def fitted(image: ImageSource, grid: tuple[int, int], fit: Fit, cell: int) -> Pixels:
    """The part of a picture that the model saw, scaled to cells of so many pixels."""
    picture = load_image(image)
    rows, cols = grid
    width, height = picture.size
    box = (0.0, 0.0, float(width), float(height))
    if fit == "crop":
        side = min(width / cols, height / rows)
        left, top = (width - side * cols) / 2, (height - side * rows) / 2
        box = (left, top, left + side * cols, top + side * rows)
    elif fit == "pad":
        side = max(width / cols, height / rows)
        page = Image.new("RGB", (round(side * cols), round(side * rows)), PADDING)
        page.paste(picture, ((page.width - width) // 2, (page.height - height) // 2))
        picture, box = page, (0.0, 0.0, float(page.width), float(page.height))
    # A box filter averages when it shrinks and repeats when it enlarges: no new colours.
    size = (cols * cell, rows * cell)
    return np.asarray(picture.resize(size, Image.Resampling.BOX, box=box))


def _with_lines(picture: Pixels, kept: Mask, cell: int) -> Pixels:
    """Grid lines in the first pixel row and column of each cell, an outline around kept cells."""
    across, down = slice(cell, None, cell), slice(cell, None, cell)
    half = np.asarray(GRID_LINE, np.uint16)
    picture[across] = (picture[across].astype(np.uint16) + half) // 2
    picture[:, down] = (picture[:, down].astype(np.uint16) + half) // 2
    for row, col in zip(*np.nonzero(kept[1:] != kept[:-1]), strict=True):
        picture[(row + 1) * cell, col * cell : (col + 1) * cell] = OUTLINE
    for row, col in zip(*np.nonzero(kept[:, 1:] != kept[:, :-1]), strict=True):
        picture[row * cell : (row + 1) * cell, (col + 1) * cell] = OUTLINE
    return picture


def _newline_column(newlines: npt.NDArray[np.int64], kept: Mask, cell: int) -> list[Pixels]:
    """A narrow column with the newline tokens; nothing where there are none."""
    if not (newlines >= 0).any():
        return []
    colours = np.where(kept[newlines][:, None], NEWLINE_KEPT, NEWLINE_CUT).astype(np.uint8)
    colours[newlines < 0] = 255
    column = np.full((len(newlines), cell, 1 + min(6, cell // 2), 3), 255, np.uint8)
    column[:, 1:, 1:] = colours[:, None, None]
    return [column.reshape(-1, *column.shape[2:])]


def strip(parts: Sequence[Pixels], columns: int) -> Pixels:
    """Pictures side by side on white, in rows of so many."""
    if len(parts) == 1:
        return parts[0]
    rows = [parts[first : first + columns] for first in range(0, len(parts), columns)]
    width = max(sum(one.shape[1] + MARGIN_PX for one in row) for row in rows) - MARGIN_PX
    height = sum(max(one.shape[0] for one in row) + MARGIN_PX for row in rows) - MARGIN_PX
    page = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for row in rows:
        left = 0
        for one in row:
            page[top : top + one.shape[0], left : left + one.shape[1]] = one
            left += one.shape[1] + MARGIN_PX
        top += max(one.shape[0] for one in row) + MARGIN_PX
    return page


# -- reports ---------------------------------------------------------------------------------


def kept_mask(report: ImageReport) -> Mask:
    """Bool [n_in], True for kept tokens."""
    token_grids(report)  # refuses a report that does not fit together
    mask = np.zeros(report.n_in, np.bool_)
    mask[indices_of("kept", report.kept, report)] = True
    return mask


def indices_of(
    field: str, values: Tensor | Sequence[int], report: ImageReport
) -> npt.NDArray[np.int64]:
    """Token indices, refused when one is not among the image's."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    index: npt.NDArray[np.int64] = array.astype(np.int64).reshape(-1)
    if index.size and (index.min() < 0 or index.max() >= report.n_in):
        raise SettingsError(
            f"{field} of image {report.image} names patch {index.max()}, lowest {index.min()}: "
            f"allowed are 0 to {report.n_in - 1}"
        )
    return index


def cut_layers(report: ImageReport) -> npt.NDArray[np.int64]:
    """Int64 [n_in], the tower layer after which each patch was cut, -1 = kept by the tower."""
    if report.cut_layer is None:
        raise SettingsError(
            f"image {report.image} was not pruned inside the tower: a cut map needs a method "
            "that cuts there (flowcut) and a budget below the number of patches"
        )
    layers: npt.NDArray[np.int64] = report.cut_layer.cpu().numpy().astype(np.int64)
    if layers.shape != (report.n_in,):
        raise SettingsError(
            f"cut_layer of image {report.image} has shape {list(layers.shape)}, expected "
            f"[{report.n_in}]"
        )
    return layers
