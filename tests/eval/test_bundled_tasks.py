"""The bundled tasks: their data, their scores, and the same questions through lmms-eval."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.pocket_accuracy import asked_batches
from eval.find_tasks import bundled_folder, find_tasks, task_names
from eval.local_task import LocalTask
from eval.tasks import make_data
from mmlm_efficient.pocket.questions import IMAGE_KINDS, VIDEO_KINDS
from mmlm_efficient.pocket.scenes import scene, video


def task_of(name: str) -> LocalTask:
    (task,) = find_tasks(name)
    assert isinstance(task, LocalTask)
    return task


@pytest.fixture(scope="module")
def vqa() -> LocalTask:
    return task_of("mmlm_pocket_vqa")


@pytest.fixture(scope="module")
def videos() -> LocalTask:
    return task_of("mmlm_pocket_video")


def test_the_committed_data_are_what_is_made() -> None:
    files = make_data.data_files()
    assert {path.parent.name for path in files} == set(task_names())
    for path, text in files.items():
        assert path.read_bytes() == text.encode()


def test_the_questions_are_those_of_the_benchmark(vqa: LocalTask) -> None:
    asked = [pair for batch in asked_batches(20, 4) for pair in batch.asked]
    theirs = {f"{one.index:04d}-{question.kind}": question for one, question in asked}
    ours = [id for id in vqa.ids if int(id[:4]) < 20]
    assert len(vqa.ids) == 6378
    assert set(ours) == set(theirs)
    for id in ours:
        sample = vqa.sample(id)
        assert (sample.question, sample.target) == (theirs[id].text, theirs[id].answer)


def test_a_question_about_a_picture(vqa: LocalTask) -> None:
    sample = vqa.sample("0012-where_is")
    assert (sample.group, sample.cluster) == ("where_is", "12")
    assert np.array_equal(np.asarray(sample.images[0]), scene("heldout", 12).pixels)
    assert sample.generation == {"max_new_tokens": 32, "do_sample": False}
    assert sample.until == ("\n\n",)
    assert list(vqa.ids) == sorted(vqa.ids, key=lambda id: (id[:4], IMAGE_KINDS.index(id[5:])))


def test_a_question_about_a_video(videos: LocalTask) -> None:
    shown = video("heldout", 7)
    ids = [id for id in videos.ids if id.startswith("007-")]
    sample = videos.sample(ids[0])
    times = "".join(f"{time_s} s<image>" for time_s in shown.times_s)
    assert sample.question.startswith(times)
    assert "<image>" not in sample.question.removeprefix(times)
    assert len(sample.images) == len(shown.frames)
    assert np.array_equal(np.asarray(sample.images[1]), shown.frames[1].pixels)
    assert sample.generation == {"max_new_tokens": 8, "do_sample": False}
    assert {videos.sample(id).cluster for id in ids} == {"7"}
    assert Counter(id.split("-")[1] for id in videos.ids).keys() == set(VIDEO_KINDS)


def test_scores(vqa: LocalTask, videos: LocalTask) -> None:
    x, y = (int(part) for part in vqa.sample("0000-where_is").target.split(", "))
    said = {f"{x}, {y}": 1.0, f" {x + 1}, {y - 1}.": 1.0, f"{x + 2}, {y}": 0.0, "": 0.0}
    assert {answer: vqa.score("0000-where_is", answer)["mmlm_acc"] for answer in said} == said
    lists = [id for id in vqa.ids if id.endswith("-list")][:20]
    targets = {id: vqa.sample(id).target.split(", ") for id in lists}
    turned = {id: ", ".join(names[::-1]) for id, names in targets.items()}
    assert any(turned[id] != vqa.sample(id).target for id in lists)
    assert all(vqa.score(id, answer) == {"mmlm_acc": 1.0} for id, answer in turned.items())
    assert videos.score("000-video_time", "10 S") == {"mmlm_acc": 1.0}
    assert videos.score("000-video_time", "1 s") == {"mmlm_acc": 0.0}
    for task in (vqa, videos):
        items = [task.score(id, task.sample(id).target)["mmlm_acc"] for id in task.ids[:40]]
        assert task.aggregate("mmlm_acc", [*items, 0.0]) == pytest.approx(40 / 41)


def test_data_sha_changes_only_with_the_data(vqa: LocalTask, videos: LocalTask) -> None:
    # The same on every machine. Where results change with the data, raise the version too.
    assert (vqa.data_sha, vqa.version) == ("3b943a9e5414", "1.0")
    assert (videos.data_sha, videos.version) == ("12f3adc0d9bc", "1.0")


# -- through lmms-eval -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tasks as lmms-eval reads them for a chat model."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        manager = TaskManager(include_path=str(bundled_folder()), include_defaults=False)
        assert sorted(manager.all_tasks) == task_names()
        return get_task_dict(task_names(), manager, task_type="chat")


@pytest.mark.parametrize("name", ["mmlm_pocket_vqa", "mmlm_pocket_video"])
def test_lmms_eval_asks_and_scores_the_same(name: str, theirs: Any) -> None:
    ours, task = task_of(name), theirs[name]
    docs = task.test_docs()
    assert [doc["id"] for doc in docs] == list(ours.ids)
    assert task.config.task == ours.name
    assert str(task.VERSION) == ours.version
    assert list(task.higher_is_better().items()) == [("mmlm_acc", True)]
    greedy = dict(task.config.generation_kwargs)
    assert tuple(greedy.pop("until")) == ours.sample(ours.ids[0]).until
    for position in range(0, len(docs), len(docs) // 12):
        doc, id = docs[position], ours.ids[position]
        sample = ours.sample(id)
        (turn,) = task.doc_to_messages(doc)
        said = ["<image>" if p["type"] == "image" else p["text"] for p in turn["content"]]
        pictures = [p["url"] for p in turn["content"] if p["type"] == "image"]
        # A picture that goes first needs no mark.
        marked = sample.question if "<image>" in sample.question else "<image>" + sample.question
        assert "".join(said) == marked
        assert len(pictures) == len(sample.images)
        for one, other in zip(pictures, sample.images, strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))
        assert task.doc_to_target(doc) == sample.target
        assert greedy == sample.generation
        for answer in (str(sample.target), f"{sample.target}.\n", "no", "3, 4"):
            assert task.process_results(doc, [answer]) == ours.score(id, answer)
    items = [1.0, 0.0, 0.0]
    assert task.aggregation()["mmlm_acc"](items) == ours.aggregate("mmlm_acc", items)


def test_pictures_for_models_without_messages(theirs: Any) -> None:
    task = theirs["mmlm_pocket_video"]
    doc = task.test_docs()[0]
    assert len(task.doc_to_visual(doc)) == len(video("heldout", 0).frames)
    assert task.doc_to_text(doc) == doc["question"]


def test_reading_them_needs_no_lmms_eval(tmp_path: Path) -> None:
    """In a process where neither lmms-eval nor datasets can be imported, from another folder."""
    code = (
        "import sys\n"
        "for name in ('lmms_eval', 'datasets', 'pyarrow', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(bundled_folder().parents[1])!r})\n"
        "from eval.find_tasks import find_tasks, task_names\n"
        "for name in task_names():\n"
        "    (task,) = find_tasks(name)\n"
        "    print(task.data_sha, len(task.sample(task.ids[-1]).images))\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    shas = [line.split()[0] for line in run.stdout.splitlines()]
    assert shas == [task_of(name).data_sha for name in task_names()]
