"""Tasks in lmms-eval's YAML format with local data, without lmms-eval.

A subset of the format: questions that are answered once by generation (`output_type:
generate_until`), data from one local file a split. What each key means here is what it means to
lmms-eval 0.7.3 with a chat model, so that the same file gives the same questions and scores both
ways; `LocalTask.why_not` says what in a YAML is outside the subset. Some things work here alone:

- Paths of pictures and videos are relative to the data file, in lmms-eval to the folder that it
  was started in.
- A column that doc_to_visual names may hold lists of pictures, or bare bytes, which lmms-eval
  refuses, or pictures in base64, which it takes for paths of videos. And {bytes, path} in Parquet
  is a picture even where the file does not declare it one; lmms-eval calls it a video, and where it
  has a path keeps that alone (without one, our model there knows it by its bytes).

Every cell of a CSV is text, as it stands there; lmms-eval turns columns of numbers into numbers
and reads "", "NA" or "None" as no value.

Values of JSON are those that lmms-eval sees, which gives each column one type (`task_json`): in a
column with a fraction all numbers are fractions, also within lists. Where a template would turn
one into another text than the file's (1 into 1.0), it is refused. What it would read as
something else is refused: texts that are all dates or times, where a key names the column, a
template uses it, or a function gets the rows; texts such as "7" or fractions beside values of other
kinds; more than ten decimals in a file that is one array; other types behind the first 10 MiB.

Beyond lmms-eval's keys, `metadata` may hold `version`; `id_column`, `group_column` and
`cluster_column` (see `task.Sample`); `columns`, all that the data must have; `rows`, how many there
must be, which finds files that were cut off between two lines; and `note`, a sentence that reports
say of the task.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval import INSTALL_LMMS_EVAL, task_scores
from eval.messages import generation_of, sample_of_messages
from eval.task import Metric, Sample
from eval.task_data import Rows, read_rows, refuse_times, require_column
from eval.task_messages import media_sizes, user_turn, with_media
from eval.task_metrics import match_options, metrics_of
from eval.task_template import targets_of, texts_of
from eval.task_yaml import Function, TaskYaml, did_you_mean, read_yaml, unsupported
from mmlm_efficient.errors import DataError, MediaError, MMLMError, SettingsError, UnsupportedError

# lmms-eval's, where a task says nothing.
DEFAULT_UNTIL = ("\n\n",)


class LocalTask:
    """A task that this project reads by itself; see `task.Task`.

    Samples are composed when they are asked for, from several threads if need be.

    Attributes:
        path: of the YAML.
        data_sha: 12 hex of SHA-256 over the bytes of the YAML, of what it includes, of the Python
            files beside it that it names by !function, and of the data file, whatever folder they
            lie in; and over path (as written) and size in bytes of every picture, sound or video
            that a text of the data names and that exists, seen from the data file's folder. It
            says nothing of the contents of such media, of media that only a function finds, or of
            modules that the functions import or that are named by !function from elsewhere.
    """

    def __init__(self, path: Path, source: str | None = None) -> None:
        """Read the definition and check all data.

        Args:
            path: of the YAML.
            source: where the task comes from, in words; None says its path.

        Raises:
            DataError: the definition or the data are wrong, damaged or missing.
            UnsupportedError: only lmms-eval can read it.
            MissingExtraError: Parquet data without pyarrow.
        """
        self.path = Path(path)
        self._yaml = read_yaml(self.path)
        values = self._yaml.values
        reason = unsupported(values)
        if reason is not None:
            raise UnsupportedError(
                f"{self.path}: {reason}, so that only lmms-eval can read it. Install it with: "
                f"{INSTALL_LMMS_EVAL}"
            )
        self.name = self._needed("task")
        self._metadata = _metadata(values, self.path)
        self.version = str(self._metadata.get("version", "0"))
        note = self._metadata.get("note")
        self.source = "; ".join([source or str(self.path), *([str(note)] if note else [])])
        self._given_source = source
        self._functions = {one: one.load() for one in self._yaml.functions()}
        self.metrics: tuple[Metric, ...] = metrics_of(values, str(self.path))
        self._aggregations = _aggregations(values, self._functions)
        self._generation, self._until = _generation(values, self.path)
        self._rows = read_rows(self._needed("dataset_path"), self._data_file())
        self.ids: Sequence[str] = self._checked_ids()
        self._positions = {id: position for position, id in enumerate(self.ids)}
        self._groups = self._labels("group_column")
        self._clusters = self._labels("cluster_column")
        self._texts, self._targets = self._checked_texts()
        self._check_functions()
        self.data_sha = _data_sha(self._yaml, self._rows)
        # Finds functions that fail on every row; a broken picture is this sample's own affair.
        with contextlib.suppress(MediaError):
            self.sample(self.ids[0])

    @staticmethod
    def why_not(path: Path) -> str | None:
        """What in a YAML only lmms-eval can read; None if `LocalTask` can.

        Raises:
            DataError: it is missing or not YAML.
        """
        return unsupported(read_yaml(Path(path)).values)

    def __reduce__(self) -> tuple[Any, ...]:
        # Functions of files beside the YAML cannot be pickled: another process reads them anew.
        return LocalTask, (self.path, self._given_source)

    # -- what the runner asks ----------------------------------------------------------------

    def sample(self, id: str) -> Sample:
        """One sample; its pictures are loaded, a video is named by its path.

        Raises:
            SettingsError: no such sample.
            DataError: a function of the task fails or gives something else than it should.
            MediaError: a picture cannot be read.
            UnsupportedError: several turns, a system turn, sound, several videos.
        """
        position = self._position(id)
        where = self._place(position)
        messages = self._messages(position, self._rows.row(position))
        try:
            sample = sample_of_messages(
                id,
                messages,
                self._generation,
                self._until,
                target=task_scores.plain_json(self._target(position), f"{where}: target"),
                cluster=None if self._clusters is None else self._clusters[position],
            )
        except UnsupportedError as error:
            raise UnsupportedError(f"{where}: {error}") from error
        group = None if self._groups is None else self._groups[position]
        return with_media(replace(sample, group=group), self._rows.path.parent, where)

    def score(self, id: str, answer: str) -> dict[str, Any]:
        """An item for each metric that the sample has.

        Args:
            id: of the sample.
            answer: what the model said; blanks around it are removed, as lmms-eval does.

        Raises:
            SettingsError: no such sample.
            DataError: process_results gives no item of a metric, or something that is none; or
                exact_match has a list of right answers for some samples and a text for others.
            Exception: whatever process_results raises.
        """
        position = self._position(id)
        where = f"{self._place(position)}: score"
        function = self._yaml.values.get("process_results")
        if function is None:
            options = match_options(self._yaml.values)
            targets = self._text_targets(self._target(position), where)
            return {self.metrics[0].name: task_scores.exact_match(answer, targets, **options)}
        try:
            items = self._functions[function](self._scored_row(position), [answer.strip()])
        except SystemExit as error:
            raise DataError(f"{where}: !function {function.text} wants to exit.") from error
        if not isinstance(items, Mapping):
            raise DataError(f"{where}: {function.text} gave {items!r:.80}, not a mapping.")
        # Some tasks (such as MME) have metrics that belong to a part of their samples only.
        found = [metric for metric in self.metrics if metric.name in items]
        if not found:
            raise DataError(
                f"{where}: process_results gave {', '.join(map(str, items)) or 'nothing'}, none "
                f"of metric_list: {', '.join(metric.name for metric in self.metrics)}."
            )
        return {metric.name: self._item(metric, items, where) for metric in found}

    def aggregate(self, metric: str, items: Sequence[Any]) -> float:
        """The figure of a metric.

        Raises:
            SettingsError: no such metric.
            DataError: no items, or the task's function fails or gives no number.
        """
        if metric not in self._aggregations:
            known = [one.name for one in self.metrics]
            raise SettingsError(
                f"{self.name}: has no metric '{metric}'; it has {', '.join(known)}."
                f"{did_you_mean(metric, known)}"
            )
        if len(items) == 0:
            raise DataError(f"{self.name}: no sample has a {metric} to aggregate.")
        try:
            figure = self._aggregations[metric](copy.deepcopy(list(items)))
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self.name}: the aggregation of {metric} fails: {type(error).__name__}: {error}"
            ) from error
        return task_scores.number(figure, f"{self.name}: figure of {metric}")

    # -- parts -------------------------------------------------------------------------------

    def _needed(self, key: str) -> str:
        value = self._yaml.values.get(key)
        if not isinstance(value, str) or not value:
            raise DataError(f"{self.path}: needs `{key}:` with a text, it has {value!r}.")
        return value

    def _data_file(self) -> Path:
        """The file of the test split."""
        split = self._needed("test_split")
        given = self._yaml.values.get("dataset_kwargs", {}).get("data_files", {})
        if given is None or (isinstance(given, Mapping) and given.get(split, "") is None):
            raise DataError(
                f"{self.path}: data_files: names no file. Write data_files: {{{split}: FILE}}."
            )
        # A file that is given alone is the split "train" to `datasets`.
        files: dict[str, str] = {"train": given} if isinstance(given, str) else given
        if split not in files:
            known = [str(name) for name in files]
            raise DataError(
                f"{self.path}: test_split is '{split}', but data_files names "
                f"{', '.join(known) or 'none'}. Write data_files: {{{split}: FILE}}."
                f"{did_you_mean(split, known)}"
            )
        return self.path.parent / files[split]

    def _checked_ids(self) -> list[str]:
        rows, wanted = self._rows, self._metadata.get("rows")
        if wanted is not None and wanted != len(rows):
            raise DataError(
                f"{rows.path}: has {len(rows):,} rows, but metadata.rows of {self.path} says "
                f"{wanted:,}. The file is cut off or of another version."
            )
        for name in self._metadata.get("columns", []):
            require_column(rows, name, "metadata.columns")
        column = self._metadata.get("id_column")
        if column is None:
            return [str(position) for position in range(len(rows))]
        require_column(rows, column, "metadata.id_column")
        seen: dict[str, int] = {}
        for position, value in enumerate(rows.column(column)):
            whole = isinstance(value, str | int) and not isinstance(value, bool)
            if not whole or not str(value).strip():
                raise DataError(
                    f"{rows.place(position)}: id {value!r:.40} in column '{column}' must be "
                    "a text or a whole number."
                )
            if str(value) in seen:
                raise DataError(
                    f"{rows.place(position)}: id '{value}' in column '{column}' occurs already in "
                    f"{rows.place(seen[str(value)])}. Ids must differ."
                )
            seen[str(value)] = position
        return list(seen)

    def _labels(self, key: str) -> list[str | None] | None:
        column = self._metadata.get(key)
        if column is None:
            return None
        require_column(self._rows, column, f"metadata.{key}", full=False)
        values = self._rows.column(column)
        return [None if value in (None, "") else str(value) for value in values]

    def _checked_texts(self) -> tuple[list[str] | None, list[Any] | None]:
        """Texts and targets of all rows, as far as no function makes them."""
        values, rows = self._yaml.values, self._rows
        for key in ("doc_to_text", "doc_to_target"):
            if key not in values:
                raise DataError(f"{self.path}: needs `{key}:`, a column, template or !function.")
        if isinstance(values.get("doc_to_visual"), str):
            require_column(rows, values["doc_to_visual"], "doc_to_visual")
        text, target = values["doc_to_text"], values["doc_to_target"]
        texts = texts_of(rows, text, "doc_to_text") if isinstance(text, str) else None
        targets = targets_of(rows, target, "doc_to_target") if isinstance(target, str) else None
        if "process_results" not in values:
            for position, one in enumerate(targets or ()):
                many = targets is not None and isinstance(targets[0], list)
                _texts_in(one, f"{rows.place(position)}: target", many)
        return texts, targets

    def _check_functions(self) -> None:
        """Functions may look at every column that they get."""
        for key, value in self._yaml.values.items():
            if isinstance(value, Function):
                used = list(self._rows.times)
                refuse_times(self._rows, used, f"{key} (!function {value.text})")

    def _position(self, id: str) -> int:
        if id not in self._positions:
            raise SettingsError(f"{self.name}: has no sample '{id}'.{did_you_mean(id, self.ids)}")
        return self._positions[id]

    def _place(self, position: int) -> str:
        return self._rows.place(position)

    def _scored_row(self, position: int) -> dict[str, Any]:
        """A row as functions that score get it."""
        if self._yaml.values.get("process_results_use_image", False):
            return self._rows.row(position)
        return self._rows.bare_row(position)

    def _messages(self, position: int, row: dict[str, Any]) -> Any:
        """What is said to the model, in lmms-eval's words."""
        values = self._yaml.values
        if "doc_to_messages" in values:
            return self._made(values["doc_to_messages"], position, row)
        visual, where = values.get("doc_to_visual"), self._place(position)
        if isinstance(visual, str):
            where, shown = f"{where}, column '{visual}'", row[visual]
            shown = shown if isinstance(shown, list) else [shown]
        else:
            shown = None if visual is None else self._made(visual, position, row)
        # As in lmms-eval, after the visuals and from the same row.
        return user_turn(self._text(position, row), shown, where)

    def _text(self, position: int, row: dict[str, Any]) -> str:
        if self._texts is not None:
            return self._texts[position]
        text = self._made(self._yaml.values["doc_to_text"], position, row)
        if not isinstance(text, str):
            raise DataError(
                f"{self._place(position)}: doc_to_text gave {text!r:.80}, which is no text."
            )
        return text

    def _target(self, position: int) -> Any:
        if self._targets is not None:
            return self._targets[position]
        row = self._scored_row(position)
        return self._made(self._yaml.values["doc_to_target"], position, row)

    def _text_targets(self, target: Any, where: str) -> list[str]:
        """The right answers that exact_match compares with."""
        return _texts_in(target, where, isinstance(self._target(0), list))

    def _made(self, function: Function, position: int, row: dict[str, Any]) -> Any:
        """What a function of the task makes of a row; its failure is one of the data."""
        try:
            return self._functions[function](row)
        except MMLMError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"{self._place(position)}: !function {function.text} of {self.path} fails: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _item(self, metric: Metric, items: Mapping[str, Any], where: str) -> Any:
        if metric.aggregation == "mean":
            return task_scores.number(items[metric.name], f"{where}: {metric.name}")
        return task_scores.plain_json(items[metric.name], f"{where}: {metric.name}")


