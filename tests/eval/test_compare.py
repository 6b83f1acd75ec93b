"""Two runs side by side: numbers by hand, what cannot be paired and why, warnings, files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval.compare import compare, compare_tables, write_comparison
from eval.report_view import arrow_of
from eval.statistics import paired_interval
from mmlm_efficient.errors import DataError, RunError
from mmlm_efficient.files import write_json
from tests.eval.made_reports import ATTACK, report, row, task, write_samples
from tests.eval.report_page import Page

Scores = dict[str, dict[str, float | None]]
BEFORE = {"none": [1, 1, 1, 0], "flowcut:36": [1, 0, 1, 0]}
AFTER = {"none": [1, 1, 1, 0], "flowcut:36": [0, 1, 1, 1]}


def scored(values: dict[str, list[float | None]]) -> Scores:
    return {label: {f"s{n}": one for n, one in enumerate(row)} for label, row in values.items()}


def run(
    folder: Path, scores: Scores, samples: bool = True, unit: float = 1, **changes: Any
) -> Path:
    """A run's folder with report and samples file."""
    rows = []
    for label, by_id in scores.items():
        found = [one for one in by_id.values() if one is not None]
        mean = round(math.fsum(found) / len(found) * unit, 6) if found else None
        rows.append(row(label, mean, 0.5))
    result = task("vqa", rows, **changes)
    write_json(folder / "report.json", report([result]))
    if samples:
        write_samples(folder, result, scores)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return run(tmp_path / "a", scored(BEFORE)), run(tmp_path / "b", scored(AFTER))


def row_of(result: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in result["tasks"][0]["rows"] if one["row"] == label)


def test_paired_by_hand(pair: tuple[Path, Path]) -> None:
    result = compare(*pair)
    found = row_of(result, "flowcut:36")
    # Gains: s1, s3; losses: s0. 3/4 - 2/4.
    assert found["a"]["value"] == 0.5
    assert found["b"]["value"] == 0.75
    difference = found["difference"]
    assert (difference["value"], difference["paired"], difference["pairs"]) == (0.25, True, 4)
    interval = paired_interval([0, 1, 1, 1], [1, 0, 1, 0], [None] * 4).interval
    assert interval is not None
    assert difference["interval"] == [round(interval.low, 6), round(interval.high, 6)]
    assert difference["note"] is None
    answers = found["answers"]
    assert (answers["compared"], answers["changed"]) == (4, 3)
    assert answers["examples"][0] == {
        "id": "s0",
        "target": "cat, a cat",
        "a": "says 1",
        "b": "says 0",
    }
    assert row_of(result, "none")["difference"]["value"] == 0.0
    assert row_of(result, "none")["answers"]["changed"] == 0
    assert result["warnings"] == result["only_a"] == result["only_b"] == []
    # Files do as well as folders.
    again = compare(pair[0] / "report.json", pair[1])
    assert again["tasks"] == result["tasks"]


def test_the_other_way_round_is_the_opposite(pair: tuple[Path, Path]) -> None:
    there = row_of(compare(*pair), "flowcut:36")["difference"]
    back = row_of(compare(pair[1], pair[0]), "flowcut:36")["difference"]
    assert back["value"] == -there["value"]
    low, high = there["interval"]
    assert back["interval"] == pytest.approx([-high, -low], abs=1e-5)


def test_failed_samples_are_not_paired_but_counted(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored({"none": [1, 0, None, 1, None]}))
    b = run(tmp_path / "b", scored({"none": [1, 1, 0, None, None]}))
    found = row_of(compare(a, b), "none")
    assert found["difference"]["pairs"] == 2
    assert found["difference"]["value"] == 0.5
    assert found["difference"]["note"] == "2 of 4 samples"
    assert found["answers"] | {"examples": []} == {
        "compared": 2,
        "changed": 1,
        "failed_a": 1,
        "failed_b": 1,
        "examples": [],
    }


def test_scores_in_percent(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(BEFORE), unit=100)
    b = run(tmp_path / "b", scored(AFTER), unit=100)
    difference = row_of(compare(a, b), "flowcut:36")["difference"]
    assert difference["value"] == 25.0
    assert difference["paired"]
    assert difference["interval"][0] < 0 < 25 < difference["interval"][1] <= 100


