"""A video file as FFmpeg sees it: its packets, and its frames as a player shows them."""

from __future__ import annotations

import contextlib
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image
from tqdm import tqdm

from mmlm_efficient.errors import MediaError
from mmlm_efficient.media import MediaLimits, check_bytes, check_size, load_image
from mmlm_efficient.video.sampling import Indices

Matrix: TypeAlias = tuple[int, int, int, int]

_HEADER_BYTES = 4096
_SHOW_PROGRESS_AFTER_S = 2.0
# Faster rates than this in a header are the clock of the format, not a frame rate.
_FASTEST_FPS = 1000.0
# Codecs with exactly one frame in a packet, and formats with an index of exact times.
_ONE_FRAME = ("h264", "hevc", "vp9", "libdav1d", "av1", "libaom-av1")
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# So little (about a quarter of a second) is decoded whole, which finds damage anywhere in it.
_DECODED_WHOLE_PX = 250_000_000
# Video formats never begin with this much text, but for these; playlists do.
_TEXT = re.compile(rb"(?:\xef\xbb\xbf)?[\t\n\r -~]{16}")
_TEXT_VIDEOS = (b"RIFF", b"YUV4MPEG2", b"nut/multimedia")
_SOUND = re.compile(rb"ID3|fLaC|ADIF|#!AMR|RIFF....WAVE|FORM....AIF|....ftypM4[ABP] ", re.DOTALL)
_MP4 = re.compile(rb"....(?:ftyp|moov|mdat|free|wide)", re.DOTALL)
CONVERT = "Convert it with a video program first, for example to MP4 (H.264)."
_SOUND_ONLY = "holds sound only, no video. Give a file with moving pictures."


class Differs(Exception):
    """What was decoded is not what the packets promised."""


@dataclass
class Listing:
    """What the packets of a stream tell without being decoded.

    Attributes:
        pts: presentation times in units of the stream, ascending; 0 where there is none.
        times_ms: the same in milliseconds, after the start of the stream.
        keys: those of `pts` at which decoding can start.
        plain: whether every packet has a time and is shown.
        damaged: whether the format marks a packet as such.
        announced: frames that the header speaks of, by number or by duration and rate; 0 where it
            has no credible number.
        fps: frame rate of the header, None where it has no credible one.
        size_px: width and height of a frame whose pixels are made square.
    """

    pts: npt.NDArray[np.int64]
    times_ms: npt.NDArray[np.float64]
    keys: list[int]
    plain: bool
    damaged: bool
    announced: int
    fps: float | None
    size_px: tuple[int, int]


@dataclass
class Pass:
    """What one way through the file brought: time of every frame seen (ms), frames picked."""

    times_ms: array[float]
    frames: list[Image.Image]
    n_damaged: int = 0


