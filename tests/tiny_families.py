"""Tiny random models of LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL and Qwen2.5-VL, and their inputs.

Images go through transformers' own PIL image processors and its own counts of placeholders;
videos, whose processors need torchvision, are made by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests import tiny

LLAVA = ("llava_next", "llava_onevision")
QWEN = ("qwen2_vl", "qwen2_5_vl")
FAMILIES = (*LLAVA, *QWEN)
WITH_VIDEO = ("llava_onevision", *QWEN)

PAD, BOS, EOS, IMAGE, VIDEO, BEGIN, END, UNK = range(8)
VOCAB = 97
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<video>", "<begin>", "<end>", "<unk>")
PATCH = 4
# Tiles of 6 x 6 patches, and of 5 x 5 (an odd grid, which videos pool to 3 x 3).
NEXT_SIZE, ONEVISION_SIZE = 24, 20
NEXT_GRID, ONEVISION_GRID, POOLED_GRID = 6, 5, 3
MAX_TILES = 4
SECONDS_PER_STEP = 0.5
LONG: dict[str, Any] = {"max_position_embeddings": 2048}

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


def pinpoints(side: int) -> list[list[int]]:
    """Resolutions of one to three tiles down and across."""
    return [[side * rows, side * cols] for rows in (1, 2, 3) for cols in (1, 2, 3)]


def tiny_model(family: str, attn: str = "sdpa", seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family in eval mode, float32.

    Args:
        family: one of FAMILIES.
        attn: attention implementation.
        seed: seed of the weights.
        overrides: of the config.
    """
    model_class, config = _config(family, attn, overrides)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    # Larger weights than the init gives: patches, images and words then really differ.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "position_embedding" not in name:
                weight.mul_(_scale(name))
    generation = model.generation_config
    generation.pad_token_id = PAD
    generation.eos_token_id = None
    return model


