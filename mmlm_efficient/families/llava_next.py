"""LLaVA-NeXT: ``LlavaNextForConditionalGeneration`` of transformers.

An image is an overview and tiles (anyres). Their tokens are stitched to one grid, the padded
border is removed, and a newline embedding ends every row of the tiles' grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmlm_efficient.errors import PromptError
from mmlm_efficient.families.anyres import anyres_places
from mmlm_efficient.families.base import Visual
from mmlm_efficient.families.llava_like import LlavaLike


class LlavaNext(LlavaLike):
    """The ``llava_next`` family; see the module's description."""

    name: ClassVar[str] = "llava_next"
    model_type: ClassVar[str] = "llava_next"
    describes: ClassVar[str] = (
        "LlavaNextForConditionalGeneration with a CLIP or SigLIP tower and a Llama, Mistral or "
        "Qwen2 text model"
    )
    consumed: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """One per row of image_sizes [n, 2] (height, width)."""
        pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if pixels is None:
            return ()
        if pixels.ndim not in (4, 5) or sizes is None or sizes.ndim != 2 or sizes.shape[1] != 2:
            shape = None if sizes is None else list(sizes.shape)
            raise PromptError(
                "pixel_values must have shape [n_images, crops, 3, height, width] and image_sizes "
                f"[n_images, 2], got {list(pixels.shape)} and {shape}. Give what the processor "
                "returns."
            )
        counts = [self._n_crops(size) for size in sizes.tolist()]
        given, needed = len(pixels), len(counts) if pixels.ndim == 5 else sum(counts)
        if given != needed:
            raise PromptError(
                f"pixel_values {list(pixels.shape)} do not match the {len(counts)} image(s) of "
                f"image_sizes, which have {counts} crops. Give what the processor returns."
            )
        return tuple(
            self._visual(count, tuple(size))
            for count, size in zip(counts, sizes.tolist(), strict=True)
        )

    def _n_crops(self, size: Sequence[int]) -> int:
        config = self.model.config
        return int(
            image_size_to_num_patches(
                list(size), config.image_grid_pinpoints, config.vision_config.image_size
            )
        )

    def _visual(self, count: int, size: tuple[int, int]) -> Visual:
        def pack(values: Tensor, newline: Tensor) -> Tensor:
            return self._packed(values, size, newline)

        places = anyres_places(pack, count, self.config_grid, exact=True)
        return Visual("image", (self.config_grid,) * count, places, size)

    def crops(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> Tensor:
        """The crops of all images, without the padding between images of different counts."""
        pixels: Tensor = inputs["pixel_values"]
        if pixels.ndim == 4:
            return pixels
        pairs = zip(pixels, visuals, strict=True)
        return torch.cat([own[: visual.n_crops] for own, visual in pairs])

    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own ``get_image_features``."""
        outputs = self.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        )
        return list(outputs.pooler_output)

    @property
    def newline(self) -> Tensor:
        """``image_newline``."""
        embedding: Tensor = self.model.model.image_newline
        return embedding

    def pack(self, values: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """The model's own ``pack_image_features``."""
        if newline is None:
            newline = values.new_zeros(values.shape[-1])
        return self._packed(values, visual.size or (1, 1), newline)

    def _packed(self, values: Tensor, size: tuple[int, int], newline: Tensor) -> Tensor:
        packed, _ = self.model.model.pack_image_features(
            [values],
            [list(size)],
            vision_feature_select_strategy="full",
            image_newline=newline,
        )
        result: Tensor = packed[0]
        return result
