"""Reports: what they say, and what their figures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.report import read_report, shown_score, write_report
from eval.report_summary import (
    caveats,
    change_words,
    headline,
    summary,
    unscored,
)
from eval.report_view import expected_of, group_table, overview_table, task_table
from eval.report_words import Scale, mark_of
from tests.eval.made_reports import NOTHING, report, row, task, usual
from tests.eval.report_page import page


def cells(result: dict, label: str) -> dict[str, str]:
    view = task_table(result)
    line = next(one for one in view.rows if one[0].text == label)
    return {
        column.name: f"{cell.arrow}{cell.text}|{cell.note}"
        for column, cell in zip(view.columns, line, strict=True)
    }


def test_all_files_are_written_and_say_the_same(tmp_path: Path) -> None:
    files = write_report(tmp_path, usual())
    names = ["report.json", "report.md", "report.html", "accuracy_tokens.png", "accuracy_ttft.png"]
    assert [path.name for path in files] == names
    assert json.loads(files[0].read_text(encoding="utf-8")) == usual() == read_report(tmp_path)
    markdown, words = files[1].read_text(encoding="utf-8"), page(tmp_path).text
    for said in ("Evaluation of pocket", "83.1", "79.4", "−4.7 to −2.7", "7 min 11 s"):
        assert said in markdown
        assert said in words
    for path in files[3:]:
        with Image.open(path) as picture:
            assert picture.width > picture.height > 300
    assert "![accuracy_tokens](accuracy_tokens.png)" in markdown
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(names)


def test_the_figures_of_a_row() -> None:
    result = usual()["tasks"][0]
    assert cells(result, "flowcut:36") == {
        "row": "flowcut:36|",
        "acc, %": "79.4|77.4 to 81.4",
        "to none": "▼−3.7|−4.7 to −2.7",
        "tokens in": "144|",
        "kept": "36|25 %",
        "per layer": "36|25 %",
        "TTFT, ms": "20.0|0.50×",
        "decode, tok/s": "210|",
        "prune, ms": "2.10|",
        "peak memory": "412 MiB|",
        "KV cache": "256 KiB|0.25×",
        "samples": "1,000|",
    }
    # 0 lies within -0.2 +- 1.
    assert cells(result, "flowcut:72")["to none"] == "−0.2|−1.2 to +0.8"
    assert cells(result, "none")["to none"] == "–|"


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    result = task("vqa", [row("none", None, **NOTHING), row("flowcut:36", None, **NOTHING)])
    made = report([result], seconds=None, date=None, config={})
    found = cells(result, "flowcut:36")
    assert {value for name, value in found.items() if name not in ("row", "samples")} == {"–|"}
    files = write_report(tmp_path, made)
    assert [path.suffix for path in files] == [".json", ".md", ".html"]  # nothing to draw
    assert "the stock model has no score" in page(tmp_path).text


def test_missing_keys_are_as_good_as_none(tmp_path: Path) -> None:
    bare = {"row": "none", "samples": 1, "failed": 0, "metrics": {"acc": {"value": 1.0}}}
    write_report(tmp_path, report([task("vqa", [bare], samples=1)]))
    assert "scores 100.0 %" in page(tmp_path).text


def test_percent_or_raw() -> None:
    assert Scale.of([0.0, None, 1.0]).percent
    assert not Scale.of([0.5, 1.2]).percent
    raw = [row("none", 1510.7), row("flowcut:36", 1502.1, 1510.7)]
    found = cells(task("mme", raw), "flowcut:36")
    assert found["acc"].startswith("1,502.1|")
    assert found["to none"].startswith("▼−8.6|")
    assert shown_score(task("mme", raw), raw[1])[0] == "1,502.1"
    # A figure within 0 to 1 that is no share, such as a loss.
    loss = [row("none", 0.5), row("flowcut:36", 0.4, 0.5)]
    assert cells(task("x", loss, percent=False), "flowcut:36")["acc"] == "0.400|0.380 to 0.420"
    assert shown_score(task("x", loss, percent=True), loss[1])[0] == "40.0 %"
    # Items within 0 to 1, of which the task makes percent itself.
    assert shown_score(task("x", raw, percent=True), raw[1])[0] == "1,502.1"
    assert Scale.of([None], percent=False).score(None) == "–"


def test_lower_is_better() -> None:
    result = task("wer", [row("none", 0.2), row("flowcut:36", 0.3, 0.2)], higher_is_better=False)
    line = task_table(result).rows[1]
    assert (line[2].text, line[2].mark, line[2].arrow) == ("+10.0", "worse", "▲")
    assert change_words(result, result["rows"][1]) == "is worse by 10.0 points (9.0 to 11.0)"
    result["rows"].append(row("fastv:36", 0.1, 0.2))
    assert headline(result)[0]["row"] == "fastv:36"


def test_marks_need_an_interval_without_zero() -> None:
    assert mark_of([0.01, 0.02], higher_is_better=True) == "better"
    assert mark_of([-0.02, -0.01], higher_is_better=True) == "worse"
    assert mark_of([-0.02, -0.01], higher_is_better=False) == "better"
    assert mark_of([0.0, 0.02], higher_is_better=True) == ""
    assert mark_of(None, higher_is_better=True) == ""


def test_the_papers_numbers() -> None:
    rows = [row("none", 0.61), row("flowcut:36", 0.60, 0.61)]
    percent = task("gqa", rows, expected={"none": {"value": 61.9}, "flowcut:36": {"value": None}})
    assert expected_of(percent, "none") == pytest.approx(0.619)
    assert cells(percent, "none")["paper"] == "61.9|−0.9"
    assert cells(percent, "flowcut:36")["paper"] == "–|"
    shares = task("gqa", rows, expected={"none": {"value": 0.62}})
    assert cells(shares, "none")["paper"] == "62.0|−1.0"
    scaled = task("x", rows, expected={"none": {"value": 6.2, "scale": 10.0}})
    assert cells(scaled, "none")["paper"] == "62.0|−1.0"
    assert "paper" not in cells(task("gqa", rows), "none")


def test_summary_in_words() -> None:
    first, second = summary(usual())
    assert first == (
        "On vqa (1,000 samples) the stock model scores 83.1 %; the best of 3 rows that keep at "
        "most half: flowcut:72 keeps 50 % of the visual tokens (mean over layers) and shows no "
        "clear difference (−0.2 points, −1.2 to +0.8); its first token takes 0.50× the stock "
        "model's time."
    )
    assert "flowcut:36 keeps 25 %" in second
    assert "loses 10.0 points (9.0 to 11.0)" in second
    alone = report([task("vqa", [row("none", 0.5)], samples=1)])
    assert summary(alone) == ["On vqa (1 sample) the stock model scores 50.0 %."]
    assert summary(report([])) == ["No task has finished."]


def test_a_row_that_keeps_more_than_half_is_named_only_if_no_other_does_less() -> None:
    rows = [row("none", 0.9), row("a:100", 0.89, 0.9), row("b:36", 0.5, 0.9)]
    rows[1]["visual_tokens_mean"] = 100.0
    row_of, words = headline(task("vqa", rows))
    assert (row_of["row"], words) == ("b:36", "the only one of 2 rows that keeps at most half")
    row_of, words = headline(task("vqa", rows[:2]))
    assert (row_of["row"], words) == ("a:100", "")
    assert headline(task("vqa", rows[:1])) == (None, "")
    rows[2]["visual_tokens_mean"] = 120.0
    row_of, words = headline(task("vqa", rows))
    assert (row_of["row"], words) == ("a:100", "the best of 2 rows")


def test_caveats() -> None:
    assert caveats(usual()) == []
    made = usual()
    made["workers"] = 2
    made["tasks"][0]["rows"][0]["batch_size"] = 8.0
    made["tasks"][0]["rows"][1]["failed"] = 1
    made["tasks"][1]["samples"] = 1
    batches, workers, small, failed = caveats(made)
    assert "batches of up to 8" in batches
    assert "2 workers" in workers
    assert "Fewer than 30 samples: video" in small
    assert failed.startswith("1 answer failed and is left out")


def test_few_clusters_are_few_samples() -> None:
    made = usual()
    made["tasks"][0] |= {"clusters": 12}
    made["tasks"][1] |= {"samples": 40, "clusters": 40}
    assert caveats(made) == [
        "Fewer than 30 independent samples: vqa (1,000 samples in 12 clusters). Intervals of so "
        "few are rough."
    ]
    made["tasks"][0] |= {"clusters": 30}
    assert caveats(made) == []
    made["tasks"][1] |= {"samples": 29, "clusters": 29}
    assert caveats(made) == ["Fewer than 30 samples: video. Intervals of so few are rough."]


def test_a_score_that_could_not_be_made_is_said_before_all_else(tmp_path: Path) -> None:
    nothing = {"metrics": {"acc": {"value": None}}, "to_vanilla": None}
    rows = [row("none", None, **nothing), row("a:36", None, **nothing), row("b:36", 0.4)]
    found = {"where": "score", "type": "ValueError", "message": "metric acc is nan", "id": None}
    failures = [{"row": label, **found} for label in ("none", "a:36")]
    failures.append({"row": "none", **found, "metric": "f1", "message": "f1 is nan"})
    failures.append({"row": "b:36", **found, "id": "s1", "message": "of one sample alone"})
    made = report([task("vqa", rows, failures=failures)])
    sentence = "vqa: none, a:36: answers are there, but no acc: ValueError: metric acc is nan"
    assert unscored(made) == [sentence]
    write_report(tmp_path, made)
    markdown, words = (tmp_path / "report.md").read_text(encoding="utf-8"), page(tmp_path).text
    for said in (markdown, words):
        assert said.index("Scores are missing") < said.index(sentence)
        assert said.index(sentence) < said.index("the stock model has no score")
        assert "3 missing scores; 1 failed answer" in said
    assert unscored(usual()) == []
    # No sample finished: that is told by its failures.
    assert unscored(report([task("vqa", [row("none", None, **NOTHING)])])) == []
    unknown = report([task("vqa", [row("none", None, **nothing)])])
    assert unscored(unknown)[0].endswith("no acc: the report holds no reason")


def test_groups_and_overview() -> None:
    view = group_table(usual()["tasks"][0])
    assert view is not None
    assert [(one.name, one.under) for one in view.columns] == [
        ("row", ""),
        ("where", "500 samples"),
    ]
    assert view.rows[1][1].text == "79.4"
    assert group_table(task("vqa", [row("none", 0.5, groups={})])) is None
    overview = overview_table(usual()["tasks"])
    assert overview is not None
    assert [one.text for one in overview.rows[3]] == ["fastv:36", "70.0", "–"]
    assert overview.rows[1][1].note == "▼ −3.7"
    assert overview_table(usual()["tasks"][:1]) is None