def _texts_in(target: Any, where: str, many: bool) -> list[str]:
    """The right answers in a target; many says whether the first row's is a list."""
    if isinstance(target, list) != many:
        kinds = ("a list", "not one") if many else ("no list", "one")
        raise DataError(
            f"{where}: the target of the first row is {kinds[0]}, this one is {kinds[1]}: "
            f"{target!r:.80}. lmms-eval scores all samples as the first one, so write lists "
            "everywhere, or nowhere."
        )
    targets = target if isinstance(target, list) else [target]
    if not targets or not all(isinstance(one, str) for one in targets):
        if many:
            raise DataError(
                f"{where}: {target!r:.80} is a list that holds more than texts, or nothing, and "
                "exact_match compares texts. A template's text in brackets is read as a list: "
                'write texts into it, such as ["1", "2"], or name the column without {{}}.'
            )
        raise DataError(
            f"{where}: {target!r:.80} is no text, and exact_match compares texts. Write the "
            'target as a template, such as "{{answer}}", or as texts in the data.'
        )
    if not all(one.strip() for one in targets):
        raise DataError(
            f"{where}: is empty, and no answer would be right. Fill it in or remove the row."
        )
    return targets


def _metadata(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    given = values.get("metadata", {})
    merged: dict[str, Any] = {}
    for part in given if isinstance(given, list) else [given]:  # old tasks write a list
        if not isinstance(part, Mapping):
            raise DataError(f"{path}: metadata: expected a mapping, got {part!r:.80}.")
        merged.update(part)
    if isinstance(given, list) and "id_column" in merged:
        # lmms-eval passes only mappings on to models, and our model there needs it for its ids.
        raise DataError(f"{path}: metadata: is a list; with id_column, write it as a mapping.")
    for key in ("id_column", "group_column", "cluster_column", "note"):
        if not isinstance(merged.get(key, ""), str):
            raise DataError(f"{path}: metadata.{key}: expected a text, got {merged[key]!r:.80}.")
    columns = merged.get("columns", [])
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise DataError(f"{path}: metadata.columns: expected a list of columns, got {columns!r}.")
    if not isinstance(merged.get("rows", 1), int):
        raise DataError(f"{path}: metadata.rows: expected a whole number, got {merged['rows']!r}.")
    return merged


def _generation(values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments of generate(), and texts that end an answer: an empty line unless told."""
    try:
        return generation_of({"until": DEFAULT_UNTIL, **values.get("generation_kwargs", {})})
    except SettingsError as error:
        raise DataError(f"{path}: generation_kwargs: {error}") from error


def _aggregations(
    values: Mapping[str, Any], functions: Mapping[Function, Callable[..., Any]]
) -> dict[str, Callable[[Sequence[Any]], Any]]:
    """By metric, what makes the figure of its items."""
    found: dict[str, Callable[[Sequence[Any]], Any]] = {}
    for metric in values.get("metric_list", [{"metric": "exact_match"}]):
        how = metric.get("aggregation", "mean")
        if not isinstance(how, Function):
            found[metric["metric"]] = task_scores.mean
            continue
        if "args" in task_scores.parameters_of(functions[how]):
            raise UnsupportedError(
                f"!function {how.text} of {how.folder}: takes `args`, lmms-eval's command line, "
                "so that only lmms-eval can run it."
            )
        found[metric["metric"]] = functions[how]
    return found


def _data_sha(definition: TaskYaml, rows: Rows) -> str:
    beside = {function.file.name: function.file for function in definition.functions()}
    files = [beside[name] for name in sorted(beside) if beside[name].is_file()]
    digest = hashlib.sha256()
    for file in (*definition.files, *files, rows.path):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    for name, size in media_sizes(rows.texts(), rows.path.parent):
        digest.update(json.dumps([name, size]).encode())
    return digest.hexdigest()[:12]
