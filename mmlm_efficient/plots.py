"""Pictures of what was pruned: kept patches in their colours, the others dimmed, cuts by layer.

The patches are drawn pixel by pixel, so a kept patch shows exactly the colours of the picture;
matplotlib (the ``plots`` extra) adds captions and legends. Only its object interface is used: no
window, no global figure, nothing to close.
"""

from __future__ import annotations

import io
import os
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlm_efficient.errors import MediaError, SettingsError, require_extra
from mmlm_efficient.families.base import Fit
from mmlm_efficient.plot_grids import (
    MARGIN_PX,
    OUTLINE,
    PICTURE_PX,
    Cells,
    Pixels,
    Shown,
    cut_layers,
    drawing,
    indices_of,
    kept_mask,
)
from mmlm_efficient.tokens import ImageReport

__all__ = [
    "MARGIN_PX",
    "OUTLINE",
    "PICTURE_PX",
    "Fit",
    "Panel",
    "cut_map",
    "kept_tokens",
    "kept_tokens_panel",
    "write_png",
]

Target: TypeAlias = "str | os.PathLike[str] | None"

DPI = 100
LINE_PX = 16  # one line of text
LEGEND_PX = 190
DIMMED = 0.35  # brightness of a pruned patch
DECODER_CUT = (214, 39, 40)
# One colour after the other for the groups of merged patches.
GROUPS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (23, 190, 207))


@dataclass(frozen=True)
class Panel:
    """One picture with what was kept of it.

    Attributes:
        image: what the model was asked about: a picture (see `load_image`), or the frames of a
            video, as a list or the `Video` itself.
        report: what happened to it, one of ``answer.report.images``.
        caption: line under the picture; empty means "36 of 144".
        members: for tokens merged from several patches, the patches of each token
            (``VisualTokens.members``); None takes those of the report.
        fit: how the image processor made the picture fit the grid: "crop" cuts out the middle
            (CLIP), "stretch" distorts it (SigLIP), "pad" adds a border (LLaVA-1.5's own). All the
            same for a picture of the grid's shape, and for tiles and frames, which show it all.
    """

    image: Shown
    report: ImageReport
    caption: str = ""
    members: Sequence[Sequence[int]] | None = None
    fit: Fit = "crop"


def kept_tokens(
    image: Shown,
    report_image: ImageReport,
    path: Target = None,
    title: str | None = None,
    *,
    members: Sequence[Sequence[int]] | None = None,
    fit: Fit = "crop",
) -> Image.Image:
    """Draw which patches of one picture or video reached the last decoder layer.

    An image with tiles is drawn as its overview and the grid of its tiles, a video as a strip of
    frames (of frames that share their tokens, the first). A light bar behind a row is a newline
    token that was kept, a dark one a newline token that was pruned.

    Args:
        image: the picture: a path, bytes, PIL image or array; of a video, its frames.
        report_image: its part of the report, such as ``answer.report.images[0]``.
        path: PNG file to write, or None to only return the drawing.
        title: line above the picture.
        members: patches of each merged token, see `Panel`.
        fit: how the picture was made to fit, see `Panel`.

    Returns:
        The drawing, RGB.

    Raises:
        MediaError: the picture cannot be read, or the file cannot be written.
        SettingsError: the report does not fit together, or the path is no ".png".
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> from mmlm_efficient import load
        >>> from mmlm_efficient.pocket import scene
        >>> picture = scene("heldout", 56).image
        >>> answer = load("pocket", "flowcut:36").ask("What is in the picture?", image=picture)
        >>> kept_tokens(picture, answer.report.images[0]).size  # with path="kept.png" also a file
        (304, 320)
    """
    panel = Panel(image, report_image, members=members, fit=fit)
    return kept_tokens_panel([panel], path, title)


