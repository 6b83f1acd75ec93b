"""Reports as one HTML file: everything inside, nothing fetched, readable offline and on a phone.

Jinja escapes all that comes from data; only the charts, whose text matplotlib escapes, go in as
they are. A content security policy in the page forbids requests and any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from PIL import Image

from eval.charts import AGAINST, chart_svg, missing_chart
from eval.overlays import OVERLAYS, read_side
from eval.report_summary import (
    caveats,
    is_score_failure,
    provenance,
    summary,
    title,
    unscored,
)
from eval.report_view import (
    Report,
    TaskResult,
    by_run,
    group_table,
    overview_table,
    task_table,
)
from eval.report_words import DASH, duration, file_name, in_words, plural

TEMPLATES = Path(__file__).parent / "templates"
OVERLAY_BYTES = 16 * 2**20  # of all overlays together
_PNG_BYTES = 40_000  # what is larger as PNG goes in as JPEG
_WIDE_PX = 330


@dataclass(frozen=True)
class Picture:
    """What one row kept of a sample and answered to it."""

    row: str
    uri: str
    alt: str
    tokens: str
    answer: str | None
    changed: bool


@dataclass(frozen=True)
class SampleView:
    """A sample with the answers of all rows."""

    question: str
    target: str
    pictures: tuple[Picture, ...]
    wide: bool


def page(template: str, **context: Any) -> str:
    """A page from its template, with style and script inside.

    Args:
        template: file in `templates/`.
        context: what the template names; "title" and "meta" for all of them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: DASH if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(template).render(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        **context,
    )


def report_html(folder: Path, report: Report, *, charts: bool, notes: Sequence[str] = ()) -> str:
    """The HTML of a report.

    Args:
        folder: of the report, where the overlays are.
        report: see `report.write_report`.
        charts: draw them; matplotlib is there.
        notes: what else a reader has to know.
    """
    overlays, missing = Overlays(folder), list[str]()
    runs, sections = by_run(report), []
    for number, task in enumerate(report["tasks"]):
        drawn = _charts(task, number, missing) if charts else []
        sections.append(_section(task, number, len(runs) > 1, drawn, overlays))
    overviews = [
        {"run": run, "table": table}
        for run, tasks in runs.items()
        if (table := overview_table(tasks)) is not None
    ]
    facts = [report.get("date"), duration(report["seconds"]) if report.get("seconds") else None]
    return page(
        "report.html.jinja",
        title=title(report),
        meta=" · ".join(str(one) for one in facts if one),
        errors=[{"run": "", "task": None, **one} for one in report.get("errors") or []],
        unscored=unscored(report),
        summary=summary(report),
        notes=[*notes, *missing, *caveats(report), *overlays.notes],
        overviews=overviews,
        sections=sections,
        provenance=provenance(report),
        config=config_yaml(report),
    )


def config_yaml(report: Report) -> str:
    """The configuration of a report as YAML."""
    # By way of JSON: what YAML cannot write, such as a path, is not in the file either.
    config = json.loads(json.dumps(report.get("config") or {}, default=str))
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def about(task: TaskResult) -> str:
    """What a task is, in one line."""
    direction = "higher" if task.get("higher_is_better", True) else "lower"
    facts = [
        plural(int(task.get("samples") or 0), "sample"),
        f"{task['metric']}, {direction} is better",
        task.get("source"),
        f"paper: {task['expected_source']}" if task.get("expected_source") else None,
        task.get("notes"),
        _not_compared(task),
    ]
    return " · ".join(str(one) for one in facts if one)


def _not_compared(task: TaskResult) -> str | None:
    """Published numbers of a task that measure something else than it does."""
    numbers = task.get("not_compared") or {}
    if not numbers:
        return None
    listed = ", ".join(f"{row} {value:g}" for row, value in numbers.items())
    return f"published, but not to be compared with these figures: {listed}"


def heading(task: TaskResult, several_runs: bool) -> str:
    """Name of a task's section."""
    return f"{task['run']}: {task['task']}" if several_runs else str(task["task"])


def failures_title(task: TaskResult) -> str:
    """How many failed, and how many of them are listed."""
    failures = task.get("failures") or ()
    scores = sum(is_score_failure(one) for one in failures)
    listed = len(failures) - scores
    failed = max(listed, sum(row.get("failed") or 0 for row in task["rows"]))
    parts = [plural(scores, "missing score")] if scores else []
    if failed or not scores:
        more = f", the first {listed} of them" if failed > listed else ""
        parts.append(f"{plural(failed, 'failed answer')}{more}")
    return "; ".join(parts)


