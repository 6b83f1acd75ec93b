"""What transformers hands to layers: known by its name, or refused with the release's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from mmlm_efficient import EfficientLMM, FastV
from mmlm_efficient.errors import PromptError, SettingsError, UnsupportedError
from mmlm_efficient.families import family_of
from mmlm_efficient.families.llava_like import decoder_parts
from mmlm_efficient.prepare import prepare
from mmlm_efficient.sinks.var import VAR
from mmlm_efficient.stations.attention import AttentionStation
from mmlm_efficient.stations.handed import CACHE, CACHE_NAMES, cache_of, check_decoder
from mmlm_efficient.stations.layer import LayerStation
from mmlm_efficient.stations.tower import TowerStation
from tests import tiny
from tests.tiny_processor import tiny_processor

SINKS: dict[str, Any] = {"sink_dims": [3], "sink_threshold": 1.5, "layers": [1]}
STRONG: dict[str, Any] = {
    **SINKS,
    "layers": [0, 1, 2, 3],
    "min_nonsink_ratio": 0,
    "min_image_mass": 0,
    "redistribute_fraction": 1,
}
PROMPT = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 9)], tiny.images(1))
HERE = f"transformers {transformers.__version__} is not supported"


@pytest.fixture(scope="module")
def lmm() -> Iterator[EfficientLMM]:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as made:
        yield made


class Renamed(nn.Module):
    """A layer of a release to come, which calls the cache otherwise."""

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        kv_store: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        return hidden_states


@pytest.mark.parametrize("station", [LayerStation, AttentionStation])
def test_a_release_that_renames_the_cache_again_is_refused(station: Any) -> None:
    parts = decoder_parts(tiny.tiny_llava().model.language_model)
    check_decoder(parts)
    changed = dataclasses.replace(parts, layers=[*parts.layers[:-1], Renamed()])
    with pytest.raises(UnsupportedError, match=f"{HERE}: Renamed takes no '{CACHE}'. Known"):
        station(changed)
    assert not any(layer._forward_pre_hooks for layer in parts.layers)


@torch.no_grad()
@pytest.mark.parametrize("how", ["compiled", "replaced"])
def test_layers_that_others_wrapped(how: str) -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as plain:
        want = plain.forward(**PROMPT, methods="fastv:9").logits
    model = tiny.tiny_llava()
    layers = model.model.language_model.layers
    for place, layer in enumerate(layers):
        if how == "compiled":
            layers[place] = torch.compile(layer, backend="eager", disable=True)
        else:
            own = layer.forward
            layer.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
    with EfficientLMM(model, tiny_processor()) as lmm:
        assert torch.equal(lmm.forward(**PROMPT, methods="fastv:9").logits, want)


def test_a_release_whose_tower_takes_no_mask_is_refused() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Any) -> Any:
            return hidden_states

    tower = family_of(tiny.tiny_llava()).tower
    with pytest.raises(UnsupportedError, match=f"{HERE}: Block takes no 'attention_mask'"):
        TowerStation(dataclasses.replace(tower, layers=[Block(), *tower.layers[1:]]))


def test_a_layer_that_is_handed_no_cache_at_all_is_refused() -> None:
    assert cache_of({CACHE: None}) is None
    with pytest.raises(UnsupportedError, match=f"{HERE}: decoder layers are not handed '{CACHE}'"):
        cache_of({"kv_store": None})


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("methods", [(), "flowcut:9", "fastv:9"])
def test_both_names_of_the_cache_are_understood(lmm: EfficientLMM, name: str, methods: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "methods": methods}
    want = lmm.generate(**PROMPT, **options)
    cache = DynamicCache(config=lmm.model.config)
    assert torch.equal(lmm.generate(**PROMPT, **options, **{name: cache}), want)
    assert cache.get_seq_length() > 0
    logits = lmm.forward(**PROMPT, methods=methods).logits
    again = lmm.forward(**PROMPT, methods=methods, **{name: DynamicCache()}, use_cache=True)
    assert torch.equal(again.logits, logits)
    if methods:
        with pytest.raises(UnsupportedError, match="holds .* tokens already"):
            lmm.generate(**PROMPT, **options, **{name: cache})


def test_the_cache_under_both_names_at_once(lmm: EfficientLMM) -> None:
    both = dict.fromkeys(CACHE_NAMES, DynamicCache())
    with pytest.raises(PromptError, match="two names of one argument"):
        lmm.generate(**PROMPT, **both)
    with pytest.raises(SettingsError, match=f"is unknown. Did you mean '{CACHE}'"):
        lmm.generate(**PROMPT, **{CACHE[:-1]: DynamicCache()})


# A method that should act while decoding and does not is an error, whatever kept it from it.


@torch.no_grad()
@pytest.mark.parametrize("method", [VAR(**SINKS), FastV(keep_tokens=9, layer=1)])
def test_a_method_that_does_not_act_while_decoding(lmm: EfficientLMM, method: Any) -> None:
    one = prepare(lmm.parts, PROMPT, [method])
    with one.active():
        output = lmm.model(**one.model_inputs, use_cache=True)
    one.check_acted(0)
    one.check_acted(1)  # the first token needs no step
    with pytest.raises(UnsupportedError, match="decoding ran, but its hooks did not"):
        one.check_acted(2)
    with one.active():
        lmm.model(input_ids=torch.tensor([[5]]), **{CACHE: output[CACHE]})
    one.check_acted(2)


@torch.no_grad()
@pytest.mark.parametrize("method", [VAR(**SINKS), FastV(keep_tokens=9, layer=2)])
def test_a_method_that_does_not_act_at_all(method: Any) -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as lmm:
        for layer in lmm.parts.family.decoder.layers[1:]:
            layer._forward_pre_hooks.clear()  # as code that was compiled before has none
            layer._forward_hooks.clear()
        for run in (lmm.forward, partial(lmm.generate, max_new_tokens=2)):
            with pytest.raises(UnsupportedError, match="the language model ran, but its hooks"):
                run(**PROMPT, methods=method)
        lmm.forward(**PROMPT, methods=())


@torch.no_grad()
def test_a_tower_that_runs_without_its_hooks() -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as lmm:
        for layer in lmm.parts.family.tower.layers[1:]:
            for part in layer.modules():
                part._forward_pre_hooks.clear()
                part._forward_hooks.clear()
        with pytest.raises(UnsupportedError, match="the vision tower ran, but its hooks did not"):
            lmm.forward(**PROMPT, methods="flowcut:9")


@torch.no_grad()
@pytest.mark.parametrize("evaluation", ["rows", "partial_sums"])
def test_var_with_and_without_a_cache_agrees(lmm: EfficientLMM, evaluation: str) -> None:
    options: dict[str, Any] = {
        "methods": VAR(**STRONG, evaluation=evaluation),
        "max_new_tokens": 5,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with_cache, without = (
        lmm.generate(**PROMPT, **options, use_cache=use) for use in (True, False)
    )
    for ours, theirs in zip(with_cache.logits, without.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    stock = lmm.generate(**PROMPT, **{**options, "methods": ()})
    assert not torch.allclose(stock.logits[-1], with_cache.logits[-1], atol=1e-3)
