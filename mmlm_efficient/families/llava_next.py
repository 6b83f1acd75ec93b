"""LLaVA-NeXT: ``LlavaNextForConditionalGeneration`` of transformers.

An image is an overview and tiles (anyres). Their tokens are stitched to one grid, the padded
border is removed, and a newline embedding ends every row of the tiles' grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from mmlm_efficient.families.anyres import anyres_places, check_crops, crops_of, sizes_of
from mmlm_efficient.families.base import Visual, pixels_of
from mmlm_efficient.families.llava_like import LlavaLike
from mmlm_efficient.families.wrapped import own_weights


class LlavaNext(LlavaLike):
    """The ``llava_next`` family; see the module's description."""

    name: ClassVar[str] = "llava_next"
    model_type: ClassVar[str] = "llava_next"
    describes: ClassVar[str] = (
        "LlavaNextForConditionalGeneration with a CLIP or SigLIP tower and a Llama, Mistral or "
        "Qwen2 text model"
    )
    tiles: ClassVar[bool] = True
    consumed: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    tables: ClassVar[tuple[str, ...]] = ("image_sizes",)

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.refuse_cls()

    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """One per row of image_sizes [n, 2] (height, width)."""
        pixels = pixels_of(inputs, "pixel_values")
        if pixels is None:
            return ()
        sizes = sizes_of(inputs)
        counts = [self._n_crops(size) for size in sizes]
        check_crops(pixels, counts)
        return tuple(self._visual(count, size) for count, size in zip(counts, sizes, strict=True))

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

    def crop_pixels(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The crops of every image, without the padding between images of different counts."""
        return crops_of(inputs["pixel_values"], [visual.n_crops for visual in visuals])

    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own ``get_image_features``."""
        outputs = self.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        )
        return list(outputs.pooler_output)

    @property
    def newline(self) -> Tensor:
        """``image_newline``."""
        inner = self.model.model
        with own_weights(inner):
            embedding: Tensor = inner.image_newline
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
