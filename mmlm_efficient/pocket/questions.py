"""Questions about scenes and videos, with their only right answers, in several phrasings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket.objects import NAMES, PLURALS
from mmlm_efficient.pocket.scenes import (
    BIN_PX,
    BINS,
    GRID,
    IMAGE_PX,
    PATCH_PX,
    Scene,
    VideoScene,
    spoken,
)

IMAGE_KINDS = (
    "is_there",
    "how_many",
    "where_is",
    "what_is_at",
    "extreme",
    "relation",
    "list",
)
VIDEO_KINDS = ("video_presence", "video_time", "video_order")
KINDS = IMAGE_KINDS + VIDEO_KINDS

_CLEAR_PX = 10.0  # two objects closer than this along an axis are not compared

PHRASINGS: dict[str, tuple[str, ...]] = {
    "is_there": (
        "is there {a} {name}?",
        "is there {a} {name} in the picture?",
        "do you see {a} {name}?",
        "can you see {a} {name} in the image?",
        "does the picture show {a} {name}?",
    ),
    "how_many": (
        "how many {names} are there?",
        "how many {names} are in the picture?",
        "how many {names} do you see?",
        "count the {names}.",
    ),
    "where_is": (
        "where is the {name}?",
        "where is the {name} in the picture?",
        "what is the position of the {name}?",
        "locate the {name}.",
        "point to the {name}.",
    ),
    "what_is_at": (
        "what is at {x}, {y}?",
        "what do you see at {x}, {y}?",
        "which object is at {x}, {y}?",
        "name the object at {x}, {y}.",
    ),
    "leftmost": (
        "what is the leftmost object?",
        "which object is furthest to the left?",
        "what is on the far left?",
    ),
    "rightmost": (
        "what is the rightmost object?",
        "which object is furthest to the right?",
        "what is on the far right?",
    ),
    "top": (
        "what is the top object?",
        "which object is furthest to the top?",
        "what is at the very top?",
    ),
    "bottom": (
        "what is the bottom object?",
        "which object is furthest to the bottom?",
        "what is at the very bottom?",
    ),
    "side": (
        "is the {name} {side} the {other}?",
        "is the {name} {side} the {other} in the picture?",
    ),
    "choice": ("is the {name} {one} or {two} the {other}?",),
    "list": (
        "what is in the picture?",
        "list all objects.",
        "which objects do you see?",
        "describe the picture.",
        "name everything you see.",
    ),
    "video_presence": (
        "does {a} {name} appear?",
        "is there {a} {name} in the video?",
        "do you see {a} {name} in any frame?",
    ),
    "video_time": (
        "when does the {name} appear?",
        "when does the {name} first appear?",
        "at what time do you first see the {name}?",
    ),
    "video_order": (
        "which appears first, the {name} or the {other}?",
        "what comes first, the {name} or the {other}?",
    ),
}


@dataclass(frozen=True)
class Thing:
    """What a question needs to know of an object: its name and centre (pixels)."""

    name: str
    x_px: float
    y_px: float
    size_px: float

    @property
    def bins(self) -> tuple[int, int]:
        """Position as it is spoken."""
        return spoken(self.x_px, self.y_px)

    @property
    def patch(self) -> int:
        """Raster index of the patch that holds the centre."""
        return int(self.y_px) // PATCH_PX * GRID + int(self.x_px) // PATCH_PX


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        kind: one of `KINDS`.
        text: the question, lower case.
        answer: the answer as pocket says it.
        order: of a list, the things that the answer names: indices into the scene's objects.
    """

    kind: str
    text: str
    answer: str
    order: tuple[int, ...] = ()


def things_of(scene: Scene) -> list[Thing]:
    """The scene's objects as facts."""
    return [Thing(o.name, *o.center_px, o.size_px) for o in scene.objects]


