"""Random Llava models of stated sizes, built from configs: no download, no trained weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN = 3
BOS_TOKEN = 1
FIRST_WORD = 10


@dataclass(frozen=True)
class TowerSize:
    """A CLIP tower; the defaults are ViT-L/14-336, the tower of LLaVA-1.5."""

    layers: int = 24
    width: int = 1024
    mlp_width: int = 4096
    heads: int = 16
    image_px: int = 336
    patch_px: int = 14

    @property
    def patches(self) -> int:
        """Patches, and so visual tokens, of one image."""
        return (self.image_px // self.patch_px) ** 2


@dataclass(frozen=True)
class DecoderSize:
    """A Llama decoder; the defaults are LLaVA-1.5-7B's."""

    layers: int = 32
    width: int = 4096
    mlp_width: int = 11008
    heads: int = 32
    vocabulary: int = 32064


SMALL_TOWER = TowerSize(layers=8, width=64, mlp_width=128, heads=4, image_px=96, patch_px=8)
SMALL_DECODER = DecoderSize(layers=2, width=64, mlp_width=128, heads=4, vocabulary=128)


def described(size: TowerSize | DecoderSize) -> dict[str, Any]:
    """A size for a result file."""
    return asdict(size)


def random_llava(
    tower: TowerSize,
    decoder: DecoderSize,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    contrast: float = 1.0,
) -> LlavaForConditionalGeneration:
    """A Llava with random weights, in eval mode.

    Args:
        tower, decoder: sizes.
        device, dtype: where and as what the weights are made.
        seed: of the weights.
        contrast: factor on the tower's query and key weights. At 1 (the initialisation of
            transformers) attention is nearly even and patches are cut late.
    """
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower.width,
            intermediate_size=tower.mlp_width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image_px,
            patch_size=tower.patch_px,
            projection_dim=tower.width,
        ),
        text_config=LlamaConfig(
            vocab_size=decoder.vocabulary,
            hidden_size=decoder.width,
            intermediate_size=decoder.mlp_width,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.heads,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(contrast)
            layer.self_attn.k_proj.weight.mul_(contrast)
    model.requires_grad_(False)
    model.eval()
    return model


def random_images(count: int, size_px: int, *, device: torch.device, seed: int) -> Tensor:
    """Random pixel values float32 [count, 3, size_px, size_px], coarse and fine detail mixed."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(count, 3, size_px, size_px, generator=generator)
    coarse = torch.randn(count, 3, 6, 6, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=(size_px, size_px), mode="bilinear")
    return (0.5 * fine + coarse).to(device)


def prompt(n_images: int, per_image: int, text_tokens: int, vocabulary: int) -> list[int]:
    """Token ids of one prompt: BOS, the images' placeholders, then words; text_tokens in all."""
    words = [FIRST_WORD + place % (vocabulary - FIRST_WORD) for place in range(text_tokens - 1)]
    return [BOS_TOKEN, *[IMAGE_TOKEN] * (n_images * per_image), *words]


def batch(prompts: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask of prompts, padded on the left."""
    longest = max(len(ids) for ids in prompts)
    rows = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
