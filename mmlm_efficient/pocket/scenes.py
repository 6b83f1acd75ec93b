"""Scenes with exact labels: emoji objects at random places over busy backgrounds.

Everything is drawn from a seed made of (split, index), so a scene is reproducible and the
splits never meet: `scene("heldout", 7)` is the same picture on every machine and is never
composed while training, which learns from the split "train" and logs its progress on
"calibration".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket.objects import NAMES, sprite

Split = Literal["train", "heldout", "calibration"]
SPLITS: dict[str, int] = {"train": 0, "heldout": 1, "calibration": 2}

IMAGE_PX = 192
PATCH_PX = 16
GRID = IMAGE_PX // PATCH_PX
MIN_OBJECT_PX, MAX_OBJECT_PX = 28, 48
MAX_OBJECTS = 6
BINS = 32  # positions are spoken as two whole numbers from 0 to 31
BIN_PX = IMAGE_PX / BINS

_VIDEO_KEY, _CUTOUT_KEY = 1, 2  # keep the seeds of videos and cut-outs apart from pictures'


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object in a picture.

    Attributes:
        name: one of `objects.NAMES`.
        box_px: (x0, y0, x1, y1) of the visible pixels, x1 and y1 exclusive, in pixels.
        mask: bool [IMAGE_PX, IMAGE_PX], True where the object is drawn.
        size_px: side of the square that the emoji was drawn into.
        angle_deg: counter-clockwise rotation.
    """

    name: str
    box_px: tuple[int, int, int, int]
    mask: npt.NDArray[np.bool_]
    size_px: int
    angle_deg: float

    @property
    def center_px(self) -> tuple[float, float]:
        """Centre (x, y) of the box, in pixels."""
        x0, y0, x1, y1 = self.box_px
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def bins(self) -> tuple[int, int]:
        """Centre as the two numbers of the spoken position, each in [0, BINS)."""
        return spoken(*self.center_px)


