"""Which frames of a video a model gets to see.

Two rules: a fixed number of frames spread over the whole video (LLaVA-OneVision, lmms-eval), and a
number of frames per second that rises for short videos and is capped for long ones (Video-XL-2,
its frame loader). Both are pure functions of frame counts and times.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmlm_efficient.errors import SettingsError, nearest

Indices: TypeAlias = tuple[int, ...]
Seconds: TypeAlias = "Sequence[float] | npt.NDArray[np.float64]"

# Times come in whole microseconds at best; a sum of them must not miss a whole second for that.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Sampled:
    """Frames that were picked.

    Attributes:
        indices: ascending positions in the video, from 0.
        seconds: their times by the average frame rate, rounded to a tenth of a second.
    """

    indices: Indices
    seconds: tuple[float, ...]


def uniform_sample(n_frames: int, count: int) -> Indices:
    """Spread `count` frames evenly from the first frame to the last one.

    The convention of LLaVA-OneVision and lmms-eval: ``linspace(0, n_frames - 1, count)``, cut down
    to whole numbers. So both ends are taken, and a single frame is the first one.

    Args:
        n_frames: frames the video has, >= 1.
        count: frames to take, >= 1; a shorter video gives all its frames, once each.

    Raises:
        SettingsError: a number below 1.

    Example:
        >>> uniform_sample(10, 4), uniform_sample(3, 8)
        ((0, 3, 6, 9), (0, 1, 2))
    """
    n_frames, count = _checked_count("n_frames", n_frames, 1), _checked_count("count", count, 1)
    if n_frames <= count:
        return tuple(range(n_frames))
    return _spread(n_frames, count)


def fps_sample(
    n_frames: int,
    fps: float,
    base_fps: float = 1.0,
    max_fps: float | None = 4,
    max_frames: int = 0,
) -> Sampled:
    """Take every step-th frame, about `base_fps` frames per second (Video-XL-2).

    The step is the frame rate divided by `base_fps`, rounded to the even neighbour at a half. If
    `max_frames` leaves room, the rate is raised by a whole number of times up to `max_fps`; if the
    frames are still too many, `max_frames` of them are spread evenly. Steps are whole frames, so
    the rate that comes out may differ from the rate wanted: 10 fps at 4 gives a step of 2, 5 fps.

    This rule counts frames, so it is only right where they are evenly spaced in time. For a
    variable frame rate use :func:`time_sample`, as `FrameSampling.indices_of` does by itself.

    Args:
        n_frames: frames the video has, >= 1.
        fps: average frame rate of the video, frames per second, > 0.
        base_fps: frames per second to take, > 0; above twice `fps` all frames are taken.
        max_fps: the rate is not raised above this one; None to leave it at `base_fps`.
        max_frames: most frames to take; 0 for no cap (and then the rate is not raised either).

    Raises:
        SettingsError: a number out of range.

    Example:
        >>> fps_sample(90, 30.0).indices
        (0, 30, 60)
        >>> fps_sample(90, 30.0, max_frames=8)
        Sampled(indices=(0, 15, 30, 45, 60, 75), seconds=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5))
    """
    n_frames = _checked_count("n_frames", n_frames, 1)
    max_frames = _checked_count("max_frames", max_frames, 0)
    fps, base_fps = _checked_rate("fps", fps), _checked_rate("base_fps", base_fps)
    indices: Sequence[int] = _every(n_frames, fps / base_fps)
    if max_fps is not None:
        raised = min(max_frames // len(indices), _checked_rate("max_fps", max_fps))
        if raised > base_fps:
            indices = _every(n_frames, fps / raised)
    if 0 < max_frames < len(indices):
        indices = _spread(n_frames, max_frames)
    return Sampled(tuple(indices), tuple(round(index / fps, 1) for index in indices))


def time_sample(
    seconds: Seconds,
    base_fps: float = 1.0,
    max_fps: float | None = 4,
    max_frames: int = 0,
) -> Indices:
    """The rule of :func:`fps_sample` for a variable frame rate: it counts time, not frames.

    Wanted times are 0, 1/rate, 2/rate, ... after the first frame, up to the end of the last one
    (which is taken to last as long as the average frame). Each takes the frame whose time is
    nearest, the earlier one of two that are equally near. A frame that is nearest to several
    wanted times, because it stands still for long, is taken once. Raising the rate and the cap
    follow :func:`fps_sample`, with the wanted times spread evenly where that spreads frames.

    Args:
        seconds: presentation time of every frame, ascending.
        base_fps: as in :func:`fps_sample`.
        max_fps: as in :func:`fps_sample`.
        max_frames: as in :func:`fps_sample`.

    Raises:
        SettingsError: a number out of range, no times, or times that go back.

    Example:
        >>> time_sample([0.0, 0.1, 0.2, 0.9, 2.1, 2.2])
        (0, 3, 4)
    """
    times = np.asarray(seconds, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or not np.all(np.diff(times) >= 0.0):
        raise SettingsError(
            f"seconds: expected the ascending times of at least one frame, got {times!r:.80}"
        )
    max_frames = _checked_count("max_frames", max_frames, 0)
    times = times - times[0]
    indices = _on_grid(times, _checked_rate("base_fps", base_fps))
    if max_fps is not None:
        raised = min(max_frames // len(indices), _checked_rate("max_fps", max_fps))
        if raised > base_fps:
            indices = _on_grid(times, raised)
    if 0 < max_frames < len(indices):
        wanted = np.linspace(0.0, times[-1], max_frames)
        indices = np.unique(np.searchsorted(_middles(times), wanted, side="left"))
    return tuple(int(index) for index in indices)


def evenly_spaced(seconds: Seconds) -> bool:
    """True where no frame is more than half an average frame away from a constant rate.

    Args:
        seconds: presentation time of every frame, ascending.

    Example:
        >>> evenly_spaced([0.0, 0.033, 0.067, 0.1]), evenly_spaced([0.0, 0.1, 0.2, 2.0])
        (True, False)
    """
    times = np.asarray(seconds, dtype=np.float64)
    if times.size < 3:
        return True
    even = np.linspace(times[0], times[-1], times.size)
    half_frame = (times[-1] - times[0]) / (times.size - 1) / 2
    return bool(np.max(np.abs(times - even)) <= half_frame + _TOLERANCE)


class FrameSampling(BaseModel):
    """How to pick frames: settings that check themselves.

    Raises:
        SettingsError: an unknown setting, a value out of range, or one of the other mode.

    Example:
        >>> FrameSampling(frames=4).indices(100, 25.0)
        (0, 33, 66, 99)
        >>> FrameSampling(mode="fps", base_fps=2).indices(100, 25.0)
        (0, 12, 24, 36, 48, 60, 72, 84, 96)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["uniform", "fps"] = Field(
        "uniform", description="a fixed number of frames, or frames per second"
    )
    frames: int = Field(32, description="uniform: frames to take, >= 1")
    base_fps: float = Field(1.0, description="fps: frames per second to take, > 0")
    max_fps: float | None = Field(
        4.0, description="fps: short videos are raised to at most this rate; null to never raise"
    )
    max_frames: int = Field(0, description="fps: most frames to take, 0 for no cap")

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingsError(_explained(error)) from None

    @field_validator("frames", mode="before")
    @classmethod
    def _check_frames(cls, value: Any) -> int:
        return _checked_count("frames", value, 1)

    @field_validator("max_frames", mode="before")
    @classmethod
    def _check_max_frames(cls, value: Any) -> int:
        return _checked_count("max_frames", value, 0)

    @field_validator("base_fps", mode="before")
    @classmethod
    def _check_base_fps(cls, value: Any) -> float:
        return _checked_rate("base_fps", value)

    @field_validator("max_fps", mode="before")
    @classmethod
    def _check_max_fps(cls, value: Any) -> float | None:
        return None if value is None else _checked_rate("max_fps", value)

    @model_validator(mode="after")
    def _check_mode(self) -> FrameSampling:
        owned = ("frames",) if self.mode == "uniform" else ("base_fps", "max_fps", "max_frames")
        for name, field in type(self).model_fields.items():
            if name not in ("mode", *owned) and getattr(self, name) != field.default:
                raise SettingsError(
                    f"{name} does nothing with mode='{self.mode}', which takes {', '.join(owned)}: "
                    "leave it out or change the mode"
                )
        return self

    def indices(self, n_frames: int, fps: float) -> Indices:
        """Frames to take of a video with a constant frame rate.

        Args:
            n_frames: frames the video has, >= 1.
            fps: its frame rate, frames per second, > 0.
        """
        if self.mode == "uniform":
            return uniform_sample(n_frames, self.frames)
        return fps_sample(n_frames, fps, self.base_fps, self.max_fps, self.max_frames).indices

    def indices_of(self, seconds: Seconds, fps: float) -> Indices:
        """Frames to take of a video whose frame times are known.

        With mode "fps" and times that are not evenly spaced, it is time that is counted.

        Args:
            seconds: presentation time of every frame, ascending.
            fps: the average frame rate, frames per second, > 0.
        """
        if self.mode == "uniform" or evenly_spaced(seconds):
            return self.indices(len(seconds), fps)
        return time_sample(seconds, self.base_fps, self.max_fps, self.max_frames)


