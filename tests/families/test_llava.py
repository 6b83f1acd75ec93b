"""The llava family and the registry of families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPModel,
    GemmaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families import FAMILIES, family_of
from mmlm_efficient.families.llava import Llava
from tests import tiny


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("text", tiny.TEXTS)
def test_recognises_its_models(tower: str, text: str) -> None:
    model = tiny.tiny_llava(tower, text)
    family = family_of(model)
    assert isinstance(family, Llava)
    assert family.tower.has_cls == (tower == "clip")
    assert family.placeholders == {"image": tiny.IMAGE_TOKEN}
    assert family.max_context == 512
    assert family.grid(tiny.images(1)) == (tiny.GRID, tiny.GRID)
    (visual,) = family.visuals({"pixel_values": tiny.images(1)})
    assert family.tokens_of(visual) == tiny.tokens_per_image(model) == 36
    assert len(family.decoder.layers) == 4
    assert (family.decoder.heads, family.decoder.kv_heads, family.decoder.head_dim) == (4, 2, 8)


def stock(family: Any) -> list[torch.Tensor]:
    """The features of one image."""
    inputs = {"pixel_values": tiny.images(1)}
    return family.stock_features(inputs, family.visuals(inputs))


@pytest.mark.parametrize(("index", "layer"), [(-1, 5), (-2, 4), (6, 5), (5, 4), (-6, 0), (1, 0)])
def test_feature_layer(index: int, layer: int) -> None:
    """hidden_states[i] is the output of layer i - 1."""
    model = tiny.tiny_llava(feature_layer=index)
    family = family_of(model)
    assert family.feature_layer == layer
    outputs: list[torch.Tensor] = []
    family.tower.layers[layer].register_forward_hook(lambda _, __, out: outputs.append(out))
    projected: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: projected.append(args[0])
    )
    with torch.no_grad():
        stock(family)
    assert torch.equal(outputs[0][:, 1:], projected[0])


def test_a_list_of_feature_layers_runs_unpruned_only() -> None:
    family = family_of(tiny.tiny_llava(feature_layer=[-2, -1]))
    with torch.no_grad():
        assert stock(family)[0].shape == (36, 32)
    with pytest.raises(SettingsError, match="one feature layer"):
        _ = family.feature_layer


def test_siglip_must_use_all_tokens() -> None:
    with pytest.raises(UnsupportedError, match="a patch would be lost"):
        family_of(tiny.tiny_llava("siglip", select="default"))


def other_models() -> list[Any]:
    """Models of no family: a text model, a CLIP, and a Llava with an unknown text model."""
    text = LlamaForCausalLM(tiny.text_config("llama"))
    clip = CLIPModel.config_class(
        vision_config=tiny.vision_config("clip").to_dict(),
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    config = LlavaConfig(
        vision_config=tiny.vision_config("clip"),
        text_config=GemmaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=50,
        ),
        image_token_index=3,
    )
    return [text, CLIPModel(clip), LlavaForConditionalGeneration(config), object()]


def test_other_models_are_refused_with_the_supported_families() -> None:
    for model in other_models():
        with pytest.raises(UnsupportedError, match="no supported model family") as caught:
            family_of(model)
        for family in FAMILIES:
            assert family.name in str(caught.value)
            assert family.describes in str(caught.value)
