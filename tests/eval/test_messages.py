"""Chat messages and generation settings of lmms-eval, as samples."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from eval.engine import Engine
from eval.messages import DEFAULT_MAX_NEW_TOKENS, generation_of, sample_of_messages
from eval.task import Sample
from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import SettingsError, UnsupportedError

A = {"type": "image", "url": "a.png"}
B = {"type": "image", "url": "b.png"}
CLIP = {"type": "video", "url": "c.mp4"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def sample(*content: Any) -> Sample:
    return sample_of_messages("7", [{"role": "user", "content": list(content)}], {}, ("\n",))


@pytest.mark.parametrize(
    ("content", "question", "images", "video"),
    [
        ((text("Why?"),), "Why?", (), None),
        ((A, text("Why?")), "Why?", ("a.png",), None),
        ((A, B, text("Why?"), text(" Because?")), "Why? Because?", ("a.png", "b.png"), None),
        ((text("One:"), A, text("two:"), B), "One:<image>two:<image>", ("a.png", "b.png"), None),
        ((A, text("Why?"), B), "<image>Why?<image>", ("a.png", "b.png"), None),
        ((A, CLIP, text("Why?")), "Why?", ("a.png",), "c.mp4"),
        ((CLIP, A, text("Why?")), "<video><image>Why?", ("a.png",), "c.mp4"),
        ((text("Why?"), CLIP), "Why?<video>", (), "c.mp4"),
        # Marks in the text that are places by the convention of LLaVA ...
        ((A, text("See <image>.")), "See <image>.", ("a.png",), None),
        ((A, B, text("<image>, <image>?")), "<image>, <image>?", ("a.png", "b.png"), None),
        ((A, CLIP, text("<video>, <image>?")), "<video>, <image>?", ("a.png",), "c.mp4"),
        # ... and marks that are only words.
        ((text("What is <image>?"),), "What is [image]?", (), None),
        ((A, B, text("Not <image> both")), "Not [image] both", ("a.png", "b.png"), None),
        ((A, text("<image> or <image>")), "[image] or [image]", ("a.png",), None),
        ((A, text("<image> or <video>")), "[image] or [video]", ("a.png",), None),
        (
            (text("<image>:"), A, text("<ima"), text("ge>?")),
            "[image]:<image>[image]?",
            ("a.png",),
            None,
        ),
    ],
)
def test_places_of_media(
    content: tuple[Any, ...], question: str, images: tuple[str, ...], video: str | None
) -> None:
    found = sample(*content)
    assert (found.question, found.images, found.video) == (question, images, video)
    assert (found.id, found.until) == ("7", ("\n",))


def test_content_may_be_a_text_or_hold_texts() -> None:
    assert sample_of_messages("0", [{"role": "user", "content": "Why?"}], {}).question == "Why?"
    assert sample(A, "Why?").question == "Why?"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ({"bytes": b"png", "path": "a.png"}, b"png"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "a.png", "video_start": None}, "a.png"),
    ],
)
def test_media_in_mappings(url: dict[str, Any], expected: Any) -> None:
    assert sample({"type": "image", "url": url}, text("Why?")).images == (expected,)


@pytest.mark.parametrize(
    ("head", "picture"),
    [
        (b"\x89PNG\r\n", True),
        (b"\xff\xd8\xff\xe0", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", True),
        (b"RIFF\0\0\0\0AVI LIST", False),
        (b"\0\0\0\x20ftypisom", False),
    ],
)
def test_bytes_of_a_picture_are_no_video(head: bytes, picture: bool) -> None:
    found = sample({"type": "video", "url": {"bytes": head, "path": None}}, text("Why?"))
    assert (found.images, found.video) == (((head,), None) if picture else ((), head))


def test_pictures_are_passed_as_they_are() -> None:
    picture = Image.new("RGB", (4, 4))
    assert sample({"type": "image", "url": picture}, text("Why?")).images[0] is picture


USER = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "Be kind."}, USER], "turns of system, user.*one turn"),
        ([USER, {"role": "assistant", "content": "So."}, USER], "turns of user, assistant, user"),
        ([], "expected a list of turns"),
        (None, "expected a list of turns, got None"),
        (["Why?"], "turns of None"),
        ([{"role": "user", "content": 3}], "content is 3"),
    ],
)
def test_turns_that_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        sample_of_messages("0", messages, {})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, "sound. Supported: one turn of the user"),
        ({"type": "image", "image": "a.png"}, "content {'type': 'image', 'image'"),
        ({"type": "text", "text": None}, "content {'type': 'text'"),
        ({"type": "video", "url": {"url": "c.mp4", "video_start": 2.0}}, "video_start=2.0 asks"),
        ({"type": "video", "url": "c.mp4", "end_time": 2.0}, "end_time=2.0 asks for a part"),
        ({"type": "image", "url": {"hash": "1"}}, "media given by hash. Supported: bytes"),
    ],
)
def test_content_that_is_refused(item: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        sample(item, text("Why?"))


def test_two_videos_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="2 videos in one question"):
        sample(CLIP, CLIP, text("Why?"))


def test_words_like_marks_leave_every_picture_in_the_prompt(lmm: EfficientLMM) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    images = [{"type": "image", "url": picture}] * 2
    generation = {"max_new_tokens": 2}
    plain, marked = (
        sample_of_messages(words, [{"role": "user", "content": [*images, text(words)]}], generation)
        for words in ("what is this", "what is <image> this")
    )
    first, second = Engine(lmm).answer([plain, marked], ())
    assert first.error is None
    assert second.error is None
    assert len(second.images) == 2
    assert second.usage["visual_tokens_in"] == first.usage["visual_tokens_in"] > 0


GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("given", "generation", "until"),
    [
        (None, {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **GREEDY}, ()),
        # The most frequent settings of lmms-eval's own tasks.
        (
            {
                "max_new_tokens": 16,
                "temperature": 0.0,
                "top_p": 1.0,
                "num_beams": 1,
                "do_sample": False,
                "until": ["\n\n"],
            },
            {"max_new_tokens": 16, "num_beams": 1, **GREEDY},
            ("\n\n",),
        ),
        (
            {"max_new_tokens": 8, "do_sample": False, "temperature": 0.7, "top_p": 0.9},
            {"max_new_tokens": 8, **GREEDY},
            (),
        ),
        (
            {"max_new_tokens": 8, "temperature": 0.2, "top_p": 0.9},
            {"max_new_tokens": 8, "do_sample": True, "temperature": 0.2, "top_p": 0.9},
            (),
        ),
        ({"max_new_tokens": 8, "do_sample": True}, {"max_new_tokens": 8, "do_sample": True}, ()),
        (
            {"max_new_tokens": 8, "temperature": "0.5"},
            {"max_new_tokens": 8, "do_sample": True, "temperature": 0.5},
            (),
        ),
        (
            {"max_new_tokens": 8, "temperature": "0", "do_sample": True},
            {"max_new_tokens": 8, **GREEDY},
            (),
        ),
        (
            {"max_new_tokens": 8, "do_sample": True, "temperature": 0},
            {"max_new_tokens": 8, **GREEDY},
            (),
        ),
        (
            {"max_new_tokens": 8, "do_sample": True, "temperature": 1.0, "top_p": 0},
            {"max_new_tokens": 8, **GREEDY},
            (),
        ),
        (
            {
                "max_new_tokens": 8,
                "num_beams": None,
                "temperature": "None",
                "seed": 3,
                "image_aspect_ratio": "pad",
            },
            {"max_new_tokens": 8, **GREEDY},
            (),
        ),
        (
            {"max_new_tokens": 8, "until": "Q:", "stop_sequences": ["\n", ""]},
            {"max_new_tokens": 8, **GREEDY},
            ("Q:", "\n"),
        ),
        ({"max_new_tokens": 8, "until": None}, {"max_new_tokens": 8, **GREEDY}, ()),
        (
            {"max_new_tokens": 8, "repetition_penalty": 1.2},
            {"max_new_tokens": 8, "repetition_penalty": 1.2, **GREEDY},
            (),
        ),
    ],
)
def test_generation_settings(
    given: dict[str, Any] | None, generation: dict[str, Any], until: tuple[str, ...]
) -> None:
    assert generation_of(given) == (generation, until)


def test_the_task_decides_before_defaults() -> None:
    defaults = {"max_new_tokens": 32, "num_beams": 2}
    assert generation_of({"max_new_tokens": 8}, defaults)[0]["max_new_tokens"] == 8
    assert generation_of({}, defaults)[0] == {"max_new_tokens": 32, "num_beams": 2, **GREEDY}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_sampel": True}, "'do_sampel' is unknown. Did you mean 'do_sample'"),
        ({"max_new_token": 8}, "'max_new_token' is unknown. Did you mean 'max_new_tokens'"),
        ({"skip_special_tokens": False}, "'skip_special_tokens' is unknown"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
        ({"num_beams": 0}, "num_beams must be a whole number >= 1"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"do_sample": True, "top_p": 3}, "top_p must be a number above 0 and at most 1"),
        (
            {"do_sample": True, "temperature": "hot"},
            "temperature must be a number, 0 or above, got",
        ),
        ({"temperature": "hot"}, "temperature must be a number, 0 or above, got 'hot'"),
        ({"temperature": -0.5}, "temperature must be a number, 0 or above, got -0.5"),
        ({"temperature": "-1", "do_sample": False}, "temperature must be a number, 0 or above"),
        ({"temperature": "nan"}, "temperature must be a number, 0 or above, got 'nan'"),
        ({"temperature": True}, "temperature must be a number, 0 or above, got True"),
        ({"temperature": [1]}, "temperature must be a number, 0 or above"),
        ({"until": 3}, "until: expected a text or a list of texts, got 3"),
        ({"max_length": 100}, "max_length: cannot be used here"),
    ],
)
def test_generation_settings_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        generation_of(given)
