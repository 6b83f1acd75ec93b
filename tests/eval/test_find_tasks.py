"""From names to tasks: bundled ones, local ones, groups, and what lmms-eval must answer for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval.find_tasks import BUNDLED, bundled_folder, find_tasks, task_names, task_table
from eval.local_task import LocalTask
from mmlm_efficient.errors import DataError, SettingsError


def add_task(folder: Path, name: str, more: str = "") -> Path:
    """A task of one question about no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.jsonl").write_text('{"q": "one and one?", "a": "two"}\n', encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs: {data_files: {test: data.jsonl}}\n"
        f"doc_to_text: q\ndoc_to_target: a\n{more}",
        encoding="utf-8",
    )
    return path


def names(entry: str, *folders: Path) -> list[str]:
    return [task.name for task in find_tasks(entry, folders)]


@pytest.fixture
def without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else found(name)
    )


# The files that lmms-eval was asked to read, call by call.
meant: list[dict[str, Path]] = []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Path]]]:
    """Stands in for lmms-eval's tasks, of which it knows some; remembers what it was asked."""
    calls: list[tuple[str, list[Path]]] = []
    meant.clear()
    known = {"pope": ["pope"], "family": ["a", "b"], "odd": ["odd"]}

    class Known:
        def __init__(self, name: str) -> None:
            self.name = name

    def lmms_tasks(
        entry: str, include_path: Sequence[Path], files: Mapping[str, Path]
    ) -> list[Any]:
        calls.append((entry, list(include_path)))
        meant.append(dict(files))
        if entry not in known:
            raise SettingsError(f"task '{entry}': there is none of this name in lmms-eval.")
        return [Known(name) for name in known[entry]]

    module = ModuleType("eval.lmms_task")
    module.lmms_tasks = lmms_tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eval.lmms_task", module)
    return calls


# -- ours ------------------------------------------------------------------------------------


def test_bundled_tasks_go_by_their_names() -> None:
    assert task_names() == ["mmlm_pocket_video", "mmlm_pocket_vqa"]
    assert bundled_folder().is_dir()
    (task,) = find_tasks("mmlm_pocket_video")
    assert isinstance(task, LocalTask)
    assert task.source.startswith(BUNDLED)


def test_local_tasks_are_found_in_folders_below(tmp_path: Path) -> None:
    path = add_task(tmp_path / "deep" / "er", "sums")
    add_task(tmp_path / "__pycache__", "hidden")
    (tmp_path / "_template.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (task,) = find_tasks("sums", [tmp_path])
    assert (task.name, task.source) == ("sums", str(path))
    assert [row["task"] for row in task_table([tmp_path])][-1] == "sums"


def test_the_same_file_twice_is_one(tmp_path: Path) -> None:
    add_task(tmp_path / "a", "sums")
    assert names("sums", tmp_path, tmp_path / "a", bundled_folder()) == ["sums"]


def test_a_name_that_two_files_give(tmp_path: Path) -> None:
    add_task(tmp_path / "a", "sums")
    add_task(tmp_path / "b", "sums")
    with pytest.raises(SettingsError, match=r"'sums': is given by .*a/sums.yaml and by .*b/sums"):
        find_tasks("mmlm_pocket_vqa", [tmp_path])
    add_task(tmp_path / "c", "mmlm_pocket_vqa")
    with pytest.raises(SettingsError, match="'mmlm_pocket_vqa': is given by"):
        find_tasks("mmlm_pocket_vqa", [tmp_path / "c"])


def test_groups_and_tags(tmp_path: Path) -> None:
    for name in ("one", "two"):
        add_task(tmp_path, name, "tag: [small, tiny]\n")
    add_task(tmp_path, "three", "tag: small\n")
    (tmp_path / "group.yaml").write_text("group: all\ntask: [two, tiny, mmlm_pocket_video]\n")
    assert names("all", tmp_path) == ["two", "one", "mmlm_pocket_video"]
    assert names("tiny", tmp_path) == ["one", "two"]
    assert names("small", tmp_path) == ["one", "three", "two"]  # in the order of their files


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["group: g\ntask: [h]\n", "group: h\ntask: [g]\n"],
            "contains itself, by way of g > h > g",
        ),
        (["group: g\ntask: []\n"], "'g': has no tasks"),
        (["group: g\ntask: [sums]\n", "group: g\ntask: [sums]\n"], "group 'g': is given by .*1.y"),
        (["group: sums\ntask: [sums]\n"], "'sums': is also the name of a group"),
        (["group: g\ntask: [mmlm_pocket_vq]\n"], "'mmlm_pocket_vq' is unknown.*mmlm_pocket_vqa'"),
    ],
)
def test_groups_that_are_wrong(tmp_path: Path, files: list[str], words: str) -> None:
    add_task(tmp_path, "sums")
    for number, text in enumerate(files):
        (tmp_path / f"{number}.yaml").write_text(text)
    with pytest.raises(SettingsError, match=words):
        find_tasks("g", [tmp_path])