def unpaired(result: dict[str, Any], label: str = "none") -> str:
    difference = row_of(result, label)["difference"]
    assert not difference["paired"]
    note: str = difference["note"]
    return note


def test_what_is_not_paired_says_why(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(BEFORE))
    other_data = run(tmp_path / "b", scored(AFTER), data_sha="ffffffffffff")
    result = compare(a, other_data)
    assert unpaired(result) == "the runs asked about different data"
    assert row_of(result, "none")["answers"] is None
    assert result["tasks"][0]["notes"] == ["Not paired: the runs asked about different data."]
    no_file = run(tmp_path / "c", scored(AFTER), samples=False)
    assert unpaired(compare(a, no_file)) == "the second run's file of samples is not there"
    assert unpaired(compare(no_file, a)) == "the first run's file of samples is not there"
    own = run(tmp_path / "d", scored(AFTER))
    changed = json.loads((own / "report.json").read_text(encoding="utf-8"))
    changed["tasks"][0]["rows"][0]["metrics"]["acc"]["value"] = 0.1
    write_json(own / "report.json", changed)
    result = compare(a, own)
    assert unpaired(result) == "the score is not the mean of the samples' own scores"
    assert row_of(result, "flowcut:36")["difference"]["paired"]
    disjoint = run(tmp_path / "e", {"none": {"x": 1.0, "y": 0.5}})
    assert unpaired(compare(a, disjoint)) == "no sample was answered and scored by both"


def resumed(folder: Path, ids: list[str], **changes: Any) -> Path:
    """A run of BEFORE's first samples whose samples file holds further ones, of a larger limit."""
    run(folder, scored({label: values[: len(ids)] for label, values in BEFORE.items()}))
    made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    made["tasks"][0] |= {"samples": len(ids), **changes}
    write_json(folder / "report.json", made)
    write_samples(folder, made["tasks"][0], scored(BEFORE))
    return folder


def test_samples_beyond_the_limit_of_the_last_run_do_not_count(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(AFTER))
    b = resumed(tmp_path / "b", ["s0", "s1"])
    write_json(b / "pocket" / "vqa.results.json", {"ids": ["s0", "s1"]})
    for first, second, sign in ((a, b, 1), (b, a, -1)):
        found = row_of(compare(first, second), "flowcut:36")
        # s0, s1: 0 and 1 in the one, 1 and 0 in the other; s2 and s3 are no part of it.
        assert found["difference"]["paired"]
        assert (found["difference"]["value"], found["difference"]["pairs"]) == (0.0, 2)
        assert found["difference"]["note"] == "2 of 4 samples"
        assert (found["answers"]["compared"], found["answers"]["changed"]) == (2, 2)
        assert [one["a"] for one in found["answers"]["examples"]] == (
            ["says 0", "says 1"] if sign > 0 else ["says 1", "says 0"]
        )


def test_surplus_samples_that_cannot_be_told_apart_are_not_paired(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(AFTER))
    why = "the second run's files hold other samples than its report counts"
    old = resumed(tmp_path / "b", ["s0", "s1"])  # of a version whose results had no ids
    result = compare(a, old)
    assert unpaired(result) == why
    assert row_of(result, "none")["answers"] is None
    write_json(old / "pocket" / "vqa.results.json", {"task": "vqa"})
    assert unpaired(compare(a, old)) == why
    # A later run, killed before it wrote its report.
    write_json(old / "pocket" / "vqa.results.json", {"ids": ["s0", "s1", "s2"]})
    assert unpaired(compare(a, old)) == why


def test_unpaired_interval_by_hand(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(BEFORE), samples=False)
    b = run(tmp_path / "b", scored(AFTER), samples=False)
    # Made rows have +-0.02: the hypotenuse of both.
    low, high = row_of(compare(a, b), "flowcut:36")["difference"]["interval"]
    assert low == pytest.approx(0.25 - math.hypot(0.02, 0.02), abs=1e-6)
    assert high == pytest.approx(0.25 + math.hypot(0.02, 0.02), abs=1e-6)


