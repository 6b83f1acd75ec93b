"""VAR while requests run: caches, chunks, beams, threads, several wrappers, and what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.cache_utils import StaticLayer

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.sinks.recorder import Forward
from mmlm_efficient.sinks.redistribution import Keys
from mmlm_efficient.sinks.request import RedistributionRequest
from mmlm_efficient.sinks.var import VAR
from mmlm_efficient.stations.attention import NAME
from mmlm_efficient.stations.handed import CACHE
from tests import tiny
from tests.sinks.test_var import SINKS, parts_of, prepared, stats_of
from tests.test_matrix import FAMILIES, LLAVA, generated, inputs_of, logits_of
from tests.tiny_processor import tiny_processor


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_or_not_is_the_same(family: str) -> None:
    one = prepared(family, VAR(**SINKS))
    assert generated(one) == generated(one, use_cache=False)


@torch.no_grad()
def test_prefill_in_chunks_and_beams() -> None:
    one = prepared("llava", VAR(**SINKS))
    assert generated(one) == generated(one, prefill_chunk_size=5)
    beams = generated(one, num_beams=3)
    for sample, tokens in enumerate(beams):
        alone = prepared("llava", VAR(**SINKS), sample=sample)
        assert generated(alone, num_beams=3) == [tokens]


def test_threads_do_not_see_each_other() -> None:
    ones = [(), (VAR(**SINKS),), (VAR(**{**SINKS, "redistribute_fraction": 0.3}),)] * 4
    alone = []
    for methods in ones[:3]:
        with torch.no_grad():
            alone.append(logits_of(prepared("llava", *methods)))
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            found[number] = logits_of(prepared("llava", *ones[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(ones))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in found.items():
        assert torch.equal(logits, alone[number % 3])


def test_closing_gives_the_model_back() -> None:
    model = tiny.tiny_llava()
    inputs = inputs_of("llava")
    with torch.no_grad():
        stock = model(**inputs).logits
        with LMMParts(model) as parts:
            logits_of(prepare(parts, inputs, [VAR(**SINKS)]))
            assert model.config.text_config._attn_implementation != "sdpa"
        assert model.config.text_config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, stock)


def test_guidance_would_run_a_second_prompt() -> None:
    with (
        EfficientLMM(tiny.tiny_llava(), tiny_processor(), methods=[VAR(**SINKS)]) as lmm,
        pytest.raises(UnsupportedError, match="guidance_scale"),
    ):
        lmm.generate(**inputs_of("llava"), guidance_scale=1.5, max_new_tokens=2)


def step_logits(lmm_parts: LMMParts, inputs: Any, methods: Any, **options: Any) -> torch.Tensor:
    """Logits [steps, vocabulary] of a few greedy tokens."""
    with torch.no_grad():
        one = prepare(lmm_parts, inputs, methods)
        with one.active():
            output = lmm_parts.model.generate(
                **one.model_inputs,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
    return torch.cat(output.logits)


@pytest.mark.parametrize("sample", [0, None])
def test_a_static_cache_is_the_dynamic_one(sample: int | None) -> None:
    """Unpadded, its prefill has no mask, and keys behind the prompt that nobody sees."""
    parts, inputs = parts_of("llava"), inputs_of("llava", sample)
    methods = [VAR(**SINKS)]
    dynamic = step_logits(parts, inputs, methods)
    static = step_logits(parts, inputs, methods, cache_implementation="static")
    torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
@pytest.mark.parametrize("window", [4, 12, 30])
def test_sliding_windows_with_a_cache_are_those_without(text: str, window: int) -> None:
    language: dict[str, Any] = {"sliding_window": window}
    if text == "qwen2":
        language |= {"use_sliding_window": True, "max_window_layers": 1}
    with LMMParts(tiny.tiny_llava(text=text, language=language)) as parts:
        inputs, methods = inputs_of("llava", 0), [VAR(**SINKS)]
        cached = step_logits(parts, inputs, methods)
        again = step_logits(parts, inputs, methods, use_cache=False)
        torch.testing.assert_close(cached, again, atol=1e-5, rtol=1e-4)
        assert not torch.equal(cached, step_logits(parts, inputs, ()))


def test_the_cache_does_not_change_the_logits() -> None:
    parts, methods = parts_of("llava"), [VAR(**SINKS)]
    for sample in (0, 2, None):
        inputs = inputs_of("llava", sample)
        cached = step_logits(parts, inputs, methods)
        for options in ({"use_cache": False}, {"prefill_chunk_size": 5}):
            other = step_logits(parts, inputs, methods, **options)
            torch.testing.assert_close(other, cached, atol=2e-5, rtol=1e-4)


def test_two_wrappers_of_one_model() -> None:
    model, inputs, methods = tiny.tiny_llava(), inputs_of("llava"), [VAR(**SINKS)]
    first, second = LMMParts(model), LMMParts(model)

    def logits(parts: LMMParts) -> torch.Tensor:
        with torch.no_grad():
            return logits_of(prepare(parts, inputs, methods))

    expected = logits(first)
    assert torch.equal(logits(second), expected)
    first.close()
    assert torch.equal(logits(second), expected), "VAR works on in the other wrapper"
    model.model.language_model.set_attn_implementation("sdpa")  # by the user
    assert torch.equal(logits(second), expected)
    second.close()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_wrapper_closed_while_another_one_runs() -> None:
    model, inputs, methods = tiny.tiny_llava(), inputs_of("llava"), [VAR(**SINKS)]
    first, second = LMMParts(model), LMMParts(model)
    with torch.no_grad():
        expected = logits_of(prepare(first, inputs, methods))
        one = prepare(second, inputs, methods)
        with one.active():
            first.close()
            assert model.config.text_config._attn_implementation == NAME
            assert torch.equal(model(**one.model_inputs).logits, expected)
    first.close()  # again: it counts once
    assert model.config.text_config._attn_implementation == NAME
    second.close()
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_closed_station_refuses_what_was_prepared() -> None:
    parts = LMMParts(tiny.tiny_llava())
    with torch.no_grad():
        one = prepare(parts, inputs_of("llava"), [VAR(**SINKS)])
    parts.close()
    with pytest.raises(UnsupportedError, match="was closed"):
        logits_of(one)
    assert parts.model.config.text_config._attn_implementation == "sdpa"
    parts = LMMParts(tiny.tiny_llava())
    with torch.no_grad():
        one = prepare(parts, inputs_of("llava"), [VAR(**SINKS)])
        with pytest.raises(UnsupportedError, match="was closed"), one.active():
            parts.close()


def test_a_filled_cache_is_refused_even_without_a_picture() -> None:
    parts = parts_of("llava")
    with torch.no_grad():
        cache = parts.model(**inputs_of("llava", 0), use_cache=True)[CACHE]
    turn = {"input_ids": torch.tensor([[5, 6]]), CACHE: cache}
    with pytest.raises(UnsupportedError, match=CACHE):
        prepare(parts, turn, [VAR(**SINKS)])


def test_training_is_refused() -> None:
    model = tiny.tiny_llava()
    with LMMParts(model) as parts:
        with torch.no_grad():
            one = prepare(parts, inputs_of("llava"), [VAR(**SINKS)])
        with pytest.raises(UnsupportedError, match="VAR is for inference"):
            logits_of(one)
        model.train()
        with torch.no_grad(), pytest.raises(UnsupportedError, match="in training mode"):
            logits_of(one)


@pytest.mark.parametrize("members", [(0, 2), (0, 1, 2, 3)], ids=["pictures", "mixed"])
def test_beams_of_a_batch_score_as_alone(members: tuple[int, ...]) -> None:
    """In every beam of every step: with another prompt's flags the scores would be others."""
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}

    def scores(inputs: dict[str, torch.Tensor], *methods: VAR) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [prompts, steps, beams, vocabulary], and of the best sequences [prompts]."""
        with torch.no_grad():
            one = prepare(parts_of("llava"), inputs, methods)
            with one.active():
                output = one.parts.model.generate(**one.model_inputs, **options)
        steps = torch.stack(output.scores).unflatten(1, (-1, 3)).transpose(0, 1)
        return steps, output.sequences_scores

    alone = [inputs_of("llava", sample) for sample in members]
    pictures = [one["pixel_values"] for one in alone if "pixel_values" in one]
    together = tiny.batch([LLAVA[sample][0] for sample in members], torch.cat(pictures))
    steps, best = scores(together, VAR(**SINKS))
    stock, _ = scores(together)
    for number, inputs in enumerate(alone):
        own, own_best = scores(inputs, VAR(**SINKS))
        torch.testing.assert_close(steps[number], own[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(best[number], own_best[0], atol=1e-5, rtol=0)
    # So that this can fail: the rows of these two are changed, those of the others are not.
    changes = [not torch.allclose(*pair, atol=1e-2) for pair in zip(steps, stock, strict=True)]
    assert changes == [sample in (0, 2) for sample in members]


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 9}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("window", [8, 20, 45])
def test_sliding_windows_and_what_is_recorded(window: int, options: dict[str, Any]) -> None:
    """Flags and maps are of the whole prompt, also where a cache returns its last keys only."""
    language = {"sliding_window": window}
    with LMMParts(tiny.tiny_llava(text="mistral", language=language)) as parts:
        for sample in (None, 0):
            inputs, methods = inputs_of("llava", sample), [VAR(**SINKS, return_stats=True)]
            with torch.no_grad():
                ones = [prepare(parts, inputs, methods) for _ in range(2)]
                found = []
                for one, given in zip(ones, ({}, options), strict=True):
                    with one.active():
                        output = parts.model.generate(
                            **one.model_inputs,
                            max_new_tokens=5,
                            min_new_tokens=5,
                            do_sample=False,
                            output_logits=True,
                            return_dict_in_generate=True,
                            **given,
                        )
                    found.append(torch.cat(output.logits))
            torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
            for want, got in zip(stats_of(ones[0]), stats_of(ones[1]), strict=True):
                torch.testing.assert_close(got.before, want.before, atol=1e-5, rtol=0)
                torch.testing.assert_close(got.after, want.after, atol=1e-5, rtol=0)
                assert (got.selected, got.eligible) == (want.selected, want.eligible)
                assert got.decoded == want.decoded
                assert got.visual_sinks == want.visual_sinks


@torch.no_grad()
def test_a_static_cache_is_asked_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts on the device: to ask is to wait for it."""
    asked = 0

    class Length(torch.Tensor):
        def __int__(self) -> int:
            nonlocal asked
            asked += 1
            return int(self.as_subclass(torch.Tensor))

    stock: Any = StaticLayer.get_seq_length

    def counted(layer: StaticLayer) -> Any:
        length = stock(layer)
        return length.as_subclass(Length) if isinstance(length, torch.Tensor) else length

    monkeypatch.setattr(StaticLayer, "get_seq_length", counted)
    step_logits(
        parts_of("llava"), inputs_of("llava"), [VAR(**SINKS)], cache_implementation="static"
    )
    assert asked == 4, "the prefill finds no tensor yet; four tokens run behind it"