def kept_tokens_panel(
    panels: Sequence[Panel],
    path: Target = None,
    title: str | None = None,
    *,
    columns: int = 4,
) -> Image.Image:
    """Draw several pictures side by side, one per method, budget or image.

    Args:
        panels: what to draw, from left to right and top to bottom.
        path: PNG file to write, or None to only return the drawing.
        title: line above all pictures.
        columns: pictures per row, at least 1.

    Returns:
        The drawing, RGB.

    Raises:
        As `kept_tokens`; SettingsError also for no panels or columns < 1.

    Example:
        >>> from mmlm_efficient import load
        >>> from mmlm_efficient.pocket import scene
        >>> lmm, picture = load("pocket"), scene("heldout", 56).image
        >>> panels = []
        >>> for method in ("flowcut:36", "random:36"):
        ...     answer = lmm.ask("What is in the picture?", image=picture, methods=method)
        ...     panels.append(Panel(picture, answer.report.images[0], method))
        >>> kept_tokens_panel(panels).size
        (600, 320)
    """
    if not panels:
        raise SettingsError("panels is empty: give at least one picture with its report")
    if columns < 1:
        raise SettingsError(f"columns must be at least 1, got {columns}")
    pictures = [kept_pixels(panel) for panel in panels]
    captions = [
        wrapped(panel.caption or _count(panel.report), picture.shape[1])
        for panel, picture in zip(panels, pictures, strict=True)
    ]
    width = max(picture.shape[1] for picture in pictures) + MARGIN_PX
    rows = [range(first, len(panels))[:columns] for first in range(0, len(panels), columns)]
    top, tops = MARGIN_PX + (LINE_PX + MARGIN_PX if title else 0), []
    for row in rows:
        tops.append(top)
        lines = max(captions[place].count("\n") + 1 for place in row)
        top += max(pictures[place].shape[0] for place in row) + lines * LINE_PX + MARGIN_PX
    sheet = Sheet(width * min(columns, len(panels)) + MARGIN_PX, top)
    if title:
        sheet.text(sheet.width / 2, MARGIN_PX, title, align="center")
    for row, row_top in zip(rows, tops, strict=True):
        for column, place in enumerate(row):
            picture, left = pictures[place], MARGIN_PX + column * width
            sheet.picture(left, row_top, picture)
            middle = left + picture.shape[1] / 2
            sheet.text(middle, row_top + picture.shape[0] + 2, captions[place], align="center")
    return sheet.finished(path)


def cut_map(
    image: Shown,
    report_image: ImageReport,
    path: Target = None,
    title: str | None = None,
    *,
    fit: Fit = "crop",
) -> Image.Image:
    """Draw after which tower layer each patch was cut; kept patches keep their colours.

    Args:
        image, path, title, fit: as in `kept_tokens`.
        report_image: report of a method that cuts inside the tower, such as FlowCut.

    Returns:
        The drawing with a legend, RGB.

    Raises:
        As `kept_tokens`; SettingsError also when nothing was cut inside the tower.
    """
    kept = kept_mask(report_image)
    layers = cut_layers(report_image)
    colours = _layer_colours(sorted(set(layers[layers >= 0].tolist())))
    tint = np.zeros((*layers.shape, 3), np.float32)
    legend: list[tuple[tuple[int, int, int], str]] = []
    for layer, colour in colours.items():
        tint[layers == layer] = colour
        legend.append((colour, f"after tower layer {layer}: {int((layers == layer).sum())}"))
    later = (layers < 0) & ~kept
    if report_image.places is not None:
        later &= ~report_image.places.newline.cpu().numpy()
    if later.any():
        tint[later] = DECODER_CUT
        legend.append((DECODER_CUT, f"in the language model: {int(later.sum())}"))

    def paint(cells: Cells) -> Pixels:
        grey = cells.base.mean(axis=-1, keepdims=True)
        coloured = 0.35 * grey + 0.65 * cells.enlarged(tint)
        drawn = np.where(cells.enlarged(kept)[..., None], cells.base, coloured)
        return drawn.astype(np.uint8)

    picture = drawing(image, report_image, fit, kept, paint)
    top = MARGIN_PX + (LINE_PX + MARGIN_PX if title else 0)
    height = max(picture.shape[0], (len(legend) + 1) * LINE_PX)
    sheet = Sheet(picture.shape[1] + 3 * MARGIN_PX + LEGEND_PX, top + height + MARGIN_PX)
    if title:
        sheet.text(sheet.width / 2, MARGIN_PX, title, align="center")
    sheet.picture(MARGIN_PX, top, picture)
    left = picture.shape[1] + 2 * MARGIN_PX
    for line, (colour, label) in enumerate(legend):
        sheet.picture(left, top + line * LINE_PX + 2, np.full((12, 12, 3), colour, np.uint8))
        sheet.text(left + 18, top + line * LINE_PX, label)
    sheet.text(left + 18, top + len(legend) * LINE_PX, f"kept: {_count(report_image)}")
    return sheet.finished(path)


