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
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.registry import METHODS
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


def test_settings_table_has_every_field() -> None:
    table = readme_tables.flowcut_settings()
    for name, field in FlowCut.model_fields.items():
        assert f"| `{name}` |" in table
        assert field.description
        assert field.description in table


def test_check_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:methods -->\nold\n<!-- /table -->\nafter\n")
    assert readme_tables.main(["--check", str(page)]) == 1
    assert "out of date" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert readme_tables.main([str(page)]) == 0
    text = page.read_text()
    assert "old" not in text
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


def _with_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, result: dict[str, Any]
) -> str:
    """A table made from a result file, after it was empty without one."""
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.TABLES[name]() == ""
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return readme_tables.TABLES[name]()