def questions(
    scene: Scene, rng: np.random.Generator, *, kinds: Sequence[str] = IMAGE_KINDS
) -> list[Question]:
    """One question of each kind that the scene allows.

    Args:
        scene: the picture.
        rng: draws objects and phrasings.
        kinds: subset of `IMAGE_KINDS`.

    Raises:
        SettingsError: unknown kind.

    Example:
        >>> from mmlm_efficient.pocket.scenes import scene
        >>> [q.kind for q in questions(scene("heldout", 3), np.random.default_rng(0))][:2]
        ['is_there', 'how_many']
    """
    things = things_of(scene)
    asked = (ask(kind, things, rng) for kind in kinds)
    return [question for question in asked if question is not None]


def video_questions(video: VideoScene, rng: np.random.Generator) -> list[Question]:
    """One question of each video kind that the video allows."""
    seen = video.appearances()
    asked = (ask_video(kind, seen, rng) for kind in VIDEO_KINDS)
    return [question for question in asked if question is not None]


def ask(kind: str, things: list[Thing], rng: np.random.Generator) -> Question | None:
    """A question of one image kind about these objects; None if they do not allow it."""
    if kind not in _ASKERS:
        raise SettingsError(f"kind={kind!r} is unknown; use some of {', '.join(IMAGE_KINDS)}")
    return _ASKERS[kind](things, rng)


def ask_video(kind: str, seen: dict[str, list[int]], rng: np.random.Generator) -> Question | None:
    """A question of one video kind; `seen` maps names to the seconds at which they are seen."""
    if kind not in VIDEO_KINDS:
        raise SettingsError(f"kind={kind!r} is unknown; use some of {', '.join(VIDEO_KINDS)}")
    names = sorted(seen)
    if kind == "video_presence":
        there = bool(names) and rng.random() < 0.5
        name = _pick(names, rng) if there else _absent(seen, rng)
        return _say(kind, kind, "yes" if there else "no", rng, name=name)
    if kind == "video_time":
        if not names:
            return None
        name = _pick(names, rng)
        return _say(kind, kind, f"{seen[name][0]} s", rng, name=name)
    pairs = [(a, b) for a in names for b in names if seen[a][0] < seen[b][0]]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    shown = (first, second) if rng.random() < 0.5 else (second, first)
    return _say(kind, kind, first, rng, name=shown[0], other=shown[1])


def is_right(question: Question, said: str) -> bool:
    """Whether an answer counts as right.

    Positions may be off by one bin on each axis; lists are compared as multisets, in any order;
    everything else must be equal but for case and surrounding blanks.
    """
    said = said.strip().lower().rstrip(".")
    if question.kind == "where_is":
        told, true = _numbers(said), _numbers(question.answer)
        return len(told) == 2 and all(abs(a - b) <= 1 for a, b in zip(told, true, strict=True))
    if question.kind == "list":
        parts = [part.strip() for part in said.split(",")]
        return Counter(parts) == Counter(question.answer.split(", "))
    return said == question.answer


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts if part.isdigit()]


def _pick(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]


def _absent(present: object, rng: np.random.Generator) -> str:
    """A name that is not among the present ones."""
    known = set(present)  # type: ignore[call-overload]
    while (name := _pick(NAMES, rng)) in known:
        continue
    return name


def _say(
    kind: str, phrase: str, answer: str, rng: np.random.Generator, **words: object
) -> Question:
    """Fill one of the phrasings."""
    name = words.get("name")
    if isinstance(name, str):
        words["names"] = PLURALS[name]
        words["a"] = "an" if name[0] in "aeio" or name.startswith("um") else "a"
    return Question(kind, _pick(PHRASINGS[phrase], rng).format(**words), answer)


def unique(things: list[Thing]) -> list[Thing]:
    """The things whose name occurs once."""
    counts = Counter(thing.name for thing in things)
    return [thing for thing in things if counts[thing.name] == 1]


def reading_order(things: Sequence[Thing]) -> list[int]:
    """Indices of the things in the order in which lists name them: by patch of the centre."""
    return sorted(range(len(things)), key=lambda k: (things[k].patch, things[k].x_px))


