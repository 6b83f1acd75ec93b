"""Random models of named shapes with inputs to match, for benchmarks of several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from benchmarks.models import FIRST_WORD, IMAGE_TOKEN
from mmlm_efficient.families import family_of

VIDEO_TOKEN = 4
_PINPOINTS_NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Shape:
    """A model and its picture.

    Attributes:
        describes: in words, for result files.
        model_class, config: what to build.
        picture_hw: (height, width) of the original picture, pixels.
    """

    describes: str
    model_class: Any
    config: Callable[[], Any]
    picture_hw: tuple[int, int]


def _clip_large() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def _mid() -> LlavaConfig:
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=4096,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )


def _next_7b() -> LlavaNextConfig:
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    return LlavaNextConfig(
        vision_config=_clip_large(),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=_PINPOINTS_NEXT,
        vision_feature_layer=-2,
    )


def _onevision_7b() -> LlavaOnevisionConfig:
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=152000,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    sides = range(384, 384 * 7, 384)
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


SHAPES: dict[str, Shape] = {
    "mid": Shape(
        "LLaVA of middle size: 576 visual tokens, 16 decoder layers, 768 wide",
        LlavaForConditionalGeneration,
        _mid,
        (336, 336),
    ),
    "llava-next-7b": Shape(
        "LLaVA-NeXT-7B: 2x2 tiles of 576 patches and an overview, 32 decoder layers, 4096 wide",
        LlavaNextForConditionalGeneration,
        _next_7b,
        (672, 672),
    ),
    "onevision-7b": Shape(
        "LLaVA-OneVision-7B: anyres_max_9, 28 decoder layers, 3584 wide",
        LlavaOnevisionForConditionalGeneration,
        _onevision_7b,
        (1152, 1152),
    ),
}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """The model of a shape with random weights, in eval mode."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = shape.model_class(shape.config())
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    model.eval()
    return model


def random_inputs(
    shape: Shape, model: Any, text_tokens: int, device: torch.device, seed: int
) -> dict[str, Tensor]:
    """One prompt of text around one random picture of the shape's size."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.vision_config
    size, grids = int(config.image_size), getattr(model.config, "image_grid_pinpoints", None)
    crops = 1
    inputs: dict[str, Tensor] = {}
    if grids is not None:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        crops = int(image_size_to_num_patches(list(shape.picture_hw), grids, size))
        inputs["image_sizes"] = torch.tensor([shape.picture_hw])
    coarse = torch.randn(crops, 3, 6, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    pixels += 0.5 * torch.randn(crops, 3, size, size, generator=generator)
    inputs["pixel_values"] = pixels if grids is None else pixels[None]
    inputs = {name: value.to(device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    family = family_of(model)
    (visual,) = family.visuals(inputs)
    words = [FIRST_WORD + place % 1000 for place in range(text_tokens - 1)]
    half = len(words) // 2
    ids = [1, *words[:half], *[IMAGE_TOKEN] * family.tokens_of(visual), *words[half:]]
    inputs["input_ids"] = torch.tensor([ids], device=device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs
