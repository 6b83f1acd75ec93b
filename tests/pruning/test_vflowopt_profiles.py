"""VFlowOpt's profiles: which one a model gets, what it becomes at another budget, bad files."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Identity
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import achieved_ratio, segments, untuned
from mmlm_efficient.pruning.vflowopt_profiles import (
    Profile,
    built_in,
    checked_profile,
    fitted,
    named_profile,
    profile_of,
)

ONEVISION = Identity("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision", 28, 3584, 26)
POCKET = Identity("pocket", "llava", 6, 192, 7)
PAPER = (9, 9, 10)
VALUES: dict[str, Any] = {
    "model": "someone/own-model",
    "family": "llava",
    "decoder_layers": 28,
    "decoder_width": 64,
    "tower_layers": 8,
    "keep_ratio": 0.25,
    "stage_layers": [9, 18],
    "stage_keep_ratios": [0.3, 0.8, 0.891667],
    "anchor_threshold": 3.5,
    "entropy_weight": -0.25,
    "merge_grid_size": 4.5,
}
OWN = Identity("/models/own-model/", "llava", 28, 64, 8)
_names = itertools.count()


def stranger(depth: int = 28) -> Identity:
    """A model that nobody has a profile of, with a new name every time."""
    return Identity(f"someone/stranger-{next(_names)}", "llava", depth, 64, 8)


def write(folder: Path, **changes: Any) -> str:
    """A profile's file, with some values changed, or left out where they are None."""
    values = {name: value for name, value in {**VALUES, **changes}.items() if value is not None}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def ratios_of(
    method: VFlowOpt, identity: Identity, n_tokens: int = 100
) -> tuple[tuple[int, int], tuple[float, float, float]]:
    layers, found = method.schedule(identity, 0, n_tokens)
    return layers, found.stage_keep_ratios


# -- built in ----------------------------------------------------------------------------------


def test_every_built_in_profile_is_sound() -> None:
    assert {"onevision-7b-10", "onevision-7b-25", "onevision-7b-50", "pocket-25"} <= set(built_in())
    for name in built_in():
        profile = named_profile(name)
        mean = achieved_ratio(*profile.stage_keep_ratios, profile.segments)
        assert mean == pytest.approx(profile.keep_ratio, abs=1e-3)
        percent = float(name.rpartition("-")[2].replace("_", "."))
        assert profile.keep_ratio == pytest.approx(percent / 100)


@pytest.mark.parametrize(
    ("percent", "cumulative", "mean", "threshold", "side"),
    [
        (50, (0.7233, 0.5416, 0.2638), 0.50077, 28.683047941520474, 11.756787150848968),
        (25, (0.2651, 0.2607, 0.2287), 0.25068, 34.759552803070484, 15.580797034937687),
        (10, (0.1166, 0.1166, 0.0701), 0.10000, 39.26492840997221, 17.386981849158786),
    ],
)
def test_released_schedules(
    percent: int, cumulative: tuple[float, ...], mean: float, threshold: float, side: float
) -> None:
    """The spec's table; the budget alone gives them to the model that they were tuned for."""
    for source in ("auto", f"onevision-7b-{percent}"):
        method = VFlowOpt(keep_ratio=percent / 100, profile=source)
        layers, found = method.schedule(ONEVISION, 0, 7290)
        assert layers == (9, 18)
        r0, r1, r2 = found.stage_keep_ratios
        assert (r0, r0 * r1, r0 * r1 * r2) == pytest.approx(cumulative, abs=5e-5)
        assert achieved_ratio(r0, r1, r2, PAPER) == pytest.approx(mean, abs=5e-6)
        assert (found.anchor_threshold, found.merge_grid_size) == (threshold, side)
        assert found.entropy_weight == 0.0
        assert not found.exact_budget


@pytest.mark.parametrize(
    ("budget", "nearest"),
    [(0.01, 10), (0.1, 10), (0.17, 10), (0.18, 25), (0.37, 25), (0.38, 50), (0.9, 50)],
)
def test_auto_takes_the_nearest_profile(budget: float, nearest: int) -> None:
    profile = profile_of(ONEVISION, budget)
    assert profile == named_profile(f"onevision-7b-{nearest}")
    _, found = VFlowOpt(keep_ratio=budget).schedule(ONEVISION, 0, 7290)
    assert found.anchor_threshold == profile.anchor_threshold
    assert found.merge_grid_size == profile.merge_grid_size


