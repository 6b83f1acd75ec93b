"""Video files of many kinds, made with PyAV, whose frames show their own number."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

WIDTH, HEIGHT, BLOCK = 128, 48, 8


def drawn(number: int) -> np.ndarray[Any, Any]:
    """A picture that shows a number as 16 bits: red blocks for ones on blue."""
    bits = (number >> np.arange(WIDTH // BLOCK)) & 1
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[..., 0] = np.repeat(bits * 255, BLOCK)
    picture[..., 2] = np.repeat((1 - bits) * 255, BLOCK)
    return picture


def shown(frame: Image.Image) -> int:
    """The number that a picture shows."""
    middles = np.asarray(frame).astype(int)[HEIGHT // 2, BLOCK // 2 :: BLOCK]
    bits = middles[:, 0] > middles[:, 2]
    return int((bits << np.arange(bits.size)).sum())


def noisy(count: int) -> list[np.ndarray[Any, Any]]:
    """Frames that grow brighter, of which none compresses well."""
    rng = np.random.default_rng(0)
    return [rng.integers(n, n + 60, (90, 160, 3), dtype=np.uint8) for n in range(0, 2 * count, 2)]


def film(
    form: str = "mp4",
    codec: str = "libx264",
    pictures: Iterable[np.ndarray[Any, Any]] | int = 50,
    *,
    options: Mapping[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    pts: Iterable[int] | None = None,
    fps: int = 10,
    file: str | None = None,
    container_options: dict[str, str] | None = None,
    **stream: Any,
) -> bytes:
    """A video of frames; `pts` are in frames of the rate, `stream` sets attributes of the codec."""
    frames = [drawn(n) for n in range(pictures)] if isinstance(pictures, int) else list(pictures)
    target = io.BytesIO() if file is None else file
    with av.open(target, "w", format=form, container_options=container_options) as container:
        out = container.add_stream(codec, rate=fps, options=dict(options or {}))
        out.height, out.width = frames[0].shape[:2]
        out.pix_fmt = pix_fmt
        for name, value in stream.items():
            setattr(out.codec_context, name, value)
        for when, pixels in zip(pts or range(len(frames)), frames, strict=True):
            frame = VideoFrame.from_ndarray(pixels, "rgb24" if pixels.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = when, Fraction(1, fps)
            container.mux(out.encode(frame))
        container.mux(out.encode(None))
    return b"" if file is not None else target.getvalue()