def test_a_tag_that_is_a_group(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("group: g\ntask: [sums]\n")
    add_task(tmp_path, "sums", "tag: g\n")
    with pytest.raises(SettingsError, match="tag 'g' of .*sums.yaml: is the name of the group"):
        find_tasks("g", [tmp_path])


def test_include_paths_that_are_wrong(tmp_path: Path) -> None:
    path = add_task(tmp_path, "sums")
    with pytest.raises(SettingsError, match="include path .*/none: there is no such folder"):
        find_tasks("sums", [tmp_path / "none"])
    with pytest.raises(SettingsError, match=f"is a file. Give its folder, {tmp_path}"):
        find_tasks("sums", [path])
    (tmp_path / "broken.yaml").write_text("task: [\n")
    with pytest.raises(DataError, match="broken.yaml: is not YAML"):
        find_tasks("sums", [tmp_path])


def test_a_path_is_no_name(tmp_path: Path) -> None:
    path = add_task(tmp_path, "sums")
    with pytest.raises(SettingsError, match=f"--include-path {tmp_path} --tasks sums"):
        find_tasks(str(path))
    with pytest.raises(SettingsError, match=f"--include-path {tmp_path} --tasks NAME"):
        find_tasks(str(tmp_path))
    with pytest.raises(SettingsError, match="is a path; tasks go by their names"):
        find_tasks("nowhere.yaml")


def test_an_empty_name() -> None:
    with pytest.raises(SettingsError, match="a name is empty. Bundled tasks: mmlm_pocket_video"):
        find_tasks(" ")


def test_the_data_are_checked_at_once(tmp_path: Path) -> None:
    add_task(tmp_path, "sums")
    (tmp_path / "data.jsonl").write_text('{"q": "one')
    with pytest.raises(DataError, match="cut off"):
        find_tasks("sums", [tmp_path])


def test_the_table_of_tasks(tmp_path: Path) -> None:
    path = add_task(tmp_path, "sums")
    add_task(tmp_path, "hard", "filter_list: []\n")
    add_task(tmp_path / "torn", "torn")
    (tmp_path / "torn" / "data.jsonl").unlink()
    table = task_table([tmp_path])
    assert json.loads(json.dumps(table)) == table
    rows = {row["task"]: row for row in table}
    assert rows["mmlm_pocket_vqa"] == {
        "task": "mmlm_pocket_vqa",
        "samples": 6378,
        "metric": "mmlm_acc",
        "source": BUNDLED,
    }
    assert rows["sums"] == {
        "task": "sums",
        "samples": 1,
        "metric": "exact_match",
        "source": str(path),
    }
    assert rows["hard"]["samples"] is None
    assert "by lmms-eval: key 'filter_list' is not supported" in rows["hard"]["source"]
    assert rows["torn"]["metric"] is None
    assert "cannot be used: " in rows["torn"]["source"]


# -- lmms-eval's -----------------------------------------------------------------------------


def test_other_names_are_lmms_evals(asked: list[Any], tmp_path: Path) -> None:
    assert names("family", tmp_path) == ["a", "b"]
    assert asked == [("family", [tmp_path])]


def test_a_name_like_ours_is_not_looked_up_there(asked: list[Any]) -> None:
    with pytest.raises(SettingsError, match="unknown. Did you mean 'mmlm_pocket_vqa'?"):
        find_tasks("mmlm_pocket_vpa")
    assert asked == []


def test_lmms_eval_not_knowing_it_leads_to_the_nearest_of_ours(asked: list[Any]) -> None:
    with pytest.raises(SettingsError, match=r"none of this name.*mean 'mmlm_pocket_video'\?"):
        find_tasks("pocket_video")
    assert asked == [("pocket_video", [])]


def test_local_yaml_that_only_lmms_eval_reads(asked: list[Any], tmp_path: Path) -> None:
    path = add_task(tmp_path, "odd", "filter_list: []\n")
    assert names("odd", tmp_path) == ["odd"]
    assert asked == [("odd", [tmp_path])]
    assert meant == [{"odd": path}], "and none of lmms-eval's of this name"


def test_groups_with_members_of_lmms_eval(asked: list[Any], tmp_path: Path) -> None:
    add_task(tmp_path, "sums")
    (tmp_path / "g.yaml").write_text("group: g\ntask: [sums, pope, family]\n")
    assert names("g", tmp_path) == ["sums", "pope", "a", "b"]
    (tmp_path / "h.yaml").write_text("group: family\ntask: [{task: sums, num_fewshot: 0}]\n")
    assert names("family", tmp_path) == ["a", "b"]
    assert asked[-1] == ("family", [tmp_path])
    files = {name: tmp_path / f"{file}.yaml" for name, file in (("family", "h"), ("sums", "sums"))}
    assert meant == [{}, {}, files]


@pytest.mark.usefixtures("without_lmms_eval")
def test_without_lmms_eval(tmp_path: Path) -> None:
    assert names("mmlm_pocket_video") == ["mmlm_pocket_video"]
    with pytest.raises(SettingsError, match=r"'pope': is unknown.*pip install 'mmlm-eff.*lmms-ev"):
        find_tasks("pope")
    add_task(tmp_path, "odd", "filter_list: []\n")
    with pytest.raises(SettingsError, match="odd.yaml uses what only lmms-eval reads .*filter_li"):
        find_tasks("odd", [tmp_path])
