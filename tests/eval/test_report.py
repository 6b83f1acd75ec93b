"""Reports: what they say, that they hold together, and that nothing of the data is markup."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from eval.report import folded, read_report, report_folder, shown_score, text, write_report
from eval.report_html import report_html
from eval.report_summary import (
    caveats,
    change_words,
    headline,
    provenance,
    summary,
    unscored,
)
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


def test_charts_that_fail_cost_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "accuracy_tokens.png").mkdir()  # cannot be replaced by a file

    def broken(*_: object) -> None:
        raise RuntimeError("font <cache>")

    monkeypatch.setattr("eval.report_html.chart_svg", broken)
    files = write_report(tmp_path, usual())
    names = ["report.json", "report.md", "report.html", "accuracy_ttft.png"]
    assert [path.name for path in files] == names
    said = "The chart accuracy_tokens.png is missing: MediaError"
    markdown, words = files[1].read_text(encoding="utf-8"), page(tmp_path).text
    assert said in words
    assert said.replace("_", "\\_") in markdown
    assert "(accuracy_tokens.png)" not in markdown
    assert "(accuracy_ttft.png)" in markdown
    assert said in caplog.text
    for against in ("tokens", "ttft"):
        sentence = f"The chart of vqa against {against} is missing: RuntimeError: font <cache>"
        assert sentence in words


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
        ('{"format": 1, "runs": []}', "tasks: is missing"),
    ):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError, match=words):
            read_report(tmp_path)
        with pytest.raises(DataError, match=words):
            read_report(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one["tasks"][0].pop("run"), "tasks: 0: run: is missing"),
        (lambda one: one["tasks"][1].pop("metric"), "tasks: 1: metric: is missing"),
        (lambda one: one["tasks"][0].pop("rows"), "tasks: 0: rows: is missing"),
        (lambda one: one["tasks"][0].update(run="../x"), "tasks: 0: run: "),
        (lambda one: one["tasks"][0]["rows"][2].pop("row"), "tasks: 0: rows: 2: row: is missing"),
        (lambda one: one["tasks"][0]["rows"].append(3), "tasks: 0: rows: 4: "),
        (lambda one: one["tasks"][0]["rows"][0].update(kv_bytes="many"), "rows: 0: kv_bytes: "),
        (lambda one: one["tasks"][0]["rows"][0].update(metrics={"acc": 0.5}), "metrics: acc: "),
        (
            lambda one: one["tasks"][0]["rows"][1]["to_vanilla"].update(interval=[0.1]),
            "to_vanilla: interval: ",
        ),
        (lambda one: one["tasks"][0].update(failures=[{}]), "failures: 0: row: is missing"),
        (lambda one: one.update(errors=[{"task": "vqa"}]), "errors: 0: message: is missing"),
        (lambda one: one.update(seconds=float("nan")), "seconds: "),
    ],
)
def test_a_damaged_report_is_refused_with_its_place(
    tmp_path: Path, change: Callable[[dict], object], words: str
) -> None:
    made = usual()
    change(made)
    (tmp_path / "report.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(DataError, match=f"is damaged: .*{words}"):
        read_report(tmp_path)


def test_a_report_by_the_path_of_its_file(tmp_path: Path) -> None:
    files = write_report(tmp_path, usual())
    assert read_report(files[0]) == usual()
    assert report_folder(files[0]) == report_folder(tmp_path) == tmp_path


def test_provenance_says_each_value_once() -> None:
    facts = dict(provenance(usual()))
    assert facts["versions"] == "python 3.11.9, torch 2.13.0"
    assert facts["data"] == "vqa ba9876543210; video ba9876543210"
    assert facts["model"] == "hub/pocket"
    assert "changed on resuming" not in facts
    assert facts["intervals"] == "95 %, wilson"
    assert "workers" not in facts
    mixed = usual()
    mixed["tasks"][1]["seed"] = 1
    assert dict(provenance(mixed))["seed"] == "0; 1"


def test_provenance_names_what_changes_a_models_numbers() -> None:
    made, settings = usual(), {"name": "pocket", "model": "hub/pocket", "dtype": None}
    made["config"] = {"runs": [settings]}
    assert dict(provenance(made))["model"] == "hub/pocket, float32"
    for task_result in made["tasks"]:
        task_result["hardware"] = {"device": "cuda"}
    assert dict(provenance(made))["model"] == "hub/pocket, auto"
    made["config"] = {
        "runs": [{**settings, "dtype": "bfloat16", "quantization": "nf4"}, "not a run"]
    }
    assert dict(provenance(made))["model"] == "hub/pocket, bfloat16, nf4"
    made["config"] = {"runs": 5}
    assert "model" not in dict(provenance(made))


def test_sessions_that_were_not_alike_are_said(tmp_path: Path) -> None:
    made = usual()
    made["tasks"][1] |= {"workers": 4, "mixed": ["threads", "workers"]}
    facts = dict(provenance(made))
    assert facts["workers"] == "4"
    assert facts["changed on resuming"] == "video: threads, workers"
    shared, mixed = caveats(made)
    assert shared.startswith("4 workers ran side by side and shared the machine")
    assert mixed == (
        "video: answered in several sessions with other threads, workers: the figures, times and "
        "memory above all, mix them."
    )
    write_report(tmp_path, made)
    assert mixed in page(tmp_path).text


def test_heads_of_folded_parts_are_html_not_markdown() -> None:
    lines = folded("my_row *a* <b> & $x$", "| a |").splitlines()
    assert lines[0] == (
        "<details><summary>my_row *a* &lt;b&gt; &amp; <span>$</span>x<span>$</span></summary>"
    )
    assert lines[2] == "| a |"


def test_dollars_are_no_formula() -> None:
    assert text("costs $5 or $6") == "costs <span>$</span>5 or <span>$</span>6"


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


@pytest.mark.parametrize(
    "side",
    [
        [],
        7,
        {"format": 2, "question": "", "target": None, "answers": {}, "panels": []},
        {"format": 1},
        {"format": 1, "question": None, "target": None, "answers": {}, "panels": []},
        {"format": 1, "question": "", "target": None, "answers": [], "panels": []},
        {"format": 1, "question": "", "target": None, "answers": {}, "panels": ["none"]},
        {
            "format": 1,
            "question": "",
            "target": None,
            "answers": {},
            "panels": [{"row": "none", "box": [0, 0, 21, 20], "tokens": ""}],
        },
    ],
)
def test_a_side_file_of_another_shape_costs_nothing_else(tmp_path: Path, side: object) -> None:
    folder = tmp_path / "pocket" / "overlays" / "vqa"
    folder.mkdir(parents=True)
    (folder / "0000-a.json").write_text(json.dumps(side), encoding="utf-8")
    Image.new("RGB", (20, 20)).save(folder / "0000-a.png")
    write_report(tmp_path, usual())
    words = page(tmp_path).text
    assert "pocket/overlays/vqa/0000-a.json: the drawing cannot be read" in words
    assert "the stock model scores" in words
