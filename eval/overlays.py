"""One drawing per sample: what every row kept of the pictures, and what it answered.

Beside the drawing lies a JSON file of the same name with question, target and answers as text and
the place of each row in the drawing, so that reports show text as text.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.report_words import in_words
from eval.schema import explained
from eval.task import IMAGE, VIDEO, Sample
from mmlm_efficient.errors import DataError, MediaError, MMLMError
from mmlm_efficient.families.base import Fit
from mmlm_efficient.files import write_json
from mmlm_efficient.plot_grids import MARGIN_PX, PICTURE_PX, Pixels, is_video
from mmlm_efficient.plots import LINE_PX, Panel, Sheet, kept_pixels, wrapped
from mmlm_efficient.tokens import ImageReport, TokenPlaces
from mmlm_efficient.video import FrameSampling, Video, load_video

FORMAT = 1
OVERLAYS = 4  # samples of a task that are drawn, and shown in its report
SHOWN = 4  # pictures or frames of a sample
COLUMNS = 5
_QUESTION, _ANSWER = 400, 120  # characters drawn; the side file has all of them
_EMPTY = (232, 234, 237)


class SidePanel(BaseModel):
    """One row of a drawing, as its side file has it; box: left, top, right, bottom, in pixels."""

    model_config = ConfigDict(strict=True)

    row: str
    box: Annotated[list[int], Field(min_length=4, max_length=4)] | None
    tokens: str


class Side(BaseModel):
    """What lies beside a drawing as text; answers by row."""

    model_config = ConfigDict(strict=True)

    format: int
    question: str
    target: Any
    answers: dict[str, str]
    panels: list[SidePanel]


def read_side(file: Path) -> Side:
    """The side file of a drawing.

    Raises:
        DataError: it cannot be read, is damaged, or of another format.
    """
    try:
        side = Side.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise DataError(f"{file}: is damaged: {explained(error).removeprefix(': ')}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is damaged, it is no JSON ({error}).") from error
    if side.format != FORMAT:
        raise DataError(f"{file}: is of format {side.format}, this version reads {FORMAT}.")
    return side


@dataclass(frozen=True)
class _Drawn:
    """One row in the drawing: its pictures and the lines above them."""

    row: str
    pixels: Pixels
    head: str
    tokens: str
    trouble: str | None


def draw_overlay(
    path: Path,
    sample: Sample,
    rows: Mapping[str, tuple[ImageReport, ...]],
    answers: Mapping[str, str],
    fit: Fit,
    *,
    sampling: FrameSampling | None = None,
) -> Path:
    """Draw the pictures of a sample once per row, dropped tokens dimmed, with the row's answer.

    Of several pictures, or of a video, the first four are shown. A row whose pictures and report
    do not go together is a grey field that says why.

    Args:
        path: PNG file to write or replace; its side file ends in ".json".
        sample: what was asked.
        rows: what each row kept, in the order of drawing; empty for a row that failed.
        answers: of each row; none for a row that failed.
        fit: how pictures were made to fit the tower, see `Panel`.
        sampling: the frames that the model takes of a video file; None for frames that are given
            already, or the default.

    Returns:
        The PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        MediaError: a file cannot be written; neither of the two is left half written.
    """
    pictures, trouble = _pictures(sample, rows, sampling)
    drawn = [
        _row(label, pictures, reports, answers.get(label), fit, trouble)
        for label, reports in rows.items()
    ]
    question = _plain(sample.question.replace(IMAGE, " ").replace(VIDEO, " "))
    sheet, boxes = _sheet(drawn, question, in_words(sample.target))
    # Text of any language: what the font lacks is in the side file.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        sheet.finished(path)
    side = {
        "format": FORMAT,
        "id": sample.id,
        "question": question,
        "target": sample.target,
        "answers": dict(answers),
        "shown": min(SHOWN, len(pictures)),
        "pictures": len(pictures),
        "panels": [
            {"row": one.row, "box": box, "tokens": one.tokens, "trouble": one.trouble}
            for one, box in zip(drawn, boxes, strict=True)
        ],
    }
    try:
        write_json(path.with_suffix(".json"), side)
    except OSError as error:
        side_file = path.with_suffix(".json")
        for one in (path, side_file):  # an older side file would not be of this drawing
            one.unlink(missing_ok=True)
        raise MediaError(f"{side_file}: cannot be written ({error.strerror or error}).") from error
    return path


# -- pictures -----------------------------------------------------------------------------------


def _pictures(
    sample: Sample, rows: Mapping[str, tuple[ImageReport, ...]], sampling: FrameSampling | None
) -> tuple[list[Any], str | None]:
    """The pictures that the reports of a row are of, a video as one list of frames or, where each
    frame has a report of its own, as many pictures; and why there are none."""
    pictures = list(sample.images)
    if sample.video is None:
        return pictures, None
    try:
        video = sample.video
        if not isinstance(video, Video):
            video = load_video(video, sampling or FrameSampling())
    except MMLMError as error:
        return [], str(error)
    whole = any(is_video(report) for reports in rows.values() for report in reports)
    return [*pictures, *([list(video.frames)] if whole else video.frames)], None


def _row(
    label: str,
    pictures: Sequence[Any],
    reports: tuple[ImageReport, ...],
    answer: str | None,
    fit: Fit,
    trouble: str | None,
) -> _Drawn:
    said = "(no answer)" if answer is None else _plain(answer)[:_ANSWER] or "(empty)"
    tokens = ""
    if reports:
        kept, asked = sum(len(one.kept) for one in reports), sum(one.n_in for one in reports)
        tokens = f"{kept:,} of {asked:,} tokens"
    pixels = np.full((PICTURE_PX // 2, PICTURE_PX, 3), _EMPTY, np.uint8)
    if trouble is None and reports:
        try:
            pixels = _joined([kept_pixels(panel) for panel in _panels(pictures, reports, fit)])
        except MMLMError as error:
            trouble = str(error)
    return _Drawn(label, pixels, f"{label}: {said}", tokens, trouble)


def _panels(pictures: Sequence[Any], reports: tuple[ImageReport, ...], fit: Fit) -> list[Panel]:
    if len(pictures) != len(reports):
        raise MediaError(f"{len(reports)} reports do not belong to {len(pictures)} pictures")
    panels = []
    for picture, report in zip(pictures[:SHOWN], reports[:SHOWN], strict=True):
        if is_video(report):
            picture, report = _first_frames(picture, report)
        panels.append(Panel(picture, report, fit=fit))
    return panels


def _first_frames(frames: Sequence[Any], report: ImageReport) -> tuple[list[Any], ImageReport]:
    """A video's first frames and the report of their tokens alone."""
    places = report.places
    grids = 0 if places is None else len(places.shapes)
    if places is None or grids <= SHOWN:
        return list(frames), report
    joined = -(-len(frames) // grids)  # frames that share their tokens
    if -(-len(frames) // joined) != grids:
        raise MediaError(f"{len(frames)} frames do not belong to a report of {grids}")
    mine = places.source < SHOWN
    tokens = torch.nonzero(mine).flatten()
    number = torch.full((report.n_in,), -1)
    number[tokens] = torch.arange(len(tokens))
    kept = number[report.kept]
    own = TokenPlaces(
        source=places.source[tokens],
        row=places.row[tokens],
        col=places.col[tokens],
        newline=places.newline[tokens],
        shapes=places.shapes[:SHOWN],
        crop=None,
        patch=None,
        video=True,
    )
    merged = {}
    for carrier, members in report.merged.items():
        inside = tuple(int(number[one]) for one in members if mine[one])
        if mine[carrier]:
            merged[int(number[carrier])] = inside
    first = replace(report, n_in=len(tokens), kept=kept[kept >= 0], places=own, merged=merged)
    return list(frames[: joined * SHOWN]), first


def _joined(parts: Sequence[Pixels]) -> Pixels:
    """Pictures of one row, two beside each other."""
    lines = [_beside(parts[first : first + 2]) for first in range(0, len(parts), 2)]
    width = max(line.shape[1] for line in lines)
    height = sum(line.shape[0] + MARGIN_PX for line in lines) - MARGIN_PX
    page = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for line in lines:
        page[top : top + line.shape[0], : line.shape[1]] = line
        top += line.shape[0] + MARGIN_PX
    return page


def _beside(parts: Sequence[Pixels]) -> Pixels:
    width = sum(one.shape[1] + MARGIN_PX for one in parts) - MARGIN_PX
    page = np.full((max(one.shape[0] for one in parts), width, 3), 255, np.uint8)
    left = 0
    for one in parts:
        page[: one.shape[0], left : left + one.shape[1]] = one
        left += one.shape[1] + MARGIN_PX
    return page


# -- sheet --------------------------------------------------------------------------------------


def _sheet(
    drawn: Sequence[_Drawn], question: str, target: str
) -> tuple[Sheet, list[tuple[int, int, int, int]]]:
    """All rows on one sheet, and the box (left, top, right, bottom) of each one's pictures."""
    width = max((one.pixels.shape[1] for one in drawn), default=PICTURE_PX) + MARGIN_PX
    columns = max(1, min(len(drawn), COLUMNS, 1600 // width))
    sheet_width = max(width * columns, PICTURE_PX) + MARGIN_PX
    short = question if len(question) <= _QUESTION else question[:_QUESTION] + " …"
    caption = wrapped(f"{short}  —  right answer: {target[:_QUESTION]}", sheet_width - MARGIN_PX)
    top = 2 * MARGIN_PX + LINE_PX * (caption.count("\n") + 1)
    boxes, heads = [], []
    for first in range(0, len(drawn), columns):
        line = drawn[first : first + columns]
        texts = [_head(one, width - MARGIN_PX) for one in line]
        below = top + 4 + LINE_PX * max(text.count("\n") + 1 for text in texts)
        for column, (one, text) in enumerate(zip(line, texts, strict=True)):
            left = MARGIN_PX + column * width
            heads.append((left, top, text))
            boxes.append((left, below, left + one.pixels.shape[1], below + one.pixels.shape[0]))
        top = below + max(one.pixels.shape[0] for one in line) + 2 * MARGIN_PX
    sheet = Sheet(sheet_width, top)
    sheet.text(MARGIN_PX, MARGIN_PX, caption)
    for one, box, (left, head_top, text) in zip(drawn, boxes, heads, strict=True):
        sheet.text(left, head_top, text)
        sheet.picture(box[0], box[1], one.pixels)
    return sheet, boxes


def _head(one: _Drawn, width_px: int) -> str:
    lines = [wrapped(one.head, width_px), one.tokens]
    if one.trouble is not None:
        lines.append(wrapped(f"not drawn: {one.trouble}", width_px))
    return "\n".join(line for line in lines if line)


def _plain(text: str) -> str:
    """One line without characters that cannot be drawn."""
    return "".join(one for one in " ".join(text.split()) if one.isprintable())
