"""From lmms-eval's chat messages and generation settings to a sample of ours.

lmms-eval gives a question as a chat: turns with a list of texts and media. Here a sample is one
question of the user, with the marks `IMAGE` and `VIDEO` where media go. And its tasks mix settings
of generate(), texts to stop at, and notes for particular models: they are told apart here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from eval.task import IMAGE, VIDEO, Sample
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.settings import check_for_answers, check_generation

# What lmms-eval's own LLaVA adapters allow where a task sets no limit of its own.
DEFAULT_MAX_NEW_TOKENS = 1024

_MARKS = {"image": IMAGE, "video": VIDEO}
# The same words without being a mark.
_WORDS = {IMAGE: "[image]", VIDEO: "[video]"}
# How the files of pictures begin: PNG, JPEG, GIF, BMP, TIFF; WebP says so further on.
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_SUPPORTED = "Supported: one turn of the user, with texts, pictures and at most one video"

# Notes of tasks for lmms-eval itself or for other models' preprocessing; never for generate().
_NOTES = frozenset({"image_aspect_ratio", "max_agentic_steps"})
_STOPS = ("until", "stop_sequences")
# Of no use without sampling; transformers warns about them.
_SAMPLING_ONLY = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
)


class _Part(NamedTuple):
    """A piece of a message: kind is "text", "image" or "video"."""

    kind: str
    value: Any


def sample_of_messages(
    id: str,
    messages: Any,
    generation: Mapping[str, Any],
    until: Sequence[str] = (),
    *,
    target: Any = None,
    cluster: str | None = None,
) -> Sample:
    """A sample from a chat of lmms-eval.

    Where media go:
    - Media before all text go first, pictures before a video, as the model does it by itself;
      otherwise marks say where they stand between the texts. Texts next to each other are joined
      without anything in between, as chat templates do it.
    - "<image>" or "<video>" in the task's own text is a place only where it must be: all media
      come before the text, and the text holds exactly one mark for each of them (the convention
      of LLaVA). Anywhere else it is a word of the text and becomes "[image]" or "[video]", so
      that no picture lands there and none is lost.

    Args:
        id: of the sample.
        messages: [{"role": "user", "content": text or [{"type": "text", "text"}, {"type":
            "image" or "video", "url": PIL picture, path, ...}, ...]}].
        generation, until, target, cluster: see `Sample`.

    Raises:
        UnsupportedError: another role, several turns or videos, audio, or a part of a video.

    Example:
        >>> content = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "Why <image>?"}]
        >>> sample_of_messages("0", [{"role": "user", "content": content}], {}).question
        'Why <image>?'
        >>> content.append({"type": "image", "url": "b.png"})
        >>> sample_of_messages("0", [{"role": "user", "content": content}], {}).question
        '<image>Why [image]?<image>'
    """
    parts = _parts(messages)
    images = tuple(part.value for part in parts if part.kind == "image")
    videos = [part.value for part in parts if part.kind == "video"]
    if len(videos) > 1:
        raise UnsupportedError(f"messages: {len(videos)} videos in one question. {_SUPPORTED}.")
    return Sample(
        id=id,
        question=_question(parts, len(images), len(videos)),
        images=images,
        video=videos[0] if videos else None,
        target=target,
        generation=dict(generation),
        until=tuple(until),
        cluster=cluster,
    )


def _question(parts: Sequence[_Part], images: int, videos: int) -> str:
    text = "".join(part.value for part in parts if part.kind == "text")
    kinds = [part.kind for part in parts]
    first = kinds[: images + videos]
    if "text" not in first:
        if images + videos and (text.count(IMAGE), text.count(VIDEO)) == (images, videos):
            return text
        if first == ["image"] * images + ["video"] * videos:
            return _neutral(text)
    return "".join(
        _neutral(part.value) if part.kind == "text" else _MARKS[part.kind] for part in parts
    )


def _neutral(text: str) -> str:
    """A text in which nothing is a mark."""
    for mark, words in _WORDS.items():
        text = text.replace(mark, words)
    return text


def _parts(messages: Any) -> list[_Part]:
    """The pieces of the user's only turn, texts next to each other joined."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UnsupportedError(
            f"messages: expected a list of turns, got {messages!r:.80}. {_SUPPORTED}."
        )
    turns = [turn if isinstance(turn, Mapping) else {} for turn in messages]
    roles = [str(turn.get("role")) for turn in turns]
    if roles != ["user"]:
        raise UnsupportedError(f"messages: turns of {', '.join(roles)}. {_SUPPORTED}.")
    content = turns[0].get("content")
    if isinstance(content, str):
        return [_Part("text", content)]
    if not isinstance(content, list | tuple):
        raise UnsupportedError(f"messages: content is {content!r:.80}. {_SUPPORTED}.")
    parts: list[_Part] = []
    for part in map(_part, content):
        if part.kind == "text" and parts and parts[-1].kind == "text":
            parts[-1] = _Part("text", parts[-1].value + part.value)
        else:
            parts.append(part)
    return parts