def _every(n_frames: int, step: float) -> range:
    # A step beyond the end still takes the first frame; it may be too large for an int.
    return range(0, n_frames, max(1, round(min(step, n_frames))))


def _spread(n_frames: int, count: int) -> Indices:
    return tuple(int(index) for index in np.linspace(0, n_frames - 1, count, dtype=np.int64))


def _middles(times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where the next frame becomes the nearer one: the middles between the times of neighbours."""
    return (times[1:] + times[:-1]) / 2


def _on_grid(times: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.int64]:
    """Frames that are nearest to one of the times 0, 1/rate, 2/rate, ... before the end.

    The last time on the grid that each frame is nearest to moves on exactly where a frame is
    nearest to some. So the grid is never written down, however fine it is.
    """
    average = times[-1] / max(1, len(times) - 1)
    last = max(0.0, math.ceil((times[-1] + average) * rate - _TOLERANCE) - 1.0)
    reached = np.minimum(np.floor(_middles(times) * rate + _TOLERANCE), last)
    moves = np.diff(np.concatenate([[-1.0], reached, [last]]))
    return np.flatnonzero(moves > 0).astype(np.int64)


def _checked_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise SettingsError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def _checked_rate(name: str, value: Any) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, numbers.Real)
    if wrong or not math.isfinite(value) or value <= 0:
        raise SettingsError(f"{name} must be a number of frames per second > 0, got {value!r}")
    return float(value)


def _explained(error: ValidationError) -> str:
    """One sentence per invalid setting: field, value, what is allowed."""
    lines = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            valid = list(FrameSampling.model_fields)
            hint = nearest(field, valid)
            meant = f", did you mean '{hint}'?" if hint is not None else "."
            lines.append(f"unknown setting '{field}'{meant} Valid: {', '.join(valid)}")
        elif detail["type"] == "value_error":
            lines.append(str(detail["ctx"]["error"]))
        else:
            lines.append(f"{field}: {detail['msg']}, got {detail['input']!r}")
    return "frame sampling: " + "; ".join(lines) + "."
