"""Calibrating VFlowOpt: the objective, the cache, resuming, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.calibration.data import find_samples
from mmlm_efficient.calibration.vflowopt import (
    candidate,
    cosines,
    last_state,
    model_inputs,
    optimize_profile,
    remembered,
)
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.prepare import prepare
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import achieved_ratio, segments

pytest.importorskip("optuna")

LAYERS = (2, 4)
LENGTHS = segments(LAYERS, 6)
THETA = {
    "c0": 0.3,
    "u": 0.4,
    "anchor_threshold": 2.0,
    "merge_grid_size": 3.0,
    "entropy_weight": 0.4,
}


@pytest.fixture(scope="module")
def lmm() -> Iterator[EfficientLMM]:
    with load("pocket") as model:
        yield model


def test_nothing_pruned_gives_cosine_one(lmm: EfficientLMM) -> None:
    prompts = remembered(lmm, find_samples("pocket", 3), progress=False)
    whole = VFlowOpt(stage_layers=LAYERS, stage_keep_ratios=(1.0, 1.0, 1.0))
    assert cosines(lmm._parts, prompts, whole) == pytest.approx([1.0] * 3, abs=1e-6)
    pruned = cosines(lmm._parts, prompts, VFlowOpt(keep_ratio=0.125))
    assert all(0.0 < value < 1.0 - 1e-5 for value in pruned)


def test_the_state_is_what_the_output_head_gets(lmm: EfficientLMM) -> None:
    (sample, _) = find_samples("pocket", 2)
    inputs = model_inputs(lmm, sample)
    with torch.no_grad():
        state = last_state(lmm._parts, inputs, [VFlowOpt(keep_ratio=0.25)])
        prepared = prepare(lmm._parts, inputs, [VFlowOpt(keep_ratio=0.25)])
        with prepared.active():
            logits = lmm.model(**prepared.model_inputs).logits[0, -1]
    torch.testing.assert_close(lmm.model.lm_head(state), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_what_is_remembered_changes_nothing(lmm: EfficientLMM, weight: float) -> None:
    samples = find_samples("pocket", 3)
    method = candidate({**THETA, "entropy_weight": weight}, 0.25, LAYERS, LENGTHS, "budget")
    prompts = remembered(lmm, samples, progress=False)
    first = cosines(lmm._parts, prompts, method)
    cosines(lmm._parts, prompts, VFlowOpt(keep_ratio=0.1, entropy_weight=-0.5))
    assert cosines(lmm._parts, prompts, method) == first
    fresh = []
    with torch.no_grad():
        for sample in samples:
            inputs = model_inputs(lmm, sample)
            states = [last_state(lmm._parts, inputs, chosen) for chosen in ((), (method,))]
            fresh.append(float(torch.nn.functional.cosine_similarity(*states, dim=0)))
    assert first == pytest.approx(fresh, abs=1e-6)


def test_the_tower_and_the_unpruned_model_run_once(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"tower": 0, "model": 0}
    counted = {"tower": lmm.model.model.vision_tower, "model": lmm.model.model.language_model}
    handles = []
    for name, module in counted.items():

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        handles.append(module.register_forward_hook(count))
    try:
        optimize_profile(
            lmm,
            find_samples("pocket", 4),
            0.25,
            n_evaluations=3,
            n_initial_points=3,
            progress=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    # 4 unpruned, 4 for each of 3 candidates, 4 for the best and 4 for the untuned schedule.
    assert calls == {"tower": 4, "model": 4 + 3 * 4 + 8}


@pytest.mark.parametrize("space", ["budget", "released"])
def test_a_search_finds_a_profile_that_can_be_used(
    lmm: EfficientLMM, tmp_path: Path, space: Any
) -> None:
    log = tmp_path / "search.jsonl"
    options: dict[str, Any] = {
        "n_initial_points": 4,
        "space": space,
        "log_path": log,
        "progress": False,
    }
    samples = find_samples("pocket", 4)
    found = optimize_profile(lmm, samples, 0.25, n_evaluations=6, **options)
    assert found.least <= found.mean <= 1.0
    assert found.mean * 4 == pytest.approx(found.result.best.value, abs=1e-5)
    profile = found.profile
    ratios = profile.stage_keep_ratios
    if space == "budget":
        assert achieved_ratio(*ratios, profile.segments) == pytest.approx(0.25, abs=1e-6)
    more = optimize_profile(lmm, samples, 0.25, n_evaluations=8, **options)
    assert more.result.resumed == 6
    assert more.result.evaluations[:6] == found.result.evaluations
    with pytest.raises(SettingsError, match="keep_ratio"):
        optimize_profile(lmm, samples, 0.3, n_evaluations=8, **options)


def test_wrong_settings(lmm: EfficientLMM) -> None:
    samples = find_samples("pocket", 2)
    with pytest.raises(SettingsError, match=r"budget must be a number in \(0, 1\), got 1.5"):
        optimize_profile(lmm, samples, 1.5)
    with pytest.raises(SettingsError, match="at least 2 samples, got 1"):
        optimize_profile(lmm, samples[:1], 0.25)
    with pytest.raises(SettingsError, match="'budget' or 'released'"):
        optimize_profile(lmm, samples, 0.25, space="other")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="must be rising and in 1..5"):
        optimize_profile(lmm, samples, 0.25, stage_layers=(2, 6))


def test_a_state_that_is_no_number_is_an_error(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = remembered(lmm, find_samples("pocket", 2), progress=False)
    prompts[1].state.fill_(float("nan"))
    with pytest.raises(UnsupportedError, match="no number"):
        cosines(lmm._parts, prompts, VFlowOpt(keep_ratio=0.25))


# -- the command -------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """The mmlm command of this interpreter."""
    code = "from mmlm_efficient.cli import main; main()"
    return [sys.executable, "-c", code, "calibrate", "vflowopt", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    options = ["--data", "pocket", "--budget", "0.25", "--samples", "4", "--evaluations", "14"]
    options += ["--initial", "6", "--threads", "1", "--json"]
    whole = run(*options, "--out", str(tmp_path / "whole.yaml"))
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed.yaml"
    log = out.with_suffix(".search.jsonl")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*options, "--out", str(out)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert not out.exists()
    done = len(log.read_text().splitlines()) - 1
    assert 3 <= done < 14
    again = run(*options, "--out", str(out))
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert summary["resumed"] in (done - 1, done)  # a torn last line does not count
    assert summary["evaluations"] == 14
    assert summary["mean_cosine"] == json.loads(whole.stdout)["mean_cosine"]
    profiles = [yaml.safe_load((tmp_path / f"{n}.yaml").read_text()) for n in ("whole", "killed")]
    assert profiles[0] == profiles[1]
    assert Image.open(out.with_suffix(".png")).size[0] > 300
    with load("pocket") as lmm:
        method = VFlowOpt(keep_ratio=0.25, profile=str(out))
        answer = lmm.ask("what is there?", Image.new("RGB", (96, 96)), methods=method)
    assert answer.report.images[0].mean_decoder_tokens == pytest.approx(36, abs=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "1.5"], 2, "--budget 1.5: must lie between 0 and 1"),
        (["--budget", "0.25", "--space", "all"], 2, "--space all"),
        (["--budget", "0.25", "--stage-layers", "2"], 2, "write two layers, such as 9-18"),
        (["--budget", "0.25", "--out", "profile.json"], 2, "must end in '.yaml'"),
        (["--budget", "0.25", "--data", "EMPTY"], 2, r"holds 0 picture(s)"),
        (["--budget", "0.25", "--out", "/proc/no/p.yaml"], 1, "takes no new files"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmlm_efficient import cli

    monkeypatch.chdir(tmp_path)
    given = [str(tmp_path) if one == "EMPTY" else one for one in arguments]
    if "--data" not in given:
        given += ["--data", "pocket"]
    monkeypatch.setattr(sys, "argv", ["mmlm", "calibrate", "vflowopt", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert message in capsys.readouterr().err.replace("\n", " ")
