"""Whose sink dimensions a model gets: the published ones of its language model, a calibration's,
given ones; never another model's."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Identity
from mmlm_efficient.sinks import dimensions, profiles
from mmlm_efficient.sinks.dimensions import KNOWN, known_backbone, sinks_for
from mmlm_efficient.sinks.fingerprint import Fingerprint, signs_digest
from mmlm_efficient.sinks.profiles import SinkProfile, named_profile, write_profile
from tests import tiny

LLAMA = {
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    },
    "13b": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}
LLAMA["3-8b"] = {
    **LLAMA["7b"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128320,
    "max_position_embeddings": 8192,
}
QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def llava(config_class: Any = LlavaConfig, text: Any = LlamaConfig, **sizes: Any) -> Any:
    return config_class(vision_config=CLIPVisionConfig(), text_config=text(**sizes))


def asked(config: Any, family: str, *arguments: Any, name: str = "org/some-model") -> Any:
    """`sinks_for` of a model that has only a config."""
    width = config.get_text_config().hidden_size
    identity = Identity(name, family, config.get_text_config().num_hidden_layers, width, 24)
    return sinks_for(SimpleNamespace(config=config), identity, *arguments)


# -- the table -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "family", "dims"),
    [
        (llava(**LLAMA["7b"]), "llava", (1415, 2533)),
        (llava(**{**LLAMA["7b"], "vocab_size": 32000}), "llava", (1415, 2533)),
        (llava(LlavaNextConfig, **LLAMA["7b"]), "llava_next", (1415, 2533)),
        (llava(**LLAMA["13b"]), "llava", (2100, 4743)),
        (Qwen2VLConfig(text_config=QWEN_7B), "qwen2_vl", (458, 2570)),
    ],
)
def test_published_dimensions(
    config: Any, family: str, dims: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    found = asked(config, family)
    assert (found.dims, found.threshold) == (dims, 20.0)
    assert found.source
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (llava(LlavaNextConfig, **LLAMA["3-8b"]), (788, 1384, 4062)),
        (
            llava(LlavaNextConfig, MistralConfig, **{**LLAMA["3-8b"], "vocab_size": 32064}),
            (2070,),
        ),
    ],
)
def test_dimensions_from_the_literature_are_used_with_a_warning_once(
    config: Any,
    dims: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dimensions, "_warned", set())
    with caplog.at_level(logging.WARNING, "mmlm_efficient.sinks"):
        assert asked(config, "llava_next").dims == dims
        assert asked(config, "llava_next").dims == dims
    assert len(caplog.messages) == 1
    assert "mmlm calibrate sinks --model org/some-model --images" in caplog.messages[0]


@pytest.mark.parametrize(
    ("config", "family"),
    [
        # Of the width of LLaMA-2-7B, but another model.
        (llava(**{**LLAMA["7b"], "max_position_embeddings": 2048}), "llava"),
        (llava(**{**LLAMA["7b"], "vocab_size": 32000 + 65}), "llava"),
        (llava(**{**LLAMA["7b"], "vocab_size": 31999}), "llava"),
        (llava(**{**LLAMA["7b"], "num_hidden_layers": 31}), "llava"),
        (llava(**{**LLAMA["7b"], "num_key_value_heads": 8}), "llava"),
        (llava(text=Qwen2Config, **LLAMA["7b"]), "llava"),
        (llava(**LLAMA["7b"]), "some_other_family"),
        # Qwen2-7B is known in Qwen2-VL only.
        (llava(text=Qwen2Config, **QWEN_7B), "llava_onevision"),
        (Qwen2VLConfig(text_config=QWEN_7B), "qwen2_5_vl"),
    ],
)
def test_a_model_that_is_not_known_is_sent_to_the_calibration(config: Any, family: str) -> None:
    with pytest.raises(SettingsError) as caught:
        asked(config, family, name="my models/one")
    message = str(caught.value)
    assert "mmlm calibrate sinks --model 'my models/one' --images FOLDER" in message
    assert f"{config.get_text_config().hidden_size} wide" in message
    assert "reported" not in message


def test_what_nobody_confirmed_is_mentioned_but_not_used() -> None:
    config = Qwen2_5_VLConfig(text_config=QWEN_7B)
    backbone = known_backbone(config, "qwen2_5_vl")
    assert backbone is not None
    assert backbone.status == "unconfirmed"
    with pytest.raises(SettingsError, match=r"\[458, 2570\] is reported, but nobody confirmed it"):
        asked(config, "qwen2_5_vl")


def test_the_table_makes_sense() -> None:
    for backbone in KNOWN:
        assert backbone.source
        assert len(set(backbone.dims)) == len(backbone.dims)
        if backbone.shape is not None:
            width = backbone.shape.fingerprint.hidden_size
            assert all(0 <= dim < width for dim in backbone.dims)
    shapes = [backbone.shape for backbone in KNOWN if backbone.shape is not None]
    assert len(set(shapes)) == len(shapes)


# -- given dimensions ------------------------------------------------------------------------


def test_given_dimensions_are_taken_for_any_model() -> None:
    config = llava(text=Qwen2Config, **QWEN_7B)
    found = asked(config, "llava_onevision", [7, 3583], 12)
    assert (found.dims, found.threshold, found.source) == ((7, 3583), 12.0, "given")
    with pytest.raises(SettingsError, match="sink_dims: 3584 is no dimension"):
        asked(config, "llava_onevision", [3584])
    with pytest.raises(SettingsError, match=r"sink_threshold must be a number in \(0, 59.87\)"):
        asked(config, "llava_onevision", [7], 60)


# -- profiles --------------------------------------------------------------------------------


def profile_of(model: Any, **changes: Any) -> SinkProfile:
    values: dict[str, Any] = {
        "model": "tiny",
        "family": "llava",
        "fingerprint": Fingerprint.of(model.config),
        "weights": signs_digest(model),
        "dims": (5, 11),
        "threshold": 2.5,
    }
    return SinkProfile(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of built-in profiles."""
    monkeypatch.setattr(profiles, "preset_folder", lambda _: tmp_path)
    return tmp_path / "sinks"


