"""No text of a data file changes on its way into a prompt or a target; base64 is no path."""

from __future__ import annotations

import base64
import csv
import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.local_task import LocalTask
from mmlm_efficient.errors import DataError, MediaError
from tests.eval.local_folder import ROWS, colours, definition, functions, jsonl

PARQUET = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "data.parquet"}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colours(tmp_path)


# -- CSV ---------------------------------------------------------------------------------------

CSV = (
    "n,code,share,known,word,text\n"
    '1,007,1.50,true,,"a, b"\n'
    '2,8,2,False,x,"c\nd"\n'
    "3,9,3e2,TRUE,NA,e\n"
)


def csv_task(folder: Path, text: str, **changes: Any) -> LocalTask:
    (folder / "data.csv").write_text(text, encoding="utf-8")
    given: dict[str, Any] = {
        "dataset_path": "csv",
        "dataset_kwargs": {"data_files": {"test": "data.csv"}},
        "doc_to_visual": None,
        "doc_to_text": "{{text}}|{{code}}|{{share}}|{{known}}|{{word}}",
        "doc_to_target": "{{share}}",
        "metadata": {"id_column": "n"},
    }
    return LocalTask(definition(folder, **(given | changes)))


def test_every_csv_cell_is_text(folder: Path) -> None:
    task = csv_task(folder, "\ufeff" + CSV)
    assert task.ids == ["1", "2", "3"]
    assert [task.sample(one).question for one in task.ids] == [
        "a, b|007|1.50|true|",
        "c\nd|8|2|False|x",
        "e|9|3e2|TRUE|NA",
    ]
    assert [task.sample(one).target for one in task.ids] == ["1.50", "2", "3e2"]
    assert task.score("1", "1.50") == {"exact_match": 1.0}
    assert csv_task(folder, CSV, doc_to_target="share").sample("3").target == "3e2"
    metadata = {"id_column": "n", "group_column": "word"}
    grouped = csv_task(folder, CSV, metadata=metadata)
    assert [grouped.sample(one).group for one in grouped.ids] == [None, "x", "NA"]


MIXED = "id,question,answer\r\n1,how many dogs?,1\r\n2,how many cats?,{}\r\n"
MIXED_KEYS = {"doc_to_text": "question", "metadata": {"id_column": "id"}}


@pytest.mark.parametrize("target", ["answer", "{{answer}}"])
def test_an_empty_target_is_refused(folder: Path, target: str) -> None:
    keys = MIXED_KEYS | {"doc_to_target": target}
    task = csv_task(folder, MIXED.format("None"), **keys)
    assert [task.sample(one).target for one in task.ids] == ["1", "None"]
    with pytest.raises(DataError, match=r"line 3: .*Fill it in or remove the row"):
        csv_task(folder, MIXED.format(""), **keys)


@pytest.mark.parametrize("text", ["answer", "{{answer}}"])
def test_an_empty_question_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"line 3: .*Fill it in or remove the row"):
        csv_task(folder, MIXED.format(""), **MIXED_KEYS | {"doc_to_text": text})


def test_functions_that_score_get_the_text_of_cells(folder: Path) -> None:
    functions(folder, "def near(doc, results): return {'m': float(doc['answer']) == 1.5}\n")
    (folder / "data.csv").write_text(MIXED.format("1.50"), encoding="utf-8")
    keys: dict[str, Any] = MIXED_KEYS | {"doc_to_visual": None, "dataset_path": "csv"}
    keys["dataset_kwargs"] = {"data_files": {"test": "data.csv"}}
    text = "process_results: !function utils.near\nmetric_list: [{metric: m}]\n"
    task = LocalTask(definition(folder, text, **keys))
    assert [task.score(one, "")["m"] for one in task.ids] == [0.0, 1.0]


def test_brackets_that_a_template_reads_as_a_list(folder: Path) -> None:
    text = MIXED.replace(",1\r", ',"[3, 4]"\r').format('"[1, 2]"')
    with pytest.raises(DataError, match=r"line 2: .*\[3, 4\] is a list .*read as a list") as caught:
        csv_task(folder, text, doc_to_target="{{answer}}", **MIXED_KEYS)
    assert "such as {{answer}}" not in str(caught.value)
    task = csv_task(folder, text, doc_to_target="answer", **MIXED_KEYS)
    assert [task.sample(one).target for one in task.ids] == ["[3, 4]", "[1, 2]"]


def test_a_cell_may_be_long(folder: Path) -> None:
    csv.field_size_limit(131_072)
    task = csv_task(folder, MIXED.format("x" * 200_000), doc_to_target="answer", **MIXED_KEYS)
    assert len(task.sample("2").target) == 200_000
    assert csv.field_size_limit() == 131_072