# -- paints ----------------------------------------------------------------------------------


def kept_pixels(panel: Panel) -> Pixels:
    """The picture with pruned patches dimmed, uint8 [height, width, 3]."""
    kept = kept_mask(panel.report)
    groups = _merged(panel)

    def paint(cells: Cells) -> Pixels:
        base = cells.base
        dimmed = np.repeat(base.mean(axis=-1, keepdims=True) * DIMMED, 3, axis=-1)
        drawn = np.where(cells.enlarged(kept)[..., None], base, dimmed)
        for number, group in enumerate(groups):
            # A merged patch lives on in its token: half bright, in the colour of its group.
            inside = np.zeros(kept.shape, np.bool_)
            inside[group] = True
            mask = cells.enlarged(inside & ~kept)
            colour = np.asarray(GROUPS[number % len(GROUPS)], np.float32)
            drawn[mask] = 0.6 * base[mask] + 0.4 * colour
        return np.rint(drawn).astype(np.uint8)

    return drawing(panel.image, panel.report, panel.fit, kept, paint)


def _merged(panel: Panel) -> list[npt.NDArray[np.int64]]:
    """The patches of each token that was merged from several."""
    given = panel.report.merged.values() if panel.members is None else panel.members
    groups = [indices_of("members", group, panel.report) for group in given]
    return [group for group in groups if group.size > 1]


def _layer_colours(layers: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """From dark for an early cut to bright for a late one."""
    colormap = require_extra("matplotlib", "plots").colormaps["viridis"]
    places = np.linspace(0.0, 0.75, max(len(layers), 1))
    colours = np.rint(np.asarray(colormap(places))[:, :3] * 255).astype(int).tolist()
    return {layer: tuple(colour) for layer, colour in zip(layers, colours, strict=False)}


def _count(report: ImageReport) -> str:
    return f"{len(report.kept)} of {report.n_in}"


# -- sheet of paper --------------------------------------------------------------------------


class Sheet:
    """A white drawing of width x height pixels; places are counted from the top left."""

    def __init__(self, width: int, height: int) -> None:
        figure = require_extra("matplotlib.figure", "plots")
        agg = require_extra("matplotlib.backends.backend_agg", "plots")
        self.width, self.height = width, height
        self._figure = figure.Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="w")
        self._canvas = agg.FigureCanvasAgg(self._figure)

    def picture(self, left: int, top: int, pixels: Pixels) -> None:
        """Copy pixels, unscaled."""
        bottom = self.height - top - pixels.shape[0]
        self._figure.figimage(pixels, xo=left, yo=bottom, origin="upper")

    def text(self, x: float, top: float, text: str, align: str = "left") -> None:
        """Write text whose upper edge is at `top`."""
        place = (x / self.width, 1 - top / self.height)
        self._figure.text(*place, text, ha=align, va="top", fontsize=8.5, parse_math=False)

    def finished(self, path: Target) -> Image.Image:
        """The drawing, written to a file if one is named."""
        self._canvas.draw()
        picture = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        if path is not None:
            encoded = io.BytesIO()
            picture.save(encoded, format="PNG")
            write_png(path, encoded.getvalue())
        return picture


def wrapped(text: str, width_px: int) -> str:
    """Text in lines that fit under a picture."""
    return "\n".join(textwrap.wrap(text, max(8, width_px // 7))) or " "


def write_png(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a PNG file whole or not at all.

    Args:
        path: file to write or replace; its folder is made if missing.
        data: the encoded picture.

    Raises:
        SettingsError: the name does not end in ".png".
        MediaError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise SettingsError(f"path: '{target}' must end in '.png'")
    partial: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as file:
            partial = file.name
            file.write(data)
        os.chmod(partial, 0o644)  # temporary files are private, pictures are not
        os.replace(partial, target)
    except OSError as error:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
        # The error's own text would name the temporary file.
        raise MediaError(f"{target}: cannot be written ({error.strerror or error}).") from error