@dataclass
class Film:
    """Reads one file; `where` is its name in messages."""

    file: BinaryIO
    where: str
    n_bytes: int
    limits: MediaLimits
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    # -- opening ---------------------------------------------------------------------------

    def check_content(self) -> None:
        check_bytes(self.n_bytes, self.limits.max_video_bytes, self.where)
        header = self.file.read(_HEADER_BYTES)
        if _TEXT.match(header) and not header.startswith(_TEXT_VIDEOS):
            raise MediaError(
                f"{self.where}: is a text or a playlist, not a video. "
                "Give the path of the video itself."
            )

    @contextmanager
    def opened(
        self, picture: str | None = None, threads: str = "AUTO"
    ) -> Iterator[tuple[InputContainer, VideoStream]]:
        """The file from its start, and the stream that a player shows."""
        self.file.seek(0)
        # No other file or address may be opened, and no frame allocated that is too large.
        options = {"protocol_whitelist": "none", "max_pixels": _allocated(self.limits)}
        try:
            container = av.open(
                self.file, "r", options=options, metadata_errors="replace", io_open=_refuse
            )
        except av.FFmpegError as error:
            if picture is not None:
                raise self.is_picture(picture) from error
            raise MediaError(f"{self.where}: {self._reason()}") from error
        with container:
            stream = self._shown(container)
            stream.codec_context.options = {"max_pixels": options["max_pixels"]}
            stream.codec_context.thread_type = threads
            yield container, stream

    def _shown(self, container: InputContainer) -> VideoStream:
        pictures = Disposition.attached_pic | Disposition.timed_thumbnails
        streams = [one for one in container.streams.video if not one.disposition & pictures]
        if not streams:
            nothing = "cannot be opened as a video: it holds no moving pictures."
            raise MediaError(f"{self.where}: {_SOUND_ONLY if container.streams.audio else nothing}")
        stream = max(streams, key=lambda one: bool(one.disposition & Disposition.default))
        if stream.codec_context is None:
            raise MediaError(f"{self.where}: its codec is not known here. {CONVERT}")
        context = stream.codec_context
        if context.width and context.height:
            check_size(context.width, context.height, self.where, self.limits)
            check_size(*_shape(stream), self.where, self.limits)
        return stream

    def _reason(self) -> str:
        self.file.seek(0)
        header = self.file.read(16)
        if _SOUND.match(header):
            return _SOUND_ONLY
        reason = f"It is not a video, is damaged, or is of a format that is not known. {CONVERT}"
        if _MP4.match(header):
            reason = (
                "It looks like an MP4 file that was cut short before its index, which comes last, "
                "or it holds no moving pictures. Copy or download it again."
            )
        return f"cannot be opened as a video. {reason}"

    def is_picture(self, form: str) -> MediaError:
        return MediaError(
            f"{self.where}: is a picture ({form}), not a video, whatever its name says. "
            "Give it as image=."
        )

    # -- planning --------------------------------------------------------------------------

    def listing(self, container: InputContainer, stream: VideoStream) -> Listing:
        """Go through the packets without decoding."""
        # Where MP4 cuts frames out by an edit list, its index lacks them.
        is_mp4 = container.format.name == _INDEXED[0]
        announced = len(stream.index_entries) if is_mp4 else stream.frames
        if announced > self.n_bytes:  # a frame takes at least a byte: that is no count
            announced = 0
        self._check_length(announced)
        pts, plain, damaged = array("q"), True, False
        keys: list[int] = []
        for packet in _packets(container, stream):
            if packet is None:
                break
            plain = plain and packet.pts is not None and not packet.is_discard
            damaged = damaged or packet.is_corrupt
            pts.append(packet.pts or 0)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            self._check_length(len(pts))
        ordered = np.sort(np.array(pts, dtype=np.int64))
        times_ms = (ordered - (stream.start_time or 0)).astype(np.float64) * _tick_ms(stream)
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate and 0 < rate <= _FASTEST_FPS else None
        if not announced and plain and fps is not None and come_at_rate(times_ms, fps):
            lasting = round(_duration_s(container, stream) * fps)
            # The last frames' durations may be rounded.
            announced = lasting if len(pts) + 2 < lasting <= self.n_bytes else 0
        shape = _shape(stream)
        return Listing(ordered, times_ms, sorted(keys), plain, damaged, announced, fps, shape)

    def _check_length(self, n_frames: int) -> None:
        if n_frames > self.limits.max_frames_decoded:
            raise MediaError(
                f"{self.where}: has {n_frames:,} frames or more; at most "
                f"{self.limits.max_frames_decoded:,} are gone through. Cut it into pieces first."
            )

    def worth_seeking(
        self, container: InputContainer, stream: VideoStream, listing: Listing, plan: Indices
    ) -> bool:
        """True where frames can be decoded alone, which is less than half the work."""
        pts, context = listing.pts, stream.codec_context
        known = container.format.name in _INDEXED and context.name in _ONE_FRAME
        if listing.damaged or len(pts) < listing.announced:  # all of it has to be looked at
            return False
        small = len(pts) * context.width * context.height <= _DECODED_WHOLE_PX
        if small or not (known and listing.plain and listing.keys and np.all(np.diff(pts) > 0)):
            return False
        starts = np.searchsorted(pts, listing.keys)
        starts = starts[np.searchsorted(starts, plan, side="right") - 1]
        # The way to a frame begins at its keyframe, or at the frame picked before.
        way = np.array(plan) - np.maximum(starts, [0, *plan[:-1]])
        return bool(2 * way.sum() < len(pts))

    # -- decoding --------------------------------------------------------------------------

    def seek(
        self, container: InputContainer, stream: VideoStream, listing: Listing, plan: Indices
    ) -> list[Image.Image]:
        """Decode the planned frames, each from the keyframe before it or from the last one."""
        starts = np.searchsorted(listing.pts, listing.keys)
        frames: list[Image.Image] = []
        at, arriving = -1, _arriving(container, stream, listing.pts)
        for index in self._progress(plan):
            key = int(np.searchsorted(starts, index, side="right")) - 1
            if key < 0:
                raise Differs
            if at < 0 or starts[key] > at:
                container.seek(listing.keys[key], stream=stream)
                arriving = _arriving(container, stream, listing.pts)
            while at < index:
                at, frame = next(arriving, (len(listing.pts), None))
            if at != index or frame is None:
                raise Differs
            frames.append(self._picture(frame, stream, index))
        return frames

    def go_through(
        self, picked: Indices, n_frames: int, damaged: bool = False, stop_early: bool = False
    ) -> Pass:
        """Decode from the first frame on; keep the picked ones.

        Args:
            picked: ascending positions.
            n_frames: how many frames to expect, for the progress bar.
            damaged: go on behind what cannot be decoded, instead of raising `Differs`. In one
                thread, so that none of the frames behind it is lost.
            stop_early: stop after the last picked frame instead of counting to the end.
        """
        done = Pass(array("d"), [])
        remaining = iter(picked)
        wanted = next(remaining, None)
        with (
            self.opened(threads="NONE" if damaged else "AUTO") as (container, stream),
            self._progress(range(n_frames)) as bar,
        ):
            start = stream.start_time or 0
            for packet in _packets(container, stream):
                try:
                    arrived = stream.decode(packet)
                except av.FFmpegError:
                    if not damaged:
                        raise Differs from None
                    continue
                for frame in arrived:
                    if frame.is_corrupt and not damaged:
                        raise Differs
                    done.n_damaged += frame.is_corrupt
                    if len(done.times_ms) == wanted:
                        done.frames.append(self._picture(frame, stream, wanted))
                        wanted = next(remaining, None)
                    past_start = math.nan if frame.pts is None else frame.pts - start
                    done.times_ms.append(past_start * _tick_ms(stream))
                    bar.update()
                if stop_early and wanted is None:
                    break
        return done

    def _picture(self, frame: VideoFrame, stream: VideoStream, index: int) -> Image.Image:
        """A frame as a player shows it."""
        where = f"{self.where}: frame {index}"
        check_size(frame.width, frame.height, where, self.limits)
        width, height = _shape(stream, frame)
        check_size(width, height, where, self.limits)
        form, turn = frame.format, _display_matrix(frame)
        clear = form.has_palette or any(part.is_alpha for part in form.components)
        # Made before FFmpeg's buffer: behind it that would leave a gap in memory, as large again.
        picture = Image.new("RGB", (height, width) if _is_quarter(turn) else (width, height))
        try:
            made = self.reformatter.reformat(
                frame, width, height, "rgba" if clear else "rgb24", interpolation="BICUBIC"
            )
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(f"{where} cannot be turned into 8-bit RGB. {CONVERT}") from error
        pixels = _turned(made.to_ndarray(), turn)
        if clear:
            return load_image(pixels, self.limits)
        picture.frombytes(pixels)
        return picture

    def _progress(self, steps: Sequence[int]) -> tqdm[int]:
        return tqdm(
            steps,
            desc=os.path.basename(self.where),
            unit="frame",
            leave=False,
            disable=None,
            delay=_SHOW_PROGRESS_AFTER_S,
        )


