"""Scenes: exact labels, reproducible, splits apart."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket import NAMES, scene, video
from mmlm_efficient.pocket.objects import ASSETS, OBJECTS, sprite
from mmlm_efficient.pocket.scenes import (
    BINS,
    IMAGE_PX,
    PATCH_PX,
    background,
    cutout,
    patch_labels,
    rng_of,
)


def test_objects_are_nameable_and_shipped_with_their_licence() -> None:
    assert 64 <= len(NAMES) <= 96
    assert len(set(NAMES)) == len(NAMES)
    for kind in OBJECTS:
        assert kind.name.isalpha()
        assert kind.plural.isalpha()
        assert kind.name != kind.plural
        assert sprite(kind.name).shape == (96, 96, 4)
    assert "MIT License" in (ASSETS / "LICENSE").read_text()
    with pytest.raises(KeyError, match="known objects: dog"):
        sprite("zebra")


def test_same_seed_same_pixels_and_splits_never_meet() -> None:
    assert np.array_equal(scene("heldout", 5).pixels, scene("heldout", 5).pixels)
    digests = {
        split: {hashlib.sha1(scene(split, k).pixels.tobytes()).digest() for k in range(60)}
        for split in ("train", "heldout", "calibration")
    }
    assert all(len(found) == 60 for found in digests.values())
    assert not digests["train"] & digests["heldout"]
    assert not digests["train"] & digests["calibration"]


def test_labels_say_what_was_drawn() -> None:
    """The mask marks exactly the pixels where the picture differs from its background."""
    for index in range(30):
        item = scene("train", index)
        union = np.zeros((IMAGE_PX, IMAGE_PX), bool)
        for thing in item.objects:
            assert not (union & thing.mask).any(), "objects overlap"
            union |= thing.mask
            x0, y0, x1, y1 = thing.box_px
            ys, xs = np.nonzero(thing.mask)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)
            assert all(0 <= b < BINS for b in thing.bins)
        owner, coverage = patch_labels(item)
        cells = union.reshape(12, PATCH_PX, 12, PATCH_PX).mean((1, 3)).ravel()
        assert ((owner >= 0) == (cells > 0)).all()
        assert (coverage <= cells + 1e-6).all()


def test_objects_are_small_and_backgrounds_busy() -> None:
    shares = [sum(o.mask.sum() for o in scene("train", k).objects) / IMAGE_PX**2 for k in range(80)]
    assert 0.03 < np.mean(shares) < 0.2
    assert np.mean([background(rng_of("train", k)).std() for k in range(20)]) > 20


def test_pixels_outside_objects_are_background() -> None:
    item = scene("heldout", 11)
    rng = rng_of("heldout", 11)
    from mmlm_efficient.pocket.scenes import draw_names

    draw_names(rng)
    empty = background(rng)
    # the soft rim of an object reaches a little beyond its mask
    import cv2

    union = np.any([o.mask for o in item.objects], axis=0).astype(np.uint8)
    far = cv2.dilate(union, np.ones((7, 7), np.uint8)) == 0
    assert np.array_equal(item.pixels[far], empty[far])
    assert (item.pixels[union > 0] != empty[union > 0]).any(-1).mean() > 0.95


def test_number_of_objects() -> None:
    assert len(scene("train", 3, n_objects=1).objects) == 1
    counts = [len(scene("train", k).objects) for k in range(100)]
    assert min(counts) == 1
    assert max(counts) == 6


def test_video_times_and_appearances() -> None:
    for index in range(20):
        item = video("heldout", index)
        assert 2 <= len(item.frames) <= 8
        assert all(b > a for a, b in zip(item.times_s, item.times_s[1:], strict=False))
        for name, times in item.appearances().items():
            for frame, time_s in zip(item.frames, item.times_s, strict=True):
                assert (frame.count(name) > 0) == (time_s in times)
    assert video("train", 1, times_s=[0, 4, 9]).times_s == (0, 4, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene("test", 0), "use one of train, heldout, calibration"),
        (lambda: scene("train", -1), "must be 0 or more"),
        (lambda: scene("train", 0, n_objects=7), r"outside 1\.\.6"),
        (lambda: video("train", 0, times_s=[3]), "2 or more strictly increasing"),
        (lambda: video("train", 0, times_s=[3, 3]), "2 or more strictly increasing"),
        (lambda: cutout("train", 0, 50), "multiple of 16"),
    ],
)
def test_wrong_arguments(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SettingsError, match=message):
        call()
