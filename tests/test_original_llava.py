"""Original LLaVA checkpoints: tiny models written under the original names must come back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip import CLIPImageProcessorPil

from mmlm_efficient import EfficientLMM, FlowCut, load
from mmlm_efficient.errors import ModelLoadError, UnsupportedError
from mmlm_efficient.original_llava import (
    converted_config,
    converted_state,
    is_original,
    load_original,
    missing_original,
    original_config,
)
from mmlm_efficient.original_llava.config import TOWERS, Tower, tower_config
from mmlm_efficient.original_llava.processor import chat_template, original_tokenizer
from mmlm_efficient.quantization import quantization_config, skipped_modules, verify_quantized
from tests.tiny import VOCAB, text_config
from tests.tiny_processor import picture, save_tiny

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP = "google/siglip-so400m-patch14-384"
SPARE = VOCAB - 1  # the image token of the source models; no text uses it
QUESTION = "where cat ?"
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24]]


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """VOCAB words, one token each, and no image token."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:", "where", "cat", "?", *more]
    words += [f"w{number}" for number in range(len(words), VOCAB)]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tower(kind: str, layers: int) -> Any:
    """A tower with heads as wide as those of the towers that are known by name."""
    sizes = {"num_hidden_layers": layers, "intermediate_size": 48, "image_size": 24}
    sizes |= {"patch_size": 4, "num_attention_heads": 2}
    if kind == "siglip":
        return SiglipVisionConfig(hidden_size=144, vision_use_head=False, **sizes)  # type: ignore[arg-type]
    return CLIPVisionConfig(hidden_size=128, **sizes)  # type: ignore[arg-type]


def source(family: str, text: str, **language: Any) -> Any:
    """A random model of transformers in eval mode."""
    shared: dict[str, Any] = {
        "vision_config": tower("siglip" if family == "onevision" else "clip", 5),
        "text_config": text_config(text, layers=2, **language),
        "image_token_index": SPARE,
    }
    torch.manual_seed(0)
    if family == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()
    # transformers counts (height, width), the original (width, height).
    shared["image_grid_pinpoints"] = [[height, width] for width, height in PINPOINTS]
    if family == "next":
        return LlavaNextForConditionalGeneration(LlavaNextConfig(**shared)).eval()
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            **shared, video_token_index=SPARE - 1, vision_aspect_ratio="anyres_max_4"
        )
    ).eval()


def original_names(model: Any) -> dict[str, Tensor]:
    """The model's tensors as the original code stores them, buffers of old versions included."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
        state[name] = tensor.clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    prefix = "model.vision_tower.vision_tower.vision_model"
    state[f"{prefix}.embeddings.position_ids"] = torch.arange(37)[None]
    return state


def original_settings(model: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """The flat config.json of the original code."""
    settings = model.config.text_config.to_dict()
    rope = settings.pop("rope_parameters")
    settings.pop("dtype")
    onevision = model.config.model_type == "llava_onevision"
    settings |= {
        "model_type": model_type,
        "architectures": ["LlavaLlamaForCausalLM"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "mm_vision_tower": SIGLIP if onevision else CLIP,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 128,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    if model.config.model_type != "llava":
        settings["image_aspect_ratio"] = "anyres_max_4" if onevision else "anyres"
        settings |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    return {**settings, **more}


def write(folder: Path, state: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    """A folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer().save_pretrained(folder)
    return folder


def write_shards(folder: Path, state: dict[str, Tensor], ending: str) -> None:
    """The state in two files with an index, instead of the one that is there."""
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = list(state)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        tensors = {name: state[name] for name in part}
        if ending == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": places}))


