"""Pictures of what VAR did: the sinks on the picture, the attention to it before and after.

Attention is drawn in the token grid, in cividis (for any colour vision) on a square-root scale, so
that a token with a quarter of the largest share is half as bright and not black. Matplotlib (the
``plots`` extra) is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from torch import Tensor

from mmlm_efficient.errors import SettingsError, require_extra
from mmlm_efficient.families.base import Fit
from mmlm_efficient.plot_grids import (
    FRAMES_PER_ROW,
    MARGIN_PX,
    PICTURE_PX,
    Cells,
    Mask,
    Pixels,
    Shown,
    drawing,
    strip,
    token_grids,
)
from mmlm_efficient.plots import DIMMED, LINE_PX, Sheet, Target
from mmlm_efficient.tokens import (
    CLS_INDEX,
    ImageAttention,
    ImageReport,
    LayerRedistribution,
    PruningReport,
)

__all__ = ["attention_panel"]

LAYERS = 4  # drawn when nobody says which
SMALL_PX = (60, 132)  # longer side of the map of one head: of many, and of a few
BAR_PX = 12
BAR_ROOM_PX = BAR_PX + 58
GONE = (226, 226, 226)  # tokens that are no longer there


def attention_panel(
    shown: Shown,
    report: PruningReport,
    path: Target = None,
    title: str | None = None,
    *,
    image: int = 0,
    layers: Sequence[int] | None = None,
    heads: bool = True,
    fit: Fit = "crop",
) -> Image.Image:
    """Draw the sinks of one picture, and the attention of the last prompt token to it.

    One part per layer: the picture with a ring in every sink (pruned tokens dimmed), the
    attention before and after VAR as the mean over the heads, and below it the same of every head
    in small. A head's label says how many of the prompt's rows it changed.

    Args:
        shown: the picture: a path, bytes, PIL image or array; of a video, its frames.
        report: of an answer with ``VAR(return_stats=True)``.
        path: PNG file to write, or None to only return the drawing.
        title: line above it all.
        image: which of ``report.images``, by its place there.
        layers: decoder layers to draw; None takes the four in which most rows changed.
        heads: whether to draw every head.
        fit: how the picture was made to fit the grid, see `mmlm_efficient.plots.Panel`.

    Returns:
        The drawing, RGB.

    Raises:
        SettingsError: the report has no such image or layer, or nothing about attention; or the
            path is no ".png".
        MediaError: the picture cannot be read, or the file cannot be written.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> from mmlm_efficient import VAR, load
        >>> from mmlm_efficient.pocket import scene
        >>> picture = scene("heldout", 56).image
        >>> var = VAR(sink_dims=[85], sink_threshold=4.33, return_stats=True)
        >>> answer = load("pocket", var).ask("What is in the picture?", image=picture)
        >>> attention_panel(picture, answer.report, layers=[3], heads=False).size
        (974, 360)
    """
    if not 0 <= image < len(report.images):
        raise SettingsError(
            f"image is {image}, but the report has {len(report.images)} image(s), counted from 0"
        )
    own = report.images[image]
    chosen = _chosen(report, own, layers)
    parts = [_Part.of(shown, own, layer, heads, fit) for layer in chosen]
    sheet = Sheet(
        max(part.width for part in parts) + 2 * MARGIN_PX,
        sum(part.height for part in parts) + MARGIN_PX + (LINE_PX + MARGIN_PX if title else 0),
    )
    top = MARGIN_PX
    if title:
        sheet.text(sheet.width / 2, top, title, align="center")
        top += LINE_PX + MARGIN_PX
    for part in parts:
        part.draw(sheet, top)
        top += part.height
    return sheet.finished(path)


def _chosen(
    report: PruningReport, own: ImageReport, layers: Sequence[int] | None
) -> list[LayerRedistribution]:
    """The entries to draw, by layer."""
    there = {one.layer: one for one in report.redistribution if own.image in one.images}
    if not there:
        raise SettingsError(
            f"the report says nothing about attention to image {own.image}: ask with "
            "VAR(return_stats=True), on the command line --method var --method-set "
            "return_stats=true"
        )
    if layers is None:
        most = sorted(there, key=lambda layer: (-sum(there[layer].changed), layer))
        return [there[layer] for layer in sorted(most[:LAYERS])]
    missing = [layer for layer in layers if layer not in there]
    if missing or not layers:
        raise SettingsError(
            f"layers is {list(layers)}; give some of those in which VAR may change attention: "
            f"{', '.join(map(str, sorted(there)))}"
        )
    return [there[layer] for layer in layers]


@dataclass(frozen=True)
class _Part:
    """One layer: three large pictures side by side, and the heads below them.

    Attributes:
        head: lines above.
        large: picture, mean map before, mean map after.
        most: largest mean attention to a token.
        small: (label, before, after) of each head; most_small: their largest attention.
    """

    head: list[str]
    large: tuple[Pixels, Pixels, Pixels]
    most: float
    small: list[tuple[str, Pixels, Pixels]]
    most_small: float

    @classmethod
    def of(
        cls, shown: Shown, own: ImageReport, layer: LayerRedistribution, heads: bool, fit: Fit
    ) -> _Part:
        attention = layer.images[own.image]
        there = _spread(attention, attention.sink.new_ones(len(attention.index)), own) > 0
        sinks = _spread(attention, attention.sink, own) > 0

        def picture(cells: Cells) -> Pixels:
            grey = np.repeat(cells.base.mean(axis=-1, keepdims=True) * DIMMED, 3, axis=-1)
            kept = cells.enlarged(there)[..., None]
            drawn: Pixels = np.where(kept, cells.base, grey).astype(np.uint8)
            return _ringed(drawn, cells, sinks)

        before, after = (
            _spread(attention, one.mean(dim=0), own) for one in (attention.before, attention.after)
        )
        most = max(float(before.max()), float(after.max()), 1e-12)

        def heat(values: npt.NDArray[np.float64]) -> Pixels:
            colours = _colours(values, there, most)
            return drawing(
                shown,
                own,
                fit,
                there,
                lambda cells: _ringed(cells.enlarged(colours), cells, sinks),
            )

        small, most_small = _heads(attention, own, layer, there) if heads else ([], 0.0)
        large = (drawing(shown, own, fit, there, picture), heat(before), heat(after))
        return cls(_lines(layer, own), large, most, small, most_small)

    @property
    def per_line(self) -> int:
        """Heads side by side."""
        room = self._large_width - BAR_ROOM_PX + MARGIN_PX
        return max(1, room // (self.small[0][1].shape[1] + MARGIN_PX)) if self.small else 1

    @property
    def _large_width(self) -> int:
        return sum(int(one.shape[1]) + MARGIN_PX for one in self.large) + BAR_ROOM_PX

    @property
    def width(self) -> int:
        """Pixels, without margins."""
        narrow = int(self.small[0][1].shape[1]) + BAR_ROOM_PX if self.small else 0
        return max(self._large_width, narrow)

    @property
    def _large_height(self) -> int:
        return (len(self.head) + 1) * LINE_PX + int(self.large[0].shape[0]) + MARGIN_PX

    @property
    def _line_height(self) -> int:
        return LINE_PX + 2 * int(self.small[0][1].shape[0]) + MARGIN_PX + 2 if self.small else 0

    @property
    def height(self) -> int:
        """Pixels, with the gap below."""
        lines = -(-len(self.small) // self.per_line)
        words = LINE_PX if self.small else 0
        return self._large_height + words + lines * self._line_height + MARGIN_PX

    def draw(self, sheet: Sheet, top: int) -> None:
        """Draw it on a sheet, `height` pixels from `top` on."""
        for number, words in enumerate(self.head):
            sheet.text(MARGIN_PX, top + number * LINE_PX, words)
        above = top + len(self.head) * LINE_PX + 2
        left, below = MARGIN_PX, above + self.large[0].shape[0] + 2
        captions = (
            "sinks",
            "attention of the last prompt token, before",
            "and after (mean of heads)",
        )
        for pixels, caption in zip(self.large, captions, strict=True):
            sheet.picture(left, above, pixels)
            sheet.text(left + pixels.shape[1] / 2, below, caption, align="center")
            left += pixels.shape[1] + MARGIN_PX
        _bar(sheet, left, above, self.large[0].shape[0], self.most)
        sheet.text(left, below, "root scale")
        if self.small:
            self._draw_heads(sheet, top + self._large_height, left)

    def _draw_heads(self, sheet: Sheet, top: int, right: int) -> None:
        """The heads, from `top` on; their colour bar at `right`."""
        words = "each head with the rows that it changed: attention before, and below it after"
        sheet.text(MARGIN_PX, top, words)
        first = top + LINE_PX
        for number, (label, before, after) in enumerate(self.small):
            line, column = divmod(number, self.per_line)
            x = MARGIN_PX + column * (before.shape[1] + MARGIN_PX)
            y = first + line * self._line_height
            sheet.text(x + before.shape[1] / 2, y, label, align="center")
            sheet.picture(x, y + LINE_PX, before)
            sheet.picture(x, y + LINE_PX + before.shape[0] + 2, after)
        height = 2 * self.small[0][1].shape[0] + 2
        _bar(sheet, right, first + LINE_PX, height, self.most_small)


def _lines(layer: LayerRedistribution, own: ImageReport) -> list[str]:
    """What is said above a layer."""
    index = layer.images[own.image].index
    attention = layer.images[own.image]
    places = own.places
    sinks = attention.index[attention.sink]
    hidden = int((sinks == CLS_INDEX).sum())
    if places is not None:
        hidden += int(places.newline[sinks[sinks != CLS_INDEX]].sum())
    unseen = f" ({hidden} of them not in the picture)" if hidden else ""
    rows, heads = layer.rows, len(layer.changed)
    changed = sum(layer.changed)
    lines = [
        f"layer {layer.layer}: {len(sinks)} of {len(index)} visual tokens are sinks{unseen}, and "
        f"{len(layer.text_sinks)} of the text's tokens",
    ]
    moved = f"; {100 * layer.moved:.1f} % of a row moved, gain up to {layer.gain:.2f}x"
    lines.append(
        f"{changed} of {rows * heads} rows changed ({rows} tokens, {heads} heads)"
        + (moved if changed else "")
    )
    return lines


def _heads(
    attention: ImageAttention, own: ImageReport, layer: LayerRedistribution, there: Mask
) -> tuple[list[tuple[str, Pixels, Pixels]], float]:
    """Small maps of each head, and the largest attention in them."""
    most = max(float(attention.before.max()), float(attention.after.max()), 1e-12)

    side = int(np.clip(3 * PICTURE_PX // len(layer.changed) - MARGIN_PX, *SMALL_PX))

    def small(row: Tensor) -> Pixels:
        return _small(_colours(_spread(attention, row, own), there, most), own, side)

    drawn = [
        (
            f"{head}: {count}/{layer.rows}",
            small(attention.before[head]),
            small(attention.after[head]),
        )
        for head, count in enumerate(layer.changed)
    ]
    return drawn, most


def _small(colours: Pixels, own: ImageReport, side: int) -> Pixels:
    """A map without lines, all grids of the image, each about so many pixels wide."""
    grids = token_grids(own)
    longest = max(max(grid.index.shape) for grid in grids)
    cell = max(2, -(-side // longest))
    parts = [colours[grid.index].repeat(cell, axis=0).repeat(cell, axis=1) for grid in grids]
    return strip(parts, FRAMES_PER_ROW)


def _spread(attention: ImageAttention, values: Tensor, own: ImageReport) -> npt.NDArray[np.float64]:
    """Values of the tokens of a layer over all tokens of the image, 0 where there is none."""
    index = attention.index.numpy()
    spread = np.zeros(own.n_in)
    placed = index != CLS_INDEX
    spread[index[placed]] = values.double().numpy()[placed]
    return spread


def _colours(values: npt.NDArray[np.float64], there: Mask, most: float) -> Pixels:
    """Uint8 [n_in, 3]."""
    colormap = require_extra("matplotlib", "plots").colormaps["cividis"]
    colours = np.asarray(colormap(np.sqrt(np.clip(values / most, 0.0, 1.0))))[:, :3]
    drawn: Pixels = np.rint(colours * 255).astype(np.uint8)
    drawn[~there] = GONE
    return drawn


def _ringed(pixels: Pixels, cells: Cells, sinks: Mask) -> Pixels:
    """A ring in the cell of every sink, black and white, to be seen on any colour."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(picture)
    size = cells.size
    thin = max(1, size // 12)
    lines = ((0, 0, 0), (255, 255, 255), (0, 0, 0))[: 3 if size >= 16 else 2]
    for row, col in zip(*np.nonzero(sinks[cells.index]), strict=True):
        left, top = int(col) * size, int(row) * size
        for step, colour in enumerate(lines):
            inset = 1 + step * thin
            box = (left + inset, top + inset, left + size - inset, top + size - inset)
            draw.ellipse(box, outline=colour, width=thin)
    return np.array(picture)


def _bar(sheet: Sheet, left: int, top: int, height: int, most: float) -> None:
    """The colours with their shares of the row, in percent."""
    places = np.linspace(1.0, 0.0, height) ** 2
    column = _colours(places, np.ones(height, np.bool_), 1.0)
    sheet.picture(left, top, np.repeat(column[:, None], BAR_PX, axis=1))
    x = left + BAR_PX + 4
    for place, share in ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0)):
        y = top + place * height - LINE_PX * place
        sheet.text(x, y, f"{100 * share * most:.3g} %")
