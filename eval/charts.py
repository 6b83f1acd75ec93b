"""Charts of what accuracy costs: a task's score against visual tokens or time to first token.

One drawing, twice: PNG files, and SVG for the HTML report, whose colours follow the page's own.
matplotlib (the ``plots`` extra) draws; only its object interface is used, no window, no global
figure. Methods differ by colour, marker and label, so that no colour has to be told from another.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.chart_labels import Label, Place, place_labels
from eval.report_view import TaskResult, by_run, is_vanilla, ttft_s
from eval.report_words import Scale, metric_of, task_scale
from mmlm_efficient.errors import MissingExtraError, require_extra
from mmlm_efficient.plots import write_png

Against = Literal["tokens", "ttft"]
AGAINST: tuple[Against, ...] = ("tokens", "ttft")

TEXT, MUTED, LINES = "#24292f", "#6e7781", "#e4e7eb"
# Okabe and Ito's colours, which colour-blind readers can tell apart; the yellow is too pale.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195")
MARKERS = "osD^vP<X>ph"
PANEL_IN = (4.7, 3.7)
COLUMNS = 3
LABEL_CHARACTERS = 30
# Between methods of the same cost.
_DODGE_PT = 3.0
KEY = "star: stock model   filled points and grey steps: Pareto front   bars: 95 % intervals"

_AXIS = {
    "tokens": "visual tokens per decoder layer, mean",
    "ttft": "time to first token, ms, median",
}


@dataclass(frozen=True)
class Point:
    """A row in a chart, in the units of its axes.

    Attributes:
        label: of the row.
        x, y: cost and score.
        ends: both ends of the score's interval, or None.
    """

    label: str
    x: float
    y: float
    ends: tuple[float, float] | None = None

    @property
    def method(self) -> str:
        """The row's label without its budgets; the points of a method are connected.

        Example:
            >>> Point("flowcut:72+fastv:36", 36, 80).method
            'flowcut+fastv'
            >>> Point("pyramiddrop-192", 192, 80).method
            'pyramiddrop'
        """
        return "+".join(name for name, _ in _parts(self.label))

    @property
    def budget(self) -> str:
        """The budgets alone, "72+36"; empty if there are none."""
        return "+".join(budget for _, budget in _parts(self.label) if budget)


def _parts(label: str) -> list[tuple[str, str]]:
    """Names and budgets of the methods in a label, written as name:budget or name-number."""
    found = []
    for part in label.split("+"):
        name, colon, budget = part.partition(":")
        if not colon and (number := re.fullmatch(r"(.+)-(\d+(?:\.\d+)?)", part)):
            name, budget = number[1], number[2]
        found.append((name, budget))
    return found


@dataclass
class _Panel:
    """A drawn panel whose labels are still to be placed."""

    axes: Any
    labels: list[Label] = field(default_factory=list)
    lines: list[Place] = field(default_factory=list)
    dots: list[Place] = field(default_factory=list)


def points_of(task: TaskResult, against: Against) -> tuple[list[Point], Point | None]:
    """The rows of a task that have both figures, and the stock model."""
    scale, points, stock = task_scale(task), [], None
    for row in task["rows"]:
        found = metric_of(task, row)
        x = row.get("visual_tokens_mean") if against == "tokens" else ttft_s(row)
        if x is None or found.get("value") is None:
            continue
        ends = found.get("interval")
        point = Point(
            row["row"],
            x if against == "tokens" else x * 1e3,
            scale.number(found["value"]),
            None if ends is None else (scale.number(ends[0]), scale.number(ends[1])),
        )
        if is_vanilla(row):
            stock = point
        else:
            points.append(point)
    return points, stock


def pareto_front(points: Sequence[Point], *, higher_is_better: bool = True) -> list[Point]:
    """The points that no other beats in one figure without losing in the other, cheapest first.

    Example:
        >>> front = pareto_front([Point("a", 1, 5), Point("b", 2, 4), Point("c", 3, 6)])
        >>> [point.label for point in front]
        ['a', 'c']
    """
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda one: (one.x, -sign * one.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def write_charts(folder: Path, report: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """The PNG charts of a report: accuracy_tokens.png and accuracy_ttft.png.

    Args:
        folder: of the report.
        report: see `report.write_report`. With several runs, each has its own charts, whose names
            start with the run's.

    Returns:
        The files, and notes about those that could not be drawn or written. A chart for which
        nothing was measured is in neither.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    runs = by_run(report)
    files: list[Path] = []
    notes: list[str] = []
    for run, tasks in runs.items():
        for against in AGAINST:
            start = f"{run}_" if len(runs) > 1 else ""
            file = folder / f"{start}accuracy_{against}.png"
            try:
                data = chart_png(tasks, against)
                if data is None:
                    continue
                write_png(file, data)
            except MissingExtraError:
                raise
            # Figures are worth more than their charts, and matplotlib may raise anything.
            except Exception as error:  # noqa: BLE001
                notes.append(missing_chart(file.name, error))
                continue
            files.append(file)
    return files, notes


