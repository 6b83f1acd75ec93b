"""Generated tables and shown code are up to date, and the examples of the docs run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readme_tables
from benchmarks.common import ROOT
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families import FAMILIES
from mmlm_efficient.prepare import LMMParts, check_family, prepare
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.fastv import FastV
from mmlm_efficient.pruning.registry import METHODS
from mmlm_efficient.pruning.support import matrix, support
from mmlm_efficient.sinks.var import VAR
from tests import tiny_families
from tests.tiny import IMAGE_TOKEN, batch, images, prompt, tiny_llava

ADDING = ROOT / "docs" / "adding_a_method.md"


def test_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_the_shown_method_is_the_real_file() -> None:
    shown = re.search(r"<!-- code:(\S+) -->\n```python\n(.*?)```\n", ADDING.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == "mmlm_efficient/pruning/uniform_pruning.py"
    assert shown[2] == (ROOT / shown[1]).read_text()


def test_the_registry_line_is_the_real_one() -> None:
    line = '    "uniform": UniformPruning,\n'
    assert line in ADDING.read_text()
    assert line in (ROOT / "mmlm_efficient" / "pruning" / "registry.py").read_text()


def test_the_method_of_the_docs_runs() -> None:
    code = re.search(r"<!-- run -->\n```python\n(.*?)```", ADDING.read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    inputs = batch([prompt(1, IMAGE_TOKEN, 5, 6)], images(1))
    with LMMParts(tiny_llava()) as parts, torch.no_grad():
        prepared = prepare(parts, inputs, [names["CenterPruning"](keep_tokens=4)])
    # The four middle patches of 6 x 6.
    assert prepared.report().images[0].kept.tolist() == [14, 15, 20, 21]


def test_method_table_has_every_method() -> None:
    table = readme_tables.methods()
    for name, method in METHODS.items():
        line = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(station in line for station in method.stations)
    assert "https://arxiv.org/abs/2505.19536" in table


@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_settings_table_has_every_field(name: str) -> None:
    table = readme_tables.TABLES[f"{name}_settings"]()
    assert table == readme_tables.method_settings(name)
    for setting, field in METHODS[name].model_fields.items():
        assert f"| `{setting}` |" in table
        assert field.description
        assert field.description in table


def lines_of(table: str) -> list[list[str]]:
    """The cells of a table's rows, its head left out."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]
    ]


def test_facts_table_has_every_pruning_method() -> None:
    rows = lines_of(readme_tables.method_facts())
    methods = {name: one for name, one in METHODS.items() if issubclass(one, PruningMethod)}
    assert len(rows) == len(methods)
    for row, (name, method) in zip(rows, methods.items(), strict=True):
        page = ROOT / "docs" / "methods" / f"{name}.md"
        # Whoever comes from a paper has a page with the settings.
        assert page.is_file() == bool(method.paper)
        assert row[0] == (f"[`{name}`](methods/{name}.md)" if method.paper else f"`{name}`")
        if method.paper:
            assert f"<!-- table:{name}_settings -->" in page.read_text(encoding="utf-8")
        assert row[1] == method.looks_at
        assert row[2:4] == ["yes" if one else "no" for one in (method.sees_prompt, method.merges)]
        assert row[5] == method.budget_counts


def test_matrix_covers_methods_and_families() -> None:
    head, *_ = readme_tables.method_matrix().splitlines()
    assert head == "| method | " + " | ".join(f"`{one.name}`" for one in FAMILIES) + " |"
    rows = lines_of(readme_tables.method_matrix())
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS]
    for row, method in zip(rows, METHODS.values(), strict=True):
        assert row[1:] == [support(method, family) or "no" for family in FAMILIES]


class OnlyLlava(FastV):
    """A method that knows one family."""

    name = "only_llava"
    families = ("llava",)


BUDGET = 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_matrix_says_what_the_code_does(family: Any) -> None:
    if family.name == "llava":
        model: Any = tiny_llava()
        inputs = batch([prompt(1, IMAGE_TOKEN, 5, 6)], images(1))
    else:
        model = tiny_families.tiny_model(family.name)
        inputs = tiny_families.sample_inputs(family.name, "one")
    with LMMParts(model) as parts, torch.no_grad():
        n_crops = parts.family.visuals(inputs)[0].n_crops
        for name, method in {**METHODS, OnlyLlava.name: OnlyLlava}.items():
            made = _small(method)
            words = support(method, family)
            if words is None:
                with pytest.raises(UnsupportedError, match=name):
                    check_family([made], parts.family)
                with pytest.raises(UnsupportedError, match=name):
                    prepare(parts, inputs, [made])
                continue
            prepared = prepare(parts, inputs, [made])
            with prepared.active():
                model(**prepared.model_inputs)
            image = prepared.report().images[0]
            entering, leaving = image.per_station["bridge"], image.per_station["layer"]
            assert _as_said(words, image.n_in, entering, leaving, n_crops), (name, words, image)


