"""Videos in: a file becomes the frames a model gets to see, with their times, or a clear error.

OpenCV decodes the file as a stream from its first frame on, because jumping is not exact in many
formats. Only the frames that were picked are kept, and a time of 8 bytes for each of the others.
A header's frame count is a guess (some formats have none, a file may be cut short): it plans the
first pass, the frames that were really there decide. Only where the plan was wrong, or the frame
rate varies, does a second pass follow.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import struct
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from mmlm_efficient.errors import MediaError, SettingsError
from mmlm_efficient.media import FORMATS, ImageLimits, load_image
from mmlm_efficient.video.sampling import FrameSampling, Indices

Frame: TypeAlias = "Image.Image | npt.NDArray[np.generic]"
VideoSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | Sequence[Frame] | npt.NDArray[np.generic]"
)

log = logging.getLogger(__name__)

_HEADER_BYTES = 4096
_SHOW_PROGRESS_AFTER_S = 2.0
# Faster rates than this in a header are the clock of the format, not a frame rate.
_FASTEST_FPS = 1000.0
# Video formats never begin with this much text, but for these; playlists do, and those make the
# decoder open other files.
_TEXT = re.compile(rb"(?:\xef\xbb\xbf)?[\t\n\r -~]{16}")
_TEXT_VIDEOS = (b"RIFF", b"YUV4MPEG2", b"nut/multimedia")
# Music files may hold a cover, which a decoder takes for a video of one frame.
_SOUND = re.compile(rb"ID3|fLaC|ADIF|#!AMR|RIFF....WAVE|FORM....AIF|....ftypM4[ABP] ", re.DOTALL)
_MP4 = re.compile(rb"....(?:ftyp|moov|mdat|free|wide)", re.DOTALL)
_CONVERT = "Convert it with a video program first, for example to MP4 (H.264)."

# The log level of OpenCV belongs to the whole process.
_log_level_lock = threading.Lock()


@dataclass(frozen=True)
class VideoLimits:
    """What a video may cost.

    Attributes:
        max_file_bytes: size of the file or of the bytes given, bytes.
        max_pixels: width x height of one frame, pixels.
        max_frames_decoded: frames of the file that are gone through, picked or not.
        max_selected_frames: frames that are picked and kept.
        max_selected_pixels: pixels of all frames kept together; three bytes of memory each.
    """

    max_file_bytes: int = 4 * 1024**3
    max_pixels: int = 64_000_000
    max_frames_decoded: int = 2_000_000
    max_selected_frames: int = 4096
    max_selected_pixels: int = 2_000_000_000


DEFAULT_LIMITS = VideoLimits()
DEFAULT_SAMPLING = FrameSampling()


@dataclass(frozen=True)
class Video:
    """The frames picked from a video.

    Attributes:
        frames: upright PIL pictures of mode RGB, all of one size.
        seconds: presentation time of each frame, to the microsecond.
        indices: position of each frame in the video, ascending from 0.
        fps: average frame rate of the video, frames per second.
        n_frames: frames the video has, those not picked included.
        size_px: width and height of the frames.
        duration_s: time of the video's last frame and one average frame, seconds.
    """

    frames: list[Image.Image] = field(repr=False)
    seconds: tuple[float, ...]
    indices: Indices
    fps: float
    n_frames: int
    size_px: tuple[int, int]
    duration_s: float


def load_video(
    source: VideoSource,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: VideoLimits = DEFAULT_LIMITS,
    fps: float | None = None,
) -> Video:
    """Load the frames of one video that the sampling picks.

    What is in the file counts, not its name. Rotated videos of phones are turned upright. In a
    video with a variable frame rate, `seconds` are the frames' true times, and sampling by rate
    goes by them. A file that was cut short gives what is left of it, with a warning in the log.

    Args:
        source: path of a video file, its bytes, or frames that were picked already: a list of
            pictures (PIL or arrays as in `load_image`), or an array [frames, height, width, 3].
            All frames of a list are kept.
        sampling: which frames to pick from a file.
        limits: what is refused.
        fps: frame rate of a list of frames, 1 if not given. A file has its own.

    Raises:
        MediaError: naming the source, what is wrong with it and what is allowed.
        SettingsError: `fps` was given for a file, or is no frame rate.

    Example:
        >>> video = load_video(np.zeros((3, 20, 30, 3), dtype=np.uint8), fps=2)
        >>> video.seconds, video.size_px, video.duration_s
        ((0.0, 0.5, 1.0), (30, 20), 1.5)
    """
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim < 4):
        raise MediaError(
            "video: this is one picture. Give it as image=, or several frames as a list."
        )
    if isinstance(source, list | tuple | np.ndarray):
        return _from_frames(source, limits, 1.0 if fps is None else fps)
    if fps is not None:
        raise SettingsError("fps is for frames given as a list; a video file has its own rate")
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), sampling, limits)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), sampling, limits)
    raise MediaError(
        f"video: cannot read a {type(source).__name__}. "
        "Give a path, the bytes of a file, or a list of PIL images or numpy arrays."
    )


# -- frames that were picked already -------------------------------------------------------


def _from_frames(
    source: Sequence[Frame] | npt.NDArray[np.generic], limits: VideoLimits, fps: float
) -> Video:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise SettingsError(f"fps must be a number of frames per second > 0, got {fps!r}")
    n_frames = len(source)
    if n_frames == 0:
        raise MediaError("video: the list of frames is empty. Give at least one frame.")
    _check_selected(n_frames, 0, "video", limits)
    frames: list[Image.Image] = []
    for position, frame in enumerate(source):
        where = f"video: frame {position + 1} of {n_frames}"
        if not isinstance(frame, Image.Image | np.ndarray):
            raise MediaError(
                f"{where} is a {type(frame).__name__}. A list holds the frames of one video, as "
                "PIL images or numpy arrays."
            )
        try:
            frames.append(load_image(frame, ImageLimits(max_pixels=limits.max_pixels)))
        except MediaError as error:
            raise MediaError(f"{where}: {error}") from error
        _check_same_size(frames, where)
        if position == 0:
            _check_selected(n_frames, math.prod(frames[0].size), "video", limits)
    return Video(
        frames,
        tuple(position / fps for position in range(n_frames)),
        tuple(range(n_frames)),
        float(fps),
        n_frames,
        frames[0].size,
        n_frames / fps,
    )


def _check_same_size(frames: list[Image.Image], where: str) -> None:
    if frames[-1].size != frames[0].size:
        sizes = ["{} x {}".format(*frame.size) for frame in (frames[-1], frames[0])]
        raise MediaError(
            f"{where} has {sizes[0]} pixels, the first one has {sizes[1]}. "
            "All frames of a video must have one size."
        )


def _check_selected(count: int, pixels: int, where: str, limits: VideoLimits) -> None:
    advice = "Take fewer frames (frames, max_frames or base_fps)."
    if count > limits.max_selected_frames:
        raise MediaError(
            f"{where}: {count:,} frames would be kept; at most {limits.max_selected_frames:,} are "
            f"allowed. {advice}"
        )
    if count * pixels > limits.max_selected_pixels:
        raise MediaError(
            f"{where}: {count:,} frames of {pixels:,} pixels would be kept; at most "
            f"{limits.max_selected_pixels:,} pixels together are allowed. {advice}"
        )


# -- files ---------------------------------------------------------------------------------


def _from_bytes(data: bytes, sampling: FrameSampling, limits: VideoLimits) -> Video:
    where = f"video of {len(data):,} bytes"
    _check_content(data[:_HEADER_BYTES], len(data), where, limits)
    try:
        with tempfile.NamedTemporaryFile(prefix="mmlm_video_") as file:
            file.write(data)
            file.flush()
            _refuse_picture(file.name, where)
            return _Reader(file.name, where, len(data), limits).read(sampling)
    except OSError as error:  # the disk of the temporary folder is full
        raise MediaError(
            f"{where}: cannot be written to the temporary folder {tempfile.gettempdir()} "
            f"({error}). Make room there, or give the path of a file."
        ) from error


def _from_path(given: str, sampling: FrameSampling, limits: VideoLimits) -> Video:
    if not given.strip():
        raise MediaError("video: the path is empty. Give the path of one video file.")
    path = os.path.expanduser(given)
    if re.match(r"(?i)([a-z][a-z0-9+.-]*://|(?:data|file|https?):)", path):
        raise MediaError(
            f"{path[:80]}: addresses are not fetched. Download the video and give its path."
        )
    try:
        status = os.stat(path)
    except FileNotFoundError:
        folder = Path(path).parent
        exists = "exists; check the spelling" if folder.is_dir() else "does not exist either"
        raise MediaError(f"{path}: no such file. The folder {folder} {exists}.") from None
    except (OSError, ValueError) as error:  # no permission, name too long, a null byte
        raise MediaError(f"{path!r}: cannot be read ({error}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{path}: is a folder. Give the path of one video file.")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: is not a regular file. Give the path of one video file.")
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except PermissionError as error:
        raise MediaError(f"{path}: no permission to read it.") from error
    except OSError as error:  # such as a disk or network folder that fails
        raise MediaError(f"{path}: cannot be read ({error}).") from error
    _check_content(header, status.st_size, path, limits)
    # The whole path, so that no name looks like one of the decoder's own protocols ("concat:").
    whole = os.path.abspath(path)
    _refuse_picture(whole, path)
    return _Reader(whole, path, status.st_size, limits).read(sampling)


def _check_content(header: bytes, n_bytes: int, where: str, limits: VideoLimits) -> None:
    if n_bytes == 0:
        raise MediaError(f"{where}: is empty (0 bytes).")
    if n_bytes > limits.max_file_bytes:
        raise MediaError(
            f"{where}: has {n_bytes:,} bytes; at most {limits.max_file_bytes:,} are allowed. "
            "Make it smaller or cut it into pieces first."
        )
    if _SOUND.match(header):
        raise MediaError(f"{where}: holds sound only, no video. Give a file with moving pictures.")
    if _TEXT.match(header) and not header.startswith(_TEXT_VIDEOS):
        raise MediaError(
            f"{where}: is a text or a playlist, not a video. Give the path of the video itself."
        )


def _refuse_picture(path: str, where: str) -> None:
    """An animated GIF is a video; every other picture is for image=."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            form, moves = str(picture.format), bool(getattr(picture, "is_animated", False))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        form, moves = "a huge one", False
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error):
        return  # no picture that Pillow knows: what every video is
    if not (form == "GIF" and moves):
        raise MediaError(
            f"{where}: is a picture ({form}), not a video, whatever its name says. "
            "Give it as image=."
        )


