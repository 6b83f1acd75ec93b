"""Reports: what they say, that they hold together, and that nothing of the data is markup."""

from __future__ import annotations

import builtins
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from eval.report import read_report, shown_score, text, write_report
from eval.report_html import report_html
from eval.report_summary import caveats, change_words, headline, provenance, summary
from eval.report_view import expected_of, group_table, overview_table, task_table
from eval.report_words import Scale, duration, mark_of, milliseconds, share, size
from mmlm_efficient.errors import DataError, RunError
from tests.eval.made_reports import ATTACK, NOTHING, report, row, task, usual

VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}


class Page(HTMLParser):
    """A page whose tags are checked to be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
            elif name not in ("title", "alt"):
                assert "http" not in (value or ""), name

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            assert "http" not in data
            assert "@import" not in data
            assert "url(" not in data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(folder: Path) -> Page:
    html = (folder / "report.html").read_text(encoding="utf-8")
    found = Page(html)
    # One script, its own; nothing is fetched.
    assert found.seen.count("script") == 1
    assert all(link.startswith(("data:image/", "#")) for link in found.links)
    assert "default-src 'none'" in html
    return found


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


def test_lower_is_better() -> None:
    result = task("wer", [row("none", 0.2), row("flowcut:36", 0.3, 0.2)], higher_is_better=False)
    line = task_table(result).rows[1]
    assert (line[2].text, line[2].mark, line[2].arrow) == ("+10.0", "worse", "▲")
    assert change_words(result, result["rows"][1]) == "is worse by 10.0 points (9.0 to 11.0)"
    result["rows"].append(row("fastv:36", 0.1, 0.2))
    assert headline(result)["row"] == "fastv:36"


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
        "On vqa (1,000 samples) the stock model scores 83.1 %; flowcut:72 keeps 50 % of the "
        "visual tokens (mean over layers) and shows no clear difference (−0.2 points, −1.2 to "
        "+0.8); its first token takes 0.50× the stock model's time."
    )
    assert "flowcut:36 keeps 25 %" in second
    assert "loses 10.0 points (9.0 to 11.0)" in second
    alone = report([task("vqa", [row("none", 0.5)], samples=1)])
    assert summary(alone) == ["On vqa (1 sample) the stock model scores 50.0 %."]
    assert summary(report([])) == ["No task has finished."]


def test_a_row_that_keeps_more_than_half_is_named_only_if_no_other_does_less() -> None:
    rows = [row("none", 0.9), row("a:100", 0.89, 0.9), row("b:36", 0.5, 0.9)]
    rows[1]["visual_tokens_mean"] = 100.0
    assert headline(task("vqa", rows))["row"] == "b:36"
    assert headline(task("vqa", rows[:2]))["row"] == "a:100"
    assert headline(task("vqa", rows[:1])) is None


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


def test_data_is_never_markup(tmp_path: Path) -> None:
    label = f"flowcut:36 {ATTACK}"
    rows = [row("none", 0.5), row(label, 0.4, 0.5)]
    rows[1]["groups"] = {ATTACK: {"count": 1, "value": 0.5, "interval": None}}
    failure = {"row": ATTACK, "id": ATTACK, "where": ATTACK, "type": ATTACK, "message": ATTACK}
    result = task(ATTACK, rows, source=ATTACK, failures=[failure], run="r")
    errors = [{"run": ATTACK, "task": ATTACK, "message": ATTACK}]
    write_report(tmp_path, report([result], errors=errors, config={ATTACK: ATTACK}, name=ATTACK))
    found = page(tmp_path)  # counts scripts, looks at attributes and links
    assert "img" not in found.seen
    assert 'alert("1")' in found.text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = markdown.partition("```yaml")[0]
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    # A bar in the data does not make a column: all lines of a table have as many.
    table = [line for line in markdown.splitlines() if line.startswith("| flowcut:36")]
    heads = [line for line in markdown.splitlines() if line.startswith("| row | acc")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (table[0], heads[0])]
    assert bars[0] == bars[1] == 13


def test_a_code_fence_in_the_configuration_does_not_end_it(tmp_path: Path) -> None:
    made = report(usual()["tasks"], config={"note": "```\n# not a title"})
    write_report(tmp_path, made)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    inside = re.search(r"````yaml\n(.*)````", markdown, re.DOTALL)
    assert inside is not None
    assert yaml.safe_load(inside[1]) == made["config"]


def test_errors_come_first(tmp_path: Path) -> None:
    errors = [{"task": "gqa", "type": "DataError", "message": "no data | here"}]
    write_report(tmp_path, report(usual()["tasks"], errors=errors))
    words = page(tmp_path).text
    assert words.index("1 task did not finish") < words.index("the stock model scores")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- **gqa**: no data \\| here" in markdown
    assert markdown.index("did not finish") < markdown.index("the stock model scores")


def test_failures_are_listed_and_counted(tmp_path: Path) -> None:
    one = {"row": "none", "id": None, "where": "media", "type": "MediaError", "message": "gone"}
    rows = [row("none", 0.5, failed=70), row("flowcut:36", 0.4, 0.5)]
    write_report(tmp_path, report([task("vqa", rows, failures=[one] * 50)]))
    for words in (page(tmp_path).text, (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert "70 failed answers, the first 50 of them" in words
        assert "MediaError: gone" in words
        assert "None" not in words


def test_unicode_and_long_labels(tmp_path: Path) -> None:
    label = "flowcut:72+fastv:36+" + "sehr-lange-Methode-" * 6 + "猫:9"
    rows = [row("none", 0.5), row(label, 0.4, 0.5)]
    write_report(tmp_path, report([task("задача-日本語", rows)], name="Übersicht"))
    found = page(tmp_path)
    assert "Evaluation of Übersicht" in found.text
    assert "задача-日本語" in found.text
    assert "日本語" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_several_runs_have_their_own_charts_and_headings(tmp_path: Path) -> None:
    tasks = [task("vqa", usual()["tasks"][0]["rows"], run=run) for run in ("small", "large")]
    files = write_report(tmp_path, report(tasks))
    assert [path.name for path in files[3:]] == [
        f"{run}_accuracy_{against}.png"
        for run in ("small", "large")
        for against in ("tokens", "ttft")
    ]
    words = page(tmp_path).text
    assert "small: vqa" in words
    assert "On vqa (large)" in words


def test_without_matplotlib_the_report_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object, **named: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **named)  # type: ignore[arg-type]

    for name in [one for one in sys.modules if one.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", missing)
    files = write_report(tmp_path, usual())
    assert [path.name for path in files] == ["report.json", "report.md", "report.html"]
    wanted = "There are no charts: 'matplotlib"
    assert wanted in page(tmp_path).text
    assert "mmlm-efficient\\[plots\\]" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "has no charts" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="the report cannot be written"):
        write_report(tmp_path / "file", usual())


def test_reading_a_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json: cannot be read"):
        read_report(tmp_path)
    path = tmp_path / "report.json"
    for content, words in (
        ("{", "is damaged, it is no JSON"),
        ("\udcff", "is damaged, it is no JSON"),
        ("[]", "is no report of format 1"),
        ('{"format": 2}', "it says 2"),
        ('{"format": 1, "runs": []}', "tasks missing"),
    ):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match=words):
            read_report(tmp_path)
        with pytest.raises(DataError, match=words):
            read_report(path)


def test_provenance_says_each_value_once() -> None:
    facts = dict(provenance(usual()))
    assert facts["versions"] == "python 3.11.9, torch 2.13.0"
    assert facts["data"] == "vqa ba9876543210; video ba9876543210"
    assert facts["model"] == "hub/pocket"
    assert facts["intervals"] == "95 %, wilson"
    assert "workers" not in facts
    mixed = usual()
    mixed["tasks"][1]["seed"] = 1
    assert dict(provenance(mixed))["seed"] == "0; 1"


def test_small_words() -> None:
    assert [milliseconds(one) for one in (0.0004, 0.0123, 0.5)] == ["0.40", "12.3", "500"]
    assert [size(one) for one in (0, 2048, 5 * 2**30)] == ["0 B", "2.00 KiB", "5.00 GiB"]
    assert [duration(one) for one in (3, 62.4, 7500)] == ["3 s", "1 min 02 s", "2 h 05 min"]
    assert (share(9, 144), share(36, 144), share(1, None)) == ("6.2 %", "25 %", "")
    assert text("[a](b) `c`") == "\\[a\\](b) \\`c\\`"


def test_a_damaged_drawing_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "pocket" / "overlays" / "vqa"
    folder.mkdir(parents=True)
    (folder / "0000-a.json").write_text("{", encoding="utf-8")
    html = report_html(tmp_path, usual(), charts=False)
    assert "pocket/overlays/vqa/0000-a.json: the drawing cannot be read" in Page(html).text
