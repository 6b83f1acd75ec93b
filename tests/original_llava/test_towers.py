"""Where the vision tower of an original folder comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmlm_efficient.errors import ModelLoadError, UnsupportedError
from mmlm_efficient.original_llava import (
    load_original,
    original_config,
)
from mmlm_efficient.original_llava.config import TOWERS, Tower, tower_config
from tests.original_llava.sources import (
    CLIP,
    SIGLIP,
    original_names,
    original_settings,
    same_answers,
    source,
    tower,
    without_tower,
    write,
    write_tower,
)
from tests.tiny_processor import picture


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize("how", ["argument", "config", "inside the folder"])
def test_tower_in_a_folder(tmp_path: Path, ending: str, how: str) -> None:
    stock = source("llava", "llama")
    state, apart = without_tower(original_names(stock))
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    place = (model_folder if how == "inside the folder" else tmp_path) / "clip"
    write_tower(place, apart, tower("clip", 5), ending)
    named = {"argument": CLIP, "config": str(place), "inside the folder": "clip"}[how]
    settings = original_settings(stock, "llava", mm_vision_tower=named)
    folder = write(model_folder, state, settings)
    given = {"vision_tower": place} if how == "argument" else {}
    assert original_config(folder, **given).vision_config.hidden_size == 128
    same_answers(stock, *load_original(folder, **given))


def test_tower_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = source("llava", "llama")
    state, apart = without_tower(original_names(stock))
    place = write_tower(tmp_path / "clip", apart, tower("clip", 5))
    folder = write(tmp_path / "model", state, original_settings(stock, "llava"))
    asked: list[tuple[str, str]] = []

    def cached(name: str, file: str) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        asked.append((name, file))
        if file != "pytorch_model.bin":
            raise EntryNotFoundError(f"no {file}")
        return str(place / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
    monkeypatch.setitem(TOWERS, CLIP[7:], Tower("openai", "clip", 128, 48, 5, 64, 24, 4))
    same_answers(stock, *load_original(folder))
    assert asked == [(CLIP, "model.safetensors"), (CLIP, "pytorch_model.bin")]


def test_tower_missing_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    stock = source("llava", "llama")
    state, _ = without_tower(original_names(stock))
    for named in (CLIP, "/data/clip-vit-large-patch14-336"):
        settings = original_settings(stock, "llava", mm_vision_tower=named)
        folder = write(tmp_path / "model", state, settings)
        with pytest.raises(ModelLoadError) as caught:
            load_original(folder)
        assert f"hf download {CLIP} --local-dir DIR" in str(caught.value)
        assert "vision_tower='DIR'" in str(caught.value)
        assert repr(named) in str(caught.value)


def test_siglip_is_cut_as_the_original_cuts_it(tmp_path: Path) -> None:
    """hidden_states[-2] of the whole tower; its last layer and head may lie in the files."""
    stock = source("onevision", "qwen2")
    settings = {**tower("siglip", 6).to_dict(), "vision_use_head": True}
    config = SiglipVisionConfig.from_dict(settings)
    torch.manual_seed(1)
    whole = SiglipVisionModel(config).eval()
    state, _ = without_tower(original_names(stock))
    raw = original_settings(stock, "llava_qwen")
    parts = {f"vision_model.{name}": tensor for name, tensor in whole.state_dict().items()}
    place = write_tower(tmp_path / "siglip", dict(parts), config)
    apart, processor = load_original(write(tmp_path / "a", state, raw), vision_tower=place)
    inside = {f"model.vision_tower.vision_tower.{name}": part for name, part in parts.items()}
    both, _ = load_original(write(tmp_path / "b", {**state, **inside}, raw), vision_tower=place)
    pixels = processor.image_processor(picture(), return_tensors="pt")["pixel_values"][0]
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[-2]
        for model in (apart, both):
            got = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            assert len(got) == 6
            assert torch.equal(got[model.config.vision_feature_layer], expected)


def test_known_towers() -> None:
    clip = tower_config(CLIP)
    assert (clip.hidden_size, clip.num_hidden_layers, clip.num_attention_heads) == (1024, 24, 16)
    assert (clip.image_size, clip.patch_size, clip.hidden_act) == (336, 14, "quick_gelu")
    assert tower_config("/data/clip-vit-large-patch14").image_size == 224
    siglip = tower_config(SIGLIP)
    assert (siglip.hidden_size, siglip.num_hidden_layers) == (1152, 26)
    assert (siglip.num_attention_heads, siglip.intermediate_size) == (16, 4304)
    # 384 pixels are 27 patches and a rest of 6.
    shapes: dict[str, tuple[int, ...]] = {
        "model.vision_tower.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "model.vision_tower.embeddings.position_embedding.weight": (729, 1152),
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        "model.vision_tower.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
    }
    assert tower_config(SIGLIP, shapes).to_dict() == siglip.to_dict()
    shapes["model.vision_tower.embeddings.position_embedding.weight"] = (728, 1152)
    with pytest.raises(ModelLoadError, match="728 patch positions"):
        tower_config(SIGLIP, shapes)
    with pytest.raises(ModelLoadError, match="incomplete or of another kind"):
        tower_config(SIGLIP, {})


def test_tower_folders_that_are_none(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    state, apart = without_tower(original_names(stock))
    folder = write(tmp_path / "model", state, original_settings(stock, "llava"))
    with pytest.raises(ModelLoadError, match=r"vision_tower: .* no folder with a config\.json"):
        load_original(folder, vision_tower=tmp_path / "nowhere")
    place = write_tower(tmp_path / "clip", apart, tower("clip", 5))
    (place / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match="lacks its weights; missing: model.safetensors or"):
        load_original(folder, vision_tower=place)
    (place / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(UnsupportedError, match="holds a 'dinov2' model"):
        load_original(folder, vision_tower=place)


# Configs