def _is_there(things: list[Thing], rng: np.random.Generator) -> Question:
    present = sorted({thing.name for thing in things})
    there = bool(present) and rng.random() < 0.5
    name = _pick(present, rng) if there else _absent(present, rng)
    return _say("is_there", "is_there", "yes" if there else "no", rng, name=name)


def _how_many(things: list[Thing], rng: np.random.Generator) -> Question:
    counts = Counter(thing.name for thing in things)
    repeated = [name for name, count in sorted(counts.items()) if count > 1]
    draw = rng.random()
    if repeated and draw < 0.6:
        name = _pick(repeated, rng)
    elif counts and draw < 0.85:
        name = _pick(sorted(counts), rng)
    else:
        name = _absent(counts, rng)
    return _say("how_many", "how_many", str(counts[name]), rng, name=name)


def _where_is(things: list[Thing], rng: np.random.Generator) -> Question | None:
    candidates = unique(things)
    if not candidates:
        return None
    thing = candidates[int(rng.integers(len(candidates)))]
    x, y = thing.bins
    return _say("where_is", "where_is", f"{x}, {y}", rng, name=thing.name)


def _what_is_at(things: list[Thing], rng: np.random.Generator) -> Question | None:
    if not things or rng.random() < 0.1:
        for _ in range(50):
            px, py = rng.uniform(0, IMAGE_PX, size=2)
            if all(max(abs(px - t.x_px), abs(py - t.y_px)) > t.size_px / 2 + 18 for t in things):
                spot = {"x": int(px / BIN_PX), "y": int(py / BIN_PX)}
                return _say("what_is_at", "what_is_at", "nothing", rng, **spot)
        return None
    thing = things[int(rng.integers(len(things)))]
    x, y = (int(np.clip(b + rng.integers(-1, 2), 0, BINS - 1)) for b in thing.bins)
    return _say("what_is_at", "what_is_at", thing.name, rng, x=x, y=y)


def _extreme(things: list[Thing], rng: np.random.Generator) -> Question | None:
    which = ("leftmost", "rightmost", "top", "bottom")[int(rng.integers(4))]
    sign = -1 if which in ("rightmost", "bottom") else 1
    keyed = sorted(
        (sign * (t.x_px if which in ("leftmost", "rightmost") else t.y_px), t.name) for t in things
    )
    if not keyed or (len(keyed) > 1 and keyed[1][0] - keyed[0][0] < _CLEAR_PX):
        return None
    return _say("extreme", which, keyed[0][1], rng)


def _relation(things: list[Thing], rng: np.random.Generator) -> Question | None:
    candidates = unique(things)
    rng.shuffle(candidates)
    if len(candidates) < 2:
        return None
    one, other = candidates[:2]
    dx, dy = one.x_px - other.x_px, one.y_px - other.y_px
    axes = [axis for axis, gap in (("x", dx), ("y", dy)) if abs(gap) >= _CLEAR_PX]
    if not axes:
        return None
    axis = _pick(axes, rng)
    sides = ("left of", "right of") if axis == "x" else ("above", "below")
    true = sides[0] if (dx if axis == "x" else dy) < 0 else sides[1]
    words = {"name": one.name, "other": other.name}
    if rng.random() < 0.4:
        first, second = sides if rng.random() < 0.5 else sides[::-1]
        short = true.removesuffix(" of")
        return _say(
            "relation", "choice", short, rng, one=first.removesuffix(" of"), two=second, **words
        )
    side = _pick(sides, rng)
    answer = "yes" if side == true else "no"
    return _say("relation", "side", answer, rng, side=side, **words)


def _list(things: list[Thing], rng: np.random.Generator) -> Question | None:
    if not things:
        return None
    order = reading_order(things)
    said = _say("list", "list", ", ".join(things[k].name for k in order), rng)
    return replace(said, order=tuple(order))


_ASKERS = {
    "is_there": _is_there,
    "how_many": _how_many,
    "where_is": _where_is,
    "what_is_at": _what_is_at,
    "extreme": _extreme,
    "relation": _relation,
    "list": _list,
}
