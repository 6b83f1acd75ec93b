"""The message that lmms-eval would write of a row, and its media once they are loaded."""

from __future__ import annotations

import base64
import contextlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.messages import is_picture
from eval.task import Sample
from mmlm_efficient.errors import DataError, MediaError
from mmlm_efficient.media import load_image

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")
_VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
_MEDIA = frozenset((*_IMAGES, *_SOUNDS, *_VIDEOS))
# What the longest name of a file may have; texts that are no path are often longer.
_MOST_NAME_CHARS = 255
_DATA = re.compile(r"data:[\w/.+-]*;base64,")


def user_turn(text: str, visuals: Any, where: str) -> list[dict[str, Any]]:
    """One turn of the user: all media, then the text, as lmms-eval's chat tasks do it.

    Args:
        text: the question.
        visuals: None or a list of pictures (Pillow, array, bytes, {"bytes", "path"}), of paths (of
            a picture if they end like one, else of a video), of pictures in base64, with
            "data:...;base64," before it or without, and of {"type", "url"}.
        where: file and line, for messages.

    Raises:
        DataError: no list, or something else in it.
        MediaError: "data:...;base64," stands before what is not base64.

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
    if isinstance(value, str):
        value = _stored(value, where)
        if isinstance(value, bytes):
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


def _stored(text: str, where: str) -> str | bytes:
    """The picture that a text holds in base64, or the text."""
    found = _DATA.match(text)
    body = text[found.end() :] if found else text
    try:
        # Enough to know a picture; no path begins so.
        if not found and not is_picture(base64.b64decode(body[:16], validate=True)):
            return text
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        if not found:
            return text
        raise MediaError(
            f"{where}: {text[:40]!r}... is not base64 ({error}). Write the picture anew, or give "
            "the path of a file."
        ) from error


def with_media(sample: Sample, folder: Path, where: str) -> Sample:
    """The sample with its pictures loaded, and its video's path from this folder.

    Args:
        sample: with pictures as `load_image` takes them.
        folder: that relative paths start from.
        where: file and line, for messages.

    Raises:
        MediaError: a picture cannot be read, or a long text is no path of a file.
    """
    for source in (*sample.images, sample.video):
        if isinstance(source, str) and len(source) > _MOST_NAME_CHARS:
            _check_path(source, folder, where)
    try:
        images = tuple(load_image(_located(one, folder)) for one in sample.images)
    except MediaError as error:
        raise MediaError(f"{where}: {error}") from error
    return replace(sample, images=images, video=_located(sample.video, folder))


def _check_path(text: str, folder: Path, where: str) -> None:
    """Refuse a text of many characters that names no file, without repeating all of it."""
    with contextlib.suppress(OSError, ValueError):  # a name too long, a null byte
        os.stat(_located(text, folder))
        return
    raise MediaError(
        f"{where}: a text of {len(text):,} characters ({text[:40]!r}...) is neither the path of a "
        "file nor a picture in base64 (PNG, JPEG, GIF, BMP, TIFF or WebP). Give one of them."
    )


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
    if isinstance(source, str | os.PathLike) and "://" not in str(source):
        return os.path.join(folder, os.path.expanduser(source))
    return source
