"""Tasks of lmms-eval as tasks of the runner, with local data and without a network."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlm_efficient.errors import (
    DataError,
    MissingExtraError,
    SettingsError,
    UnsupportedError,
)
from tests.eval.lmms_local import F, only_local, write_data, write_task

pytest.importorskip("lmms_eval")

from eval.lmms_task import LmmsTask, lmms_tasks, plain

GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_data(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    only_local(monkeypatch)
    return Path(shutil.copytree(source, tmp_path / "tasks"))


def load(folder: Path, **changes: Any) -> LmmsTask:
    write_task(folder, "mmlm_t", **changes)
    [task] = lmms_tasks("mmlm_t", [folder])
    return task


def test_what_a_task_says_of_itself(folder: Path) -> None:
    task = load(folder, cluster_key="image")
    assert (task.name, task.version) == ("mmlm_t", "2.0")
    assert task.ids == tuple(map(str, range(12)))
    assert [(one.name, one.higher_is_better, one.aggregation) for one in task.metrics] == [
        ("right", True, "mean"),
        ("pair", True, "share"),
    ]
    assert task.source == "lmms-eval 0.7.3, json"
    sample = task.sample("4")
    assert sample.cluster == "1.png"
    assert (dict(sample.generation), sample.until) == (GREEDY, ("\n\n",))
    assert sample.images[0].size == (192, 192)
    assert sample.target == task.sample("4").target != ""
    assert sample.question.islower()


def test_interleaved_messages_keep_their_places(folder: Path) -> None:
    sample = load(folder, doc_to_messages=F("doc_to_messages")).sample("0")
    assert sample.question.startswith("In <image>, ")
    assert sample.images == (str(folder / "0.png"),)


def test_scores_survive_json_and_aggregate(folder: Path) -> None:
    task = load(folder)
    target = task.sample("0").target
    right = task.score("0", f" {target} ")
    assert right == {"right": 1.0, "pair": [target, target]}
    assert type(right["right"]) is float
    wrong = task.score("0", "no idea")
    assert task.aggregate("right", [right["right"], wrong["right"]]) == 0.5
    assert task.aggregate("pair", [right["pair"], wrong["pair"], wrong["pair"]]) == 1 / 3


def test_several_filters_make_a_metric_each(folder: Path) -> None:
    regex = {"function": "regex", "regex_pattern": r"answer is (\w+)", "fallback": "none"}
    first = {"function": "take_first"}
    filters = [{"name": "strict", "filter": [regex, first]}, {"name": "raw", "filter": [first]}]
    task = load(
        folder,
        process_results=None,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=filters,
    )
    assert [metric.name for metric in task.metrics] == ["exact_match,strict", "exact_match,raw"]
    target = task.sample("0").target
    scores = task.score("0", f"the answer is {target.split()[0]}")
    assert set(scores) == {"exact_match,strict", "exact_match,raw"}
    assert scores["exact_match,raw"] == 0.0
    assert task.aggregate("exact_match,strict", [1.0, 0.0]) == 0.5


@pytest.mark.parametrize(
    "settings", [{"auto_strip_thinking": True}, {"reasoning_tags": [["<think>", "</think>"]]}]
)
def test_thoughts_are_cut_off(folder: Path, settings: dict[str, Any]) -> None:
    task = load(folder, **settings)
    target = task.sample("0").target
    assert task.score("0", f"<think>hm</think>{target}")["right"] == 1.0
    assert load(folder).score("0", f"<think>hm</think>{target}")["right"] == 0.0


def test_groups_and_tags_give_their_tasks(folder: Path) -> None:
    for name in ("mmlm_a", "mmlm_b"):
        write_task(folder, name, tag=["mmlm_both"])
    (folder / "group.yaml").write_text("group: mmlm_group\ntask: [mmlm_b, mmlm_a]\n")
    assert [task.name for task in lmms_tasks("mmlm_both", [folder])] in (
        ["mmlm_a", "mmlm_b"],
        ["mmlm_b", "mmlm_a"],
    )
    assert [task.name for task in lmms_tasks("mmlm_group", [folder])] == ["mmlm_b", "mmlm_a"]


def test_the_digest_sees_data_settings_and_functions_but_no_place(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    first = load(folder).data_sha
    assert len(first) == 12
    assert load(folder).data_sha == first
    elsewhere = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    assert load(elsewhere).data_sha == first
    assert load(folder, generation_kwargs={"max_new_tokens": 17}).data_sha != first
    with (elsewhere / "utils.py").open("a") as file:
        file.write("# changed\n")
    from eval import lmms_digest

    lmms_digest._file_digest.cache_clear()
    assert load(elsewhere).data_sha != first
    third = Path(shutil.copytree(source, tmp_path / "third"))
    lines = (third / "data.jsonl").read_text().splitlines()
    (third / "data.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace("?", "!")]))
    assert load(third).data_sha != first


def test_the_digest_leaves_pictures_alone(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from types import SimpleNamespace

    from eval.lmms_digest import data_digest

    png = (folder / "0.png").read_bytes()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "several": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
        }
    )

    def digest(image: bytes, question: str) -> str:
        row = {"image": {"bytes": image}, "several": [{"bytes": image}], "question": question}
        docs = datasets.Dataset.from_list([row], features=features)
        return data_digest(SimpleNamespace(task="t"), docs)

    assert digest(png, "a") == digest(b"no picture", "a") != digest(png, "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "multiple_choice", "generation_kwargs": None}, "asks for multiple_choice"),
        ({"output_type": "loglikelihood", "generation_kwargs": None}, "asks for loglikelihood"),
        ({"output_type": "generate_until_multi_round"}, "asks for generate_until_multi_round"),
        ({"num_fewshot": 3}, "wants 3 examples.*num_fewshot: 0"),
        ({"repeats": 4}, "wants each question asked 4 times"),
    ],
)
def test_tasks_that_are_refused_before_their_data_are_read(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    (folder / "data.jsonl").unlink()
    with pytest.raises(UnsupportedError, match=f"task mmlm_t: {message}"):
        load(folder, **changes)


def test_generation_settings_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"task mmlm_t: generation_kwargs:.*'beams' is unknown"):
        load(folder, generation_kwargs={"beams": 2})


def test_missing_data_are_told_at_once(folder: Path) -> None:
    (folder / "data.jsonl").unlink()
    start = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"task mmlm_t: its data set json cannot be loaded: "
        r"FileNotFoundError.*data.jsonl.*check data_files",
    ):
        load(folder)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '{"question": "a", "answer": "b"}\n{"question": ',
            r"its data set json cannot be loaded: "
            r"DatasetGenerationError: .* \(\w+: .*\)\. .*check data_files",
        ),
        ("", "does not fit its data, or cannot be set up: StopIteration|cannot be loaded"),
        ('{"answer": "a"}\n', "names a column 'question' that its data do not have. .*: answer"),
    ],
)
def test_damaged_data(folder: Path, data: str, message: str) -> None:
    (folder / "data.jsonl").write_text(data)
    with pytest.raises(DataError, match=f"task mmlm_t: .*{message}"):
        load(folder)


def test_a_hub_data_set_without_a_network_is_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"its data set nobody/nothing cannot be loaded:.*"
        r"HF_HUB_OFFLINE is set, so nothing is downloaded",
    ):
        load(folder, dataset_path="nobody/nothing", dataset_kwargs=None)
    assert time.monotonic() - start < 5


def test_a_group_with_trouble(folder: Path) -> None:
    write_task(folder, "mmlm_a")
    (folder / "group.yaml").write_text("group: mmlm_group\ntask: [mmlm_a]\n")
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="task mmlm_group: its data set cannot be.*one by one"):
        lmms_tasks("mmlm_group", [folder])


def test_a_missing_package_is_named(folder: Path) -> None:
    utils = (folder / "utils.py").read_text()
    (folder / "utils.py").write_text(f"import not_installed_at_all\n{utils}")
    with pytest.raises(DataError, match="needs the Python package 'not_installed_at_all'"):
        load(folder)


def test_unknown_names_and_folders(folder: Path) -> None:
    write_task(folder, "mmlm_t")
    with pytest.raises(SettingsError, match=r"task 'mmlm_tt': there is none.*mean 'mmlm_t'"):
        lmms_tasks("mmlm_tt", [folder])
    with pytest.raises(SettingsError, match="include_path: .*nowhere is no folder"):
        lmms_tasks("mmlm_t", [folder / "nowhere"])
    task = load(folder)
    for id in ("12", "-1", "x"):
        with pytest.raises(SettingsError, match="no sample .* Its ids are 0 to 11"):
            task.sample(id)
    with pytest.raises(SettingsError, match="no metric 'left'. It has: right, pair"):
        task.aggregate("left", [1])


def test_names_that_lmms_eval_has_itself(folder: Path, tmp_path: Path) -> None:
    """The first folder stands for lmms-eval's own, which win."""
    write_task(folder, "mmlm_t", tag=["mmlm_tag"])
    own = tmp_path / "own"
    own.mkdir()
    write_task(own, "mmlm_t")
    folders, mine = [folder, own], own / "mmlm_t.yaml"
    theirs = folder / "mmlm_t.yaml"
    assert [one.name for one in lmms_tasks("mmlm_t", folders, {"mmlm_t": theirs})] == ["mmlm_t"]
    with pytest.raises(
        SettingsError, match="'mmlm_t': lmms-eval has a task .*own/mmlm_t.yaml: rename"
    ):
        lmms_tasks("mmlm_t", folders, {"mmlm_t": mine})
    with pytest.raises(SettingsError, match="'mmlm_tag': lmms-eval has a task or group of this n"):
        lmms_tasks("mmlm_t", folders, {"mmlm_tag": mine})


