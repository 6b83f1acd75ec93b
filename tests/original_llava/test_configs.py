"""Original configs, mapped onto those of transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
)

from mmlm_efficient.errors import ModelLoadError, UnsupportedError
from mmlm_efficient.original_llava import (
    converted_config,
    is_original,
    load_original,
)
from tests.original_llava.sources import (
    CLIP,
    SIGLIP,
    original_names,
    original_settings,
    source,
    write,
)
from tests.tiny_processor import save_tiny


def test_configs_of_the_published_models() -> None:
    vicuna = {
        "model_type": "llava_llama",
        "mm_vision_tower": CLIP,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "tokenizer_model_max_length": 2048,
        "tie_word_embeddings": False,
    }
    config = converted_config(vicuna)
    assert isinstance(config, LlavaConfig)
    assert (config.vision_feature_layer, config.image_seq_length) == (-2, 576)
    assert config.text_config.rms_norm_eps == 1e-05
    assert config.text_config.max_position_embeddings == 4096
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    mistral = {
        **vicuna,
        "model_type": "llava_mistral",
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": pinpoints,
        "rope_theta": 1000000.0,
        "num_key_value_heads": 8,
        "sliding_window": None,
    }
    config = converted_config(mistral)
    assert isinstance(config, LlavaNextConfig)
    assert config.image_grid_pinpoints == [[height, width] for width, height in pinpoints]
    assert config.text_config.rope_parameters["rope_theta"] == 1000000.0
    assert config.text_config.sliding_window is None
    qwen = {
        **mistral,
        "model_type": "llava_qwen",
        "mm_vision_tower": SIGLIP,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    }
    config = converted_config(qwen)
    assert isinstance(config, LlavaOnevisionConfig)
    assert config.vision_aspect_ratio == "anyres_max_9"
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert config.tie_word_embeddings
    assert len(config.image_grid_pinpoints) == 36
    assert config.image_grid_pinpoints[1] == [768, 384]  # one crop wide, two high
    written = converted_config({**qwen, "image_grid_pinpoints": "[(384, 768), (768, 384)]"})
    assert written.image_grid_pinpoints == [[768, 384], [384, 768]]


def test_select_feature() -> None:
    settings = original_settings(source("llava", "llama"), "llava")
    whole = converted_config({**settings, "mm_vision_select_feature": "cls_patch"})
    assert whole.vision_feature_select_strategy == "full"
    assert converted_config({**settings, "mm_vision_select_layer": -1}).vision_feature_layer == -1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "allowed: 'mlp2x_gelu'"),
        ({"mm_vision_tower": "owner/eva-clip"}, "'owner/eva-clip' is not known; known: clip-vit"),
        ({"model_type": "llava_mpt"}, "model_type: 'llava_mpt'"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio: 'highres'"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type: 'flat'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type: 'spatial_pool'"),
        ({"s2": True}, "s2: True"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: 'cls'"),
        ({"mm_vision_select_layer": "-2,-5"}, "mm_vision_select_layer: '-2,-5'"),
        (
            {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"},
            "SigLIP tower only",
        ),
        (
            {
                "image_aspect_ratio": "anyres",
                "mm_patch_merge_type": "spatial_unpad",
                "mm_vision_select_feature": "cls_patch",
            },
            "CLS token form no grid",
        ),
    ],
)
def test_unsupported(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    stock = source("llava", "llama")
    settings = {**original_settings(stock, "llava"), **change}
    folder = write(tmp_path, original_names(stock), settings)
    with pytest.raises(UnsupportedError) as caught:
        load_original(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize("points", [None, "none", [[100, 336]], [], [[336]]])
def test_pinpoints_that_are_none(points: Any) -> None:
    settings = original_settings(source("next", "llama"), "llava", image_grid_pinpoints=points)
    with pytest.raises(ModelLoadError, match="image_grid_pinpoints"):
        converted_config(settings)


def test_config_with_a_wrong_field() -> None:
    settings = original_settings(source("llava", "llama"), "llava", hidden_size="wide")
    with pytest.raises(ModelLoadError, match="not a config of LlamaConfig"):
        converted_config(settings)


def test_is_original(tmp_path: Path) -> None:
    assert not is_original(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert not is_original(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": CLIP}))
    assert not is_original(tmp_path)
    assert not is_original(save_tiny(tmp_path / "tiny"))


# Files and tensors that are missing, damaged or too many
