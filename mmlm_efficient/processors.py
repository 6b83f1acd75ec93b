"""The processor in a model folder, also where torchvision is missing.

Processors with an input for videos refuse to be loaded without torchvision, which their video
processors need, even for pictures. Here such a processor is loaded without its video processor;
the frames of videos go through its image processor instead (`families.frames`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.families.frames import settings_in


def read_processor(folder: Path, config: Any, name: str) -> Any:
    """The processor of a model folder.

    Args:
        folder: of the model.
        config: the model's config of transformers.
        name: how messages call the model.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils.import_utils import is_torchvision_available

    made: Any = AutoProcessor
    if not is_torchvision_available():
        known: Any = PROCESSOR_MAPPING.get(type(config), None)
        if known is not None and "video_processor" in known.get_attributes():
            made = _without_videos(known)
    try:
        processor = made.from_pretrained(folder, local_files_only=True)
        if made is not AutoProcessor:
            processor.video_settings = _video_settings(folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{name}: the processor in {folder} cannot be loaded: {error}"
        ) from error
    return processor


def _without_videos(known: Any) -> Any:
    """A class of processors that asks for no video processor, under the same name."""

    def get_attributes(cls: Any) -> list[str]:
        return [one for one in super(made, cls).get_attributes() if one != "video_processor"]

    made: Any = type(known.__name__, (known,), {"get_attributes": classmethod(get_attributes)})
    return made


def _video_settings(folder: Path) -> dict[str, Any]:
    """What the folder says of videos; empty where they are treated as pictures are."""
    whole = _read(folder / "processor_config.json").get("video_processor")
    if isinstance(whole, dict):
        return settings_in(whole)
    return settings_in(_read(folder / "video_preprocessor_config.json"))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))  # its ValueError is the caller's
    return content if isinstance(content, dict) else {}


def image_stats(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation per channel that the image processor normalises with."""
    images = getattr(processor, "image_processor", None)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    return None if mean is None or std is None else (tuple(mean), tuple(std))