def spoken(x_px: float, y_px: float) -> tuple[int, int]:
    """The two numbers in [0, BINS) by which a place in the picture is spoken of."""
    return min(int(x_px / BIN_PX), BINS - 1), min(int(y_px / BIN_PX), BINS - 1)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and everything that is true about it.

    Attributes:
        pixels: uint8 RGB [IMAGE_PX, IMAGE_PX, 3].
        objects: the objects, in drawing order (they do not overlap).
        split, index: what `scene` was called with.
    """

    pixels: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    split: str
    index: int

    @property
    def image(self) -> Image.Image:
        """The picture as a Pillow image (RGB)."""
        return Image.fromarray(self.pixels)

    def count(self, name: str) -> int:
        """How many objects carry this name."""
        return sum(o.name == name for o in self.objects)

    def unique(self) -> list[SceneObject]:
        """The objects whose name occurs once."""
        return [o for o in self.objects if self.count(o.name) == 1]


@dataclass(frozen=True, eq=False)
class VideoScene:
    """A few frames over one background, objects coming and going.

    Attributes:
        frames: one `Scene` per frame.
        times_s: whole seconds of the frames, strictly increasing.
        split, index: what `video` was called with.
    """

    frames: tuple[Scene, ...]
    times_s: tuple[int, ...]
    split: str
    index: int

    def appearances(self) -> dict[str, list[int]]:
        """Times (seconds) at which each object is seen, by name."""
        seen: dict[str, list[int]] = {}
        for frame, time_s in zip(self.frames, self.times_s, strict=True):
            for name in {o.name for o in frame.objects}:
                seen.setdefault(name, []).append(time_s)
        return seen


def rng_of(split: str, index: int, *more: int) -> np.random.Generator:
    """Random generator of one scene; different splits never share a seed.

    Raises:
        SettingsError: unknown split or negative index.
    """
    if split not in SPLITS:
        raise SettingsError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if index < 0:
        raise SettingsError(f"index={index} must be 0 or more")
    return np.random.default_rng([SPLITS[split], index, *more])


def scene(
    split: str, index: int, *, n_objects: int | None = None, repeat_share: float = 0.35
) -> Scene:
    """Compose one picture.

    Args:
        split: "train", "heldout" or "calibration".
        index: number of the scene inside the split, 0 or more.
        n_objects: how many objects, 1 to 6; None draws it.
        repeat_share: share of the scenes in which one name occurs several times.

    Returns:
        The scene; the same arguments give the same pixels.

    Raises:
        SettingsError: unknown split, negative index, n_objects outside 1..6.

    Example:
        >>> s = scene("heldout", 0)
        >>> s.pixels.shape
        (192, 192, 3)
    """
    if n_objects is not None and not 1 <= n_objects <= MAX_OBJECTS:
        raise SettingsError(f"n_objects={n_objects} is outside 1..{MAX_OBJECTS}")
    rng = rng_of(split, index)
    names = draw_names(rng, n_objects, repeat_share=repeat_share)
    pixels = background(rng)
    return Scene(pixels, _place(pixels, names, rng), split, index)


def cutout(split: str, index: int, side_px: int = IMAGE_PX // 2) -> Scene:
    """Compose a small square picture with one or two objects, for training the tower cheaply.

    Args:
        split, index: as in `scene`.
        side_px: side of the square, a multiple of the patch size up to the image size.
    """
    if not MAX_OBJECT_PX <= side_px <= IMAGE_PX or side_px % PATCH_PX:
        raise SettingsError(f"side_px={side_px} must be a multiple of 16 from 48 to {IMAGE_PX}")
    rng = rng_of(split, index, _CUTOUT_KEY)
    names = draw_names(rng, int(rng.integers(1, 4)))
    pixels = background(rng, side_px)
    return Scene(pixels, _place(pixels, names, rng), split, index)


def draw_names(
    rng: np.random.Generator, n_objects: int | None = None, *, repeat_share: float = 0.35
) -> list[str]:
    """Names of the objects of one scene; some scenes hold one name two to four times."""
    wanted = int(rng.integers(1, MAX_OBJECTS + 1)) if n_objects is None else n_objects
    names = [NAMES[i] for i in rng.choice(len(NAMES), size=wanted, replace=False)]
    if wanted > 1 and rng.random() < repeat_share:
        copies = int(rng.integers(2, min(wanted, 4) + 1))
        names[:copies] = [names[0]] * copies
    return names


def video(
    split: str, index: int, *, n_frames: int | None = None, times_s: Sequence[int] | None = None
) -> VideoScene:
    """Compose a short sequence of frames, each object seen for a stretch of them.

    Args:
        split, index: as in `scene`.
        n_frames: 2 to 8; None draws it. Ignored when `times_s` is given.
        times_s: the frames' times in whole seconds, strictly increasing.

    Raises:
        SettingsError: fewer than 2 frames, or times that do not increase.
    """
    rng = rng_of(split, index, _VIDEO_KEY)
    names, spans, times = draw_timeline(rng, n_frames, times_s)
    canvas = background(rng)
    frames = []
    for number in range(len(times)):
        pixels = canvas.copy()
        shown = [n for n, (start, end) in zip(names, spans, strict=True) if start <= number < end]
        frames.append(Scene(pixels, _place(pixels, shown, rng), split, index))
    return VideoScene(tuple(frames), tuple(times), split, index)


def draw_timeline(
    rng: np.random.Generator, n_frames: int | None = None, times_s: Sequence[int] | None = None
) -> tuple[list[str], list[list[int]], list[int]]:
    """Names of a video's objects, the [first, last) frame of each, and the frames' seconds."""
    if times_s is None:
        count = int(rng.integers(2, 9)) if n_frames is None else n_frames
        steps = rng.integers(1, 6, size=max(count, 0))
        times = [int(t) for t in np.cumsum(steps) - steps[:1]]
    else:
        times = [int(t) for t in times_s]
    if len(times) < 2 or any(b <= a for a, b in itertools.pairwise(times)):
        raise SettingsError(f"a video needs 2 or more strictly increasing times, got {times}")
    names = [NAMES[i] for i in rng.choice(len(NAMES), size=int(rng.integers(2, 5)), replace=False)]
    ends = range(len(times) + 1)
    spans = [sorted(int(v) for v in rng.choice(ends, size=2, replace=False)) for _ in names]
    return names, spans, times


def patch_labels(scene: Scene) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Which object covers each patch.

    Returns:
        owner: int64 [patches], index into `scene.objects`, -1 = none.
        coverage: float32 [patches], share of the patch covered by the owner, 0..1.
    """
    grid = scene.pixels.shape[0] // PATCH_PX
    if not scene.objects:
        return np.full(grid * grid, -1), np.zeros(grid * grid, np.float32)
    masks = np.stack([o.mask for o in scene.objects]).astype(np.float32)
    cells = masks.reshape(len(masks), grid, PATCH_PX, grid, PATCH_PX).mean((2, 4))
    cells = cells.reshape(len(masks), -1)
    owner = cells.argmax(0)
    coverage = cells.max(0)
    owner[coverage == 0] = -1
    return owner, coverage