def missing_chart(name: str, error: Exception) -> str:
    """Why a chart is not in a report."""
    return f"The chart {name} is missing: {type(error).__name__}: {error}"


def chart_png(tasks: Sequence[TaskResult], against: Against) -> bytes | None:
    """A chart with one panel per task, PNG; None if no task has points."""
    drawn = [task for task in tasks if points_of(task, against)[0]]
    if not drawn:
        return None
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, panels = _figure(rows, columns, 160)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    canvases = []
    for axes, task in zip(panels, drawn, strict=False):
        canvases.append(_panel(axes, task, against))
        title = _short(f"{task['task']}, n = {task.get('samples') or 0:,}", 46)
        axes.set_title(title, fontsize=9.5, color=TEXT, loc="left", parse_math=False)
    figure.supxlabel(KEY, fontsize=8, color=MUTED)
    _label_panels(figure, canvases)
    encoded = io.BytesIO()
    with _any_script():
        figure.savefig(encoded, format="png", facecolor="white")
    return encoded.getvalue()


def chart_svg(task: TaskResult, against: Against, name: str) -> str | None:
    """The chart of one task as an SVG element to put into a page; None without points.

    Args:
        task: its results.
        against: what the score is drawn against.
        name: letters and digits, different for each chart of a page.

    Returns:
        Markup in which all text of the task is escaped. Its colours are the custom properties
        ``--text``, ``--muted``, ``--lines``, ``--paper`` and ``--c0`` and so on, where the page
        defines them.
    """
    if not points_of(task, against)[0]:
        return None
    matplotlib = require_extra("matplotlib", "plots")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure, panels = _figure(1, 1, 72)
        _label_panels(figure, [_panel(panels[0], task, against)])
        encoded = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with _any_script():
            figure.savefig(encoded, format="svg", transparent=True, metadata=nothing)
    return _for_page(encoded.getvalue().decode("utf-8"), name)