def come_at_rate(times_ms: npt.NDArray[np.float64], fps: float) -> bool:
    """Whether frames come at a rate, but for one or two places in which some may be missing.

    Example:
        >>> come_at_rate(np.array([*range(0, 500, 33), *range(900, 1400, 33)]), 30)
        True
    """
    gaps = np.diff(times_ms)
    others = int(np.count_nonzero(np.abs(gaps - 1000 / fps) > 1.5))  # times may be whole ms
    return len(gaps) > 0 and others <= min(2, len(gaps) // 10)


def _duration_s(container: InputContainer, stream: VideoStream) -> float:
    """How long the stream lasts by the header, 0 where only a longer sound may be meant."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    start_s = max(0.0, (stream.start_time or 0) * _tick_ms(stream) / 1000)
    if tag is not None:  # Matroska's
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]) - start_s
    return (container.duration or 0) / 1e6 - start_s if len(container.streams) == 1 else 0.0


def _allocated(limits: MediaLimits) -> str:
    """Pixels that a decoder may allocate for a frame: rows and columns are filled up."""
    return str(4 * limits.max_pixels + 2**16)


def _refuse(url: str, *args: Any) -> Any:
    raise PermissionError(f"{url}: no other file is opened")


def _packets(
    container: InputContainer, stream: VideoStream
) -> Iterator[Packet[VideoStream] | None]:
    """Packets up to the end, or up to where the file cannot be read on; None to end decoding."""
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    yield None


def _arriving(
    container: InputContainer, stream: VideoStream, pts: npt.NDArray[np.int64]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames and their positions from where a seek went; each must be the next one listed."""
    position = -1
    for packet in _packets(container, stream):
        if position < 0:
            if packet is None or not packet.is_keyframe or packet.pts is None:
                raise Differs
            position, start = int(np.searchsorted(pts, packet.pts)), packet.pts
        for frame in stream.decode(packet):
            # What is shown before the keyframe may need frames from before it.
            if frame.pts is not None and frame.pts < start:
                continue
            if frame.is_corrupt or position == len(pts) or frame.pts != pts[position]:
                raise Differs
            yield position, frame
            position += 1


def _shape(stream: VideoStream, frame: VideoFrame | None = None) -> tuple[int, int]:
    """Width and height of a frame whose pixels are made square."""
    source = stream.codec_context if frame is None else frame
    return round(source.width * (stream.sample_aspect_ratio or 1)), source.height


def _display_matrix(frame: VideoFrame) -> Matrix:
    """How a frame is turned and mirrored: x' = a x + c y, y' = b x + d y."""
    try:
        data = [bytes(one) for one in _side_data(frame) if one.type.name == "DISPLAYMATRIX"]
    except ValueError:  # side data that PyAV has no name for hides the matrix, but not its angle
        turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
        return turns[round(frame.rotation / 90) % 4]
    if not data:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data[0], np.int32)[:5].tolist()
    return a, b, c, d


def _is_quarter(turn: Matrix) -> bool:
    a, b, c, d = turn
    return abs(b) + abs(c) > abs(a) + abs(d)


def _turned(pixels: npt.NDArray[Any], turn: Matrix) -> npt.NDArray[Any]:
    a, b, c, d = turn
    if _is_quarter(turn):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _side_data(frame: VideoFrame) -> Iterator[SideData]:
    return iter(frame.side_data)  # type: ignore[arg-type] # not the dict that PyAV's stubs call it


def _tick_ms(stream: VideoStream) -> float:
    return 1000 * float(stream.time_base or 0)
