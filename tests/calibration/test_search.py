"""The search reaches the target of the method's toy, goes on after a kill, and refuses bad logs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from PIL import Image

from mmlm_efficient.calibration.search import SearchResult, plot_search, search
from mmlm_efficient.calibration.search_log import Evaluation
from mmlm_efficient.errors import MissingExtraError, SettingsError, UnsupportedError

TARGET = (0.3, 0.85, 0.55, 0.4, 0.5)
WEIGHTS = (3.0, 2.0, 1.0, 0.6, 0.4)
# The released 5-D box of VFlowOpt at a budget of 0.25.
BOX = {"r0": (0.25, 0.375), "r1": (0.5333, 1.0), "t": (0.0, 50.0), "a": (3.0, 24.0), "w": (-1, 1)}
SMALL = {"x": (0.0, 10.0), "y": (-1.0, 1.0)}
N, N_INITIAL = 12, 5


def toy(parameters: dict[str, float]) -> float:
    """Smooth, many small ripples, maximum about 0.995."""
    pairs = zip(parameters.values(), BOX.values(), strict=True)
    u = [(value - low) / (high - low) for value, (low, high) in pairs]
    distance = sum(w * (a - b) ** 2 for w, a, b in zip(WEIGHTS, u, TARGET, strict=True))
    return math.exp(-distance) + 0.02 * sum(math.cos(9 * each) for each in u) / len(u)


def bowl(parameters: dict[str, float]) -> float:
    return -((parameters["x"] - 7) ** 2) / 10 - (parameters["y"] - 0.2) ** 2


def small(
    log: Path | None = None,
    objective: Callable[[dict[str, float]], float] = bowl,
    **changes: Any,
) -> SearchResult:
    arguments: dict[str, Any] = {
        "n_evaluations": N,
        "n_initial_points": N_INITIAL,
        "seed": 3,
        "log_path": log,
        "settings": {"model": "tiny", "samples": [1, 2]},
        "progress": False,
        **changes,
    }
    return search(objective, arguments.pop("space", SMALL), **arguments)


def course(result: SearchResult) -> list[tuple[dict[str, float], float]]:
    """Everything but the times."""
    return [(evaluation.parameters, evaluation.value) for evaluation in result.evaluations]


@pytest.fixture(scope="module")
def undisturbed() -> SearchResult:
    return small()


@pytest.fixture
def full_log(tmp_path: Path) -> list[bytes]:
    path = tmp_path / "full.jsonl"
    small(path)
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("seed", [42, 0, 1])
def test_reaches_the_maximum_of_the_toy_within_50_evaluations(seed: int) -> None:
    result = search(toy, BOX, seed=seed, progress=False)
    assert len(result.evaluations) == 50
    assert result.best.value >= 0.99
    assert course(search(toy, BOX, 35, seed=seed, progress=False)) == course(result)[:35]


def test_the_gaussian_process_beats_the_design_alone() -> None:
    design = search(toy, BOX, n_initial_points=50, progress=False)
    assert design.best.value < 0.97


def test_the_design_fills_the_box_and_depends_on_the_seed_alone() -> None:
    first = search(lambda p: 0.0, SMALL, 16, 16, progress=False)
    # A Sobol sequence has one of 16 points in each sixteenth of every axis.
    for name, (low, high) in SMALL.items():
        places = [16 * (each.parameters[name] - low) / (high - low) for each in first.evaluations]
        assert sorted(int(place) for place in places) == list(range(16))
    shorter = search(lambda p: 1.0, SMALL, 7, 27, progress=False)
    assert [each.parameters for each in shorter.evaluations] == [
        each.parameters for each in first.evaluations[:7]
    ]
    other = search(lambda p: 0.0, SMALL, 1, 16, seed=43, progress=False)
    assert other.evaluations[0].parameters != first.evaluations[0].parameters


def test_a_constant_objective_is_searched_without_error() -> None:
    result = search(lambda p: 0.5, SMALL, 8, 3, progress=False)
    assert result.best.number == 0
    for evaluation in result.evaluations:
        assert all(low <= evaluation.parameters[k] <= high for k, (low, high) in SMALL.items())


def test_global_random_state_and_log_level_are_left_alone() -> None:
    before, level = torch.get_rng_state(), optuna.logging.get_verbosity()
    small()
    assert torch.equal(torch.get_rng_state(), before)
    assert optuna.logging.get_verbosity() == level


def test_the_objective_cannot_change_what_is_logged(undisturbed: SearchResult) -> None:
    def greedy(parameters: dict[str, float]) -> float:
        value = bowl(parameters)
        parameters.clear()
        return value

    assert course(small(objective=greedy)) == course(undisturbed)


# -- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", range(N + 1))
def test_goes_on_after_a_kill_as_if_nothing_had_happened(
    kill_at: int, tmp_path: Path, undisturbed: SearchResult
) -> None:
    log, calls = tmp_path / "new folder" / "search.jsonl", 0

    def dies(parameters: dict[str, float]) -> float:
        nonlocal calls
        if calls == kill_at:
            raise KeyboardInterrupt
        calls += 1
        return bowl(parameters)

    if kill_at < N:
        with pytest.raises(KeyboardInterrupt):
            small(log, dies)
    else:
        small(log, dies)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["number"] for line in lines[1:]] == list(range(kill_at))
    new: list[int] = []
    result = small(log, on_evaluation=lambda evaluation: new.append(evaluation.number))
    assert course(result) == course(undisturbed)
    assert result.resumed == kill_at
    assert new == list(range(kill_at, N))
    assert len(log.read_text().splitlines()) == 1 + N


def test_torn_last_line_is_dropped_and_its_evaluation_repeated(
    full_log: list[bytes], tmp_path: Path, undisturbed: SearchResult
) -> None:
    log = tmp_path / "torn.jsonl"
    for cut in (1, len(full_log[6]) // 2, len(full_log[6]) - 2):
        log.write_bytes(b"".join(full_log[:6]) + full_log[6][:cut])
        result = small(log)
        assert result.resumed == 5
        assert course(result) == course(undisturbed)
        assert len(log.read_bytes().splitlines()) == len(full_log)
    assert list(tmp_path.glob("*.part")) == []


def test_torn_line_within_a_character(tmp_path: Path) -> None:
    log, space = tmp_path / "log.jsonl", {"é": (0.0, 1.0)}
    small(log, lambda p: p["é"], space=space, n_evaluations=2)
    data = log.read_bytes()
    log.write_bytes(data[: data.rindex("é".encode()) + 1])
    again = small(log, lambda p: p["é"], space=space, n_evaluations=2)
    assert again.resumed == 1
    lines = data.decode().splitlines()
    assert log.read_text("utf-8").splitlines()[:2] == lines[:2]
    assert again.evaluations[1].parameters == json.loads(lines[2])["parameters"]


def test_whole_last_line_without_newline_is_kept(full_log: list[bytes], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(full_log[:4]).rstrip(b"\n"))
    assert small(log, n_evaluations=3).resumed == 3
    assert log.read_bytes() == b"".join(full_log[:4])
    log.write_bytes(full_log[0].rstrip(b"\n"))
    small(log, n_evaluations=1)
    assert len(log.read_bytes().splitlines()) == 2


def test_more_evaluations_go_on_from_the_log_and_fewer_cut_it(
    full_log: list[bytes], tmp_path: Path, undisturbed: SearchResult
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(full_log[:8]))
    assert course(small(log)) == course(undisturbed)
    fewer = small(log, n_evaluations=4)
    assert course(fewer) == course(undisturbed)[:4]
    assert fewer.resumed == 4
    assert len(log.read_bytes().splitlines()) == 1 + N


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed is 3 in the log and 4 now"),
        ({"n_initial_points": 6}, "n_initial_points is 5 in the log and 6 now"),
        ({"settings": {"model": "other", "samples": [1, 2]}}, 'settings.model is "tiny" in the'),
        ({"settings": {"model": "tiny"}}, r"settings.samples is \[1, 2\] in the log and not set"),
        ({"space": {"x": (0, 9), "y": (-1, 1)}}, r"space.x is \[0.0, 10.0\] in the log and \["),
        ({"space": {"y": (-1, 1), "x": (0, 10)}}, r'parameters is \["x", "y"\] in the log and'),
    ],
)
def test_log_of_other_settings_is_refused_and_left_alone(
    changes: dict[str, Any], says: str, full_log: list[bytes], tmp_path: Path
) -> None:
    log = tmp_path / "full.jsonl"
    with pytest.raises(SettingsError, match=says) as caught:
        small(log, **changes)
    assert "another file, or delete" in str(caught.value)
    assert log.read_bytes() == b"".join(full_log)


def test_equal_settings_in_another_form_are_the_same(full_log: list[bytes], tmp_path: Path) -> None:
    same = {"samples": (1, 2), "model": "tiny"}
    assert small(tmp_path / "full.jsonl", settings=same).resumed == N


def test_log_of_another_format_and_foreign_files_are_refused(
    full_log: list[bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(full_log[0].replace(b'"format": 2', b'"format": 1'))
    with pytest.raises(SettingsError, match="format is 1 in the log and 2 now"):
        small(log)
    for foreign in (b"notes\n", b"{}", b"[1]\n", b"\xff\xfe"):
        log.write_bytes(foreign)
        with pytest.raises(SettingsError, match="is not the log of a search"):
            small(log)
        assert log.read_bytes() == foreign


@pytest.mark.parametrize(
    "bad",
    [
        b"\n",
        b'{"number": 2}\n',
        b'{"number": 9, "parameters": {"x": 1.0, "y": 0.0}, "value": 1.0, "seconds": 1.0}\n',
        b'{"number": 2, "parameters": {"x": 1.0, "z": 0.0}, "value": 1.0, "seconds": 1.0}\n',
        b'{"number": 2, "parameters": {"x": 11.0, "y": 0.0}, "value": 1.0, "seconds": 1.0}\n',
        b'{"number": 2, "parameters": {"x": 1.0, "y": 0.0}, "value": NaN, "seconds": 1.0}\n',
        b'{"number": 2, "parameters": {"x": "1", "y": 0.0}, "value": 1.0, "seconds": 1.0}\n',
    ],
)
def test_broken_line_is_named(bad: bytes, full_log: list[bytes], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join([*full_log[:3], bad, *full_log[4:]]))
    with pytest.raises(SettingsError, match="line 4 of .* is not evaluation 2"):
        small(log)


def test_log_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        small(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="log_path: .* cannot be"):
        small(tmp_path / "file" / "log.jsonl")

    def removes(parameters: dict[str, float]) -> float:
        (tmp_path / "log.jsonl").unlink()
        return 0.0

    with pytest.raises(SettingsError, match="cannot be written"):
        small(tmp_path / "log.jsonl", removes)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_no_number_names_the_parameters(value: float, tmp_path: Path) -> None:
    log, seen = tmp_path / "log.jsonl", []

    def breaks(parameters: dict[str, float]) -> float:
        seen.append(parameters)
        return value if len(seen) == 7 else bowl(parameters)

    with pytest.raises(UnsupportedError, match=f"evaluation 6: .* is {value}") as caught:
        small(log, breaks)
    assert str(seen[6]["x"]) in str(caught.value)
    assert '"y"' in str(caught.value)
    assert small(log).resumed == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_evaluations": 0}, "n_evaluations must be at least 1"),
        ({"n_initial_points": 0}, "n_initial_points must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"space": {}}, "space is empty"),
        ({"space": {"x": (1, 1)}}, "'x' has the bounds"),
        ({"space": {"x": (0, math.inf)}}, "'x' has the bounds"),
        ({"space": {"x": (math.nan, 1)}}, "'x' has the bounds"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        small(**changes)


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    for bad in ({"a": object()}, {"a": math.nan}):
        with pytest.raises(SettingsError, match="settings must be JSON"):
            small(tmp_path / "log.jsonl", settings=bad)


@pytest.mark.parametrize("module", ["optuna", "scipy"])
def test_missing_extra_is_named_before_the_first_evaluation(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    def never(parameters: dict[str, float]) -> float:
        raise AssertionError

    with pytest.raises(MissingExtraError, match=r"mmlm-efficient\[calibrate\]"):
        small(objective=never)


# -- result ----------------------------------------------------------------------------------


def test_result(undisturbed: SearchResult) -> None:
    values = [evaluation.value for evaluation in undisturbed.evaluations]
    assert undisturbed.best.value == max(values)
    assert undisturbed.running_best == [max(values[: n + 1]) for n in range(N)]
    content = json.loads(json.dumps(undisturbed.to_dict()))
    assert content["best"] == content["evaluations"][undisturbed.best.number]
    assert content["space"] == {"x": [0.0, 10.0], "y": [-1.0, 1.0]}
    assert (content["resumed"], content["seed"], content["n_initial_points"]) == (0, 3, N_INITIAL)
    ties = tuple(Evaluation(n, {"x": n / 3}, 1.0, 0.1) for n in range(3))
    assert SearchResult(ties, 0, {"x": (0.0, 1.0)}, 3, 0).best.number == 0
    with pytest.raises(SettingsError, match="at least one"):
        SearchResult((), 0, {"x": (0.0, 1.0)}, 3, 0)


def test_progress_shows_the_best_value(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    small(log, n_evaluations=4)
    capsys.readouterr()
    result = small(log, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{N}/{N}" in shown.err
    assert f"best {result.best.value:.5g}" in shown.err


@pytest.mark.parametrize("n_parameters", [1, 5, 7])
def test_plot_is_written(n_parameters: int, tmp_path: Path) -> None:
    space = {f"$p_{n}": (0.0, 1.0) for n in range(n_parameters)}
    result = search(lambda p: sum(p.values()), space, 6, 4, progress=False)
    path = tmp_path / "plots" / "search.png"
    plot_search(result, path)
    with Image.open(path) as drawing:
        width, height = drawing.size
        colours = {colour for _, colour in drawing.convert("RGB").getcolors(1 << 20) or ()}
    assert width >= 600
    assert height > 500
    assert (214, 39, 40) in colours  # the running best
    with pytest.raises(SettingsError, match="png"):
        plot_search(result, tmp_path / "search.jpg")