def test_ids_of_a_column(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]

    def task(column: str, ids: list[str]) -> LmmsTask:
        lines = [json.dumps(row | {"own": id}) for row, id in zip(rows, ids, strict=False)]
        (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
        return load(folder, metadata={"version": 2.0, "id_column": column})

    found = task("own", ["x", "y", "0"])
    assert found.ids == ("x", "y", "0")
    assert found.sample("0").target == rows[2]["answer"]
    with pytest.raises(SettingsError, match="no sample '1'. Its ids are x to 0"):
        found.sample("1")
    with pytest.raises(DataError, match="column 'own', which metadata.id_column .* 'x' several"):
        task("own", ["x", "y", "x"])
    with pytest.raises(DataError, match="names a column 'id' that its data do not have.*: .*own"):
        task("id", ["x", "y", "z"])


def test_code_that_wants_to_exit(folder: Path) -> None:
    with (folder / "utils.py").open("a") as file:
        file.write("raise SystemExit(0)\n")
    with pytest.raises(DataError, match="task mmlm_t: its Python code wants to exit"):
        load(folder)


def test_the_extra_that_installs_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmlm-efficient\[lmms-eval\]'"):
        lmms_tasks("mme")


def test_a_broken_yaml_file(folder: Path) -> None:
    (folder / "broken.yaml").write_text("task: [")
    with pytest.raises(DataError, match="cannot be read: ParserError"):
        lmms_tasks("mmlm_t", [folder])


def test_a_sample_that_cannot_be_read(folder: Path) -> None:
    (folder / "1.png").unlink()
    task = load(folder)
    assert task.sample("0").images
    with pytest.raises(DataError, match=r"mmlm_t, sample 3: cannot be read: FileNotFoundError"):
        task.sample("3")
    task = load(folder, doc_to_messages=F("broken_messages"))
    with pytest.raises(DataError, match="sample 0: cannot be read: KeyError: 'no such column'"):
        task.sample("0")


def test_items_that_cannot_be_kept_name_their_metric(folder: Path) -> None:
    with pytest.raises(DataError, match=r"task mmlm_t, metric right: gives \{1, 2\} \(set\)"):
        load(folder, process_results=F("bad_item")).score("0", "a")


def test_a_bug_of_a_task_comes_through_at_once(folder: Path) -> None:
    task = load(folder, process_results=F("bug"))
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        task.score("0", "a")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "its aggregation failed: ValueError: nothing to see"),
        ("no_number", "its aggregation gives None, which is no number"),
    ],
)
def test_aggregations_that_fail(folder: Path, function: str, message: str) -> None:
    metric = {"metric": "right", "aggregation": F(function), "higher_is_better": True}
    with pytest.raises(DataError, match=f"task mmlm_t, metric right: {message}"):
        load(folder, metric_list=[metric]).aggregate("right", [1.0])


