"""From questions and pictures to the processor's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from PIL import Image

from mmlm_efficient.errors import PromptError
from mmlm_efficient.media import ImageSource, load_images

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"


def preprocess(
    processor: Any, requests: Sequence[tuple[str, Images]], dtype: torch.dtype
) -> Mapping[str, Any]:
    """Load the pictures and write the prompts of a batch.

    Args:
        processor: processor of transformers with a chat template.
        requests: pairs of question and images.
        dtype: of the pixel values.

    Returns:
        input_ids and attention_mask [B, S], padded on the left because generation continues at
        the right; pixel_values [n_images, 3, H, W] in prompt order, absent without images.

    Raises:
        PromptError, MediaError: as `EfficientLMM.ask`.
    """
    pictures: list[Image.Image] = []
    prompts: list[str] = []
    for question, images in requests:
        loaded = load_images(images)
        prompts.append(write_prompt(processor, question, len(loaded)))
        pictures.extend(loaded)
    begin = processor.tokenizer.bos_token
    inputs = processor(
        text=prompts,
        images=pictures or None,
        padding=True,
        padding_side="left",
        # Some templates write the begin token themselves.
        add_special_tokens=not (begin and prompts[0].startswith(begin)),
        return_tensors="pt",
    )
    return cast("Mapping[str, Any]", inputs.to(dtype))


def write_prompt(processor: Any, question: str, n_images: int) -> str:
    """The question in the model's chat template, with one image token per image.

    Args:
        processor: processor of transformers.
        question: in words; image tokens in it say where the images go, otherwise they go first.
        n_images: images of this question.

    Raises:
        PromptError: no text, empty, another number of image tokens than images, or a processor
            without chat template.
    """
    if not isinstance(question, str):
        raise PromptError(f"question: expected a text, got {type(question).__name__}.")
    token: str = processor.image_token
    if not question.replace(token, "").strip():
        raise PromptError("question: is empty. Say what you want to know.")
    parts = question.split(token)
    if len(parts) == 1:
        parts = [""] * n_images + [question]
    elif len(parts) - 1 != n_images:
        raise PromptError(
            f"question: holds {len(parts) - 1} {token}, but {n_images} image(s) were given. Write "
            f"one {token} per image, or none at all to put the images first."
        )
    content: list[dict[str, str]] = []
    for position, part in enumerate(parts):
        if position > 0:
            content.append({"type": "image"})
        if part.strip():
            content.append({"type": "text", "text": part})
    if getattr(processor, "chat_template", None) is None:
        raise PromptError(
            "the model's processor has no chat template. Set processor.chat_template, or write "
            "the prompt yourself and use generate()."
        )
    conversation = [{"role": "user", "content": content}]
    return cast("str", processor.apply_chat_template(conversation, add_generation_prompt=True))