def _config(family: str, attn: str, overrides: dict[str, Any]) -> tuple[Any, Any]:
    common: dict[str, Any] = {"pad_token_id": PAD, "attn_implementation": attn, **overrides}
    if family == "llava_next":
        return LlavaNextForConditionalGeneration, LlavaNextConfig(
            vision_config=tiny.vision_config("clip", image_size=NEXT_SIZE),
            text_config=tiny.text_config("mistral", sliding_window=None, **LONG),
            image_token_index=IMAGE,
            image_grid_pinpoints=pinpoints(NEXT_SIZE),
            **common,
        )
    if family == "llava_onevision":
        return LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig(
            text_config=tiny.text_config("qwen2", **LONG),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=pinpoints(ONEVISION_SIZE),
            **{
                "vision_aspect_ratio": f"anyres_max_{MAX_TILES}",
                "vision_config": tiny.vision_config("siglip", image_size=ONEVISION_SIZE),
                **common,
            },
        )
    text = tiny.text_config("qwen2", **LONG).to_dict()
    for name in ("model_type", "layer_types", "rope_parameters", "architectures"):
        text.pop(name, None)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": [1, 1, 2],
    }
    vision: dict[str, Any] = {"depth": 6, "num_heads": 2, "patch_size": PATCH}
    common.update(
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    if family == "qwen2_vl":
        vision.update(embed_dim=16, hidden_size=32, mlp_ratio=1)
        return Qwen2VLForConditionalGeneration, Qwen2VLConfig(vision_config=vision, **common)
    vision.update(
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[2, 5],
        tokens_per_second=4,
    )
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(vision_config=vision, **common)


def _scale(name: str) -> float:
    """How much larger than its init a weight is."""
    if "embed_tokens" in name:
        return 2.0
    if "language_model" in name or "lm_head" in name:
        return 5.0
    if "visual" in name:
        return 20.0 if "qkv" in name else 10.0
    return 9.0 if "q_proj" in name or "k_proj" in name else 3.0


# -- processors ----------------------------------------------------------------------------


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: the special words, then w8, w9, ..."""
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCAB))]
    inner = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>", "<begin>", "<end>"],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


class _Onevision(LlavaOnevisionProcessor):
    """For pictures only: the video processor of transformers needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.num_image_tokens = ONEVISION_GRID**2
        self.vision_feature_select_strategy = "full"
        self.vision_aspect_ratio = f"anyres_max_{MAX_TILES}"
        _pictures_only(self, image_processor, tokenizer, chat_template)


class _Qwen2VL(Qwen2VLProcessor):
    """For pictures only, as above."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        _pictures_only(self, image_processor, tokenizer, chat_template)


class _Qwen2_5VL(Qwen2_5_VLProcessor):
    """For pictures only, as above."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        _pictures_only(self, image_processor, tokenizer, chat_template)


def _pictures_only(processor: Any, images: Any, tokenizer: Any, chat_template: str) -> None:
    processor.image_token, processor.video_token = "<image>", "<video>"
    processor.image_token_id, processor.video_token_id = IMAGE, VIDEO
    ProcessorMixin.__init__(processor, images, tokenizer, chat_template=chat_template)


def tiny_processor(family: str) -> Any:
    """transformers' processor of a family with its PIL image processor."""
    tokenizer = tiny_tokenizer()
    if family == "llava_next":
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                size={"shortest_edge": NEXT_SIZE},
                crop_size={"height": NEXT_SIZE, "width": NEXT_SIZE},
                image_grid_pinpoints=pinpoints(NEXT_SIZE),
            ),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # CLS
            chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        )
    if family == "llava_onevision":
        images: Any = LlavaOnevisionImageProcessorPil(
            size={"height": ONEVISION_SIZE, "width": ONEVISION_SIZE},
            image_grid_pinpoints=pinpoints(ONEVISION_SIZE),
        )
        return _Onevision(images, tokenizer, TEMPLATE.replace("IMAGE", "<image>"))
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
    )
    template = TEMPLATE.replace("IMAGE", "<begin> <image> <end>")
    return (_Qwen2VL if family == "qwen2_vl" else _Qwen2_5VL)(images, tokenizer, template)


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A random picture of (height, width) pixels with large shapes in it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return small.resize((size[1], size[0]), Image.Resampling.NEAREST)


