"""Pocket's accuracy benchmark: statistics by hand, and a run on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import pocket_accuracy
from benchmarks.chart import accuracy_chart
from benchmarks.intervals import Scores, bootstrap, paired, row_figures, wilson
from mmlm_efficient.pocket.architecture import build_model, text_config
from mmlm_efficient.pocket.vocabulary import build_processor


def test_wilson_by_hand() -> None:
    # p = 0.5, n = 100: middle 0.5, half width 1.96 * sqrt(0.0025 + z^2 / 40000) / (1 + z^2 / 100)
    assert wilson(50, 100) == [0.4038, 0.5962]
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_bootstrap_over_scenes() -> None:
    ones = np.ones(50, np.int64)
    assert bootstrap(ones, ones) == [1.0, 1.0]
    # Half of 400 scenes all right, half all wrong: as wide as for 400 independent answers, though
    # each scene has seven questions.
    right = np.repeat(np.array([0, 7]), 200)
    low, high = bootstrap(right, np.full(400, 7))
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)


def test_paired_difference() -> None:
    asked = np.full(100, 2)
    base = np.tile([0, 2], 50)
    assert paired(base, base, asked) == {"difference": 0.0, "interval": [0.0, 0.0]}
    worse = paired(np.maximum(base - 1, 0), base, asked)
    assert worse["difference"] == -0.25
    assert worse["interval"][1] < 0


def test_row_figures_leave_out_kinds_that_were_not_asked() -> None:
    scores = Scores.empty(4, 2)
    scores.asked[:, 0] = 1
    scores.right[:3, 0] = 1
    row = row_figures(scores, scores, ["is_there", "list"])
    assert list(row["kinds"]) == ["is_there"]
    assert row["kinds"]["is_there"]["accuracy"] == row["overall"]["accuracy"] == 0.75
    assert row["overall"]["count"] == 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket with random weights, in its own folder layout."""
    folder = tmp_path_factory.mktemp("random_pocket")
    processor = build_processor()
    ids = processor.tokenizer
    text = text_config(len(ids), bos=ids.bos_token_id, eos=ids.eos_token_id, pad=ids.pad_token_id)
    image_token = ids.convert_tokens_to_ids(processor.image_token)
    build_model(text, image_token, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def arguments(model_folder: Path, out: Path, *methods: str) -> list[str]:
    return [
        *("--model", str(model_folder), "--scenes", "3", "--batch-size", "2"),
        *("--methods", "flowcut", *methods, "--ratios", "0.25", "--position-ids", "compact"),
        *("--out", str(out)),
    ]


@pytest.mark.slow
def test_run_on_random_weights(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pocket_accuracy, "MAX_NEW_TOKENS", 4)
    out = tmp_path / "accuracy.json"
    assert pocket_accuracy.main(arguments(model_folder, out, "uniform")) == 0
    result = json.loads(out.read_text())
    assert [(row["method"], row["keep_tokens"]) for row in result["rows"]] == [
        ("none", 144),
        ("flowcut", 36),
        ("uniform", 36),
    ]
    (against,) = result["flowcut_against"]
    assert (against["other"], against["keep_tokens"]) == ("uniform", 36)
    flowcut, uniform = (row["overall"]["right"] for row in result["rows"][1:])
    expected = (flowcut - uniform) / result["questions"]
    assert against["difference"] == pytest.approx(expected, abs=1e-4)
    for row in result["rows"]:
        assert row["overall"]["count"] == result["questions"]
        assert sum(kind["count"] for kind in row["kinds"].values()) == result["questions"]
        low, high = row["overall"]["interval"]
        assert low <= row["overall"]["accuracy"] <= high
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.json", "accuracy.png"]
    assert "3 held-out scenes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pocket_accuracy, "MAX_NEW_TOKENS", 4)
    calls: list[int] = []
    real = pocket_accuracy._right

    def counted(lmm: Any, case: Any, inputs: Any, batch: Any) -> list[int]:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(batch.number)
        return real(lmm, case, inputs, batch)

    out = tmp_path / "accuracy.json"
    monkeypatch.setattr(pocket_accuracy, "_right", counted)
    with pytest.raises(KeyboardInterrupt):
        pocket_accuracy.main(arguments(model_folder, out))
    progress = out.with_suffix(".progress.jsonl")
    finished = len(progress.read_text().splitlines()) - 1
    assert finished == 2
    with progress.open("a") as file:
        file.write('{"batch": 2, "asked"')  # the kill came in the middle of a line
    repeated: list[int] = []

    def noted(lmm: Any, case: Any, inputs: Any, batch: Any) -> list[int]:
        repeated.append(batch.number)
        return real(lmm, case, inputs, batch)

    monkeypatch.setattr(pocket_accuracy, "_right", noted)
    assert pocket_accuracy.main(arguments(model_folder, out)) == 0
    assert min(repeated) == 2
    assert not progress.exists()
    resumed = json.loads(out.read_text())
    assert resumed["resumed"] is True
    once = tmp_path / "once.json"
    assert pocket_accuracy.main(arguments(model_folder, once)) == 0
    assert json.loads(once.read_text())["rows"] == resumed["rows"]


def test_progress_of_other_settings_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.progress.jsonl"
    first = pocket_accuracy._Progress(path, {"scenes": 3})
    first.add(0, [[0, "list"]], {"none": [1]})
    assert pocket_accuracy._Progress(path, {"scenes": 3}).resumed
    assert not pocket_accuracy._Progress(path, {"scenes": 4}).resumed


def test_errors_are_said_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert pocket_accuracy.main(["--model", str(tmp_path)]) == 1
    assert "missing" in capsys.readouterr().err
    assert pocket_accuracy.main(["--methods", "flowcat"]) == 1
    assert "flowcut" in capsys.readouterr().err


def test_chart(tmp_path: Path) -> None:
    def row(method: str, tokens: int, positions: str, share: float) -> dict[str, Any]:
        overall = {"accuracy": share, "interval": [share - 0.02, share + 0.02]}
        return {
            "method": method,
            "keep_tokens": tokens,
            "position_ids": positions,
            "overall": overall,
        }

    rows = [row("none", 144, "compact", 0.95)]
    for positions in ("compact", "original"):
        rows += [
            row(method, tokens, positions, 0.9 - 1 / tokens)
            for method in ("flowcut", "random")
            for tokens in (72, 36, 18)
        ]
    path = tmp_path / "chart.png"
    accuracy_chart({"rows": rows, "scenes": 1000}, path)
    with Image.open(path) as chart:
        assert chart.width > 2 * chart.height
