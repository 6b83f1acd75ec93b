"""Loading: what is missing is named before the weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, LlavaConfig

from mmlm_efficient import FlowCut, load, loading
from mmlm_efficient.errors import (
    MissingExtraError,
    ModelLoadError,
    SettingsError,
    UnsupportedError,
)
from mmlm_efficient.families import family_of
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.quantization import language_model_name, skipped_modules, verify_quantized
from mmlm_efficient.settings import Config
from tests.tiny import tiny_llava, vision_config
from tests.tiny_processor import picture, save_tiny, tiny_processor

QUESTION = "where cat ?"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def refuse(kind: type[Exception], *parts: str) -> pytest.RaisesExc[Exception]:
    return pytest.raises(kind, check=lambda error: all(p in str(error) for p in parts))


# What loads


def test_local_folder_answers_like_the_model_that_was_saved(saved: Path) -> None:
    lmm = load(saved, methods=[FlowCut(keep_tokens=9)])
    assert lmm.methods == (FlowCut(keep_tokens=9),)
    assert not lmm.model.training
    stock = tiny_llava()
    inputs = dict(preprocess(tiny_processor(), [(QUESTION, picture())], torch.float32))
    expected = stock.generate(**inputs, max_new_tokens=6)
    assert torch.equal(lmm.generate(**inputs, methods=(), max_new_tokens=6), expected)
    assert lmm.ask(QUESTION, picture(), max_new_tokens=4).usage.visual_tokens_kept["layer"] == 9


def test_config_leads_to_the_same_model(saved: Path) -> None:
    config = Config.read({"model": str(saved), "methods": ["flowcut:9"], "dtype": "bfloat16"})
    lmm = load(**config.load_options())
    assert lmm.model.dtype == torch.bfloat16
    assert lmm.methods == (FlowCut(keep_tokens=9),)
    assert lmm.ask(QUESTION, picture(), max_new_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32),
    ],
)
def test_dtypes(saved: Path, dtype: Any, expected: torch.dtype) -> None:
    assert load(saved, dtype=dtype).model.dtype == expected


def test_attention_kernel_is_passed_on(saved: Path) -> None:
    model = load(saved, attn_implementation="eager").model
    assert model.config.text_config._attn_implementation == "eager"


# Settings that are refused


def test_unknown_dtype(saved: Path) -> None:
    with refuse(SettingsError, "'bfloat'", "Did you mean 'bfloat16'", "'float32'"):
        load(saved, dtype="bfloat")
    with refuse(SettingsError, "'int8'"):
        load(saved, dtype=torch.int8)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", 3.5])
def test_unknown_device(saved: Path, device: Any) -> None:
    with refuse(SettingsError, "device:", "'cpu', 'cuda'"):
        load(saved, device=device)


def test_device_that_is_not_there(saved: Path) -> None:
    number = torch.cuda.device_count() + 3
    with refuse(ModelLoadError, f"'cuda:{number}' is not there", "device='cpu'"):
        load(saved, device=f"cuda:{number}")


def test_unknown_attention_kernel(saved: Path) -> None:
    with refuse(SettingsError, "'flash'", "sdpa"):
        load(saved, attn_implementation="flash")


def test_unknown_quantization(saved: Path) -> None:
    with refuse(SettingsError, "'nf8'", "'int8', 'nf4'"):
        load(saved, quantization="nf8")  # type: ignore[arg-type]


def test_quantization_without_bitsandbytes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("mmlm_efficient.errors.importlib.import_module", absent)
    with refuse(MissingExtraError, "'bitsandbytes'", "mmlm-efficient[quantization]"):
        load(saved, quantization="nf4")


# Models that are not there


def test_pocket_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "POCKET_WEIGHTS", tmp_path / "weights")
    with refuse(ModelLoadError, "pocket", "model.safetensors", "mmlm train pocket"):
        load("pocket")


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors (or model.safetensors.index.json"),
        ("processor_config.json", "processor_config.json or preprocessor_config.json"),
        ("tokenizer.json", "tokenizer.json or tokenizer.model"),
    ],
)
def test_folder_with_a_missing_file(folder: Path, absent: str, named: str) -> None:
    (folder / absent).unlink()
    with refuse(ModelLoadError, str(folder), named):
        load(folder)


def test_folder_with_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    with refuse(ModelLoadError, "missing: model-00002-of-00002.safetensors."):
        load(folder)
    index.write_text("{}")
    with refuse(ModelLoadError, "index.json: is damaged"):
        load(folder)


def test_file_instead_of_a_folder(folder: Path) -> None:
    with refuse(ModelLoadError, "is a file", "config.json"):
        load(folder / "config.json")


def test_neither_folder_nor_hub_id() -> None:
    with refuse(ModelLoadError, "'pocket', an existing folder, nor a hub id", "mean 'pocket'"):
        load("poket")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuse(
        ModelLoadError,
        "llava-hf/llava-1.5-7b-hf: not complete on this machine",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "hf download llava-hf/llava-1.5-7b-hf --local-dir llava-1.5-7b-hf",
        "load('llava-1.5-7b-hf')",
    ):
        load("llava-hf/llava-1.5-7b-hf")


class Fetched(Exception):
    """Stands for the download of the weights."""


def hub(monkeypatch: pytest.MonkeyPatch, config: Path, weights: Path | Exception) -> None:
    """A hub that gives these."""

    def snapshot(*_: Any, **__: Any) -> str:
        if isinstance(weights, Exception):
            raise weights
        return str(weights)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(config))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_hub_id_is_checked_before_its_weights_are_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, folder / "config.json", Fetched())
    with pytest.raises(Fetched):
        load("owner/name")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refuse(UnsupportedError, "owner/name", "'gpt2'"):
        load("owner/name")


def test_hub_problems_that_are_not_the_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder / "config.json"
    hub(monkeypatch, config, OSError(28, "No space left on device"))
    with pytest.raises(ModelLoadError, match="No space left on device") as full:
        load("owner/name")
    assert "cannot be reached" not in str(full.value)
    (folder / "model.safetensors").unlink()
    hub(monkeypatch, config, folder)
    with pytest.raises(ModelLoadError, match="does not hold them") as without:
        load("owner/name")
    assert "model.safetensors" in str(without.value)
    assert "cannot be reached" not in str(without.value)


def test_methods_are_checked_before_anything_is_read(saved: Path) -> None:
    with refuse(SettingsError, "'random' and 'uniform'"):
        load("nowhere", methods=["random:4", "uniform:4"])
    with refuse(SettingsError, "did you mean 'flowcut'"):
        load("nowhere", methods="flowcat:4")
    assert load(saved, methods="flowcut:9").methods == (FlowCut(keep_tokens=9),)


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_source(source: str) -> None:
    with refuse(ModelLoadError, "source: is empty", "'pocket'"):
        load(source)


def test_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with refuse(ModelLoadError, str(folder), "cannot be read", "Permission denied"):
        load(folder)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with refuse(ModelLoadError, "config.json cannot be read"):
        load(folder)


def test_model_of_an_unsupported_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refuse(UnsupportedError, "'gpt2'", "no vision tower", "Supported: llava"):
        load(folder)


def test_an_unsupported_family_is_refused_with_the_words_of_family_of(folder: Path) -> None:
    """One check before the weights are read and on a model in memory."""
    config = LlavaConfig(text_config=GemmaConfig(), vision_config=vision_config("clip"))
    config.save_pretrained(folder)
    with pytest.raises(UnsupportedError) as before:
        load(folder)
    with pytest.raises(UnsupportedError) as after:
        family_of(SimpleNamespace(config=config))
    words = str(before.value).removeprefix(str(folder))
    assert words == str(after.value).removeprefix("SimpleNamespace")
    assert "is a 'llava' model with vision_config 'clip_vision_model', text_config 'gemma'" in words


def test_damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with refuse(ModelLoadError, "are damaged", "git lfs pull"):
        load(folder)


def test_weights_of_another_model_do_not_become_random(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refuse(ModelLoadError, "1 tensors are missing", "mlp"):
        load(folder)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with refuse(ModelLoadError, "the processor in", str(folder)):
        load(folder)


def test_home_folder_of_nobody() -> None:
    with refuse(ModelLoadError, "~nobody_of_that_name: is neither 'pocket'"):
        load("~nobody_of_that_name")


# Quantization


def test_skipped_modules_have_full_names() -> None:
    config = tiny_llava().config
    expected = ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
    assert skipped_modules(config) == expected


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are 64 wide and more: processors with bfloat16 instructions repack 4-bit
    weights in blocks of 64."""
    language = {"hidden_size": 64, "intermediate_size": 128}
    return save_tiny(tmp_path_factory.mktemp("wide"), language=language)


