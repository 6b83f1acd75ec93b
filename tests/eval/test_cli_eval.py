"""`mmlm eval` as a user has it: exit codes, messages, and what is left on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.samples_log import read_records
from mmlm_efficient.pocket import scene
from tests.command import Run, runner

TASK = """
task: my_pictures
dataset_path: json
dataset_kwargs:
  data_files: {test: data.jsonl}
test_split: test
output_type: generate_until
doc_to_visual: picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, do_sample: false, until: ["\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def mmlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a task of six questions about picture files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "my_pictures.yaml").write_text(TASK)
    lines = []
    for number in range(6):
        found = scene("heldout", number)
        found.image.save(folder / f"{number}.png")
        name = found.objects[0].name
        lines.append(
            {
                "picture": f"{number}.png",
                "question": f"is there a {name if number % 2 else 'submarine'}?",
                "answer": "yes" if number % 2 else "no",
            }
        )
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "data.jsonl").write_text(text)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def options(data: Path, out: Path, *more: object) -> list[object]:
    shared = ["--tasks", "my_pictures", "--include-path", data, "--out", out, "--threads", 1]
    return ["eval", *shared, *more]


def test_a_run_its_report_and_its_files(mmlm: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = mmlm(*options(data, out, "--methods", "flowcut:36", "--batch-size", 4))
    assert found.code == 0, found.err
    assert "flowcut:36" in found.out
    report = json.loads((out / "report.json").read_text())
    [task] = report["tasks"]
    rows = {row["row"]: row for row in task["rows"]}
    _, records = read_records(out / "pocket" / "my_pictures.samples.jsonl")
    right = [one["scores"]["exact_match"] for one in records if one["row"] == "none"]
    assert rows["none"]["metrics"]["exact_match"]["value"] == pytest.approx(
        sum(right) / 6, abs=1e-6
    )
    assert rows["flowcut:36"]["visual_tokens_kept"] == 36
    for name in ("report.md", "report.html", "run.json", "pocket/my_pictures.results.json"):
        assert (out / name).stat().st_size > 0
    for head in (
        report,
        task,
        records and read_records(out / "pocket" / "my_pictures.samples.jsonl")[0],
    ):
        assert head["config_sha"]
        assert head["versions"]["torch"]
    again = mmlm(*options(data, out, "--methods", "flowcut:36"))
    assert again.code == 2
    assert "--resume" in again.err


def test_one_sample_that_fails(mmlm: Run, data: Path, tmp_path: Path) -> None:
    lines = read_lines(data)
    lines[2]["question"] = "is there " + "a cat and " * 3000 + "a dog?"  # beyond the context
    write_lines(data, lines)
    out = tmp_path / "out"
    found = mmlm(*options(data, out, "--json"))
    assert found.code == 3
    [task] = json.loads(found.out)["tasks"]
    [row] = task["rows"]
    assert (row["samples"], row["failed"]) == (5, 1)
    [failure] = task["failures"]
    assert (failure["row"], failure["id"], failure["where"]) == ("none", "2", "model")
    assert failure["type"] == "ContextError"
    records = read_records(out / "pocket" / "my_pictures.samples.jsonl")[1]
    assert [one["id"] for one in records if not one["ok"]] == ["2"]
    assert "ContextError" in (out / "report.md").read_text()
    shown = mmlm(*options(data, out, "--resume"))
    assert shown.code == 3
    assert "1 answer failed" in shown.err.replace("\n", " ")


def test_all_samples_fail(mmlm: Run, data: Path, tmp_path: Path) -> None:
    for picture in data.glob("*.png"):
        picture.write_bytes(b"no picture")
    found = mmlm(*options(data, tmp_path / "out"))
    assert found.code == 1
    assert "MediaError" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "my_pictues"], "my_pictures"),
        (["--methods", "flowcat:36"], "did you mean 'flowcut'"),
        (["--methods", "flowcut:36", "--only", "77"], "--only 77"),
        (["--config", "pockets"], "pocket"),
        (["--resume"], "holds no run"),
        (["--ray-address", "auto"], "--workers"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_wrong_usage(
    mmlm: Run, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    found = mmlm(*options(data, out, *arguments))
    assert found.code == 2, found.err
    assert message in found.err.replace("\n", " ")
    assert not out.exists()


def damage_missing(folder: Path) -> str:
    (folder / "data.jsonl").unlink()
    return "data.jsonl"


def damage_truncated(folder: Path) -> str:
    path = folder / "data.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    return "line 6"


def damage_column(folder: Path) -> str:
    lines = read_lines(folder)
    for line in lines:
        line["questio"] = line.pop("question")
    write_lines(folder, lines)
    return "Did you mean 'questio'?"


def damage_empty(folder: Path) -> str:
    (folder / "data.jsonl").write_text("")
    return "data.jsonl"


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_column, damage_empty])
def test_data_that_cannot_be_used(mmlm: Run, data: Path, tmp_path: Path, damage: Any) -> None:
    message = damage(data)
    out = tmp_path / "out"
    found = mmlm(*options(data, out))
    assert found.code == 1, found.err
    assert message in found.err.replace("\n", " ")
    assert "Traceback" not in found.err
    assert not out.exists(), "nothing was loaded or written"


