"""Small video files for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.tiny_processor import picture


def pictures(count: int, size: tuple[int, int] = (56, 40)) -> list[Image.Image]:
    """Frames of (width, height) pixels with large shapes, each another."""
    return [picture(seed, (8, 8)).resize(size, Image.Resampling.NEAREST) for seed in range(count)]


def write_clip(path: Path, count: int, fps: float = 10.0) -> Path:
    """A video file of some frames."""
    frames = pictures(count)
    code = cv2.VideoWriter_fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), code, fps, frames[0].size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2BGR))
    writer.release()
    return path
