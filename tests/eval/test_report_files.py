"""Reports as files: nothing of the data is markup, and no damage takes more with it."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from eval.report import folded, read_report, report_folder, text, write_report
from eval.report_html import report_html
from eval.report_summary import (
    caveats,
    provenance,
)
from eval.report_words import duration, milliseconds, share, size
from mmlm_efficient.errors import DataError, RunError
from tests.eval.made_reports import ATTACK, report, row, task, usual
from tests.eval.report_page import Page, page


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
