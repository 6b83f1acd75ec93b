"""Rows of an evaluation: from what a config or a command line writes to checked methods.

A row is one way to run the model, with a label that names it in every table:

| written | row |
|---|---|
| `none` | the stock model |
| `flowcut:64`, `flowcut:0.25` | one method with its budget |
| `flowcut` with `budgets: [0.5, 0.25]` | two rows |
| `flowcut:72+fastv:36`, or a list | one row of two methods |
| `flowcut:64(position_ids=original)`, or a mapping | a method with further settings |
| `{label: tuned, methods: [...]}` | a label of one's own |

Labels can be written back as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from eval.row_files import file_digests
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import check_methods
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.registry import METHODS, method_class
from mmlm_efficient.settings import as_method, refuse_unknown

Budget: TypeAlias = int | float

STOCK = "none"

_BUDGET_FIELDS = ("keep_tokens", "keep_ratio")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_PART = re.compile(r"(?P<name>[^:()]+)(?::(?P<budget>[^()]*))?(?:\((?P<fields>.*)\))?")


@dataclass(frozen=True)
class Row:
    """One row of a table of results.

    Attributes:
        label: unique in its run.
        methods: what the row runs; none at all is the stock model.
        missing: why this version cannot run the row, in words; None when it can.
        given: name and written settings of each method.
    """

    label: str
    methods: tuple[Method, ...] = ()
    missing: str | None = None
    given: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """All settings of the methods by name, as JSON; of a missing row those that are written.

        Example:
            >>> rows(["random:0.5"])[1].settings["random"]["seed"]
            0
        """
        if self.missing is not None:
            return {name: dict(options) for name, options in self.given}
        return {method.name: method.model_dump(mode="json") for method in self.methods}

    def settings_on(self, model: str) -> dict[str, dict[str, Any]]:
        """`settings`, with digests of the files that they stand for, such as profile_sha: what must
        be the same for two answers of a model to be of the same row.

        Args:
            model: "pocket", a folder or a hub id; it is not loaded.

        Raises:
            SettingsError: a file that a setting names is not there.
        """
        found = self.settings
        for method in self.methods:
            found[method.name] |= file_digests(method, model)
        return found

    @property
    def budgets(self) -> tuple[Budget | None, ...]:
        """Of each method: tokens (int), a ratio (float), or None where it has no single number."""
        if self.missing is not None:
            found = [[options.get(name) for name in _BUDGET_FIELDS] for _, options in self.given]
        else:
            found = [[getattr(one, name, None) for name in _BUDGET_FIELDS] for one in self.methods]
        return tuple(
            next((one for one in pair if isinstance(one, int | float)), None) for pair in found
        )

    def to_dict(self) -> dict[str, Any]:
        """As a config writes it, with all settings."""
        methods = [{"name": name, **options} for name, options in self.settings.items()]
        return {"label": self.label, "methods": methods or STOCK}


@dataclass(frozen=True)
class _Part:
    """One method of a row as it was written; bare if it is a name alone."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bare: bool = False

    def with_budget(self, budget: Budget) -> _Part:
        cls = METHODS.get(self.name)
        if cls is None or _BUDGET_FIELDS[0] not in cls.model_fields:
            return self
        return _Part(self.name, dict([_budget_option(budget)]))


def rows(
    entries: Sequence[Any] | str,
    budgets: Sequence[Budget] = (),
    where: str = "methods",
    *,
    lenient: bool = False,
) -> tuple[Row, ...]:
    """The rows of a run, the stock model first.

    Args:
        entries: in any of the forms above, or a text of them with commas between.
        budgets: rows of bare names are repeated for each of them, whole numbers as tokens and
            others as ratios.
        where: how errors name the place.
        lenient: rows with a method that this version does not have are listed as missing instead
            of refused.

    Raises:
        SettingsError: unknown method or setting, methods that clash, or a label used twice.

    Example:
        >>> [row.label for row in rows(["flowcut", "divprune:8"], [0.5, 16])]
        ['none', 'flowcut:0.5', 'flowcut:16', 'divprune:8']
    """
    found = [Row(STOCK)]
    stock_listed = False
    listed = split_outside(entries, ",", where) if isinstance(entries, str) else entries
    for number, entry in enumerate(listed):
        place = f"{where}[{number}]"
        for row in _rows_of(entry, budgets, place, lenient):
            if row == found[0] and not stock_listed:
                stock_listed = True
                continue
            if any(row.label == other.label for other in found):
                raise SettingsError(
                    f"{place}: there is a row {row.label!r} already. Write it once, or give it "
                    f"another name: {{label: {row.label}-2, methods: [...]}}."
                )
            found.append(row)
    return tuple(found)