@pytest.mark.slow
def test_a_task_whose_data_are_on_a_hub_that_cannot_be_reached(
    mmlm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "out"
    start = time.perf_counter()
    found = mmlm("eval", "--tasks", "pope", "--out", out)
    assert found.code == 1, found.err
    assert "pope" in found.err
    assert "offline" in found.err.lower()
    assert not out.exists()
    assert time.perf_counter() - start < 120, "fails fast"


@pytest.mark.slow
def test_a_disk_that_takes_no_more(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1800, 1800))

    command = [sys.executable, "-m", "mmlm_efficient", *map(str, options(data, out))]
    command += ["--batch-size", "1"]
    found = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert found.returncode == 1, found.stderr
    told = found.stderr.replace("\n", " ")
    assert "cannot be written" in told
    assert "--resume" in told
    assert "Traceback" not in told
    path = out / "pocket" / "my_pictures.samples.jsonl"
    kept = len(read_records(path)[1])
    assert 0 < kept < 6
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_records(path)[1]) == 6
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_killed_runs_go_on(data: Path, tmp_path: Path) -> None:
    """Killed at two moments, the runner alone or all its processes; see `eval_resume` among the
    benchmarks for the long form."""
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    command = [sys.executable, "-m", "mmlm_efficient", "eval", "--tasks", "mmlm_pocket_vqa"]
    command += ["--methods", "random:36", "--limit", "80", "--batch-size", "4", "--threads", "1"]
    subprocess.run([*command, "--out", str(quiet)], check=True, capture_output=True)
    path = out / "pocket" / "mmlm_pocket_vqa.samples.jsonl"
    before = 0
    for kill in (os.kill, os.killpg):
        more = ["--resume"] if (out / "run.json").exists() else []
        process = subprocess.Popen(
            [*command, "--out", str(out), *more],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while len(whole_lines(path)) < before + 12 and time.monotonic() < end:
            time.sleep(0.02)
        kill(process.pid, signal.SIGKILL)
        process.wait()
        while group_alive(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not group_alive(process.pid), "no process outlives the runner"
        before = len(whole_lines(path))
    subprocess.run([*command, "--out", str(out), "--resume"], check=True, capture_output=True)
    lines = [line for line in whole_lines(path) if line["kind"] == "sample"]
    keys = [(line["row"], line["id"]) for line in lines]
    assert len(keys) == len(set(keys)) == 160
    results = [
        json.loads((one / "pocket" / "mmlm_pocket_vqa.results.json").read_text())
        for one in (out, quiet)
    ]
    for one, other in zip(results[0]["rows"], results[1]["rows"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert one["groups"] == other["groups"]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def group_alive(group: int) -> bool:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own_group) == group and state != "Z":
            return True
    return False


@pytest.mark.slow
def test_two_ray_workers_give_the_same(mmlm: Run, tmp_path: Path) -> None:
    shared = ["eval", "--tasks", "mmlm_pocket_vqa", "--methods", "flowcut:36", "--limit", 60]
    shared += ["--batch-size", 4, "--threads", 1]
    assert mmlm(*shared, "--out", tmp_path / "one").code == 0
    found = mmlm(*shared, "--out", tmp_path / "two", "--workers", 2)
    assert found.code == 0, found.err
    one, two = (
        {
            (record["row"], record["id"]): (record["answer"], record["scores"])
            for record in read_records(folder / "pocket" / "mmlm_pocket_vqa.samples.jsonl")[1]
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) == 120
    assert one == two


def test_compare_and_report_and_tasks(mmlm: Run, data: Path, tmp_path: Path) -> None:
    assert mmlm(*options(data, tmp_path / "a", "--methods", "uniform:36")).code == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = mmlm("eval", "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert found.code == 0, found.err
    assert "uniform:36" in found.out
    assert (tmp_path / "c" / "compare.html").exists()
    (tmp_path / "a" / "report.html").unlink()
    assert mmlm("eval", "report", tmp_path / "a").code == 0
    assert (tmp_path / "a" / "report.html").exists()
    assert mmlm("eval", "compare", tmp_path / "a", tmp_path / "nowhere").code == 1
    listed = mmlm("eval", "tasks", "--json")
    assert {"mmlm_pocket_vqa", "mmlm_pocket_video"} <= {
        row["task"] for row in json.loads(listed.out)
    }


def test_dry_run_writes_nothing(mmlm: Run, data: Path, tmp_path: Path) -> None:
    found = mmlm(*options(data, tmp_path / "out", "--methods", "flowcut:36", "--dry-run", "--json"))
    assert found.code == 0, found.err
    rows = json.loads(found.out)
    assert {one["row"] for one in rows} == {"none", "flowcut:36"}
    assert not (tmp_path / "out").exists()


def test_an_option_given_twice_is_one_list(mmlm: Run, data: Path, tmp_path: Path) -> None:
    twice = ("--methods", "flowcut", "--methods", "random:9,uniform:9", "--budgets", "8")
    found = mmlm(
        *options(data, tmp_path / "out", *twice, "--budgets", "0.5", "--dry-run", "--json")
    )
    assert found.code == 0, found.err
    labels = {one["row"] for one in json.loads(found.out)}
    assert labels == {"none", "flowcut:8", "flowcut:0.5", "random:9", "uniform:9"}
