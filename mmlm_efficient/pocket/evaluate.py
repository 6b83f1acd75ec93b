"""Held-out accuracy of pocket on videos: frames pooled 2 x 2, each preceded by its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmlm_efficient.pocket.questions import Question, is_right, video_questions
from mmlm_efficient.pocket.scenes import GRID, VideoScene, rng_of, video
from mmlm_efficient.pocket.train_words import pool_patches

POOLED_TOKENS = (GRID // 2) ** 2
_QUESTION_KEY = 9


def video_prompt(item: VideoScene, question: str, processor: Any) -> str:
    """Prompt of a question about a video, with one placeholder per pooled token."""
    content: list[dict[str, str]] = []
    for time_s in item.times_s:
        content += [{"type": "text", "text": f"{time_s} s"}, {"type": "image"}]
    content.append({"type": "text", "text": question})
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = processor.image_token
    return prompt.replace(image, image * POOLED_TOKENS)


@torch.no_grad()
def answer_videos(
    model: Any, processor: Any, asked: list[tuple[VideoScene, Question]]
) -> list[str]:
    """Answers of a batch of questions about videos, greedy.

    Args:
        model: pocket, a stock `LlavaForConditionalGeneration`.
        processor: its processor.
        asked: pairs of video and question.
    """
    prompts = [video_prompt(item, question.text, processor) for item, question in asked]
    inputs = processor.tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    frames = [frame.image for item, _ in asked for frame in item.frames]
    pixels = processor.image_processor(images=frames, return_tensors="pt")["pixel_values"]
    features = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    pooled = BaseModelOutputWithPooling(pooler_output=list(pool_patches(features)))  # type: ignore[arg-type]
    output = model.generate(
        **inputs, mm_encoder_outputs={"image": pooled}, max_new_tokens=8, do_sample=False
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in processor.batch_decode(new, skip_special_tokens=True)]


def evaluate_videos(
    model: Any, processor: Any, *, videos: int = 300, batch_size: int = 12
) -> dict[str, tuple[int, int]]:
    """Right answers and answers of each video kind on held-out videos, all pooled tokens kept."""
    counts: dict[str, tuple[int, int]] = {}
    batches = list(_batches(videos, batch_size))
    for batch in tqdm(batches, desc="videos", mininterval=2):
        for (_, question), said in zip(batch, answer_videos(model, processor, batch), strict=True):
            right, total = counts.get(question.kind, (0, 0))
            counts[question.kind] = right + is_right(question, said), total + 1
    return counts


def _batches(videos: int, size: int) -> Iterator[list[tuple[VideoScene, Question]]]:
    asked = []
    for index in range(videos):
        item = video("heldout", index)
        rng: np.random.Generator = rng_of("heldout", index, _QUESTION_KEY)
        asked += [(item, question) for question in video_questions(item, rng)]
    for start in range(0, len(asked), size):
        yield asked[start : start + size]
