"""Values of JSON files: those that lmms-eval has, by `datasets`, or a refusal."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval import task_json
from eval.task_data import Rows, read_rows
from mmlm_efficient.errors import DataError

datasets = pytest.importorskip("datasets")


def ours(folder: Path, text: str) -> Rows:
    path = folder / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    return read_rows("json", path)


def theirs(folder: Path, text: str, **options: Any) -> list[dict[str, Any]]:
    """As lmms-eval reads it."""
    datasets.disable_progress_bars()
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"  # another one is cached
    path.write_text(text, encoding="utf-8")
    files = {"test": str(path)}
    found = datasets.load_dataset(
        "json", data_files=files, cache_dir=str(folder / f"{path.stem}-cache"), **options
    )["test"]
    return [found[at] for at in range(len(found))]


def lines(*values: str) -> str:
    """A column "a" with these JSON values."""
    return "".join(f'{{"a": {value}}}\n' for value in values)


def both(folder: Path, text: str) -> list[Any]:
    """Column "a", which both read as the same down to the types of numbers."""
    rows = ours(folder, text)
    found = [rows.row(at) for at in range(len(rows))]
    assert rows.times == {}
    assert repr(found) == repr(theirs(folder, text))
    return [row["a"] for row in found]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("1", "2.5", "null"), [1.0, 2.5, None]),
        (("1", "2"), [1, 2]),
        (("-0.0", "2"), [-0.0, 2.0]),
        (("[1, 2.5]", "[3]", "[]", "null"), [[1.0, 2.5], [3.0], [], None]),
        (("[[1], [2.5, null]]",), [[[1.0], [2.5, None]]]),
        (
            ('{"x": 1, "y": "t"}', '{"y": "u", "x": 2.5}'),
            [{"x": 1.0, "y": "t"}, {"x": 2.5, "y": "u"}],
        ),
        (('[{"x": 1}, {"x": 0.5}]',), [[{"x": 1.0}, {"x": 0.5}]]),
        # Through pandas' reader, which keeps each kind.
        (('{"x": 1}', '{"x": 2.0, "y": 1}'), [{"x": 1}, {"x": 2.0, "y": 1}]),
        (('"yes"', "3", "true", '["7"]'), ["yes", 3, True, ["7"]]),
        (('[1, "a"]',), [[1, "a"]]),
        (('"2020-01-02"', '"in May"'), ["2020-01-02", "in May"]),
        (('"2020-01-02"', "5"), ["2020-01-02", 5]),
        (('"20200102"', '"10:00"'), ["20200102", "10:00"]),
    ],
)
def test_values_are_those_of_lmms_eval(
    tmp_path: Path, values: tuple[str, ...], expected: list[Any]
) -> None:
    assert repr(both(tmp_path, lines(*values))) == repr(expected)


def test_arrays_are_written_anew(tmp_path: Path) -> None:
    text = '[{"a": 1}, {"a": 0.0000000001}, {"a": -0.0}, {"a": 12345.678901}]'
    assert repr(both(tmp_path, text)) == repr([1.0, 1e-10, 0.0, 12345.678901])


@pytest.mark.parametrize(
    "values",
    [
        ('"2020-01-02"', "null", '"1999-12-31"'),
        ('"2020-01-02 10:00"', '"2020-01-02T10"'),
        ('"2020-01-02T10:00:00+02:00"',),
        ('["2020-01-02"]', "[]"),
        ('{"x": "2020-01-02"}',),
    ],
)
def test_texts_that_are_times_there_are_told(tmp_path: Path, values: tuple[str, ...]) -> None:
    text = lines(*values)
    assert ours(tmp_path, text).times == {"a": 0}
    assert "datetime.datetime" in repr(theirs(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines('"x"', '"7"', "7"), "line 2: column 'a' holds the text '7' beside values of other"),
        (lines("true", '"true"'), "line 2: column 'a' holds the text 'true'"),
        (lines('"x"', "0.3"), "line 2: column 'a' holds the fraction 0.3 among values of several"),
        (lines('{"x": 0.3}', '{"y": 0.3}'), "line 1: column 'a' holds the fraction 0.3"),
        (lines('{"x": "7"}', '{"x": 7}'), "line 1: column 'a' holds the text '7'"),
        ('[{"a": 0.12345678901}]', "entry 1: column 'a' holds 0.12345678901, of which .* 10 deci"),
        ('[{"a": 1.00000000005}]', "Write one object a line"),
    ],
)
def test_what_lmms_eval_changes_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ours(tmp_path, text)
    read = [json.loads(line) for line in text.splitlines()]
    read = read[0] if isinstance(read[0], list) else read
    assert repr(theirs(tmp_path, text)) != repr(read), "it would be the same"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines("1", "NaN"), "line 2: NaN is no JSON; write null"),
        (lines("-Infinity"), "line 1: -Infinity is no JSON"),
        (lines("-0"), "line 1: -0 is read as 0 or as -0.0"),
        (lines("9223372036854775808"), "line 1: 9223372036854775808 does not fit into 64 bits"),
        (lines("1e999"), "line 1: column 'a' holds a number that is too big"),
        (' [{"a": 1}]', r"has blanks before its '\['"),
        ('[{"a": NaN}]', "data.jsonl: NaN is no JSON"),
        (lines('{"x": 1}', '{"y": 1}') + "\n\n", "'a' holds .* different keys, and .* blank lines"),
        (lines("1", "[" * 100_000 + "]" * 100_000), "line 2: lists .* nested too deeply"),
        (lines("[" * 150 + "1" + "]" * 150), "line 1: column 'a' holds more than 100 lists"),
        (lines("1", "[" * 150 + "1" + "]" * 150), "line 2: column 'a' holds more than 100 lists"),
    ],
)
def test_values_that_readers_disagree_on(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ours(tmp_path, text)


def test_blank_lines_do_no_harm_to_columns_of_one_kind(tmp_path: Path) -> None:
    assert both(tmp_path, lines("1") + "\n" + lines("2.5")) == [1.0, 2.5]


_CHUNK = 60


@pytest.mark.parametrize(
    ("first", "later", "same"),
    [
        ("1.5", "2", True),
        ("1", "2.0", False),
        ('"text"', '"2020-01-02"', False),
        ('"x"', '"y"', True),
        ("[1.5]", "[2]", True),
        ("[1]", "[2.0]", False),
        ("1", "null", True),
        ('{"x": 1.5}', '{"x": 2}', True),
    ],
)
def test_types_are_those_of_the_first_part_of_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, later: str, same: bool
) -> None:
    monkeypatch.setattr(task_json, "CHUNK_BYTES", _CHUNK)
    text = lines(*[first] * 8, *[later] * 8)
    found = theirs(tmp_path, text, chunksize=_CHUNK)
    if same:
        rows = ours(tmp_path, text)
        assert repr([rows.row(at) for at in range(16)]) == repr(found)
    else:
        with pytest.raises(DataError, match=r"line \d+: column 'a' .* in the first 60 bytes"):
            ours(tmp_path, text)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-99, 99).map(float)
    | st.text(max_size=3)
    | st.sampled_from(["7", "-1.5", "true", "null", "[1]", "2020-01-02", "-", "1e3", "x", "0x1"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2)
    ),
    max_leaves=4,
)
_ALIKE = st.one_of(
    st.lists(_VALUES, min_size=1, max_size=3),
    st.lists(st.integers(-3, 3) | st.floats(-3, 3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(-3, 3) | st.sampled_from([0.5, -0.0])), min_size=1, max_size=3),
)


def _has_time(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_time, value.values() if isinstance(value, dict) else value))
    return isinstance(value, datetime.datetime)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=_ALIKE, array=st.booleans())
def test_no_value_is_read_otherwise(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], array: bool
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    rows = [{"a": value, "id": at} for at, value in enumerate(values)]
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    try:
        own = ours(folder, text)
    except DataError:
        return
    try:
        found = theirs(folder, text)
    except Exception:  # noqa: BLE001  it cannot be read there at all
        return
    read = [own.row(at) for at in range(len(own))]
    if own.times:
        assert set(own.times) == {"a"}
    else:
        assert not _has_time(found)
        assert repr(read) == repr(found)
