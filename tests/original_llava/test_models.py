"""Whole folders in the original format: the same answers as the models they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from mmlm_efficient import EfficientLMM, FlowCut, load
from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.original_llava import (
    is_original,
    load_original,
    missing_original,
    original_config,
)
from mmlm_efficient.quantization import quantization_config, skipped_modules, verify_quantized
from tests.original_llava.sources import (
    QUESTION,
    original_names,
    original_settings,
    same_answers,
    source,
    write,
    write_shards,
)
from tests.tiny import VOCAB
from tests.tiny_processor import picture


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_llava_15(tmp_path: Path, model_type: str) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, model_type))
    assert is_original(folder)
    assert missing_original(folder) == []
    model, processor = load_original(folder)
    assert type(model) is LlavaForConditionalGeneration
    assert not model.training
    assert model.config.vision_feature_select_strategy == "default"
    assert model.config.image_token_id == VOCAB
    assert model.config.text_config.vocab_size == len(model.lm_head.weight) == 128
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    same_answers(stock, model, processor)


def test_llava_next(tmp_path: Path) -> None:
    stock = source("next", "mistral", sliding_window=None)
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_mistral"))
    model, processor = load_original(folder)
    assert type(model) is LlavaNextForConditionalGeneration
    assert torch.equal(model.model.image_newline, stock.model.image_newline)
    assert model.config.text_config.model_type == "mistral"
    assert model.config.text_config.sliding_window is None
    same_answers(stock, model, processor)


def test_llava_onevision(tmp_path: Path) -> None:
    stock = source("onevision", "qwen2")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_qwen"))
    model, processor = load_original(folder)
    assert type(model) is LlavaOnevisionForConditionalGeneration
    assert model.config.vision_feature_layer == -1
    ids = [model.config.image_token_id, model.config.video_token_id]
    assert ids == processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    assert VOCAB <= ids[0] < ids[1] < model.config.text_config.vocab_size
    same_answers(stock, model, processor)


def test_tied_head(tmp_path: Path) -> None:
    stock = source("onevision", "qwen2", tie_word_embeddings=True)
    state = original_names(stock)
    settings = original_settings(stock, "llava_qwen")
    assert settings["tie_word_embeddings"]
    model, processor = load_original(write(tmp_path / "equal", state, settings))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    same_answers(stock, model, processor)
    del state["lm_head.weight"]
    model, processor = load_original(write(tmp_path / "absent", state, settings))
    same_answers(stock, model, processor)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight differs"):
        load_original(write(tmp_path / "different", state, settings))


def test_embedding_with_room_does_not_grow(tmp_path: Path) -> None:
    stock = source("llava", "llama", vocab_size=VOCAB + 1)
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava"))
    model, _ = load_original(folder)
    assert model.config.image_token_id == VOCAB
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(tmp_path: Path, ending: str) -> None:
    stock = source("llava", "llama")
    state = original_names(stock)
    folder = write(tmp_path, state, original_settings(stock, "llava"))
    write_shards(folder, state, ending)
    assert missing_original(folder) == []
    same_answers(stock, *load_original(folder))
    gone = next(folder.glob(f"*-00002.{ending}"))
    gone.unlink()
    with pytest.raises(ModelLoadError, match=f"missing: {gone.name}"):
        load_original(folder)


def test_dtypes_and_attention(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(
        tmp_path, original_names(stock), original_settings(stock, "llava", torch_dtype="float16")
    )
    assert load_original(folder)[0].dtype == torch.float16
    model, _ = load_original(folder, torch.bfloat16, "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    inverse = stock.model.language_model.rotary_emb.inv_freq
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, inverse)


def test_model_works_with_pruning(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava"))
    lmm = EfficientLMM(*load_original(folder))
    answer = lmm.ask(QUESTION, picture(), methods=[FlowCut(keep_tokens=9)], max_new_tokens=3)
    assert answer.usage.visual_tokens_in == 36
    assert answer.usage.visual_tokens_kept["layer"] == 9


def test_saved_once_it_is_a_folder_of_transformers(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    settings = original_settings(stock, "llava", use_cache=False)
    model, processor = load_original(write(tmp_path / "old", original_names(stock), settings))
    assert model.generation_config.use_cache
    model.save_pretrained(tmp_path / "new")
    processor.save_pretrained(tmp_path / "new")
    assert not is_original(tmp_path / "new")
    expected = EfficientLMM(model, processor).ask(QUESTION, picture(), max_new_tokens=4).text
    again = load(tmp_path / "new")
    assert again.ask(QUESTION, picture(), max_new_tokens=4).text == expected
    same_answers(stock, again.model, again.processor)


def test_quantized(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava"))
    skip = skipped_modules(original_config(folder))
    options = {"quantization_config": quantization_config("nf4", skip, torch.float32)}
    model, _ = load_original(folder, torch.float32, device_map={"": "cpu"}, **options)
    verify_quantized(model, "nf4", skip)
    assert torch.equal(model.lm_head.weight[:VOCAB], stock.lm_head.weight)


# The image token's rows


def test_new_rows_are_means(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava"))
    model, _ = load_original(folder)
    for got, old in (
        (model.lm_head.weight, stock.lm_head.weight),
        (model.get_input_embeddings().weight, stock.get_input_embeddings().weight),
    ):
        assert torch.equal(got[:VOCAB], old)
        assert torch.equal(got[VOCAB:], old.mean(0).expand(128 - VOCAB, -1))


# Towers
