"""Questions: answers follow from the labels, scoring is fair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pocket import (
    KINDS,
    Question,
    is_right,
    questions,
    scene,
    video,
    video_questions,
)
from mmlm_efficient.pocket.questions import IMAGE_KINDS, VIDEO_KINDS, Thing, ask, ask_video

THINGS = [Thing("cat", 30, 100, 40), Thing("dog", 150, 40, 40), Thing("dog", 100, 160, 40)]


def _ask_often(kind: str, times: int = 200) -> list[Question]:
    rng = np.random.default_rng(0)
    found = [ask(kind, THINGS, rng) for _ in range(times)]
    return [q for q in found if q is not None]


def test_every_kind_is_asked_and_scored_right_against_itself() -> None:
    rng = np.random.default_rng(1)
    asked = [q for k in range(40) for q in questions(scene("heldout", k), rng)]
    asked += [q for k in range(40) for q in video_questions(video("heldout", k), rng)]
    assert {q.kind for q in asked} == set(KINDS) == set(IMAGE_KINDS) | set(VIDEO_KINDS)
    assert all(is_right(q, q.answer) for q in asked)


def test_yes_and_no_are_balanced() -> None:
    answers = Counter(q.answer for q in _ask_often("is_there", 600))
    assert 0.4 < answers["yes"] / 600 < 0.6


def test_answers_of_a_hand_made_scene() -> None:
    for q in _ask_often("how_many"):
        name = next((n for n in ("cat", "dog") if n in q.text or f"{n}s" in q.text), None)
        assert q.answer == {"cat": "1", "dog": "2", None: "0"}[name]
    assert {q.answer for q in _ask_often("where_is")} == {"5, 16"}  # the dog is not unique
    wanted = {"left": "cat", "right": "dog", "top": "dog", "bottom": "dog"}
    for q in _ask_often("extreme"):
        side = next(s for s in wanted if s in q.text)
        assert q.answer == wanted[side]
    assert {q.answer for q in _ask_often("list")} == {"dog, cat, dog"}  # reading order
    assert not _ask_often("relation")  # needs two unique objects


def test_relation_names_the_true_side() -> None:
    things = [Thing("cat", 30, 100, 40), Thing("owl", 150, 101, 40)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        q = ask("relation", things, rng)
        assert q is not None
        assert "above" not in q.text
        cat_first = q.text.index("cat") < q.text.index("owl")
        if " or " in q.text:
            assert q.answer == ("left" if cat_first else "right")
        else:
            assert (q.answer == "yes") == (("left" in q.text) == cat_first)


def test_video_answers() -> None:
    seen = {"cat": [3, 5], "dog": [5, 9]}
    rng = np.random.default_rng(0)
    for _ in range(50):
        order = ask_video("video_order", seen, rng)
        time = ask_video("video_time", seen, rng)
        assert order is not None
        assert order.answer == "cat"
        assert time is not None
        assert time.answer == ("3 s" if "cat" in time.text else "5 s")
    assert ask_video("video_order", {"cat": [3], "dog": [3]}, rng) is None


@pytest.mark.parametrize(
    ("kind", "answer", "said", "right"),
    [
        ("where_is", "12, 7", "13, 6", True),
        ("where_is", "12, 7", "14, 7", False),
        ("where_is", "12, 7", "12", False),
        ("where_is", "12, 7", "cat", False),
        ("list", "cat, dog, dog", "dog, cat, dog", True),
        ("list", "cat, dog, dog", "dog, cat", False),
        ("is_there", "yes", " Yes. ", True),
        ("is_there", "yes", "no", False),
        ("how_many", "2", "", False),
    ],
)
def test_scoring(kind: str, answer: str, said: str, right: bool) -> None:
    assert is_right(Question(kind, "?", answer), said) is right


def test_unknown_kind() -> None:
    with pytest.raises(SettingsError, match="is_there, how_many"):
        questions(scene("heldout", 0), np.random.default_rng(0), kinds=["colour"])
    with pytest.raises(SettingsError, match="video_time"):
        ask_video("colour", {}, np.random.default_rng(0))
