"""Tasks read without lmms-eval: what they ask, how they score, and every way to be wrong."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from eval.local_task import LocalTask
from mmlm_efficient.errors import (
    DataError,
    MediaError,
    MissingExtraError,
    SettingsError,
    UnsupportedError,
)

ROWS = [
    {"id": "a", "image": "red.png", "question": "Which colour?", "answer": "red", "kind": "hue"},
    {"id": "b", "image": "blue.png", "question": "And this?", "answer": "Blue.", "kind": "hue"},
]
COLOURS = {"red.png": (255, 0, 0), "blue.png": (0, 0, 255)}
DEFINITION: dict[str, Any] = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "doc_to_visual": "image",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metadata": {
        "version": 2,
        "id_column": "id",
        "group_column": "kind",
        "cluster_column": "image",
    },
}


def definition(folder: Path, text: str = "", **changes: Any) -> Path:
    """The YAML of a task: the usual one with some keys changed (None removes), then more text."""
    values = {key: value for key, value in (DEFINITION | changes).items() if value is not None}
    path = folder / "colours.yaml"
    path.write_text(yaml.safe_dump(values) + text, encoding="utf-8")
    return path


def jsonl(folder: Path, rows: list[Any] | None = None) -> Path:
    path = folder / "data.jsonl"
    lines = [json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two questions with a picture each."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    jsonl(tmp_path)
    return tmp_path


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


def functions(folder: Path, source: str) -> None:
    (folder / "utils.py").write_text(source, encoding="utf-8")


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


# -- other kinds of data ---------------------------------------------------------------------


def test_json_array(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    path = definition(folder, dataset_kwargs={"data_files": {"test": "data.json"}})
    assert LocalTask(path).sample("b").target == "Blue."


def test_a_file_alone_is_the_split_train(folder: Path) -> None:
    changes = {"dataset_kwargs": {"data_files": "data.jsonl"}}
    assert len(LocalTask(definition(folder, test_split="train", **changes)).ids) == 2
    with pytest.raises(DataError, match=r"test_split is 'test', but data_files names train"):
        LocalTask(definition(folder, **changes))


CSV = (
    "n,code,share,known,word,text\n"
    '1,007,1.50,true,,"a, b"\n'
    '2,8,2,False,x,"c\nd"\n'
    "3,9,3e2,TRUE,NA,e\n"
)


def test_csv_is_typed_as_by_datasets(folder: Path) -> None:
    import datasets

    (folder / "data.csv").write_text(CSV, encoding="utf-8")
    changes: dict[str, Any] = {
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"test": "data.csv"}},
        "doc_to_visual": None,
        "doc_to_text": "{{text}}{{code}}{{share}}{{known}}{{word}}",
        "metadata": {"id_column": "n"},
    }
    path = definition(folder, doc_to_target="{{n}}", **changes)
    task = LocalTask(path)
    assert task.sample("1").question == "a, b71.5TrueNone"
    ours = [task._rows.row(position) for position in range(3)]
    theirs = datasets.load_dataset(
        "csv", data_files={"test": str(folder / "data.csv")}, cache_dir=str(folder / "cache")
    )
    assert ours == list(theirs["test"])
    with pytest.raises(DataError, match=r"data.csv, line 2: no value in column 'word'"):
        LocalTask(definition(folder, doc_to_target="word", **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3\n", r"line 3: has 1 cells, the header has 2.*cut off"),
        ('a,b\n1,2\n3,"x\n', r"line \d: is not CSV, or cut off"),
        ("a,a\n1,2\n", "occurs twice"),
        ("a,b\n", "has no rows"),
    ],
)
def test_damaged_csv(folder: Path, text: str, words: str) -> None:
    (folder / "data.csv").write_text(text, encoding="utf-8")
    changes = {"dataset_path": "csv", "dataset_kwargs": {"data_files": {"test": "data.csv"}}}
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder, **changes))


PARQUET = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "data.parquet"}}}


def parquet(folder: Path, broken: bool = False) -> Path:
    """The rows with their pictures inside, written as `datasets` does it."""
    import datasets

    pictures = [(folder / str(row["image"])).read_bytes() for row in ROWS]
    if broken:
        pictures[1] = b"no picture"
    rows = [
        row | {"image": {"bytes": picture, "path": None}, "raw": picture}
        for row, picture in zip(ROWS, pictures, strict=True)
    ]
    table = pa.Table.from_pylist(rows)
    kinds = {name: datasets.Value("string") for name in ("id", "question", "answer", "kind")}
    features = datasets.Features(
        kinds | {"image": datasets.Image(), "raw": datasets.Value("binary")}
    )
    info = json.dumps({"info": {"features": features.to_dict()}})
    path = folder / "data.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return path


@pytest.mark.parametrize("column", ["image", "raw"])
def test_parquet_holds_pictures(folder: Path, column: str) -> None:
    parquet(folder)
    metadata = {"id_column": "id"}
    task = LocalTask(definition(folder, **PARQUET, doc_to_visual=column, metadata=metadata))
    assert task.sample("b").images[0].getpixel((0, 0)) == (0, 0, 255)


def test_functions_get_stored_pictures_decoded(folder: Path) -> None:
    parquet(folder)
    functions(folder, "def size(doc): return str(doc['image'].size)\n")
    path = definition(
        folder, "doc_to_text: !function utils.size\n", **PARQUET, doc_to_text=None, metadata=None
    )
    assert LocalTask(path).sample("0").question == "(8, 6)"


def test_a_stored_picture_that_is_broken(folder: Path) -> None:
    parquet(folder, broken=True)
    task = LocalTask(definition(folder, **PARQUET, metadata=None))
    assert len(task.sample("0").images) == 1
    with pytest.raises(MediaError, match="data.parquet, row 2, column 'image'"):
        task.sample("1")


def test_damaged_parquet(folder: Path) -> None:
    path = parquet(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="data.parquet: is not Parquet, or it is damaged or cut"):
        LocalTask(definition(folder, **PARQUET))


def test_parquet_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(folder)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match="pip install 'mmlm-efficient\\[eval\\]'"):
        LocalTask(definition(folder, **PARQUET))


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


OWN_SCORES = """
import numpy as np
def results(doc, results):
    if results[0] == 'raise': raise KeyError('own')
    if results[0] == 'short': return {'right': 1}
    if results[0] == 'nan': return {'right': float('nan'), 'box': ()}
    return {'right': results[0] == doc['answer'], 'box': (np.float32(0.5), 2), 'extra': object()}
