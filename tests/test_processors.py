"""Processors with an input for videos load without torchvision, and know what is set for videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2VLProcessor

from mmlm_efficient import EfficientLMM, Request, load
from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.families.frames import settings_in
from mmlm_efficient.processors import read_processor
from mmlm_efficient.prompts import preprocess
from tests.clips import pictures
from tests.tiny_families import WITH_VIDEO, tiny_model, tiny_processor
from tests.tiny_processor import picture

CLASSES = {
    "llava_onevision": "LlavaOnevisionProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
}
# What the processor's constructor takes beside its parts.
MORE: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "num_image_tokens": 25,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    }
}


def saved(folder: Path, family: str, video: dict[str, Any] | None, whole: bool = True) -> Path:
    """A model folder as the hub has them: one file for the processor, or one for each part."""
    tiny_model(family).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    path = folder / "processor_config.json"
    images = json.loads(path.read_text())["image_processor"]
    content = {"processor_class": CLASSES[family], **MORE.get(family, {})}
    if whole:
        content["image_processor"] = images
        content |= {} if video is None else {"video_processor": video}
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
        if video is not None:
            (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_load_answers_like_the_model_that_was_saved(
    tmp_path: Path, family: str, whole: bool
) -> None:
    with EfficientLMM(tiny_model(family), tiny_processor(family)) as stock:
        lmm = load(saved(tmp_path, family, {}, whole))
        for shown in ({"image": picture()}, {"video": pictures(3)}):
            options: dict[str, Any] = {"max_new_tokens": 4, **shown}
            assert lmm.ask("w20 w21", **options).text == stock.ask("w20 w21", **options).text
    assert type(lmm.processor).__name__ == CLASSES[family]
    lmm.processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert again["processor_class"] == CLASSES[family]


@pytest.mark.parametrize("whole", [True, False])
def test_settings_for_videos_are_read(tmp_path: Path, whole: bool) -> None:
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "min_pixels": 64, "max_pixels": 256}
    folder = saved(tmp_path, "qwen2_vl", video, whole)
    processor = read_processor(folder, AutoConfig.from_pretrained(folder), "tiny")
    assert isinstance(processor, Qwen2VLProcessor)
    with EfficientLMM(tiny_model("qwen2_vl"), processor) as lmm:
        request = Request("w20", picture(), pictures(2))
        inputs = preprocess(processor, [request], torch.float32, lmm._parts.family)
    _, rows, cols = inputs["video_grid_thw"][0].tolist()
    assert rows * cols * 16 <= 256 < inputs["image_grid_thw"][0].prod() * 16


def test_settings_in_a_file() -> None:
    assert settings_in({"size": {"height": 20, "width": 20}, "do_sample_frames": True}) == {
        "size": {"height": 20, "width": 20}
    }


def test_damaged_processor(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen2_vl", {}, whole=False)
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        (folder / name).write_text("{")
        with pytest.raises(ModelLoadError, match="the processor in .* cannot be loaded"):
            load(folder)