def _part(item: Any) -> _Part:
    if isinstance(item, str):
        return _Part("text", item)
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return _Part("text", item["text"])
    if kind in ("image", "video") and item.get("url") is not None:
        times = {**item, **(item["url"] if isinstance(item["url"], Mapping) else {})}
        for name in ("video_start", "video_end", "start_time", "end_time"):
            if times.get(name) is not None:
                raise UnsupportedError(
                    f"messages: {name}={times[name]!r} asks for a part of a video. Cut the video "
                    "beforehand: whole videos are supported."
                )
        source = _source(item["url"])
        # What lmms-eval makes of bytes whose column is not declared as pictures.
        if kind == "video" and isinstance(source, bytes) and is_picture(source):
            kind = "image"
        return _Part(str(kind), source)
    shown = "sound" if kind == "audio" else f"content {item!r:.80}"
    raise UnsupportedError(f"messages: {shown}. {_SUPPORTED}.")


def is_picture(data: bytes) -> bool:
    """Whether bytes begin like a PNG, JPEG, GIF, BMP, TIFF or WebP."""
    return data.startswith(_PICTURES) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")


def _source(url: Any) -> Any:
    """What `load_image` or `load_video` take."""
    if not isinstance(url, Mapping):
        return url
    for name in ("bytes", "url", "path", "video", "image"):
        if url.get(name) is not None:
            return url[name]
    raise UnsupportedError(
        f"messages: media given by {', '.join(map(str, url))}. Supported: bytes, url or path."
    )


def generation_of(
    given: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments of generate() and the texts to stop at, from lmms-eval's generation_kwargs.

    Sampling: do_sample decides; without it, a temperature above 0 does, as in lmms-eval's own
    models. A temperature may be a text such as "0.5", of which lmms-eval makes a number too.
    Temperature 0 and top_p 0 leave one choice, which is greedy. Greedy answers lose what only
    sampling uses. Seeds are the run's: one in the task is not used.

    Args:
        given: of a task, with what was given on the command line.
        defaults: for what the task does not say; max_new_tokens is 1024 otherwise.

    Raises:
        SettingsError: an argument that generate() does not have or refuses.

    Example:
        >>> generation_of({"max_new_tokens": 8, "temperature": 0, "until": ["\\n"]})
        ({'max_new_tokens': 8, 'do_sample': False}, ('\\n',))
    """
    merged = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, **(defaults or {})}
    # lmms-eval leaves "None" of its command line a text.
    merged |= {name: None if value == "None" else value for name, value in (given or {}).items()}
    until = tuple(end for name in _STOPS for end in _texts(name, merged.pop(name, None)))
    found = {
        name: value
        for name, value in merged.items()
        if value is not None and name not in _NOTES and name != "seed"
    }
    if "temperature" in found:
        found["temperature"] = _temperature(found["temperature"])
    temperature = found.get("temperature")
    sampling = found.pop("do_sample", temperature is not None and temperature > 0)
    if sampling is True and (found.get("top_p") == 0 or temperature == 0):
        sampling = False
    found["do_sample"] = sampling
    check_generation(found)
    if sampling is False:
        found = {name: value for name, value in found.items() if name not in _SAMPLING_ONLY}
    check_for_answers(found, found.get("max_new_tokens"))
    return found, until


def _temperature(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise SettingsError(f"temperature must be a number, 0 or above, got {value!r:.80}.")
    return number


def _texts(name: str, value: Any) -> list[str]:
    """Texts to stop at; an empty one stops nothing."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SettingsError(f"{name}: expected a text or a list of texts, got {value!r:.80}.")
    return [text for text in texts if text]