def background(rng: np.random.Generator, side_px: int = IMAGE_PX) -> npt.NDArray[np.uint8]:
    """A busy picture without objects: colour clouds, stripes, blobs and grain, uint8 RGB."""
    side = int(rng.integers(2, 7))
    tint = rng.integers(60, 200, size=3)
    clouds = (0.4 * tint + 0.6 * rng.integers(30, 236, size=(side, side, 3))).astype(np.uint8)
    pixels: npt.NDArray[np.uint8] = np.asarray(
        cv2.resize(clouds, (side_px, side_px), interpolation=cv2.INTER_LINEAR), np.uint8
    )
    for _ in range(int(rng.integers(4, 14)) * side_px // IMAGE_PX):
        _scribble(pixels, rng)
    grain = _grain()[int(rng.integers(len(_grain())))][:side_px, :side_px]
    strength = int(rng.integers(0, 3))  # amplitude 4, 8 or 16 of 255
    return np.asarray(cv2.add(pixels, grain >> (5 - strength), dtype=cv2.CV_8U), np.uint8)


def _scribble(pixels: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Draw one random ellipse, line or triangle, never shaped like an object."""
    x, y, a, b = (int(v) for v in rng.integers(0, pixels.shape[0], size=4))
    colour = tuple(int(v) for v in rng.integers(20, 256, size=3))
    kind = int(rng.integers(4))
    if kind == 0:
        axes = (4 + a // 12, 4 + b // 12)
        cv2.ellipse(pixels, (x, y), axes, int(rng.integers(180)), 0, 360, colour, -1, cv2.LINE_AA)
    elif kind == 1:
        cv2.line(pixels, (x, y), (a, b), colour, int(rng.integers(1, 6)), cv2.LINE_AA)
    elif kind == 2:
        corners = rng.integers(-20, 21, size=(3, 2)) + np.array([x, y])
        cv2.fillPoly(pixels, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    else:
        cv2.circle(pixels, (x, y), 5 + a // 10, colour, int(rng.integers(1, 4)), cv2.LINE_AA)


@cache
def _grain() -> npt.NDArray[np.int16]:
    """A fixed stock of noise fields, int16 [16, IMAGE_PX, IMAGE_PX, 3] (drawing them is slow)."""
    rng = np.random.default_rng(20)
    grey = rng.integers(-128, 128, size=(16, IMAGE_PX, IMAGE_PX, 1)).astype(np.int16)
    return np.repeat(grey, 3, axis=-1)


def arrange(
    names: list[str], side_px: int, rng: np.random.Generator
) -> list[tuple[str, float, float, int]]:
    """Find room for the named objects in a square picture.

    Returns:
        (name, left, top, size), in pixels, of squares that do not overlap; a name for which
        there is no room left is dropped.
    """
    placed: list[tuple[str, float, float, int]] = []
    for name in names:
        size = int(rng.integers(MIN_OBJECT_PX, MAX_OBJECT_PX + 1))
        for attempt in range(200):
            if attempt % 40 == 39:  # crowded picture: a smaller object finds room
                size = max(MIN_OBJECT_PX, size - 6)
            x, y = (float(v) for v in rng.uniform(0, side_px - size, size=2))
            if all(
                x >= left + other or left >= x + size or y >= top + other or top >= y + size
                for _, left, top, other in placed
            ):
                placed.append((name, x, y, size))
                break
    return placed


def _place(
    pixels: npt.NDArray[np.uint8], names: list[str], rng: np.random.Generator
) -> tuple[SceneObject, ...]:
    """Draw the named objects into `pixels` without overlap; returns them with their labels."""
    return tuple(
        _draw(pixels, name, int(x), int(y), size, float(rng.uniform(-25, 25)))
        for name, x, y, size in arrange(names, pixels.shape[0], rng)
    )


def _draw(
    pixels: npt.NDArray[np.uint8], name: str, x: int, y: int, size: int, angle_deg: float
) -> SceneObject:
    """Blend one emoji into `pixels` at (x, y), rotated inside its square."""
    premultiplied = _premultiplied(name)
    source = premultiplied.shape[0]
    # rotated corners must stay inside the square, hence the shrink
    turn = cv2.getRotationMatrix2D((source / 2, source / 2), angle_deg, 0.94 * size / source)
    turn[:, 2] += size / 2 - source / 2
    if size < source / 2:  # bilinear sampling alone would alias
        premultiplied = np.asarray(cv2.blur(premultiplied, (3, 3)), np.float32)
    patch = cv2.warpAffine(premultiplied, turn, (size, size), flags=cv2.INTER_LINEAR)
    window = pixels[y : y + size, x : x + size]
    alpha = patch[..., 3:]
    window[:] = np.clip(window * (1 - alpha) + patch[..., :3], 0, 255).astype(np.uint8)
    mask = np.zeros(pixels.shape[:2], np.bool_)
    mask[y : y + size, x : x + size] = alpha[..., 0] > 0.5
    ys, xs = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    return SceneObject(name, box, mask, size, angle_deg)


@cache
def _premultiplied(name: str) -> npt.NDArray[np.float32]:
    """Sprite as float32 [96, 96, 4]: colours times alpha (0..255) and alpha (0..1)."""
    rgba = sprite(name).astype(np.float32)
    alpha = rgba[..., 3:] / 255
    return np.ascontiguousarray(np.concatenate([rgba[..., :3] * alpha, alpha], axis=-1))
