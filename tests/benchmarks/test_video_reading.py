"""The benchmark of reading videos: both ways read the same frames, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import video_reading
from mmlm_efficient.video import FrameSampling, load_video


def test_both_ways_read_the_same_frames(tmp_path: Path) -> None:
    video_reading.make_film(tmp_path / "film.mp4", 40)
    assert load_video(tmp_path / "film.mp4").n_frames == 40
    for sampling in video_reading.samplings(4, 40).values():
        ours, theirs = (
            video_reading.read(way, tmp_path / "film.mp4", sampling) for way in video_reading.WAYS
        )
        assert len(ours) == len(theirs) == 4
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).mean() < 3


def test_both_samplings_take_the_count_that_was_asked_for() -> None:
    for count in (8, 64, 512):
        picked = video_reading.samplings(count, 45_000)
        assert isinstance(picked["fps"], FrameSampling)
        assert {len(one.indices(45_000, 25.0)) for one in picked.values()} == {count}


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_reading, "in_fresh_process", lambda call, *args: call(*args))
    out = tmp_path / "result.json"
    options = ["--minutes", "0.05", "--frames", "3", "--repeats", "1", "--out", str(out)]
    assert video_reading.main(options) == 0
    result = json.loads(out.read_text())
    assert result["film"]["frames"] == 75
    assert result["largest_mean_difference"] < 3
    assert [case["sampling"] for case in result["cases"]] == ["uniform", "fps"]
    for case in result["cases"]:
        assert case["seconds_to_opencv"]["of_medians"] > 0
