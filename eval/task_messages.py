"""The message that lmms-eval would write of a row, and its media once they are loaded."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.task import Sample
from mmlm_efficient.errors import DataError, MediaError
from mmlm_efficient.media import LONG_PATH, load_image

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")
_VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
_MEDIA = frozenset((*_IMAGES, *_SOUNDS, *_VIDEOS))


def user_turn(text: str, visuals: Any, where: str) -> list[dict[str, Any]]:
    """One turn of the user: all media, then the text, as lmms-eval's chat tasks do it.

    Args:
        text: the question.
        visuals: None or a list of pictures (Pillow, array, bytes, {"bytes", "path"}), of paths (of
            a picture if they end like one, else of a video), and of {"type", "url"}.
        where: file and line, for messages.

    Raises:
        DataError: no list, or something else in it.

    Example:
        >>> user_turn("Why?", ["a.png"], "row 1")[0]["content"][0]
        {'type': 'image', 'url': 'a.png'}
    """
    if visuals is None:
        visuals = []
    if isinstance(visuals, str | bytes | Mapping) or not isinstance(visuals, Sequence):
        raise DataError(
            f"{where}: doc_to_visual must give a list of pictures or videos, it gave a "
            f"{type(visuals).__name__}."
        )
    content = [_medium(one, where) for one in visuals]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _medium(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, Image.Image | np.ndarray | bytes):
        return {"type": "image", "url": value}
    if isinstance(value, str | os.PathLike):
        ending = Path(value).suffix.lower()
        kind = "image" if ending in _IMAGES else "audio" if ending in _SOUNDS else "video"
        return {"type": kind, "url": os.fspath(value)}
    if isinstance(value, Mapping) and value:
        if value.keys() <= {"bytes", "path"}:
            return {"type": "image", "url": value}
        parts = "video_start" in value or "video_end" in value
        url = value if parts else value.get("url") or value.get("path")
        return {"type": value.get("type", "video"), "url": url}
    raise DataError(
        f"{where}: cannot show a {type(value).__name__}. Give a picture, its bytes, or the path of "
        "a picture or video."
    )


def with_media(sample: Sample, folder: Path, where: str) -> Sample:
    """The sample with its pictures loaded, and its video's path from this folder.

    Args:
        sample: with pictures as `load_image` takes them.
        folder: that relative paths start from.
        where: file and line, for messages.

    Raises:
        MediaError: a picture cannot be read.
    """
    try:
        images = tuple(load_image(_located(one, folder)) for one in sample.images)
    except MediaError as error:
        raise MediaError(f"{where}: {error}") from error
    return replace(sample, images=images, video=_located(sample.video, folder))


def media_sizes(texts: Iterable[str], folder: Path) -> list[tuple[str, int]]:
    """The texts that name pictures, sounds or videos which exist, and their sizes.

    Args:
        texts: some of them paths.
        folder: that relative paths start from.

    Returns:
        Path as written and bytes, sorted.
    """
    found = {}
    for text in set(texts):
        if Path(text[-12:]).suffix.lower() in _MEDIA:
            with contextlib.suppress(OSError, ValueError):  # not there, or no path at all
                found[text] = os.stat(_located(text, folder)).st_size
    return sorted(found.items())


def _located(source: Any, folder: Path) -> Any:
    if isinstance(source, str | os.PathLike) and not re.match(r"data:|.*://", str(source)):
        located = os.path.join(folder, os.path.expanduser(source))
        # So long and no file: most likely a picture in base64, which the message is to show.
        return source if len(located) > LONG_PATH and not os.path.lexists(located) else located
    return source