def same_answers(original: Any, model: Any, processor: Any) -> None:
    """Bit-identical logits of the old tokens, on text and with a picture."""
    head = model.lm_head.weight[:VOCAB].clone()  # a product with more columns may round otherwise
    for pictures, words in ((None, "where cat ?"), (picture(), "where <image> cat ?")):
        inputs = dict(processor(images=pictures, text=words, return_tensors="pt"))
        inputs.pop("mm_token_type_ids", None)
        is_image = inputs["input_ids"] == model.config.image_token_id
        assert bool(is_image.any()) == (pictures is not None)
        old = {**inputs, "input_ids": inputs["input_ids"].masked_fill(is_image, SPARE)}
        with torch.no_grad():
            expected = original(**old).logits[..., :VOCAB]
            got = model(**inputs).logits
            hidden = model.model(**inputs).last_hidden_state
            assert torch.equal(torch.nn.functional.linear(hidden, head), expected)
        assert torch.allclose(got[..., :VOCAB], expected, atol=1e-6, rtol=0)
        assert got.argmax(-1).max() < VOCAB


# Round trips


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
    pytest.importorskip("bitsandbytes")
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


def without_tower(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    prefix = "model.vision_tower.vision_tower."
    inside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    apart = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return inside, apart


def write_tower(folder: Path, state: dict[str, Tensor], config: Any, ending: str = "bin") -> Path:
    """A folder as of openai/clip-vit-*: the text model and the projections are there too."""
    folder.mkdir()
    state |= {"text_model.final_layer_norm.bias": torch.ones(3), "logit_scale": torch.ones(())}
    state |= {"visual_projection.weight": torch.ones(3, 3)}
    if ending == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    kind = config.model_type.removesuffix("_vision_model")
    whole = {"model_type": kind, "vision_config": config.to_dict(), "text_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


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


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A complete folder that a test may damage."""
    stock = source("llava", "llama")
    return write(tmp_path / "good", original_names(stock), original_settings(stock, "llava"))


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


def expand_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", [(40, 30), (31, 44), (24, 24)])
def test_pictures_of_llava_15_are_padded(good: Path, size: tuple[int, int]) -> None:
    _, processor = load_original(good)
    stock = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    image = picture(size=size)
    color = tuple(int(255 * value) for value in stock.image_mean)
    assert color == (122, 116, 104)
    got = processor.image_processor(image, return_tensors="np")["pixel_values"]
    expected = stock(expand_to_square(image, color), return_tensors="np")["pixel_values"]
    assert np.array_equal(got, expected)


def test_pictures_without_pad_are_cropped(good: Path) -> None:
    settings = json.loads((good / "config.json").read_text())
    del settings["image_aspect_ratio"]
    (good / "config.json").write_text(json.dumps(settings))
    _, processor = load_original(good)
    stock = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    got = processor.image_processor(picture(), return_tensors="np")["pixel_values"]
    assert np.array_equal(got, stock(picture(), return_tensors="np")["pixel_values"])


def test_of_two_equal_grids_the_first_of_the_original_is_taken(tmp_path: Path) -> None:
    """A small square picture fits 24 wide, 48 high as well as 48 wide, 24 high."""
    stock = source("next", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_llama"))
    model, processor = load_original(folder)
    square = Image.new("RGB", (20, 20), (255, 255, 255))
    crops = processor.image_processor(square, return_tensors="np")["pixel_values"][0]
    black = -np.array([0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert len(crops) == 3
    # The bars are above and below: the upper crop is black in its first row, not its first column.
    assert np.allclose(crops[1][:, 0, 12], black, atol=1e-4)
    assert not np.allclose(crops[1][:, 12, 0], black, atol=1e-1)
    assert model.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints


def test_onevision_pictures(tmp_path: Path) -> None:
    stock = source("onevision", "qwen2")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_qwen"))
    _, processor = load_original(folder)
    white = Image.new("RGB", (24, 24), (255, 255, 255))
    crops = processor.image_processor(white, return_tensors="np")["pixel_values"][0]
    assert np.allclose(crops[0], 1.0)  # (1 - 0.5) / 0.5
    assert crops[0].shape == (3, 24, 24)


MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q1"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
    {"role": "user", "content": "Q2"},
]
SYSTEM = {"role": "system", "content": "S"}
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. "
)


@pytest.mark.parametrize(
    ("model_type", "words", "prompt", "with_system"),
    [
        (
            "llava",
            [],
            VICUNA + "USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
            "S USER: Q2 ASSISTANT:",
        ),
        (
            "llava_mistral",
            [],
            "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ2 [/INST]",
        ),
        (
            "llava_llama",
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1"
            "<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|>"
            "<|im_start|>assistant\n",
            "<|im_start|>system\nS<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
        ),
        (
            "llava_qwen",
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2"
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_conversation_styles(
    model_type: str, words: list[str], prompt: str, with_system: str
) -> None:
    chosen = tokenizer(*words)
    chosen.add_tokens(["<image>"], special_tokens=True)
    chosen.chat_template = chat_template(model_type, chosen)
    write_it: Any = chosen.apply_chat_template
    options = {"tokenize": False, "add_generation_prompt": True}
    assert write_it(MESSAGES, **options) == prompt
    assert write_it([SYSTEM, MESSAGES[-1]], **options) == with_system


def test_conversation_style_that_is_not_supported() -> None:
    with pytest.raises(UnsupportedError, match="Llama 3"):
        chat_template("llava_llama", tokenizer("<|start_header_id|>"))


@pytest.mark.parametrize(("scheme", "between"), [("first", " \n"), ("always", "\n")])
def test_ids_after_an_image_are_those_of_the_original(scheme: str, between: str) -> None:
    """The original tokenizes what follows an image as a text of its own."""
    letters = ["<unk>", "▁", "\n", *"What"]
    inner = Tokenizer(BPE({x: i for i, x in enumerate(dict.fromkeys(letters))}, []))
    inner.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[arg-type]
    chosen = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    chosen.add_tokens(["<image>"], special_tokens=True)
    assert ("'<image>" + between.replace("\n", "\\n") + "'") in chat_template("llava", chosen)
    image = chosen.convert_tokens_to_ids("<image>")
    ids = chosen.encode(f"<image>{between}What", add_special_tokens=False)
    assert ids[ids.index(image) + 1 :] == chosen.encode("\nWhat", add_special_tokens=False)


@pytest.fixture(scope="module", params=[True, False], ids=["space", "no space"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model that begins a text with a space, as Vicuna's, or not, as Yi's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "words.txt").write_text("What is shown in this picture? USER ASSISTANT\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_ids_are_those_of_sentencepiece(
    pieces: Path, tmp_path: Path, text: str, legacy: bool | None
) -> None:
    """The original's slow tokenizer on each piece of the prompt between the images."""
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    settings |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = LlavaConfig(text_config=text_config(text, vocab_size=310))
    chosen = original_tokenizer(tmp_path, config)
    chosen.chat_template = chat_template(f"llava_{text}", chosen)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    prompt = chosen.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    before, after = prompt.replace("<image> \n", "<image>\n").split("<image>")
    image = chosen.convert_tokens_to_ids("<image>")
    assert image == 310
    expected = [1, *reference.encode(before), image, *reference.encode(after)]
    assert chosen(prompt).input_ids == expected


def test_end_and_padding_tokens(tmp_path: Path) -> None:
    stock = source("llava", "llama")
    folder = write(tmp_path, original_names(stock), original_settings(stock, "llava_llama"))
    tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model, processor = load_original(folder)
    assert model.generation_config.eos_token_id == [2, 7, 10]
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == 10
    assert processor.tokenizer.pad_token == "<unk>"
    assert model.generation_config.pad_token_id == 3


def test_sampled_new_rows_are_bounded() -> None:
    """The mean of the logits has at most the share of one token among the old ones."""
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    new = 128 - VOCAB
    grown = torch.cat([logits, logits.mean(-1, keepdim=True).expand(-1, new)], -1)
    assert (grown.softmax(-1)[:, VOCAB:].sum(-1) < new / VOCAB).all()
    assert math.isclose(new / VOCAB, 31 / 97)
