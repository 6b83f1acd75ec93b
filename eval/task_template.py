"""Texts and targets that a task's YAML gives as a column's name or as a Jinja template.

Rendered as lmms-eval does it (`utils.apply_template`, `ConfigurableTask.doc_to_target`).
"""

from __future__ import annotations

import ast
import datetime
import re
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.meta
import jinja2.visitor
from jinja2 import nodes

from eval.task_data import Rows, refuse_numbers, refuse_times, require_column
from eval.task_yaml import did_you_mean
from mmlm_efficient.errors import DataError


def _regex_replace(text: str, pattern: str, repl: str, count: int = 0) -> str:
    """lmms-eval's only filter of its own."""
    return re.sub(pattern, repl, text, count=count)


# Values of data whose text would be Python's, not the file's.
_NO_TEXTS = (bool, bytes, datetime.date, datetime.time, datetime.timedelta)


@jinja2.pass_context
def _printed(context: Any, value: Any) -> Any:
    """What a template prints; values of the data that are no text are refused."""
    for leaf in _leaves(value):
        if leaf is None or isinstance(leaf, _NO_TEXTS):
            for name, given in context.get_all().items():
                if any(one is leaf for one in _leaves(given)):
                    what = "no value" if leaf is None else f"{leaf!r:.40}, which is no text"
                    raise DataError(
                        f"column '{name}' holds {what}. Write texts in the data, remove the row, "
                        f'or say in the template what it becomes, such as {{{{ "yes" if {name} '
                        f'else "no" }}}}.'
                    )
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


_CHECKED = "(printed)"  # no name that a template could use
# What makes a text of a value before it is printed; so does `~`.
_TEXT_FILTERS = ("join", "string", "format", "trim", "lower", "upper", "title", "capitalize")


class _Checks(jinja2.visitor.NodeTransformer):
    """Sends what becomes part of a text through `_printed`."""

    def _checked(self, node: nodes.Expr) -> nodes.Expr:
        return nodes.Filter(
            node, _CHECKED, [], [], None, None, lineno=node.lineno, environment=node.environment
        )

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node.nodes = [self._checked(one) for one in node.nodes]
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name in _TEXT_FILTERS and node.node is not None:
            node.node = self._checked(node.node)
            node.args = [self._checked(one) for one in node.args]
        return self.generic_visit(node)


class _Environment(jinja2.Environment):
    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Checks().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]


# Undefined names are errors.
_JINJA = _Environment(undefined=jinja2.StrictUndefined, finalize=_printed)
_JINJA.filters[_CHECKED] = _printed
_JINJA.filters["regex_replace"] = _regex_replace


def texts_of(rows: Rows, given: str, key: str) -> list[str]:
    """The text of every row.

    Args:
        rows: of the data file.
        given: name of a column, or a template such as "{{question}} Answer with one word."
        key: of the task's YAML, for messages.

    Raises:
        DataError: no such column, a value that is no text or empty, a template that fails.
    """
    values = _values(rows, given, key)
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(
                f"{rows.place(position)}: column '{given}' holds {value!r:.40}, which is no text, "
                f'but {key} needs one. Write it as "{{{{{given}}}}}" to turn it into text.'
            )
        if not value.strip():
            raise DataError(
                f"{rows.place(position)}: {key} gives an empty text. Fill it in or remove the row."
            )
    return values


def targets_of(rows: Rows, given: str, key: str) -> list[Any]:
    """The right answer of every row; a template that renders a list gives that list.

    Raises:
        DataError: as `texts_of`, but values of any type are allowed.
    """
    values = _values(rows, given, key)
    return values if given in rows.columns else [_maybe_list(text) for text in values]


def _values(rows: Rows, given: str, key: str) -> list[Any]:
    if given in rows.columns or re.fullmatch(r"\w+", given):
        require_column(rows, given, key)
        return rows.column(given)
    try:
        template = _JINJA.from_string(given)
        names = jinja2.meta.find_undeclared_variables(_JINJA.parse(given))
    except jinja2.TemplateError as error:
        raise DataError(f"{key}: {given!r:.80} is not a template: {error}") from error
    used = [name for name in rows.columns if name in names]
    refuse_times(rows, used, key)
    refuse_numbers(rows, used, key)
    columns = [rows.column(name) for name in used]
    texts = []
    for position in range(len(rows)):
        row = {name: column[position] for name, column in zip(used, columns, strict=True)}
        texts.append(_rendered(template, row, f"{rows.place(position)}: {key}", rows, names))
    return texts


def _rendered(
    template: jinja2.Template, row: dict[str, Any], where: str, rows: Rows, names: set[str]
) -> str:
    try:
        return template.render(**row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except jinja2.UndefinedError as error:
        missing = sorted(names - {*rows.columns, *_JINJA.globals})
        hint = did_you_mean(missing[0], rows.columns) if missing else ""
        raise DataError(
            f"{where}: {error}. The columns: {', '.join(rows.columns)}.{hint}"
        ) from error
    except Exception as error:  # whatever the template does with a value
        raise DataError(
            f"{where}: the template fails: {type(error).__name__}: {error!s:.99}"
        ) from error


def _maybe_list(text: str) -> Any:
    if text[:1] == "[" and text[-1:] == "]":
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
    return text
