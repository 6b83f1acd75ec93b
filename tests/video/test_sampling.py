"""Which frames are taken: golden indices, hand-computed cases, and what must always hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.video import FrameSampling, fps_sample, uniform_sample
from mmlm_efficient.video.sampling import evenly_spaced, time_sample

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "video_xl_2" / "frame_sampling.npz")
# The rows of `cases` with their exact values: frames, rate, cap, base rate, highest rate.
CASES: list[tuple[int, float, int, float, float | None]] = [
    (300, 30, 256, 1, 4),
    (90, 30, 256, 1, 4),
    (9000, 30, 256, 1, 4),
    (1500, 25, 400, 1, 4),
    (4800, 23.976, 400, 1, 4),
    (108000, 29.97, 600, 1, 4),
    (30, 10, 16, 1, 4),
    (7, 29.97, 16, 1, 4),
    (1000, 59.94, 100, 1, None),
    (600, 24, 0, 1, None),
    (2400, 24, 150, 2, 4),
]
STORED = [case for case in range(len(CASES)) if f"case{case}_index" in GOLDEN]

rates = st.floats(0.1, 240.0)
counts = st.integers(1, 5000)


def test_the_cases_are_those_of_the_golden_file() -> None:
    rows = [[-1.0 if value is None else value for value in case] for case in CASES]
    assert np.array_equal(GOLDEN["cases"], np.array(rows, dtype=np.float32))
    assert len(STORED) >= 6


@pytest.mark.parametrize("case", STORED)
def test_golden(case: int) -> None:
    n_frames, fps, max_frames, base_fps, max_fps = CASES[case]
    sampled = fps_sample(n_frames, fps, base_fps, max_fps, max_frames)
    assert sampled.indices == tuple(GOLDEN[f"case{case}_index"].tolist())
    expected = np.round(GOLDEN[f"case{case}_seconds"].astype(np.float64), 1)
    assert np.array_equal(np.array(sampled.seconds), expected)
    assert all(type(index) is int for index in sampled.indices)


def test_cases_without_stored_arrays_by_hand() -> None:
    # 60 frames at 1 fps; 400 // 60 = 6, so the rate goes up to 4: a step of round(6.25) = 6.
    assert fps_sample(1500, 25, max_frames=400).indices == tuple(range(0, 1500, 6))
    # 3604 frames at 1 fps are too many for 600: spread.
    spread = fps_sample(108000, 29.97, max_frames=600).indices
    assert len(spread) == 600
    assert (spread[0], spread[1], spread[-1]) == (0, 180, 107999)
    # 7 frames: 16 // 1 = 16, at most 4: a step of round(7.4925) = 7, so still one frame.
    assert fps_sample(7, 29.97, max_frames=16).indices == (0,)
    # No cap: 24 fps is never raised.
    assert fps_sample(600, 24, max_fps=None).indices == tuple(range(0, 600, 24))


def test_the_step_is_rounded_to_the_even_neighbour() -> None:
    assert fps_sample(30, 10, max_frames=16).indices == tuple(range(0, 30, 2))  # 10 / 4 = 2.5
    assert fps_sample(10, 3.5).indices == (0, 4, 8)


def test_a_video_slower_than_the_wanted_rate_gives_every_frame() -> None:
    assert fps_sample(5, 0.4).indices == (0, 1, 2, 3, 4)  # the step would be 0


def test_a_step_beyond_all_numbers_takes_the_first_frame() -> None:
    assert fps_sample(5, 1e300, base_fps=1e-300).indices == (0,)


@pytest.mark.parametrize(
    ("n_frames", "count", "indices"),
    [
        (10, 4, (0, 3, 6, 9)),
        (10, 3, (0, 4, 9)),  # 4.5 is cut down
        (10, 1, (0,)),
        (10, 10, tuple(range(10))),
        (3, 8, (0, 1, 2)),
        (1, 1, (0,)),
    ],
)
def test_uniform(n_frames: int, count: int, indices: tuple[int, ...]) -> None:
    assert uniform_sample(n_frames, count) == indices


@given(counts, counts)
def test_uniform_is_ascending_and_reaches_both_ends(n_frames: int, count: int) -> None:
    indices = uniform_sample(n_frames, count)
    assert len(indices) == min(n_frames, count)
    gaps = np.diff(indices)
    assert indices[0] == 0
    if len(indices) > 1:
        assert indices[-1] == n_frames - 1
        assert 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1


@given(counts, rates, rates, st.none() | rates, st.integers(0, 600))
def test_by_rate_is_ascending_and_keeps_the_cap(
    n_frames: int, fps: float, base_fps: float, max_fps: float | None, max_frames: int
) -> None:
    sampled = fps_sample(n_frames, fps, base_fps, max_fps, max_frames)
    assert sampled.indices[0] == 0
    assert sampled.indices[-1] < n_frames
    assert np.all(np.diff(sampled.indices) >= 1)
    assert max_frames == 0 or len(sampled.indices) <= max_frames
    assert sampled.seconds == tuple(round(index / fps, 1) for index in sampled.indices)


# Variable frame rates


@given(counts, st.sampled_from([8, 12, 24, 48]), st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_by_time_equals_by_rate_for_even_times(
    n_frames: int, fps: int, base_fps: int, max_frames: int
) -> None:
    """Where the steps are whole frames and nothing is spread, both rules say the same."""
    by_rate = fps_sample(n_frames, fps, base_fps, max_fps=4, max_frames=max_frames).indices
    by_time = time_sample(np.arange(n_frames) / fps, base_fps, 4, max_frames)
    if max_frames == 0 or len(by_rate) < max_frames:
        raised = min(4, max_frames // len(range(0, n_frames, fps // base_fps)))
        if fps % max(raised, 1) == 0:
            assert by_time == by_rate
    assert max_frames == 0 or len(by_time) <= max_frames


@given(
    st.lists(st.integers(1, 4000), max_size=60),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_by_time_takes_the_nearest_frames(gaps_ms: list[int], rate: float) -> None:
    """Against the plain rule, wanted time by wanted time."""
    times = np.concatenate([[0.0], np.cumsum(gaps_ms)]) / 1000
    average = times[-1] / max(1, len(times) - 1)
    wanted, end = [0.0], times[-1] + average
    while wanted[-1] + 1 / rate < end - 1e-6 / rate:
        wanted.append(wanted[-1] + 1 / rate)
    plain = sorted({int(np.argmin(np.round(np.abs(times - time), 6))) for time in wanted})
    assert time_sample(times, rate) == tuple(plain)


def test_by_time_where_by_rate_is_wrong() -> None:
    """Five seconds at 10 fps, then ten at 1 fps: 60 frames in 15 s, 4 fps on average."""
    times = [index / 10 for index in range(50)] + [5.0 + index for index in range(10)]
    assert time_sample(times) == (0, 10, 20, 30, 40, *range(50, 60))
    assert fps_sample(60, 4.0).indices == tuple(range(0, 60, 4))
    assert FrameSampling(mode="fps").indices_of(times, 4.0) == time_sample(times)
    assert FrameSampling(frames=4).indices_of(times, 4.0) == (0, 19, 39, 59)


def test_by_time_takes_a_still_frame_once_and_the_earlier_of_two() -> None:
    assert time_sample([0.0, 60.0, 120.0]) == (0, 1, 2)
    assert time_sample([0.0, 0.5, 1.5, 2.0]) == (0, 1, 3)  # 1.0 lies in the middle of 0.5 and 1.5


def test_by_time_raises_the_rate_and_keeps_the_cap() -> None:
    times = [index / 10 for index in range(50)] + [5.0 + index for index in range(10)]
    # 15 frames at 1 fps; 30 // 15 = 2 fps fits: from 5 s on there is one frame per second.
    assert time_sample(times, max_frames=30) == (*range(0, 50, 5), *range(50, 60))
    # Five of 14 s, every 3.5 s: 3.5, 7, 10.5 (between 10 and 11, the earlier one) and 14.
    assert time_sample(times, max_frames=5) == (0, 35, 52, 55, 59)


def test_by_time_one_frame_and_a_shifted_start() -> None:
    assert time_sample([7.0]) == (0,)
    assert time_sample([7.0, 7.5, 8.0]) == (0, 2)


def test_by_time_a_fine_grid_costs_nothing() -> None:
    assert time_sample([0.0, 1e9, 3e9], base_fps=1e6) == (0, 1, 2)


def test_times_rounded_to_milliseconds_are_even() -> None:
    assert evenly_spaced(np.round(np.arange(1000) / 29.97, 3))
    assert not evenly_spaced([0.0, 0.1, 0.2, 0.3, 0.9])
    assert evenly_spaced([0.0])
    assert evenly_spaced([0.0, 9.0])


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames must be a whole number >= 1, got 0"),
        ({"frames": True}, "frames must be a whole number >= 1, got True"),
        ({"frames": 2.5}, "frames must be"),
        ({"mode": "fps", "base_fps": 0}, "base_fps must be a number of frames per second > 0"),
        ({"mode": "fps", "base_fps": float("nan")}, "base_fps must be"),
        ({"mode": "fps", "base_fps": "2"}, "base_fps must be"),
        ({"mode": "fps", "max_fps": -1}, "max_fps must be"),
        ({"mode": "fps", "max_frames": -1}, "max_frames must be a whole number >= 0"),
        ({"mode": "keyframes"}, "mode: .*'uniform' or 'fps'.*'keyframes'"),
        ({"frame": 8}, "unknown setting 'frame', did you mean 'frames'"),
        ({"max_frames": 8}, "max_frames does nothing with mode='uniform', which takes frames"),
        ({"mode": "fps", "frames": 8}, "frames does nothing with mode='fps'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FrameSampling(**settings)


def test_settings_survive_a_round_trip_and_take_numpy_numbers() -> None:
    for sampling in (FrameSampling(frames=np.int64(4)), FrameSampling(mode="fps", max_fps=None)):
        assert FrameSampling(**sampling.model_dump()) == sampling
        assert len({sampling, FrameSampling(**sampling.model_dump())}) == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_sample(0, 4),
        lambda: uniform_sample(4, 0),
        lambda: fps_sample(0, 30),
        lambda: fps_sample(10, 0.0),
        lambda: fps_sample(10, float("inf")),
        lambda: fps_sample(10, 30, base_fps=-1),
        lambda: fps_sample(10, 30, max_fps=0),
        lambda: fps_sample(10, 30, max_frames=-1),
        lambda: time_sample([]),
        lambda: time_sample([0.0, 2.0, 1.0]),
        lambda: time_sample([0.0, float("nan")]),
    ],
)
def test_bad_numbers(call: Any) -> None:
    with pytest.raises(SettingsError):
        call()
