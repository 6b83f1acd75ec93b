"""Charts: which points are drawn where, the Pareto front, labels, and the files."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from eval import charts
from eval.chart_labels import Label, place_labels
from eval.charts import Point, _dodges, chart_png, chart_svg, pareto_front, points_of, write_charts
from tests.eval.made_reports import ATTACK, NOTHING, report, row, task, usual


def test_pareto_front_by_hand() -> None:
    points = [
        Point("a", 9, 60),
        Point("b", 36, 79),
        Point("c", 36, 80),  # as cheap as b, and better
        Point("d", 72, 80),  # no better than c
        Point("e", 144, 83),
        Point("f", 100, 50),
    ]
    assert [one.label for one in pareto_front(points)] == ["a", "c", "e"]
    lower = pareto_front(points, higher_is_better=False)
    assert [one.label for one in lower] == ["a", "f"]
    assert pareto_front([]) == []


def test_points_are_in_the_units_of_the_axes() -> None:
    result = usual()["tasks"][0]
    points, stock = points_of(result, "ttft")
    assert stock == Point("none", 40.0, 83.1, (pytest.approx(81.1), pytest.approx(85.1)))
    assert [one.label for one in points] == ["flowcut:36", "flowcut:72", "fastv:36"]
    assert points[0].x == 20.0
    assert points_of(result, "tokens")[0][0].x == 36.0


def test_rows_without_a_figure_are_not_drawn() -> None:
    rows = [row("none", 0.5), row("a:1", None, **NOTHING), row("b:1", 0.4, 0.5)]
    assert [one.label for one in points_of(task("vqa", rows), "tokens")[0]] == ["b:1"]
    assert chart_png([task("vqa", rows[:2])], "tokens") is None
    assert chart_svg(task("vqa", rows[:1]), "tokens", "x") is None


@pytest.mark.parametrize(
    ("label", "method", "budget"),
    [
        ("flowcut:36", "flowcut", "36"),
        ("vflowopt:0.25", "vflowopt", "0.25"),
        ("flowcut:72+fastv:36", "flowcut+fastv", "72+36"),
        ("xl2", "xl2", ""),
        ("pyramiddrop-192", "pyramiddrop", "192"),
        ("my-method:9", "my-method", "9"),
    ],
)
def test_method_and_budget_of_a_label(label: str, method: str, budget: str) -> None:
    point = Point(label, 1, 1)
    assert (point.method, point.budget) == (method, budget)


def test_svg_is_one_element_in_the_colours_of_the_page() -> None:
    svg = chart_svg(usual()["tasks"][0], "tokens", "t0")
    assert svg is not None
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert "http" not in svg
    assert "<style" not in svg
    assert "xlink" not in svg
    names = re.findall(r'\bid="([^"]*)"', svg)
    assert names
    assert all(name.startswith("t0-") for name in names)
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]*)", svg)) <= set(names)
    for variable in ("--text", "--muted", "--lines", "--paper", "--c0", "--c1"):
        assert f"var({variable}, #" in svg
    words = {"".join(one.itertext()).strip() for one in root.iter("text")}
    assert {"flowcut", "fastv:36", "none, 83.1 %", "36", "72", "144"} <= words
    # The same again: nothing of it is random.
    assert chart_svg(usual()["tasks"][0], "tokens", "t0") == svg


def test_names_of_rows_are_text() -> None:
    rows = [row("none", 0.5), row(f"{ATTACK[:20]}$x$:36", 0.4, 0.5)]
    svg = chart_svg(task("vqa", rows, metric="acc"), "tokens", "t0")
    assert svg is not None
    assert "<script" not in svg
    ElementTree.fromstring(svg)


def test_methods_of_the_same_cost_stand_side_by_side() -> None:
    points = [Point("a:1", 9, 5), Point("b:1", 9, 6), Point("c:1", 20, 7), Point("b:2", 30, 7)]
    dodges = _dodges(points)
    assert dodges == {"a": -1.5, "b": 1.5, "c": 0.0}
    assert set(_dodges(points[2:]).values()) == {0.0}


def test_every_interval_is_inside_the_axes() -> None:
    _, (axes,) = charts._figure(1, 1, 100)
    made = usual()["tasks"][0]
    charts._panel(axes, made, "tokens")
    low, high = axes.get_ylim()
    points, stock = points_of(made, "tokens")
    assert stock is not None
    assert len(points) == 3
    for one in (*points, stock):
        assert one.ends is not None
        assert low < one.ends[0] < one.ends[1] < high


def test_png_has_a_panel_per_task() -> None:
    def size(tasks: list[dict]) -> tuple[int, int]:
        data = chart_png(tasks, "tokens")
        assert data is not None
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            return picture.size

    one = usual()["tasks"][0]
    width, height = size([one])
    assert size([one] * 2) == (2 * width, height)
    assert size([one] * 4) == (3 * width, 2 * height)


def test_one_sample_one_row_and_zero_cost(tmp_path: Path) -> None:
    single = {"metrics": {"acc": {"value": 1.0, "interval": None}}, "ttft_s": {"median": 0.0}}
    rows = [row("none", 1.0, **single), row("a", 1.0, 1.0, **single)]
    files, notes = write_charts(tmp_path, report([task("vqa", rows, samples=1)]))
    assert (len(files), notes) == (2, [])


def test_many_methods_and_lower_is_better(tmp_path: Path) -> None:
    rows = [row("none", 0.2)]
    for number in range(14):
        for kept in (9, 36, 72):
            value = 0.2 + number / 40 + 1 / kept
            rows.append(row(f"method{number}x:{kept}", value, 0.2, visual_tokens_mean=float(kept)))
    result = task("wer", rows, higher_is_better=False)
    svg = chart_svg(result, "tokens", "x")
    assert svg is not None
    assert "(lower is better)" in svg
    # Every method has its name, whatever the crowd.
    assert all(f">method{number}x<" in svg for number in range(14))


def test_a_chart_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    files, notes = write_charts(tmp_path / "file", usual())
    assert files == []
    assert [note.partition(" is missing: MediaError: ")[0] for note in notes] == [
        "The chart accuracy_tokens.png",
        "The chart accuracy_ttft.png",
    ]


def test_a_chart_that_cannot_be_drawn_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = charts.chart_png

    def broken(tasks: list[dict], against: charts.Against) -> bytes | None:
        if against == "tokens":
            raise RuntimeError("font cache")
        return real(tasks, against)

    monkeypatch.setattr(charts, "chart_png", broken)
    files, notes = write_charts(tmp_path, usual())
    assert [file.name for file in files] == ["accuracy_ttft.png"]
    assert notes == ["The chart accuracy_tokens.png is missing: RuntimeError: font cache"]


def boxes(labels: list[Label], points: list[tuple[float, float]]) -> dict[str, object]:
    figure, panels = charts._figure(1, 1, 100)
    axes = panels[0]
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    place_labels(figure, axes, labels, [], points)
    renderer = figure.canvas.get_renderer()
    return {one.get_text(): one.get_window_extent(renderer) for one in figure.texts}


def test_labels_do_not_meet() -> None:
    places = [(5.0, 5.0), (5.3, 5.0), (5.0, 5.4)]
    labels = [Label(f"label {n}", (place,), "k", 8, must=True) for n, place in enumerate(places)]
    found = list(boxes(labels, places).values())
    assert len(found) == 3
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            assert not one.overlaps(other)  # type: ignore[attr-defined]


def test_a_label_without_room_is_left_out_unless_it_must_be_there() -> None:
    crowd = [(x / 4, y / 4) for x in range(41) for y in range(41)]
    named = Label("name", ((5.0, 5.0),), "k", 8, must=True)
    budget = Label("36", ((5.0, 5.0),), "k", 7)
    assert set(boxes([named, budget], crowd)) == {"name"}
    assert set(boxes([named, budget], [(5.0, 5.0)])) == {"name", "36"}
