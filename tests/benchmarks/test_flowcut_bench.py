"""The FlowCut benchmark on tiny models: it runs, and its figures fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import flowcut
from benchmarks.exactness import measure_exactness
from benchmarks.models import SMALL_TOWER, DecoderSize, TowerSize
from benchmarks.prefill import decoder_flops
from benchmarks.tower import tower_flops


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_flops_of_the_known_models() -> None:
    # The paper's 8.82 TFLOP for LLaVA-1.5-7B at 663 tokens.
    assert decoder_flops(DecoderSize(), 576 + flowcut.TEXT_TOKENS) / 1e12 == pytest.approx(
        8.82, abs=0.01
    )
    # ViT-L/14-336: 381 GFLOP for 24 layers.
    assert tower_flops(TowerSize(), [576] * 24) / 1e9 == pytest.approx(381, abs=1)
    assert TowerSize().patches == 576


def test_counts_are_exact() -> None:
    result = measure_exactness(images=24, seed=3)
    assert result["images"] == result["exact"] == 24
    assert result["met"]
    assert result["mismatches"] == []
    assert result["images_with_budget_below_all"] > 0


def test_a_wrong_count_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"images": 2, "exact": 1, "met": False, "mismatches": ["asked for 3, got 4"]}
    monkeypatch.setattr(flowcut, "measure_exactness", lambda images, seed: wrong)
    assert flowcut.main(["--parts", "exactness", "--quick"]) == 1
    assert "asked for 3, got 4" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_run_of_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert flowcut.main(["--quick", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "exact counts: 60 of 60 images" in printed
    assert f"written: {out}" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]
    result = json.loads(out.read_text())
    assert result["quick"] is True
    assert result["threads"] == 1
    _check_tower(result["tower"])
    _check_prefill(result["prefill"])


def _check_tower(tower: dict[str, Any]) -> None:
    case = tower["cases"][0]
    counts = case["patches_entering_each_layer"]
    assert len(counts) == SMALL_TOWER.layers
    assert (counts[0], counts[-1]) == (SMALL_TOWER.patches, tower["keep_tokens"])
    assert case["flop_ratio"] < 1
    assert len(case["stock"]["runs_s"]) == len(case["flowcut"]["runs_s"]) == 2
    assert tower["goals"]["time_ratio"]["measured"] == case["time_ratio"]["of_medians"]
    memory = tower["memory"]["tensors"]
    assert memory["extra"] == pytest.approx(
        memory["flowcut_bytes"] / memory["stock_bytes"] - 1, abs=1e-5
    )


def _check_prefill(prefill: dict[str, Any]) -> None:
    unpruned, some, few = prefill["cases"]
    assert [case["kept"] for case in (unpruned, some, few)] == [144, 48, 16]
    per_token = unpruned["kv_bytes"] / (144 + prefill["text_tokens"])
    for case in (some, few):
        assert case["kv_bytes"] == per_token * (case["kept"] + prefill["text_tokens"])
        assert case["flop_speed_up"] > 1
        assert case["first_token"]["median_s"] >= case["prefill"]["median_s"]
    assert unpruned["flop_speed_up"] == unpruned["prefill_speed_up"] == 1


def test_nothing_is_written_without_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        flowcut,
        "measure_exactness",
        lambda images, seed: {"images": 1, "exact": 1, "met": True, "mismatches": []},
    )
    assert flowcut.main(["--parts", "exactness", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) >= {"date", "versions", "hardware", "threads", "exactness"}
    assert "tower" not in result
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert flowcut.main(["--full-size"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert flowcut.main(["--device", "abacus"]) == 1
    assert "abacus" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        flowcut.main(["--repeats", "0"])