def rows_from_text(text: str) -> list[str]:
    """The entries of a text such as the command line's, for `rows` or a config's `methods`.

    Example:
        >>> rows_from_text("flowcut:64(position_ids=original, prune_interval=1),none")
        ['flowcut:64(position_ids=original, prune_interval=1)', 'none']
    """
    return split_outside(text, ",", "methods")


def budgets_from(value: Any, where: str = "budgets") -> tuple[Budget, ...]:
    """Budgets from a list or a text: whole numbers are tokens, others ratios.

    Example:
        >>> budgets_from("64,0.5"), budgets_from([1, 1.0])
        ((64, 0.5), (1, 1.0))
    """
    if isinstance(value, str):
        value = split_outside(value, ",", where)
    if not isinstance(value, list | tuple):
        value = [value]
    found = []
    for one in value:
        if isinstance(one, str):
            found.append(_budget(one, where))
        elif isinstance(one, int | float) and not isinstance(one, bool):
            found.append(one)
        else:
            raise SettingsError(
                f"{where}: {one!r} is no budget. Write whole numbers for tokens, such as 64, and "
                "decimals for shares, such as 0.25."
            )
    for one in found:
        if not (one >= 1 if isinstance(one, int) else 0.0 < one <= 1.0):
            raise SettingsError(
                f"{where}: {one!r} is out of range: tokens (whole numbers) are at least 1, shares "
                "(decimals) above 0 and at most 1.0."
            )
        if sum(type(other) is type(one) and other == one for other in found) > 1:
            raise SettingsError(f"{where}: {one!r} is there twice.")
    return tuple(found)


def split_outside(text: str, mark: str, where: str) -> list[str]:
    """Split a text at a mark, but not within brackets.

    Raises:
        SettingsError: a bracket without its other half, or nothing between two marks.

    Example:
        >>> split_outside("a,[b,c]", ",", "tasks")
        ['a', '[b,c]']
    """
    parts, open_brackets = [""], ""
    for letter in text:
        if letter in _PAIRS:
            open_brackets += _PAIRS[letter]
        elif letter in _PAIRS.values():
            if not open_brackets.endswith(letter):
                raise SettingsError(f"{where}: {text!r} has a {letter!r} that closes nothing.")
            open_brackets = open_brackets[:-1]
        if letter == mark and not open_brackets:
            parts.append("")
        else:
            parts[-1] += letter
    if open_brackets:
        raise SettingsError(f"{where}: {text!r} lacks a {open_brackets[-1]!r}.")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise SettingsError(f"{where}: {text!r} has nothing before or after a {mark!r}.")
    return parts


def _rows_of(entry: Any, budgets: Sequence[Budget], place: str, lenient: bool) -> Iterable[Row]:
    """The rows that one entry stands for."""
    label, parts = _labelled(entry, place)
    multiplied = [tuple(part.with_budget(one) for part in parts) for one in budgets]
    if not all(part.bare for part in parts) or not any(one != parts for one in multiplied):
        yield _row(label, parts, place, lenient)
        return
    for budget, budgeted in zip(budgets, multiplied, strict=True):
        own = None if label is None else f"{label}:{budget}"
        yield _row(own, budgeted, place, lenient)


def _labelled(entry: Any, place: str) -> tuple[str | None, tuple[_Part, ...]]:
    """An entry's own label, if it has one, and its methods."""
    label = None
    if isinstance(entry, Mapping) and "name" not in entry:
        refuse_unknown(entry, ("label", "methods", "name"), place)
        label, methods = entry.get("label"), entry.get("methods")
        if not isinstance(label, str) or not label.strip() or methods is None:
            raise SettingsError(
                f"{place}: {dict(entry)!r} is no row. Write {{label: tuned, methods: [flowcut:64]}}"
                " or {name: flowcut, keep_tokens: 64}."
            )
        entry = methods
    entries = entry if isinstance(entry, list | tuple) else [entry]
    parts = tuple(part for one in entries for part in _parts(one, place))
    if not parts:
        raise SettingsError(f"{place}: holds no method. Write 'none' for the stock model.")
    if len(parts) > 1 and any(part.name == STOCK for part in parts):
        raise SettingsError(f"{place}: 'none' is the stock model, alone in its row.")
    return label, parts


