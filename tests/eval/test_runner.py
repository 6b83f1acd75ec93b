"""The runner: what it does when a group's process dies, is stopped, or has nothing to say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.answering import Batch, RayAnswers
from eval.plan import EvalConfig
from eval.runner import FAILED, FAILED_SAMPLES, GOOD, WRONG_USAGE, Options, RunResult, run_eval
from eval.samples_log import read_records
from eval.worker import Trouble
from mmlm_efficient.errors import DataError, RunError, SettingsError
from mmlm_efficient.settings import Config
from tests.eval.conftest import SmallTask

UTILS = """
import os, signal
def visual(doc):
    from mmlm_efficient.pocket import scene
    return [scene("heldout", doc["scene"]).image]
def results(doc, answers):
    print("a task may print")
    if doc["deed"] == "exit": os._exit(0)
    if doc["deed"] == "leave": raise SystemExit(3)
    if doc["deed"] == "die": os.kill(os.getpid(), signal.SIGKILL)
    return {"right": float(answers[0] == doc["answer"])}
def broken(items): return 1 / 0
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 4, do_sample: false}}
metric_list:
  - {{metric: right, aggregation: {aggregation}, higher_is_better: true}}
"""


def make_task(folder: Path, name: str, deed: str = "", aggregation: str = "mean") -> None:
    """A task of three questions; the second one's scoring does something to its process."""
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, aggregation=aggregation))
    lines = [
        {
            "scene": number,
            "question": "is there a submarine?",
            "answer": "no",
            "deed": deed if number == 1 else "",
        }
        for number in range(3)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: Path, out: Path, *tasks: Any, **more: Any) -> RunResult:
    options = {name: more.pop(name) for name in ("resume", "workers") if name in more}
    config = {"model": "pocket", "tasks": list(tasks), "batch_size": 1, **more}
    config = {**config, "include_path": [str(folder)]}
    return run_eval(EvalConfig.read(config, "test"), Options(out, threads=1, **options))


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("exit", "ended with exit code 0 before it had a result"),
        ("die", "was ended by SIGKILL, perhaps because memory ran out"),
    ],
)
def test_a_process_that_dies_takes_its_group_only(tmp_path: Path, deed: str, message: str) -> None:
    make_task(tmp_path / "tasks", "bad", deed)
    make_task(tmp_path / "tasks", "good")
    result = run(tmp_path / "tasks", tmp_path / "out", "bad", "good")
    assert result.exit_code == FAILED
    [trouble] = result.troubles
    assert (trouble.run, trouble.task) == ("pocket", "bad")
    assert message in str(trouble.error)
    assert [task["task"] for task in result.report["tasks"]] == ["good"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["errors"][0]["task"] == "bad"
    _, records = read_records(tmp_path / "out" / "pocket" / "bad.samples.jsonl")
    assert [one["id"] for one in records] == ["0"], "what was answered before is kept"


def test_damaged_answers_are_refused_before_anything_runs(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "good")
    out = tmp_path / "out"
    run(tmp_path / "tasks", out, "good")
    path = out / "pocket" / "good.samples.jsonl"
    path.write_text(path.read_text().replace('"ok": true', '"ok": treu', 1))
    with pytest.raises(DataError, match="line 2: is damaged"):
        run(tmp_path / "tasks", out, "good", resume=True)


def test_a_figure_that_cannot_be_computed_is_a_failure(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "sum", aggregation="!function utils.broken")
    result = run(tmp_path / "tasks", tmp_path / "out", "sum")
    assert result.exit_code == FAILED
    [task] = result.report["tasks"]
    assert task["rows"][0]["metrics"]["right"]["value"] is None
    assert "ZeroDivisionError" in task["failures"][0]["message"]


def test_a_task_that_exits_fails_its_sample_and_not_the_run(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "bad", "leave")
    result = run(tmp_path / "tasks", tmp_path / "out", "bad")
    assert result.exit_code == FAILED_SAMPLES
    [row] = result.report["tasks"][0]["rows"]
    assert (row["samples"], row["failed"]) == (2, 1)


def test_one_missing_model_of_several(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "good")
    runs = [{"name": "here", "model": "pocket"}, {"name": "gone", "model": str(tmp_path / "no")}]
    result = run(tmp_path / "tasks", tmp_path / "out", "good", runs=runs)
    assert result.exit_code == FAILED
    assert [(one.run, one.task) for one in result.troubles] == [("gone", "all tasks")]
    assert [task["run"] for task in result.report["tasks"]] == ["here"]


def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "good")
    out = tmp_path / "out"
    run(tmp_path / "tasks", out, "good")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="config_sha"):
        run(tmp_path / "tasks", out, "good", resume=True, seed=1)
    with pytest.raises(SettingsError, match="--resume"):
        run(tmp_path / "tasks", out, "good")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_row_that_does_not_fit_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "good")
    row = {"name": "fastv", "keep_tokens": 9, "layer": 77}
    result = run(tmp_path / "tasks", tmp_path / "out", "good", methods=[row])
    [trouble] = result.troubles
    assert "fastv" in str(trouble.error)
    assert not result.report["tasks"]


