"""Tiny random models for tests: built from configs, float32, no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE_TOKEN = 3
PAD_TOKEN = 0
VOCAB = 97
IMAGE_SIZE = 24
PATCH = 4
GRID = IMAGE_SIZE // PATCH
N_PATCHES = GRID * GRID

TOWERS = ("clip", "siglip")
TEXTS = ("llama", "mistral", "qwen2")


def vision_config(tower: str, layers: int = 6, **overrides: Any) -> Any:
    """A small CLIP or SigLIP vision config: 6x6 patches, 4 heads."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        **overrides,
    }
    if tower == "siglip":
        return SiglipVisionConfig(vision_use_head=False, **settings)
    return CLIPVisionConfig(**settings)


def text_config(text: str, layers: int = 4, **overrides: Any) -> Any:
    """A small Llama, Mistral or Qwen2 config with grouped-query attention."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD_TOKEN,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **overrides,
    }
    config_class = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[text]
    return config_class(**settings)


def tiny_llava(
    tower: str = "clip",
    text: str = "llama",
    *,
    layers: int = 6,
    feature_layer: int | list[int] = -2,
    select: str | None = None,
    attn: str = "sdpa",
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
) -> LlavaForConditionalGeneration:
    """A random Llava in eval mode.

    Args:
        tower: "clip" or "siglip".
        text: "llama", "mistral" or "qwen2".
        layers: tower layers.
        feature_layer: the config's ``vision_feature_layer``.
        select: feature selection; by default "default" for CLIP and "full" for SigLIP.
        attn: attention implementation.
        seed: seed of the weights.
        vision: overrides of the tower's config.
        language: overrides of the text config.
    """
    config = LlavaConfig(
        vision_config=vision_config(tower, layers, **(vision or {})),
        text_config=text_config(text, **(language or {})),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select or ("default" if tower == "clip" else "full"),
        pad_token_id=PAD_TOKEN,
        attn_implementation=attn,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    # Larger weights than the init gives: patches, images and words then really differ.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "position_embedding" not in name:
                weight.mul_(_scale(name))
    generation = model.generation_config
    generation.pad_token_id = PAD_TOKEN
    generation.eos_token_id = None
    return model


def _scale(name: str) -> float:
    """How much larger than its init a weight matrix is."""
    if "embed_tokens" in name:
        return 2.0
    if "language_model" in name:
        return 5.0
    return 9.0 if "q_proj" in name or "k_proj" in name else 3.0


def tokens_per_image(model: LlavaForConditionalGeneration) -> int:
    """Placeholders that the stock processor writes for one image."""
    clip_full = (
        model.config.vision_config.model_type == "clip_vision_model"
        and model.config.vision_feature_select_strategy == "full"
    )
    return N_PATCHES + int(clip_full)


def images(count: int, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    """Random pixel values [count, 3, size, size], each image with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator) * scale


def prompt(*parts: int | Sequence[int], per_image: int = N_PATCHES) -> list[int]:
    """Token ids from parts: IMAGE_TOKEN expands to an image block, other ids are text."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.extend([part] * (per_image if part == IMAGE_TOKEN else 1))
        else:
            ids.extend(part)
    return ids


def batch(
    prompts: Sequence[Sequence[int]],
    pixel_values: Tensor | None = None,
    padding_side: str = "left",
) -> dict[str, Tensor]:
    """Processor output for token id lists: input_ids, attention_mask and pixel_values."""
    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), PAD_TOKEN)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        columns = slice(longest - len(ids), None) if padding_side == "left" else slice(len(ids))
        input_ids[row, columns] = torch.tensor(ids)
        attention_mask[row, columns] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if pixel_values is not None:
        inputs["pixel_values"] = pixel_values
    return inputs
