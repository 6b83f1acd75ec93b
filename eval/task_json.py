"""The values of a JSON data file as lmms-eval has them.

lmms-eval reads JSON with `datasets` (5.2: `packaged_modules/json`) and pyarrow, which give every
column one type, and every list and field within it:

- numbers: whole ones beside fractions are fractions ([1, 2.5] is [1.0, 2.5]); done here too;
- texts that all look like dates or times are times ("2020-01-02" is 2020-01-02 00:00:00); such
  columns are reported, and whoever uses one refuses it;
- values of several kinds, and objects with different keys, go through a JSON reader of pandas that
  keeps ten decimals, often misses the last bit of a fraction, and reads the text "7" as a number;
  what it would change is refused;
- in a file that is one array all numbers go through that reader's writer; what does not survive
  ten decimals is refused;
- the types are those of the first 10 MiB; a longer file with other types behind them is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any, NamedTuple, NoReturn, TypeAlias

from mmlm_efficient.errors import DataError

# What `datasets` reads at once; further lines are made to fit.
CHUNK_BYTES = 10 << 20
MOST_LEVELS = 100

_TIME = re.compile(
    r"\d{4}-\d\d-\d\d([ T]\d\d(:?\d\d(:?\d\d([.,]\d*)?)?)?\s*([Zz]|[+-]\d\d(:?\d\d)?)?)?"
)
# Texts that pandas' reader takes for a value; it is more generous than JSON.
_VALUE = re.compile(
    r"[-\d][\d.]*([eE][+-]?\d*)?|true|false|null|NaN|-?Infinity|\[.*\]|\{.*\}|\".*\"", re.S
)
_DECIMALS, _DIGITS = 10, 15

# "null", "bool", "whole", "fraction", "text", "time", "json"; ("list", kind of its values);
# ("object", ((field, kind), ...)).
Kind: TypeAlias = "str | tuple[str, Any]"
_At: TypeAlias = "tuple[int, Any]"
# Position of a row, a number as the file writes it, and its text as it is read.
Rewritten: TypeAlias = "tuple[int, str, str]"


class Typed(NamedTuple):
    """Rows with values as lmms-eval has them.

    Attributes:
        rows: name of column to value.
        times: columns that lmms-eval turns into times, with the position of a row that shows it.
        numbers: columns with a number whose text is another one now, such as 1.50 or 1 beside
            2.5, with the first one.
    """

    rows: list[dict[str, Any]]
    times: Mapping[str, int]
    numbers: Mapping[str, Rewritten]


class _Written(float):
    """A fraction that knows how the file writes it."""

    text: str


def _written(text: str) -> _Written:
    number = _Written(text)
    number.text = text
    return number


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: it holds something that readers disagree on, in words.

    Example:
        >>> parsed('{"a": NaN}')
        Traceback (most recent call last):
        ValueError: NaN is no JSON; write null, or a number
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_int=_whole, parse_float=_written)
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write null, or a number")


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is read as 0 or as -0.0; write one of these")
    if len(text) > 18 and not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text:.30} does not fit into 64 bits; write it as a text")
    return int(text)


def typed(
    rows: Sequence[Mapping[str, Any]],
    place: Callable[[int], str],
    *,
    array: bool = False,
    starts: Sequence[int] = (),
    gaps: bool = False,
) -> Typed:
    """Rows with the types that lmms-eval gives their columns; see the module.

    Args:
        rows: as `parsed`; they may lack columns.
        place: file and line of a row, for messages.
        array: the file is one array, not an object a line.
        starts: byte that each line starts at; () where one chunk holds all.
        gaps: there are blank lines between the rows.

    Raises:
        DataError: a value that lmms-eval would read as another one.

    Example:
        >>> typed([{"a": 1, "b": [2]}, {"a": 0.5}], str).rows
        [{'a': 1.0, 'b': [2]}, {'a': 0.5}]
    """
    found: list[dict[str, Any]] = [dict(row) for row in rows]
    times: dict[str, int] = {}
    rewritten: dict[str, Rewritten] = {}
    chunks = list(_chunks(starts)) if len(starts) else [range(len(rows))]
    for name in dict.fromkeys(key for row in rows for key in row):
        column = _Column(name, place, array)
        first, values = column.read([(at, row.get(name)) for at, row in enumerate(rows)])
        if len(chunks) > 1:
            first = column.check_chunks(rows, chunks)
        if gaps and _has_json(first):
            raise DataError(
                f"{place(0)}: column '{name}' holds values of several kinds or objects with "
                "different keys, and the file has blank lines, which makes lmms-eval fill in "
                "missing keys. Remove the blank lines."
            )
        if column.time is not None:
            times[name] = column.time
        if column.rewritten is not None:
            rewritten[name] = column.rewritten
        for row, value in zip(found, values, strict=True):
            if name in row:
                row[name] = value
    return Typed(found, times, rewritten)


def _chunks(starts: Sequence[int]) -> Iterator[range]:
    """Positions of rows that `datasets` reads together: up to the line that the chunk ends in."""
    first = 0
    for at, start in enumerate(starts):
        if start > starts[first] + CHUNK_BYTES:
            yield range(first, at)
            first = at
    yield range(first, len(starts))


@dataclass
class _Column:
    """Reads the values of one column.

    Attributes:
        name: of the column.
        place: file and line of a row.
        array: the file is one array.
        time: position of a text in a list of texts that are times; None if there is no such list.
        rewritten: the first number whose text changes; None if there is none.
    """

    name: str
    place: Callable[[int], str]
    array: bool
    time: int | None = None
    rewritten: Rewritten | None = None

    def read(self, values: Sequence[_At], level: int = 0) -> tuple[Kind, list[Any]]:
        """Kind and values of what stands at the same place in all rows.

        Args:
            values: with the position of their row; None where there is none.
            level: of nesting.
        """
        plain = [value for _, value in values]
        known = [(at, value) for at, value in values if value is not None]
        kinds = {_kind(value) for _, value in known}
        if not kinds:
            return "null", plain
        if level > MOST_LEVELS:
            self._refuse(known[0][0], f"more than {MOST_LEVELS} lists or objects in each other")
        if kinds == {"number"}:
            return self._numbers(values)
        if kinds == {"list"}:
            return self._lists(values, level)
        if kinds == {"object"}:
            keys = list(known[0][1])
            if keys and all(value.keys() == set(keys) for _, value in known):
                return self._objects(values, keys, level)
        if kinds == {"text"}:
            if all(_TIME.fullmatch(value) for _, value in known):
                self.time = known[0][0] if self.time is None else self.time
                return "time", plain
            return "text", plain
        if kinds == {"bool"}:
            return "bool", plain
        for at, value in known:
            self._check_json(at, value)
        return "json", [self._bare(at, value) for at, value in values]

    def _numbers(self, values: Sequence[_At]) -> tuple[Kind, list[Any]]:
        numbers = [value for _, value in values]
        if not any(isinstance(value, float) for value in numbers):
            return "whole", numbers
        for at, value in values:
            if isinstance(value, float):
                self._check_fraction(at, value)
        # The writer of arrays has no sign for 0.
        plus = 0.0 if self.array else -0.0
        return "fraction", [
            None if value is None else self._fraction(at, value, plus) for at, value in values
        ]

    def _fraction(self, at: int, value: float, plus: float = -0.0) -> float:
        """The plain number, noted where its text is another one."""
        read = float(value) + plus
        written = getattr(value, "text", str(value))
        if self.rewritten is None and str(read) != written:
            self.rewritten = at, written, str(read)
        return read

    def _bare(self, at: int, value: Any) -> Any:
        """A value of a column of several kinds, with plain numbers."""
        if isinstance(value, dict):
            return {key: self._bare(at, one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._bare(at, one) for one in value]
        return self._fraction(at, value) if isinstance(value, float) else value

    def _lists(self, values: Sequence[_At], level: int) -> tuple[Kind, list[Any]]:
        flat = [(at, one) for at, value in values if value is not None for one in value]
        kind, read = self.read(flat, level + 1)
        left = iter(read)
        return ("list", kind), [
            None if value is None else list(islice(left, len(value))) for _, value in values
        ]

    def _objects(
        self, values: Sequence[_At], keys: Sequence[str], level: int
    ) -> tuple[Kind, list[Any]]:
        known = [(at, value) for at, value in values if value is not None]
        fields = {key: self.read([(at, one[key]) for at, one in known], level + 1) for key in keys}
        left = iter(zip(*(read for _, read in fields.values()), strict=True))
        kinds = tuple(sorted((key, kind) for key, (kind, _) in fields.items()))
        return ("object", kinds), [
            None if value is None else dict(zip(keys, next(left), strict=True))
            for _, value in values
        ]

    def _check_fraction(self, at: int, value: float) -> None:
        if math.isinf(value):
            self._refuse(at, "a number that is too big")
        if not self.array:
            return
        sign = Decimal(repr(value)).normalize().as_tuple()
        if len(sign.digits) > _DIGITS or -int(sign.exponent) > _DECIMALS or abs(value) >= 1e15:
            self._refuse(
                at,
                f"{value!r}, of which lmms-eval keeps {_DECIMALS} decimals because the file is "
                "one array. Write one object a line",
            )

    def _check_json(self, at: int, value: Any) -> None:
        """Refuse what pandas' reader would change in a column of several kinds."""
        if isinstance(value, str):
            if _VALUE.fullmatch(value.strip()):
                self._refuse(
                    at,
                    f"the text {value!r:.40} beside values of other kinds: lmms-eval reads it as "
                    "a value. Write all of the column as texts",
                )
            return
        for one in _leaves(value, self._too_deep(at)):
            if isinstance(one, float) and not _is_exact(one):
                self._refuse(
                    at,
                    f"the fraction {one!r} among values of several kinds or objects with "
                    "different keys: lmms-eval reads it inexactly. Give all values of the column "
                    "one kind, and objects the same keys",
                )

    def check_chunks(self, rows: Sequence[Mapping[str, Any]], chunks: Sequence[range]) -> Kind:
        """The kind that the first chunk gives to all.

        Raises:
            DataError: another chunk has another one.
        """
        kinds = [
            _Column(self.name, self.place, self.array).read(
                [(at, rows[at].get(self.name)) for at in chunk]
            )[0]
            for chunk in chunks
        ]
        for chunk, kind in zip(chunks, kinds, strict=True):
            if not _fits(kind, kinds[0]):
                self._refuse(
                    chunk[0],
                    f"{_words(kind)} from here on, but {_words(kinds[0])} in the first "
                    f"{CHUNK_BYTES:,} bytes, from which lmms-eval takes the type of all. Write "
                    "them alike (1.0 instead of 1), with a value in one of the first rows",
                )
        return kinds[0]

    def _too_deep(self, at: int) -> Callable[[], NoReturn]:
        return lambda: self._refuse(at, f"more than {MOST_LEVELS} lists or objects in each other")

    def _refuse(self, at: int, what: str) -> NoReturn:
        raise DataError(f"{self.place(at)}: column '{self.name}' holds {what}.")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else "object"