def test_costs_are_ratios(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", scored(BEFORE)), run(tmp_path / "b", scored(BEFORE))
    made = json.loads((b / "report.json").read_text(encoding="utf-8"))
    made["tasks"][0]["rows"][1] |= {"ttft_s": {"median": 0.01}, "kv_bytes": None}
    write_json(b / "report.json", made)
    ratios = row_of(compare(a, b), "flowcut:36")["ratios"]
    assert ratios["ttft_s"] == 0.5
    assert ratios["kv_bytes"] is None
    assert ratios["visual_tokens_mean"] == 1.0


def test_what_only_one_side_has(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    first = [task("vqa", [row("none", 0.5), row("x", 0.4, 0.5)]), task("video", [row("none", 0.5)])]
    second = [task("vqa", [row("none", 0.5), row("y", 0.4, 0.5)])]
    write_json(a / "report.json", report(first))
    write_json(b / "report.json", report(second))
    result = compare(a, b)
    assert result["only_a"] == [
        {"run": "pocket", "task": "vqa", "row": "x"},
        {"run": "pocket", "task": "video", "row": None},
    ]
    assert result["only_b"] == [{"run": "pocket", "task": "vqa", "row": "y"}]
    assert [one["row"] for one in result["tasks"][0]["rows"]] == ["none"]


def test_runs_are_matched_by_name_where_there_are_several(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    both = [task("vqa", [row("none", value)], run=run) for run, value in (("x", 0.5), ("y", 0.6))]
    write_json(a / "report.json", report(both))
    write_json(b / "report.json", report([task("vqa", [row("none", 0.7)], run="y")]))
    write_json(c / "report.json", report([task("vqa", [row("none", 0.7)], run="z")]))
    [found] = compare(a, b)["tasks"]
    assert (found["run"], found["rows"][0]["difference"]["value"]) == ("y", pytest.approx(0.1))
    # One run each: their names do not matter.
    [found] = compare(b, c)["tasks"]
    assert (found["run"], found["runs"]) == (None, ["y", "z"])
    assert compare(a, c)["tasks"] == []
    assert compare(a, c)["warnings"] == ["The runs have no task in common."]


def test_warnings(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(BEFORE))
    changes = {
        "versions": {"python": "3.11.9", "torch": "2.14.0", "ray": "2.60.0"},
        "hardware": {"cpu": "another", "device": "cpu"},
        "seed": 1,
        "threads": 2,
        "task_version": "2",
    }
    b = run(tmp_path / "b", scored(BEFORE), **changes)
    made = json.loads((b / "report.json").read_text(encoding="utf-8"))
    made["tasks"][0]["rows"][0]["batch_size"] = 8
    made |= {"workers": 2, "errors": [{"task": "gqa", "message": "no data"}]}
    write_json(b / "report.json", made)
    warnings = compare(a, b)["warnings"]
    assert warnings == [
        "In the second run gqa did not finish: no data",
        "Workers: 0 and 2; times do not compare.",
        "Version of torch: 2.13.0 and 2.14.0.",
        "Version of ray: None and 2.60.0.",
        "Hardware: cpu a processor and another; times and memory do not compare.",
        "Threads: 1 and 2; times do not compare.",
        "Seed: 0 and 1; random methods and sampled answers differ by chance.",
        "vqa: version 1 and 2 of the task; scores do not compare.",
        "vqa: batch size 1 and 1, 8; times do not compare.",
    ]


def warned(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], **task_b: Any
) -> list[str]:
    """Warnings about two runs whose configurations hold these settings."""
    folders = []
    for name, settings, changes in (("a", ours, {}), ("b", theirs, task_b)):
        folder = run(tmp_path / name, scored(BEFORE), **changes)
        made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        made["config"] = {"runs": [{"name": "pocket", **settings}]}
        write_json(folder / "report.json", made)
        folders.append(folder)
    found: list[str] = compare(*folders)["warnings"]
    return found


def test_another_model_or_setting_is_said(tmp_path: Path) -> None:
    ours = {"model": "pocket", "dtype": None, "quantization": None, "limit": None, "generation": {}}
    theirs = {
        "model": "hub/other",
        "dtype": "bfloat16",
        "quantization": "int8",
        "attn_implementation": "sdpa",  # which the other report does not say
        "limit": 100,
        "generation": {"max_new_tokens": 8},
    }
    end = "answers and times differ by that too."
    assert warned(tmp_path, ours, theirs, config_sha="ffffffffffff") == [
        f"model: pocket and hub/other; {end}",
        f"quantization: none and int8; {end}",
        f'generation: none and {{"max_new_tokens": 8}}; {end}',
        f"dtype: float32 and bfloat16; {end}",
        "vqa: limit: none and 100; the two scores need not be of the same samples, paired "
        "differences are.",
    ]
    # The CPU's own type, named and not; nothing else differs.
    assert warned(tmp_path, ours, {**ours, "dtype": "float32"}) == []
    sdpa = {**ours, "attn_implementation": "sdpa"}
    eager = {**ours, "attn_implementation": "eager"}
    assert warned(tmp_path, sdpa, eager) == [f"attn_implementation: sdpa and eager; {end}"]


def test_the_device_is_said_by_hardware_or_else_by_the_configuration(tmp_path: Path) -> None:
    here, there = {"device": "cpu"}, {"device": "cuda"}
    assert warned(tmp_path, here, there, hardware={"cpu": "a processor", "device": "cuda"}) == [
        "Hardware: device cpu and cuda; times and memory do not compare."
    ]
    unknown = warned(tmp_path, here, there, hardware=None)
    assert "device: cpu and cuda; answers and times differ by that too." in unknown


def test_other_samples_of_a_task_are_said(tmp_path: Path) -> None:
    [only] = warned(tmp_path, {}, {}, only=["s0", "s1"])
    assert only.startswith(
        'vqa: only: none and ["s0", "s1"]; the two scores need not be of the same'
    )
    # What the task's result says wins over the configuration.
    assert warned(tmp_path, {"limit": 3}, {"limit": None}, limit=3) == []


def test_weights_that_differ_under_one_name_are_said(tmp_path: Path) -> None:
    same = {"model": "pocket"}
    assert warned(tmp_path, same, same, config_sha="ffffffffffff") == [
        "vqa: configurations 0123456789ab and ffffffffffff differ in what the reports do not name, "
        "such as the weights."
    ]
    # A seed explains it.
    [seed] = warned(tmp_path, same, same, config_sha="ffffffffffff", seed=1)
    assert seed.startswith("Seed:")


def test_one_label_for_two_settings_is_said(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", scored(BEFORE)), run(tmp_path / "b", scored(BEFORE))
    settings = {"keep_tokens": 36, "position_ids": "original"}
    for folder, methods in (
        (a, {"flowcut": settings}),
        (b, {"flowcut": {**settings, "position_ids": "packed"}, "fastv": {"layer": 2}}),
    ):
        made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        made["tasks"][0]["rows"][0]["methods"] = {}
        made["tasks"][0]["rows"][1]["methods"] = methods
        write_json(folder / "report.json", made)
    assert compare(a, b)["warnings"] == [
        "vqa: row flowcut:36 has other settings in each run: flowcut.position_ids original and "
        "packed; fastv.layer none and 2."
    ]
    assert compare(a, a)["warnings"] == []


def test_sessions_that_were_not_alike_are_said(tmp_path: Path) -> None:
    [mixed] = warned(tmp_path, {}, {}, mixed=["hardware", "workers"])
    assert mixed == (
        "vqa: in the second run, sessions with other hardware, workers are mixed; times and memory "
        "do not compare."
    )


def test_percent_only_where_the_reports_do_not_say_otherwise(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored(BEFORE), percent=False)
    b = run(tmp_path / "b", scored(AFTER), percent=False)
    result = compare(a, b)
    assert result["tasks"][0]["percent"] is False
    markdown = write_comparison(tmp_path / "out", result)[1].read_text(encoding="utf-8")
    assert "+0.250" in markdown
    assert "acc, %" not in markdown
    c = run(tmp_path / "c", scored(AFTER), percent=True)
    assert compare(a, c)["tasks"][0]["percent"] is False
    assert compare(c, c)["tasks"][0]["percent"] is True
    old = run(tmp_path / "d", scored(AFTER))
    assert compare(old, old)["tasks"][0]["percent"] is None


def test_other_metric_of_the_second_run(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", scored(BEFORE)), run(tmp_path / "b", scored(BEFORE), metric="f1")
    result = compare(a, b)
    assert result["tasks"][0]["notes"] == ["The second run shows f1; compared is acc."]
    assert row_of(result, "none")["difference"]["value"] == 0.0


def test_a_torn_last_line_is_no_trouble_a_damaged_one_is(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "pocket" / "vqa.samples.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind":"sample","row":"no')
    assert row_of(compare(*pair), "flowcut:36")["difference"]["paired"]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n{}\n")
    with pytest.raises(DataError, match=r"vqa\.samples\.jsonl, line"):
        compare(*pair)


def test_errors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: cannot be read"):
        compare(pair[0], tmp_path / "nothing")
    (pair[1] / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is damaged, it is no JSON"):
        compare(*pair)
    write_json(pair[1] / "report.json", {"format": 7})
    with pytest.raises(DataError, match="no report of format 1"):
        compare(*pair)
    write_json(pair[1] / "report.json", report([]) | {"tasks": [{"task": "vqa"}]})
    with pytest.raises(DataError, match="tasks: 0: run: is missing"):
        compare(*pair)


@pytest.mark.parametrize("content", ["{", '{"ids": [1]}', '{"ids": "s0"}'])
def test_a_damaged_results_file(pair: tuple[Path, Path], content: str) -> None:
    (pair[1] / "pocket" / "vqa.results.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"vqa\.results\.json: (cannot be read|is damaged)"):
        compare(*pair)


def test_files_and_terminal(pair: tuple[Path, Path], tmp_path: Path) -> None:
    label = f"flowcut:36 {ATTACK}"
    before = {**BEFORE, label: BEFORE["flowcut:36"]}
    a = run(tmp_path / "c", scored(before))
    b = run(tmp_path / "d", scored({**AFTER, label: AFTER["flowcut:36"]}), seed=3)
    result = compare(a, b)
    files = write_comparison(tmp_path / "out" / "deep", result)
    assert [path.name for path in files] == ["compare.json", "compare.md", "compare.html"]
    assert json.loads(files[0].read_text(encoding="utf-8")) == result
    page = Page(files[2].read_text(encoding="utf-8"))
    assert page.seen.count("script") == 1
    markdown = files[1].read_text(encoding="utf-8")
    assert "<script" not in markdown
    for words in (page.text, markdown):
        assert "+25.0" in words
        assert "Seed: 0 and 3" in words
        assert "6 of 12 answers changed" in words
        assert "says 1" in words
    console = Console(width=160, record=True, file=(tmp_path / "log").open("w"))
    for table in compare_tables(result):
        console.print(table)
    shown = console.export_text()
    assert "50.0" in shown
    assert "3 of 4" in shown
    assert "Seed: 0 and 3" in shown
    assert arrow_of(0.25) not in shown  # four samples show no clear difference


def test_a_clear_difference_is_said(tmp_path: Path) -> None:
    a = run(tmp_path / "a", scored({"none": [1.0] * 100}))
    b = run(tmp_path / "b", scored({"none": [0.0] * 30 + [1.0] * 70}))
    markdown = write_comparison(tmp_path / "out", compare(a, b))[1].read_text(encoding="utf-8")
    assert "vqa, 1 row: none is worse (−30.0 points). 30 of 100 answers changed." in markdown
    assert "30 changed answers, the first 20" in markdown


def test_nothing_to_compare_and_nowhere_to_write(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_json(tmp_path / "e" / "report.json", report([]))
    result = compare(pair[0], tmp_path / "e")
    files = write_comparison(tmp_path / "out", copy.deepcopy(result))
    assert "nothing to compare" in Page(files[2].read_text(encoding="utf-8")).text
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="the comparison cannot be written"):
        write_comparison(tmp_path / "file", result)
