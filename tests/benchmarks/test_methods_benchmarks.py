"""The benchmarks of all methods: small runs, resuming, and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibration, methods_prefill, pocket_methods, shapes
from benchmarks.chart import methods_chart
from benchmarks.progress import Progress
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families import family_of
from mmlm_efficient.prepare import LMMParts
from tests import tiny


def test_cases_are_every_method_with_a_budget() -> None:
    names = pocket_methods.case_names()
    assert {"flowcut", "vflowopt", "fastv", "random", "uniform"} <= set(names)
    assert not {"none", "keep_mask"} & set(names)
    cases = pocket_methods.cases_of(names, [0.5, 0.25])
    assert len({case.name for case in cases}) == len(cases) == 1 + 2 * len(names)
    untuned = [case for case in cases if case.label == pocket_methods.UNTUNED]
    assert {case.method.profile for case in untuned} == {"none"}  # type: ignore[attr-defined]


def test_variants_have_their_settings() -> None:
    cases = pocket_methods.cases_of([], [0.25], ["fastv:layer=1", "vispruner:important_ratio=0.75"])
    assert [case.name for case in cases[1:]] == [
        "fastv:layer=1 0.25",
        "vispruner:important_ratio=0.75 0.25",
    ]
    assert cases[1].method.layer == 1  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="unknown setting 'layers', did you mean 'layer'"):
        pocket_methods.cases_of([], [0.25], ["fastv:layers=1"])


@pytest.mark.slow
def test_a_small_run_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pocket_methods, "TIMED_SCENES", 2)
    out = tmp_path / "methods.json"
    options = ["--scenes", "3", "--repeats", "1", "--ratios", "0.25", "--out", str(out)]
    assert pocket_methods.main([*options, "--methods", "random", "fastv"]) == 0
    first = json.loads(out.read_text())
    assert [row["method"] for row in first["rows"]] == ["none", "random", "fastv"]
    none, random, fastv = first["rows"]
    assert none["mean_decoder_tokens"] == none["final_tokens"] == 144
    assert random["mean_decoder_tokens"] == random["final_tokens"] == 36
    # Two of six layers on all tokens.
    assert fastv["mean_decoder_tokens"] == (2 * 144 + 4 * 36) / 6
    assert fastv["final_tokens"] == 36
    assert none["kv_bytes"] > fastv["kv_bytes"] > random["kv_bytes"]
    assert first["questions"] == none["overall"]["count"] > 10
    assert not first["resumed"]
    # Another method is added: what is answered is not asked again.
    called: list[str] = []
    real = pocket_methods._right

    def spied(lmm: Any, case: Any, *rest: Any) -> list[int]:
        called.append(case.label)
        return real(lmm, case, *rest)

    monkeypatch.setattr(pocket_methods, "_right", spied)
    assert pocket_methods.main([*options, "--methods", "random", "uniform", "fastv"]) == 0
    again = json.loads(out.read_text())
    assert set(called) == {"uniform"}
    assert again["resumed"]
    kept = [row["overall"] for row in again["rows"] if row["method"] != "uniform"]
    assert kept == [row["overall"] for row in first["rows"]]
    methods_chart(again, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert "random" in capsys.readouterr().out


def test_equal_tokens_by_hand() -> None:
    def row(method: str, ratio: float, tokens: float, accuracy: float) -> dict[str, Any]:
        overall = {"accuracy": accuracy}
        names = {"method": method, "keep_ratio": ratio, "mean_decoder_tokens": tokens}
        return {**names, "overall": overall}

    rows = [
        row("none", 1.0, 128, 0.9),
        row("random", 0.25, 32, 0.5),
        row("random", 0.1, 24, 0.3),
        row("fastv", 0.25, 64, 0.8),
        row("divprune", 0.1, 16, 0.4),
    ]
    # Halfway between 32 and 128 tokens on a logarithmic scale: 0.7. Below 24 nothing is known.
    (one,) = pocket_methods._at_equal_tokens(rows)
    assert one["method"] == "fastv"
    assert one["difference"] == pytest.approx(0.1)
    assert pocket_methods._at_equal_tokens([rows[0], rows[1], rows[3]]) == []


def test_prefill_counts_the_pruning_before_the_decoder() -> None:
    stock = [{"before": 0.1, "pruning": 0.0, "forward": 1.0}]
    rounds = [{"before": 0.3, "pruning": 0.2, "forward": 0.3}]
    figures = pocket_methods.prefill_figures(rounds, stock)
    assert figures["pruning_before_ms"] == pytest.approx(200)
    assert figures["prefill_ms"] == pytest.approx(500)
    assert figures["prefill_speed_up"] == pytest.approx(2.0)
    assert figures["first_token_speed_up"] == pytest.approx(1.1 / 0.6, abs=1e-3)


def test_progress_survives_a_torn_line_and_knows_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    progress = Progress(path, {"scenes": 3})
    progress.add(0, "random 0.5", [1, 0])
    progress.add(1, "random 0.5", [1])
    with path.open("a") as file:
        file.write('{"batch": 2, "case": "ran')
    again = Progress(path, {"scenes": 3})
    assert again.resumed
    assert again.has(1, "random 0.5")
    assert not again.has(2, "random 0.5")
    assert list(again.right(0, "random 0.5")) == [1, 0]
    assert not Progress(path, {"scenes": 4}).resumed


def test_flops_by_hand() -> None:
    with LMMParts(tiny.tiny_llava()) as parts:
        # 4 heads and 2 key heads of 8; width 32, MLP 48; lengths 10 and 5.
        per_layer = [2 * 6 * 8 * n * 32 + 2 * n * n * 32 + 3 * n * 32 * 48 for n in (10, 5)]
        assert methods_prefill.decoder_flops(parts, [10, 5]) == 2 * sum(per_layer)


@pytest.mark.slow
def test_prefill_of_every_method_on_a_small_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shapes.Shape(
        "tiny", type(tiny.tiny_llava()), lambda: tiny.tiny_llava().config, (24, 24)
    )
    monkeypatch.setitem(shapes.SHAPES, "mid", small)
    # Words of the benchmark are beyond the tiny vocabulary.
    monkeypatch.setattr(shapes, "FIRST_WORD", 5)
    out = tmp_path / "prefill.json"
    options = ["--repeats", "1", "--ratios", "0.5", "--text-tokens", "8", "--out", str(out)]
    assert methods_prefill.main(options) == 0
    result = json.loads(out.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {"none", *pocket_methods.case_names()} - {pocket_methods.UNTUNED}
    assert rows["none"]["prefill_speed_up"] == 1.0
    for name, row in rows.items():
        assert row["prefill_gflop"] <= rows["none"]["prefill_gflop"]
        assert row["flop_speed_up"] >= 1.0
        if name != "none":
            assert row["kv_bytes"] < rows["none"]["kv_bytes"]


@pytest.mark.slow
def test_calibration_benchmark_agrees_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    options = ["--samples", "2", "--evaluations", "2", "--repeats", "1", "--out", str(out)]
    assert calibration.main(options) == 0
    result = json.loads(out.read_text())
    assert result["largest_difference_of_a_cosine"] < 1e-5
    assert len(result["candidates"]) == 2
    assert result["search"]["evaluations"] == 2


@pytest.mark.parametrize(
    ("name", "crops", "tokens"),
    [
        ("mid", 1, 576),
        # 48 x 48 patches of four tiles, a newline for each row, and the overview.
        ("llava-next-7b", 5, 576 + 48 * 49),
        # 81 x 81 patches of nine tiles: just what anyres_max_9 allows.
        ("onevision-7b", 10, 729 + 81 * 82),
    ],
)
def test_shapes_have_the_stated_tokens(name: str, crops: int, tokens: int) -> None:
    """On the meta device, so that 7B models cost nothing."""
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = shape.model_class(shape.config())
    side = model.config.vision_config.image_size
    inputs: dict[str, Any] = {"pixel_values": torch.empty(1, 3, side, side)}
    if crops > 1:
        inputs["image_sizes"] = torch.tensor([shape.picture_hw])
        inputs["pixel_values"] = torch.empty(1, crops, 3, side, side)
    family = family_of(model)
    (visual,) = family.visuals(inputs)
    assert family.tokens_of(visual) == tokens
