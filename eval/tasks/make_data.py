"""Writes the data of the bundled tasks; the same on every machine.

    python -m eval.tasks.make_data

The pictures are composed from the numbers of their scenes when they are asked about, so that
only questions and answers are stored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmlm_efficient.files import write_text
from mmlm_efficient.pocket.questions import Question, questions, video_questions
from mmlm_efficient.pocket.scenes import rng_of, scene, video

SPLIT = "heldout"
SCENES = 1000
VIDEOS = 100

# Keep these questions apart from those of other evaluations.
_SCENE_KEY = 8
_VIDEO_KEY = 9

Row = Mapping[str, "str | int"]


def pocket_vqa() -> Iterator[Row]:
    """Up to seven questions about each of the first held-out scenes, scene by scene.

    Example:
        >>> next(pocket_vqa())["id"]
        '0000-is_there'
    """
    for index in range(SCENES):
        asked = questions(scene(SPLIT, index), rng_of(SPLIT, index, _SCENE_KEY))
        yield from (_row("scene", index, 4, question) for question in asked)


def pocket_video() -> Iterator[Row]:
    """Up to three questions about each of the first held-out videos, video by video."""
    for index in range(VIDEOS):
        asked = video_questions(video(SPLIT, index), rng_of(SPLIT, index, _VIDEO_KEY))
        yield from (_row("video", index, 3, question) for question in asked)


def _row(shown: str, index: int, digits: int, question: Question) -> Row:
    return {
        "id": f"{index:0{digits}d}-{question.kind}",
        shown: index,
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
    }


def as_jsonl(rows: Iterator[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def data_files() -> dict[Path, str]:
    """What belongs into each data file."""
    folder = Path(__file__).parent
    return {
        folder / "mmlm_pocket_vqa" / "data.jsonl": as_jsonl(pocket_vqa()),
        folder / "mmlm_pocket_video" / "data.jsonl": as_jsonl(pocket_video()),
    }


def main() -> int:
    """Write all data files; returns 0."""
    for path, text in data_files().items():
        write_text(path, text)
        sys.stdout.write(f"{path}: {text.count(chr(10)):,} questions\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
