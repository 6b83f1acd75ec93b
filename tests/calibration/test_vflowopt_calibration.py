"""Calibrating VFlowOpt: the objective, the cache, resuming, and the command."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmlm_efficient import EfficientLMM, load
from mmlm_efficient.calibration.data import Sample, find_samples
from mmlm_efficient.calibration.vflowopt import (
    candidate,
    cosines,
    last_state,
    model_inputs,
    optimize_profile,
    remembered,
)
from mmlm_efficient.errors import ContextError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prepare import prepare
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import achieved_ratio, segments
from tests import tiny, tiny_families
from tests.tiny_processor import tiny_processor

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


def test_candidates_give_no_advice_and_the_logger_is_left_as_it_was(
    lmm: EfficientLMM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("mmlm_efficient.pruning")
    prompts = remembered(lmm, find_samples("pocket", 2), progress=False)
    reduce = VFlowOpt.reduce

    def advises(*arguments: Any) -> Any:
        logger.warning("another setting would be better")
        return reduce(*arguments)

    monkeypatch.setattr(VFlowOpt, "reduce", advises)
    level = logger.level
    cosines(lmm._parts, prompts, candidate(THETA, 0.25, LAYERS, LENGTHS, "budget"))
    assert caplog.messages == []
    assert logger.level == level


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


# -- the space -------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["budget", "released"])
def test_late_stages_are_searched_to_the_end(tmp_path: Path, space: Any) -> None:
    # 11 of 12 layers at 1.1 of the budget would be more than there is: no schedule is untuned.
    model = EfficientLMM(tiny.tiny_llava(language={"num_hidden_layers": 12}), tiny_processor())
    found = optimize_profile(
        model,
        small_pictures(tmp_path),
        0.5,
        n_evaluations=8,
        n_initial_points=8,
        space=space,
        stage_layers=(1, 11),
        progress=False,
    )
    assert found.profile.stage_layers == (1, 11)
    assert math.isfinite(found.untuned_mean)


def test_pictures_of_any_size_give_a_box_of_their_median(tmp_path: Path) -> None:
    for number, size in enumerate(((64, 64), (16, 16), (32, 32))):
        tiny_families.picture(size, number).save(tmp_path / f"p{number}.png")
    model = EfficientLMM(
        tiny_families.tiny_model("qwen2_vl"), tiny_families.tiny_processor("qwen2_vl")
    )
    samples = [Sample(f"p{n}", "w20", tmp_path / f"p{n}.png") for n in range(3)]
    boxes = [
        optimize_profile(
            model, chosen, 0.5, n_evaluations=2, n_initial_points=2, progress=False
        ).result.space
        for chosen in (samples, samples[::-1])
    ]
    # 8 x 8 pixels make a token: 64, 4 and 16 tokens.
    assert boxes[0] == boxes[1]
    assert boxes[0]["anchor_threshold"][1] == pytest.approx(50 * 16 / 27**2)


# -- what the log depends on -----------------------------------------------------------------


def test_a_log_of_other_weights_or_pictures_is_refused(lmm: EfficientLMM, tmp_path: Path) -> None:
    samples, log = find_samples("pocket", 2), tmp_path / "search.jsonl"
    options: dict[str, Any] = {
        "n_evaluations": 2,
        "n_initial_points": 2,
        "log_path": log,
        "progress": False,
    }
    optimize_profile(lmm, samples, 0.25, **options)
    asked = replace(samples[1], question="something else?")
    with pytest.raises(SettingsError, match="settings.samples_sha256 is"):
        optimize_profile(lmm, [samples[0], asked], 0.25, **options)
    weight = lmm.model.lm_head.weight
    with torch.no_grad():
        weight.neg_()
        try:
            with pytest.raises(SettingsError, match="settings.weights_sha256 is"):
                optimize_profile(lmm, samples, 0.25, **options)
        finally:
            weight.neg_()
    assert optimize_profile(lmm, samples, 0.25, **options).result.resumed == 2


# -- wrong input -----------------------------------------------------------------------------


def small_pictures(folder: Path, question: str = "where cat ?") -> list[Sample]:
    """Two samples for the tiny LLaVA models."""
    for number in range(2):
        tiny_families.picture((24, 24), number).save(folder / f"p{number}.png")
    return [Sample(f"p{n}.png", question, folder / f"p{n}.png") for n in range(2)]


def test_a_prompt_longer_than_the_context_names_its_sample(tmp_path: Path) -> None:
    model = tiny.tiny_llava(language={"max_position_embeddings": 60})
    samples = small_pictures(tmp_path)
    samples[1] = replace(samples[1], question=" ".join(["cat"] * 30))
    with pytest.raises(
        ContextError, match=r"sample 'p1.png': the prompt takes .* has 60.*unpruned"
    ):
        optimize_profile(EfficientLMM(model, tiny_processor()), samples, 0.25, progress=False)


def test_a_question_with_an_image_token_too_many_names_its_sample(tmp_path: Path) -> None:
    samples = small_pictures(tmp_path, "<image> <image> cat")
    with pytest.raises(PromptError, match=r"sample 'p0.png': question: holds 2 <image>"):
        optimize_profile(
            EfficientLMM(tiny.tiny_llava(), tiny_processor()), samples, 0.25, progress=False
        )


def test_one_token_per_picture_leaves_nothing_to_prune(tmp_path: Path) -> None:
    model = tiny.tiny_llava("siglip", vision={"image_size": tiny.PATCH})
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": tiny.PATCH}
    processor.image_processor.crop_size = {"height": tiny.PATCH, "width": tiny.PATCH}
    processor.num_additional_image_tokens = 0
    processor.vision_feature_select_strategy = "full"
    lmm = EfficientLMM(model, processor, name="one-token")
    with pytest.raises(UnsupportedError, match="one-token makes one visual token of every one"):
        optimize_profile(lmm, small_pictures(tmp_path), 0.25, progress=False)


def test_an_unpruned_state_that_is_no_number_names_its_sample(tmp_path: Path) -> None:
    model = tiny.tiny_llava()
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedError, match=r"sample 'p0.png': .* unpruned model is no number"):
        optimize_profile(
            EfficientLMM(model, tiny_processor()), small_pictures(tmp_path), 0.25, progress=False
        )


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
    third = run(*[one for one in options if one != "--json"], "--out", str(out))
    assert third.returncode == 0, third.stderr
    assert f"14 evaluations, 14 of them resumed from {log}\n" in third.stdout
    assert "use it: VFlowOpt(keep_ratio=0.25, " in third.stdout
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