@torch.no_grad()
def test_a_prompt_that_runs_again_behind_a_crop() -> None:
    one = prepared("llava", VAR(**SINKS, return_stats=True), sample=0)
    with one.active():
        output = one.parts.model(**one.model_inputs, use_cache=True)
        want, cache = output.logits[:, -1].clone(), output[CACHE]
        recorded = [(layer.eligible, layer.by_head) for layer in stats_of(one)]
        cache.crop(-2)
        last = one.model_inputs["input_ids"][:, -2:]
        again = one.parts.model(input_ids=last, **{CACHE: cache})
    torch.testing.assert_close(again.logits[:, -1], want, atol=2e-5, rtol=0)
    assert [(layer.eligible, layer.by_head) for layer in stats_of(one)] == recorded


@torch.no_grad()
def test_a_cache_of_another_request_is_refused() -> None:
    first, second = (prepared("llava", VAR(**SINKS), sample=0) for _ in range(2))
    with first.active():
        cache = first.parts.model(**first.model_inputs, use_cache=True)[CACHE]
    word = torch.tensor([[5]])
    with second.active(), pytest.raises(UnsupportedError, match="has not seen all"):
        second.parts.model(input_ids=word, **{CACHE: cache})


@torch.no_grad()
def test_another_backend_between_requests() -> None:
    model, inputs = tiny.tiny_llava(), inputs_of("llava")
    with EfficientLMM(model, tiny_processor(), methods=[VAR(**SINKS)]) as lmm:
        lmm.forward(**inputs)
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="attn_implementation='eager'"):
            lmm.forward(**inputs)
    assert model.config.text_config._attn_implementation == "eager", "as the user chose"


