"""The space that is searched, the profile of what was found, and what the command says of it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmlm_efficient.calibration.search import SearchResult
from mmlm_efficient.calibration.search_log import Evaluation
from mmlm_efficient.calibration.vflowopt import _box, _profile, candidate, write_profile
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import VFlowOpt
from mmlm_efficient.pruning.vflowopt_plan import achieved_ratio, segments
from mmlm_efficient.pruning.vflowopt_profiles import named_profile

THETA = {
    "c0": 0.3,
    "u": 0.4,
    "anchor_threshold": 2.0,
    "merge_grid_size": 3.0,
    "entropy_weight": 0.4,
}

STAGES = [((9, 18), 28), ((1, 2), 3), ((2, 4), 6), ((4, 5), 6), ((1, 5), 6), ((30, 31), 32)]
STAGES += [((10, 30), 32), ((126, 127), 128), ((1, 127), 128)]


@pytest.mark.parametrize("space", ["budget", "released"])
@pytest.mark.parametrize(("layers", "depth"), STAGES)
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_every_point_of_the_box_is_a_schedule_within_the_budget(
    space: Any, layers: tuple[int, int], depth: int, budget: float
) -> None:
    lengths = segments(layers, depth)
    box = _box(space, budget, lengths, [(12, 12)])
    assert all(low < high for low, high in box.values())
    first, second, *rest = box
    fixed = {name: box[name][0] for name in rest}
    shares = (0.0, 0.5, 1.0)
    for pair in itertools.product(shares, shares):
        theta = dict(fixed)
        for name, share in zip((first, second), pair, strict=True):
            low, high = box[name]
            theta[name] = low + share * (high - low)
        ratios = candidate(theta, budget, layers, lengths, space).stage_keep_ratios
        assert ratios is not None
        assert all(0.0 < ratio <= 1.0 for ratio in ratios)
        assert ratios[0] == pytest.approx(theta[first])
        kept = achieved_ratio(*ratios, lengths)
        assert kept <= budget + 1e-9
        if space == "budget":
            assert kept == pytest.approx(budget, abs=1e-6)
        else:
            assert ratios[1] <= theta["r1"]
            # Either the budget is spent, or the last stage cannot keep more.
            assert kept == pytest.approx(budget) or ratios[2] == 1.0


def test_the_released_ratios_are_taken_as_they_are_where_they_leave_something() -> None:
    theta = {**THETA, "r0": 0.3, "r1": 0.8}
    ratios = candidate(theta, 0.25, (9, 18), (9, 9, 10), "released").stage_keep_ratios
    assert ratios == pytest.approx((0.3, 0.8, 0.891667), abs=1e-6)
    # 28 * 0.25 - 9 * 0.375 = 3.625 are left for 9 layers at 0.375 * r1 and the last stage.
    theta = {**THETA, "r0": 0.375, "r1": 1.0}
    ratios = candidate(theta, 0.25, (9, 27), (9, 18, 1), "released").stage_keep_ratios
    assert ratios is not None
    assert ratios[1] == pytest.approx(0.98 * 3.625 / (18 * 0.375))
    assert ratios[2] == pytest.approx(0.02 * 3.625 / (ratios[0] * ratios[1]))


def test_the_box_takes_its_scale_from_the_middle_of_the_samples() -> None:
    grids = [(54, 54), (27, 27), (2, 3), (27, 20), (27, 27)]
    for order in (grids, grids[::-1]):
        box = _box("budget", 0.25, (9, 9, 10), order)
        assert box["anchor_threshold"] == pytest.approx((0.0, 50.0))
        assert box["merge_grid_size"] == pytest.approx((3.0, 24.0))


# -- the profile -----------------------------------------------------------------------------


def made(best: VFlowOpt, budget: float = 0.25, **changes: Any) -> Any:
    """The profile of a schedule, without a search."""
    identity = SimpleNamespace(
        **{
            "name": "owner/some-model",
            "family": "llava",
            "decoder_layers": 28,
            "decoder_width": 64,
            "tower_layers": 12,
            **changes,
        }
    )
    result = SearchResult((Evaluation(0, {"x": 0.5}, 1.9, 1.0),), 0, {"x": (0.0, 1.0)}, 1, 42)
    settings = {
        "space": "released",
        "samples": 2,
        "samples_sha256": "0" * 16,
        "weights_sha256": "1" * 16,
    }
    parts: Any = SimpleNamespace(identity=identity)
    return _profile(parts, budget, best, [0.9, 1.0], 0.8, result, settings)


def test_a_schedule_under_the_budget_makes_a_profile_of_what_it_keeps(tmp_path: Path) -> None:
    theta = {**THETA, "r0": 0.25, "r1": 0.2 / 0.375}
    best = candidate(theta, 0.25, (9, 18), (9, 9, 10), "released")
    profile = made(best)
    assert profile.keep_ratio == pytest.approx((9 + 19 * 0.2 / 0.375) / 28 * 0.25, abs=1e-6)
    assert profile.search["asked_keep_ratio"] == 0.25
    assert profile.stage_keep_ratios == best.stage_keep_ratios
    path = tmp_path / "profile.yaml"
    write_profile(profile, path)
    assert named_profile(str(path)) == profile
    # As the command writes it: the schedule that was found; for the asked budget, one that fits.
    kept = profile.schedule(float(f"{profile.keep_ratio:g}")).stage_keep_ratios
    assert kept == profile.stage_keep_ratios
    asked = profile.schedule(0.25).stage_keep_ratios
    assert achieved_ratio(*asked, profile.segments) == pytest.approx(0.25)


def test_a_schedule_on_budget_makes_a_profile_of_the_budget() -> None:
    best = candidate(THETA, 0.25, (9, 18), (9, 9, 10), "budget")
    profile = made(best)
    assert profile.keep_ratio == 0.25
    assert profile.exact_budget


def test_what_makes_no_profile_is_an_error_of_the_project() -> None:
    best = candidate(THETA, 0.25, (9, 18), (9, 9, 10), "budget")
    with pytest.raises(SettingsError, match=r"some-model makes no profile: tower_layers: "):
        made(best, tower_layers=0)
    with pytest.raises(SettingsError, match="no stage_layers"):
        made(VFlowOpt(keep_ratio=0.25))


def test_the_command_says_what_was_resumed_and_what_is_really_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmlm_efficient import cli
    from mmlm_efficient.calibration import vflowopt as module

    theta = {**THETA, "r0": 0.25, "r1": 0.2 / 0.375}
    profile = made(candidate(theta, 0.25, (9, 18), (9, 9, 10), "released"))
    evaluations = tuple(Evaluation(number, {"x": 0.5}, 1.9, 1.0) for number in range(3))
    result = SearchResult(evaluations, 2, {"x": (0.0, 1.0)}, 1, 42)
    outcome = module.Calibration(profile, result, 0.95, 0.9, 0.8)
    monkeypatch.setattr(module, "optimize_profile", lambda *_, **__: outcome)
    out = tmp_path / "p.yaml"
    given = ["--data", "pocket", "--budget", "0.25", "--space", "released", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["mmlm", "calibrate", "vflowopt", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert f"3 evaluations, 2 of them resumed from {tmp_path / 'p.search.jsonl'}\n" in said
    assert f"keeps {profile.keep_ratio!r} on average, the budget is 0.25\n" in said
    assert f"VFlowOpt(keep_ratio={profile.keep_ratio!r}, profile='{out}')" in said
