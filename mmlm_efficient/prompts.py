"""From questions, pictures and videos to the processor's output."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from mmlm_efficient.errors import PromptError, SettingsError, UnsupportedError
from mmlm_efficient.families.base import Family, Kind
from mmlm_efficient.families.frames import FrameProcessor
from mmlm_efficient.media import ImageSource, load_images
from mmlm_efficient.video.reader import Video, VideoSource, load_video
from mmlm_efficient.video.sampling import FrameSampling

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
Videos: TypeAlias = "VideoSource | Video | None"

# What stands for a video in a question to a model whose vocabulary has no token for it.
VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class Request:
    """One question of a batch.

    Attributes:
        question: in words.
        image: no, one or several images; see `load_image`.
        video: a path, the bytes of a file, a list of frames, or a `Video`; see `load_video`.

    Example:
        >>> Request("What is in the picture?").image is None
        True
    """

    question: str
    image: Images = None
    video: Videos = None


AnyRequest: TypeAlias = "Request | tuple[str, Images]"


def as_request(value: AnyRequest, position: int = 0) -> Request:
    """A request from a pair of question and images, or as it is.

    Raises:
        PromptError: neither of them.
    """
    if isinstance(value, Request):
        return value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise PromptError(
            f"requests[{position}]: expected a pair (question, images) or a Request, got "
            f"{value!r:.80}. Write (question, None) without images, and Request(question, "
            "video=...) for a video."
        )
    return Request(*value)


def with_video(request: Request, family: Family, sampling: FrameSampling | None) -> Request:
    """The request with its video loaded, if it has one.

    Raises:
        MediaError: it cannot be read.
        SettingsError: the sampling is none.
        UnsupportedError: there are images too, and the model takes frames as images.
    """
    if not isinstance(sampling, FrameSampling | None):
        raise SettingsError(
            f"sampling: expected a FrameSampling, got {sampling!r:.80}. Write "
            "FrameSampling(frames=16), for example."
        )
    if request.video is None:
        return request
    if "video" not in family.placeholders and load_images(request.image):
        raise UnsupportedError(
            f"image and video: the model family '{family.name}' takes the frames of a video as "
            "images, which could not be told from the others. Give one of them."
        )
    if isinstance(request.video, Video):
        return request
    return replace(request, video=load_video(request.video, sampling or default_sampling(family)))


def video_share(requests: Sequence[Request], input_ids: Tensor, family: Family) -> str:
    """How much of a prompt that is too long its video is, in words; empty without a video.

    Args:
        requests: with their videos loaded.
        input_ids: int64 [B, S] of the unpruned prompts.
        family: of the model.
    """
    tokens = family.placeholders
    counts = (input_ids == tokens.get("video", tokens["image"])).sum(dim=1).tolist()
    shares = [
        (count, len(request.video.frames))
        for request, count in zip(requests, counts, strict=True)
        if isinstance(request.video, Video)
    ]
    if not shares:
        return ""
    count, frames = max(shares)
    fitting = min(frames - 1, frames * family.max_context // input_ids.shape[1])
    return (
        f". The video's {frames} frames make {count} visual tokens before pruning: take fewer with "
        f"sampling=FrameSampling(frames={max(1, fitting)}), for example"
    )


def default_sampling(family: Family) -> FrameSampling:
    """What frames of a video file a family takes when the request does not say."""
    return FrameSampling(frames=family.usual_frames)


@dataclass(frozen=True)
class _Shown:
    """What one request shows, loaded.

    Attributes:
        images: the pictures; where the model takes videos as pictures, the frames.
        video: for the model's input for videos, or None.
        frames: pictures that are the frames of a video.
    """

    images: list[Image.Image]
    video: Video | None = None
    frames: int = 0


def preprocess(
    processor: Any,
    requests: Sequence[AnyRequest],
    dtype: torch.dtype,
    family: Family | None = None,
    sampling: FrameSampling | None = None,
) -> Mapping[str, Any]:
    """Load the pictures and videos and write the prompts of a batch.

    Args:
        processor: processor of transformers with a chat template.
        requests: pairs of question and images, or `Request`.
        dtype: of the pixel values.
        family: of the model; needed for videos.
        sampling: which frames of video files to take; None is the family's own.

    Returns:
        input_ids and attention_mask [B, S], padded on the left because generation continues at
        the right; the pixel values of images, then of videos, each in prompt order, and what
        else the processor gives beside them.

    Raises:
        PromptError, MediaError, UnsupportedError: as `EfficientLMM.ask`.
    """
    asked = [as_request(one, position) for position, one in enumerate(requests)]
    frames = None if family is None else family.frame_processor(processor)
    shown = [_shown(one, family, frames, sampling) for one in asked]
    prompts = [
        write_prompt(processor, one.question, len(own.images), own.video is not None, own.frames)
        for one, own in zip(asked, shown, strict=True)
    ]
    begin = processor.tokenizer.bos_token
    videos = [own.video for own in shown if own.video is not None]
    if videos:
        # The caller's processor stays as it is.
        processor = copy.copy(processor)
        processor.video_processor = frames
    inputs = processor(
        text=prompts,
        # By prompt: some processors show pictures that are alone in a prompt differently.
        images=[own.images for own in shown if own.images] or None,
        **_video_arguments(videos),
        padding=True,
        padding_side="left",
        # Some templates write the begin token themselves.
        add_special_tokens=not (begin and prompts[0].startswith(begin)),
        return_tensors="pt",
    )
    # Seconds stay float32: positions are computed from them.
    return {
        name: value.to(dtype)
        if isinstance(value, Tensor) and name.startswith("pixel_values")
        else value
        for name, value in cast("Mapping[str, Any]", inputs).items()
    }


def _shown(
    request: Request,
    family: Family | None,
    frames: FrameProcessor | None,
    sampling: FrameSampling | None,
) -> _Shown:
    if request.video is None:
        return _Shown(load_images(request.image))
    if family is None:
        raise PromptError("video: the family of the model must be given with it.")
    video = cast("Video", with_video(request, family, sampling).video)
    if frames is None:
        return _Shown(video.frames, frames=len(video.frames))
    return _Shown(load_images(request.image), video)


def _video_arguments(videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor takes about videos; nothing without any, as some do not know them."""
    if not videos:
        return {}
    return {
        "videos": [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos],
        "video_metadata": [
            VideoMetadata(
                total_num_frames=video.n_frames,
                fps=video.fps,
                frames_indices=list(video.indices),
            )
            for video in videos
        ],
    }