# Relative errors against float32. A layer of 1024 x 1024 has 0.4 % with int8 and 9 % with nf4;
# the narrow layers here are harder, and the errors of four layers add up.
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.05), ("nf4", 0.5)])
def test_quantization_touches_the_language_model_only(
    wide: Path, kind: Any, tolerance: float
) -> None:
    import bitsandbytes as bnb

    quantized = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    full, small = load(wide), load(wide, quantization=kind)
    kinds = {
        name: isinstance(module, quantized)
        for name, module in small.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert sum(kinds.values()) == 4 * 7
    for name, is_quantized in kinds.items():
        assert is_quantized == name.startswith("model.language_model."), name
    inputs = dict(preprocess(tiny_processor(), [(QUESTION, picture())], torch.float32))
    with torch.no_grad():
        expected, got = full.forward(**inputs).logits, small.forward(**inputs).logits
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < tolerance
    # Pruning decisions read the tower, which is the same.
    kept = [
        lmm.ask(QUESTION, picture(), methods="flowcut:9", max_new_tokens=2)
        .report.images[0]
        .kept.tolist()
        for lmm in (full, small)
    ]
    assert kept[0] == kept[1]


def test_quantization_is_verified(saved: Path) -> None:
    model = load(saved).model
    assert language_model_name(model) == "model.language_model"
    with refuse(ModelLoadError, "match no module: vision_tower"):
        verify_quantized(model, "int8", ["lm_head", "vision_tower"])
    with refuse(ModelLoadError, "28 inside were not", "model.language_model"):
        verify_quantized(model, "int8", ["lm_head"])
