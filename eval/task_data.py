"""Rows of a task's local data file: JSON, CSV or Parquet, checked before anything uses them."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eval import task_json
from eval.task_yaml import did_you_mean
from mmlm_efficient.errors import DataError, MediaError, require_extra
from mmlm_efficient.media import load_image


class Rows(Protocol):
    """A data file.

    Attributes:
        path: the file.
        columns: names, in order.
        times: columns of texts that lmms-eval turns into times, with the position of one.
        numbers: columns with a number that is no longer as it is written, see `task_json.Typed`.
    """

    path: Path
    columns: tuple[str, ...]
    times: Mapping[str, int]
    numbers: Mapping[str, task_json.Rewritten]

    def __len__(self) -> int: ...

    def row(self, position: int) -> dict[str, Any]:
        """One row, the caller's own; stored pictures are Pillow images, as in lmms-eval.

        Raises:
            MediaError: a stored picture cannot be read.
        """
        ...

    def bare_row(self, position: int) -> dict[str, Any]:
        """One row, the caller's own, without the columns that are stored pictures."""
        ...

    def texts(self) -> Iterator[str]:
        """Texts of all rows, of which some may be paths."""
        ...

    def column(self, name: str) -> list[Any]:
        """All values of a column; None where there is none."""
        ...

    def first_empty(self, name: str) -> int | None:
        """Position of the first row without a value in this column."""
        ...

    def place(self, position: int) -> str:
        """File and line of a row, for messages."""
        ...