# -- JSON and Parquet ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (["2.5", "1"], r"line 2: column 'answer', .* the number 1, which would become 1\.0"),
        (["2.5", "1.50"], r"line 2: .* the number 1\.50, which would become 1\.5"),
        (["1e3", "7"], r"line 1: .* the number 1e3, which would become 1000\.0"),
        (["[1, 2.5]", "[3.5]"], r"line 1: .* the number 1, which would become 1\.0"),
        (['{"x": 1}', '{"x": 2.0, "y": 1e0}'], r"line 2: .* the number 1e0, .* become 1\.0"),
        (["7", "null"], r"line 2: doc_to_target: column 'answer' holds no value"),
        (["7", '""'], r"line 2: target: is empty"),
        (["false", "true"], r"line 1: .*column 'answer' holds False, which is no text"),
        (["[true]", "[null]"], r"line 1: .*column 'answer' holds True, which is no text"),
    ],
)
def test_no_value_becomes_another_text(folder: Path, answers: list[str], words: str) -> None:
    lines = [
        json.dumps(row).replace(json.dumps(row["answer"]), answer)
        for row, answer in zip(ROWS, answers, strict=True)
    ]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        LocalTask(definition(folder, doc_to_target="{{answer}}"))


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ('{{answer ~ "x"}}', True),
        ('{{"x" ~ (answer ~ "y")|upper}}', None),
        ('{{answer|join(",")}}', ["a", None]),
        ("{{answer|string}}", True),
        ('{{"%s"|format(answer)}}', True),
        ("{{answer|upper|trim}}", None),
        ('{% set one = answer ~ "x" %}{{one}}', False),
    ],
)
def test_values_that_become_part_of_a_text(folder: Path, template: str, answer: Any) -> None:
    jsonl(folder, [ROWS[0], ROWS[1] | {"answer": answer}])
    with pytest.raises(DataError, match=r"line 2: doc_to_target: column 'answer' holds"):
        LocalTask(definition(folder, doc_to_target=template))


def test_texts_that_are_put_together(folder: Path) -> None:
    jsonl(folder, [row | {"n": None, "many": ["a", "b", None]} for row in ROWS])
    target = '{{(n or "no") ~ " " ~ many|select|join(",")|upper}}{{" %s"|format(many[0]|trim)}}'
    task = LocalTask(definition(folder, doc_to_target=target))
    assert task.sample("a").target == "no A,B a"


def test_values_whose_text_is_the_files(folder: Path) -> None:
    """Whole numbers beside nothing, fractions as Python writes them; and nothing told about."""
    rows = [ROWS[0] | {"n": 7, "f": 2.5, "b": True}, ROWS[1] | {"n": None, "f": -0.25, "b": False}]
    jsonl(folder, rows)
    target = "{{n or 'none'}} {{f}} {{'yes' if b else 'no'}} {{n == 7}}"
    task = LocalTask(definition(folder, doc_to_target=target.replace(" {{n == 7}}", "")))
    assert [task.sample(one).target for one in task.ids] == ["7 2.5 yes", "none -0.25 no"]
    with pytest.raises(DataError, match=r"line 1: .*holds True"):
        LocalTask(definition(folder, doc_to_target=target))
    task = LocalTask(definition(folder, doc_to_target="{{n == 7}}"))
    assert [task.sample(one).target for one in task.ids] == ["True", "False"]


def test_parquet_keeps_whole_numbers_and_refuses_dates(folder: Path) -> None:
    days = [datetime.date(2020, 1, 2), datetime.date(2020, 1, 3)]
    rows = [row | {"n": n, "day": d} for row, n, d in zip(ROWS, (7, None), days, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    task = LocalTask(definition(folder, **PARQUET, doc_to_target="{{n or 'x'}} {{day.day}}"))
    assert [task.sample(one).target for one in task.ids] == ["7 2", "x 3"]
    with pytest.raises(DataError, match=r"row 1: .*column 'day' holds datetime.date\(2020, 1, 2\)"):
        LocalTask(definition(folder, **PARQUET, doc_to_target="{{day}}"))


# -- pictures in base64 ------------------------------------------------------------------------


def encoded(folder: Path, before: str = "", lines: bool = False) -> list[dict[str, Any]]:
    encode = base64.encodebytes if lines else base64.b64encode
    return [
        row | {"image": before + encode((folder / str(row["image"])).read_bytes()).decode()}
        for row in ROWS
    ]


@pytest.mark.parametrize("before", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("lines", [False, True])
def test_base64_is_a_picture(folder: Path, before: str, lines: bool) -> None:
    jsonl(folder, encoded(folder, before, lines))
    task = LocalTask(definition(folder))
    pixels = [task.sample(one).images[0].getpixel((0, 0)) for one in task.ids]
    assert pixels == [(255, 0, 0), (0, 0, 255)]
    jsonl(folder, [row | {"image": [row["image"]] * 2} for row in encoded(folder, before, lines)])
    assert len(LocalTask(definition(folder, metadata=None)).sample("0").images) == 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64,!" + "A" * 900, "is not base64"),
        ("A" * 900, "a text of 900 characters .* neither the path of a file nor a picture in base"),
        ("A/" * 450, "a text of 900 characters"),
        ("data:image/png;base64," + "QUJD" * 300, "image of 900 bytes"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"A" * 900).decode(), "image of 908 bytes"),
    ],
)
def test_long_texts_that_are_no_picture_are_named_briefly(
    folder: Path, image: str, words: str
) -> None:
    jsonl(folder, [ROWS[0], ROWS[1] | {"image": image}])
    task = LocalTask(definition(folder, metadata={"id_column": "id"}))
    with pytest.raises(MediaError, match=rf"data.jsonl, line 2.*{words}") as caught:
        task.sample("b")
    assert image[:50] not in str(caught.value)


def test_a_long_path_that_exists_is_read(folder: Path) -> None:
    deep = folder / ("x" * 200) / ("y" * 200)
    deep.mkdir(parents=True)
    (folder / "red.png").rename(deep / "red.png")
    jsonl(folder, [ROWS[0] | {"image": str(deep / "red.png")}])
    assert LocalTask(definition(folder)).sample("a").images[0].size == (8, 6)
