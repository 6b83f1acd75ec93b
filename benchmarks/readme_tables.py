"""Writes the generated tables of README and docs, from result files and from the code.

A table stands between two marks; everything between them is replaced::

    <!-- table:pocket_accuracy -->
    <!-- /table -->

    python -m benchmarks.readme_tables            # write
    python -m benchmarks.readme_tables --check    # fail when something is out of date

A table whose result file does not exist yet stays empty. Marks ``code:PATH`` and ``/code`` show a
whole file of the repository in the same way.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from benchmarks import var_tables
from benchmarks.common import RESULTS, ROOT, read_json
from mmlm_efficient.families import FAMILIES
from mmlm_efficient.files import write_text
from mmlm_efficient.machine import MIB, machine_line
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.registry import METHODS
from mmlm_efficient.pruning.support import matrix

_MARKED = re.compile(
    r"(?P<open><!-- table:(?P<name>\w+) -->\n)(?P<body>.*?)(?P<close><!-- /table -->)", re.DOTALL
)
_CODE = re.compile(
    r"(?P<open><!-- code:(?P<path>[\w./]+) -->\n)(?P<body>.*?)(?P<close><!-- /code -->)", re.DOTALL
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the tables.

    Returns:
        0, or 1 when a mark is unknown or (with --check) a table is out of date.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    parser.add_argument("files", nargs="*", type=Path, help="default: README.md and docs/**/*.md")
    options = parser.parse_args(argv)
    stale = []
    for path in options.files or documents():
        before = path.read_text(encoding="utf-8")
        try:
            after = with_tables(before)
        except KeyError as error:
            print(f"{path}: {error.args[0]}", file=sys.stderr)
            return 1
        if after != before:
            stale.append(path)
            if not options.check:
                write_text(path, after)
    for path in stale:
        print(f"{path}: {'out of date' if options.check else 'written'}")
    if stale and options.check:
        print("Write them: python -m benchmarks.readme_tables", file=sys.stderr)
        return 1
    return 0


def documents() -> list[Path]:
    """The files that may hold tables."""
    readme = ROOT / "README.md"
    return [*([readme] if readme.is_file() else []), *sorted((ROOT / "docs").rglob("*.md"))]


def with_tables(text: str) -> str:
    """A document with its tables as they should be.

    Raises:
        KeyError: a mark names no table or no file.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise KeyError(f"unknown table '{name}'; there are {', '.join(TABLES)}")
        return match["open"] + TABLES[name]() + match["close"]

    def shown(match: re.Match[str]) -> str:
        path = ROOT / match["path"]
        if not path.is_file():
            raise KeyError(f"no file {match['path']}")
        code = path.read_text(encoding="utf-8")
        return f"{match['open']}```python\n{code}```\n{match['close']}"

    return _CODE.sub(shown, _MARKED.sub(replaced, text))


# -- tables ----------------------------------------------------------------------------------


def methods() -> str:
    """What there is to choose from, from the registry."""
    rows = [
        [
            f"`{name}`",
            _what(method),
            _linked(method.paper),
            ", ".join(method.stations) or "none",
            "all" if method.families == "all" else ", ".join(method.families),
        ]
        for name, method in METHODS.items()
    ]
    return _table(["method", "what it does", "paper", "stations", "families"], rows)


def method_settings(name: str) -> str:
    """The fields of a method."""
    rows = [
        [f"`{field}`", _default(info), _described(info)]
        for field, info in METHODS[name].model_fields.items()
    ]
    return _table(["setting", "default", "what"], rows)


def method_facts() -> str:
    """What every method needs, and what its budget counts."""
    rows = []
    for name, method in METHODS.items():
        if issubclass(method, PruningMethod):
            rows.append(
                [
                    f"[`{name}`](methods/{name}.md)" if _has_page(name) else f"`{name}`",
                    method.looks_at,
                    "yes" if method.sees_prompt else "no",
                    "yes" if method.merges else "no",
                    method.default_positions,
                    method.budget_counts,
                ]
            )
    head = ["method", "looks at", "sees the prompt", "merges", "positions", "the budget counts"]
    return _table(head, rows)