def write_prompt(
    processor: Any, question: str, n_images: int, video: bool = False, n_frames: int = 0
) -> str:
    """The question in the model's chat template, with one token per image and video.

    Args:
        processor: processor of transformers.
        question: in words; image and video tokens in it say where the images and the video go,
            otherwise they go first.
        n_images: images of this question, frames that are shown as images among them.
        video: whether a video goes with it.
        n_frames: of the images, those that stand for a video: all of them or none.

    Raises:
        PromptError: no text, empty, another number of tokens than images and videos, or a
            processor without chat template.
    """
    if not isinstance(question, str):
        raise PromptError(f"question: expected a text, got {type(question).__name__}.")
    tokens: dict[str, Kind] = {processor.image_token: "image"}
    token = getattr(processor, "video_token", None)
    if token is not None or n_frames:
        tokens[token or VIDEO_TOKEN] = "video"
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", question)
    if not any(part.strip() for part in parts[::2]):
        raise PromptError("question: is empty. Say what you want to know.")
    counts: dict[Kind, int] = {
        "image": n_images - n_frames,
        "video": int(video or n_frames > 0),
    }
    if len(parts) == 1:
        first = [name for name, kind in tokens.items() for _ in range(counts[kind])]
        parts = [part for name in first for part in ("", name)] + parts
    for name, kind in tokens.items():
        found = parts[1::2].count(name)
        if found != counts[kind]:
            raise PromptError(
                f"question: holds {found} {name}, but {counts[kind]} {kind}(s) were given. Write "
                f"one {name} per {kind}, or none at all to put the {kind}s first."
            )
    content: list[dict[str, str]] = []
    for part in parts:
        shown = tokens.get(part)
        if shown == "video" and n_frames:
            content.extend([{"type": "image"}] * n_frames)
        elif shown is not None:
            content.append({"type": shown})
        elif part.strip():
            content.append({"type": "text", "text": part})
    return _rendered(processor, content, video)


def _rendered_by_tokenizer(processor: Any, content: list[dict[str, str]]) -> str:
    """A message of the user in the tokenizer's chat template, where the processor has none.

    It may be one of a text model, which knows no pictures: it gets their tokens as words.
    """
    tokenizer, token = processor.tokenizer, processor.image_token
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            "neither the model's processor nor its tokenizer has a chat template. Set "
            "processor.chat_template, or write the prompt yourself and use generate()."
        )
    words = [part.get("text", token) for part in content]
    for form in (content, "\n".join(words)):
        conversation = [{"role": "user", "content": form}]
        with contextlib.suppress(TypeError, ValueError, jinja2.TemplateError):
            prompt: str = tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            printed = form is content and str(content)[1:-1] in prompt
            if prompt.count(token) == words.count(token) and not printed:
                return prompt
    raise PromptError(
        "the model's processor has no chat template, and the tokenizer's shows no images. Set "
        "processor.chat_template, or write the prompt yourself and use generate()."
    )


def _rendered(processor: Any, content: list[dict[str, str]], video: bool) -> str:
    """A message of the user in the chat template."""
    if getattr(processor, "chat_template", None) is None:
        if video:
            raise PromptError(
                "the model's processor has no chat template; the tokenizer's, if it has one, knows "
                "no videos. Set processor.chat_template, or use generate()."
            )
        return _rendered_by_tokenizer(processor, content)

    def render(parts: list[dict[str, str]]) -> str:
        conversation = [{"role": "user", "content": parts}]
        return cast("str", processor.apply_chat_template(conversation, add_generation_prompt=True))

    prompt = render(content)
    if not video or prompt.count(processor.video_token) == 1:
        return prompt
    # A template that knows no videos: they stand where, and as, an image would.
    as_images = [{"type": "image"} if part["type"] == "video" else part for part in content]
    kinds = [part["type"] for part in content if part["type"] != "text"]
    pieces = render(as_images).split(processor.image_token)
    if len(pieces) != len(kinds) + 1:
        raise PromptError(
            "the chat template of the model's processor shows neither videos nor images. Set "
            "processor.chat_template, or write the prompt yourself and use generate()."
        )
    names = {"image": processor.image_token, "video": processor.video_token}
    shown = zip(kinds, pieces[1:], strict=True)
    return pieces[0] + "".join(names[kind] + piece for kind, piece in shown)
