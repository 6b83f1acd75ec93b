"""The frames of a video as a model takes them, through the processor's image processor.

The video processors of transformers need torchvision. The classes here take their place in a
processor and give what those give: the same sizes, the same patches of pairs of frames, the same
names. Only the resizing is Pillow's and not torchvision's, as it is for pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import SizeDict

from mmlm_efficient.errors import PromptError

Frames = npt.NDArray[np.uint8]
# What a processor's settings for videos may set differently from those for pictures.
_SETTINGS = (
    *("size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size"),
)


class FrameProcessor(ABC):
    """What a video processor of transformers is to a processor.

    Args:
        processor: processor of transformers. Its settings for videos, where it has any, are used
            instead of those for pictures: those of its video processor, or ``video_settings``.
    """

    def __init__(self, processor: Any) -> None:
        self.images = processor.image_processor
        known = getattr(processor, "video_processor", None)
        given = getattr(processor, "video_settings", None) or {}
        if known is not None:
            given = {name: getattr(known, name, None) for name in _SETTINGS}
        self.settings: dict[str, Any] = {
            name: _plain(value)
            for name, value in given.items()
            if name in _SETTINGS and value is not None and hasattr(self.images, name)
        }
        usual = _plain(self.images.size)
        if "shortest_edge" in usual and "size" in self.settings:  # one limit may be given alone
            self.settings["size"] = {**usual, **self.settings["size"]}

    def setting(self, name: str) -> Any:
        """One setting, that of pictures where videos have none."""
        return self.settings.get(name, _plain(getattr(self.images, name)))

    def __call__(
        self,
        videos: Sequence[Frames],
        video_metadata: Sequence[Any] = (),
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """The frames of some videos as model inputs.

        Args:
            videos: uint8 [frames, height, width, 3] each.
            video_metadata: handed through.
            return_tensors: handed on to the result.
        """
        data = self.inputs(videos)
        data["video_metadata"] = list(video_metadata)
        return BatchFeature(
            data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"]
        )

    @abstractmethod
    def inputs(self, videos: Sequence[Frames]) -> dict[str, Any]:
        """The model inputs of some videos [frames, height, width, 3]."""

    def processed(self, frames: Frames, **settings: Any) -> Tensor:
        """Pixel values of frames as the image processor gives them."""
        given = self.images(
            images=list(frames),
            input_data_format="channels_last",
            return_tensors="pt",
            **{**self.settings, **settings},
        )
        pixels: Tensor = given["pixel_values"]
        return pixels


class SquareFrames(FrameProcessor):
    """Every frame is stretched to the tower's square, without tiles (LLaVA-OneVision)."""

    def inputs(self, videos: Sequence[Frames]) -> dict[str, Any]:
        """``pixel_values_videos`` [n, frames, 3, side, side].

        Raises:
            PromptError: the videos have different numbers of frames, which the model cannot take.
        """
        counts = [len(frames) for frames in videos]
        if len(set(counts)) > 1:
            raise PromptError(
                f"the videos of this batch have {', '.join(map(str, counts))} frames, but the "
                "model takes the same number of all. Ask about them one by one, or pick equally "
                "many frames of each."
            )
        size = self.setting("size")
        side = size["height"] if size.get("height") else size["shortest_edge"]
        # The overview in front of the tiles is the whole picture in the tower's size; one tile is
        # the least that there can be.
        pixels = [
            self.processed(frames, image_grid_pinpoints=[[side, side]])[:, 0] for frames in videos
        ]
        return {"pixel_values_videos": torch.stack(pixels)}


class PatchFrames(FrameProcessor):
    """Frames of any size as patches that join consecutive frames (Qwen2-VL, Qwen2.5-VL)."""

    @property
    def merge_size(self) -> int:
        """Patches down and across that become one token."""
        return int(self.setting("merge_size"))

    @property
    def temporal_patch_size(self) -> int:
        """Frames that one patch joins."""
        return int(self.setting("temporal_patch_size"))

    def inputs(self, videos: Sequence[Frames]) -> dict[str, Any]:
        """``pixel_values_videos`` [patches, C * T * P * P] of all videos, ``video_grid_thw``."""
        patches, grids = zip(*(self._patches(frames) for frames in videos), strict=True)
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids, dtype=torch.long),
        }

    def _patches(self, frames: Frames) -> tuple[Tensor, tuple[int, int, int]]:
        joined, side = self.temporal_patch_size, int(self.setting("patch_size"))
        given = self.images(
            images=list(frames),
            input_data_format="channels_last",
            return_tensors="pt",
            **self.settings,
        )
        _, rows, cols = given["image_grid_thw"][0].tolist()
        # A picture is shown to every place of a patch's time axis: one is enough.
        shape = (len(frames), rows * cols, -1, joined, side * side)
        pixels: Tensor = given["pixel_values"].view(shape)[:, :, :, 0]
        missing = -len(frames) % joined
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        steps = len(pixels) // joined
        pixels = pixels.view(steps, joined, *pixels.shape[1:]).permute(0, 2, 3, 1, 4)
        return pixels.flatten(2).flatten(0, 1), (steps, rows, cols)


def _plain(value: Any) -> Any:
    """A size of transformers as the mapping that it stands for."""
    return dict(value) if isinstance(value, SizeDict) else value


def settings_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for videos in a file of a video processor, by their present names.

    Example:
        >>> settings_in({"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2})
        {'merge_size': 2, 'size': {'shortest_edge': 3136, 'longest_edge': 12845056}}
    """
    found = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    pixels = {edge: config[old] for edge, old in names.items() if config.get(old) is not None}
    if pixels:
        found["size"] = {**found.get("size", {}), **pixels}
    return found
