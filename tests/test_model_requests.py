"""EfficientLMM: the prompts it writes, the settings it takes, and the requests it refuses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mmlm_efficient import EfficientLMM, FlowCut, RandomPruning, UniformPruning
from mmlm_efficient.errors import MediaError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prompts import preprocess, write_prompt
from mmlm_efficient.pruning.no_pruning import NoPruning
from tests.tiny import IMAGE_TOKEN, tiny_llava
from tests.tiny_processor import picture, tiny_processor

QUESTION = "where cat ?"


def inputs_of(lmm: EfficientLMM, *questions: tuple[str, Any]) -> dict[str, torch.Tensor]:
    return dict(preprocess(lmm.processor, questions, lmm.model.dtype))


# Prompts


def test_images_come_first_or_where_the_question_says(lmm: EfficientLMM) -> None:
    image = [picture(), picture(1)]
    first = inputs_of(lmm, (QUESTION, image))["input_ids"]
    same = inputs_of(lmm, ("<image> <image> where cat ?", image))["input_ids"]
    assert torch.equal(first, same)
    between = inputs_of(lmm, ("where <image> cat <image> ?", image))["input_ids"][0].tolist()
    words = [token for token in between if token != IMAGE_TOKEN]
    assert words == [1, 5, 7, 8, 9, 6]
    assert between.index(7) < between.index(IMAGE_TOKEN) < between.index(8)


def test_begin_token_appears_once(lmm: EfficientLMM) -> None:
    processor = tiny_processor()
    processor.chat_template = "<s>" + processor.chat_template
    for one in (processor, lmm.processor):
        ids = preprocess(one, [(QUESTION, None)], torch.float32)["input_ids"]
        assert ids[0].tolist().count(1) == 1


@pytest.mark.parametrize("question", ["", "   ", "\n", "<image>"])
def test_empty_question(lmm: EfficientLMM, question: str) -> None:
    with pytest.raises(PromptError, match="question: is empty"):
        lmm.ask(question, picture())


def test_question_that_is_no_text(lmm: EfficientLMM) -> None:
    with pytest.raises(PromptError, match="expected a text, got int"):
        lmm.ask(3, picture())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("<image> <image> where ?", [0], r"holds 2 <image>, but 1 image\(s\) were given"),
        ("<image> where ?", [], r"holds 1 <image>, but 0 image\(s\) were given"),
    ],
)
def test_placeholders_that_do_not_match_the_images(
    lmm: EfficientLMM, question: str, images: list[int], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        lmm.ask(question, [picture(seed) for seed in images])


def test_placeholders_that_do_not_match_in_generate(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    two = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(PromptError, match=r"1 image\(s\), but 2"):
        lmm.generate(**{**inputs, "pixel_values": two}, max_new_tokens=2)


def test_prompt_longer_than_the_context() -> None:
    with EfficientLMM(
        tiny_llava(language={"max_position_embeddings": 40}), tiny_processor()
    ) as small:
        with pytest.raises(PromptError, match=r"42 positions.* 40"):
            small.ask(QUESTION, picture())
        # Pruning makes room, and the answer ends where the context does.
        answer = small.ask(QUESTION, picture(), methods="flowcut:20", max_new_tokens=64)
        assert answer.usage.prompt_tokens == 26
        assert answer.usage.completion_tokens == 14
        assert answer.finish_reason == "length"
        own = FlowCut(keep_tokens=20, position_ids="original")
        with pytest.raises(PromptError, match=r"42 positions.* 40"):
            small.ask(QUESTION, picture(), methods=own)


def test_processor_without_a_chat_template(lmm: EfficientLMM) -> None:
    processor = tiny_processor()
    processor.chat_template = None
    with (
        EfficientLMM(tiny_llava(), processor) as bare,
        pytest.raises(PromptError, match="neither the model.s processor nor its"),
    ):
        bare.ask(QUESTION)


def test_generate_without_input_ids(lmm: EfficientLMM) -> None:
    with pytest.raises(PromptError, match="input_ids: expected"):
        lmm.generate(pixel_values=torch.zeros(1, 3, 24, 24))


def test_bad_image_is_named(lmm: EfficientLMM, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"gone\.png: no such file"):
        lmm.ask(QUESTION, tmp_path / "gone.png")


# Settings


def test_unknown_generation_argument(lmm: EfficientLMM) -> None:
    for call in (lmm.ask, lmm.stream):
        with pytest.raises(SettingsError, match="'temprature' is unknown.*'temperature'"):
            call(QUESTION, picture(), temprature=0.5)
    inputs = inputs_of(lmm, (QUESTION, picture()))
    with pytest.raises(SettingsError, match="'max_new_token' is unknown.*'max_new_tokens'"):
        lmm.generate(**inputs, max_new_token=3)
    with pytest.raises(SettingsError, match="'pixel_value' is unknown.*'pixel_values'"):
        lmm.forward(**inputs, pixel_value=3)


@pytest.mark.parametrize("name", ["max_length", "num_return_sequences", "streamer"])
def test_generation_arguments_that_do_not_fit_an_answer(lmm: EfficientLMM, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: cannot be used here"):
        lmm.ask(QUESTION, **{name: 2})


def test_config_that_does_not_fit_an_answer(lmm: EfficientLMM) -> None:
    two = GenerationConfig(num_return_sequences=2, do_sample=True)
    for call in (lmm.ask, lmm.stream):
        with pytest.raises(SettingsError, match=r"generation_config\.num_return_sequences"):
            call(QUESTION, picture(), generation_config=two)
    with pytest.raises(SettingsError, match="num_beams"):
        lmm.stream(QUESTION, picture(), generation_config=GenerationConfig(num_beams=2))
    with pytest.raises(SettingsError, match="expected a transformers.GenerationConfig, got 3"):
        lmm.ask(QUESTION, picture(), generation_config=3)


@pytest.mark.parametrize("requests", [["text"], [("text",)], [("text", None, None)], "text"])
def test_requests_that_are_no_pairs(lmm: EfficientLMM, requests: Any) -> None:
    with pytest.raises(PromptError, match=r"requests\[0\]: expected a pair"):
        lmm.ask_batch(requests)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_max_new_tokens_out_of_range(lmm: EfficientLMM, value: Any) -> None:
    with pytest.raises(SettingsError, match="max_new_tokens must be an integer >= 1"):
        lmm.ask(QUESTION, max_new_tokens=value)


@pytest.mark.parametrize("seed", [-1, 1.5, True, 2**63])
def test_bad_seed(lmm: EfficientLMM, seed: Any) -> None:
    with pytest.raises(SettingsError, match="seed must be a whole number"):
        lmm.ask(QUESTION, seed=seed)


def test_methods_that_clash_are_refused_when_built(lmm: EfficientLMM) -> None:
    clash = [RandomPruning(keep_tokens=4), UniformPruning(keep_tokens=4)]
    for call in (
        lambda: EfficientLMM(tiny_llava(), tiny_processor(), clash),
        lambda: lmm.ask(QUESTION, methods=clash),
        lambda: lmm.using(*clash).__enter__(),
    ):
        with pytest.raises(SettingsError, match="'random' and 'uniform'"):
            call()


def test_method_on_an_unsupported_family(lmm: EfficientLMM) -> None:
    class Elsewhere(NoPruning):
        name = "elsewhere"
        families = ("qwen_vl",)

    with pytest.raises(UnsupportedError, match="'elsewhere'.*'llava'.*qwen_vl"):
        lmm.ask(QUESTION, methods=Elsewhere())


def test_unsupported_model() -> None:
    with pytest.raises(UnsupportedError, match="Linear.*Supported: llava"):
        EfficientLMM(torch.nn.Linear(2, 2), tiny_processor())


def test_using_restores_the_methods(lmm: EfficientLMM) -> None:
    assert lmm.methods == ()
    with lmm.using("flowcut:9"):
        assert lmm.ask(QUESTION, picture(), max_new_tokens=2).usage.visual_tokens_kept["layer"] == 9
        with lmm.using(RandomPruning(keep_tokens=4)):
            assert [method.name for method in lmm.methods] == ["random"]
        for nothing in ((), ([],)):
            with lmm.using(*nothing):
                assert lmm.methods == ()
        for both in (("flowcut:9", "fastv:4"), (["flowcut:9", "fastv:4"],)):
            with lmm.using(*both):
                assert [method.name for method in lmm.methods] == ["flowcut", "fastv"]
        assert lmm.methods == (FlowCut(keep_tokens=9),)
        seen: list[Any] = []
        other = threading.Thread(target=lambda: seen.append(lmm.methods))
        other.start()
        other.join()
        assert seen == [()]
    with pytest.raises(ZeroDivisionError), lmm.using("flowcut:9"):
        _ = 1 / 0
    assert lmm.methods == ()


def test_default_methods() -> None:
    with EfficientLMM(tiny_llava(), tiny_processor(), "uniform:4") as pruned:
        assert pruned.ask(QUESTION, picture(), max_new_tokens=1).usage.prompt_tokens == 10
        assert pruned.ask(QUESTION, picture(), (), max_new_tokens=1).usage.prompt_tokens == 42


def test_image_fit_is_the_processors(lmm: EfficientLMM) -> None:
    assert lmm.image_fit == "crop"
    processor = tiny_processor()
    processor.image_processor.do_center_crop = False
    with EfficientLMM(tiny_llava(), processor) as stretching:
        assert stretching.image_fit == "stretch"


# A chat template on the tokenizer alone

WITH_PARTS = (
    "{% for m in messages %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}ASSISTANT"
)
TEXT_ONLY = "{% for m in messages %}USER {{ m.content.strip() }} {% endfor %}ASSISTANT"
PRINTING = "{% for m in messages %}USER {{ m.content }} {% endfor %}ASSISTANT"
WITHOUT_IMAGES = "{% for m in messages %}USER {{ m.content.replace('<image>', '') }} {% endfor %}"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (WITH_PARTS, "<image> where cat ? ASSISTANT"),
        (TEXT_ONLY, "USER <image>\nwhere cat ? ASSISTANT"),
        (PRINTING, "USER <image>\nwhere cat ? ASSISTANT"),
    ],
)
def test_the_tokenizers_template_where_the_processor_has_none(template: str, prompt: str) -> None:
    processor = tiny_processor()
    processor.chat_template, processor.tokenizer.chat_template = None, template
    assert write_prompt(processor, "where cat ?", 1) == prompt
    assert write_prompt(processor, "where cat ?", 0) == prompt.replace("<image>", "").replace(
        " where" if template is WITH_PARTS else "\nwhere", "where"
    )
    with EfficientLMM(tiny_llava(), processor) as lmm:
        answer = lmm.ask("where cat ?", picture(0), "flowcut:9", max_new_tokens=2)
    assert answer.usage.visual_tokens_kept["tower"] == 9


def test_a_question_that_looks_like_a_printed_list() -> None:
    processor = tiny_processor()
    processor.chat_template, processor.tokenizer.chat_template = None, TEXT_ONLY
    question = "What is {'type': 'text'} ?"
    assert question in write_prompt(processor, question, 1)


def test_a_tokenizers_template_that_shows_no_images() -> None:
    processor = tiny_processor()
    processor.chat_template, processor.tokenizer.chat_template = None, WITHOUT_IMAGES
    with pytest.raises(PromptError, match="the tokenizer's shows no images. Set processor.chat"):
        write_prompt(processor, "where cat ?", 1)
    with pytest.raises(PromptError, match="knows no videos. Set processor.chat_template"):
        write_prompt(processor, "where cat ?", 0, video=True)