@pytest.mark.parametrize("rows", [1, 6])
@torch.no_grad()
def test_a_batch_of_other_prompts_is_refused(rows: int) -> None:
    one = prepared("llava", VAR(**SINKS))
    language = one.parts.family.decoder.module
    embeds = torch.randn(rows, one.layout.mask.shape[1], language.config.hidden_size)
    message = rf"prepared for 4 prompt\(s\), but the model runs a batch of {rows}\."
    with one.active(), pytest.raises(UnsupportedError, match=message):
        language(inputs_embeds=embeds)


@torch.no_grad()
def test_a_cache_whose_batch_grew_behind_the_prompt_is_refused() -> None:
    one = prepared("llava", VAR(**SINKS), sample=0)
    with one.active():
        cache = one.parts.model(**one.model_inputs, use_cache=True)[CACHE]
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match="^the cache holds"):
            one.parts.model(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache})


def forward_on(keys: str, eligible: str) -> Forward:
    """Three of five prompt tokens in; the flags and the rows are on two devices."""
    flags = torch.ones(2, 3, dtype=torch.bool, device=keys)
    rows = torch.ones(2, 2, dtype=torch.bool, device=eligible)
    picked = torch.tensor([1], device=eligible)
    return Forward(
        past=0, first=1, width=5, offset=0, keys=Keys(flags, flags), eligible=rows, picked=picked
    )


@pytest.mark.parametrize(("keys", "eligible"), [("cpu", "cpu"), ("meta", "cpu"), ("cpu", "meta")])
def test_tables_follow_the_attention_to_its_device(keys: str, eligible: str) -> None:
    """What enters a layer may be on another device than its attention."""
    request = prepared("llava", VAR(**SINKS), sample=0)._attention
    assert isinstance(request, RedistributionRequest)
    given, meta = forward_on(keys, eligible), torch.device("meta")
    moved = request.on_device(2, given, meta)
    assert moved.picked is not None
    tensors = (moved.keys.visual, moved.keys.sink, moved.eligible, moved.picked)
    assert [one.device for one in tensors] == [meta] * 4
    assert [list(one.shape) for one in tensors] == [[2, 3], [2, 3], [2, 2], [1]]
    assert (moved.past, moved.first, moved.width, moved.offset) == (0, 1, 5, 0)
    assert request._keys[2] is moved.keys, "the next forward finds the flags there"
    assert request.on_device(2, moved, meta) is moved
    assert request.on_device(2, replace(given, picked=None), meta).picked is None
