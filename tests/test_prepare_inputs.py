"""Model inputs that pruning cannot follow: refused by name, or the stock model's where it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mmlm_efficient import EfficientLMM
from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, check_family, check_methods, prepare
from mmlm_efficient.pruning import DivPrune, FlowCut, RandomPruning, VisPruner
from mmlm_efficient.stations.handed import CACHE
from tests import tiny, tiny_families

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPT = tiny.prompt(1, 5, I, 6, 7, 8)
LENGTH = len(PROMPT)
STAGE_B = FlowCut(keep_tokens=36, llm_prune_layer=1, llm_keep_tokens=9)
Inputs = dict[str, Any]


def request() -> Inputs:
    return tiny.batch([PROMPT], tiny.images(1))


# The attention mask


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(1, LENGTH - 1), rf"\[1, {LENGTH - 1}\]"),
        (torch.ones(1, LENGTH + 1), rf"\[1, {LENGTH + 1}\]"),
        (torch.ones(2, LENGTH), rf"\[2, {LENGTH}\]"),
        (torch.ones(LENGTH), rf"\[{LENGTH}\]"),
        (torch.ones(1, 1, LENGTH, LENGTH), rf"\[1, 1, {LENGTH}, {LENGTH}\]"),
        ([1] * LENGTH, "list"),
    ],
)
@pytest.mark.parametrize("methods", ["flowcut:9", "random:9", STAGE_B], ids=str)
def test_mask_of_another_shape(lmm: EfficientLMM, mask: Any, got: str, methods: Any) -> None:
    inputs = {**request(), "attention_mask": mask}
    for call in (lmm.forward, lmm.generate):
        with pytest.raises(PromptError, match=rf"attention_mask: .*\[1, {LENGTH}\].*got {got}"):
            call(**inputs, methods=methods)


@pytest.mark.parametrize("methods", ["flowcut:9", "random:9", STAGE_B], ids=str)
def test_mask_that_hides_part_of_an_image(lmm: EfficientLMM, methods: Any) -> None:
    inputs = tiny.batch([PROMPT, tiny.prompt(1, I, 5)], tiny.images(2))
    inputs["attention_mask"][1, -4] = 0
    with pytest.raises(PromptError, match=r"hides 1 of the 36 tokens of image 1 \(prompt 1, tok"):
        lmm.forward(**inputs, methods=methods)


def test_with_nothing_to_prune_a_mask_is_the_stock_models_matter(lmm: EfficientLMM) -> None:
    hiding = request()
    hiding["attention_mask"][0, 5] = 0
    causal = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]
    with torch.no_grad():
        for inputs in (hiding, {**request(), "attention_mask": causal}):
            want = lmm.model(**inputs).logits
            assert torch.equal(lmm.forward(**inputs, methods=()).logits, want)
        got = lmm.forward(**hiding, methods="flowcut:36").logits
        assert torch.equal(got, lmm.model(**hiding).logits)
        text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": causal[:, :, :3, :3]}
        got = lmm.forward(**text, methods="flowcut:9").logits
        assert torch.equal(got, lmm.model(**text).logits)


def test_without_a_mask_generate_is_the_stock_models(lmm: EfficientLMM) -> None:
    inputs = tiny.batch([PROMPT, tiny.prompt(1, I, 5)], tiny.images(2))
    del inputs["attention_mask"]  # transformers infers it from the pad tokens
    want = lmm.model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(lmm.generate(**inputs, max_new_tokens=6), want)


# Other features


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_feature_layer", -1),
        ("vision_feature_layer", [-1]),
        ("vision_feature_select_strategy", "full"),
        ("image_sizes", torch.tensor([[24, 24]])),
    ],
)
def test_other_features_are_refused_by_name_when_pruning(
    lmm: EfficientLMM, name: str, value: Any
) -> None:
    for call in (lmm.forward, lmm.generate):
        for methods in ("flowcut:9", "random:9", STAGE_B):
            with pytest.raises(UnsupportedError, match=rf"^{name}: .*methods=\(\)"):
                call(**request(), methods=methods, **{name: value})


def test_another_feature_layer_is_the_stock_models_when_nothing_is_pruned(
    lmm: EfficientLMM,
) -> None:
    with torch.no_grad():
        usual = lmm.model(**request()).logits
        for methods in ((), "none"):
            got = lmm.forward(**request(), methods=methods, vision_feature_layer=-1)
            want = lmm.model(**request(), vision_feature_layer=-1).logits
            assert torch.equal(got.logits, want)
            assert not torch.equal(want, usual)
    options: Inputs = {"vision_feature_layer": -1, "max_new_tokens": 4}
    want = lmm.model.generate(**request(), **options)
    assert torch.equal(lmm.generate(**request(), **options), want)


def test_the_configs_own_feature_layer_may_be_named(lmm: EfficientLMM) -> None:
    config = lmm.model.config
    own = {
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    for methods in ("flowcut:9", "random:9"):
        with torch.no_grad():
            want = lmm.forward(**request(), methods=methods).logits
            assert torch.equal(lmm.forward(**request(), methods=methods, **own).logits, want)
        ids = lmm.generate(**request(), methods=methods, max_new_tokens=3, **own)
        want = lmm.generate(**request(), methods=methods, max_new_tokens=3)
        assert torch.equal(ids, want)


def features(lmm: EfficientLMM) -> Inputs:
    """The request with its images as the tower's outputs."""
    inputs = request()
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        outputs = lmm.model.get_image_features(pixel_values=pixels, return_dict=True)
    return {**inputs, "mm_encoder_outputs": {"image": outputs}}


