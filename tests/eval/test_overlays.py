"""Drawings of samples: pixels, side file, videos, failed rows, and how reports show them."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval import overlays, worker
from eval.overlays import OVERLAYS, draw_overlay
from eval.report import report_markdown
from eval.report_html import Overlays, report_html
from eval.task import Sample
from mmlm_efficient import plots
from mmlm_efficient.errors import MediaError
from mmlm_efficient.plots import kept_tokens
from mmlm_efficient.tokens import ImageReport, TokenPlaces
from mmlm_efficient.video import load_video
from tests.eval.made_reports import ATTACK, usual

GRID, N = (3, 4), 12


def reported(kept: list[int], **changes: Any) -> ImageReport:
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


def picture(seed: int = 5) -> Image.Image:
    cells = np.random.default_rng(seed).integers(100, 256, size=(*GRID, 3)).astype(np.uint8)
    return Image.fromarray(cells.repeat(16, 0).repeat(16, 1))


def side_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def crops(path: Path) -> dict[str, np.ndarray]:
    """The pictures of each row in a drawing."""
    with Image.open(path) as sheet:
        return {
            one["row"]: np.asarray(sheet.convert("RGB").crop(one["box"]))
            for one in side_of(path)["panels"]
        }


def alone(shown: Any, one: ImageReport) -> np.ndarray:
    """The same picture as `kept_tokens` draws it, without its margins and caption."""
    margin, drawn = plots.MARGIN_PX, np.asarray(kept_tokens(shown, one))
    return drawn[margin : -margin - plots.LINE_PX, margin:-margin]


def test_every_row_is_drawn_as_kept_tokens_draws_it(tmp_path: Path) -> None:
    rows = {
        "none": (reported(list(range(N))),),
        "flowcut:3": (reported([0, 5, 11]),),
        "merge:2": (reported([0, 7], merged={0: (0, 1, 2)}),),
    }
    answers = {"none": "a cat", "flowcut:3": "a dog", "merge:2": "a\n cat"}
    sample = Sample("7", "<image>\nWhat is it?", (picture(),), target=["cat", "a cat"])
    path = tmp_path / "deep" / "0000-7.png"
    assert draw_overlay(path, sample, rows, answers, "crop") == path
    found = crops(path)
    assert list(found) == list(rows)
    for label, reports in rows.items():
        assert (found[label] == alone(picture(), reports[0])).all()
    side = side_of(path)
    assert side["question"] == "What is it?"
    assert side["target"] == ["cat", "a cat"]
    assert side["answers"] == answers
    assert [one["tokens"] for one in side["panels"]] == [
        "12 of 12 tokens",
        "3 of 12 tokens",
        "2 of 12 tokens",
    ]
    assert sorted(one.name for one in path.parent.iterdir()) == ["0000-7.json", "0000-7.png"]


def test_of_several_pictures_four_are_shown(tmp_path: Path) -> None:
    images = tuple(picture(seed) for seed in range(6))
    reports = tuple(reported([number], image=number) for number in range(6))
    path = draw_overlay(tmp_path / "a.png", Sample("1", "?", images), {"m": reports}, {}, "crop")
    side = side_of(path)
    assert (side["shown"], side["pictures"]) == (4, 6)
    assert side["panels"][0]["tokens"] == "6 of 72 tokens"  # of all six
    drawn, gap = crops(path)["m"], plots.MARGIN_PX
    first = alone(images[0], reports[0])
    height, width = first.shape[:2]
    assert drawn.shape == (2 * height + gap, 2 * width + gap, 3)
    assert (drawn[height + gap :, width + gap :] == alone(images[3], reports[3])).all()


def video_report(frames: int, kept: list[int], **changes: Any) -> ImageReport:
    per_frame = GRID[0] * GRID[1]
    index = torch.arange(frames * per_frame + 1)
    within = index % per_frame
    newline = torch.zeros(len(index), dtype=torch.bool)
    newline[-1] = True
    places = TokenPlaces(
        source=index // per_frame,
        row=within // GRID[1],
        col=within % GRID[1],
        newline=newline,
        shapes=(GRID,) * frames,
        crop=None,
        patch=None,
        video=True,
    )
    return reported(kept, n_in=len(index), places=places, **changes)


def test_of_a_video_four_frames_are_shown_with_their_own_tokens(tmp_path: Path) -> None:
    frames = [picture(seed) for seed in range(6)]
    kept = [0, 13, 47, 50, 72]  # of frames 0, 1, 3, 4, and the newline
    whole = video_report(6, kept, merged={13: (13, 14, 60), 50: (50, 1)})
    sample = Sample("1", "<video>What happens?", video=load_video(frames))
    path = draw_overlay(tmp_path / "a.png", sample, {"m": (whole,)}, {"m": "it"}, "stretch")
    first = video_report(4, [0, 13, 47], merged={13: (13, 14)})
    assert side_of(path)["panels"][0]["trouble"] is None
    assert (crops(path)["m"] == alone(frames[:4], first)).all()
    # A list of frames does as well.
    again = draw_overlay(
        tmp_path / "b.png",
        Sample("1", "What happens?", video=frames),
        {"m": (whole,)},
        {"m": "it"},
        "stretch",
    )
    assert (crops(again)["m"] == crops(path)["m"]).all()


def test_frames_with_reports_of_their_own(tmp_path: Path) -> None:
    frames = [picture(seed) for seed in range(3)]
    reports = tuple(reported([number], image=number) for number in range(3))
    sample = Sample("1", "?", video=load_video(frames))
    path = draw_overlay(tmp_path / "a.png", sample, {"m": reports}, {"m": "it"}, "crop")
    height, width = alone(frames[0], reports[0]).shape[:2]
    assert (crops(path)["m"][:height, :width] == alone(frames[0], reports[0])).all()


def test_a_row_that_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    rows = {
        "none": (reported(list(range(N))),),
        "failed": (),
        "two": (reported([0]), reported([1])),
        "odd": (reported([0], grid=(5, 5)),),
    }
    path = draw_overlay(tmp_path / "a.png", Sample("1", "?", (picture(),)), rows, {}, "crop")
    troubles = {one["row"]: one["trouble"] for one in side_of(path)["panels"]}
    assert troubles["none"] is None
    assert troubles["failed"] is None
    assert troubles["two"] == "2 reports do not belong to 1 pictures"
    assert "grid of 5 x 5 patches" in troubles["odd"]
    assert (crops(path)["none"] == alone(picture(), rows["none"][0])).all()
    assert (crops(path)["odd"] == overlays._EMPTY).all()


def test_a_video_that_cannot_be_read(tmp_path: Path) -> None:
    sample = Sample("1", "?", video=str(tmp_path / "gone.mp4"))
    path = draw_overlay(tmp_path / "a.png", sample, {"m": (video_report(2, [0]),)}, {}, "crop")
    assert "gone.mp4" in side_of(path)["panels"][0]["trouble"]


def test_text_of_any_language_and_length(tmp_path: Path) -> None:
    question = "なに？\x00\t" + "long " * 500
    answer = "$x^2$ 猫 " + "y" * 5000
    rows = {"a-label-" * 20: (reported([0]),), "none": (reported([1]),)}
    sample = Sample("1", question, (picture(),), target={"a": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_overlay(tmp_path / "a.png", sample, rows, dict.fromkeys(rows, answer), "crop")
    side = side_of(path)
    assert side["answers"]["none"] == answer
    assert side["question"].startswith("なに？ long")
    with Image.open(path) as sheet:
        assert sheet.width < 1700
        assert sheet.height < 900


def test_nothing_is_left_of_a_drawing_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overlays, "write_json", full)
    sample = Sample("1", "?", (picture(),))
    with pytest.raises(MediaError, match=r"a\.json: cannot be written \(No space left"):
        draw_overlay(tmp_path / "a.png", sample, {"m": (reported([0]),)}, {}, "crop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ten_rows_take_less_than_a_second(tmp_path: Path) -> None:
    rows = {f"m:{number}": (reported([number]),) for number in range(10)}
    sample = Sample("1", "?", (picture(),))
    draw_overlay(tmp_path / "warm.png", sample, rows, {}, "crop")
    start = time.perf_counter()
    draw_overlay(tmp_path / "a.png", sample, rows, {}, "crop")
    assert time.perf_counter() - start < 1


# -- in reports ---------------------------------------------------------------------------------


def drawn(folder: Path, number: int, question: str = "What is it?") -> None:
    rows = {"none": (reported(list(range(N))),), "flowcut:36": (reported([0, 5]),), "bad": ()}
    answers = {"none": "a cat", "flowcut:36": ATTACK}
    path = folder / "pocket" / "overlays" / "vqa" / f"{number:04d}-{number}.png"
    sample = Sample(str(number), question, (picture(number),), target="a <cat>")
    draw_overlay(path, sample, rows, answers, "crop")


def test_reports_show_pictures_and_text_of_each_row(tmp_path: Path) -> None:
    drawn(tmp_path, 0, ATTACK)
    html = report_html(tmp_path, usual(), charts=False)
    uris = re.findall(r'<img src="data:image/(png|jpeg);base64,([^"]*)"', html)
    assert len(uris) == 3
    with Image.open(io.BytesIO(base64.b64decode(uris[1][1]))) as shown:
        shown.load()
        assert shown.size == alone(picture(), reported([0])).shape[1::-1]
    assert "right answer: a &lt;cat&gt;" in html
    assert html.count("<script") == 1
    assert 'class="changed"' in html
    assert html.count("no answer") == 1


def test_small_pictures_are_exact(tmp_path: Path) -> None:
    drawn(tmp_path, 0)
    [sample] = Overlays(tmp_path).of(usual()["tasks"][0])
    kind, data = sample.pictures[1].uri.split(";base64,")
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        expected = alone(picture(0), reported([0, 5]))
        assert (np.asarray(shown.convert("RGB")) == expected).all()


def test_reports_say_how_many_drawings_they_leave_out(tmp_path: Path) -> None:
    for number in range(OVERLAYS + 2):
        drawn(tmp_path, number, f"question {number}")
    html = report_html(tmp_path, usual(), charts=False)
    assert "vqa: 2 more drawings of samples in pocket/overlays/vqa." in html
    assert f"question {OVERLAYS - 1}" in html
    assert f"question {OVERLAYS}" not in html


def test_rows_that_are_in_no_drawing_are_named(tmp_path: Path) -> None:
    drawn(tmp_path, 0)
    made = usual()
    html = report_html(tmp_path, made, charts=False)
    markdown = report_markdown(tmp_path, made, [])
    for words in (html, markdown):
        assert "Not in all of these drawings: flowcut:72, fastv:36. A sample is drawn" in words
    made["tasks"][0]["rows"] = made["tasks"][0]["rows"][:2]
    assert "Not in all" not in report_html(tmp_path, made, charts=False)
    assert "Not in all" not in report_markdown(tmp_path, made, [])


def test_a_report_shows_all_that_a_run_draws(tmp_path: Path) -> None:
    assert worker.OVERLAYS == OVERLAYS
    for number in range(OVERLAYS):
        drawn(tmp_path, number)
    shown = Overlays(tmp_path)
    assert len(shown.of(usual()["tasks"][0])) == OVERLAYS
    assert shown.notes == []