def test_a_built_in_profile_is_found_by_its_weights(folder: Path) -> None:
    model, identity = tiny.tiny_llava(), Identity("renamed", "llava", 4, 32, 6)
    write_profile(profile_of(tiny.tiny_llava(seed=1), dims=(1,)), folder / "a.yaml")
    write_profile(profile_of(model), folder / "b.yaml")
    found = sinks_for(model, identity)
    assert (found.dims, found.threshold) == ((5, 11), 2.5)
    assert found.source == "calibration of tiny"
    assert sinks_for(model, identity, "b").dims == (5, 11)
    assert sinks_for(model, identity, "b", 3.0).threshold == 3.0
    with pytest.raises(SettingsError, match=r"profile 'a' .*other weights.*sink_dims=\[1\]"):
        sinks_for(model, identity, "a")
    other = tiny.tiny_llava(seed=2)
    with pytest.raises(SettingsError, match="mmlm calibrate sinks"):
        sinks_for(other, identity)


def test_weights_that_were_changed_are_other_weights(folder: Path) -> None:
    model, identity = tiny.tiny_llava(), Identity("m", "llava", 4, 32, 6)
    before = copy.deepcopy(model.state_dict())
    write_profile(profile_of(model), folder / "before.yaml")
    assert sinks_for(model, identity).dims == (5, 11)
    model.load_state_dict(tiny.tiny_llava(seed=1).state_dict())
    with pytest.raises(SettingsError, match="other weights"):
        sinks_for(model, identity, "before")
    with pytest.raises(SettingsError, match="mmlm calibrate sinks"):
        sinks_for(model, identity)
    model.load_state_dict(before)
    assert sinks_for(model, identity).dims == (5, 11)


