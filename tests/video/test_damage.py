"""Damaged and cut films: every frame that can be decoded, and one warning with the numbers."""

from __future__ import annotations

import io
import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from mmlm_efficient.video import FrameSampling, load_video
from tests.video.films import HEIGHT, WIDTH, drawn, film, noisy, shown

EVERY = FrameSampling(frames=4096)
VP8 = {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_in_the_middle(codec: str, caplog: pytest.LogCaptureFixture) -> None:
    """The frames behind it are read, and one warning has the numbers."""
    data = bytearray(film("mp4", codec, noisy(80), options={"g": "20"}))
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(np.random.default_rng(1).integers(0, 256, 3000, np.uint8))
    video = load_video(bytes(data), EVERY)
    assert 76 <= video.n_frames <= 80
    assert np.asarray(video.frames[-1]).mean() == pytest.approx(2 * 79 + 30, abs=4)
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "announces 80 frames" in warnings[0]
    assert load_video(bytes(data), EVERY) == video


def test_damage_on_the_way_to_a_picked_frame(
    seeks: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"x264-params": "keyint=20:scenecut=0:bframes=0"}
    data = bytearray(film(pictures=noisy(80), options=options))
    middle = len(data) * 6 // 10
    data[middle : middle + 3000] = bytes(np.random.default_rng(1).integers(0, 256, 3000, np.uint8))
    video = load_video(bytes(data), FrameSampling(mode="fps", base_fps=0.34, max_fps=None))
    assert seeks == [False]
    assert video.n_frames <= 80
    assert "announces 80 frames" in caplog.text


def overwritten(data: bytes, share: float) -> bytes:
    at = int(len(data) * share)
    noise = np.random.default_rng(1).integers(0, 256, 3000, np.uint8)
    return data[:at] + bytes(noise) + data[at + 3000 :]


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_frames_lost_of_a_film_without_count(
    share: float, seeks: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """The duration tells how many there were; the frame rate stays."""
    data = overwritten(film("webm", "libvpx", noisy(80), options=VP8), share)
    video = load_video(data, FrameSampling(frames=4))
    assert 40 < video.n_frames < 78
    assert (video.fps, video.duration_s) == (10.0, 8.0)
    assert f"announces 80 frames, but {video.n_frames} can be decoded" in caplog.text
    assert len(caplog.records) == 1
    assert seeks == []


@pytest.mark.parametrize("seeking", [True, False])
@pytest.mark.parametrize("form", ["matroska", "flv"])
def test_a_film_without_count_cut_in_half(
    form: str, seeking: bool, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    if seeking:
        request.getfixturevalue("seeks")
    data = film(form, "flv" if form == "flv" else "libx264", noisy(80), options={"g": "20"})
    video = load_video(data[: len(data) // 2], FrameSampling(frames=3))
    assert video.n_frames < 50
    assert f"announces 80 frames, but {video.n_frames} can be decoded" in caplog.text
    assert len(caplog.records) == 1


def test_packets_that_are_marked_as_damaged(caplog: pytest.LogCaptureFixture) -> None:
    """A lost piece of MPEG-TS, which the decoder may not see."""
    data, marked = film("mpegts", pictures=noisy(30), options={"g": "4"}, fps=25), 0
    for at in range(3 * 188, len(data), 14 * 188):
        lost = data[:at] + data[at + 188 :]
        with av.open(io.BytesIO(lost)) as container:
            if not any(packet.is_corrupt for packet in container.demux(video=0)):
                continue
        caplog.clear()
        video = load_video(lost)
        assert f"{video.n_frames} can be decoded" in caplog.text
        assert caplog.text.count("announces") == 1
        marked += 1
    assert marked > 5


def test_a_longer_sound_announces_no_frames(caplog: pytest.LogCaptureFixture) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 80_000), np.int16), "s16", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux(sound.encode(silence))
        for number in range(30):
            frame = VideoFrame.from_ndarray(drawn(number), "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux([*sound.encode(None), *stream.encode(None)])
    for data in (file.getvalue(), file.getvalue().replace(b"DURATION", b"duratiON")):
        assert load_video(data, EVERY).n_frames == 30
    assert caplog.text == ""


def test_an_mp4_cut_short_behind_its_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "index_first.mp4"
    film("mp4", "mpeg4", file=str(file), container_options={"movflags": "faststart"})
    data = file.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    video = load_video(data[: len(data) * 3 // 4], EVERY)
    assert [shown(frame) for frame in video.frames[:-1]] == list(range(video.n_frames - 1))
    assert 10 < video.n_frames < 50
    assert f"announces 50 frames, but {video.n_frames} can be decoded" in caplog.text
