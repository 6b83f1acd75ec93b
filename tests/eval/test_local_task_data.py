"""Tasks read without lmms-eval: kinds of data, and every way to be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.local_task import LocalTask
from mmlm_efficient.errors import (
    DataError,
    MediaError,
    MissingExtraError,
    UnsupportedError,
)
from tests.eval.lmms_local import only_local
from tests.eval.local_folder import (
    OWN,
    OWN_SCORES,
    ROWS,
    colours,
    definition,
    functions,
    jsonl,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colours(tmp_path)


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
    kinds = {name: datasets.Value("string") for name in ("id", "question", "answer", "kind")}
    features = datasets.Features(
        kinds | {"image": datasets.Image(), "raw": datasets.Value("binary")}
    )
    path = folder / "data.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
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


SEEN = (
    "process_results: !function utils.seen\n"
    "metric_list: [{metric: columns, aggregation: !function utils.count}]\n"
)
SEEN_PY = (
    "def seen(doc, results):\n"
    "    return {'columns': [(key, type(doc[key]).__name__) for key in sorted(doc)]}\n"
    "def count(items): return len(items)\n"
)


def test_scores_are_made_without_pictures_unless_asked_for(folder: Path) -> None:
    parquet(folder, broken=True)
    functions(folder, SEEN_PY)
    task = LocalTask(definition(folder, SEEN, **PARQUET))
    columns = [name for name, _ in task.score("b", "")["columns"]]  # although it is broken
    assert columns == ["answer", "id", "kind", "question", "raw"]
    text = SEEN + "process_results_use_image: true\n"
    task = LocalTask(definition(folder, text, **PARQUET))
    assert ["image", "Image"] in task.score("a", "")["columns"]
    with pytest.raises(MediaError, match="column 'image'"):
        task.score("b", "")


@pytest.mark.parametrize("pictures", [False, True])
def test_lmms_eval_scores_the_same_rows(
    folder: Path, pictures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmms_eval")
    only_local(monkeypatch)
    parquet(folder)
    functions(folder, SEEN_PY)
    text = SEEN + f"process_results_use_image: {str(pictures).lower()}\n"
    metadata = {"id_column": "id"}
    path = definition(folder, text, **PARQUET, doc_to_visual="image", metadata=metadata)
    from eval.lmms_task import lmms_tasks

    [theirs], ours = lmms_tasks("colours", [folder]), LocalTask(path)
    assert theirs.ids == tuple(ours.ids) == ("a", "b")
    seen = [[name for name, _ in one.score("b", "")["columns"]] for one in (theirs, ours)]
    assert seen[0] == seen[1]
    assert ("image" in seen[1]) == pictures


def test_data_sha_sees_pictures_that_parquet_names(folder: Path) -> None:
    rows = [
        {"id": "a", "q": "Why?", "a": "so", "image": {"bytes": None, "path": "red.png"}, "n": [1]},
        {"id": "b", "q": "How?", "a": "so", "image": {"bytes": b"GIF", "path": None}, "n": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    changes = {"doc_to_text": "q", "doc_to_target": "a", "metadata": {"id_column": "id"}}
    path = definition(folder, **PARQUET, **changes)
    before = LocalTask(path)
    assert before.sample("a").images[0].getpixel((0, 0)) == (255, 0, 0)
    (folder / "red.png").write_bytes((folder / "red.png").read_bytes() + b" ")
    assert LocalTask(path).data_sha != before.data_sha


def test_pictures_that_are_not_declared_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval calls them videos; our model there knows better."""
    pytest.importorskip("lmms_eval")
    only_local(monkeypatch)
    picture = {"bytes": (folder / "red.png").read_bytes(), "path": None}
    row = {"image": picture, "question": "Why?", "answer": "so"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "data.parquet")
    path = definition(folder, **PARQUET, metadata=None)
    from eval.lmms_task import lmms_tasks

    [theirs] = lmms_tasks("colours", [folder])
    assert (theirs.sample("0").images, theirs.sample("0").video) == ((picture["bytes"],), None)
    assert len(LocalTask(path).sample("0").images) == 1


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


@pytest.mark.parametrize("files", [None, {"test": None}])
def test_a_forgotten_data_file(folder: Path, files: Any) -> None:
    with pytest.raises(DataError, match="data_files: names no file. Write data_files: {test: FIL"):
        LocalTask(definition(folder, dataset_kwargs={"data_files": files}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"doc_to_target": "day"}, "'day', which doc_to_target uses, holds nothing but dates"),
        ({"doc_to_text": "On {{day}}?"}, "'day', which doc_to_text uses"),
        ({"metadata": {"id_column": "day"}}, "'day', which metadata.id_column uses"),
        ({"metadata": {"group_column": "day"}}, "'day', which metadata.group_column uses"),
        ({"doc_to_text": None}, r"'day', which doc_to_text \(!function utils.text\) uses"),
    ],
)
def test_texts_that_are_dates_to_lmms_eval(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    jsonl(folder, [row | {"day": f"2020-01-{at:02}"} for at, row in enumerate(ROWS, 1)])
    assert LocalTask(definition(folder)).sample("a").question == "Which colour?", "it is not used"
    functions(folder, "def text(doc): return 'Why?'\n")
    text = "doc_to_text: !function utils.text\n" if "doc_to_text" in changes else ""
    text = text if changes.get("doc_to_text", "") is None else ""
    with pytest.raises(DataError, match=f"line 1: column {words}"):
        LocalTask(definition(folder, text, **changes))


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
        ({"metadata": [{"id_column": "id"}]}, "metadata: is a list; with id_column, write it as a"),
    ],
)
def test_missing_columns(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder, **changes))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "a"}, r"line 3: id 'a' in column 'id' occurs already in .*line 1"),
        ({"id": True}, r"line 3: id True in column 'id' must be a text or a whole number"),
        ({"id": None}, r"line 3: no value in column 'id'"),
        ({"question": 7}, r"line 3: column 'question' holds 7, which is no text"),
        ({"answer": 7}, r"line 3: target: 7 is no text, and exact_match compares texts"),
        (
            {"answer": []},
            r"line 3: target: the target of the first row is no list, this .* one",
        ),
        ({"image": None}, r"line 3: no value in column 'image'"),
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
    assert reason in str(LocalTask.why_not(path))
    with pytest.raises(UnsupportedError, match="only lmms-eval can read it. Install it"):
        LocalTask(path)


def test_keys_that_change_nothing(folder: Path) -> None:
    text = "num_fewshot: 0\nrepeats: 1\ndescription: ''\ndataset_name: null\ntag: [x]\n"
    path = definition(folder, text)
    assert LocalTask.why_not(path) is None
    assert LocalTask(path).sample("a").question == "Which colour?"


def test_aggregations_that_want_a_command_line(folder: Path) -> None:
    functions(folder, OWN_SCORES + "def wide(items, args): return 0\n")
    with pytest.raises(UnsupportedError, match="takes `args`"):
        LocalTask(definition(folder, OWN.replace("widest", "wide")))
