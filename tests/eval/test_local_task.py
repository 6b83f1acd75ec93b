"""Tasks read without lmms-eval: what they ask and how they score."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from eval.local_task import LocalTask
from eval.task_data import ListRows
from mmlm_efficient.errors import (
    DataError,
    MediaError,
    SettingsError,
    UnsupportedError,
)
from tests.eval.local_folder import (
    OWN,
    OWN_SCORES,
    ROWS,
    colours,
    definition,
    functions,
    jsonl,
)

# A question that belongs to nothing.
OPEN = {"question": "Why?", "answer": "so", "kind": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colours(tmp_path)


# -- what is asked ---------------------------------------------------------------------------


def test_a_row_becomes_a_sample(folder: Path) -> None:
    task = LocalTask(definition(folder, generation_kwargs={"max_new_tokens": 5, "until": "\n"}))
    sample = task.sample("b")
    assert (task.name, task.version, list(task.ids)) == ("colours", "2", ["a", "b"])
    assert task.source == str(folder / "colours.yaml")
    assert (sample.id, sample.question, sample.target) == ("b", "And this?", "Blue.")
    assert [image.getpixel((0, 0)) for image in sample.images] == [(0, 0, 255)]
    assert sample.video is None
    assert (sample.group, sample.cluster) == ("hue", "blue.png")
    assert sample.generation == {"max_new_tokens": 5, "do_sample": False}
    assert sample.until == ("\n",)


def test_without_id_column_rows_are_counted(folder: Path) -> None:
    task = LocalTask(definition(folder, metadata=None))
    assert list(task.ids) == ["0", "1"]
    sample = task.sample("1")
    assert (sample.group, sample.cluster, task.version) == (None, None, "0")


@pytest.mark.parametrize(
    ("given", "until"),
    [
        ({}, ("\n\n",)),  # lmms-eval's own
        ({"until": None}, ()),
        ({"until": ["\n", "Q:"]}, ("\n", "Q:")),
    ],
)
def test_until(folder: Path, given: dict[str, Any], until: tuple[str, ...]) -> None:
    assert LocalTask(definition(folder, generation_kwargs=given)).sample("a").until == until


def test_temperature_zero_is_greedy(folder: Path) -> None:
    given = {"temperature": 0, "top_p": 0.5, "do_sample": True, "num_beams": 2}
    sample = LocalTask(definition(folder, generation_kwargs=given)).sample("a")
    assert sample.generation == {"max_new_tokens": 1024, "num_beams": 2, "do_sample": False}


def test_templates_are_rendered_as_lmms_eval_does_it(folder: Path) -> None:
    path = definition(
        folder,
        doc_to_text="{{question|upper}}\n({{ answer | regex_replace('e', 'E') }})",
        doc_to_target="['{{answer}}', 'x']",
    )
    sample = LocalTask(path).sample("a")
    assert sample.question == "WHICH COLOUR?\n(rEd)"
    assert sample.target == ["red", "x"]


def test_text_without_any_column_is_asked_of_all(folder: Path) -> None:
    task = LocalTask(definition(folder, doc_to_text="Name the colour."))
    assert [task.sample(id).question for id in task.ids] == ["Name the colour."] * 2


def test_functions_beside_the_yaml(folder: Path) -> None:
    functions(
        folder,
        "from PIL import Image\n"
        "def text(doc): return doc['question'] + '!'\n"
        "def shown(doc): return [Image.new('RGB', (3, 2)), 'clip.mp4']\n"
        "def right(doc): return {'colour': doc['answer']}\n",
    )
    path = definition(
        folder,
        "doc_to_text: !function utils.text\n"
        "doc_to_visual: !function utils.shown\n"
        "doc_to_target: !function utils.right\n"
        "process_results: !function json.dumps\n"
        "metric_list: [{metric: own, aggregation: mean}]\n",
        doc_to_text=None,
        doc_to_visual=None,
        doc_to_target=None,
    )
    sample = LocalTask(path).sample("a")
    assert sample.question == "Which colour?!"
    assert [image.size for image in sample.images] == [(3, 2)]
    assert sample.video == str(folder / "clip.mp4")
    assert sample.target == {"colour": "red"}


MESSAGES = "doc_to_messages: !function utils.messages\n"


def in_messages(folder: Path, content: str, role: str = "user") -> Path:
    functions(folder, f"def messages(doc): return [{{'role': {role!r}, 'content': {content}}}]\n")
    return definition(folder, MESSAGES, doc_to_visual=None)


def test_messages_say_where_pictures_go(folder: Path) -> None:
    content = (
        "[{'type': 'text', 'text': '0 s'}, {'type': 'image', 'url': 'blue.png'},"
        " {'type': 'text', 'text': '3 s'}, {'type': 'image', 'url': doc['image']},"
        " {'type': 'text', 'text': doc['question']}]"
    )
    sample = LocalTask(in_messages(folder, content)).sample("a")
    assert sample.question == "0 s<image>3 s<image>Which colour?"
    assert [image.getpixel((0, 0))[0] for image in sample.images] == [0, 255]


@pytest.mark.parametrize(
    ("content", "role", "words"),
    [
        ("'Be brief.'", "system", r"data.jsonl, line 1: .*system.*one turn of the user"),
        ("[{'type': 'audio', 'url': 'a.wav'}]", "user", "sound"),
        ("[{'type': 'video', 'url': 'a.mp4'}, {'type': 'video', 'url': 'b.mp4'}]", "user", "2 vid"),
    ],
)
def test_messages_that_we_cannot_ask(folder: Path, content: str, role: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        LocalTask(in_messages(folder, content, role))


def test_a_mark_in_the_data_is_a_word(folder: Path) -> None:
    rows = [ROWS[0] | {"question": "Is <image> a tag, and <image> too?"}]
    jsonl(folder, rows)
    sample = LocalTask(definition(folder)).sample("a")
    assert "<image>" not in sample.question
    assert len(sample.images) == 1
    jsonl(folder, [ROWS[0] | {"question": "Look: <image> which colour?"}])
    assert LocalTask(definition(folder)).sample("a").question == "Look: <image> which colour?"


def test_pictures_are_found_from_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = definition(folder)
    monkeypatch.chdir("/")
    assert LocalTask(path).sample("a").images[0].size == (8, 6)


def test_an_unreadable_picture_fails_its_sample_only(folder: Path) -> None:
    (folder / "red.png").write_bytes(b"no picture")
    task = LocalTask(definition(folder))
    with pytest.raises(MediaError, match="data.jsonl, line 1: .*red.png"):
        task.sample("a")
    assert len(task.sample("b").images) == 1


def test_includes(folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "_common.yaml").write_text(
        "doc_to_text: overridden\ndoc_to_target: !function own.right\noutput_type: generate_until\n"
    )
    (folder / "base" / "own.py").write_text("def right(doc): return 'from base'\n")
    path = definition(folder, "include: base/_common.yaml\n", doc_to_target=None)
    sample = LocalTask(path).sample("a")
    assert (sample.question, sample.target) == ("Which colour?", "from base")


def test_the_first_include_wins(folder: Path) -> None:
    (folder / "one.yaml").write_text("doc_to_text: one and only\n")
    (folder / "two.yaml").write_text("doc_to_text: two are many\n")
    path = definition(folder, "include: [one.yaml, two.yaml]\n", doc_to_text=None)
    assert LocalTask(path).sample("a").question == "one and only"


# -- scores ----------------------------------------------------------------------------------


def test_exact_match_and_its_options(folder: Path) -> None:
    plain = LocalTask(definition(folder))
    assert [plain.score("b", said)["exact_match"] for said in ("Blue.", " Blue. ", "blue")] == [
        1.0,
        1.0,
        0.0,
    ]
    options = {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}
    loose = LocalTask(definition(folder, metric_list=[options]))
    assert loose.score("b", "blue!") == {"exact_match": 1.0}
    assert loose.score("b", "bluish") == {"exact_match": 0.0}
    assert loose.aggregate("exact_match", [1.0, 0.0, 0.0, 0.0]) == 0.25
    options = {"metric": "exact_match", "regexes_to_ignore": [r"\.$", "^the "]}
    assert LocalTask(definition(folder, metric_list=[options])).score("b", "the Blue") == {
        "exact_match": 1.0
    }


def test_any_of_several_targets(folder: Path) -> None:
    jsonl(folder, [ROWS[0] | {"answer": ["red", "scarlet"]}])
    task = LocalTask(definition(folder))
    scores = [task.score("a", said)["exact_match"] for said in ("scarlet", "red", "pink")]
    assert scores == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("first", "then"), [("red", ["blue"]), (["red"], "blue")])
def test_targets_are_lists_everywhere_or_nowhere(folder: Path, first: Any, then: Any) -> None:
    # lmms-eval would compare letters, or give a part of 1.
    jsonl(folder, [ROWS[0] | {"answer": first}, ROWS[1] | {"answer": then}])
    with pytest.raises(DataError, match=r"line 2: target: the target of the first row is .*list"):
        LocalTask(definition(folder))
    functions(folder, "def right(doc): return doc['answer']\n")
    text = "doc_to_target: !function utils.right\n"
    task = LocalTask(definition(folder, text, doc_to_target=None))
    assert task.score("a", "red") == {"exact_match": 1.0}
    with pytest.raises(DataError, match=r"line 2: score: the target of the first row is .*list"):
        task.score("b", "blue")


def test_missing_groups_and_clusters_stay_missing(folder: Path) -> None:
    jsonl(folder, [ROWS[0], *({"id": str(at), **OPEN} for at in range(2))])
    task = LocalTask(definition(folder, doc_to_visual=None))
    found = [(one.group, one.cluster) for one in map(task.sample, task.ids)]
    assert found == [("hue", "red.png"), (None, None), (None, None)]


def test_scores_by_functions_of_the_task(folder: Path) -> None:
    functions(folder, OWN_SCORES)
    task = LocalTask(definition(folder, OWN))
    item = task.score("a", " red\n")
    assert item == {"right": 1.0, "box": [0.5, 2]}
    assert json.loads(json.dumps(item)) == item
    assert [(m.name, m.higher_is_better, m.aggregation) for m in task.metrics] == [
        ("right", True, "mean"),
        ("box", False, "widest"),
    ]
    assert task.aggregate("box", [[0.5, 2], [0.1, 7]]) == 7.0
    with pytest.raises(KeyError, match="own"):  # as it is
        task.score("a", "raise")
    assert task.score("a", "short") == {"right": 1.0}, "a sample may have a part of the metrics"
    with pytest.raises(DataError, match="gave wrong, none of metric_list: right, box"):
        task.score("a", "other")
    with pytest.raises(DataError, match="right: nan is not a finite number"):
        task.score("a", "nan")


def test_scoring_from_many_threads(folder: Path) -> None:
    functions(folder, OWN_SCORES)
    task = LocalTask(definition(folder, OWN))
    asked = [("a", "red"), ("b", "Blue."), ("a", "blue"), ("b", "")] * 50
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda one: task.score(*one)["right"], asked))
        sizes = set(pool.map(lambda one: task.sample(one[0]).images[0].size, asked))
    assert scores == [1.0, 1.0, 0.0, 0.0] * 50
    assert sizes == {(8, 6)}


def test_unknown_samples_and_metrics(folder: Path) -> None:
    task = LocalTask(definition(folder))
    with pytest.raises(SettingsError, match="no sample 'c'"):
        task.sample("c")
    with pytest.raises(SettingsError, match="no metric 'exact'; it has exact_match"):
        task.aggregate("exact", [1.0])
    with pytest.raises(DataError, match="no sample has a exact_match"):
        task.aggregate("exact_match", [])


def test_another_process_reads_the_task_anew(folder: Path) -> None:
    functions(folder, OWN_SCORES)
    task = LocalTask(definition(folder, OWN), "here")
    copy = pickle.loads(pickle.dumps(task))
    assert (copy.score("a", "red"), copy.source) == (task.score("a", "red"), "here")


def test_mean_of_many_is_exact(folder: Path) -> None:
    task = LocalTask(definition(folder))
    assert math.isclose(task.aggregate("exact_match", [0.1] * 10), 0.1, rel_tol=1e-15)


# -- the hash --------------------------------------------------------------------------------


def test_data_sha_is_of_the_contents_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    functions(folder, OWN_SCORES)
    path = definition(folder, OWN)
    before = LocalTask(path).data_sha
    copy = tmp_path / "elsewhere" / "deep"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("elsewhere"))
    assert len(before) == 12
    assert LocalTask(copy / "colours.yaml").data_sha == before
    (copy / "utils.py").write_text(OWN_SCORES + "\n")
    changed = {before, LocalTask(copy / "colours.yaml").data_sha}
    jsonl(copy, ROWS[:1])
    changed.add(LocalTask(copy / "colours.yaml").data_sha)
    definition(copy, OWN + "# a remark\n")
    changed.add(LocalTask(copy / "colours.yaml").data_sha)
    assert len(changed) == 4


def test_data_sha_sees_names_and_sizes_of_media(folder: Path) -> None:
    clips = [row | {"more": [{"clip": "clip.mp4"}], "note": "red.txt"} for row in ROWS]
    jsonl(folder, clips)
    task = definition(folder)
    shas = [LocalTask(task).data_sha]
    (folder / "clip.mp4").write_bytes(b"1234")
    shas.append(LocalTask(task).data_sha)
    (folder / "clip.mp4").write_bytes(b"12345")
    shas.append(LocalTask(task).data_sha)
    (folder / "blue.png").write_bytes((folder / "blue.png").read_bytes() + b" ")
    shas.append(LocalTask(task).data_sha)
    assert len(set(shas)) == 4
    (folder / "clip.mp4").write_bytes(b"54321")  # contents are not looked at
    (folder / "red.txt").write_text("no picture")
    (folder / "green.png").write_bytes(b"named by no row")
    assert LocalTask(task).data_sha == shas[-1]


# -- rows that functions get -----------------------------------------------------------------


def test_functions_may_change_their_row(folder: Path) -> None:
    jsonl(folder, [row | {"words": ["a", {"b": 1}]} for row in ROWS])
    functions(
        folder,
        "def text(doc):\n"
        "    doc['words'].pop()\n"
        "    return doc['question'] + str(doc['words'])\n"
        "def results(doc, results):\n"
        "    doc['words'][1]['b'] += 1\n"
        "    doc['answer'] = 'changed'\n"
        "    return {'right': doc['words'][1]['b']}\n",
    )
    text = "doc_to_text: !function utils.text\nprocess_results: !function utils.results\n"
    text += "metric_list: [{metric: right}]\n"
    task = LocalTask(definition(folder, text, doc_to_text=None))
    for _ in range(2):
        assert task.sample("a").question == "Which colour?['a']"
        assert task.score("a", "") == {"right": 2.0}
        assert task.sample("a").target == "red"


def test_all_functions_of_a_question_get_one_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions(
        folder,
        "def shown(doc):\n    doc['seen'] = True\n    return [doc['image']]\n"
        "def text(doc): return str(doc['seen'])\n",
    )
    text = "doc_to_text: !function utils.text\ndoc_to_visual: !function utils.shown\n"
    task = LocalTask(definition(folder, text, doc_to_text=None, doc_to_visual=None))
    asked: list[int] = []
    row = ListRows.row
    monkeypatch.setattr(ListRows, "row", lambda rows, at: asked.append(at) or row(rows, at))
    assert task.sample("b").question == "True"
    assert asked == [1]


def test_items_are_the_tasks_to_change(folder: Path) -> None:
    functions(folder, OWN_SCORES + "def last(items): return items.pop().pop()\n")
    task = LocalTask(definition(folder, OWN.replace("widest", "last")))
    items = [[0.5, 2], [0.5, 3]]
    assert task.aggregate("box", items) == 3.0
    assert items == [[0.5, 2], [0.5, 3]]


def test_aggregations_that_fail_or_are_pythons_own(folder: Path) -> None:
    functions(folder, OWN_SCORES)
    task = LocalTask(definition(folder, OWN.replace("utils.widest", "builtins.max")))
    assert task.aggregate("box", [2.0, 7.0]) == 7.0
    with pytest.raises(DataError, match="colours: the aggregation of box fails: TypeError"):
        task.aggregate("box", [2.0, "a"])


@pytest.mark.parametrize("where", ["file", "text", "results", "widest"])
def test_functions_that_want_to_exit(folder: Path, where: str) -> None:
    end = "raise SystemExit(3)"
    source = {name: "0" for name in ("text", "results", "widest")} | {where: "exit()"}
    functions(
        folder,
        (f"{end}\n" if where == "file" else f"def exit(): {end}\n")
        + f"def text(doc): return str({source['text']})\n"
        + f"def results(doc, results): return {{'right': {source['results']}, 'box': 1}}\n"
        + f"def widest(items): return {source['widest']}\n",
    )
    path = definition(folder, OWN + "doc_to_text: !function utils.text\n", doc_to_text=None)
    with pytest.raises(DataError, match=r"utils.*(: SystemExit|wants to exit)|box fails: Sys"):
        LocalTask(path).aggregate("box", [LocalTask(path).score("a", "red")["box"]])
