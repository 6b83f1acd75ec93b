"""Original folders that are incomplete or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.original_llava import (
    converted_state,
    load_original,
    missing_original,
)
from tests.original_llava.sources import (
    original_names,
    original_settings,
    same_answers,
    source,
    write,
    write_shards,
)
from tests.tiny import VOCAB


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        ("tokenizer.json", "tokenizer.json or tokenizer.model"),
        ("model.safetensors", "model.safetensors or pytorch_model.bin"),
        ("config.json", "config.json"),
    ],
)
def test_missing_file(good: Path, absent: str, words: str) -> None:
    (good / absent).unlink()
    assert any(words in one for one in missing_original(good))
    with pytest.raises(ModelLoadError, match=words):
        load_original(good)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ],
)
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    stock = source("llava", "llama")
    state = original_names(stock)
    del state[name]
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    with pytest.raises(ModelLoadError) as caught:
        load_original(folder)
    assert f"1 tensors are missing from the weights, such as {name}." in str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.vision_resampler.query", "model.layers.7.mlp.up_proj.weight"]
)
def test_left_over_tensor(tmp_path: Path, name: str) -> None:
    stock = source("llava", "llama")
    state = {**original_names(stock), name: torch.ones(2)}
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    with pytest.raises(ModelLoadError) as caught:
        load_original(folder)
    assert f"1 tensors of the weights have no place in the model: {name}." in str(caught.value)


def test_newline_that_llava_15_never_reads_is_left_out(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    state = {**original_names(stock), "model.image_newline": torch.ones(32)}
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    same_answers(stock, *load_original(folder))


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    state = original_names(stock)
    state["model.mm_projector.0.bias"] = torch.ones(7)
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    with pytest.raises(ModelLoadError, match=r"model\.mm_projector\.0\.bias: .*\[7\].*\[32\]"):
        load_original(folder)
    state = original_names(stock)
    folder = write(tmp_path, state, original_settings(stock, "llava", vocab_size=5))
    with pytest.raises(ModelLoadError, match=f"has {VOCAB} rows, but vocab_size .* is 5"):
        load_original(folder)


def test_converted_state_names() -> None:
    one = torch.ones(1)
    converted = converted_state({"model.norm.weight": one, "model.image_newline": one})
    assert set(converted) == {"model.language_model.norm.weight", "model.image_newline"}
    with pytest.raises(ModelLoadError, match="have no place in the model: model.what"):
        converted_state({"model.what": one})


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_truncated_shard(good: Path, ending: str) -> None:
    stock = source("llava", "llama")
    write_shards(good, original_names(stock), ending)
    shard = next(good.glob(f"*-00002-of-00002.{ending}"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError) as caught:
        load_original(good)
    assert shard.name in str(caught.value)
    assert "is damaged, truncated" in str(caught.value)


def test_pickles_are_not_run(good: Path) -> None:
    (good / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("x")}, good / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="holds more than tensors"):
        load_original(good)


def test_damaged_index(good: Path) -> None:
    (good / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"index\.json: is damaged"):
        load_original(good)


def test_damaged_tokenizer(good: Path) -> None:
    (good / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="the tokenizer in .* cannot be read"):
        load_original(good)


def test_sentencepiece_that_is_not_installed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (good / "tokenizer.json").unlink()
    (good / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install sentencepiece protobuf"):
        load_original(good)


# Processor