def _small(method: type[Method]) -> Method:
    """The method with a budget of four tokens."""
    if method is VAR:
        # Random models have no published sinks.
        return VAR(sink_dims=[3], sink_threshold=1.2, first_layer=0, min_image_mass=0.0)
    if not issubclass(method, PruningMethod):
        return method()
    if "mask" in method.model_fields:
        return method(mask=list(range(BUDGET)))
    return method(keep_tokens=BUDGET)


def _as_said(words: str, n_in: int, entering: int, leaving: int, n_crops: int) -> bool:
    """Whether the tokens that enter and leave the decoder are what the matrix says."""
    if words in ("yes", "in the decoder's attention"):
        return n_in == entering == leaving
    if words == "per image in the decoder":
        return leaving < entering == n_in
    if words.endswith("then per prompt in the decoder"):
        return 0 < leaving <= entering < n_in
    if words.endswith("per tile"):
        return n_crops > 1 and BUDGET < entering == leaving <= BUDGET * n_crops
    return entering == leaving == BUDGET


def test_a_method_that_does_not_know_a_family_is_in_the_matrix_as_no() -> None:
    (row,) = matrix({OnlyLlava.name: OnlyLlava})
    assert row == ["only_llava", "per image in the decoder", "no", "no", "no", "no"]


