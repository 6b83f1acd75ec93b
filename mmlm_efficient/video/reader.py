"""Videos in: a file becomes the frames a model gets to see, with their times, or a clear error.

PyAV (FFmpeg) reads the file. Its packets are listed first, which decodes nothing and tells how
many frames there are, and when. Where the packets are known to be the frames (H.264 and its like
in MP4 or Matroska), each picked frame is decoded from the keyframe before it, and every frame on
the way must be the one that was listed. Everywhere else, where most frames would be decoded anyway
and where anything differs, all frames are decoded in order: what comes out then is the truth.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlm_efficient.errors import MediaError, SettingsError
from mmlm_efficient.media import DEFAULT_LIMITS, MediaLimits, load_image, open_file, picture_format
from mmlm_efficient.video.film import CONVERT, Differs, Film, Listing, come_at_rate
from mmlm_efficient.video.sampling import FrameSampling, Indices

Frame: TypeAlias = "Image.Image | npt.NDArray[np.generic]"
VideoSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | Sequence[Frame] | npt.NDArray[np.generic]"
)

log = logging.getLogger(__name__)

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
    limits: MediaLimits = DEFAULT_LIMITS,
    fps: float | None = None,
) -> Video:
    """Load the frames of one video that the sampling picks.

    What is in the file counts, not its name. Frames are as a player shows them: of the default
    stream, upright, mirrored where the file says so, with square pixels, transparency on white. In
    a video with a variable frame rate, `seconds` are the frames' true times, and sampling by rate
    goes by them.

    A file that is damaged or was cut short gives every frame that can be decoded, with one warning
    in the log where the damage shows: the format or the decoder marks it, or more than two frames
    are missing of those that the header announces, by number or by duration and a constant rate.
    Unseen are lost frames where the header announces nothing (MPEG-TS, Motion JPEG or H.264 alone,
    Matroska without duration), damage that a decoder takes for a picture (often VP8 and VP9), and,
    in a long film, damage away from the picked frames.

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
        data = bytes(source)
        where = f"video of {len(data):,} bytes"
        return _from_film(Film(io.BytesIO(data), where, len(data), limits), sampling)
    if isinstance(source, str | os.PathLike):
        file, path, n_bytes = open_file(os.fspath(source), "video")
        with file:
            return _from_film(Film(file, path, n_bytes, limits), sampling)
    raise MediaError(
        f"video: cannot read a {type(source).__name__}. "
        "Give a path, the bytes of a file, or a list of PIL images or numpy arrays."
    )


# -- frames that were picked already -------------------------------------------------------


def _from_frames(
    source: Sequence[Frame] | npt.NDArray[np.generic], limits: MediaLimits, fps: float
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
            frames.append(load_image(frame, limits))
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


def _check_selected(count: int, pixels: int, where: str, limits: MediaLimits) -> None:
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


def _from_film(film: Film, sampling: FrameSampling) -> Video:
    try:
        film.check_content()
        picture = picture_format(film.file)
        with film.opened(picture) as (container, stream):
            listing = film.listing(container, stream)
            n_listed = len(listing.pts)
            if picture is not None and (n_listed < 2 or picture == "MPO"):
                raise film.is_picture(picture)
            plan = _plan(sampling, listing.times_ms, listing.fps, film.where)
            _check_selected(len(plan), math.prod(listing.size_px), film.where, film.limits)
            if film.worth_seeking(container, stream, listing, plan):
                with contextlib.suppress(Differs, av.FFmpegError):
                    frames = film.seek(container, stream, listing, plan)
                    times = _timeline(listing.times_ms, listing.fps, film.where)
                    return _video(frames, plan, *times, film.where)
        return _from_all_frames(film, sampling, plan, listing)
    except OSError as error:  # such as a disk or network folder that fails
        raise MediaError(f"{film.where}: cannot be read ({error}).") from error


def _plan(
    sampling: FrameSampling, times_ms: npt.NDArray[np.float64], fps: float | None, where: str
) -> Indices:
    """Frames to pick if the packets are the frames; none where there is no telling."""
    if len(times_ms) > 1 and times_ms[-1] > times_ms[0]:
        return sampling.indices_of(*_timeline(times_ms, fps, where))
    if len(times_ms) == 0 or (fps is None and sampling.mode == "fps"):
        return ()
    return sampling.indices(len(times_ms), fps or 1.0)


def _from_all_frames(film: Film, sampling: FrameSampling, plan: Indices, listing: Listing) -> Video:
    damaged, announced = listing.damaged, max(listing.announced, len(listing.pts))
    try:
        first = film.go_through(plan, announced, damaged)
    except Differs:
        damaged = True
        first = film.go_through(plan, announced, damaged)
    n_frames = len(first.times_ms)
    if n_frames == 0:
        raise MediaError(
            f"{film.where}: no frame can be decoded. It holds no frames, is cut short or "
            f"damaged, or its codec is not known here. {CONVERT}"
        )
    if damaged or n_frames < announced:
        log.warning(
            "%s: announces %s frames, %s %s can be decoded, %s of them with visible damage: it was "
            "cut, is damaged, or its header is wrong. Frames are picked from those.",
            film.where,
            f"{announced:,}",
            "but" if n_frames < announced else "and",
            f"{n_frames:,}",
            f"{first.n_damaged:,}",
        )
    seconds, fps = _timeline(first.times_ms, listing.fps, film.where)
    indices = sampling.indices_of(seconds, fps)
    frames = first.frames
    if indices != plan:
        frames.clear()
        frames = film.go_through(indices, n_frames, damaged, stop_early=True).frames
    if len(frames) != len(indices):
        raise MediaError(f"{film.where}: changed while it was read. Wait until it is complete.")
    return _video(frames, indices, seconds, fps, film.where)


def _video(
    frames: list[Image.Image],
    indices: Indices,
    seconds: npt.NDArray[np.float64],
    fps: float,
    where: str,
) -> Video:
    for index, frame in zip(indices, frames, strict=True):
        _check_same_size([frames[0], frame], f"{where}: frame {index}")
    return Video(
        frames,
        tuple(float(seconds[index]) for index in indices),
        indices,
        fps,
        len(seconds),
        frames[0].size,
        round(float(seconds[-1]) + 1 / fps, 6),
    )


def _timeline(
    times_ms: array[float] | npt.NDArray[np.float64], header_fps: float | None, where: str
) -> tuple[npt.NDArray[np.float64], float]:
    """Time of every frame (seconds, to the microsecond) and the average frame rate.

    The header's rate is kept where it explains the times to a hundredth, or to the rounding of
    times in milliseconds; it is the exact one, such as 30000/1001. Also where frames are missing.
    """
    seconds = np.round(np.array(times_ms, dtype=np.float64) / 1000, 6)
    gaps = len(seconds) - 1
    if gaps == 0:
        return seconds, 1.0 if header_fps is None else header_fps
    span = float(seconds[-1] - seconds[0])
    if span > 0 and np.all(np.diff(seconds) >= 0):
        if header_fps is not None and (
            abs(gaps / header_fps - span) <= max(0.01 * span, 0.002)
            or come_at_rate(seconds * 1000, header_fps)
        ):
            return seconds, header_fps
        return seconds, gaps / span
    if header_fps is None:
        raise MediaError(
            f"{where}: has neither frame times nor a frame rate. {CONVERT} Or give its frames as "
            "a list with fps=."
        )
    log.warning(
        "%s: its frame times are missing or go back; frame n is taken to be at n / %g s.",
        where,
        header_fps,
    )
    return np.round(np.arange(gaps + 1) / header_fps, 6), header_fps
