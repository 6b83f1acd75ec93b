"""The contract with transformers: every extension point that we rely on, one test each.

These tests run first. When one fails after an upgrade, its message names what is missing and which
file of ours depends on it; fix that file before looking at any other failure.
"""

from __future__ import annotations

import importlib
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

from mmlm_efficient.stations.handed import CACHE
from tests import tiny, tiny_families

I = tiny.IMAGE_TOKEN  # noqa: E741
TOWER = "stations/tower.py"
BRIDGE = "stations/bridge.py and prepare.py"
LAYER = "stations/layer.py"
FAMILY = "families/llava.py"
ANYRES = "families/llava_next.py and families/llava_onevision.py"
QWEN = "families/qwen_vl.py"
PACKED = "families/packed.py and stations/packed_tower.py"


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
    for name in ("attention_mask", "position_ids", "position_embeddings", CACHE):
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
        **{CACHE: cache},
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


# -- LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL -----------------------------------------


@pytest.mark.parametrize("family", tiny_families.LLAVA)
def test_parts_of_tiled_models(family: str) -> None:
    model = tiny_families.tiny_model(family)
    paths = [
        "model.vision_tower.encoder.layers",
        "model.vision_tower.embeddings",
        "model.multi_modal_projector",
        "model.language_model.layers",
        "model.image_newline",
        "model.get_image_features",
        "model.pack_image_features",
        "config.image_grid_pinpoints",
        "config.image_token_id",
        "config.vision_config.image_size",
        "config.vision_config.patch_size",
        "config.vision_feature_layer",
        "config.vision_feature_select_strategy",
    ]
    if family == "llava_onevision":
        paths += [
            "model.get_video_features",
            "model.apply_pooling",
            "config.vision_aspect_ratio",
            "config.video_token_id",
        ]
    for path in paths:
        need(has_path(model, path), f"{type(model).__name__}.{path}", ANYRES)
    wanted = {
        "llava_next": ["vision_feature_select_strategy", "image_newline"],
        "llava_onevision": ["image_newline", "vision_aspect_ratio"],
    }[family]
    names = list(inspect.signature(model.model.pack_image_features).parameters)
    need(
        names == ["image_features", "image_sizes", *wanted],
        f"pack_image_features(image_features, image_sizes, {', '.join(wanted)})",
        ANYRES,
    )
    features = inspect.signature(model.model.get_image_features).parameters
    need(list(features)[:2] == ["pixel_values", "image_sizes"], "get_image_features()", ANYRES)
    if family == "llava_onevision":
        need("batch_num_images" in features, "get_image_features(batch_num_images=)", ANYRES)


@pytest.mark.parametrize("family", tiny_families.LLAVA)
def test_packing_takes_any_width_and_gives_one_tensor_per_image(family: str) -> None:
    model = tiny_families.tiny_model(family)
    inputs = tiny_families.sample_inputs(family, "one")
    crops, size = inputs["pixel_values"].shape[1], inputs["image_sizes"].tolist()
    grid = tiny_families.NEXT_GRID if family == "llava_next" else tiny_families.ONEVISION_GRID
    options: dict[str, Any] = {"vision_feature_select_strategy": "full"}
    if family == "llava_onevision":
        options = {"vision_aspect_ratio": "anyres_max_9"}
    packed, _ = model.model.pack_image_features(
        [torch.ones(crops, grid**2, 2)], size, image_newline=torch.zeros(2), **options
    )
    count = int((inputs["input_ids"] == tiny_families.IMAGE).sum())
    need(packed[0].shape == (count, 2), "pack_image_features for values of any width", ANYRES)
    with torch.no_grad():
        output = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        )
    need(
        isinstance(output.pooler_output, list) and len(output.pooler_output[0]) == count,
        "get_image_features().pooler_output as one packed tensor per image",
        ANYRES,
    )


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_number_of_crops_of_a_picture(name: str) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    count = getattr(module, "image_size_to_num_patches", None)
    need(count, f"{name}: image_size_to_num_patches", ANYRES)
    need(
        count is not None and count((40, 30), [[24, 24], [48, 48]], 24) == 5,
        f"{name}: image_size_to_num_patches((height, width), pinpoints, side of a tile)",
        ANYRES,
    )


def test_video_features_of_onevision_are_flattened() -> None:
    model = tiny_families.tiny_model("llava_onevision")
    inputs = tiny_families.sample_inputs("llava_onevision", "video")
    with torch.no_grad():
        want = model(**inputs).logits
        features = model.model.get_video_features(
            inputs.pop("pixel_values_videos"), return_dict=True
        )
        # One entry per token: videos of different lengths.
        features.pooler_output = features.pooler_output.flatten(0, 1).unsqueeze(1)
        got = model(**inputs, mm_encoder_outputs={"video": features}).logits
    need(torch.equal(got, want), "video features of any split over the first two axes", ANYRES)


@pytest.mark.parametrize("family", tiny_families.QWEN)
def test_parts_of_qwen_models(family: str) -> None:
    model = tiny_families.tiny_model(family)
    for path in (
        "model.visual.blocks",
        "model.visual.merger",
        "model.visual.dtype",
        "model.visual.config.num_heads",
        "model.visual.config.spatial_merge_size",
        "model.language_model.layers",
        "model.language_model.rotary_emb",
        "model.get_image_features",
        "model.get_video_features",
        "model.get_rope_index",
        "config.image_token_id",
        "config.video_token_id",
        "config.vision_config.in_channels",
        "config.vision_config.patch_size",
        "config.vision_config.temporal_patch_size",
    ):
        need(has_path(model, path), f"{type(model).__name__}.{path}", QWEN)
    for name in ("attn.qkv", "norm1"):
        need(has_path(model.model.visual.blocks[0], name), f"visual.blocks[i].{name}", PACKED)
    if family == "qwen2_5_vl":
        for name in ("fullatt_block_indexes", "window_size"):
            need(hasattr(model.model.visual.config, name), f"visual.config.{name}", PACKED)
    for name in ("q_proj", "k_proj", "v_proj", "head_dim"):
        attention = model.model.language_model.layers[0].self_attn
        need(hasattr(attention, name), f"decoder attention.{name}", QWEN)