def test_features_instead_of_pixels(lmm: EfficientLMM) -> None:
    with torch.no_grad():
        got = lmm.forward(**features(lmm), methods=()).logits
        assert torch.equal(got, lmm.model(**request()).logits)
    ids = lmm.generate(**features(lmm), methods=(), max_new_tokens=4)
    assert torch.equal(ids, lmm.model.generate(**request(), max_new_tokens=4))
    for pixels in ({}, {"pixel_values": tiny.images(1)}):
        for call in (lmm.forward, lmm.generate):
            with pytest.raises(UnsupportedError, match=r"^mm_encoder_outputs: .*pixel_values"):
                call(**features(lmm), **pixels, methods="flowcut:9")


def test_embeddings_instead_of_ids(lmm: EfficientLMM) -> None:
    inputs = request()
    inputs["inputs_embeds"] = lmm.model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UnsupportedError, match="^inputs_embeds: "):
        lmm.generate(**inputs, methods="flowcut:9")


# A conversation that goes on


def continued(lmm: EfficientLMM, **options: Any) -> tuple[Inputs, Any]:
    """The next turn after a first answer, and the cache of that answer."""
    first = lmm.generate(**request(), max_new_tokens=4, return_dict_in_generate=True, **options)
    ids = torch.cat([first.sequences, torch.tensor([[6, 7, 8]])], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs, first[CACHE]


def test_a_conversation_continues_unpruned(lmm: EfficientLMM) -> None:
    inputs, cache = continued(lmm)
    got = lmm.generate(**inputs, **{CACHE: cache}, methods=(), max_new_tokens=5)
    inputs, cache = continued(lmm)
    want = lmm.model.generate(**inputs, **{CACHE: cache}, max_new_tokens=5)
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["flowcut:9", "random:9", STAGE_B], ids=str)
def test_a_filled_cache_cannot_be_pruned(lmm: EfficientLMM, method: Any) -> None:
    inputs, cache = continued(lmm)
    held = cache.get_seq_length()
    for pixels in ({}, {"pixel_values": tiny.images(1)}):
        with pytest.raises(UnsupportedError, match=rf"{CACHE}: holds {held} tokens.*whole"):
            lmm.generate(**inputs, **pixels, **{CACHE: cache}, methods=method)
    # New words alone hold nothing to prune.
    words = {"input_ids": torch.tensor([[6, 7]]), CACHE: cache}
    with torch.no_grad():
        got = lmm.forward(**words, methods=method).logits
        _, again = continued(lmm)
        assert torch.equal(got, lmm.model(**{**words, CACHE: again}).logits)