def method_matrix() -> str:
    """Methods x families, from the code."""
    head = ["method", *(f"`{family.name}`" for family in FAMILIES)]
    return _table(head, [[f"`{name}`", *cells] for name, *cells in matrix(METHODS)])


def _has_page(name: str) -> bool:
    return (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def pocket_methods() -> str:
    """Accuracy, tokens, time and memory of all methods on pocket."""
    path = RESULTS / "pocket_methods.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    unpruned, *pruned = result["rows"]
    ratios = sorted({row["keep_ratio"] for row in pruned}, reverse=True)
    found = {(row["method"], row["keep_ratio"]): row for row in pruned}
    rows = [["unpruned", _methods_cell(unpruned), *[""] * (len(ratios) - 1)]]
    for method in dict.fromkeys(row["method"] for row in pruned):
        rows.append([method, *(_methods_cell(found.get((method, ratio))) for ratio in ratios)])
    head = ["method", *(f"budget {100 * ratio:g} %" for ratio in ratios)]
    return _table(head, rows) + (
        "\nShare of right answers; in brackets the visual tokens entering a decoder layer, mean "
        "over the layers. Methods that cut inside the decoder spend more than their nominal budget "
        f"in the layers before the cut. {result['scenes']:,} held-out scenes, "
        f"{result['questions']:,} questions; intervals, prefill times and KV bytes are in "
        f"`{_shown(path)}`. {machine_line(result)}.\n"
    )


def pocket_methods_full() -> str:
    """Everything that was measured of all methods on pocket, one row per budget."""
    path = RESULTS / "pocket_methods.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    equal = {(one["method"], one["keep_ratio"]): one for one in result["to_random_at_equal_tokens"]}
    random = {(one["method"], one["keep_ratio"]): one for one in result["to_random"]}
    rows = []
    for row in result["rows"]:
        key = (row["method"], row["keep_ratio"])
        low, high = (100 * end for end in row["overall"]["interval"])
        rows.append(
            [
                row["method"],
                f"{100 * row['keep_ratio']:g} %",
                f"{_percent(row['overall']['accuracy'])} ({low:.1f} to {high:.1f})",
                _points(random.get(key)),
                _points(equal.get(key)),
                f"{row['mean_decoder_tokens']:.1f}",
                f"{row['final_tokens']:.0f}",
                f"{row['prefill_ms']:.1f}",
                f"{row['kv_bytes'] / 1024:.0f}",
            ]
        )
    head = ["method", "budget", "right answers", "to random, same budget"]
    head += ["to random, same tokens", "tokens per layer", "in the last", "prefill ms", "KV KiB"]
    return _table(head, rows) + (
        f"\nDifferences in points. {result['timing']}. {result['scenes']:,} held-out scenes, "
        f"{result['questions']:,} questions. {machine_line(result)}; from `{_shown(path)}`.\n"
    )


def fastv_layers() -> str:
    """FastV at one budget, by the layer that it cuts before."""
    path = RESULTS / "pocket_fastv_layers.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    kinds = ("list", "where_is", "how_many")
    rows = [
        [
            f"`FastV(keep_ratio=0.25, {row['method'].partition(':')[2]})`",
            f"{row['mean_decoder_tokens']:.0f}",
            _percent(row["overall"]["accuracy"]),
            *(_percent(row["kinds"][kind]["accuracy"]) for kind in kinds),
        ]
        for row in result["rows"]
        if row["method"].startswith("fastv")
    ]
    head = ["setting", "tokens per layer", "right answers", *(f"`{kind}`" for kind in kinds)]
    return _table(head, rows) + (
        f"\n{result['scenes']:,} held-out scenes. {machine_line(result)}; from `{_shown(path)}`.\n"
    )


def _points(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{100 * one['difference']:+.1f}"


def _methods_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{_percent(row['overall']['accuracy'])} ({row['mean_decoder_tokens']:.0f})"


def methods_cost() -> str:
    """Prefill and memory of all methods on pocket, and on a model of middle size."""
    parts = []
    path = RESULTS / "methods_prefill.json"
    if path.is_file():
        result = read_json(path)
        rows = [
            [
                row["method"],
                f"{100 * row['keep_ratio']:g} %",
                f"{row['mean_decoder_tokens']:.0f}",
                f"{row['prefill_ms']:.0f}",
                f"{row['pruning_before_ms']:.0f}",
                f"{row['prefill_speed_up']:.2f}x",
                f"{row['flop_speed_up']:.2f}x",
                f"{row['measured_to_flops']:.2f}",
                f"{row['kv_bytes'] / MIB:.1f}",
            ]
            for row in result["rows"]
        ]
        head = ["method", "budget", "tokens per layer", "prefill ms", "of it pruning before"]
        head += ["faster", "by FLOPs", "ratio", "KV MiB"]
        parts.append(_table(head, rows))
        parts.append(
            f"{result['model']}; {result['text_tokens']} text tokens; {result['dtype']}; random "
            f"weights. {machine_line(result)}; from `{_shown(path)}`.\n"
        )
    return "\n".join(parts)


def calibration_bench() -> str:
    """What calibrating VFlowOpt costs."""
    path = RESULTS / "calibration_bench.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    rows = [
        [
            one["candidate"],
            f"{one['cached']['median_s']:.3f}",
            f"{one['recomputed']['median_s']:.3f}",
            f"{one['recomputed_to_cached']['of_medians']:.1f}x",
        ]
        for one in result["candidates"]
    ]
    whole = result["search"]
    return _table(["candidate", "remembering, s", "recomputing, s", "cheaper"], rows) + (
        f"\n{result['samples']} samples of pocket, budget {result['budget']:g}. A whole search of "
        f"{whole['evaluations']} evaluations took {whole['seconds']:.0f} s. "
        f"{machine_line(result)}; from `{_shown(path)}`.\n"
    )


def pocket_accuracy() -> str:
    """Accuracy by method, position rule and tokens kept."""
    path = RESULTS / "pocket_accuracy.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    unpruned = result["rows"][0]
    pruned = result["rows"][1:]
    budgets = sorted({row["keep_tokens"] for row in pruned}, reverse=True)
    groups = dict.fromkeys((row["method"], row["position_ids"]) for row in pruned)
    found = {(row["method"], row["position_ids"], row["keep_tokens"]): row for row in pruned}
    rows = [["unpruned", "", _percent(unpruned["overall"]["accuracy"]), *[""] * len(budgets)]]
    for method, positions in groups:
        cells = [_accuracy(found.get((method, positions, tokens))) for tokens in budgets]
        rows.append([method, positions, "", *cells])
    head = ["method", "position ids", f"{unpruned['keep_tokens']} tokens", *map(str, budgets)]
    return _table(head, rows) + (
        f"\nShare of right answers, in brackets the difference to unpruned in points. "
        f"{result['scenes']:,} held-out scenes, {result['questions']:,} questions; 95 % intervals "
        f"and every question kind are in `{_shown(path)}`. {machine_line(result)}.\n"
    )


def flowcut_bench() -> str:
    """Time and memory, from the CPU's result file and the GPU's if there is one."""
    parts = []
    for name in ("flowcut_bench.json", "flowcut_bench_gpu.json"):
        path = RESULTS / name
        if path.is_file():
            result = read_json(path)
            parts += [_tower(result["tower"])] if "tower" in result else []
            parts += [_prefill(result["prefill"])] if "prefill" in result else []
            parts.append(f"Random weights. {machine_line(result)}; from `{_shown(path)}`.\n")
    return "\n".join(parts)


def var_attention() -> str:
    """Time and memory of VAR beside SDPA and eager VAR."""
    return _of_result("var_attention", var_tables.attention)


def pocket_var() -> str:
    """Accuracy of pocket with and without VAR."""
    return _of_result("pocket_var", var_tables.pocket)


def _of_result(name: str, made: Callable[[Mapping[str, Any]], var_tables.Table]) -> str:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return ""
    result = read_json(path)
    table = made(result)
    note = f"\n{table.note} {machine_line(result)}; from `{_shown(path)}`.\n"
    return _table(table.head, table.rows) + note


TABLES: dict[str, Callable[[], str]] = {
    "methods": methods,
    "method_facts": method_facts,
    "method_matrix": method_matrix,
    "pocket_accuracy": pocket_accuracy,
    "pocket_methods": pocket_methods,
    "pocket_methods_full": pocket_methods_full,
    "fastv_layers": fastv_layers,
    "methods_cost": methods_cost,
    "calibration_bench": calibration_bench,
    "flowcut_bench": flowcut_bench,
    "var_attention": var_attention,
    "pocket_var": pocket_var,
    **{f"{name}_settings": functools.partial(method_settings, name) for name in METHODS},
}


# -- parts -----------------------------------------------------------------------------------


def _tower(part: Mapping[str, Any]) -> str:
    size = part["tower"]
    patches = (size["image_px"] // size["patch_px"]) ** 2
    rows = [
        [
            f"seconds, {_attention(case['contrast'])}",
            f"{case['stock']['median_s']:.3f}",
            f"{case['flowcut']['median_s']:.3f}",
            f"{case['time_ratio']['of_medians']:.3f}",
        ]
        for case in part["cases"]
    ]
    tensors = part["memory"]["tensors"]
    rows.append(
        [
            "peak MiB beyond the weights",
            f"{tensors['stock_bytes'] / MIB:.1f}",
            f"{tensors['flowcut_bytes'] / MIB:.1f}",
            f"{1 + tensors['extra']:.3f}",
        ]
    )
    title = f"tower of {size['layers']} layers, {part['keep_tokens']} of {patches} tokens kept"
    return _table([title, "stock", "FlowCut", "ratio"], rows)


def _attention(contrast: float) -> str:
    if contrast == 1.0:
        return "even attention (the dearest case)"
    return f"attention sharpened x{contrast:g}"


def _prefill(part: Mapping[str, Any]) -> str:
    rows = [
        [
            str(case["visual_tokens"]),
            f"{case['tower']['median_s']:.3f}",
            f"{case['prefill']['median_s']:.3f}",
            f"{case['prefill_speed_up']:.2f}x",
            f"{case['flop_speed_up']:.2f}x",
            f"{case['first_token_speed_up']:.2f}x",
            f"{case['decode_speed_up']:.2f}x",
            f"{case['kv_bytes'] / MIB:.1f}",
        ]
        for case in part["cases"]
    ]
    head = ["visual tokens", "tower s", "prefill s", "prefill faster", "by FLOPs"]
    head += ["first token faster", "each further token faster", "KV cache MiB"]
    note = f"\nPrefill: {part['scale']}; {part['text_tokens']} text tokens; {part['dtype']}.\n"
    return _table(head, rows) + note


def _what(method: type[Method]) -> str:
    """First paragraph of the method's file."""
    text = inspect.getdoc(inspect.getmodule(method)) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _linked(paper: str) -> str:
    """The arXiv number as a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value!r}`"


def _described(field: FieldInfo) -> str:
    """Description, and the allowed words where there are some."""
    words = [arg for arg in get_args(field.annotation) if isinstance(arg, str)]
    text = field.description or ""
    return f"{text}; one of {', '.join(f'`{word}`' for word in words)}" if words else text


def _accuracy(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    difference = 100 * row["to_unpruned"]["difference"]
    return f"{_percent(row['overall']['accuracy'])} ({difference:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
