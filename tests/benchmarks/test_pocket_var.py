"""VAR's benchmark on pocket: a small run, its continuation, and figures by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import pocket_var, readme_tables
from benchmarks.intervals import Scores
from benchmarks.pocket_var import ALONE, OFF, ON_FLOWCUT, SETTINGS
from benchmarks.var_chart import var_chart
from mmlm_efficient.pocket.questions import IMAGE_KINDS
from mmlm_efficient.pruning.flowcut import FlowCut

PROFILE: Any = SimpleNamespace(dims=(85,), threshold=4.33)


def test_cases_are_all_settings_alone_and_on_flowcut() -> None:
    cases = pocket_var.cases_of(SETTINGS, PROFILE, 0.25)
    assert [(case.pruning, case.setting) for case in cases] == [
        (pruning, setting) for pruning in (ALONE, ON_FLOWCUT) for setting in (OFF, *SETTINGS)
    ]
    assert len({case.name for case in cases}) == 8
    assert cases[0].methods == ()
    assert cases[4].methods == (FlowCut(keep_ratio=0.25),)
    for case in cases:
        assert (case.var is None) == (case.setting == OFF)
        if case.var is not None:
            assert case.var.sink_dims == (85,)
            assert case.var.sink_threshold == 4.33
    found = {case.setting: case.var.min_nonsink_ratio for case in cases[5:] if case.var}
    assert found == {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}


def test_differences_are_to_the_same_pruning_without_var() -> None:
    cases = pocket_var.cases_of(["general"], PROFILE, 0.25)
    right = {0: [2, 2, 1, 0], 1: [2, 1, 2, 1], 2: [1, 1, 1, 1], 3: [0, 1, 1, 1]}
    scores = {}
    for case, values in zip(cases, right.values(), strict=True):
        scores[case.name] = Scores.empty(4, len(IMAGE_KINDS))
        scores[case.name].asked[:, 0] = 2
        scores[case.name].right[:, 0] = values
    rows = [pocket_var._row(case, cases, scores, {case.name: {}}) for case in cases]
    assert "changed" not in rows[0]
    assert rows[1]["to_without"]["difference"] == rows[1]["to_unpruned"]["difference"] == 0.125
    assert (rows[1]["scenes_better"], rows[1]["scenes_worse"]) == (2, 1)
    assert rows[2]["to_without"]["difference"] == 0.0
    assert rows[2]["to_unpruned"]["difference"] == -0.125
    assert rows[3]["to_without"]["difference"] == -0.125
    assert rows[3]["to_unpruned"]["difference"] == -0.25
    assert rows[3]["kinds"][IMAGE_KINDS[0]]["to_without"]["difference"] == -0.125
    assert rows[1]["var"]["min_nonsink_ratio"] == 0.8


def test_counts_by_hand() -> None:
    stats = SimpleNamespace(
        layer=3,
        visual=(2, 3, 4, 5),
        visual_sinks=(3, 5),
        eligible=20,
        selected=5,
        moved=0.2,
        gain=1.5,
    )
    recorder: Any = SimpleNamespace(stats=lambda sample: (stats,))
    layers: dict[int, Any] = {}
    pocket_var._count(layers, recorder, 0, np.array([True, True, False, False]))
    pocket_var._count(layers, recorder, 1, np.array([False, False, False, False]))
    assert layers[3].figures() == {
        "rows_changed": 0.25,
        "rows_changed_decoding": None,
        "moved": 0.2,
        "largest_gain": 1.5,
        "visual_tokens": 4.0,
        "visual_sinks": 2.0,
        "visual_sinks_on_objects": 0.25,
    }


@pytest.mark.slow
def test_a_small_run_and_its_continuation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "var.json"
    options = ["--scenes", "3", "--calibration-samples", "4", "--counted-scenes", "2"]
    options += ["--out", str(out), "--settings"]
    assert pocket_var.main([*options, "hallucination"]) == 0
    first = json.loads(out.read_text())
    assert [(row["pruning"], row["setting"]) for row in first["rows"]] == [
        (ALONE, OFF),
        (ALONE, "hallucination"),
        (ON_FLOWCUT, OFF),
        (ON_FLOWCUT, "hallucination"),
    ]
    assert first["calibration"]["dims"] == first["sink_dims"]
    assert any("only 4 prompts" in text for text in first["calibration"]["warnings"])
    assert not first["resumed"]
    for row, tokens in zip(first["rows"], (144, 144, 36, 36), strict=True):
        assert row["overall"]["count"] == first["questions"] > 10
        if row["setting"] == OFF:
            assert row["to_without"] == {"difference": 0.0, "interval": [0.0, 0.0]}
            continue
        changed = row["changed"]
        # Of six layers the first two and the last are left alone.
        assert [layer["layer"] for layer in changed["layers"]] == [2, 3, 4]
        assert {layer["visual_tokens"] for layer in changed["layers"]} == {tokens}
        assert 0 < changed["rows_changed"] < 1
        assert 0 < changed["visual_tokens_on_objects"] < 1
    called: list[str] = []
    real = pocket_var._right

    def spied(lmm: Any, case: Any, *rest: Any) -> list[int]:
        called.append(case.setting)
        return real(lmm, case, *rest)

    monkeypatch.setattr(pocket_var, "_right", spied)
    assert pocket_var.main([*options, "hallucination", "general"]) == 0
    again = json.loads(out.read_text())
    assert set(called) == {"general"}
    assert again["resumed"]
    kept = [row["overall"] for row in again["rows"] if row["setting"] != "general"]
    assert kept == [row["overall"] for row in first["rows"]]
    assert out.with_suffix(".png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "3 held-out scenes" in said
    assert "of the rows changed" in said


def test_chart_of_one_pruning(tmp_path: Path) -> None:
    one = {"difference": 0.01, "interval": [-0.01, 0.02]}
    row = {"pruning": ALONE, "setting": "general", "changed": {}, "to_without": one}
    row["kinds"] = {"list": {"to_without": one}}
    result = {"rows": [{"pruning": ALONE, "setting": OFF}, row], "scenes": 9, "keep_ratio": 0.25}
    var_chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 5_000


def test_errors_are_said_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert pocket_var.main(["--model", str(tmp_path)]) == 1
    assert "missing" in capsys.readouterr().err


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overall = {"overall": {"accuracy": 0.9379}}
    changed = {
        "changed": {"rows_changed": 0.0274},
        "to_without": {"difference": -0.0012, "interval": [-0.0031, 0.0004]},
        "scenes_better": 3,
        "scenes_worse": 11,
    }
    result = {
        "date": "2026-01-02 03:04 UTC",
        "versions": {"torch": "2.0"},
        "hardware": {"cpu": "A CPU", "cpu_capability": "AVX2"},
        "threads": 1,
        "scenes": 1000,
        "questions": 6378,
        "keep_ratio": 0.25,
        "calibration": {"dims": [85], "threshold": 4.33012},
        "rows": [
            {"pruning": ALONE, "setting": OFF, **overall},
            {"pruning": ON_FLOWCUT, "setting": "general", **overall, **changed},
        ],
    }
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.TABLES["pocket_var"]() == ""
    (tmp_path / "pocket_var.json").write_text(json.dumps(result))
    table = readme_tables.TABLES["pocket_var"]()
    assert "| all | off | 93.8 % |  |  |  |" in table
    row = "| FlowCut 25 % | general | 93.8 % | -0.12 (-0.31 to +0.04) | 3 / 11 | 2.7 % |"
    assert row in table
    assert "1,000 held-out scenes, 6,378 questions" in table
    assert "from the calibration: 85, threshold 4.33" in table