@pytest.mark.parametrize("family", tiny_families.QWEN)
def test_blocks_and_merger_of_packed_towers(family: str) -> None:
    model = tiny_families.tiny_model(family)
    inputs = tiny_families.sample_inputs(family, "several")
    seen: list[tuple[Any, Any, Any]] = []
    merged: list[tuple[Any, torch.Tensor]] = []
    visual = model.model.visual
    visual.blocks[0].register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    visual.merger.register_forward_hook(lambda _, args, out: merged.append((args, out)))
    with torch.no_grad():
        output = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    args, kwargs, out = seen[0]
    patches = len(inputs["pixel_values"])
    need(args[0].shape == out.shape and len(out) == patches, "blocks [S, C] -> [S, C]", PACKED)
    given = {**dict(zip(("cu_seqlens", "position_embeddings"), args[1:], strict=False)), **kwargs}
    for name in ("cu_seqlens", "position_embeddings"):
        need(name in given, f"argument {name} of a block", PACKED)
    need(
        len(merged) == 1 and merged[0][1].shape == (patches // 4, 32),
        "one call of the merger that makes one token of four consecutive patches",
        PACKED,
    )
    sizes = [len(one) for one in output.pooler_output]
    want = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    need(sizes == want, "get_image_features().pooler_output as one tensor per image", QWEN)


@pytest.mark.parametrize("family", tiny_families.QWEN)
def test_positions_along_three_axes(family: str) -> None:
    model = tiny_families.tiny_model(family)
    names = set(inspect.signature(model.model.get_rope_index).parameters)
    wanted = {
        *("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask"),
        *(("second_per_grid_ts",) if family == "qwen2_5_vl" else ()),
    }
    for name in sorted(wanted):
        need(name in names, f"get_rope_index({name}=)", QWEN)
    inputs = tiny_families.sample_inputs(family, "mixed")
    positions, _ = model.model.get_rope_index(
        **{name: inputs[name] for name in names & set(inputs)}
    )
    need(positions.shape == (3, *inputs["input_ids"].shape), "positions [3, B, S]", QWEN)
    seen: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model.generate(**inputs, position_ids=positions + 7, max_new_tokens=2, do_sample=False)
    need(torch.equal(seen[0][-3:], positions + 7), "generate(position_ids=[3, B, S])", QWEN)
    need(
        torch.equal(seen[1][-3:], positions[..., -1:] + 8),
        "generate(position_ids=[3, B, S]) continued from the last",
        QWEN,
    )


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_features_are_handed_over_in_every_family(family: str) -> None:
    model = tiny_families.tiny_model(family)
    inputs = tiny_families.sample_inputs(family, "several")
    where = QWEN if family in tiny_families.QWEN else ANYRES
    need("mm_encoder_outputs" in inspect.signature(model.forward).parameters, "forward()", where)
    used = ("pixel_values", "image_sizes", "batch_num_images")
    with torch.no_grad():
        want = model(**inputs).logits
        names = ("image_grid_thw",) if family in tiny_families.QWEN else used[1:]
        features = model.model.get_image_features(
            inputs["pixel_values"],
            **{name: inputs[name] for name in names if name in inputs},
            return_dict=True,
        )
        features.pooler_output = list(features.pooler_output)
        left = {name: value for name, value in inputs.items() if name not in used}
        got = model(**left, mm_encoder_outputs={"image": features}).logits
    need(torch.equal(got, want), "identical results with mm_encoder_outputs", where)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_beams_get_the_features_of_their_own_prompt(family: str) -> None:
    need(
        hasattr(GenerationMixin, "_expand_multimodal_outputs"),
        "generate(num_beams=, mm_encoder_outputs=)",
        BRIDGE,
    )
    model = tiny_families.tiny_model(family)
    inputs = tiny_families.sample_inputs(family, "several")
    options: dict[str, Any] = {
        "max_new_tokens": 2,
        "num_beams": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with torch.no_grad():
        together = model.generate(**inputs, **options).sequences_scores
        alone = [
            model.generate(
                **tiny_families.sample_inputs(family, "several", sample=sample), **options
            ).sequences_scores
            for sample in range(3)
        ]
    need(
        torch.allclose(together, torch.cat(alone), atol=1e-4),
        "beams that see the images of their own prompt",
        BRIDGE,
    )


def test_processors_work_on_pictures_without_torchvision() -> None:
    where = "prompts.py and original_llava/processor.py"
    for family in tiny_families.FAMILIES:
        processor = tiny_families.tiny_processor(family)
        for name in ("image_token", "image_processor", "tokenizer"):
            need(hasattr(processor, name), f"{type(processor).__name__}.{name}", where)
        inputs = tiny_families.sample_inputs(family, "several")
        beside = "image_grid_thw" if family in tiny_families.QWEN else "image_sizes"
        need(len(inputs[beside]) == 4, f"{beside} of the PIL image processor of {family}", where)
