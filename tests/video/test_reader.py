"""Videos in: the right frames at the right times, whatever the file says of itself."""

from __future__ import annotations

import logging
import os
import struct
import tracemalloc
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mmlm_efficient.errors import MediaError, SettingsError
from mmlm_efficient.media import MediaLimits
from mmlm_efficient.video import FrameSampling, load_video, reader
from mmlm_efficient.video.film import Film
from tests.video.films import HEIGHT, WIDTH, drawn, film, shown

FORMATS = [
    ("mp4v", ".mp4"),
    ("mp4v", ".mov"),
    ("mp4v", ".ts"),
    ("MJPG", ".avi"),
    ("FFV1", ".avi"),
    ("XVID", ".avi"),
    ("VP80", ".webm"),
    ("MJPG", ".mkv"),
    ("FLV1", ".flv"),
]
EVERY = FrameSampling(frames=4096)
BY_RATE = FrameSampling(mode="fps")


def write(path: Path, n_frames: int = 50, fps: float = 10.0, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter.fourcc(*codec), fps, (WIDTH, HEIGHT), isColor=True
    )
    assert writer.isOpened()
    for number in range(n_frames):
        writer.write(np.ascontiguousarray(drawn(number)[..., ::-1]))
    writer.release()
    return path


def retimed(mp4: bytes, runs: Sequence[tuple[int, int]]) -> bytes:
    """An MP4 whose sample times (box stts) are (frames, ticks each) instead of a constant rate.

    OpenCV writes the index behind the frames, so a longer index moves nothing it points to. The
    edit list (box edts) would cut the video off at its old length: it goes.
    """
    mp4 = mp4.replace(b"edts", b"free")
    body = struct.pack(">II", 0, len(runs)) + b"".join(struct.pack(">II", *run) for run in runs)
    return _with_box(mp4, b"stts", body)


def _with_box(boxes: bytes, kind: bytes, body: bytes) -> bytes:
    done, position = b"", 0
    while position < len(boxes):
        size, name = struct.unpack_from(">I4s", boxes, position)
        inside = boxes[position + 8 : position + size]
        if name == kind:
            inside = body
        elif name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            inside = _with_box(inside, kind, body)
        done += struct.pack(">I4s", len(inside) + 8, name) + inside
        position += size
    return done


def ticks_per_second(mp4: bytes) -> int:
    return int(struct.unpack_from(">I", mp4, mp4.index(b"mdhd") + 16)[0])


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 frames at 10 frames per second."""
    return write(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.fixture(scope="module")
def avi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a format whose index is optional."""
    return write(tmp_path_factory.mktemp("videos") / "clip.avi", codec="MJPG")


class Counter:
    """What a film is asked for: how often it is opened, how many frames become pictures."""

    opened = pictures = 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter, opened, picture = Counter(), Film.opened, Film._picture

    def opening(*args: Any, **options: Any) -> Any:
        counter.opened += 1
        return opened(*args, **options)

    def making(*args: Any) -> Image.Image:
        counter.pictures += 1
        return picture(*args)

    monkeypatch.setattr(Film, "opened", opening)
    monkeypatch.setattr(Film, "_picture", making)
    return counter


# What is read


@pytest.mark.parametrize(("codec", "ending"), FORMATS)
def test_frames_are_those_of_the_indices(codec: str, ending: str, tmp_path: Path) -> None:
    video = load_video(write(tmp_path / f"clip{ending}", 40, codec=codec), FrameSampling(frames=7))
    assert video.indices == (0, 6, 13, 19, 26, 32, 39)
    assert [shown(frame) for frame in video.frames] == list(video.indices)
    assert video.seconds == pytest.approx([index / 10 for index in video.indices], abs=1e-3)
    assert video.fps == pytest.approx(10.0)
    assert (video.n_frames, video.size_px) == (40, (WIDTH, HEIGHT))
    assert video.duration_s == pytest.approx(4.0, abs=1e-3)
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (WIDTH, HEIGHT))}


def test_by_rate(mp4: Path, counted: Counter) -> None:
    video = load_video(mp4, FrameSampling(mode="fps", max_frames=12))
    assert video.indices == tuple(range(0, 50, 5))  # 12 // 5 = 2 frames per second
    assert [shown(frame) for frame in video.frames] == list(video.indices)
    assert video.seconds == tuple(index / 10 for index in video.indices)
    assert (counted.opened, counted.pictures) == (2, 10)  # for the packets, for the frames