def _is_exact(value: float) -> bool:
    """Whether pandas' reader and writer leave a fraction as it is; known of whole ones."""
    return value.is_integer() and abs(value) < 1e15 and repr(value) != "-0.0"


def _leaves(value: Any, too_deep: Callable[[], NoReturn], level: int = 0) -> Iterator[Any]:
    if level > MOST_LEVELS:
        too_deep()
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one, too_deep, level + 1)
    else:
        yield value


def _fits(kind: Kind, first: Kind) -> bool:
    """Whether a later chunk's values come out as they are under the first one's type."""
    if kind in ("null", first) or first == "json":
        return True
    if isinstance(kind, str) or isinstance(first, str):
        return (kind, first) == ("whole", "fraction")
    if kind[0] != first[0]:
        return False
    if kind[0] == "list":
        return _fits(kind[1], first[1])
    ours, theirs = dict(kind[1]), dict(first[1])
    return ours.keys() == theirs.keys() and all(_fits(ours[key], theirs[key]) for key in ours)


def _has_json(kind: Kind) -> bool:
    if isinstance(kind, str):
        return kind == "json"
    inner = [kind[1]] if kind[0] == "list" else [one for _, one in kind[1]]
    return any(map(_has_json, inner))


def _words(kind: Kind) -> str:
    if isinstance(kind, str):
        known = {"null": "nothing", "bool": "truth values", "json": "values of several kinds"}
        return known.get(kind, f"{kind} numbers" if kind in ("whole", "fraction") else f"{kind}s")
    return "lists" if kind[0] == "list" else "objects"
