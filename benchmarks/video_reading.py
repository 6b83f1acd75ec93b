"""What reading a long film costs: `load_video` beside OpenCV, which goes through every frame.

    python -m benchmarks.video_reading --out docs/results/video_reading.json

Both take the same frames of the same film. OpenCV's way is the usual one: grab every frame, turn
the picked ones into RGB. Every figure is of a fresh process.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from av.video.frame import VideoFrame
from PIL import Image, ImageChops, ImageStat
from tqdm import tqdm

from benchmarks.common import in_fresh_process, interleaved, json_file, positive, ratio, summary
from mmlm_efficient.files import write_json
from mmlm_efficient.machine import machine_line, peak_resident_bytes, provenance
from mmlm_efficient.video import FrameSampling, load_video

WIDTH, HEIGHT, FPS = 640, 360, 25
MIB = 1024**2
WAYS = ("load_video", "opencv")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _parser().parse_args(argv)
    result = measure(options)
    print("\n".join(report(result)))
    if options.out is not None:
        write_json(options.out, result)
        print(f"written: {options.out}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the film, then read it both ways, in turns."""
    n_frames = round(options.minutes * 60 * FPS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        make_film(path, n_frames)
        cases = [
            _compared(path, sampling, name, options.repeats)
            for count in options.frames
            for name, sampling in samplings(count, n_frames).items()
        ]
        difference = _difference(path, FrameSampling(frames=min(options.frames)))
        film_bytes = path.stat().st_size
    return {
        "benchmark": "video_reading",
        **provenance(torch.device("cpu")),
        "film": {
            "frames": n_frames,
            "fps": FPS,
            "width_px": WIDTH,
            "height_px": HEIGHT,
            "codec": "h264, B-frames, a keyframe at least every 250 frames",
            "bytes": film_bytes,
        },
        "largest_mean_difference": round(difference, 3),
        "cases": cases,
    }


def samplings(count: int, n_frames: int) -> dict[str, FrameSampling]:
    """Both ways to pick this many frames: spread evenly, and by rate with a cap."""
    # A rate that would take more than the cap allows.
    rate = max(1.0, 2 * count * FPS / n_frames)
    return {
        "uniform": FrameSampling(frames=count),
        "fps": FrameSampling(mode="fps", base_fps=rate, max_frames=count),
    }


def make_film(path: Path, n_frames: int) -> None:
    """A pattern that moves, with grain, and changes to another one every ten seconds."""
    rng = np.random.default_rng(0)
    grain = rng.integers(0, 12, (8, HEIGHT, WIDTH), dtype=np.uint8)
    pixels = np.empty((HEIGHT * 3 // 2, WIDTH), np.uint8)  # planes of yuv420p below each other
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", FPS, {"preset": "ultrafast", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in tqdm(range(n_frames), desc="film", leave=False, disable=None):
            if index % (10 * FPS) == 0:
                blocks = rng.integers(30, 220, (HEIGHT // 20, WIDTH // 10), dtype=np.uint8)
                scene = blocks.repeat(20, axis=0).repeat(20, axis=1)
                pixels[HEIGHT:] = rng.integers(90, 166, (HEIGHT // 20, 1)).repeat(10, axis=0)
            shift = 2 * index % WIDTH
            np.add(scene[:, shift : shift + WIDTH], grain[index % 8], out=pixels[:HEIGHT])
            frame = VideoFrame.from_ndarray(pixels, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def by_opencv(path: Path, sampling: FrameSampling) -> list[Image.Image]:
    """The picked frames, every frame grabbed."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    picked = set(sampling.indices(int(count), fps))
    frames, index = [], 0
    while capture.grab():
        if index in picked:
            frames.append(Image.fromarray(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)))
        index += 1
    capture.release()
    return frames


def read(way: str, path: Path, sampling: FrameSampling) -> list[Image.Image]:
    """The picked frames."""
    return load_video(path, sampling).frames if way == "load_video" else by_opencv(path, sampling)


def _cost(way: str, path: Path, sampling: FrameSampling) -> dict[str, float]:
    """Seconds and bytes; nan where the system does not tell the bytes."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        read(way, path, sampling)
        seconds = time.perf_counter() - start

    peak = peak_resident_bytes(timed)
    return {"seconds": seconds, "bytes": math.nan if peak is None else peak}


def _difference(path: Path, sampling: FrameSampling) -> float:
    """Largest mean difference of a frame between both ways, of 255."""
    pairs = zip(*(read(way, path, sampling) for way in WAYS), strict=True)
    return max(ImageStat.Stat(ImageChops.difference(*pair)).mean[0] for pair in pairs)


def _compared(path: Path, sampling: FrameSampling, name: str, repeats: int) -> dict[str, Any]:
    cases = {way: functools.partial(in_fresh_process, _cost, way, path, sampling) for way in WAYS}
    rounds = interleaved(cases, repeats, warmup=0, label=name)
    seconds, peaks = (
        {way: [one[kind] for one in rounds[way]] for way in WAYS} for kind in ("seconds", "bytes")
    )
    ours, theirs = (statistics.median(peaks[way]) for way in WAYS)
    count = sampling.frames if sampling.mode == "uniform" else sampling.max_frames
    return {
        "sampling": name,
        "frames": count,
        "seconds": {way: summary(seconds[way]) for way in WAYS},
        "seconds_to_opencv": ratio(seconds["load_video"], seconds["opencv"]),
        "peak_resident_bytes": {"load_video": ours, "opencv": theirs},
        "peak_to_opencv": round(ours / theirs, 4),
    }


def report(result: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    film = result["film"]
    lines = [f"{film['frames']:,} frames, {film['bytes'] / MIB:.0f} MiB, {machine_line(result)}"]
    for case in result["cases"]:
        ours, theirs = (case["seconds"][way]["median_s"] for way in WAYS)
        lines.append(
            f"  {case['frames']} frames, {case['sampling']}: {ours:.2f} s, OpenCV {theirs:.2f} s "
            f"({case['seconds_to_opencv']['of_medians']:.2f}x); peak memory "
            f"{case['peak_to_opencv']:.2f}x"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmlm bench video_reading",
        description="Seconds and memory of reading frames of a long film, beside OpenCV.",
        epilog="example: mmlm bench video_reading --out outputs/video_reading.json",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=json_file, help="JSON file to write")
    parser.add_argument("--minutes", type=float, default=30, help="length of the film; default 30")
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=[8, 64, 512], help="default 8 64 512"
    )
    parser.add_argument("--repeats", type=positive, default=3, help="rounds; default 3")
    return parser


if __name__ == "__main__":
    sys.exit(main())