def test_every_frame_is_there(mp4: Path) -> None:
    assert [shown(frame) for frame in load_video(mp4, EVERY).frames] == list(range(50))


def test_one_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "one.mp4", 1)
    for sampling in (FrameSampling(), BY_RATE):
        video = load_video(path, sampling)
        assert (video.indices, video.seconds, video.n_frames) == ((0,), (0.0,), 1)
        assert video.duration_s == pytest.approx(0.1)


def test_the_exact_rate_of_the_header_is_kept(tmp_path: Path) -> None:
    video = load_video(write(tmp_path / "film.mp4", 48, fps=23.976))
    assert video.fps == pytest.approx(23.976, abs=1e-9)


def test_path_string_pathlib_and_bytes_agree(mp4: Path) -> None:
    expected = load_video(mp4)
    for source in (str(mp4), mp4.read_bytes(), bytearray(mp4.read_bytes())):
        assert load_video(source) == expected


def test_a_relative_path_that_looks_like_a_protocol(
    mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:clip", "%03d.mp4", "with space ä.mp4"):
        Path(name).write_bytes(mp4.read_bytes())
        assert load_video(name).n_frames == 50


def test_bytes_make_no_file(mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    load_video(mp4.read_bytes())
    with pytest.raises(MediaError, match="video of 4,000 bytes: cannot be opened"):
        load_video(bytes(range(250)) * 16)


@pytest.mark.parametrize("name", ["clip.txt", "clip.jpg", "clip.mp3", "clip", "clip.avi", "x.m3u8"])
def test_a_video_by_any_name(name: str, mp4: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(mp4.read_bytes())
    assert load_video(tmp_path / name).n_frames == 50


def test_rotation_of_phones_is_applied(mp4: Path) -> None:
    data = bytearray(mp4.read_bytes())
    matrix = data.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = quarter
    video = load_video(bytes(data), FrameSampling(frames=3))
    assert video.size_px == (HEIGHT, WIDTH)
    # The matrix turns clockwise.
    back = [frame.transpose(Image.Transpose.ROTATE_90) for frame in video.frames]
    assert [shown(frame) for frame in back] == [0, 24, 49]


# Times that vary


def test_variable_rate_is_sampled_by_time(mp4: Path, counted: Counter) -> None:
    """Three seconds at 10 fps, then ten at 2 fps: 50 frames in 13 s."""
    ticks = ticks_per_second(mp4.read_bytes())
    data = retimed(mp4.read_bytes(), [(30, ticks // 10), (20, ticks // 2)])
    video = load_video(data, BY_RATE)
    assert video.indices == (0, 10, 20, *range(30, 50, 2))
    assert [shown(frame) for frame in video.frames] == list(video.indices)
    assert video.seconds == pytest.approx(range(13), abs=1e-3)
    assert video.fps == pytest.approx(50 / 13, rel=0.02)
    assert video.duration_s == pytest.approx(13, abs=0.3)
    assert counted.opened == 2  # the times are known before a frame is decoded


def test_variable_rate_sampled_uniformly_has_true_times(mp4: Path) -> None:
    ticks = ticks_per_second(mp4.read_bytes())
    data = retimed(mp4.read_bytes(), [(30, ticks // 10), (20, ticks // 2)])
    video = load_video(data, FrameSampling(frames=3))
    assert video.indices == (0, 24, 49)
    assert video.seconds == pytest.approx((0.0, 2.4, 12.5), abs=1e-3)


def test_animated_gif_with_varying_delays(tmp_path: Path) -> None:
    pictures = [Image.fromarray(drawn(number)) for number in range(6)]
    pictures[0].save(
        tmp_path / "moving.gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[500, 500, 2000, 100, 100, 100],
    )
    video = load_video(tmp_path / "moving.gif", BY_RATE)
    # Times 0, 0.5, 1, 3, 3.1, 3.2: 0, 1, 2 (the middle of 1 and 3, the earlier one) and 3 s.
    assert video.indices == (0, 2, 3)
    assert [shown(frame) for frame in video.frames] == [0, 2, 3]
    assert video.seconds == pytest.approx((0.0, 1.0, 3.0))


def test_a_header_that_lies_about_the_rate(avi: Path) -> None:
    """The times decide: here the header of the file and the times agree on another rate."""
    data = bytearray(avi.read_bytes())
    scale, rate = struct.unpack_from("<II", data, data.index(b"strh") + 28)
    struct.pack_into("<II", data, data.index(b"strh") + 28, scale, rate * 5)
    video = load_video(bytes(data), BY_RATE)
    assert video.fps == pytest.approx(50.0)
    assert video.indices == (0,)
    assert video.duration_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("times_ms", "header_fps", "seconds", "fps"),
    [
        ([0.0, 40.0, 80.0], 25.0, (0.0, 0.04, 0.08), 25.0),
        ([0.0, 42.0, 83.0], 24000 / 1001, (0.0, 0.042, 0.083), 24000 / 1001),  # milliseconds
        ([0.0, 100.0, 200.0], 25.0, (0.0, 0.1, 0.2), 10.0),
        ([0.0, 100.0, 200.0], None, (0.0, 0.1, 0.2), 10.0),
        ([7.0], 25.0, (0.007,), 25.0),
        ([0.0], None, (0.0,), 1.0),
        ([0.0, 0.0, 0.0], 10.0, (0.0, 0.1, 0.2), 10.0),
        ([0.0, 900.0, 100.0], 10.0, (0.0, 0.1, 0.2), 10.0),
    ],
)
def test_timeline(
    times_ms: list[float], header_fps: float | None, seconds: tuple[float, ...], fps: float
) -> None:
    got, rate = reader._timeline(reader.array("d", times_ms), header_fps, "clip")
    assert tuple(got) == pytest.approx(seconds)
    assert rate == pytest.approx(fps, rel=1e-9)


def test_no_times_and_no_rate() -> None:
    with pytest.raises(MediaError, match=r"clip: has neither frame times nor a frame rate.*fps="):
        reader._timeline(reader.array("d", [0.0, 0.0]), None, "clip")


# Counts that are wrong


def test_a_truncated_file_is_sampled_from_what_is_left(
    avi: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, before = avi.read_bytes(), 0
    for share in (0.6, 0.75, 0.9):
        cut = tmp_path / "cut.avi"
        cut.write_bytes(data[: int(len(data) * share)])
        caplog.clear()
        video = load_video(cut, FrameSampling(frames=4))
        assert before < video.n_frames < 50
        before = video.n_frames
        assert video.indices[-1] == video.n_frames - 1
        assert [shown(frame) for frame in video.frames[:-1]] == list(video.indices[:-1])
        assert f"announces 50 frames, but {video.n_frames} can be decoded" in caplog.text
        assert load_video(cut, BY_RATE).indices == tuple(range(0, video.n_frames, 10))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_mp4_has_lost_its_index(share: float, mp4: Path, tmp_path: Path) -> None:
    data = mp4.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MediaError, match=r"cut\.mp4: .*cut short before its index.*again"):
        load_video(tmp_path / "cut.mp4")


@pytest.mark.parametrize("share", [0.05, 0.6, 0.95])
def test_truncated_before_the_first_frame(share: float, avi: Path, tmp_path: Path) -> None:
    data = avi.read_bytes()
    first = data.index(b"movi") + 4 + 8
    (tmp_path / "cut.avi").write_bytes(data[: int(first * share)])
    with pytest.raises(MediaError, match=r"cut\.avi: (no frame can be decoded|cannot be opened)"):
        load_video(tmp_path / "cut.avi")


@pytest.mark.parametrize("announced", [10, 400])
@pytest.mark.parametrize("sampling", [FrameSampling(frames=5), BY_RATE])
def test_a_header_that_lies_about_the_count(
    announced: int,
    sampling: FrameSampling,
    avi: Path,
    counted: Counter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = bytearray(avi.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, announced)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, announced)
    video = load_video(bytes(data), sampling)
    assert video.n_frames == 50
    assert video.indices == sampling.indices(50, 10.0)
    assert [shown(frame) for frame in video.frames] == list(video.indices)
    assert ("announces 400 frames, but 50" in caplog.text) == (announced == 400)


def test_no_count_in_the_header(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        video = load_video(film("mpegts", "mpeg2video", fps=25), FrameSampling(frames=4))
    assert video.indices == (0, 16, 32, 49)
    assert [shown(frame) for frame in video.frames] == [0, 16, 32, 49]
    assert caplog.text == ""


def test_a_file_that_changes_while_it_is_read(
    avi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path, through = avi.read_bytes(), tmp_path / "clip.avi", Film.go_through
    path.write_bytes(data)

    def shrinking(*args: Any, **options: Any) -> Any:
        done = through(*args, **options)
        path.write_bytes(data[: len(data) // 2])
        done.times_ms.append(6000.0)  # other frames are picked, on a second way through
        return done

    monkeypatch.setattr(Film, "go_through", shrinking)
    with pytest.raises(MediaError, match="changed while it was read"):
        load_video(path, FrameSampling(frames=4))


# What it costs


def test_memory_does_not_grow_with_the_file(tmp_path: Path, counted: Counter) -> None:
    peaks = []
    for n_frames in (60, 600):
        path = write(tmp_path / f"{n_frames}.avi", n_frames, codec="MJPG")
        counted.pictures = 0
        tracemalloc.start()
        video = load_video(path, FrameSampling(frames=6))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (len(video.frames), counted.pictures) == (6, 6)
    one_frame = WIDTH * HEIGHT * 3
    assert peaks[1] - peaks[0] < 3 * one_frame  # 540 more frames


# What is refused


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4: no such file.*exists; check the spelling"):
        load_video(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"no such file.*does not exist either"):
        load_video(tmp_path / "none" / "a.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        load_video(tmp_path)
    with pytest.raises(MediaError, match="path is empty"):
        load_video(" ")
    with pytest.raises(MediaError, match="cannot be read"):
        load_video("a\0b.mp4")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        load_video(tmp_path / "pipe")


@pytest.mark.parametrize(
    "address",
    ["https://host/a.mp4", "HTTP://host/a", "rtsp://camera/1", "file:///a.mp4"],
)
def test_addresses_are_not_fetched(address: str) -> None:
    with pytest.raises(MediaError, match="addresses are not fetched"):
        load_video(address)


def test_a_film_in_base64_is_named() -> None:
    with pytest.raises(MediaError, match=r"is no path of a video. One in base64 .*decoded first"):
        load_video("data:video/mp4,")


def test_no_permission(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(MediaError, match="no permission to read it"):
        load_video(mp4)


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(MediaError, match=r"empty\.mp4: is empty"):
        load_video(tmp_path / "empty.mp4")
    with pytest.raises(MediaError, match="video of 0 bytes: is empty"):
        load_video(b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_is_called_one(form: str, tmp_path: Path) -> None:
    Image.fromarray(drawn(3)).save(tmp_path / "clip.mp4", form)
    for source in (tmp_path / "clip.mp4", (tmp_path / "clip.mp4").read_bytes()):
        with pytest.raises(MediaError, match=rf"is a picture \({form}\).*image="):
            load_video(source)


def test_a_huge_picture_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(drawn(3)).save(tmp_path / "clip.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match="is a picture"):
        load_video(tmp_path / "clip.png")


def test_sound_only(mp4: Path, tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.mp4"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(MediaError, match=r"sound\.mp4: holds sound only"):
        load_video(tmp_path / "sound.mp4")
    with pytest.raises(MediaError, match="holds sound only"):
        load_video(b"ID3\x04" + bytes(100))
    # An MP4 whose one track is sound.
    with pytest.raises(MediaError, match="holds sound only"):
        load_video(mp4.read_bytes().replace(b"vide", b"soun"))


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile '{}'\n", "#EXTM3U\n#EXTINF:5,\n{}\n", "\ufeff<?xml version='1'>"],
)
def test_playlists_open_no_other_file(text: str, mp4: Path, tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text(text.format(mp4))
    with pytest.raises(MediaError, match="is a text or a playlist"):
        load_video(tmp_path / "list.mp4")


def test_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(128, 256, 5000, dtype=np.uint8).tobytes()
    with pytest.raises(MediaError, match=r"cannot be opened as a video.*Convert it"):
        load_video(noise)


def test_zero_frames(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no frame can be decoded"):
        load_video(write(tmp_path / "none.avi", 0, codec="MJPG"))
    with pytest.raises(MediaError, match="cannot be opened as a video"):
        load_video(write(tmp_path / "none.mp4", 0))


@pytest.mark.parametrize(
    ("limits", "sampling", "message"),
    [
        (MediaLimits(max_video_bytes=100), EVERY, "bytes; at most 100 are allowed"),
        (MediaLimits(max_pixels=6143), EVERY, r"128 x 48 = 6,144 pixels; at most 6,143"),
        (MediaLimits(max_frames_decoded=49), EVERY, "has 50 frames or more; at most 49"),
        (MediaLimits(max_selected_frames=49), EVERY, r"50 frames would be kept; at most 49.*fewer"),
        (MediaLimits(max_selected_frames=4), BY_RATE, "5 frames would be kept; at most 4"),
        (MediaLimits(max_selected_pixels=6144 * 49), EVERY, r"50 frames of 6,144 pixels would be"),
    ],
)
def test_limits(limits: MediaLimits, sampling: FrameSampling, message: str, mp4: Path) -> None:
    with pytest.raises(MediaError, match=rf"clip\.mp4: .*{message}"):
        load_video(mp4, sampling, limits)


def test_limits_are_inclusive(mp4: Path) -> None:
    size = mp4.stat().st_size
    assert load_video(mp4, EVERY, MediaLimits(6144, 200, 1, size, 50, 50, 6144 * 50)).n_frames == 50


def test_the_limit_of_frames_holds_without_a_header() -> None:
    with pytest.raises(MediaError, match="has 31 frames or more; at most 30"):
        load_video(film("matroska"), limits=MediaLimits(max_frames_decoded=30))


# Frames that were picked already


def test_a_list_of_frames() -> None:
    frames = [Image.fromarray(drawn(0)), drawn(1), Image.fromarray(drawn(2)).convert("L")]
    video = load_video(frames, FrameSampling(frames=2), fps=4)
    assert (video.indices, video.seconds) == ((0, 1, 2), (0.0, 0.25, 0.5))
    assert (video.n_frames, video.fps, video.duration_s) == (3, 4.0, 0.75)
    assert (video.size_px, shown(video.frames[1])) == ((WIDTH, HEIGHT), 1)
    assert {frame.mode for frame in video.frames} == {"RGB"}
    assert load_video(tuple(frames)).seconds == (0.0, 1.0, 2.0)


def test_an_array_of_frames() -> None:
    video = load_video(np.stack([drawn(number) for number in (5, 9)]))
    assert [shown(frame) for frame in video.frames] == [5, 9]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of frames is empty"),
        (np.zeros((0, 4, 4, 3), np.uint8), "list of frames is empty"),
        (drawn(0), r"one picture.*image="),
        (Image.fromarray(drawn(0)), r"one picture.*image="),
        ([drawn(0), "b.png"], "frame 2 of 2 is a str"),
        ([drawn(0), drawn(0)[:20]], r"frame 2 of 2 has 128 x 20 pixels, the first one has 128 x"),
        ([drawn(0), drawn(0) * 2.0], "frame 2 of 2: .*float pixels"),
        (3, "cannot read a int"),
        (None, "cannot read a NoneType"),
    ],
)
def test_bad_frames(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_video(source)


def test_limits_hold_for_frames() -> None:
    frames = [drawn(0)] * 3
    with pytest.raises(MediaError, match="3 frames would be kept; at most 2"):
        load_video(frames, limits=MediaLimits(max_selected_frames=2))
    with pytest.raises(MediaError, match=r"frame 1 of 3: .*at most 100 are allowed"):
        load_video(frames, limits=MediaLimits(max_pixels=100))
    with pytest.raises(MediaError, match="3 frames of 6,144 pixels would be kept"):
        load_video(frames, limits=MediaLimits(max_selected_pixels=6144 * 2))


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), True, "4"])
def test_bad_rate_of_frames(fps: Any) -> None:
    with pytest.raises(SettingsError, match="fps must be a number"):
        load_video([drawn(0)], fps=fps)


def test_a_file_has_its_own_rate(mp4: Path) -> None:
    with pytest.raises(SettingsError, match="a video file has its own rate"):
        load_video(mp4, fps=10)
