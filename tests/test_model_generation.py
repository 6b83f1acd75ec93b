"""Generation settings: passed on as transformers takes them, refused by errors of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import utils as generation_utils

from mmlm_efficient import EfficientLMM, FlowCut, load
from mmlm_efficient.errors import MMLMError, SettingsError, UnsupportedError
from mmlm_efficient.pocket import scene
from mmlm_efficient.prepare import prepare
from mmlm_efficient.prompts import preprocess
from tests import tiny
from tests.tiny_processor import picture

QUESTION = "where cat ?"
STAGE_B = FlowCut(keep_tokens=20, llm_prune_layer=1, llm_keep_tokens=9)
ORIGINAL = FlowCut(keep_tokens=9, position_ids="original")


def inputs_of(lmm: EfficientLMM, *questions: tuple[str, Any]) -> dict[str, torch.Tensor]:
    return dict(preprocess(lmm.processor, questions, lmm.model.dtype))


# Stop strings


@pytest.fixture(scope="module")
def pocket() -> Iterator[EfficientLMM]:
    with load("pocket") as lmm:
        yield lmm


@pytest.mark.parametrize("methods", [(), "flowcut:36"])
def test_stop_strings(pocket: EfficientLMM, methods: Any) -> None:
    request: tuple[str, Any] = ("What is in the picture?", scene("heldout", 56).image)
    whole = pocket.ask(*request, methods=methods).text
    word = whole.split()[1]
    assert len(whole.split()) > 3
    answer = pocket.ask(*request, methods=methods, stop_strings=[word])
    assert answer.text == whole[: whole.index(word) + len(word)]
    assert answer.finish_reason == "stop"
    stream = pocket.stream(*request, methods=methods, stop_strings=word)
    assert "".join(stream) == answer.text
    batch = pocket.ask_batch([request, request], methods=methods, stop_strings=word)
    assert [one.text for one in batch] == [answer.text] * 2
    config = GenerationConfig(stop_strings=[word], eos_token_id=2, pad_token_id=0)
    assert pocket.ask(*request, methods=methods, generation_config=config).text == answer.text


def test_stop_strings_of_generate_are_those_of_transformers(pocket: EfficientLMM) -> None:
    image = scene("heldout", 56).image
    inputs = inputs_of(pocket, ("What is in the picture?", image))
    tokenizer = pocket.processor.tokenizer
    options: dict[str, Any] = {"stop_strings": ["st"], "max_new_tokens": 30}
    want = pocket.model.generate(**inputs, **options, tokenizer=tokenizer)
    assert torch.equal(pocket.generate(**inputs, **options, tokenizer=tokenizer), want)
    assert torch.equal(pocket.generate(**inputs, **options), want)


# A config beside arguments


@pytest.mark.parametrize("methods", [(), "flowcut:9"])
def test_a_config_is_not_mixed_with_arguments(
    lmm: EfficientLMM, methods: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(generation_utils.logger, "warning_once", warned.append)
    given = GenerationConfig(max_new_tokens=3, no_repeat_ngram_size=2)
    before = given.to_dict()
    request: dict[str, Any] = {"question": QUESTION, "image": picture(), "methods": methods}
    request["max_new_tokens"] = 8
    answer = lmm.ask(**request, generation_config=given, repetition_penalty=1.3)
    assert not [text for text in warned if "deprecated" in text]
    assert given.to_dict() == before
    options: dict[str, Any] = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    assert answer.text == lmm.ask(**request, **options).text
    assert answer.text != lmm.ask(**request).text
    inputs = inputs_of(lmm, (QUESTION, picture()))
    ids = lmm.generate(**inputs, methods=methods, generation_config=given, min_length=44)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3
    assert not [text for text in warned if "deprecated" in text]


def test_none_beside_a_config_still_switches_off(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    first = int(lmm.generate(**inputs, max_new_tokens=1)[0, -1])
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(max_new_tokens=4, eos_token_id=first),
        "eos_token_id": None,
    }
    want = lmm.model.generate(**inputs, **options)
    assert torch.equal(lmm.generate(**inputs, **options), want)
    assert want.shape[1] == inputs["input_ids"].shape[1] + 4


# A second prompt


@pytest.mark.parametrize(
    ("method", "options"), [(STAGE_B, {}), (ORIGINAL, {"use_cache": False})], ids=["cut", "gaps"]
)
def test_guidance_is_refused_by_its_name(
    lmm: EfficientLMM, method: FlowCut, options: dict[str, Any]
) -> None:
    for scale in (
        {"guidance_scale": 1.5},
        {"generation_config": GenerationConfig(guidance_scale=2)},
    ):
        with pytest.raises(
            UnsupportedError,
            match=r"guidance_scale=.*only methods that prune before the language model",
        ):
            lmm.ask(QUESTION, picture(), methods=method, **scale, **options)
    inputs = inputs_of(lmm, (QUESTION, picture()))
    with pytest.raises(UnsupportedError, match="guidance_scale=1.5"):
        lmm.generate(**inputs, methods=method, guidance_scale=1.5, **options)
    lmm.ask(QUESTION, picture(), methods=method, max_new_tokens=2, guidance_scale=1, **options)


@pytest.mark.parametrize("method", ["flowcut:9", "random:9", ORIGINAL], ids=str)
def test_guidance_works_before_the_language_model(lmm: EfficientLMM, method: Any) -> None:
    answer = lmm.ask(QUESTION, picture(), methods=method, guidance_scale=1.5, max_new_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_the_layer_station_names_guidance_too(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    with torch.no_grad():
        prepared = prepare(lmm._parts, inputs, [STAGE_B])
        with pytest.raises(UnsupportedError, match="guidance_scale"), prepared.active():
            lmm.model.generate(**prepared.model_inputs, guidance_scale=1.5, max_new_tokens=3)


# What transformers refuses


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"eos_token_id": "abc"}, SettingsError),
        ({"pad_token_id": "abc"}, SettingsError),
        ({"max_time": "abc"}, SettingsError),
        ({"min_p": 7, "do_sample": True}, SettingsError),
        ({"logits_processor": 3}, SettingsError),
        ({"logits_processor": [3]}, SettingsError),
        ({"stopping_criteria": 3}, SettingsError),
        ({"prefix_allowed_tokens_fn": 3}, SettingsError),
        ({"guidance_scale": "a"}, SettingsError),
        ({"stop_strings": 3}, SettingsError),
        ({"watermarking_config": 3}, SettingsError),
        ({"watermarking_config": {"greenlist_ratio": "a"}}, SettingsError),
        ({"cache_implementation": "foo"}, SettingsError),
        ({"bad_words_ids": 3}, SettingsError),
        ({"suppress_tokens": "a"}, SettingsError),
        ({"exponential_decay_length_penalty": 3}, SettingsError),
        ({"assistant_model": 3}, SettingsError),
        ({"cache_implementation": "offloaded"}, UnsupportedError),
        ({"cache_implementation": "offloaded_static"}, UnsupportedError),
        ({"custom_generate": "no/where"}, UnsupportedError),
    ],
    ids=str,
)
def test_refusals_are_errors_of_ours_that_name_the_setting(
    lmm: EfficientLMM, options: dict[str, Any], error: type[MMLMError]
) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    for method in ((), "flowcut:9"):
        with pytest.raises(error, match=next(iter(options))):
            lmm.ask(QUESTION, picture(), methods=method, max_new_tokens=2, **options)
        with pytest.raises(error, match=next(iter(options))):
            lmm.generate(**inputs, methods=method, max_new_tokens=2, **options)


def test_a_package_that_is_missing(lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantized(**_: Any) -> None:
        raise ImportError("You need to install\nsome-package")

    monkeypatch.setattr(generation_utils, "QuantizedCache", quantized)
    with pytest.raises(UnsupportedError, match=r"\(cache_implementation\): .*install some-package"):
        lmm.ask(QUESTION, picture(), cache_implementation="quantized")


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("broken on purpose")


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_allowed_tokens_fn": broken},
        {"logits_processor": [broken]},
        {"stopping_criteria": [broken]},
        {"custom_generate": broken},
    ],
    ids=lambda options: next(iter(options)),
)
def test_errors_of_the_callers_own_functions_come_through(
    lmm: EfficientLMM, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="^broken on purpose$") as caught:
        lmm.generate(**inputs_of(lmm, (QUESTION, picture())), max_new_tokens=2, **options)
    assert not isinstance(caught.value, MMLMError)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_errors_of_the_model_come_through(part: str) -> None:
    model = tiny.tiny_llava()
    getattr(model.model, part).register_forward_pre_hook(broken)
    inputs = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 5)], tiny.images(1))
    with EfficientLMM(model, None) as one:
        # The second call runs the tower inside the stock model's generate().
        for options in ({}, {"vision_feature_layer": -1}):
            with pytest.raises(ValueError, match="^broken on purpose$") as caught:
                one.generate(**inputs, max_new_tokens=2, top_k=3, **options)
            assert not isinstance(caught.value, MMLMError)
