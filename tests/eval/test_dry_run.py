"""The dry run: what is listed, and what is said to be missing, without fetching anything."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from eval import task_index
from eval.dry_run import PlannedRun, all_missing, dry_run, dry_run_table, model_missing
from eval.plan import EvalConfig
from eval.task_index import Dataset, IndexedTask, IndexTrouble
from mmlm_efficient.names import POCKET_WEIGHTS
from mmlm_efficient.settings import Config


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test."""

    def connect(*_: object) -> None:
        pytest.fail("a dry run must not use the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


class FakeIndex:
    """Stands in for lmms-eval: gqa is there, pope has no local data."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(
        self, names: Iterable[str], include_path: Sequence[Path] = ()
    ) -> dict[str, IndexedTask]:
        self.calls.append(sorted(names))
        known = {
            "gqa": IndexedTask("gqa", True, None, (Dataset("lab/GQA", True),), ("exact_match",)),
            "pope": IndexedTask("pope", True, None, (Dataset("lab/POPE", False),), ("f1", "acc")),
        }
        return {name: known.get(name, IndexedTask(name, False, "gqa")) for name in self.calls[-1]}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex()
    monkeypatch.setattr("eval.dry_run.look_up", fake)
    return fake


def plan(**values: Any) -> list[PlannedRun]:
    config = EvalConfig.read({"tasks": ["mmlm_pocket_vqa"], **values}, lenient=True)
    return dry_run(config)


def test_every_run_task_and_row_in_order(index: FakeIndex) -> None:
    planned = plan(
        tasks=["mmlm_pocket_vqa", ["gqa", "pope"]],
        methods=["flowcut:72+fastv:0.25", "sparsevlm(stage_keep_tokens=[9, 8, 7])"],
        expected={
            "source": "paper",
            "tasks": ["gqa", "pope"],
            "rows": {"none": [61.9, 85.9], "flowcut:72+fastv:0.25": [60, None]},
            "not_compared": ["pope"],
            "notes": {"pope": "another metric"},
        },
    )
    assert [(one.task, one.row) for one in planned] == [
        (task, row)
        for task in ("mmlm_pocket_vqa", "gqa", "pope")
        for row in ("none", "flowcut:72+fastv:0.25", "sparsevlm(stage_keep_tokens=[9, 8, 7])")
    ]
    assert [one.budget for one in planned[:3]] == ["-", "72 tokens + 25 %", "-"]
    assert [one.expected for one in planned] == [None] * 3 + [61.9, 60, None] + [85.9, None, None]
    assert [one.compared for one in planned] == [True] * 6 + [False] * 3
    assert planned[6].note == "another metric"
    assert all(one.missing == () for one in planned[:6])
    assert index.calls == [["gqa", "pope"]]  # asked once, and not about bundled tasks


def test_bundled_tasks_do_not_ask_lmms_eval(index: FakeIndex) -> None:
    assert all_missing(plan(methods=["random:8"])) == []
    assert index.calls == []


def test_model_that_is_not_here(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (text,) = all_missing(plan(model="some/model"))
    assert "some/model" in text
    assert "fetched when the run starts" in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (text,) = all_missing(plan(model="some/model"))
    assert "offline" in text
    assert "hf download some/model" in text


def test_model_in_the_hub_cache(hub_cache: Path) -> None:
    repository = hub_cache / "models--some--model"
    folder = repository / "snapshots" / ("a" * 40)
    shutil.copytree(POCKET_WEIGHTS, folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    assert model_missing(Config(model="some/model")) == []
    (folder / "model.safetensors").unlink()
    (text,) = model_missing(Config(model="some/model"))
    assert "only a part" in text
    assert "model.safetensors" in text


@pytest.mark.parametrize(
    ("model", "part"),
    [("nowhere", "neither"), ("a/b/c", "neither"), ("bad--/--name", "hub id")],
)
def test_names_that_are_no_models(model: str, part: str) -> None:
    (text,) = model_missing(Config(model=model))
    assert part in text


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (text,) = model_missing(Config(model=str(tmp_path)))
    assert "model.safetensors" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu() -> None:
    (text,) = all_missing(plan(device="cuda"))
    assert "'cuda' is not there" in text


def test_missing_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    (text,) = all_missing(plan(quantization="int8"))
    assert "mmlm-efficient[quantization]" in text


def test_methods_and_profiles_that_are_missing(tmp_path: Path) -> None:
    planned = plan(
        methods=["flowcot:8", "vflowopt:0.25(profile=pocket-26)", "vflowopt:0.25", "random:8"]
    )
    by_row = {one.row: one.missing for one in planned}
    assert "did you mean 'flowcut'" in by_row["flowcot:8"][0]
    assert "Did you mean 'pocket-25'?" in by_row["vflowopt:0.25(profile=pocket-26)"][0]
    assert by_row["none"] == by_row["vflowopt:0.25"] == by_row["random:8"] == ()
    folder = tmp_path / "unknown-model"
    shutil.copytree(POCKET_WEIGHTS, folder)
    untuned = plan(model=str(folder), methods=["vflowopt:0.25", "vflowopt:0.25(profile=none)"])
    assert "mmlm calibrate vflowopt" in untuned[1].missing[0]
    assert untuned[0].missing == untuned[2].missing == ()


def test_what_a_models_config_says_about_var(tmp_path: Path) -> None:
    methods = [
        "var",
        "var(sink_dims=[85])",
        "var(sink_dims=[192])",
        "var(sink_dims=[85], sink_threshold=14)",
        "var(sink_dims=[85], layers=[6])",
        "var(sink_dims='nowhere.yaml')",
        "var(layers=[6], redistribute_fraction=0)",
    ]
    said = [" ".join(one.missing) for one in plan(methods=methods)[1:]]  # the first is "none"
    assert [text != "" for text in said] == [True, False, True, True, True, True, False]
    parts = ["mmlm calibrate sinks --model pocket", "0 to 191", "13.86", "layers 0 to 5", "nowhere"]
    for text, part in zip(filter(None, said), parts, strict=True):
        assert part in text
    # Nothing is known of a model that is not here, but that.
    missing = plan(model=str(tmp_path / "no"), methods=["var"])
    assert all("no" in text and "sink" not in text for one in missing for text in one.missing)


def test_tasks_and_metrics_that_are_missing(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(
        tasks=["gqq", "pope", "gqa", "mmlm_pocket_vqa"],
        metric={"gqa": "em", "pope": "f1", "mmlm_pocket_vqa": "nothing"},
    )
    unknown, pope, gqa, ours = (one.missing for one in planned)
    assert unknown == ("task 'gqq' is neither bundled nor one of lmms-eval. Did you mean 'gqa'?",)
    assert len(pope) == 1
    assert "lab/POPE" in pope[0]
    assert "--repo-type dataset" in pope[0]
    assert gqa == ("task gqa: has no metric 'em'. Allowed: exact_match.",)
    assert "no metric 'nothing'" in ours[0]


def test_local_task_without_its_data(tmp_path: Path, index: FakeIndex) -> None:
    text = (
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n"
        "test_split: test\ndoc_to_visual: image\ndoc_to_text: question\ndoc_to_target: answer\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    (text,) = all_missing(plan(tasks=["mine"], include_path=[str(tmp_path)]))
    assert "gone.jsonl" in text
    assert index.calls == []


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.task_index.find_spec", lambda _: None)
    planned = plan(tasks=["some_task", "mmlm_pocket_vqa"])
    assert "pip install 'mmlm-efficient[lmms-eval]'" in planned[0].missing[0]
    assert planned[1].missing == ()


def test_lmms_eval_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Any, **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nImportError: broken")

    monkeypatch.setattr("eval.task_index.find_spec", lambda _: True)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(IndexTrouble, match="ImportError: broken"):
        task_index.look_up(["a task that nobody asked about"])


@pytest.mark.parametrize("video", [False, True])
def test_whether_a_data_set_is_here(
    video: bool, tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)
    config = {"dataset_path": "lab/SomeSet"}
    place = tmp_path / "datasets" / "lab___some_set"
    if video:
        config["dataset_kwargs"] = {"video": True, "cache_dir": "clips"}
        place = tmp_path / "clips"
    assert not task_index._is_here(config)
    place.mkdir(parents=True)
    assert not task_index._is_here(config)  # an empty folder is no copy
    (place / "file").touch()
    assert task_index._is_here(config)


def test_local_files_of_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "x.jsonl"
    config = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": [str(file)]}}}
    assert not task_index._is_here(config)
    file.touch()
    assert task_index._is_here(config)


def test_as_json_and_as_a_table(index: FakeIndex) -> None:
    planned = plan(
        tasks=["gqa", "pope"],
        methods=["flowcut:0.125", "next"],
        expected={
            "source": "paper, table 1",
            "tasks": ["pope"],
            "rows": {"none": [85.9]},
            "notes": {"pope": "of [bold] another split"},
        },
    )
    again = json.loads(json.dumps([one.to_dict() for one in planned]))
    assert again[1] == {
        "run": "pocket",
        "model": "pocket",
        "task": "gqa",
        "row": "flowcut:0.125",
        "budgets": [0.125],
        "expected": None,
        "compared": True,
        "source": "paper, table 1",
        "note": None,
        "missing": [],
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dry_run_table(planned))
    text = console.export_text()
    for part in ("12.5 %", "85.9*", "unknown method 'next'", "lab/POPE", "of [bold] another"):
        assert part in text
    assert text.count("gqa") == 1  # not repeated on every line
    assert "1, 2" in text
