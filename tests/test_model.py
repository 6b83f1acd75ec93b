"""EfficientLMM: what it answers, what it counts, and that it equals transformers where it must."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import PromptError
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.stations.handed import CACHE
from tests.tiny import N_PATCHES, tiny_llava
from tests.tiny_processor import picture, tiny_processor

QUESTION = "where cat ?"
METHODS = ["flowcut:9", "random:9", "uniform:9"]


def inputs_of(lmm: EfficientLMM, *questions: tuple[str, Any]) -> dict[str, torch.Tensor]:
    return dict(preprocess(lmm.processor, questions, lmm.model.dtype))


# Equal to transformers


@pytest.mark.parametrize("methods", [(), "none", "flowcut:36", "flowcut:1000", "random:1.0"])
def test_with_nothing_to_prune_ask_is_stock_transformers(lmm: EfficientLMM, methods: Any) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    stock = lmm.model.generate(**inputs, max_new_tokens=12)
    answer = lmm.ask(QUESTION, picture(), methods=methods, max_new_tokens=12)
    new = stock[0, inputs["input_ids"].shape[1] :]
    assert answer.text == lmm.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answer.usage.visual_tokens_kept == {"tower": 36, "bridge": 36, "layer": 36}
    assert torch.equal(lmm.generate(**inputs, methods=methods, max_new_tokens=12), stock)


def test_budget_above_the_token_count_warns_and_prunes_nothing(
    lmm: EfficientLMM, caplog: pytest.LogCaptureFixture
) -> None:
    answer = lmm.ask(QUESTION, picture(), methods="flowcut:1000", max_new_tokens=2)
    assert answer.usage.visual_tokens_kept["bridge"] == 36
    assert "nothing is pruned" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_generate_puts_the_callers_own_prompt_in_front(lmm: EfficientLMM, method: str) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()), ("where cat ? where cat ?", picture(1)))
    length = inputs["input_ids"].shape[1]
    ids = lmm.generate(**inputs, methods=method, max_new_tokens=5)
    assert ids.shape == (2, length + 5)
    assert torch.equal(ids[:, :length], inputs["input_ids"])
    rich = lmm.generate(**inputs, methods=method, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(rich.sequences, ids)
    assert rich[CACHE].get_seq_length() == length - 36 + 9 + 4


def test_generate_with_several_sequences_per_prompt(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()), (QUESTION, picture(1)))
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    ids = lmm.generate(**inputs, methods="flowcut:9", **options)
    assert ids.shape[0] == 4
    assert torch.equal(ids[:, :length], inputs["input_ids"].repeat_interleave(2, dim=0))
    stock = lmm.model.generate(**inputs, **options)
    assert torch.equal(lmm.generate(**inputs, methods=(), **options), stock)


def test_max_length_counts_the_callers_prompt(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    length = inputs["input_ids"].shape[1]
    ids = lmm.generate(**inputs, methods="flowcut:9", max_length=length + 3)
    assert ids.shape[1] == length + 3
    with pytest.raises(PromptError, match=f"max_length is {length}.* {length} tokens"):
        lmm.generate(**inputs, methods="flowcut:9", max_length=length)


@pytest.mark.parametrize("method", ["none", "flowcut:9"])
def test_lengths_of_a_config_count_the_callers_prompt(method: str) -> None:
    with EfficientLMM(tiny_llava(), tiny_processor(), method) as one:
        inputs = inputs_of(one, (QUESTION, picture()))
        length = inputs["input_ids"].shape[1]
        given = GenerationConfig(max_length=length + 4, min_length=length + 4)
        assert one.generate(**inputs, generation_config=given).shape[1] == length + 4
        assert (given.max_length, given.min_length) == (length + 4, length + 4)
        # An argument wins over the config.
        ids = one.generate(**inputs, generation_config=given, max_length=length + 6)
        assert ids.shape[1] == length + 6
        with pytest.raises(PromptError, match=f"max_length is {length}"):
            one.generate(**inputs, generation_config=GenerationConfig(max_length=length))
        own = one.model.generation_config
        own.max_length = length + 5
        assert one.generate(**inputs).shape[1] == length + 5
        assert one.generate(**inputs, max_new_tokens=2).shape[1] == length + 2
        assert own.max_length == length + 5


def test_forward(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, (QUESTION, picture()))
    with torch.no_grad():
        stock = lmm.model(**inputs).logits
        assert torch.equal(lmm.forward(**inputs).logits, stock)
        assert lmm.forward(**inputs, methods="flowcut:9").logits.shape[1] == stock.shape[1] - 27


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_batch_equals_single(lmm: EfficientLMM, method: str) -> None:
    requests: list[tuple[str, Any]] = [
        (QUESTION, picture()),
        ("where cat ? where cat ? where", [picture(1), picture(2)]),
        ("where", None),
    ]
    batch = lmm.ask_batch(requests, methods=method, max_new_tokens=8)
    for (question, images), answer in zip(requests, batch, strict=True):
        single = lmm.ask(question, images, methods=method, max_new_tokens=8)
        assert answer.text == single.text
        assert answer.usage.prompt_tokens == single.usage.prompt_tokens
        kept = [image.kept.tolist() for image in answer.report.images]
        assert kept == [image.kept.tolist() for image in single.report.images]
    assert lmm.ask_batch([]) == []


# Usage


@pytest.mark.parametrize(("method", "kept"), [("none", 36), ("flowcut:9", 9), ("random:0.5", 18)])
def test_usage(lmm: EfficientLMM, method: str, kept: int) -> None:
    answer = lmm.ask(QUESTION, picture(), methods=method, max_new_tokens=6)
    usage = answer.usage
    assert usage.prompt_tokens == 6 + kept
    assert usage.visual_tokens_in == N_PATCHES
    assert usage.visual_tokens_kept["bridge"] == usage.visual_tokens_kept["layer"] == kept
    assert usage.completion_tokens == 6
    # 4 layers, keys and values, 2 heads of 8 numbers of 4 bytes; the last token is not stored.
    assert usage.kv_bytes == 4 * 2 * 2 * 8 * 4 * (6 + kept + 5)
    seconds = (usage.preprocess_s, usage.tower_s, usage.prefill_s, usage.decode_s)
    assert all(0 < value < 60 for value in seconds)
    assert usage.tokens_per_s == pytest.approx(5 / usage.decode_s)
    assert answer.finish_reason == "length"
    plain = answer.to_dict()
    assert plain["usage"]["visual_tokens_kept"]["bridge"] == kept
    assert plain["images"][0]["grid"] == [6, 6]
    assert len(plain["images"][0]["kept"]) == kept
    assert str(answer) == answer.text


def test_text_only(lmm: EfficientLMM) -> None:
    usage = lmm.ask(QUESTION, methods="flowcut:9", max_new_tokens=3).usage
    assert usage.visual_tokens_in == 0
    assert usage.visual_tokens_kept == {"tower": 0, "bridge": 0, "layer": 0}
    assert usage.tower_s == 0.0


def test_end_token_ends_the_answer(lmm: EfficientLMM) -> None:
    stock = lmm.ask(QUESTION, picture(), max_new_tokens=6)
    first = lmm.processor.tokenizer.convert_tokens_to_ids(stock.text.split()[0])
    ended = lmm.ask(QUESTION, picture(), max_new_tokens=6, eos_token_id=first)
    assert ended.finish_reason == "stop"
    assert ended.usage.completion_tokens == 1
    assert ended.usage.tokens_per_s == 0.0


def test_generation_without_a_cache(lmm: EfficientLMM) -> None:
    answer = lmm.ask(QUESTION, picture(), max_new_tokens=4, use_cache=False)
    assert answer.usage.kv_bytes == 0
    assert answer.text == lmm.ask(QUESTION, picture(), max_new_tokens=4).text


# Sampling


def test_seed_reproduces_and_is_the_draw_of_transformers(lmm: EfficientLMM) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 10}
    answers = [lmm.ask(QUESTION, picture(), seed=7, **options).text for _ in range(2)]
    assert answers[0] == answers[1]
    others = {lmm.ask(QUESTION, picture(), seed=seed, **options).text for seed in range(5)}
    assert len(others) > 1
    inputs = inputs_of(lmm, (QUESTION, picture()))
    torch.manual_seed(7)
    stock = lmm.model.generate(**inputs, **options)
    assert torch.equal(lmm.generate(**inputs, seed=7, **options), stock)


def test_seed_leaves_the_callers_random_numbers_alone(lmm: EfficientLMM) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    lmm.ask(QUESTION, picture(), seed=7, do_sample=True, max_new_tokens=5)
    assert "".join(lmm.stream(QUESTION, picture(), seed=7, do_sample=True, max_new_tokens=5))
    assert torch.equal(torch.rand(4), expected)


# One request does not disturb the next


def test_a_failing_request_between_two_good_ones(lmm: EfficientLMM) -> None:
    def fail(batch: int, ids: torch.Tensor) -> list[int]:
        raise RuntimeError("broken on purpose")

    options: dict[str, Any] = {"methods": "flowcut:9", "max_new_tokens": 6}
    before = lmm.ask(QUESTION, picture(), **options)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        lmm.ask(QUESTION, picture(), prefix_allowed_tokens_fn=fail, **options)
    after = lmm.ask(QUESTION, picture(), **options)
    assert after.text == before.text
    stock = lmm.model.generate(**inputs_of(lmm, (QUESTION, picture())), max_new_tokens=6)
    assert torch.equal(
        lmm.generate(**inputs_of(lmm, (QUESTION, picture())), max_new_tokens=6), stock
    )


def test_requests_of_several_threads_do_not_mix(lmm: EfficientLMM) -> None:
    methods = ["none", "flowcut:9", "random:5", "flowcut:20"]
    expected = [lmm.ask(QUESTION, picture(), methods=m, max_new_tokens=8).text for m in methods]
    got: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(3):
            answer = lmm.ask(QUESTION, picture(), methods=methods[number], max_new_tokens=8)
            got[number] = answer.text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(methods))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(len(methods))] == expected


def test_close_takes_every_hook_off() -> None:
    model = tiny_llava()
    inputs = dict(preprocess(tiny_processor(), [(QUESTION, picture())], model.dtype))
    model.generate(**inputs, max_new_tokens=1)  # transformers puts hooks of its own, for good

    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        )

    before = hooks()
    lmm = EfficientLMM(model, tiny_processor(), "flowcut:9")
    lmm.ask(QUESTION, picture(), max_new_tokens=2)
    assert hooks() > before
    lmm.close()
    lmm.close()
    assert hooks() == before