def _charts(task: TaskResult, number: int, missing: list[str]) -> list[Markup]:
    """The charts of a task; why one could not be drawn is added to `missing`."""
    drawn = []
    for one in AGAINST:
        try:
            chart = chart_svg(task, one, f"t{number}{one}")
        # Figures are worth more than their charts, and matplotlib may raise anything.
        except Exception as error:  # noqa: BLE001
            missing.append(missing_chart(f"of {task['task']} against {one}", error))
            continue
        if chart is not None:
            drawn.append(Markup(chart))
    return drawn


def _section(
    task: TaskResult,
    number: int,
    several_runs: bool,
    charts: Sequence[Markup],
    overlays: Overlays,
) -> dict[str, Any]:
    samples = overlays.of(task)
    return {
        "anchor": f"task-{number}",
        "heading": heading(task, several_runs),
        "about": about(task),
        "table": task_table(task),
        "charts": charts,
        "groups": group_table(task),
        "samples": samples,
        "undrawn": undrawn_rows(task, [[one.row for one in sample.pictures] for sample in samples]),
        "failures": task.get("failures") or [],
        "failures_title": failures_title(task),
    }


# -- overlays -----------------------------------------------------------------------------------


class Overlays:
    """The drawings of samples beside a report, up to a size that a page can bear.

    Args:
        folder: of the report.

    Attributes:
        notes: what is missing and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._left = OVERLAY_BYTES

    def of(self, task: TaskResult) -> list[SampleView]:
        """The first few samples of a task."""
        files = overlay_files(self.folder, task)
        shown: list[SampleView] = []
        for number, file in enumerate(files):
            if number >= OVERLAYS or self._left <= 0:
                where = files[0].parent.relative_to(self.folder)
                self.notes.append(
                    f"{task['task']}: {len(files) - number} more drawings of samples in {where}."
                )
                break
            try:
                shown.append(self._read(file))
            # Figures are worth more than drawings, and a damaged picture may raise anything.
            except Exception as error:  # noqa: BLE001
                name = file.relative_to(self.folder)
                self.notes.append(f"{name}: the drawing cannot be read ({error}).")
        return shown

    def _read(self, file: Path) -> SampleView:
        """A drawing by its side file, cut into the pictures of its rows."""
        side = read_side(file)
        stock, pictures, widest = side.answers.get("none"), [], 0
        with Image.open(file.with_suffix(".png")) as sheet:
            for panel in side.panels:
                uri = ""
                if panel.box is not None:
                    left, top, right, bottom = panel.box
                    if not (0 <= left < right <= sheet.width and 0 <= top < bottom <= sheet.height):
                        raise ValueError(f"{panel.box} lies outside the drawing")
                    uri = _data_uri(sheet.crop((left, top, right, bottom)))
                    widest = max(widest, right - left)
                self._left -= len(uri)
                answer = side.answers.get(panel.row)
                changed = None not in (answer, stock) and answer != stock
                alt = f"{panel.row}: {panel.tokens}" if panel.tokens else panel.row
                pictures.append(Picture(panel.row, uri, alt, panel.tokens, answer, changed))
        target = "" if side.target is None else in_words(side.target)
        return SampleView(side.question, target, tuple(pictures), widest > _WIDE_PX)


def overlay_files(folder: Path, task: TaskResult) -> list[Path]:
    """The side files of a task's drawings, in the order of the samples."""

    def order(file: Path) -> tuple[int, str]:
        number = file.name.partition("-")[0]
        return int(number) if number.isdigit() else 2**31, file.name

    return sorted(
        (folder / task["run"] / "overlays" / file_name(task["task"])).glob("*.json"), key=order
    )


def undrawn_rows(task: TaskResult, drawn: Sequence[Sequence[str]]) -> str | None:
    """Which rows of a task are not in its drawings; None if all are in all of them.

    Args:
        task: its results.
        drawn: labels in each of the drawings.
    """
    labels = [row["row"] for row in task["rows"]]
    missing = [one for one in labels if any(one not in rows for rows in drawn)]
    if not missing:
        return None
    return (
        f"Not in all of these drawings: {', '.join(missing)}. A sample is drawn while all rows "
        "answer it; rows that join a run later are not."
    )


def _data_uri(picture: Image.Image) -> str:
    """A picture inside the page: exact if that is small, else as JPEG."""
    encoded, kind = io.BytesIO(), "png"
    picture.save(encoded, format="PNG", optimize=True)
    if encoded.tell() > _PNG_BYTES:
        encoded, kind = io.BytesIO(), "jpeg"
        picture.convert("RGB").save(encoded, format="JPEG", quality=88, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode('ascii')}"