def test_auto_goes_by_the_model() -> None:
    assert profile_of(POCKET, 0.25) == named_profile("pocket-25")
    copy = Identity("/data/llava-onevision-qwen2-7b-ov-hf/", *list(vars(ONEVISION).values())[1:])
    assert profile_of(copy, 0.25) == named_profile("onevision-7b-25")
    for changed in (
        {"name": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"},
        {"family": "llava"},
        {"decoder_layers": 24},
        {"decoder_width": 896},
        {"tower_layers": 27},
    ):
        assert profile_of(Identity(**{**vars(ONEVISION), **changed}), 0.25) is None


# -- other budgets -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 0.9999))
def test_other_budgets_are_spent_exactly(budget: float) -> None:
    tuned = [0.5, 0.25, 0.1]
    assume(all(abs(budget - one) > 1e-6 for one in tuned))
    profile = profile_of(ONEVISION, budget)
    assert profile is not None
    _, (r0, r1, r2) = ratios_of(VFlowOpt(keep_ratio=budget), ONEVISION)
    assert all(0.0 < ratio <= 1.0 for ratio in (r0, r1, r2))
    assert achieved_ratio(r0, r1, r2, PAPER) == pytest.approx(budget, abs=1e-9)
    # In proportion, as far as it can be.
    first, second, _ = profile.stage_keep_ratios
    assert r0 == pytest.approx(min(1.0, first * budget / profile.keep_ratio))
    assert r1 == pytest.approx(second) or (r1 > second and r2 == pytest.approx(1.0))


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.0, 2.0), st.floats(0.01, 1.0), st.integers(3, 60))
def test_fitted_ratios(budget: float, times: float, r1: float, depth: int) -> None:
    for layers in ((1, 2), (depth // 3, 2 * depth // 3), (depth - 2, depth - 1)):
        parts = segments(layers, depth)
        try:
            found = fitted(budget, times * budget, r1, parts)
        except SettingsError as error:
            assert "before stage 2" in str(error)  # noqa: PT017
            continue
        assert all(0.0 < ratio <= 1.0 for ratio in found)
        assert achieved_ratio(*found, parts) == pytest.approx(budget, rel=1e-9)


def test_budgets_between_keep_the_exactness_of_their_profile() -> None:
    for budget in (0.2, 0.25, 0.3):
        _, found = VFlowOpt(keep_ratio=budget).schedule(POCKET, 0, 144)
        assert found.exact_budget == named_profile("pocket-25").exact_budget
        assert found.entropy_weight == named_profile("pocket-25").entropy_weight
    _, found = VFlowOpt(keep_ratio=0.25, exact_budget=False).schedule(POCKET, 0, 144)
    assert not found.exact_budget


@pytest.mark.parametrize("profile", ["auto", "none"])
def test_other_stage_layers_are_on_budget_too(profile: str) -> None:
    method = VFlowOpt(keep_ratio=0.25, stage_layers=(5, 20), profile=profile)
    layers, ratios = ratios_of(method, ONEVISION)
    assert layers == (5, 20)
    assert achieved_ratio(*ratios, (5, 15, 8)) == pytest.approx(0.25, abs=1e-9)


def test_stages_too_late_for_the_budget() -> None:
    late = VFlowOpt(keep_ratio=0.25, stage_layers=(26, 27))
    with pytest.raises(SettingsError, match=r"before stage 2; with this r1, r0 must be below 0\."):
        late.schedule(ONEVISION, 0, 100)


# -- settings over the profile -----------------------------------------------------------------


def test_settings_override_the_profile(tmp_path: Path) -> None:
    source = write(tmp_path)
    layers, found = VFlowOpt(keep_ratio=0.25, profile=source).schedule(OWN, 0, 100)
    assert layers == (9, 18)
    assert found.stage_keep_ratios == (0.3, 0.8, 0.891667)
    assert (found.anchor_threshold, found.entropy_weight) == (3.5, -0.25)
    assert (found.merge_grid_size, found.exact_budget) == (4.5, False)
    method = VFlowOpt(
        keep_ratio=0.25,
        profile=source,
        stage_layers=(10, 20),
        stage_keep_ratios=(0.3, 0.75, 0.9),
        anchor_threshold=0.0,
        entropy_weight=0.0,
        merge_grid_size="off",
        exact_budget=True,
    )
    layers, found = method.schedule(OWN, 0, 100)
    assert layers == (10, 20)
    assert found.stage_keep_ratios == (0.3, 0.75, 0.9)
    assert (found.anchor_threshold, found.entropy_weight) == (0.0, 0.0)
    assert (found.merge_grid_size, found.exact_budget) == (None, True)


def test_ratios_alone_take_the_rest_from_the_profile(tmp_path: Path) -> None:
    """Without a budget a named profile still gives layers, threshold and cells."""
    method = VFlowOpt(stage_keep_ratios=(0.5, 0.9, 0.5), profile=write(tmp_path))
    layers, found = method.schedule(OWN, 0, 100)
    assert layers == (9, 18)
    assert found.stage_keep_ratios == (0.5, 0.9, 0.5)
    assert (found.anchor_threshold, found.merge_grid_size) == (3.5, 4.5)
    # Their mean is 0.3973: of the three built-in ones the nearest is that of 50 %.
    _, found = VFlowOpt(stage_keep_ratios=(0.5, 0.9, 0.5)).schedule(ONEVISION, 0, 100)
    assert found.anchor_threshold == named_profile("onevision-7b-50").anchor_threshold


def test_ratios_that_miss_the_budget_name_their_mean() -> None:
    ratios = (0.3, 0.8, 0.5)
    mean = achieved_ratio(*ratios, PAPER)
    near = VFlowOpt(keep_ratio=mean + 0.0099, stage_keep_ratios=ratios)
    assert ratios_of(near, ONEVISION)[1] == ratios
    for method in (
        VFlowOpt(keep_ratio=mean + 0.0101, stage_keep_ratios=ratios),
        VFlowOpt(keep_tokens=25, stage_keep_ratios=ratios),
    ):
        with pytest.raises(SettingsError, match=f"keep {mean:.4f} of the tokens on average over"):
            method.schedule(ONEVISION, 0, 100)


def test_keep_tokens_is_a_share_of_each_image() -> None:
    method = VFlowOpt(keep_tokens=25)
    for n_tokens in (50, 100, 250):
        _, ratios = ratios_of(method, ONEVISION, n_tokens)
        assert achieved_ratio(*ratios, PAPER) == pytest.approx(25 / n_tokens, abs=1e-3)
    assert ratios_of(method, ONEVISION, 25)[1] == (1.0, 1.0, 1.0)


# -- models without a profile ------------------------------------------------------------------


def test_untuned_schedules_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    identity = stranger(32)
    with caplog.at_level(logging.WARNING, "mmlm_efficient.pruning"):
        for budget in (0.25, 0.25, 0.5):
            layers, found = VFlowOpt(keep_ratio=budget).schedule(identity, 0, 100)
            assert layers == (10, 21)
            assert found == untuned(budget, (10, 11, 11))
    (record,) = caplog.records
    assert identity.name in record.message
    assert f"mmlm calibrate vflowopt --model {identity.name} --budget 0.25" in record.message


@pytest.mark.parametrize(
    "method",
    [
        VFlowOpt(keep_ratio=0.25, profile="none"),
        VFlowOpt(keep_ratio=1.0),
        VFlowOpt(stage_keep_ratios=(0.5, 0.5, 0.5)),
    ],
    ids=["none", "whole", "ratios"],
)
def test_who_asks_for_it_is_not_warned(method: VFlowOpt, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mmlm_efficient.pruning"):
        method.schedule(stranger(), 0, 100)
    assert caplog.records == []


def test_none_leaves_the_models_own_profile_alone() -> None:
    _, found = VFlowOpt(keep_ratio=0.25, profile="none").schedule(ONEVISION, 0, 100)
    assert found == untuned(0.25, PAPER)


# -- profiles of other models ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "else/other"}, ["'someone/own-model'", "'else/other'"]),
        ({"family": "llava_next"}, ["family='llava'", "'llava_next'"]),
        ({"decoder_width": 128}, ["decoder_width=64", "128"]),
        ({"tower_layers": 9}, ["tower_layers=8", "9"]),
        ({"decoder_layers": 27}, ["decoder_layers=28", "27"]),
    ],
)
def test_a_profile_of_another_model(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    source, identity = write(tmp_path), Identity(**{**vars(OWN), **changes})
    for method in (
        VFlowOpt(keep_ratio=0.25, profile=source),
        VFlowOpt(stage_keep_ratios=(0.3, 0.8, 0.9), profile=source),
    ):
        with pytest.raises(SettingsError, match="is of another model") as caught:
            method.schedule(identity, 0, 100)
        message = str(caught.value)
        assert all(word in message for word in [*words, source, "allow_profile_mismatch=True"])
    allowed = VFlowOpt(keep_ratio=0.25, profile=source, allow_profile_mismatch=True)
    if "decoder_layers" in changes:
        with pytest.raises(SettingsError, match=r"28 decoder layers, this model has\s+27"):
            allowed.schedule(identity, 0, 100)
    else:
        assert ratios_of(allowed, identity) == ((9, 18), (0.3, 0.8, 0.891667))


def test_the_owner_of_the_name_does_not_matter(tmp_path: Path) -> None:
    source = write(tmp_path)
    for name in ("own-model", "else/own-model", "/some/folder/own-model/"):
        identity = Identity(**{**vars(OWN), "name": name})
        assert checked_profile(source, identity, allow_mismatch=False).model == VALUES["model"]


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 3.0}, "threshold: Extra inputs are not permitted"),
        ({"attention_layer": 3}, "attention_layer: Extra inputs"),
        ({"family": None}, "family: Field required"),
        ({"keep_ratio": 0.0}, "keep_ratio: Input should be greater than 0"),
        ({"keep_ratio": 1.5}, "keep_ratio: Input should be less than or equal to 1"),
        ({"decoder_layers": 2}, "decoder_layers: Input should be greater than or equal to 3"),
        ({"stage_layers": [0, 18]}, r"stage_layers are \[0, 18\].*1\.\.27"),
        ({"stage_layers": [9, 28]}, r"stage_layers are \[9, 28\].*1\.\.27"),
        ({"stage_layers": [9]}, r"stage_layers: 1: Field required"),
        ({"stage_keep_ratios": [0.3, 1.2, 0.9]}, r"must be in \(0, 1\], got 1.2"),
        ({"stage_keep_ratios": [0.3, 0.0, 0.9]}, r"must be in \(0, 1\], got 0.0"),
        ({"stage_keep_ratios": [0.9, 0.9, 0.9]}, r"keep 0\.8\d+ on average, but keep_ratio is"),
        ({"anchor_threshold": -1}, "anchor_threshold: Input should be greater"),
        ({"anchor_threshold": float("inf")}, "anchor_threshold: Input should be a finite"),
        ({"entropy_weight": 2}, "entropy_weight: Input should be less"),
        ({"merge_grid_size": 0.5}, "merge_grid_size: Input should be greater"),
    ],
)
def test_broken_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write(tmp_path, **changes)
    with pytest.raises(SettingsError, match=message) as caught:
        named_profile(source)
    assert str(caught.value).startswith(f"profile {source}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: [", "is not valid YAML"),
        (b"", "holds NoneType, not a profile"),
        (b"- 1\n- 2\n", "holds list, not a profile"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"1: 2\n", "not a profile|Keys should be strings|Field required"),
    ],
)
def test_broken_files(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(SettingsError, match=message):
        named_profile(str(path))


def test_missing_files(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.yaml"), str(tmp_path)):
        with pytest.raises(SettingsError, match="neither a file nor a built-in profile"):
            named_profile(source)
    with pytest.raises(SettingsError, match=r"Did you mean 'onevision-7b-25'\?.*Built in: .*calib"):
        named_profile("onevison-7b-25")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    source = write(tmp_path)
    assert named_profile(source).anchor_threshold == 3.5
    write(tmp_path, anchor_threshold=7.25)
    assert named_profile(source).anchor_threshold == 7.25


def test_relative_names_follow_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, threshold in (("a", 1.5), ("b", 2.5)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, anchor_threshold=threshold)
        monkeypatch.chdir(tmp_path / folder)
        assert named_profile("own.yaml").anchor_threshold == threshold


def test_a_written_profile_is_read_back(tmp_path: Path) -> None:
    from mmlm_efficient.calibration.vflowopt import write_profile

    for grid in (4.5, None):
        profile = Profile(**{**VALUES, "merge_grid_size": grid, "exact_budget": True})
        write_profile(profile, tmp_path / "own.yaml")
        assert named_profile(str(tmp_path / "own.yaml")) == profile