def test_a_cache_of_a_pruned_prompt_does_not_fit_the_whole_one(lmm: EfficientLMM) -> None:
    inputs, cache = continued(lmm, methods="flowcut:9")
    with pytest.raises(PromptError, match=r"behind the 17 tokens .* 21 placeholders"):
        lmm.generate(**inputs, **{CACHE: cache}, methods=())


def test_an_empty_cache_is_no_matter(lmm: EfficientLMM) -> None:
    for methods in ((), "flowcut:9", STAGE_B):
        want = lmm.generate(**request(), methods=methods, max_new_tokens=4)
        empty = DynamicCache(config=lmm.model.config.get_text_config())
        got = lmm.generate(**request(), methods=methods, max_new_tokens=4, **{CACHE: empty})
        assert torch.equal(got, want)


@pytest.mark.parametrize("methods", [(), "flowcut:9"])
def test_placeholders_without_images_are_counted_in_images(lmm: EfficientLMM, methods: Any) -> None:
    inputs = tiny.batch([tiny.prompt(1, I, I, 5)])
    with pytest.raises(PromptError, match=r"hold 2 image\(s\) \(72 placeholders, 36 each\), but 0"):
        lmm.generate(**inputs, methods=methods)


def test_a_cache_of_an_unknown_kind(lmm: EfficientLMM) -> None:
    inputs = tiny.batch([[1, 5, 6]])
    with pytest.raises(PromptError, match=rf"{CACHE}: expected a Cache.*got tuple"):
        lmm.forward(**inputs, **{CACHE: ((torch.zeros(1),),)}, methods=())


# After close()


@pytest.mark.parametrize("method", [(), "flowcut:9", "random:9", STAGE_B], ids=str)
def test_nothing_runs_after_close(method: Any) -> None:
    with EfficientLMM(tiny.tiny_llava(), None) as one:
        one.forward(**request(), methods=method)
    calls: list[Callable[..., Any]] = [one.forward, one.generate]
    for call in calls:
        with pytest.raises(UnsupportedError, match="was closed"):
            call(**request(), methods=method)
    with pytest.raises(UnsupportedError, match="was closed"), one.using():
        pass
    for ask in (one.ask, one.stream):
        with pytest.raises(UnsupportedError, match="was closed"):
            ask("where ?", methods=method)


def test_a_prepared_request_does_not_run_after_close() -> None:
    model = tiny.tiny_llava()
    parts = LMMParts(model)
    with torch.no_grad():
        prepared = prepare(parts, request(), [STAGE_B])

        def close_while_it_runs() -> None:
            with prepared.active():
                model(**prepared.model_inputs)
                parts.close()

        with pytest.raises(UnsupportedError, match="was closed"):
            close_while_it_runs()
        with pytest.raises(UnsupportedError, match="was closed"), prepared.active():
            pass
        with pytest.raises(UnsupportedError, match="was closed"):
            prepare(parts, request(), [])


# Lists and other things beside the pixels


TABLES = ("image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw")
SHOWING = [
    (family, case)
    for family in tiny_families.FAMILIES
    for case in tiny_families.cases(family)
    if case != "text"
]


def as_lists(inputs: Inputs) -> Inputs:
    return {name: value.tolist() if name in TABLES else value for name, value in inputs.items()}


