"""Videos of many kinds: the frames a player shows, the same ones whichever way they are found."""

from __future__ import annotations

import io
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.frame import VideoFrame
from PIL import Image

from mmlm_efficient.errors import MediaError
from mmlm_efficient.media import MediaLimits
from mmlm_efficient.video import FrameSampling, load_video
from mmlm_efficient.video import film as film_module
from mmlm_efficient.video.film import Film
from tests.video.films import HEIGHT, WIDTH, drawn, film, noisy, shown

EVERY = FrameSampling(frames=4096)
B_FRAMES = {"g": "12", "bf": "3"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:bframes=3:b-pyramid=normal"}
VP8 = {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}
VP9 = {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}
X265 = {"x265-params": "keyint=12:bframes=3:log-level=none:open-gop=1"}
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    # Whether frames are found by seeking, and how the file is made.
    "H.264 in MP4": (True, {"options": B_FRAMES}),
    "H.264, open GOP, in MP4": (True, {"options": OPEN_GOP}),
    "H.264, open GOP, in Matroska": (True, {"form": "matroska", "options": OPEN_GOP}),
    "H.265, open GOP, in MP4": (True, {"codec": "libx265", "options": X265}),
    "VP9 in WebM": (True, {"form": "webm", "codec": "libvpx-vp9", "options": VP9}),
    "H.264, times that vary": (
        True,
        {"options": B_FRAMES, "pts": [*range(30), *range(32, 92, 2)]},
    ),
    "H.264, times that vary, in Matroska": (
        True,
        {"form": "matroska", "options": B_FRAMES, "pts": [*range(30), *range(32, 92, 2)]},
    ),
    "H.264, a pause at the start, in Matroska": (
        True,
        {"form": "matroska", "options": B_FRAMES, "pts": range(70, 130)},
    ),
    "H.264 in AVI": (False, {"form": "avi", "options": B_FRAMES}),
    "H.264 in MPEG-TS": (False, {"form": "mpegts", "options": B_FRAMES}),
    "H.264 alone": (False, {"form": "h264", "options": B_FRAMES}),
    "VP8, hidden frames": (False, {"form": "webm", "codec": "libvpx", "options": VP8}),
    "MPEG-4 in AVI": (False, {"form": "avi", "codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
    "MPEG-2": (False, {"form": "mpeg", "codec": "mpeg2video", "options": B_FRAMES, "fps": 25}),
    "MJPEG in AVI": (False, {"form": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "GIF": (False, {"form": "gif", "codec": "gif", "pix_fmt": "rgb8"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_seeking_finds_what_decoding_everything_finds(
    kind: str,
    seeks: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_seeking, made = KINDS[kind]
    data = film(pictures=60, **made)
    samplings = [FrameSampling(frames=count) for count in (1, 2, 3)]
    samplings.append(FrameSampling(mode="fps", base_fps=0.4, max_fps=None))
    found = [load_video(data, sampling) for sampling in samplings]
    assert seeks == [True] * len(samplings) * by_seeking
    monkeypatch.setattr(film_module, "_DECODED_WHOLE_PX", 10**12)
    assert found == [load_video(data, sampling) for sampling in samplings]
    everything = load_video(data, EVERY)
    for video in found:
        assert video.n_frames == 60
        assert [shown(frame) for frame in video.frames] == list(video.indices)
        assert video.frames == [everything.frames[index] for index in video.indices]
        assert video.seconds == tuple(everything.seconds[index] for index in video.indices)
    assert len(seeks) == len(samplings) * by_seeking
    assert "announces" not in caplog.text


def test_a_keyframe_that_is_none_is_found_out(seeks: list[bool]) -> None:
    """With intra refresh a frame is whole only after others: Matroska calls it a keyframe."""
    options = {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
    data = film("matroska", pictures=60, options=options)
    video = load_video(data, FrameSampling(frames=3))
    assert [shown(frame) for frame in video.frames] == [0, 29, 59]
    assert seeks == [False]


def test_little_of_a_long_film_is_decoded(
    seeks: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, arrived = film(pictures=600, options=B_FRAMES), 0
    original = film_module._arriving

    def counted(*args: Any) -> Any:
        nonlocal arrived
        for one in original(*args):
            arrived += 1
            yield one

    monkeypatch.setattr(film_module, "_arriving", counted)
    assert load_video(data, FrameSampling(frames=8)).n_frames == 600
    assert seeks == [True]
    assert 8 <= arrived <= 8 * 12


def test_frames_that_an_edit_list_cuts_out() -> None:
    """The first half of the media is not shown; the frames that stay keep their places."""
    data = film(pictures=60, options={"g": "250", "bf": "0"})
    at = data.index(b"elst") + 16
    duration, begin = struct.unpack_from(">Ii", data, at - 4)
    ticks = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    edited = bytearray(data)
    struct.pack_into(">Ii", edited, at - 4, duration // 2, begin + 3 * ticks)
    video = load_video(bytes(edited), EVERY)
    assert [shown(frame) for frame in video.frames] == list(range(30, 60))
    assert load_video(bytes(edited), FrameSampling(frames=2)).frames == [
        video.frames[0],
        video.frames[-1],
    ]


# What a player shows


def corners(pixels: np.ndarray[Any, Any]) -> list[str]:
    """Colours of the corners, clockwise from the top left."""
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}
    places = [(4, 4), (4, -5), (-5, -5), (-5, 4)]
    return [names[tuple(int(part > 128) for part in pixels[place])] for place in places]


def quarters() -> np.ndarray[Any, Any]:
    """Red, green, blue and white quarters, clockwise from the top left."""
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[:24, :40, 0] = pixels[:24, 40:, 1] = pixels[24:, 40:, 2] = 255
    pixels[24:, :40] = 255
    return pixels


def set_matrix(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    data = bytearray(mp4)
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
    return bytes(data)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), quarters()),
        ((-1, 0, 0, 1), quarters()[:, ::-1]),
        ((1, 0, 0, -1), quarters()[::-1]),
        ((-1, 0, 0, -1), quarters()[::-1, ::-1]),
        ((0, 1, -1, 0), np.rot90(quarters(), -1)),
        ((0, -1, 1, 0), np.rot90(quarters())),
        ((0, 1, 1, 0), quarters().swapaxes(0, 1)),
        ((0, -1, -1, 0), quarters()[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_turned_and_mirrored(
    matrix: tuple[int, int, int, int], expected: np.ndarray[Any, Any]
) -> None:
    data = set_matrix(film(pictures=[quarters()] * 3), *matrix)
    video = load_video(data)
    assert video.size_px == (expected.shape[1], expected.shape[0])
    assert corners(np.asarray(video.frames[1])) == corners(expected)


@pytest.mark.parametrize(
    ("aspect", "size"), [("64/45", (182, 48)), ("1/2", (64, 48)), ("1", (128, 48))]
)
@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_pixels_that_are_not_square(form: str, aspect: str, size: tuple[int, int]) -> None:
    video = load_video(film(form, pictures=4, sample_aspect_ratio=Fraction(aspect)))
    assert video.size_px == size
    assert {frame.size for frame in video.frames} == {size}


def two_streams(second: Disposition) -> bytes:
    """Black first, white as second stream."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        streams[0].disposition, streams[1].disposition = Disposition(0), second
        for stream, value in zip(streams, (0, 255), strict=True):
            for number in range(3):
                pixels = np.full((32, 32, 3), value, np.uint8)
                frame = VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return file.getvalue()


def test_the_default_stream_is_read() -> None:
    for second, value in ((Disposition.default, 255), (Disposition(0), 0)):
        assert load_video(two_streams(second)).frames[0].getpixel((9, 9)) == (value,) * 3


def test_transparency_is_laid_on_white() -> None:
    pixels = np.dstack([quarters(), np.full((48, 80), 255, np.uint8)])
    pixels[:24, :40, 3] = 0
    data = film("mov", "png", [pixels] * 2, pix_fmt="rgba")
    assert corners(np.asarray(load_video(data).frames[0])) == ["white", "green", "blue", "white"]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "space", "full"),
    [
        ("libx264", "yuv420p", "ITU601", False),
        ("libx264", "yuv420p", "ITU709", False),
        ("libx264", "yuv420p", "ITU709", True),
        ("libx264", "yuv444p", "BT2020", False),
        ("libx264", "yuv420p10le", "ITU709", False),
        ("ffv1", "yuv444p16le", None, False),
        ("ffv1", "bgr0", None, False),
        ("ffv1", "gbrp16le", None, False),
    ],
)
def test_colours_are_kept(codec: str, pix_fmt: str, space: str | None, full: bool) -> None:
    """Depth, range and matrix of a stream are followed."""
    pixels, file = quarters() // 2 + 60, io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0"} if space else {})
        stream.width, stream.height, stream.pix_fmt = 80, 48, pix_fmt
        if space is not None:
            stream.codec_context.colorspace = {"ITU601": 6, "ITU709": 1, "BT2020": 9}[space]
            stream.codec_context.color_range = 1 + full
        frame = VideoFrame.from_ndarray(pixels, "rgb24").reformat(
            format=pix_fmt, dst_colorspace=space, dst_color_range=1 + full if space else None
        )
        frame.pts, frame.time_base = 0, Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    loaded = np.asarray(load_video(file.getvalue()).frames[0]).astype(int)
    for place in ((12, 20), (12, 60), (36, 60), (36, 20)):
        assert np.abs(loaded[place] - pixels[place]).max() <= 3


def test_interlaced() -> None:
    """OpenCV gave black frames, or what was in memory before."""
    options = {"x264-params": "interlaced=1:keyint=5"}
    pictures = [np.full((96, 160, 3), 30 + 8 * n, np.uint8) for n in range(10)]
    video = load_video(film(pictures=pictures, options=options))
    means = [float(np.asarray(frame).mean()) for frame in video.frames]
    assert means == pytest.approx([30 + 8 * n for n in range(10)], abs=3)
    with av.open(io.BytesIO(film(pictures=pictures, options=options))) as container:
        assert next(container.decode(video=0)).interlaced_frame


def test_motion_jpeg_without_a_container() -> None:
    data = film("mjpeg", "mjpeg", 40, pix_fmt="yuvj420p")
    assert data.startswith(b"\xff\xd8\xff")
    assert [shown(frame) for frame in load_video(data, EVERY).frames] == list(range(40))


# What is refused


def test_frames_of_several_sizes() -> None:
    smaller = film("h264", pictures=[drawn(number)[:32] for number in range(4)])
    with pytest.raises(MediaError, match=r"bytes: frame 3 has 128 x 32 pixels, the first .* x 48"):
        load_video(film("h264", pictures=3) + smaller, EVERY)


def music(form: str, codec: str) -> bytes:
    """A second of silence with a cover."""
    file, cover = io.BytesIO(), io.BytesIO()
    Image.fromarray(drawn(3)).save(cover, "PNG")
    with av.open(file, "w", format=form) as container:
        sound = container.add_stream(codec, rate=48000, layout="stereo")
        picture = container.add_stream("png", rate=1)
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "rgb24"
        picture.disposition = Disposition.attached_pic
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        container.mux(packet)
        size = sound.codec_context.frame_size or 1024
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((2, size), np.float32), format="fltp", layout="stereo"
            )
            frame.sample_rate, frame.pts = 48000, number * size
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("form", "codec"), [("mp3", "libmp3lame"), ("flac", "flac")])
def test_music_with_a_cover(form: str, codec: str) -> None:
    data = music(form, codec)
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video
    with pytest.raises(MediaError, match="holds sound only"):
        load_video(data)


@pytest.mark.parametrize("size", [(2, 4000), (4000, 8)])
def test_long_and_thin(size: tuple[int, int]) -> None:
    pictures = [np.zeros((size[1], size[0], 3), np.uint8)] * 2
    with pytest.raises(MediaError, match=r"too long and thin.*200 times"):
        load_video(film("matroska", "ffv1", pictures, pix_fmt="bgr0"))


def test_a_pixel_aspect_that_would_blow_frames_up() -> None:
    data = film(pictures=3, sample_aspect_ratio=Fraction(20))
    assert load_video(data).size_px == (2560, 48)
    with pytest.raises(MediaError, match="2560 x 48 = 122,880 pixels"):
        load_video(data, limits=MediaLimits(max_pixels=100_000))
    with pytest.raises(MediaError, match="2560 x 48 is too long and thin"):
        load_video(data, limits=MediaLimits(max_aspect=50))


@pytest.mark.parametrize("ending", ["m3u8", "ffconcat", "mpd", "sdp"])
def test_no_other_file_is_opened(ending: str, tmp_path: Path) -> None:
    """Not even where a playlist does not look like a text."""
    (tmp_path / "clip.mp4").write_bytes(film(pictures=3))
    text = {
        "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:5,\nclip.mp4\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile 'clip.mp4'\n",
        "mpd": "<?xml version='1.0'?><MPD><Period><BaseURL>clip.mp4</BaseURL></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5 RTP/AVP 96\n",
    }[ending]
    path = tmp_path / f"list.{ending}"
    path.write_text(text)
    with open(os.open(path, os.O_RDONLY), "rb") as file:
        opened = Film(file, "list", len(text), MediaLimits())
        with pytest.raises((MediaError, OSError)), opened.opened():
            pass


def test_avif_is_called_a_picture() -> None:
    """Its container is that of MP4, with one frame."""
    with pytest.raises(MediaError, match=r"is a picture \(AVIF\).*image="):
        load_video(film("avif", "libsvtav1", 1))


def test_a_picture_with_more_behind_it_stays_a_picture() -> None:
    buffer = io.BytesIO()
    Image.fromarray(drawn(3)).save(buffer, "JPEG")
    with pytest.raises(MediaError, match=r"is a picture \(JPEG\)"):
        load_video(buffer.getvalue() + film(pictures=3))  # photos of phones that move


# In a process


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(film("mp4", "libx264", noisy(20)))
    data[4000:6000] = bytes(2000)
    level = av.logging.get_level()
    load_video(bytes(data))
    assert capfd.readouterr() == ("", "")
    assert av.logging.get_level() == level


def test_several_threads_at_once(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(film(pictures=60, options=B_FRAMES))
    before, expected = threading.active_count(), load_video(path, EVERY)
    with ThreadPoolExecutor(4) as pool:
        assert all(video == expected for video in pool.map(load_video, [path] * 8, [EVERY] * 8))
    assert threading.active_count() == before


def test_files_are_closed(tmp_path: Path) -> None:
    good, bad = tmp_path / "clip.mp4", tmp_path / "bad.mp4"
    good.write_bytes(film(pictures=6))
    bad.write_bytes(good.read_bytes()[:300])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_video(good)
        with pytest.raises(MediaError):
            load_video(good, limits=MediaLimits(max_pixels=10))
        with pytest.raises(MediaError):
            load_video(bad)
    assert len(os.listdir("/proc/self/fd")) == before
