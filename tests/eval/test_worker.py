"""A task group: every sample with every row, resumed, limited, failing, drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import worker
from eval.plan import EvalConfig
from eval.report_words import file_name
from eval.samples_log import read_records
from eval.task import Sample
from eval.worker import Group, Trouble, run_group, selected
from mmlm_efficient.errors import DataError, MediaError, RunError, SettingsError
from tests.eval.conftest import SmallTask


class Counted(SmallTask):
    """Notes which samples were loaded; one cannot be read."""

    def __init__(self, count: int = 6, unreadable: str = "") -> None:
        super().__init__(count)
        self.loaded: list[str] = []
        self.unreadable = unreadable

    def sample(self, id: str) -> Sample:
        self.loaded.append(id)
        if id == self.unreadable:
            raise MediaError(f"{id}.png: is no picture.")
        return super().sample(id)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Counted:
    task = Counted()
    monkeypatch.setattr(worker, "find_tasks", lambda entry, include_path: [task])
    return task


def group(tmp_path: Path, methods: Any = ("flowcut:36",), **changes: Any) -> Group:
    fields = {"model": "pocket", "tasks": ["small"], "methods": list(methods), "batch_size": 4}
    for name in ("limit", "seed", "batch_size", "metric", "expected", "generation"):
        if name in changes:
            fields[name] = changes.pop(name)
    [job] = EvalConfig.read(fields, "test").jobs()
    return Group(job, ("small",), tmp_path / "run", job.config_sha(), **changes)


def run(group: Group) -> dict[str, Any]:
    [result] = run_group(group)
    assert isinstance(result, dict), result
    return result


def records(tmp_path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    _, found = read_records(tmp_path / "run" / "small.samples.jsonl")
    return {(one["row"], one["id"]): one for one in found}


def test_every_sample_goes_through_every_row(tmp_path: Path, task: Counted) -> None:
    result = run(group(tmp_path))
    assert [row["row"] for row in result["rows"]] == ["none", "flowcut:36"]
    assert [row["samples"] for row in result["rows"]] == [6, 6]
    written = records(tmp_path)
    assert set(written) == {(row, one) for row in ("none", "flowcut:36") for one in task.ids}
    right = [written["none", one]["scores"]["right"] for one in task.ids]
    assert result["rows"][0]["metrics"]["right"]["value"] == pytest.approx(sum(right) / 6, abs=1e-6)
    assert [row["visual_tokens_kept"] for row in result["rows"]] == [144, 36]
    path = tmp_path / "run" / "small.results.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert result["config_sha"] == group(tmp_path).config_sha
    assert result["hardware"]["device"] == "cpu"


def test_resuming_asks_only_what_is_left(tmp_path: Path, task: Counted) -> None:
    whole = run(group(tmp_path / "whole"))
    run(group(tmp_path, limit=2))
    before = records(tmp_path)
    task.loaded.clear()
    resumed = run(group(tmp_path, resume=True))
    assert not {"s0", "s1"} & set(task.loaded)
    after = records(tmp_path)
    assert {key: after[key] for key in before} == before, "finished answers stay as they were"
    lines = (tmp_path / "run" / "small.samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"kind": "sample"' in line for line in lines) == 12
    for one, other in zip(whole["rows"], resumed["rows"], strict=True):
        assert one["metrics"] == other["metrics"]
        assert one["to_vanilla"] == other["to_vanilla"]


def test_a_further_row_joins_a_finished_run(tmp_path: Path, task: Counted) -> None:
    run(group(tmp_path))
    before = records(tmp_path)
    result = run(group(tmp_path, ["flowcut:36", "uniform:36"], resume=True))
    assert [row["row"] for row in result["rows"]] == ["none", "flowcut:36", "uniform:36"]
    after = records(tmp_path)
    assert {key: after[key] for key in before} == before
    only = run(group(tmp_path, [], resume=True))
    assert [row["row"] for row in only["rows"]] == ["none"], "rows that are not asked for"


def test_batches_do_not_change_the_answers(tmp_path: Path, task: Counted) -> None:
    run(group(tmp_path / "one", batch_size=1))
    run(group(tmp_path / "five", batch_size=5))
    one, five = records(tmp_path / "one"), records(tmp_path / "five")
    assert {key: record["answer"] for key, record in one.items()} == {
        key: record["answer"] for key, record in five.items()
    }


def test_a_picture_that_cannot_be_read_fails_in_every_row(tmp_path: Path, task: Counted) -> None:
    task.unreadable = "s3"
    result = run(group(tmp_path))
    assert [(row["samples"], row["failed"]) for row in result["rows"]] == [(5, 1), (5, 1)]
    first = result["failures"][0]
    assert (first["id"], first["where"], first["type"]) == ("s3", "media", "MediaError")
    assert "answer" not in records(tmp_path)["none", "s3"]
    task.unreadable = ""
    again = run(group(tmp_path, resume=True))
    assert [(row["samples"], row["failed"]) for row in again["rows"]] == [(6, 0), (6, 0)]


def test_a_first_sample_that_fails_does_not_spoil_the_warm_up(
    tmp_path: Path, task: Counted
) -> None:
    task.unreadable = "s0"
    result = run(group(tmp_path))
    assert [row["failed"] for row in result["rows"]] == [1, 1]


def test_limit_and_only(tmp_path: Path, task: Counted) -> None:
    assert selected(task, 2, ()) == ["s0", "s1"]
    assert selected(task, None, ("s4", "s1")) == ["s1", "s4"]
    result = run(group(tmp_path, only=("s4",)))
    assert result["samples"] == 1
    assert set(records(tmp_path)) == {("none", "s4"), ("flowcut:36", "s4")}


def test_the_first_samples_are_drawn(tmp_path: Path, task: Counted) -> None:
    run(group(tmp_path, overlays=2))
    drawn = sorted(path.name for path in (tmp_path / "run" / "overlays" / "small").glob("*.png"))
    assert drawn == ["0000-s0.png", "0001-s1.png"]


def test_what_a_task_cannot_do_is_a_trouble_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(entry: str, include_path: Any) -> Any:
        raise DataError("small: data.jsonl is missing.")

    monkeypatch.setattr(worker, "find_tasks", broken)
    [trouble] = run_group(group(tmp_path))
    assert isinstance(trouble, Trouble)
    assert (trouble.task, str(trouble.error)) == ("small", "small: data.jsonl is missing.")
    assert not (tmp_path / "run").exists()


def test_one_tasks_error_is_its_own(
    tmp_path: Path, task: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Counted):
        name = "second"

    monkeypatch.setattr(worker, "find_tasks", lambda entry, include_path: [task, Second()])
    real = worker.run_task

    def failing(group: Group, one: Any, answers: Any) -> Any:
        if one.name == "small":
            raise ZeroDivisionError("in a library")
        return real(group, one, answers)

    monkeypatch.setattr(worker, "run_task", failing)
    trouble, result = run_group(group(tmp_path))
    assert isinstance(trouble, Trouble)
    assert (trouble.run, trouble.task) == ("pocket", "small")
    assert str(trouble.error) == "ZeroDivisionError: in a library"
    assert isinstance(result, dict)
    assert result["task"] == "second"


def test_a_model_that_cannot_be_loaded_is_a_trouble(tmp_path: Path, task: Counted) -> None:
    one = group(tmp_path)
    model = one.job.model.model_copy(update={"model": str(tmp_path / "nowhere")})
    [trouble] = run_group(replace(one, job=replace(one.job, model=model)))
    assert isinstance(trouble, Trouble)
    assert "nowhere" in str(trouble.error)


def test_results_that_cannot_be_written(
    tmp_path: Path, task: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, result: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "write_json", full)
    [trouble] = run_group(group(tmp_path))
    assert isinstance(trouble, Trouble)
    assert isinstance(trouble.error, RunError)
    assert "--resume" in str(trouble.error)
    assert len(records(tmp_path)) == 12


def test_another_configuration_is_refused(tmp_path: Path, task: Counted) -> None:
    run(group(tmp_path, limit=1))
    [trouble] = run_group(group(tmp_path, seed=1, resume=True))
    assert isinstance(trouble, Trouble)
    assert isinstance(trouble.error, SettingsError)
    assert "config_sha" in str(trouble.error)


def test_file_names_are_safe() -> None:
    assert file_name("../a b/ä") == ".._a_b_ä"