def test_check_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:methods -->\nstale\n<!-- /table -->\nafter\n")
    assert readme_tables.main(["--check", str(page)]) == 1
    assert "out of date" in capsys.readouterr().out
    assert "stale" in page.read_text()
    assert readme_tables.main([str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text
    assert text.startswith("before\n<!-- table:methods -->\n| method |")
    assert text.endswith("\n<!-- /table -->\nafter\n")
    assert readme_tables.main(["--check", str(page)]) == 0


@pytest.mark.parametrize(
    "mark", ["<!-- table:typo -->\n<!-- /table -->", "<!-- code:no.py -->\n<!-- /code -->"]
)
def test_unknown_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(mark)
    assert readme_tables.main([str(page)]) == 1
    assert str(page) in capsys.readouterr().err


HEAD = {
    "date": "2026-01-02 03:04 UTC",
    "versions": {"torch": "2.0"},
    "hardware": {"cpu": "A CPU", "cpu_capability": "AVX2"},
    "threads": 1,
}


def test_accuracy_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(method: str, tokens: int, positions: str, share: float) -> dict[str, Any]:
        return {
            "method": method,
            "keep_tokens": tokens,
            "position_ids": positions,
            "overall": {"accuracy": share},
            "to_unpruned": {"difference": share - 0.95},
        }

    rows = [
        row("none", 144, "compact", 0.95),
        row("flowcut", 36, "compact", 0.9),
        row("flowcut", 72, "compact", 0.94),
        row("random", 36, "original", 0.7),
    ]
    result = {**HEAD, "scenes": 1000, "questions": 6500, "rows": rows}
    table = _with_result(tmp_path, monkeypatch, "pocket_accuracy", result)
    assert "| method | position ids | 144 tokens | 72 | 36 |" in table
    assert "| unpruned |  | 95.0 % |  |  |" in table
    assert "| flowcut | compact |  | 94.0 % (-1.0) | 90.0 % (-5.0) |" in table
    assert "| random | original |  |  | 70.0 % (-25.0) |" in table
    assert "1,000 held-out scenes, 6,500 questions" in table
    assert "A CPU (AVX2), 1 thread(s), torch 2.0, 2026-01-02" in table


def test_bench_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"median_s": 3.0}
    tower = {
        "tower": {"layers": 24, "image_px": 336, "patch_px": 14},
        "keep_tokens": 64,
        "cases": [
            {
                "contrast": 1.0,
                "stock": seconds,
                "flowcut": {"median_s": 2.7},
                "time_ratio": {"of_medians": 0.9},
            }
        ],
        "memory": {"tensors": {"stock_bytes": 2**25, "flowcut_bytes": 2**25, "extra": 0.0}},
    }
    case = {
        "visual_tokens": 64,
        "tower": seconds,
        "prefill": seconds,
        "prefill_speed_up": 4.1,
        "flop_speed_up": 4.5,
        "first_token_speed_up": 3.0,
        "decode_speed_up": 1.0,
        "kv_bytes": 3 * 2**20,
    }
    prefill = {"scale": "a quarter", "text_tokens": 87, "dtype": "float32", "cases": [case]}
    result = {**HEAD, "tower": tower, "prefill": prefill}
    table = _with_result(tmp_path, monkeypatch, "flowcut_bench", result)
    assert "tower of 24 layers, 64 of 576 tokens kept" in table
    assert "| seconds, even attention (the dearest case) | 3.000 | 2.700 | 0.900 |" in table
    assert "| peak MiB beyond the weights | 32.0 | 32.0 | 1.000 |" in table
    assert "| 64 | 3.000 | 3.000 | 4.10x | 4.50x | 3.00x | 1.00x | 3.0 |" in table
    assert "a quarter; 87 text tokens; float32" in table


def test_methods_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(method: str, ratio: float, share: float, tokens: float) -> dict[str, Any]:
        return {
            "method": method,
            "keep_ratio": ratio,
            "overall": {"accuracy": share},
            "mean_decoder_tokens": tokens,
        }

    rows = [
        row("none", 1.0, 0.95, 144.0),
        row("fastv", 0.25, 0.8, 72.0),
        row("fastv", 0.5, 0.9, 96.0),
        row("random", 0.5, 0.6, 72.0),
    ]
    result = {**HEAD, "scenes": 1000, "questions": 6500, "rows": rows}
    table = _with_result(tmp_path, monkeypatch, "pocket_methods", result)
    assert "| method | budget 50 % | budget 25 % |" in table
    assert "| unpruned | 95.0 % (144) |  |" in table
    assert "| fastv | 90.0 % (96) | 80.0 % (72) |" in table
    assert "| random | 60.0 % (72) |  |" in table
    assert "1,000 held-out scenes, 6,500 questions" in table


def test_full_table_of_the_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.pocket_methods_full() == readme_tables.fastv_layers() == ""
    kind = {"accuracy": 0.5}
    row = {
        "method": "fastv:layer=1",
        "keep_ratio": 0.25,
        "overall": {"accuracy": 0.8, "interval": [0.78, 0.82]},
        "kinds": {"list": kind, "where_is": kind, "how_many": kind},
        "mean_decoder_tokens": 54.0,
        "final_tokens": 36.0,
        "prefill_ms": 8.04,
        "kv_bytes": 2048,
    }
    one = {"method": "fastv:layer=1", "keep_ratio": 0.25}
    result = {
        **HEAD,
        "scenes": 1000,
        "questions": 6500,
        "timing": "One prompt",
        "rows": [row],
        "to_random": [{**one, "difference": 0.168}],
        "to_random_at_equal_tokens": [{**one, "difference": -0.012}],
    }
    for name in ("pocket_methods", "pocket_fastv_layers"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    table = readme_tables.pocket_methods_full()
    want = "| fastv:layer=1 | 25 % | 80.0 % (78.0 to 82.0) | +16.8 | -1.2 | 54.0 | 36 | 8.0 | 2 |"
    assert want in table
    layers = readme_tables.fastv_layers()
    assert "| `FastV(keep_ratio=0.25, layer=1)` | 54 | 80.0 % | 50.0 %" in layers


def test_cost_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.methods_cost() == ""
    row = {
        "method": "divprune",
        "keep_ratio": 0.125,
        "mean_decoder_tokens": 72.0,
        "prefill_ms": 500.2,
        "pruning_before_ms": 9.6,
        "prefill_speed_up": 3.0,
        "flop_speed_up": 4.0,
        "measured_to_flops": 0.75,
        "kv_bytes": 5 * 2**20,
    }
    words = {"model": "A middle model", "text_tokens": 64, "dtype": "float32"}
    result = {**HEAD, **words, "rows": [row]}
    (tmp_path / "methods_prefill.json").write_text(json.dumps(result))
    table = readme_tables.methods_cost()
    assert "| divprune | 12.5 % | 72 | 500 | 10 | 3.00x | 4.00x | 0.75 | 5.0 |" in table
    assert "A middle model; 64 text tokens; float32" in table


def test_calibration_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = {
        "candidate": "a schedule",
        "cached": {"median_s": 0.5},
        "recomputed": {"median_s": 2.5},
        "recomputed_to_cached": {"of_medians": 5.0},
    }
    search = {"evaluations": 50, "seconds": 123.4}
    result = {**HEAD, "candidates": [candidate], "samples": 30, "budget": 0.25, "search": search}
    table = _with_result(tmp_path, monkeypatch, "calibration_bench", result)
    assert "| a schedule | 0.500 | 2.500 | 5.0x |" in table
    assert "A whole search of 50 evaluations took 123 s" in table


def _with_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, result: dict[str, Any]
) -> str:
    """A table made from a result file, after it was empty without one."""
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.TABLES[name]() == ""
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return readme_tables.TABLES[name]()