@pytest.mark.parametrize(("family", "case"), SHOWING)
def test_lists_stand_for_tensors(family: str, case: str) -> None:
    model = tiny_families.tiny_model(family)
    inputs = tiny_families.sample_inputs(family, case)
    lists = as_lists(inputs)
    assert any(isinstance(value, list) for value in lists.values()) or case == "video"
    arrays = {name: inputs[name].numpy() for name in lists if name in TABLES}
    rows = {name: list(inputs[name]) for name in lists if name in TABLES}
    floats = {name: inputs[name].float() for name in lists if name in TABLES}
    with torch.no_grad(), LMMParts(model) as parts:
        for methods in ([], [FlowCut(keep_tokens=4)], [RandomPruning(keep_tokens=4)]):
            prepared = prepare(parts, inputs, methods)
            with prepared.active():
                want = model(**prepared.model_inputs).logits
            for other in (lists, {**inputs, **arrays}, {**inputs, **rows}, {**inputs, **floats}):
                prepared = prepare(parts, other, methods)
                with prepared.active():
                    assert torch.equal(model(**prepared.model_inputs).logits, want)
                    model.generate(**prepared.model_inputs, max_new_tokens=2, num_beams=2)
        text = {name: lists[name] for name in lists if name not in parts.family.pixel_inputs}
        encoded = encode(parts, lists)
        prepared = prepare(parts, text, [RandomPruning(keep_tokens=4)], encoded=encoded)
        assert torch.equal(model(**prepared.model_inputs).logits, want)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("methods", [(), (RandomPruning(keep_tokens=3),)], ids=["stock", "random"])
def test_sizes_and_pixels_that_are_none_are_refused(family: str, methods: Any) -> None:
    inputs = tiny_families.sample_inputs(family, "several")
    beside = "image_grid_thw" if family in tiny_families.QWEN else "image_sizes"
    zeros, negative = inputs[beside].clone(), inputs[beside].tolist()
    zeros[1], negative[2][-1] = 0, -4
    broken: list[tuple[str, Any]] = [
        (beside, zeros),
        (beside, negative),
        (beside, [["a", "b"]] * 4),
        (beside, 7),
        (beside, inputs[beside] + 0.5),
        ("pixel_values", inputs["pixel_values"].tolist()),
        ("pixel_values", list(inputs["pixel_values"])),
    ]
    if family == "llava_onevision":
        broken += [("batch_num_images", "aaaa"), ("batch_num_images", [[1], [1]])]
        broken += [("batch_num_images", [1, 1, -2])]
    with torch.no_grad(), LMMParts(tiny_families.tiny_model(family)) as parts:
        for name, value in broken:
            with pytest.raises(PromptError, match=f"^{name}"):
                prepare(parts, {**inputs, name: value}, methods)


def test_a_list_of_pictures_is_refused(lmm: EfficientLMM) -> None:
    pictures = list(tiny.images(1))
    with pytest.raises(PromptError, match="pixel_values: expected a tensor, got list"):
        lmm.forward(**{**request(), "pixel_values": pictures}, methods=())


def test_sizes_beside_no_pixels_are_the_stock_models_matter() -> None:
    """It ignores them."""
    model = tiny_families.tiny_model("llava_next")
    text = {**tiny_families.sample_inputs("llava_next", "text"), "image_sizes": "none"}
    with torch.no_grad(), LMMParts(model) as parts:
        want = model(**text).logits
        assert torch.equal(model(**prepare(parts, text).model_inputs).logits, want)


# Position rules of two methods


def test_methods_that_mean_the_same_positions_go_together() -> None:
    same = [VisPruner(keep_tokens=9, position_ids="compact"), DivPrune(keep_tokens=4)]
    check_methods(same)
    check_methods([FlowCut(keep_tokens=9), RandomPruning(keep_tokens=4, position_ids="compact")])
    other = RandomPruning(keep_tokens=4, position_ids="original")
    with pytest.raises(SettingsError, match="which mean 'compact' and 'original': give both"):
        check_methods([FlowCut(keep_tokens=9), other])
    with LMMParts(tiny_families.tiny_model("qwen2_vl")) as parts:
        # Where positions have axes, both keep them.
        check_family([FlowCut(keep_tokens=9), other], parts.family)
        with pytest.raises(SettingsError, match="position_ids='compact' has no meaning"):
            check_family(same, parts.family)