def _parts(entry: Any, place: str) -> Iterable[_Part]:
    if isinstance(entry, str):
        return [_text_part(text, place) for text in split_outside(entry, "+", place)]
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return [_Part(entry["name"], {name: entry[name] for name in entry if name != "name"})]
    raise SettingsError(
        f"{place}: {entry!r} is no method. Write 'flowcut:64' or {{name: flowcut, keep_tokens: 64}}"
        ", and a list of those for several in one row."
    )


def _text_part(text: str, place: str) -> _Part:
    """A method from NAME, NAME:BUDGET, and either with (SETTING=VALUE, ...)."""
    match = _PART.fullmatch(text)
    if match is None:
        raise SettingsError(
            f"{place}: cannot read {text!r}. Write NAME, NAME:64, NAME:0.25 or "
            "NAME:64(position_ids=original)."
        )
    name = match["name"].strip()
    options: dict[str, Any] = {}
    if match["budget"] is not None:
        options = dict([_budget_option(_budget(match["budget"], f"{place}: {text!r}"))])
        cls = METHODS.get(name)
        if cls is not None and not options.keys() <= cls.model_fields.keys():
            raise SettingsError(f"{place}: {name} takes no budget. Write {name!r} alone.")
    for pair in split_outside(match["fields"] or "", ",", place) if match["fields"] else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise SettingsError(f"{place}: {pair!r} in {text!r} is not SETTING=VALUE.")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"{place}: cannot read the value in {pair!r}: {error}") from error
    return _Part(name, options, bare=match["budget"] is None and match["fields"] is None)


def _row(label: str | None, parts: tuple[_Part, ...], place: str, lenient: bool) -> Row:
    """The checked row of some methods."""
    given = tuple((part.name, part.options) for part in parts)
    methods: list[Method] = []
    missing = None
    for part in parts:
        try:
            method_class(part.name)
        except SettingsError as error:
            if not lenient:
                raise SettingsError(f"{place}: {error}") from error
            missing = missing or str(error)
            continue
        try:
            methods.append(as_method({"name": part.name, **part.options}))
        except SettingsError as error:
            hint = (
                ""
                if not part.bare
                else f". Write {part.name}:0.25, or give budgets such as 0.5,0.25."
            )
            raise SettingsError(f"{place}: {error}{hint}") from error
    try:
        check_methods(methods)
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from error
    if label is None:
        label = "+".join(_label(part, methods) for part in parts)
    if missing is not None:
        return Row(label, (), missing, given)
    return Row(label, tuple(method for method in methods if method.name != STOCK))


def _label(part: _Part, methods: Sequence[Method]) -> str:
    """The compact form of a method, with the settings that it does not hold in brackets."""
    method = next((one for one in methods if one.name == part.name), None)
    options = {
        name: value if method is None else getattr(method, name)
        for name, value in part.options.items()
        if value is not None
    }
    budget = ""
    for name in _BUDGET_FIELDS:
        if isinstance(options.get(name), int | float):
            budget = f":{options.pop(name)}"
    fields = ", ".join(f"{name}={_shown(value)}" for name, value in options.items())
    return part.name + budget + (f"({fields})" if fields else "")


def _shown(value: Any) -> str:
    """A value as YAML reads it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _budget(text: str, where: str) -> Budget:
    """Tokens from a whole number, a ratio from any other; as `settings.parse_method` reads it."""
    text = text.strip()
    try:
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError as error:
        raise SettingsError(
            f"{where}: the budget {text!r} is no number. Write 64 for 64 tokens or 0.25 for a "
            "quarter of them."
        ) from error


def _budget_option(budget: Budget) -> tuple[str, Budget]:
    return _BUDGET_FIELDS[0 if isinstance(budget, int) else 1], budget