@dataclass
class _Pass:
    """What one way through the file brought: time of every frame seen (ms), frames picked."""

    times_ms: array[float]
    frames: list[Image.Image]


@dataclass
class _Reader:
    """Reads one file; `where` is its name in messages."""

    path: str
    where: str
    n_bytes: int
    limits: VideoLimits

    def read(self, sampling: FrameSampling) -> Video:
        announced, header_fps, pixels = self._header()
        plan = self._plan(sampling, announced, header_fps, pixels)
        first = self._go_through(plan, announced)
        n_frames = len(first.times_ms)
        if n_frames == 0:
            raise MediaError(
                f"{self.where}: no frame can be decoded. It holds no frames, is cut short or "
                f"damaged, or its codec is not known here. {_CONVERT}"
            )
        if announced is not None and n_frames < announced:
            log.warning(
                "%s: announces %s frames, but %s can be decoded: it was cut, is damaged, or its "
                "header is wrong. Frames are picked from those.",
                self.where,
                f"{announced:,}",
                f"{n_frames:,}",
            )
        seconds, fps = _timeline(first.times_ms, header_fps, self.where)
        indices = sampling.indices_of(seconds, fps)
        frames = first.frames
        if indices != plan:
            _check_selected(len(indices), pixels, self.where, self.limits)
            frames.clear()
            frames = self._go_through(indices, n_frames, stop_early=True).frames
        if len(frames) != len(indices):
            raise MediaError(f"{self.where}: changed while it was read. Wait until it is complete.")
        return Video(
            frames,
            tuple(float(seconds[index]) for index in indices),
            indices,
            fps,
            n_frames,
            frames[0].size,
            round(float(seconds[-1]) + 1 / fps, 6),
        )

    def _header(self) -> tuple[int | None, float | None, int]:
        """Number of frames and frame rate where the header has credible ones; pixels of a frame."""
        with self._opened() as capture:
            width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
            height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
            count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            fps = capture.get(cv2.CAP_PROP_FPS)
        if width * height > self.limits.max_pixels:
            raise MediaError(
                f"{self.where}: its frames have {width} x {height} = {width * height:,} pixels; at "
                f"most {self.limits.max_pixels:,} are allowed. Make it smaller first."
            )
        # A frame takes at least a byte: what claims more is no count.
        announced = int(count) if 1 <= count <= self.n_bytes else None
        if announced is not None and announced > self.limits.max_frames_decoded:
            self._refuse_length(announced)
        return announced, (fps if 0 < fps <= _FASTEST_FPS else None), width * height

    def _plan(
        self, sampling: FrameSampling, announced: int | None, fps: float | None, pixels: int
    ) -> Indices:
        """Frames to keep on the first pass; none where the header is no help or asks too much."""
        if announced is None or (fps is None and sampling.mode == "fps"):
            return ()
        plan = sampling.indices(announced, 1.0 if fps is None else fps)
        fits = len(plan) <= self.limits.max_selected_frames
        return plan if fits and len(plan) * pixels <= self.limits.max_selected_pixels else ()

    def _go_through(self, picked: Indices, n_frames: int | None, stop_early: bool = False) -> _Pass:
        """Decode from the first frame on; keep the picked ones.

        Args:
            picked: ascending positions.
            n_frames: how many frames to expect, for the progress bar.
            stop_early: stop after the last picked frame instead of counting to the end.
        """
        done = _Pass(array("d"), [])
        remaining = iter(picked)
        wanted = next(remaining, None)
        with self._opened() as capture, self._progress(n_frames) as bar:
            while not (stop_early and wanted is None) and capture.grab():
                index = len(done.times_ms)
                if index >= self.limits.max_frames_decoded:
                    self._refuse_length(index + 1)
                done.times_ms.append(capture.get(cv2.CAP_PROP_POS_MSEC))
                if index == wanted:
                    done.frames.append(self._retrieve(capture, index))
                    _check_same_size(done.frames, f"{self.where}: frame {index}")
                    wanted = next(remaining, None)
                bar.update()
        return done

    def _retrieve(self, capture: cv2.VideoCapture, index: int) -> Image.Image:
        good, pixels = capture.retrieve()
        if not good or pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint8:
            raise MediaError(
                f"{self.where}: frame {index} cannot be turned into 8-bit RGB. {_CONVERT}"
            )
        frame = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        if math.prod(frame.size) > self.limits.max_pixels:
            raise MediaError(
                f"{self.where}: frame {index} has {frame.size[0]} x {frame.size[1]} pixels; at "
                f"most {self.limits.max_pixels:,} are allowed. Make the video smaller first."
            )
        return frame

    @contextmanager
    def _opened(self) -> Iterator[cv2.VideoCapture]:
        with _log_level_lock:
            level = cv2.utils.logging.getLogLevel()
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
            try:
                capture = cv2.VideoCapture(self.path, cv2.CAP_FFMPEG)
            finally:
                cv2.utils.logging.setLogLevel(level)
        try:
            if not capture.isOpened():
                raise MediaError(f"{self.where}: cannot be opened as a video. {self._reason()}")
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
            yield capture
        finally:
            capture.release()

    def _reason(self) -> str:
        with open(self.path, "rb") as file:
            header = file.read(16)
        if _MP4.match(header):
            return (
                "It looks like an MP4 file that was cut short before its index, which comes last, "
                "or it holds no moving pictures. Copy or download it again."
            )
        return f"It is not a video, is damaged, or is of a format that is not known. {_CONVERT}"

    def _progress(self, n_frames: int | None) -> tqdm[Any]:
        return tqdm(
            total=n_frames,
            desc=os.path.basename(self.where),
            unit="frame",
            leave=False,
            disable=None,
            delay=_SHOW_PROGRESS_AFTER_S,
        )

    def _refuse_length(self, n_frames: int) -> None:
        raise MediaError(
            f"{self.where}: has {n_frames:,} frames or more; at most "
            f"{self.limits.max_frames_decoded:,} are gone through. Cut it into pieces first."
        )


def _timeline(
    times_ms: array[float], header_fps: float | None, where: str
) -> tuple[npt.NDArray[np.float64], float]:
    """Time of every frame (seconds, to the microsecond) and the average frame rate.

    The header's rate is kept where it explains the times to a hundredth, or to the rounding of
    times in milliseconds; it is the exact one, such as 30000/1001.
    """
    seconds = np.round(np.array(times_ms, dtype=np.float64) / 1000, 6)
    gaps = len(seconds) - 1
    if gaps == 0:
        return seconds, 1.0 if header_fps is None else header_fps
    span = float(seconds[-1] - seconds[0])
    if span > 0 and np.all(np.diff(seconds) >= 0):
        if header_fps is not None and abs(gaps / header_fps - span) <= max(0.01 * span, 0.002):
            return seconds, header_fps
        return seconds, gaps / span
    if header_fps is None:
        raise MediaError(
            f"{where}: has neither frame times nor a frame rate. {_CONVERT} Or give its frames as "
            "a list with fps=."
        )
    log.warning(
        "%s: its frame times are missing or go back; frame n is taken to be at n / %g s.",
        where,
        header_fps,
    )
    return np.round(np.arange(gaps + 1) / header_fps, 6), header_fps
