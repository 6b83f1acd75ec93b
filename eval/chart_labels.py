"""Labels beside the points of a chart, put where they hide least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Place = tuple[float, float]
Box = tuple[float, float, float, float]

# Directions in which a label may lie from its point, the best first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_OTHER_LABEL, _POINT, _LINE, _OUTSIDE = 30.0, 8.0, 1.2, 60.0
_BAD = 8.0  # a label that is not needed is left out at this cost


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point.

    Attributes:
        text: what it says.
        places: points it may stand beside, in units of the axes, the best first.
        colour, size: of the text; points of type.
        must: drawn even where it hides something.
        bold: heavier type.
    """

    text: str
    places: tuple[Place, ...]
    colour: str
    size: float
    must: bool = False
    bold: bool = False


def place_labels(
    figure: Any,
    axes: Any,
    labels: Sequence[Label],
    lines: Sequence[Place],
    points: Sequence[Place],
) -> None:
    """Write labels, those that must be there first.

    Args:
        figure, axes: finished but for the labels.
        labels: what to write.
        lines, points: what labels are not to hide, in units of the axes.
    """
    renderer, dot = figure.canvas.get_renderer(), figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    bounds = (frame.x0, frame.y0, frame.x1 + 6 * dot, frame.y1 + 10 * dot)
    on_line = [tuple(axes.transData.transform(place)) for place in lines]
    at_point = [_around(axes.transData.transform(place), 4.5 * dot) for place in points]
    taken: list[Box] = []
    for label in sorted(labels, key=lambda one: not one.must):
        text = axes.figure.text(
            0,
            0,
            label.text,
            fontsize=label.size,
            color=label.colour,
            fontweight="bold" if label.bold else "normal",
            parse_math=False,
            zorder=6,
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        best: tuple[float, Box] | None = None
        for rank, place in enumerate(label.places):
            x, y = axes.transData.transform(place)
            for turn, box in enumerate(_boxes(x, y, width, height, dot)):
                cost = 0.9 * rank + 0.25 * turn + _cost(box, taken, at_point, on_line, bounds)
                if best is None or cost < best[0]:
                    best = cost, box
        if best is None or (best[0] >= _BAD and not label.must):
            text.remove()
            continue
        taken.append(best[1])
        # The baseline lies above the lower edge of the text's box.
        text.set_verticalalignment("bottom")
        text.set_position(figure.transFigure.inverted().transform(best[1][:2]))


def _boxes(x: float, y: float, width: float, height: float, dot: float) -> list[Box]:
    """Where a text may lie beside a point, close by and a little farther off."""
    found = []
    for gap in (7 * dot, 13 * dot, 20 * dot):
        for across, up in _DIRECTIONS:
            aside = 0.75 * gap if across and up else gap
            left = x - width / 2 + across * (width / 2 + aside)
            low = y - height / 2 + up * (height / 2 + aside)
            found.append((left, low, left + width, low + height))
    return found


def _cost(
    box: Box, taken: Sequence[Box], points: Sequence[Box], lines: Sequence[Any], bounds: Box
) -> float:
    cost = sum(_OTHER_LABEL for other in taken if _meet(box, other))
    cost += sum(_POINT for other in points if _meet(box, other))
    cost += sum(_LINE for x, y in lines if box[0] < x < box[2] and box[1] < y < box[3])
    inside = bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2]
    return cost + (0 if inside and box[3] <= bounds[3] else _OUTSIDE)


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _around(place: Any, reach: float) -> Box:
    return place[0] - reach, place[1] - reach, place[0] + reach, place[1] + reach
