"""`load` with folders of the original LLaVA code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm_efficient import EfficientLMM, Request, load, loading
from mmlm_efficient.errors import ModelLoadError, SettingsError, UnsupportedError
from mmlm_efficient.loading import missing_files
from mmlm_efficient.original_llava import load_original
from mmlm_efficient.quantization import skipped_modules, verify_quantized
from mmlm_efficient.settings import Config
from tests.clips import pictures
from tests.original_llava.sources import (
    original_names,
    original_settings,
    source,
    without_tower,
    write,
    write_shards,
    write_tower,
)
from tests.tiny_processor import picture, save_tiny

QUESTION = "where cat ?"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LLaVA-1.5 without its tower, and the folder of the tower."""
    folder = tmp_path_factory.mktemp("original")
    stock = source("llava", "llama")
    inside, apart = without_tower(original_names(stock))
    model = write(folder / "llava", inside, original_settings(stock, "llava"))
    return model, write_tower(folder / "clip", apart, stock.config.vision_config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stock = source("llava", "llama")
    folder = tmp_path_factory.mktemp("original") / "llava"
    return write(folder, original_names(stock), original_settings(stock, "llava"))


def test_it_answers_like_the_converted_model(parts: tuple[Path, Path]) -> None:
    folder, tower = parts
    lmm = load(folder, "flowcut:9", vision_tower=tower)
    assert lmm.name == str(folder)
    assert lmm.model.dtype == torch.float32
    assert lmm.image_fit == "pad"
    with EfficientLMM(*load_original(folder, vision_tower=tower), "flowcut:9") as expected:
        answer = expected.ask(QUESTION, picture(), max_new_tokens=4)
    got = lmm.ask(QUESTION, picture(), max_new_tokens=4)
    assert got.text == answer.text
    assert got.usage.visual_tokens_kept["layer"] == 9
    config = Config.read({"model": str(folder), "vision_tower": str(tower), "dtype": "bfloat16"})
    assert load(**config.load_options()).model.dtype == torch.bfloat16


def test_onevision_takes_videos_too(tmp_path: Path) -> None:
    stock = source("onevision", "qwen2")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_qwen"))
    lmm = load(folder)
    answers = lmm.ask_batch(
        [(QUESTION, picture()), Request(QUESTION, video=pictures(4))], "random:9", 3
    )
    assert [answer.usage.visual_tokens_kept["layer"] for answer in answers] == [9, 9]
    # 6 x 6 patches are pooled to 3 x 3.
    assert answers[1].usage.visual_tokens_in == 4 * 9 + 1


@pytest.mark.parametrize(
    ("family", "text", "model_type"),
    [("llava", "llama", "llava"), ("onevision", "qwen2", "llava_qwen")],
)
def test_saved_once_it_is_a_folder_of_transformers(
    tmp_path: Path, family: str, text: str, model_type: str
) -> None:
    stock = source(family, text)
    settings = original_settings(stock, model_type)
    lmm = load(write(tmp_path / "old", original_names(stock), settings))
    lmm.model.save_pretrained(tmp_path / "new")
    lmm.processor.save_pretrained(tmp_path / "new")
    again = load(tmp_path / "new")
    for shown in ({"image": picture()}, {"video": pictures(2)}):
        expected = lmm.ask(QUESTION, max_new_tokens=4, **shown).text
        assert again.ask(QUESTION, max_new_tokens=4, **shown).text == expected


def test_quantized(whole: Path) -> None:
    model = load(whole, quantization="int8").model
    verify_quantized(model, "int8", skipped_modules(model.config))


def test_files_that_are_missing(whole: Path, tmp_path: Path) -> None:
    assert missing_files(whole) == []
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    missing = missing_files(tmp_path)
    assert len(missing) == 2
    assert "pytorch_model.bin" in missing[0]
    assert "tokenizer" in missing[1]
    with pytest.raises(ModelLoadError, match=r"not a complete model folder; missing: .*\.bin"):
        load(tmp_path)


def test_a_tower_that_is_nowhere(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="has no vision tower.*vision_tower='DIR'"):
        load(parts[0])
    with pytest.raises(ModelLoadError, match="vision_tower: .*gone"):
        load(parts[0], vision_tower=tmp_path / "gone")


def test_tower_of_a_model_that_has_its_own(tmp_path: Path, parts: tuple[Path, Path]) -> None:
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(SettingsError, match="vision_tower: .*tiny has its vision tower"):
        load(folder, vision_tower=parts[1])


def test_unsupported_models_are_named(whole: Path, tmp_path: Path) -> None:
    settings = json.loads((whole / "config.json").read_text())
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for change, message in (
        ({"mm_projector_type": "linear"}, "mm_projector_type: 'linear'"),
        ({"mm_vision_tower": "eva"}, "mm_vision_tower: 'eva'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UnsupportedError, match=f"{tmp_path}: {message}"):
            load(tmp_path)


def test_from_the_hub_with_files_of_pickles(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(source: str, **options: Any) -> str:
        asked.update(options)
        return str(whole)

    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: str(whole / "config.json")
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    lmm = load("liuhaotian/llava-v1.5-7b")
    assert lmm.name == "liuhaotian/llava-v1.5-7b"
    assert "pytorch_model*.bin" in asked["allow_patterns"]
    assert "pytorch_model*.bin" not in loading._HUB_FILES


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_shard_that_is_missing(tmp_path: Path, ending: str) -> None:
    stock = source("llava", "llama")
    state = original_names(stock)
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    write_shards(folder, state, ending)
    assert missing_files(folder) == []
    gone = next(folder.glob(f"*-00002-of-00002.{ending}"))
    gone.unlink()
    assert missing_files(folder) == [gone.name]
