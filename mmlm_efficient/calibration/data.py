"""Pictures and questions to calibrate on: a folder, a list in a file, or pocket's own scenes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.media import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
QUESTION = "Describe the image."
# A folder may bring its questions in a file of this name.
QUESTIONS_FILE = "questions.jsonl"
# Scenes that pocket's split "calibration" is drawn from.
POCKET_SCENES = 1000


@dataclass(frozen=True)
class Sample:
    """One prompt to calibrate on.

    Attributes:
        name: what it is called in messages and logs.
        question: in words.
        source: path of the picture, or the number of a scene of pocket.
    """

    name: str
    question: str
    source: Path | int

    def image(self) -> Image.Image:
        """The picture, RGB."""
        if isinstance(self.source, Path):
            return load_image(self.source)
        from mmlm_efficient.pocket.scenes import scene

        return load_image(scene("calibration", self.source).image)


def find_samples(source: str | os.PathLike[str], count: int, seed: int = 0) -> list[Sample]:
    """Draw samples.

    Args:
        source: a folder of pictures (with a ``questions.jsonl`` of its own, or one question for
            all), a ``.jsonl`` file of {"image": path, "question": text} lines, or "pocket" for
            scenes that pocket is neither trained nor evaluated on.
        count: samples to draw, without repetition; all of them if there are fewer.
        seed: of the draw.

    Raises:
        SettingsError: nothing there, fewer than two pictures, or a damaged list; it says where.

    Example:
        >>> [sample.name for sample in find_samples("pocket", 2)]
        ['scene 864', 'scene 394']
    """
    if count < 2:
        raise SettingsError(f"samples: {count} is too few, at least 2 are needed")
    if os.fspath(source) == "pocket":
        numbers = random.Random(seed).sample(range(POCKET_SCENES), min(count, POCKET_SCENES))
        return [_pocket(number) for number in numbers]
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        listed = path / QUESTIONS_FILE
        found = list(_listed(listed)) if listed.is_file() else _folder(path)
    elif path.is_file():
        found = list(_listed(path))
    else:
        raise SettingsError(
            f"data: {os.fspath(source)!r} is neither a folder nor a file. Give a folder of "
            "pictures, a .jsonl file of images and questions, or 'pocket'."
        )
    if len(found) < 2:
        raise SettingsError(
            f"data: {path} holds {len(found)} picture(s) ({', '.join(SUFFIXES)}), but calibration "
            "needs at least 2, better 30. Put pictures like those that the model will see there."
        )
    return random.Random(seed).sample(found, min(count, len(found)))


def _pocket(number: int) -> Sample:
    """A scene with one of its questions."""
    from mmlm_efficient.pocket.questions import questions
    from mmlm_efficient.pocket.scenes import rng_of, scene

    rng = rng_of("calibration", number, 1)
    asked = questions(scene("calibration", number), rng)
    return Sample(f"scene {number}", asked[int(rng.integers(len(asked)))].text, number)


def _folder(folder: Path) -> list[Sample]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    return [Sample(file.name, QUESTION, file) for file in files]


def _listed(file: Path) -> Iterator[Sample]:
    """The lines of a list of images and questions."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"data: {file} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"data: {file}, line {number}"
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{where}: is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise SettingsError(
                f'{where}: expected {{"image": "path.png", "question": "..."}}, got {line:.80}'
            )
        question = entry.get("question", QUESTION)
        picture = file.parent / entry["image"]
        if not isinstance(question, str) or not question.strip():
            raise SettingsError(f"{where}: the question must be a text that is not empty")
        if not picture.is_file():
            raise SettingsError(f"{where}: there is no picture {picture}")
        yield Sample(entry["image"], question, picture)