def widest(items): return max(item[1] for item in items)
"""
OWN = (
    "process_results: !function utils.results\n"
    "metric_list:\n"
    "- {metric: right, aggregation: mean, higher_is_better: true}\n"
    "- {metric: box, aggregation: !function utils.widest, higher_is_better: false}\n"
)


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
    with pytest.raises(DataError, match="gave right, but not 'box'"):
        task.score("a", "short")
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
    (copy / "red.png").write_bytes(b"x")  # pictures named by path are not in it
    assert LocalTask(copy / "colours.yaml").data_sha == before
    (copy / "utils.py").write_text(OWN_SCORES + "\n")
    changed = {before, LocalTask(copy / "colours.yaml").data_sha}
    jsonl(copy, ROWS[:1])
    changed.add(LocalTask(copy / "colours.yaml").data_sha)
    definition(copy, OWN + "# a remark\n")
    changed.add(LocalTask(copy / "colours.yaml").data_sha)
    assert len(changed) == 4


# -- data that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"data.jsonl: is empty \(0 bytes\)"),
        (b"\n\n", "has no rows"),
        (b'{"id": "a"}\n{"id": "b", "que', r"line 2: the last line, is cut off or not JSON"),
        (b'{"id": "a"}\nnonsense\n{"id": "b"}\n', r"line 2: is not JSON"),
        (b'{"id": "a"}\n[1]\n', r"line 2: is not a JSON object but '\[1\]'"),
        (b'[{"id": "a"}, {"id"', "is not JSON, or cut off"),
        (b'[{"id": "a"}, 7]', "entry 2: is not a JSON object but 7"),
        (b"PAR1\x15\x04\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_damaged_json(folder: Path, content: bytes, words: str) -> None:
    (folder / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder))


def test_a_missing_data_file(folder: Path) -> None:
    files = {"data_files": {"test": "dta.jsonl"}}
    with pytest.raises(DataError, match=r"dta.jsonl: there is no such data file.*'data.jsonl'"):
        LocalTask(definition(folder, dataset_kwargs=files))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_text": "quesiton"}, r"no column 'quesiton', which doc_to_text.*'question'"),
        ({"doc_to_text": "{{quesiton}}?"}, r"line 1: doc_to_text: 'quesiton' is und.*'question'"),
        ({"doc_to_target": "anwser"}, r"which doc_to_target names.*'answer'"),
        ({"doc_to_visual": "imgae"}, r"which doc_to_visual names.*'image'"),
        ({"metadata": {"id_column": "ids"}}, r"which metadata.id_column names.*'id'"),
        ({"metadata": {"group_column": "kinds"}}, r"metadata.group_column names.*'kind'"),
        ({"metadata": {"columns": ["id", "page"]}}, r"'page', which metadata.columns names"),
        ({"metadata": {"rows": 3}}, "has 2 rows, but metadata.rows .* says 3"),
        ({"metadata": {"rows": "3"}}, "metadata.rows: expected a whole number"),
        ({"metadata": {"columns": "id"}}, "metadata.columns: expected a list"),
        ({"metadata": {"id_column": 1}}, "metadata.id_column: expected a text"),
        ({"metadata": 7}, "metadata: expected a mapping"),
    ],
)
def test_missing_columns(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder, **changes))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "a"}, r"line 3: id 'a' in column 'id' occurs already in .*line 1"),
        ({"id": 1.5}, r"line 3: id 1.5 in column 'id' must be a text or a whole number"),
        ({"id": None}, r"line 3: no value in column 'id'"),
        ({"question": 7}, r"line 3: column 'question' holds 7, which is no text"),
        ({"answer": 7}, r"line 3: target: 7 is no text, and exact_match compares texts"),
        ({"answer": []}, r"line 3: target: \[\] is no text"),
        ({"image": None}, r"line 3: no value in column 'image'"),
        ({"kind": None}, r"line 3: no value in column 'kind'"),
    ],
)
def test_a_bad_row_is_named(folder: Path, row: dict[str, Any], words: str) -> None:
    jsonl(folder, [*ROWS, ROWS[0] | {"id": "c"} | row])
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder))


def test_whole_numbers_are_ids_and_labels(folder: Path) -> None:
    jsonl(folder, [row | {"id": number, "kind": number} for number, row in enumerate(ROWS)])
    task = LocalTask(definition(folder))
    assert list(task.ids) == ["0", "1"]
    assert task.sample("1").group == "1"


# -- definitions that cannot be used ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("doc_to_text: !function text\n", "write it as module.function"),
        ("doc_to_text: !function utils.txt\n", "has no function 'txt'.*'text'"),
        ("doc_to_text: !function util.text\n", "neither .*util.py nor a module.*'utils'"),
        ("doc_to_text: !function broken.text\n", "broken.py fails: ZeroDivisionError"),
        ("doc_to_text: !function utils.fails\n", r"line 1: .*utils.fails .*KeyError: 'nothing'"),
        ("doc_to_text: !function utils.number\n", "doc_to_text gave 7, which is no text"),
        ("doc_to_text: !python/name:os.system\n", r"python/name.*only tag .*!function"),
        ("doc_to_text: !!python/object/apply:os.getcwd []\n", "only tag"),
        ("doc_to_text: !function [a]\n", "takes a name"),
        ("doc_to_text: [\n", "is not YAML"),
        ("doc_to_text: '{{question'\n", "is not a template"),
        ("doc_to_text: '{{question - 1}}'\n", "the template fails: TypeError"),
        ("include: other.yaml\n", "there is no file .*other.yaml"),
        ("include: 7\n", "include: expected a file name"),
        ("include: colours.yaml\n", "includes itself"),
        ("generation_kwargs: {max_new_tokens: 0}\n", "generation_kwargs: max_new_tokens"),
        ("generation_kwargs: {until: 7}\n", "generation_kwargs: until"),
        ("metric_list: [{metric: exact_match}, {metric: exact_match}]\n", "Name every metric"),
        ("metric_list: [{metric: exact_match, ignore_case: 1}]\n", "true or false"),
        ("metric_list: [{metric: exact_match, regexes_to_ignore: ['(']}]\n", "not a pattern"),
        ("metric_list: [{metric: exact_match, higher_is_better: 1}]\n", "true or false"),
        ("process_results: !function utils.text\n", "names nothing. Name every metric"),
        ("test_split: 7\n", "needs `test_split:`"),
        ("task: \n", "needs `task:`"),
        ("doc_to_target: \n", "needs `doc_to_target:`"),
    ],
)
def test_definitions_that_are_wrong(folder: Path, text: str, words: str) -> None:
    functions(
        folder,
        "def text(doc): return ''\ndef number(doc): return 7\n"
        "def fails(doc): return doc['nothing']\n",
    )
    (folder / "broken.py").write_text("1 / 0\n")
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder, text, **{text.split(":")[0]: None}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dataset_path: lmms-lab/POPE\n", "'lmms-lab/POPE' is none of json, csv, parquet"),
        ("dataset_kwargs: {token: true}\n", "key 'token' is not supported"),
        ("dataset_kwargs: {data_files: {test: 'a*.json'}}\n", "is an address or a pattern"),
        ("dataset_kwargs: {data_files: {test: [a, b]}}\n", "several files"),
        ("filter_list: []\n", "key 'filter_list'"),
        ("class: x\n", "key 'class'"),
        ("num_fewshot: 3\n", "num_fewshot: 3"),
        ("repeats: 2\n", "repeats: 2"),
        ("output_type: multiple_choice\n", "output_type multiple_choice"),
        ("doc_to_text: 7\n", "doc_to_text: 7"),
        ("metric_list: [{metric: anls}]\n", "metric 'anls' is not supported"),
        ("metric_list: [{metric: exact_match, aggregation: median}]\n", "aggregation 'median'"),
        ("metric_list: [{metric: exact_match, weight: 2}]\n", "option 'weight'"),
        ("generation_kwargs: {image_aspect_ratio: original}\n", "'image_aspect_ratio'"),
    ],
)
def test_what_only_lmms_eval_reads(folder: Path, text: str, reason: str) -> None:
    path = definition(folder, text, **{text.split(":")[0]: None})
    assert not LocalTask.can_read(path)
    assert reason in str(LocalTask.why_not(path))
    with pytest.raises(UnsupportedError, match="only lmms-eval can read it. Install it"):
        LocalTask(path)


def test_keys_that_change_nothing(folder: Path) -> None:
    text = "num_fewshot: 0\nrepeats: 1\ndescription: ''\ndataset_name: null\ntag: [x]\n"
    path = definition(folder, text)
    assert LocalTask.can_read(path)
    assert LocalTask(path).sample("a").question == "Which colour?"


def test_aggregations_that_want_a_command_line(folder: Path) -> None:
    functions(folder, OWN_SCORES + "def wide(items, args): return 0\n")
    with pytest.raises(UnsupportedError, match="takes `args`"):
        LocalTask(definition(folder, OWN.replace("widest", "wide")))
