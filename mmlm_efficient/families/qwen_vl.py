"""Qwen2-VL and Qwen2.5-VL: their ``...ForConditionalGeneration`` of transformers.

The tower takes images of any size as one packed sequence; a merger makes one token of every 2x2
square of patches. A token's position in the language model has three axes, time, row and column
(M-RoPE): kept tokens keep those that they have in the full grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmlm_efficient.errors import PromptError
from mmlm_efficient.families.base import (
    DecoderParts,
    Family,
    Kind,
    Visual,
    pixels_of,
    whole_numbers,
)
from mmlm_efficient.families.frames import FrameProcessor, PatchFrames
from mmlm_efficient.families.llava_like import decoder_parts
from mmlm_efficient.families.packed import PackedTowerParts, packed_tower_parts
from mmlm_efficient.tokens import TokenPlaces


class Qwen2VL(Family):
    """The ``qwen2_vl`` family; see the module's description."""

    name: ClassVar[str] = "qwen2_vl"
    model_type: ClassVar[str] = "qwen2_vl"
    describes: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    consumed: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    tables: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw")
    merges_patches: ClassVar[bool] = True
    axes: ClassVar[bool] = True

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether the config is of this model type."""
        return getattr(config, "model_type", None) == cls.model_type

    @cached_property
    def tower(self) -> PackedTowerParts:
        """The packed vision transformer."""
        return packed_tower_parts(self.model.model.visual)

    @cached_property
    def decoder(self) -> DecoderParts:
        """The text model, a Qwen2 with M-RoPE."""
        return decoder_parts(self.model.model.language_model, head=self.model)

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        """The image and the video token of the config."""
        config = self.model.config
        return {"image": int(config.image_token_id), "video": int(config.video_token_id)}

    @property
    def feature_layer(self) -> int:
        """The last block: the merger takes its output."""
        return len(self.tower.layers) - 1

    @property
    def last_cut_layer(self) -> int:
        """The last block too: all blocks run before the last cut."""
        return self.feature_layer

    @property
    def config_grid(self) -> tuple[int, int]:
        """Images have any size; one square of the merger is the smallest."""
        return 1, 1

    @property
    def feature_arguments(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def frame_processor(self, processor: Any) -> FrameProcessor:
        """Patches join pairs of frames."""
        return PatchFrames(processor)

    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """One per row of image_grid_thw, then of video_grid_thw."""
        images = self._of_kind("image", inputs, "pixel_values", "image_grid_thw")
        videos = self._of_kind("video", inputs, "pixel_values_videos", "video_grid_thw")
        return (*images, *videos)

    def _of_kind(
        self, kind: Kind, inputs: Mapping[str, Any], pixels_name: str, grid_name: str
    ) -> list[Visual]:
        pixels, given = pixels_of(inputs, pixels_name), inputs.get(grid_name)
        if pixels is None:
            return []
        grids = None if given is None else whole_numbers(grid_name, given)
        config = self.model.config.vision_config
        side, patch = int(config.spatial_merge_size), int(config.patch_size)
        width = int(config.in_channels) * int(config.temporal_patch_size) * patch**2
        if pixels.ndim != 2 or pixels.shape[1] != width:
            raise PromptError(
                f"{pixels_name} must have shape [patches, {width}], got {list(pixels.shape)}. "
                "Give what the processor returns."
            )
        if grids is None or grids.ndim != 2 or grids.shape[1] != 3:
            shape = None if grids is None else list(grids.shape)
            raise PromptError(
                f"{grid_name}: expected [n, 3] (temporal steps, rows, columns) beside "
                f"{pixels_name}, got {shape}. Give what the processor returns."
            )
        sizes = grids.tolist()
        if any(length < 1 for size in sizes for length in size):
            raise PromptError(
                f"{grid_name} {sizes}: steps, rows and columns must be at least 1. Give what the "
                "processor returns."
            )
        total = sum(steps * rows * cols for steps, rows, cols in sizes)
        if len(pixels) != total:
            raise PromptError(
                f"{pixels_name} holds {len(pixels)} patches, but {grid_name} {sizes} asks for "
                f"{total}. Give what the processor returns."
            )
        if any(rows % side or cols % side for _, rows, cols in sizes):
            raise PromptError(
                f"{grid_name} {sizes}: rows and columns must be multiples of {side}, which is "
                "what the tower merges. Give what the processor returns."
            )
        return [_visual(kind, steps, rows // side, cols // side) for steps, rows, cols in sizes]

    def crop_pixels(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The picture of every temporal step [steps, 3, H, W], put together from its patches."""
        pixels, grids = self._patches(inputs)
        parts = torch.split(pixels, grids.prod(dim=-1).tolist())
        return [self._picture(own, grid) for own, grid in zip(parts, grids.tolist(), strict=True)]

    def _picture(self, patches: Tensor, grid: Sequence[int]) -> Tensor:
        config = self.model.config.vision_config
        side, patch = int(config.spatial_merge_size), int(config.patch_size)
        steps, rows, cols = grid
        channels = int(config.in_channels)
        # Of the frames that a temporal step joins, the first.
        cells = patches.view(
            steps, rows // side, cols // side, side, side, channels, -1, patch, patch
        )
        cells = cells[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7)
        return cells.reshape(steps, channels, rows * patch, cols * patch)

    def _patches(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Patches [S, P] and grids [n, 3] of all images, then all videos."""
        pairs = [
            (inputs[pixels], inputs[grid])
            for pixels, grid in (
                ("pixel_values", "image_grid_thw"),
                ("pixel_values_videos", "video_grid_thw"),
            )
            if inputs.get(pixels) is not None
        ]
        pixels, grids = zip(*pairs, strict=True)
        return torch.cat(pixels), torch.cat(grids)

    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own ``get_image_features`` and ``get_video_features``."""
        model, features = self.model.model, []
        if inputs.get("pixel_values") is not None:
            outputs = model.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
            )
            features.extend(outputs.pooler_output)
        if inputs.get("pixel_values_videos") is not None:
            outputs = model.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
            )
            features.extend(outputs.pooler_output)
        return features

    def run_tower(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The merger's output, one tensor per temporal step."""
        pixels, grids = self._patches(inputs)
        tower = self.model.model.visual
        outputs = tower(pixels.type(tower.dtype), grid_thw=grids, return_dict=True)
        sizes = [rows * cols for visual in visuals for rows, cols in visual.crop_grids]
        return list(torch.split(outputs.pooler_output, sizes))

    def project(self, features: Tensor) -> Tensor:
        """The merger has projected them already."""
        return features

    def pack(self, values: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """Temporal steps one behind the other."""
        return values.flatten(0, 1)

    def position_axes(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The model's own ``get_rope_index`` of the uncut prompt, or the caller's positions.

        Raises:
            PromptError: what it takes is missing or has another shape than input_ids.
        """
        ids, given = inputs["input_ids"], inputs.get("position_ids")
        if given is not None:
            return _given_axes(given, ids)
        if not any(name in inputs for name in ("image_grid_thw", "video_grid_thw")):
            return None
        kinds = inputs.get("mm_token_type_ids")
        if kinds is None or kinds.shape != ids.shape:
            got = "none" if kinds is None else f"shape {list(kinds.shape)}"
            raise PromptError(
                f"mm_token_type_ids: got {got}, expected shape {list(ids.shape)}, that of "
                "input_ids. Without it, positions of images along rows and columns cannot be "
                "told. Give what the processor returns beside input_ids."
            )
        index: Any = self.model.model.get_rope_index
        names = set(inspect.signature(index).parameters) - {"self", "kwargs"}
        positions, _ = index(**{name: inputs[name] for name in names if name in inputs})
        return cast("Tensor", positions)

    def wrap_features(self, features: Sequence[Tensor], kinds: Sequence[Kind]) -> dict[str, Any]:
        """Lists of tensors per kind, as the tower's output is split."""
        wrapped: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            own = [one for one, other in zip(features, kinds, strict=True) if other == kind]
            wrapped[kind] = BaseModelOutputWithPooling(pooler_output=cast(Any, own))
        return wrapped


class Qwen2_5VL(Qwen2VL):
    """The ``qwen2_5_vl`` family: as Qwen2-VL, with window attention in most tower layers."""

    name: ClassVar[str] = "qwen2_5_vl"
    model_type: ClassVar[str] = "qwen2_5_vl"
    describes: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"


def _given_axes(given: Any, ids: Tensor) -> Tensor:
    """The caller's position ids as [3, B, S]; [B, S] count alike along all axes, and of
    [4, B, S] the first are those of the text, which only masks need."""
    shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if isinstance(given, Tensor) and given.ndim == 2:
        given = given.unsqueeze(0).expand(3, -1, -1)
    fits = isinstance(given, Tensor) and given.ndim == 3 and len(given) in (3, 4)
    if not fits or given.shape[2] != ids.shape[1] or given.shape[1] not in (1, len(ids)):
        raise PromptError(
            f"position_ids: expected shape {[3, *ids.shape]}, one row per axis, got {shape}. Leave "
            "them out to have them counted."
        )
    return cast("Tensor", given[-3:].expand(-1, len(ids), -1))


def _visual(kind: Kind, steps: int, rows: int, cols: int) -> Visual:
    """An image or video of some temporal steps of rows x cols tokens."""
    index = torch.arange(steps * rows * cols)
    step, patch = index // (rows * cols), index % (rows * cols)
    places = TokenPlaces(
        source=step,
        row=patch // cols,
        col=patch % cols,
        newline=torch.zeros(len(index), dtype=torch.bool),
        shapes=((rows, cols),) * steps,
        crop=step,
        patch=patch,
        video=kind == "video",
    )
    return Visual(kind, ((rows, cols),) * steps, places)