@pytest.mark.parametrize(
    ("troubles", "failed", "value", "code"),
    [
        ((), 0, 0.5, GOOD),
        ((), 2, 0.5, FAILED_SAMPLES),
        ((), 2, None, FAILED),
        ((DataError("gone"),), 0, 0.5, FAILED),
        ((SettingsError("what?"),), 0, 0.5, FAILED),
    ],
)
def test_exit_codes(troubles: Any, failed: int, value: float | None, code: int) -> None:
    row = {"row": "none", "failed": failed, "metrics": {"acc": {"value": value}}}
    report = {"tasks": [{"task": "t", "metric": "acc", "rows": [row]}]}
    found = RunResult(report, (), tuple(Trouble("t", error) for error in troubles))
    assert found.exit_code == code


def test_wrong_usage_alone_is_told_from_failure() -> None:
    troubles = (Trouble("t", SettingsError("what?")),)
    assert RunResult({"tasks": []}, (), troubles).exit_code == WRONG_USAGE


COMMAND = [sys.executable, "-m", "mmlm_efficient", "eval", "--tasks", "mmlm_pocket_vqa"]


def wait_for(path: Path, lines: int, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not grow")


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_stops_it_and_says_how_to_go_on(tmp_path: Path, whole_group: bool) -> None:
    out = tmp_path / "out"
    samples = out / "pocket" / "mmlm_pocket_vqa.samples.jsonl"
    command = [*COMMAND, "--batch-size", "1", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(samples, 4)
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another run works there" in second.stderr.replace("\n", " ")
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "--resume goes on" in told
    assert "Traceback" not in told
    assert read_records(samples)[1]
    grown = samples.stat().st_size
    time.sleep(1.0)
    assert samples.stat().st_size == grown, "nothing goes on behind"


@pytest.mark.slow
def test_results_of_ray_workers_that_are_killed(tmp_path: Path) -> None:
    """A batch whose workers die again and again is failed samples; the others are as ever."""
    task = SmallTask(4)
    samples = [task.sample(one) for one in task.ids]
    batches = [Batch((one,), {"none": ((), frozenset([one.id]))}) for one in samples]
    with RayAnswers(Config(), 2, address=None, threads=1) as answers:
        fine = {batch.samples[0].id: found[0] for batch, _, found in answers.run(batches)}
        poison = Batch((samples[0],), {"none": (_Poison(), frozenset(["s0"]))})  # type: ignore[dict-item]
        mixed = {
            batch.samples[0].id: found[0] for batch, _, found in answers.run([poison, *batches[1:]])
        }
    assert {one: found.text for one, found in mixed.items() if one != "s0"} == {
        one: found.text for one, found in fine.items() if one != "s0"
    }
    error = mixed["s0"].error
    assert error is not None
    assert (error["where"], error["type"]) == ("worker", RunError.__name__)


class _Poison(tuple[Any, ...]):
    """Methods that kill the process that unpacks them."""

    def __reduce__(self) -> Any:
        return _die, ()


def _die() -> tuple[Any, ...]:
    if "ray::" in Path("/proc/self/cmdline").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    return ()


def test_a_folder_of_other_tasks_is_not_gone_on_with(tmp_path: Path) -> None:
    make_task(tmp_path / "tasks", "good")
    make_task(tmp_path / "tasks", "other")
    out = tmp_path / "out"
    run(tmp_path / "tasks", out, "good")
    with pytest.raises(SettingsError, match="holds another run, with good"):
        run(tmp_path / "tasks", out, "other", resume=True)
    both = run(tmp_path / "tasks", out, "good", "other", resume=True)
    assert [task["task"] for task in both.report["tasks"]] == ["good", "other"]
