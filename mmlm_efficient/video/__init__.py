"""Videos in: which frames to take, and reading them from a file as a stream."""

from __future__ import annotations

from mmlm_efficient.video.reader import Video, VideoSource, load_video
from mmlm_efficient.video.sampling import FrameSampling, fps_sample, uniform_sample

__all__ = [
    "FrameSampling",
    "Video",
    "VideoSource",
    "fps_sample",
    "load_video",
    "uniform_sample",
]
