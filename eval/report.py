"""The report of a run: report.json, report.md, report.html and the charts.

Everything is made of the results alone, so that a report can be written again later.
"""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.charts import write_charts
from eval.overlays import read_side
from eval.report_html import (
    about,
    config_yaml,
    failures_title,
    heading,
    overlay_files,
    report_html,
    undrawn_rows,
)
from eval.report_schema import what_is_wrong
from eval.report_summary import caveats, provenance, summary, title, unscored
from eval.report_view import (
    Cell,
    Report,
    TableView,
    TaskResult,
    by_run,
    group_table,
    is_vanilla,
    overview_table,
    task_table,
)
from eval.report_words import DASH, metric_of, task_scale
from mmlm_efficient.errors import DataError, MissingExtraError, RunError
from mmlm_efficient.files import write_json, write_text

FORMAT = 1
OVERLAYS_IN_MARKDOWN = 3

log = logging.getLogger(__name__)


def write_report(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write report.json, report.md, report.html, accuracy_tokens.png and accuracy_ttft.png.

    Args:
        folder: of the run; drawings of samples in it go into the report.
        report: {"format": 1, "date", "name" (optional), "config", "config_sha", "runs": names,
            "workers" (optional), "tasks": of each its `figures.task_result`, "errors": [{"task",
            "message", "run" (optional)}], "seconds"}. Figures that were not measured are None.

    Returns:
        The files. With several runs each has charts of its own, whose names start with the run's.
        A chart that cannot be drawn or written, such as without matplotlib, is not among them: the
        report and the log say so.

    Raises:
        RunError: report.json, report.md or report.html cannot be written.
    """
    files = [folder / "report.json"]
    try:
        write_json(files[0], report)
        charts, notes, can_draw = _charts(folder, report)
        files += [folder / "report.md", folder / "report.html"]
        write_text(files[1], report_markdown(folder, report, charts, notes))
        write_text(files[2], report_html(folder, report, charts=can_draw, notes=notes))
    except OSError as error:
        raise RunError(
            f"{folder}: the report cannot be written: {error.strerror or error}. Make room and "
            "write it again."
        ) from error
    return [*files, *charts]


def _charts(folder: Path, report: Report) -> tuple[list[Path], list[str], bool]:
    """The charts, notes about those that are missing, and whether charts can be drawn at all."""
    try:
        files, notes = write_charts(folder, report)
    except MissingExtraError as error:
        log.warning("The report has no charts: %s", error)
        return [], [f"There are no charts: {error}"], False
    for note in notes:
        log.warning("%s", note)
    return files, notes, True


def report_folder(path: Path) -> Path:
    """The folder of a run from its own path or that of its report.json."""
    return path if path.is_dir() else path.parent


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a run.

    Args:
        folder: of the run, or its report.json.

    Raises:
        DataError: there is none, it is damaged, or it is of another format.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}. Give the folder of a run that has ended, "
            "or its report.json."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: is damaged, it is no JSON ({error}). Write it again by resuming its run."
        ) from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: is no report of format {FORMAT}, which this version reads (it says "
            f"{found!r}). Run the evaluation again with this version, or use the one that wrote it."
        )
    wrong = what_is_wrong(report)
    if wrong is not None:
        raise DataError(f"{path}: is damaged: {wrong} Write it again by resuming its run.")
    return dict(report)


def shown_score(task: TaskResult, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A row's score, its interval, and its difference to the stock model, for short tables.

    Example:
        >>> row = {"row": "none", "metrics": {"acc": {"value": 0.831, "interval": [0.8, 0.86]}}}
        >>> shown_score({"metric": "acc", "rows": [row]}, row)
        ('83.1 %', '80.0 to 86.0', '–')
    """
    scale, found, change = task_scale(task), metric_of(task, row), row.get("to_vanilla") or {}
    difference = DASH if is_vanilla(row) else scale.signed(change.get("difference"))
    ends = scale.interval(change.get("interval"), signed=True)
    return (
        scale.with_unit(found.get("value")),
        scale.interval(found.get("interval")) or DASH,
        f"{difference} ({ends})" if ends else difference,
    )


# -- Markdown -----------------------------------------------------------------------------------


def report_markdown(
    folder: Path, report: Report, charts: Sequence[Path], notes: Sequence[str] = ()
) -> str:
    """The report in GitHub's Markdown; pictures are linked."""
    runs = by_run(report)
    parts = [f"# {text(title(report))}", _errors(report), _unscored(report)]
    parts.extend(text(sentence) for sentence in summary(report))
    parts.extend(f"> {text(one)}" for one in [*notes, *caveats(report)])
    for run, tasks in runs.items():
        overview = overview_table(tasks)
        if overview is not None:
            name = f"All tasks, {run}" if len(runs) > 1 else "All tasks"
            parts += [f"## {text(name)}", markdown_table(overview)]
    parts.extend(f"![{path.stem}]({quote(path.name)})" for path in charts)
    for task in report["tasks"]:
        parts.extend(_task_parts(folder, task, len(runs) > 1))
    parts.append("## Provenance")
    parts.append("\n".join(f"- {name}: {text(value)}" for name, value in provenance(report)))
    fence = "`" * (3 + config_yaml(report).count("```"))
    parts.append(folded("Configuration", f"{fence}yaml\n{config_yaml(report)}{fence}"))
    return "\n\n".join(part for part in parts if part) + "\n"


def _errors(report: Report) -> str:
    errors = report.get("errors") or []
    if not errors:
        return ""
    lines = [f"**{len(errors)} {'task' if len(errors) == 1 else 'tasks'} did not finish**", ""]
    for one in errors:
        run = f" ({text(one['run'])})" if one.get("run") else ""
        lines.append(f"- **{text(one.get('task') or DASH)}**{run}: {text(one['message'])}")
    return "\n".join(lines)


def _unscored(report: Report) -> str:
    missing = unscored(report)
    if not missing:
        return ""
    return "\n".join(["**Scores are missing**", "", *(f"- {text(one)}" for one in missing)])


def _task_parts(folder: Path, task: TaskResult, several_runs: bool) -> list[str]:
    parts = [f"## {text(heading(task, several_runs))}", text(about(task))]
    parts.append(markdown_table(task_table(task)))
    parts.append("▲ ▼: the interval of the difference leaves 0 out.")
    groups = group_table(task)
    if groups is not None:
        parts.append(folded("By group", markdown_table(groups)))
    drawings = _drawings(folder, task)
    if drawings:
        parts.append(folded("Samples", "\n\n".join(drawings)))
    if task.get("failures"):
        lines = ["| row | sample | where | error |", "|---|---|---|---|"]
        for one in task["failures"]:
            facts = (one["row"], one["id"], one["where"], f"{one['type']}: {one['message']}")
            lines.append("| " + " | ".join(text(fact) for fact in facts) + " |")
        parts.append(folded(failures_title(task), "\n".join(lines)))
    return parts


def _drawings(folder: Path, task: TaskResult) -> list[str]:
    """Links to the drawings of the first samples, and which rows they lack."""
    drawings, drawn = [], []
    for file in overlay_files(folder, task)[:OVERLAYS_IN_MARKDOWN]:
        link = quote(file.with_suffix(".png").relative_to(folder).as_posix())
        drawings.append(f"![sample {text(file.stem)}]({link})")
        try:
            drawn.append([panel.row for panel in read_side(file).panels])
        except DataError as error:
            log.warning("%s", error)
    undrawn = undrawn_rows(task, drawn)
    return [*drawings, text(undrawn)] if undrawn else drawings


def markdown_table(view: TableView) -> str:
    """A table in GitHub's Markdown."""
    heads = [
        f"{text(one.name)}<br>{text(one.under)}" if one.under else text(one.name)
        for one in view.columns
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    lines.extend("| " + " | ".join(_cell(one) for one in row) + " |" for row in view.rows)
    return "\n".join(lines)


def _cell(one: Cell) -> str:
    words = text(f"{one.arrow} {one.text}" if one.arrow else one.text)
    return f"{words} ({text(one.note)})" if one.note else words


def folded(name: str, content: str) -> str:
    """A part that opens at a click."""
    # Markdown does not read what stands in the same block as a tag: this is HTML.
    summary = _no_formula(html.escape(" ".join(name.split()), quote=False))
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def text(value: Any) -> str:
    """Words as Markdown shows them: no markup of their own, one line.

    Example:
        >>> text("a|b <script> *x*\\nnext")
        'a\\\\|b &lt;script&gt; \\\\*x\\\\* next'
    """
    words = " ".join(str(DASH if value is None else value).split())
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|~#":
        words = words.replace(mark, f"\\{mark}")
    return _no_formula(words)


def _no_formula(words: str) -> str:
    """GitHub takes what stands between two dollars for a formula, unless they are apart like so."""
    return words.replace("$", "<span>$</span>")
