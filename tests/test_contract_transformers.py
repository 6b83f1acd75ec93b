"""The contract with transformers: every extension point that we rely on, one test each.

These tests run first. When one fails after an upgrade, its message names what is missing and which
file of ours depends on it; fix that file before looking at any other failure.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
TOWER = "stations/tower.py"
BRIDGE = "stations/bridge.py and prepare.py"
LAYER = "stations/layer.py"
FAMILY = "families/llava.py"


def need(condition: object, what: str, where: str) -> None:
    """Fail with what transformers no longer offers and who needs it."""
    if not condition:
        pytest.fail(f"transformers no longer offers: {what} (needed by mmlm_efficient/{where})")


def has_path(root: Any, path: str) -> bool:
    """Whether root.a.b.c exists."""
    for name in path.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("text", tiny.TEXTS)
def test_parts_of_the_model(tower: str, text: str) -> None:
    model = tiny.tiny_llava(tower, text)
    for path in (
        "model.vision_tower.encoder.layers",
        "model.vision_tower.embeddings",
        "model.vision_tower.config.num_attention_heads",
        "model.language_model.layers",
        "model.language_model.rotary_emb",
        "model.language_model.config.num_key_value_heads",
        "model.get_image_features",
        "config.image_token_id",
        "config.vision_feature_layer",
        "config.vision_feature_select_strategy",
        "config.vision_config.patch_size",
        "config.text_config.max_position_embeddings",
    ):
        need(has_path(model, path), f"{type(model).__name__}.{path}", FAMILY)
    for layers in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            need(has_path(layers[0], name), f"{type(layers[0]).__name__}.{name}", FAMILY)
    need(
        has_path(model.model.language_model.layers[0], "self_attn.head_dim"),
        "attn.head_dim",
        FAMILY,
    )
    embeddings = model.model.vision_tower.embeddings
    need(
        hasattr(embeddings, "class_embedding") == (tower == "clip"),
        "class_embedding on CLIP's embeddings and not on SigLIP's",
        FAMILY,
    )


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_tower_layers_take_and_give_plain_hidden_states(tower: str) -> None:
    model = tiny.tiny_llava(tower)
    seen: list[tuple[Any, Any, Any]] = []
    order: list[str] = []
    layer = model.model.vision_tower.encoder.layers[0]
    layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).register_forward_hook(lambda *_, n=name: order.append(n))
    layer.self_attn.register_forward_hook(lambda *_: order.append("attention"))
    with torch.no_grad():
        model.model.get_image_features(pixel_values=tiny.images(1))
    args, kwargs, output = seen[0]
    need(isinstance(args[0], torch.Tensor), "hidden states as first argument of a layer", TOWER)
    need(len(args) > 1 or "attention_mask" in kwargs, "attention_mask argument of a layer", TOWER)
    need(isinstance(output, torch.Tensor), "a plain tensor as output of a tower layer", TOWER)
    need(
        sorted(order[:3]) == ["k_proj", "q_proj", "v_proj"] and order[3] == "attention",
        "q, k, v projected inside the self-attention module, once each",
        TOWER,
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_tower_layers_obey_a_broadcast_key_mask(tower: str, attn: str) -> None:
    model = tiny.tiny_llava(tower, attn=attn)
    layer, config = model.model.vision_tower.encoder.layers[0], model.model.vision_tower.config
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 32)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    mask = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid)
    need(isinstance(mask, torch.Tensor) and mask.ndim == 4, "a 4D bidirectional mask", TOWER)
    with torch.no_grad():
        got = layer(hidden, mask[:, :, :1])
        want = layer(hidden[1:, :6], None)
    need(torch.allclose(got[1, :6], want[0], atol=1e-5), "masking of keys in tower layers", TOWER)


@pytest.mark.parametrize("before", [True, False])
def test_a_prepended_hook_comes_before_the_recorder(before: bool) -> None:
    model = tiny.tiny_llava()
    tower = model.model.vision_tower
    pixels = tiny.images(1)

    def shorten(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output[:, :5]

    with torch.no_grad():
        if not before:
            tower(pixels, output_hidden_states=True)
        tower.encoder.layers[2].register_forward_hook(shorten, prepend=True)
        states = tower(pixels, output_hidden_states=True).hidden_states
    need(
        [s.shape[1] for s in states] == [37] * 3 + [5] * 4,
        "recording of hidden states after hooks registered with prepend=True",
        TOWER,
    )


def test_image_features_request_one_hidden_state() -> None:
    model = tiny.tiny_llava(feature_layer=-2)
    with torch.no_grad():
        output = model.model.get_image_features(pixel_values=tiny.images(2), return_dict=True)
    states = output.hidden_states
    need(sum(state is not None for state in states) == 1, "capturing the feature layer only", TOWER)
    need(
        isinstance(output.pooler_output, list) and len(output.pooler_output) == 2,
        "get_image_features().pooler_output as one tensor per image",
        FAMILY,
    )


def test_mm_encoder_outputs_replace_pixels() -> None:
    model = tiny.tiny_llava()
    parameters = inspect.signature(model.forward).parameters
    need("mm_encoder_outputs" in parameters, "forward(mm_encoder_outputs=)", BRIDGE)
    need("position_ids" in parameters, "forward(position_ids=)", BRIDGE)
    inputs = tiny.batch([tiny.prompt(1, I, 5)], tiny.images(1))
    with torch.no_grad():
        want = model(**inputs).logits
        features = model.model.get_image_features(
            pixel_values=inputs.pop("pixel_values"), return_dict=True
        )
        got = model(**inputs, mm_encoder_outputs={"image": features}).logits
    need(torch.equal(got, want), "identical results with mm_encoder_outputs", BRIDGE)


def test_features_of_uneven_counts_fill_placeholders_in_order() -> None:
    model = tiny.tiny_llava()
    inputs = tiny.batch([[1, I, I, 5, I], [1, I, 7]])
    torch.manual_seed(0)
    rows = [torch.randn(2, 32), torch.randn(1, 32), torch.randn(1, 32)]
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    seen: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(
            **inputs, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=rows)}
        )
    got = seen[0][inputs["input_ids"] == I]
    need(torch.equal(got, torch.cat(rows)), "a list of uneven features as pooler_output", BRIDGE)


def test_generate_continues_given_position_ids() -> None:
    model = tiny.tiny_llava()
    seen: list[list[int]] = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    with torch.no_grad():
        model.generate(
            input_ids=torch.tensor([[1, 5, 6]]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            position_ids=torch.tensor([[0, 4, 9]]),
            max_new_tokens=3,
            do_sample=False,
        )
    need(seen == [[0, 4, 9], [10], [11]], "generate(position_ids=) continued from the last", BRIDGE)
    need(hasattr(GenerationMixin, "_update_model_kwargs_for_generation"), "position update", BRIDGE)


@pytest.mark.parametrize("text", tiny.TEXTS)
def test_decoder_layers_get_what_the_layer_station_replaces(text: str) -> None:
    model = tiny.tiny_llava("clip", text)
    seen: list[tuple[Any, Any, Any]] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True)
    args, kwargs, output = seen[0]
    need(len(args) == 1, "hidden states as only positional argument of a decoder layer", LAYER)
    for name in ("attention_mask", "position_ids", "position_embeddings", "past_key_values"):
        need(name in kwargs, f"keyword argument {name} of a decoder layer", LAYER)
    need(isinstance(output, torch.Tensor), "a plain tensor as output of a decoder layer", LAYER)
    cos, sin = kwargs["position_embeddings"]
    again = model.model.language_model.rotary_emb(args[0], kwargs["position_ids"])
    need(
        torch.equal(cos, again[0]) and torch.equal(sin, again[1]),
        "rotary_emb(hidden states, position ids) -> (cos, sin)",
        LAYER,
    )


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_masks_are_sized_by_cache_layer(create: Any) -> None:
    need(
        "layer_idx" in inspect.signature(create).parameters, f"{create.__name__}(layer_idx=)", LAYER
    )
    config = tiny.text_config("mistral", sliding_window=4, attn_implementation="eager")
    cache = DynamicCache(config=config)
    cache.update(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), 0)
    cache.update(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8), 1)
    mask = create(
        config=config,
        inputs_embeds=torch.zeros(1, 1, 32),
        attention_mask=None,
        past_key_values=cache,
        layer_idx=1,
    )
    need(mask.shape[-1] == 3, "a mask of the length of the given cache layer", LAYER)
    need(cache.get_seq_length(1) == 2, "DynamicCache with its own length per layer", LAYER)
    need(hasattr(cache, "is_compileable"), "Cache.is_compileable", LAYER)


def test_sliding_layers_are_named_in_the_config() -> None:
    qwen = tiny.text_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    need(
        list(qwen.layer_types) == ["full_attention"] + ["sliding_attention"] * 3,
        "layer_types of Qwen2",
        FAMILY,
    )
    need(
        tiny.text_config("mistral", sliding_window=8).sliding_window == 8, "sliding_window", FAMILY
    )