def read_rows(kind: str, path: Path) -> Rows:
    """Read a data file.

    Args:
        kind: "json" (an array, or one object a line), "csv" or "parquet".
        path: of the file.

    Raises:
        DataError: missing, empty, cut off, damaged, or without rows.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Give one {kind} file under data_files.")
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*") if other.is_file()]
        raise DataError(
            f"{path}: there is no such data file.{did_you_mean(path.name, others)} Check "
            "data_files; its paths are relative to the task's YAML."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes). Get it again from where it came from.")
    rows: Rows = ParquetRows(path) if kind == "parquet" else _TEXT_READERS[kind](path)
    if len(rows) == 0:
        raise DataError(f"{path}: has no rows. A task needs at least one.")
    return rows


def require_column(rows: Rows, name: str, wanted_by: str, *, full: bool = True) -> None:
    """Check that a column is there, has a value in every row, and is read alike by lmms-eval.

    Args:
        rows: of the data file.
        name: of the column.
        wanted_by: the key of the task's YAML that names it.
        full: whether every row must have a value.

    Raises:
        DataError: it is missing, a row has no value, or its texts are times to lmms-eval.
    """
    if name not in rows.columns:
        raise DataError(
            f"{rows.path}: has no column '{name}', which {wanted_by} names. Its columns: "
            f"{', '.join(rows.columns)}.{did_you_mean(name, rows.columns)}"
        )
    refuse_times(rows, [name], wanted_by)
    empty = rows.first_empty(name) if full else None
    if empty is not None:
        raise DataError(
            f"{rows.place(empty)}: no value in column '{name}', which {wanted_by} names. "
            "Fill it in or remove the row."
        )


def refuse_times(rows: Rows, names: Sequence[str], used_by: str) -> None:
    """Refuse columns whose texts are times to lmms-eval.

    Args:
        rows: of the data file.
        names: columns that are used.
        used_by: the key of the task's YAML that uses them.

    Raises:
        DataError: naming the first one.
    """
    for name in names:
        if name in rows.times:
            raise DataError(
                f"{rows.place(rows.times[name])}: column '{name}', which {used_by} uses, holds "
                "nothing but dates or times there, which lmms-eval reads as such: the text "
                "2020-01-02 becomes 2020-01-02 00:00:00. Write them otherwise, such as 2 January "
                "2020, or take the column out."
            )


def refuse_numbers(rows: Rows, names: Sequence[str], used_by: str) -> None:
    """Refuse columns with a number whose text is no longer the file's.

    Args:
        rows: of the data file.
        names: columns that become text.
        used_by: the key of the task's YAML that uses them.

    Raises:
        DataError: naming the first one.
    """
    for name in names:
        if name in rows.numbers:
            at, written, read = rows.numbers[name]
            raise DataError(
                f"{rows.place(at)}: column '{name}', which {used_by} turns into text, holds the "
                f"number {written:.40}, which would become {read:.40}: numbers of a column are "
                "read alike, as lmms-eval does. Write the numbers of this column as texts, in "
                "quotes."
            )


class ListRows:
    """Rows of a text file."""

    def __init__(
        self,
        path: Path,
        rows: Sequence[dict[str, Any]],
        lines: Sequence[int] | None,
        found: task_json.Typed | None = None,
        nothing: str | None = None,
    ) -> None:
        """Take rows that may lack some keys.

        Args:
            path: of the file.
            rows: name of column to value.
            lines: line of each row, from 1; None where a row has no line of its own.
            found: what is known of the columns of a JSON file.
            nothing: the value that stands for none.
        """
        self.path = path
        self.times: Mapping[str, int] = found.times if found else {}
        self.numbers: Mapping[str, task_json.Rewritten] = found.numbers if found else {}
        self._nothing = nothing
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row))
        self._rows = rows
        self._lines = lines

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, position: int) -> dict[str, Any]:
        row = self._rows[position]
        # Tasks may change what they get, and ask again later.
        return {name: copy.deepcopy(row.get(name)) for name in self.columns}

    def bare_row(self, position: int) -> dict[str, Any]:
        return self.row(position)

    def texts(self) -> Iterator[str]:
        return _texts(self._rows)

    def column(self, name: str) -> list[Any]:
        return [copy.deepcopy(row.get(name)) for row in self._rows]

    def first_empty(self, name: str) -> int | None:
        cells = (row.get(name) for row in self._rows)
        return next((at for at, cell in enumerate(cells) if cell == self._nothing), None)

    def place(self, position: int) -> str:
        if self._lines is None:
            return f"{self.path}, entry {position + 1}"
        return f"{self.path}, line {self._lines[position]}"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text (byte {error.start:,}). Is it of another kind than "
            "dataset_path says?"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _json_rows(path: Path) -> ListRows:
    text = _text(path)
    if text.lstrip()[:1] == "[":
        return _json_array(path, text)
    # Python's other line ends may stand within a text.
    every = text.split("\n")
    lines = [(number, line) for number, line in enumerate(every, 1) if line.strip()]
    numbers = [number for number, _ in lines]
    rows = [_json_row(path, number, line, last=number == numbers[-1]) for number, line in lines]
    found = task_json.typed(
        rows,
        lambda at: f"{path}, line {numbers[at]}",
        starts=_starts(path, every, numbers),
        gaps=len(lines) < len(every) - (every[-1] == ""),
    )
    return ListRows(path, found.rows, numbers, found)


def _starts(path: Path, every: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """The bytes that rows start at, where the file is so long that it matters."""
    if path.stat().st_size <= task_json.CHUNK_BYTES:
        return []
    starts = list(itertools.accumulate((len(line.encode()) + 1 for line in every), initial=0))
    return [starts[number - 1] for number in numbers]


def _json_row(path: Path, number: int, line: str, last: bool) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        row = task_json.parsed(line)
    except json.JSONDecodeError as error:
        kind = "the last line, is cut off or" if last else "is"
        raise DataError(
            f"{where}: {kind} not JSON ({error.msg}, column {error.colno}). "
            + (
                "The file was not copied or written to its end: get it again."
                if last
                else "Every line must be one JSON object."
            )
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object but {line[:40]!r}.")
    return row


def _json_array(path: Path, text: str) -> ListRows:
    if not text.startswith("["):
        raise DataError(
            f"{path}: has blanks before its '[', which makes lmms-eval read numbers otherwise. "
            "Remove them."
        )
    try:
        rows = task_json.parsed(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: is not JSON, or cut off ({error.msg}, column "
            f"{error.colno}). Get it again from where it came from."
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: {error}.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {number}: is not a JSON object but {row!r:.40}.")
    found = task_json.typed(rows, lambda at: f"{path}, entry {at + 1}", array=True)
    return ListRows(path, found.rows, None, found)


# More than any cell has, less than a C long on any system.
_MOST_CELL_CHARS = 2**31 - 1


def _csv_rows(path: Path) -> ListRows:
    """Every cell is text, as it stands there."""
    # Cells may hold whole pictures.
    limit = csv.field_size_limit(_MOST_CELL_CHARS)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    found: list[list[str]] = []
    lines: list[int] = []
    try:
        names = next(reader, [])
        start = reader.line_num
        for cells in reader:
            start, line = reader.line_num, start + 1
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {line}: has {len(cells)} cells, the header has {len(names)}. "
                    "Quote cells that hold commas; a short last line means that the file is cut "
                    "off."
                )
            found.append(cells)
            lines.append(line)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: is not CSV, or cut off ({error})."
        ) from error
    finally:  # the limit is the whole process's
        csv.field_size_limit(limit)
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a column name occurs twice in the header: {', '.join(names)}.")
    rows = [dict(zip(names, cells, strict=True)) for cells in found]
    return ListRows(path, rows, lines, nothing="")


_TEXT_READERS = {"json": _json_rows, "csv": _csv_rows}


class ParquetRows:
    """Rows of a Parquet file; pictures stay encoded until their row is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the file; needs pyarrow.

        Raises:
            DataError: damaged or cut off.
            MissingExtraError: pyarrow is not installed.
        """
        parquet = require_extra("pyarrow.parquet", "eval")
        arrow = require_extra("pyarrow", "eval")
        try:
            self._table = parquet.read_table(path)
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise DataError(
                f"{path}: is not Parquet, or it is damaged or cut off "
                f"({' '.join(str(error).split())[:200]}). Get it again from where it came from."
            ) from error
        self.path = path
        self.columns = tuple(self._table.column_names)
        # Times are stored as such, and numbers have no text of their own.
        self.times: Mapping[str, int] = {}
        self.numbers: Mapping[str, task_json.Rewritten] = {}
        self._pictures = _picture_columns(self._table.schema.metadata or {})
        self._bare = self._table.drop_columns(self._pictures)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def row(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(position, 1).to_pylist()[0]
        for name in self._pictures:
            try:
                row[name] = _decoded(row[name])
            except MediaError as error:
                raise MediaError(f"{self.place(position)}, column '{name}': {error}") from error
        return row

    def bare_row(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self._bare.slice(position, 1).to_pylist()[0]
        return row

    def texts(self) -> Iterator[str]:
        compute = require_extra("pyarrow.compute", "eval")
        for column in self._table.columns:
            while str(column.type).startswith("list<"):
                column = compute.list_flatten(column)
            # Of pictures the path alone: their bytes may be all that the file has.
            if "binary" in str(column.type) and "path: string" in str(column.type):
                column = compute.struct_field(column, "path")
            if "binary" not in str(column.type):
                yield from _texts(column.to_pylist())

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self._table.column(name).to_pylist()
        return values

    def first_empty(self, name: str) -> int | None:
        column = self._table.column(name)
        if column.null_count == 0:
            return None
        return int(column.is_null().to_pylist().index(True))

    def place(self, position: int) -> str:
        return f"{self.path}, row {position + 1}"


def _picture_columns(metadata: dict[bytes, bytes]) -> list[str]:
    """Columns that `datasets` stored as pictures, alone or in lists."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):  # not written by datasets
        return []

    def is_picture(feature: Any) -> bool:
        while isinstance(feature, list):
            feature = feature[0] if feature else None
        if not isinstance(feature, dict):
            return False
        if feature.get("_type") == "Image":
            return bool(feature.get("decode", True))
        return is_picture(feature.get("feature"))

    return [name for name, feature in features.items() if is_picture(feature)]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if value is None:
        return None
    return load_image(value["path"] if value["bytes"] is None else value["bytes"])