def _for_page(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no references to the outside, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    label = f"chart-{name}"
    svg = f'<svg class="chart" role="img" aria-label="{label}" {box[0] if box else ""}>{rest}'
    # Names are the file's own: a page holds several files.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit", svg)
    named = {TEXT: "text", MUTED: "muted", LINES: "lines", "#ffffff": "paper"}
    named |= {colour: f"c{number}" for number, colour in enumerate(COLOURS)}
    for colour, variable in named.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg.strip()


# -- one panel ----------------------------------------------------------------------------------


def _figure(rows: int, columns: int, dpi: int) -> tuple[Any, list[Any]]:
    figure_module = require_extra("matplotlib.figure", "plots")
    agg = require_extra("matplotlib.backends.backend_agg", "plots")
    size_in = (PANEL_IN[0] * columns, PANEL_IN[1] * rows)
    figure = figure_module.Figure(figsize=size_in, dpi=dpi, layout="constrained")
    agg.FigureCanvasAgg(figure)  # measures the labels
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _panel(axes: Any, task: TaskResult, against: Against) -> _Panel:
    """Draw all of a panel but its labels, which need the finished layout."""
    points, stock = points_of(task, against)
    higher = bool(task.get("higher_is_better", True))
    front = {point.label for point in _front(points, stock, higher)}
    _paint_axes(axes, points + ([stock] if stock else []), against)
    # Colours follow the order of the rows: the same method looks the same in both charts.
    order = dict.fromkeys(Point(row["row"], 0, 0).method for row in task["rows"])
    order.pop("none", None)
    looks = {method: number for number, method in enumerate(order)}
    panel = _Panel(axes, dots=[(one.x, one.y) for one in points])
    if stock:
        panel.labels.append(_stock(axes, stock, task_scale(task)))
        panel.dots.append((stock.x, stock.y))
        low, high = axes.get_xlim()
        panel.lines.extend(_between(axes, Point("", low, stock.y), Point("", high, stock.y), 60))
    _staircase(axes, _front(points, stock, higher))
    dodges = _dodges(points)
    for method in dict.fromkeys(point.method for point in points):
        line = sorted((one for one in points if one.method == method), key=lambda one: one.x)
        look = looks[method]
        _method_line(axes, line, front, look, dodges[method])
        panel.labels.extend(_method_labels(line, COLOURS[look % len(COLOURS)]))
        for first, second in itertools.pairwise(line):
            panel.lines.extend(_between(axes, first, second, 14))
        for one in line:
            low, high = one.ends or (one.y, one.y)
            panel.lines.extend(_between(axes, Point("", one.x, low), Point("", one.x, high), 5))
    axes.set_xlabel(_AXIS[against], fontsize=8.5, color=MUTED)
    name = task_scale(task).named(task["metric"]) + ("" if higher else " (lower is better)")
    axes.set_ylabel(_short(name, 44), fontsize=8.5, color=MUTED, parse_math=False)
    if not higher:
        axes.invert_yaxis()
    return panel


def _front(points: Sequence[Point], stock: Point | None, higher: bool) -> list[Point]:
    return pareto_front([*points, *([stock] if stock else [])], higher_is_better=higher)


def _paint_axes(axes: Any, points: Sequence[Point], against: Against) -> None:
    axes.set_facecolor("none")
    axes.grid(color=LINES, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINES)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    low, high = min(one.x for one in points), max(one.x for one in points)
    if low > 0 and high / low > 3:
        axes.set_xscale("log", base=2)
        axes.set_xticks(*_ticks(points, against))
        axes.minorticks_off()
        room = (high / low) ** 0.12
        axes.set_xlim(low / room, high * room)
    else:
        axes.margins(x=0.14)
    axes.margins(y=0.16)


def _ticks(points: Sequence[Point], against: Against) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis: at the budgets themselves, or powers of two."""
    values = sorted({round(one.x, 1) for one in points})
    if against == "ttft" or len(values) > 12:
        first, last = math.ceil(math.log2(values[0])), math.floor(math.log2(values[-1]))
        values = [2.0**power for power in range(first, last + 1)] or [values[0]]
    kept: list[float] = []
    for value in reversed(values):  # the stock model's own count stays
        if not kept or kept[-1] / value > 1.22:
            kept.append(value)
    return kept, [f"{value:,.4g}" for value in kept]


def _stock(axes: Any, stock: Point, scale: Scale) -> Label:
    """The stock model: a star, a dashed line at its score, and its interval as a band."""
    if stock.ends is not None:
        axes.axhspan(*stock.ends, color=MUTED, alpha=0.09, linewidth=0, zorder=0.5)
    axes.axhline(stock.y, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
    axes.plot([stock.x], [stock.y], marker="*", markersize=12, color=TEXT, linestyle="", zorder=5)
    written = f"{stock.y:,.{scale.decimals}f}" + (" %" if scale.percent else "")
    return Label(f"none, {written}", ((stock.x, stock.y),), TEXT, 8.0, must=True)


def _staircase(axes: Any, front: Sequence[Point]) -> None:
    """The Pareto front: the best score for at most so much cost."""
    if len(front) > 1:
        axes.step(
            [one.x for one in front],
            [one.y for one in front],
            where="post",
            color=MUTED,
            linewidth=4.5,
            alpha=0.22,
            solid_joinstyle="round",
            zorder=1.6,
        )


def _dodges(points: Sequence[Point]) -> dict[str, float]:
    """By method: how far to the right it is drawn, in points of type.

    Methods that share a cost stand side by side, or their intervals would hide each other.
    """
    places: dict[float, set[str]] = {}
    for one in points:
        places.setdefault(one.x, set()).add(one.method)
    methods = list(dict.fromkeys(one.method for one in points))
    crowded = {method for there in places.values() if len(there) > 1 for method in there}
    beside = [method for method in methods if method in crowded]
    middle = (len(beside) - 1) / 2
    return {
        method: (beside.index(method) - middle) * _DODGE_PT if method in crowded else 0.0
        for method in methods
    }


def _method_line(
    axes: Any, line: Sequence[Point], front: set[str], look: int, dodge_pt: float
) -> None:
    transforms = require_extra("matplotlib.transforms", "plots")
    scale = axes.figure.dpi_scale_trans
    place = axes.transData + transforms.ScaledTranslation(dodge_pt / 72, 0, scale)
    # What has a transform of its own does not move the limits of the axes.
    axes.update_datalim([(one.x, y) for one in line for y in (one.y, *(one.ends or ()))])
    axes.autoscale_view()
    colour, marker = COLOURS[look % len(COLOURS)], MARKERS[look % len(MARKERS)]
    dashes: Any = "-" if look < len(COLOURS) else (0, (2, 1.4))
    axes.plot(
        [one.x for one in line],
        [one.y for one in line],
        color=colour,
        linewidth=1.5,
        linestyle=dashes,
        transform=place,
        zorder=3,
    )
    for one in line:
        if one.ends is not None:
            axes.plot(
                [one.x, one.x],
                list(one.ends),
                color=colour,
                linewidth=1,
                alpha=0.55,
                transform=place,
                zorder=2.5,
            )
        axes.plot(
            [one.x],
            [one.y],
            marker=marker,
            markersize=6,
            markeredgewidth=1.4,
            markeredgecolor=colour,
            markerfacecolor=colour if one.label in front else "#ffffff",
            linestyle="",
            transform=place,
            zorder=4,
        )


def _method_labels(line: Sequence[Point], colour: str) -> list[Label]:
    """The method's name beside one of its points, budgets beside the points if there is room."""
    # The ends of a line are where its name is looked for.
    places = tuple((one.x, one.y) for one in (line[0], line[-1], *line[1:-1]))
    if len(line) == 1:
        return [Label(_short(line[0].label), places, colour, 8.2, must=True)]
    name = Label(_short(line[0].method), places, colour, 8.6, must=True, bold=True)
    budgets = [
        Label(_short(one.budget, 12), ((one.x, one.y),), MUTED, 6.8) for one in line if one.budget
    ]
    return [name, *budgets]


def _between(axes: Any, first: Point, second: Point, steps: int) -> list[Place]:
    """Places along a line, as the axes draw it, that labels keep clear of."""
    found = []
    for step in range(steps + 1):
        part = step / steps
        x = first.x + part * (second.x - first.x)
        if axes.get_xscale() == "log":
            x = first.x * (second.x / first.x) ** part
        found.append((x, first.y + part * (second.y - first.y)))
    return found


def _label_panels(figure: Any, panels: Sequence[_Panel]) -> None:
    with _any_script():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for panel in panels:
            place_labels(figure, panel.axes, panel.labels, panel.lines, panel.dots)


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """No warnings about characters that the font lacks: names of any script are in the tables."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _short(text: str, characters: int = LABEL_CHARACTERS) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
