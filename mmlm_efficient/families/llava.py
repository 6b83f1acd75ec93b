"""LLaVA-1.5 and its likes: ``LlavaForConditionalGeneration`` of transformers.

A CLIP or SigLIP tower, a projector applied to every token, and a Llama, Mistral or Qwen2 text
model. One image is one square grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmlm_efficient.errors import PromptError
from mmlm_efficient.families.base import Fit, Visual, pixels_of
from mmlm_efficient.families.llava_like import LlavaLike
from mmlm_efficient.tokens import TokenPlaces


class Llava(LlavaLike):
    """The ``llava`` family; see the module's description."""

    name: ClassVar[str] = "llava"
    model_type: ClassVar[str] = "llava"
    describes: ClassVar[str] = (
        "LlavaForConditionalGeneration with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2 "
        "text model"
    )

    @property
    def feature_arguments(self) -> Mapping[str, Any]:
        """The config's layer and feature selection; no image sizes."""
        return {**super().feature_arguments, "image_sizes": None}

    def image_fit(self, processor: Any) -> Fit:
        """LLaVA-1.5's own image processor pads to a square first."""
        images: Any = getattr(processor, "image_processor", None)
        # Others know a do_pad of another meaning.
        pads = hasattr(images, "pad_to_square") and images.do_pad
        return "pad" if pads else super().image_fit(processor)

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches down and across of images [n, 3, height, width]."""
        patch = int(self.model.config.vision_config.patch_size)
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """Every picture of pixel_values [n, 3, H, W] is one grid."""
        pixels = pixels_of(inputs, "pixel_values")
        if pixels is None:
            return ()
        if pixels.ndim != 4:
            raise PromptError(
                "pixel_values must have shape [n_images, 3, height, width], got "
                f"{list(pixels.shape)}"
            )
        grid = self.grid(pixels)
        return (Visual("image", (grid,), TokenPlaces.grid(*grid)),) * len(pixels)

    def crop_pixels(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """Every picture is its one crop."""
        return list(torch.split(self.crops(inputs, visuals), 1))

    def crops(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> Tensor:
        """The pictures themselves."""
        pixels: Tensor = inputs["pixel_values"]
        return pixels

    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own ``get_image_features``."""
        pixels = inputs["pixel_values"]
        outputs = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        return list(outputs.pooler_output)

    def pack(self, values: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """One grid is packed as it is."""
        return values[0]
