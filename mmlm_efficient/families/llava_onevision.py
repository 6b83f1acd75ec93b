"""LLaVA-OneVision: ``LlavaOnevisionForConditionalGeneration`` of transformers.

A single image is an overview and tiles, resized to at most nine tiles' worth of tokens
(anyres_max_9), with a newline per row. Images of a prompt with several are one grid and a newline
each. A video is its frames, each pooled to half the rows and columns, and one newline at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from mmlm_efficient.errors import PromptError
from mmlm_efficient.families.anyres import anyres_places, check_crops, crops_of, sizes_of
from mmlm_efficient.families.base import Kind, Visual, pixels_of, whole_numbers
from mmlm_efficient.families.frames import FrameProcessor, SquareFrames
from mmlm_efficient.families.llava_like import LlavaLike
from mmlm_efficient.families.wrapped import own_weights
from mmlm_efficient.tokens import TokenPlaces


class LlavaOnevision(LlavaLike):
    """The ``llava_onevision`` family; see the module's description."""

    name: ClassVar[str] = "llava_onevision"
    model_type: ClassVar[str] = "llava_onevision"
    describes: ClassVar[str] = (
        "LlavaOnevisionForConditionalGeneration with a SigLIP or CLIP tower and a Qwen2, Llama or "
        "Mistral text model"
    )
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    tiles: ClassVar[bool] = True
    consumed: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "batch_num_images",
        "pixel_values_videos",
        "image_sizes_videos",
    )
    tables: ClassVar[tuple[str, ...]] = ("image_sizes", "batch_num_images")
    packs_pruned: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.refuse_cls()

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        """The image and the video token of the config."""
        config = self.model.config
        return {"image": int(config.image_token_id), "video": int(config.video_token_id)}

    @property
    def feature_arguments(self) -> Mapping[str, Any]:
        """The config's layer, feature selection and aspect ratio rule."""
        ratio = self.model.config.vision_aspect_ratio
        return {**super().feature_arguments, "vision_aspect_ratio": ratio}

    def frame_processor(self, processor: Any) -> FrameProcessor:
        """Frames are stretched to the tower's square."""
        return SquareFrames(processor)

    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """Images by image_sizes [n, 2] (height, width), then videos."""
        return (*self._images(inputs), *self._videos(inputs))

    def _images(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values")
        if pixels is None:
            return []
        sizes = sizes_of(inputs)
        tiled, per_prompt = [True] * len(sizes), inputs.get("batch_num_images")
        if per_prompt is not None:
            # Only a picture that is alone in its prompt is cut into tiles.
            counts = whole_numbers("batch_num_images", per_prompt)
            if counts.ndim != 1:
                raise PromptError(
                    "batch_num_images: expected [n_prompts], images of each prompt, got shape "
                    f"{list(counts.shape)}. Give what the processor returns."
                )
            tiled = [n == 1 for n in counts.tolist() for _ in range(n)]
        if len(tiled) != len(sizes):
            raise PromptError(
                f"batch_num_images adds up to {len(tiled)} image(s), but image_sizes has "
                f"{len(sizes)}. Give what the processor returns."
            )
        crops = [
            self._n_crops(size) if tiles else 1 for size, tiles in zip(sizes, tiled, strict=True)
        ]
        check_crops(pixels, crops)
        return [self._image(count, size) for count, size in zip(crops, sizes, strict=True)]

    def _n_crops(self, size: tuple[int, int]) -> int:
        config = self.model.config
        return int(
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
        )

    def _image(self, count: int, size: tuple[int, int]) -> Visual:
        def pack(values: Tensor, newline: Tensor) -> Tensor:
            return self._packed(values, size, newline)

        places = anyres_places(pack, count, self.config_grid, exact=False)
        return Visual("image", (self.config_grid,) * count, places, size)

    def _videos(self, inputs: Mapping[str, Any]) -> list[Visual]:
        pixels = pixels_of(inputs, "pixel_values_videos")
        if pixels is None:
            return []
        if pixels.ndim != 5:
            raise PromptError(
                "pixel_values_videos must have shape [n_videos, frames, 3, height, width], got "
                f"{list(pixels.shape)}"
            )
        frames = pixels.shape[1]
        rows, cols = (-(-side // 2) for side in self.config_grid)
        index = torch.arange(frames * rows * cols + 1)
        within = index % (rows * cols)
        newline = torch.zeros(len(index), dtype=torch.bool)
        newline[-1] = True
        places = TokenPlaces(
            source=index // (rows * cols),
            row=within // cols,
            col=within % cols,
            newline=newline,
            shapes=((rows, cols),) * frames,
            crop=None,
            patch=None,
            video=True,
        )
        return [Visual("video", (self.config_grid,) * frames, places)] * len(pixels)

    def crop_pixels(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The crops of every image, then the frames of every video."""
        pixels, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
        parts: list[Tensor] = []
        if pixels is not None:
            counts = [visual.n_crops for visual in visuals if visual.kind == "image"]
            parts.extend(crops_of(pixels, counts))
        if videos is not None:
            parts.extend(videos)
        return parts

    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own ``get_image_features`` and ``get_video_features``."""
        model, features = self.model.model, []
        if inputs.get("pixel_values") is not None:
            outputs = model.get_image_features(
                inputs["pixel_values"],
                inputs["image_sizes"],
                batch_num_images=inputs.get("batch_num_images"),
                return_dict=True,
            )
            features.extend(outputs.pooler_output)
        if inputs.get("pixel_values_videos") is not None:
            outputs = model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
            features.extend(outputs.pooler_output)
        return features

    @property
    def newline(self) -> Tensor:
        """``image_newline``."""
        inner = self.model.model
        with own_weights(inner):
            embedding: Tensor = inner.image_newline
        return embedding

    def pack(self, values: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """The model's own ``pack_image_features`` and ``apply_pooling``."""
        if newline is None:
            newline = values.new_zeros(values.shape[-1])
        if visual.kind == "image":
            return self._packed(values, visual.size or (1, 1), newline)
        pooled: Tensor = self.model.model.apply_pooling(values)
        return torch.cat([pooled.flatten(0, 1), newline[None].to(pooled)])

    def _packed(self, values: Tensor, size: tuple[int, int], newline: Tensor) -> Tensor:
        packed, _ = self.model.model.pack_image_features(
            [values],
            [list(size)],
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        result: Tensor = packed[0]
        return result

    def wrap_features(self, features: Sequence[Tensor], kinds: Sequence[Kind]) -> dict[str, Any]:
        """Images as a list; of videos, one entry per token: the model flattens what it gets, and
        generate() counts entries to give every beam those of its own prompt."""
        images = [one for one, kind in zip(features, kinds, strict=True) if kind == "image"]
        videos = [one for one, kind in zip(features, kinds, strict=True) if kind == "video"]
        wrapped: dict[str, Any] = {}
        if images:
            wrapped["image"] = BaseModelOutputWithPooling(pooler_output=cast(Any, images))
        if videos:
            joined = cast(Any, torch.cat(videos).unsqueeze(1))
            wrapped["video"] = BaseModelOutputWithPooling(pooler_output=joined)
        return wrapped