# -- model inputs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A picture or video in a prompt.

    Attributes:
        size: (height, width) of a picture in pixels; of a video, (rows, cols) of patches.
        seed: of its pixels.
        frames: of a video (of a Qwen video, temporal steps); None for a picture.
    """

    size: tuple[int, int]
    seed: int
    frames: int | None = None


Prompt = Sequence["int | Shown"]

# Grids of 1x1, 1x2, 2x1, 2x2 and 3x3 tiles; unpadded rows, unpadded columns, nothing to unpad.
CASES: dict[str, list[Prompt]] = {
    "one": [(BOS, 10, Shown((40, 30), 0), 11, 12)],
    "uneven": [
        (BOS, 10, Shown((22, 61), 1), 11, 12, 13),
        (BOS, 14, 15),
        (BOS, Shown((70, 70), 2), 16),
        (BOS, 10, 17, 18, Shown((48, 21), 3), 19),
    ],
    "several": [
        (BOS, 10, Shown((40, 30), 4), 11, Shown((16, 60), 5), 12, Shown((64, 64), 6), 13),
        (BOS, 14, Shown((30, 40), 7), 15, 16),
        (BOS, 17),
    ],
    "text": [(BOS, 10, 11, 12), (BOS, 14)],
    "video": [
        (BOS, 10, Shown((6, 8), 8, frames=3), 11, 12),
        (BOS, 13, 14, Shown((6, 8), 9, frames=3), 15),
        (BOS, 16),
    ],
    "mixed": [
        (BOS, 10, Shown((40, 30), 10), 11, Shown((4, 6), 11, frames=2), 12),
        (BOS, 13, Shown((8, 4), 12, frames=2), 14, Shown((22, 61), 13), 15, 16),
        (BOS, 17, Shown((48, 21), 14), 18),
    ],
}


def cases(family: str) -> list[str]:
    """Names of the cases that a family can run."""
    video = family in WITH_VIDEO
    return [name for name in CASES if video or name not in ("video", "mixed")]


def sample_inputs(
    family: str, case: str, padding_side: str = "left", sample: int | None = None
) -> dict[str, Tensor]:
    """Model inputs of a case, as the family's processor gives them.

    Args:
        family: one of FAMILIES.
        case: one of CASES.
        padding_side: "left" or "right".
        sample: one prompt of the case alone.
    """
    prompts = CASES[case]
    return inputs_of(family, prompts if sample is None else [prompts[sample]], padding_side)


def shown_of(case: str) -> list[list[Shown]]:
    """The pictures and videos of every prompt of a case."""
    return [[part for part in prompt if isinstance(part, Shown)] for prompt in CASES[case]]


def inputs_of(family: str, prompts: Sequence[Prompt], padding_side: str) -> dict[str, Tensor]:
    """Model inputs of prompts; pixels depend on the seed of what is shown alone."""
    inputs: dict[str, Tensor] = {}
    pictures = [
        [part for part in prompt if isinstance(part, Shown) and part.frames is None]
        for prompt in prompts
    ]
    videos = [
        part
        for prompt in prompts
        for part in prompt
        if isinstance(part, Shown) and part.frames is not None
    ]
    counts: dict[Shown, int] = {}
    if any(pictures):
        inputs.update(_pictures(family, pictures, counts))
    if videos:
        inputs.update(_videos(family, videos, counts))
    ids = [_ids(family, prompt, counts) for prompt in prompts]
    inputs.update(tiny.batch(ids, None, padding_side))
    if family in QWEN:
        kinds = torch.zeros_like(inputs["input_ids"])
        kinds[inputs["input_ids"] == IMAGE] = 1
        kinds[inputs["input_ids"] == VIDEO] = 2
        inputs["mm_token_type_ids"] = kinds
    return inputs


def _ids(family: str, prompt: Prompt, counts: dict[Shown, int]) -> list[int]:
    ids: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            ids.append(part)
            continue
        block = [IMAGE if part.frames is None else VIDEO] * counts[part]
        ids += [BEGIN, *block, END] if family in QWEN else block
    return ids


def _pictures(
    family: str, pictures: Sequence[Sequence[Shown]], counts: dict[Shown, int]
) -> dict[str, Tensor]:
    """Pixels of all pictures; writes down the placeholders of each."""
    processor = tiny_processor(family)
    nested = [[picture(one.size, one.seed) for one in own] for own in pictures]
    processed, replacements = processor._process_images(nested, return_tensors="pt")
    flat = [one for own in pictures for one in own]
    for one, text in zip(flat, replacements, strict=True):
        counts[one] = text.count("<image>")
    return dict(processed)


def _videos(family: str, videos: Sequence[Shown], counts: dict[Shown, int]) -> dict[str, Tensor]:
    """Random pixels of videos; writes down the placeholders of each."""
    parts, grids = [], []
    for one in videos:
        generator = torch.Generator().manual_seed(one.seed)
        frames = one.frames or 0
        if family == "llava_onevision":
            side = ONEVISION_SIZE
            parts.append(torch.randn(1, frames, 3, side, side, generator=generator))
            counts[one] = frames * POOLED_GRID**2 + 1
        else:
            grids.append((frames, *one.size))
            patches = frames * one.size[0] * one.size[1]
            parts.append(torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator))
            counts[one] = patches // 4
    inputs = {"pixel_values_videos": torch.cat(parts)}
    if grids:
        inputs["video_grid_thw"] = torch.tensor(grids)
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.full((len(videos),), SECONDS_PER_STEP)
    return inputs
