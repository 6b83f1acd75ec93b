"""EfficientLMM: what it answers, what it counts, and that it equals transformers where it must."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mmlm_efficient import EfficientLMM, FlowCut, RandomPruning, UniformPruning
from mmlm_efficient.errors import MediaError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prompts import preprocess
from mmlm_efficient.pruning.no_pruning import NoPruning
from tests.tiny import IMAGE_TOKEN, N_PATCHES, tiny_llava
from tests.tiny_processor import picture, tiny_processor

QUESTION = "where cat ?"
METHODS = ["flowcut:9", "random:9", "uniform:9"]


@pytest.fixture(scope="module")
def lmm() -> Iterator[EfficientLMM]:
    with EfficientLMM(tiny_llava(), tiny_processor()) as wrapped:
        yield wrapped


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
    assert rich.past_key_values.get_seq_length() == length - 36 + 9 + 4


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
        pytest.raises(PromptError, match="no chat template"),
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
        with lmm.using():
            assert lmm.methods == ()
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


# Streaming


def no_stream_threads() -> bool:
    return not any(thread.name == "mmlm-stream" for thread in threading.enumerate())


@pytest.mark.parametrize("method", ["none", "flowcut:9"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5}])
def test_stream_equals_ask(lmm: EfficientLMM, method: str, sampling: dict[str, Any]) -> None:
    options: dict[str, Any] = {"methods": method, "max_new_tokens": 10, **sampling}
    stream = lmm.stream(QUESTION, picture(), **options)
    pieces = list(stream)
    answer = lmm.ask(QUESTION, picture(), **options)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text
    assert stream.answer is not None
    assert stream.answer.text == answer.text
    assert stream.answer.usage.kv_bytes == answer.usage.kv_bytes
    assert list(stream) == []
    assert no_stream_threads()


def test_stream_uses_the_methods_of_its_caller(lmm: EfficientLMM) -> None:
    with lmm.using("flowcut:9"):
        stream = lmm.stream(QUESTION, picture(), max_new_tokens=3)
    list(stream)
    assert stream.answer is not None
    assert stream.answer.usage.visual_tokens_kept["layer"] == 9


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_a_stream_early_stops_the_generation(lmm: EfficientLMM, how: str) -> None:
    stream = lmm.stream(QUESTION, picture(), max_new_tokens=400)
    assert next(stream)
    if how == "close":
        stream.close()
        stream.close()
    elif how == "with":
        with stream:
            next(stream)
    if how == "drop":
        del stream
    else:
        assert stream.answer is not None
        assert stream.answer.finish_reason == "cancelled"
        assert 1 <= stream.answer.usage.completion_tokens < 400
    assert no_stream_threads()


def test_bad_input_raises_before_the_stream_starts(lmm: EfficientLMM) -> None:
    with pytest.raises(PromptError, match="is empty"):
        lmm.stream("", picture())
    with pytest.raises(SettingsError, match="num_beams"):
        lmm.stream(QUESTION, picture(), num_beams=2)
    with pytest.raises(SettingsError, match="seed must be"):
        lmm.stream(QUESTION, picture(), seed=-1)
    with pytest.raises(SettingsError, match="temperature must be"):
        lmm.stream(QUESTION, picture(), temperature=-1)
    with pytest.raises(SettingsError, match="keep_tokens"):
        lmm.stream(QUESTION, picture(), methods=FlowCut(keep_tokens=(9, 9)))
    with (
        EfficientLMM(
            tiny_llava(language={"max_position_embeddings": 40}), tiny_processor()
        ) as small,
        pytest.raises(PromptError, match=r"42 positions.* 40"),
    ):
        small.stream(QUESTION, picture())
    assert no_stream_threads()


def test_an_error_while_generating_reaches_the_reader(lmm: EfficientLMM) -> None:
    def fail(batch: int, ids: torch.Tensor) -> list[int]:
        raise RuntimeError("broken on purpose")

    stream = lmm.stream(QUESTION, picture(), prefix_allowed_tokens_fn=fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(stream)
    assert list(stream) == []
    assert no_stream_threads()


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