def test_a_profile_wins_over_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llava(**LLAMA["7b"])
    model = torch.nn.Linear(2, 2)
    model.config = config
    write_profile(profile_of(model, dims=(9,), threshold=18.0), folder / "own.yaml")
    identity = Identity("org/m", "llava", 32, 4096, 24)
    assert sinks_for(model, identity).dims == (9,)
    monkeypatch.setattr(dimensions, "built_in", dict)
    assert sinks_for(model, identity).dims == (1415, 2533)


def test_built_in_profiles_are_the_yaml_files_of_a_folder(folder: Path) -> None:
    assert profiles.built_in() == {}
    with pytest.raises(SettingsError, match=r"'b' is neither a file .* Built in: none\."):
        named_profile("b")
    made = {name: profile_of(tiny.tiny_llava(), dims=(place,)) for place, name in enumerate("ba")}
    for name, profile in made.items():
        write_profile(profile, folder / f"{name}.yaml")
    (folder / "notes.txt").touch()
    assert list(profiles.built_in()) == ["a", "b"]
    assert {name: named_profile(name) for name in made} == made


def test_an_unknown_name_names_the_built_in_ones(folder: Path) -> None:
    write_profile(profile_of(tiny.tiny_llava()), folder / "pocket.yaml")
    with pytest.raises(SettingsError, match=r"'pockt' is neither.*Did you mean 'pocket'\?"):
        named_profile("pockt")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file, model = tmp_path / "p.yaml", tiny.tiny_llava()
    write_profile(profile_of(model), file)
    assert named_profile(str(file)).dims == (5, 11)
    write_profile(profile_of(model, dims=(6,)), file)
    assert named_profile(str(file)).dims == (6,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "is no sink profile"),
        ("model: pocket\nfamily: llava\n", "is no sink profile"),
        ("kind: sinks\n", "Field required"),
    ],
)
def test_damaged_profiles_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        named_profile(str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (32,)}, "dims: 32 is no dimension"),
        ({"dims": ()}, "dims must be one or more"),
        ({"threshold": 5.7}, r"threshold must be a number in \(0, 5.657\)"),
        ({"weights": "?"}, "weights"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_profiles_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile_of(tiny.tiny_llava(), **changes)


# -- fingerprints ----------------------------------------------------------------------------


def test_the_digest_sees_training_and_not_the_dtype() -> None:
    model = tiny.tiny_llava()
    digest = signs_digest(model)
    assert signs_digest(tiny.tiny_llava()) == digest
    assert signs_digest(tiny.tiny_llava().to(torch.bfloat16)) == digest
    assert signs_digest(tiny.tiny_llava(seed=1)) != digest
    with torch.no_grad():
        model.lm_head.weight[0, 0] *= -1
    assert signs_digest(model) != digest


def test_two_fingerprints_say_where_they_differ() -> None:
    one = Fingerprint.of(llava(**LLAMA["7b"]))
    other = Fingerprint.of(llava(**LLAMA["13b"]))
    assert one.difference(one) is None
    assert one.difference(other) == "hidden_size is 4096 there and 5120 here"
    assert str(one) == "llama text model, 4096 wide, 32 layers"


def test_the_bytes_of_packed_weights_count() -> None:
    """4-bit weights are unsigned: their signs would say nothing."""
    model = torch.nn.Linear(2, 2)
    packed = torch.arange(12, dtype=torch.uint8)[:, None]
    model.packed = torch.nn.Parameter(packed.clone(), requires_grad=False)
    before = signs_digest(model)
    assert signs_digest(copy.deepcopy(model)) == before
    # 4-bit kernels of a CPU put them into another order when they first run.
    model.packed.data = model.packed.data.flip(0).view(6, 2)
    assert signs_digest(model) == before
    model.packed[3, 1] = 99
    assert signs_digest(model) != before