def test_an_aggregation_that_writes_a_file_leaves_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = {"metric": "right", "aggregation": F("with_args"), "higher_is_better": False}
    task = load(folder, metric_list=[metric])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert task.aggregate("right", [1.0, 2.0]) == 3.0
    assert list(Path.cwd().iterdir()) == []
    assert not task.metrics[0].higher_is_better


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.bool_(True), True),
        ((1, ("a", None)), [1, ["a", None]]),
        ({"a": (np.float32(0.5),)}, {"a": [0.5]}),
    ],
)
def test_plain_values(value: Any, expected: Any) -> None:
    assert plain(value, "here") == expected
    assert type(plain(value, "here")) is type(expected)


@pytest.mark.parametrize("value", [float("nan"), {1: "a"}, {1}, b"a", np.zeros(2), object()])
def test_values_that_are_not_plain(value: Any) -> None:
    with pytest.raises(DataError, match="here: gives"):
        plain(value, "here")


@pytest.mark.slow
def test_tasks_of_lmms_eval_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match="task 'mme_': there is none .* mean 'mme'"):
        lmms_tasks("mme_")
    start = time.monotonic()
    with pytest.raises(DataError, match="task mme: its data set [a-z-]+/MME cannot be loaded"):
        lmms_tasks("mme")
    assert time.monotonic() - start < 8
    with pytest.raises(UnsupportedError, match="task .*: asks for multiple_choice"):
        lmms_tasks("egoschema_mcppl")
