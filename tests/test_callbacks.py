"""What generate() calls while it decodes sees the caller's own prompt, whatever methods cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mmlm_efficient import EfficientLMM, FastV, load
from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.pocket import scene
from mmlm_efficient.prompts import preprocess
from tests.tiny_processor import picture

METHODS: list[Any] = [(), "flowcut:9", FastV(keep_tokens=9, layer=1)]
ASKED: list[Any] = [
    ("where cat ?", picture(0)),
    ("cat ?", None),
    ("where w11 w12 cat ?", [picture(1), picture(2)]),
]


class Seen:
    """All kinds of functions of a caller, and the ids that they were given."""

    def __init__(self, vocabulary: int) -> None:
        self.ids: dict[str, list[Tensor]] = {}
        seen, everything = self.ids, list(range(vocabulary))

        class Criterion(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                seen.setdefault("criterion", []).append(input_ids.clone())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        class Processor(LogitsProcessor):
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                seen.setdefault("processor", []).append(input_ids.clone())
                return scores

        class Streamer:
            def put(self, value: Tensor) -> None:
                seen.setdefault("streamer", []).append(value.clone())

            def end(self) -> None:
                seen.setdefault("end", [])

        def allowed(number: int, ids: Tensor) -> list[int]:
            seen.setdefault(f"allowed {number}", []).append(ids.clone())
            return everything

        self.options: dict[str, Any] = {
            "stopping_criteria": [Criterion()],
            "logits_processor": [Processor()],
            "prefix_allowed_tokens_fn": allowed,
        }
        self.streamer = Streamer()


def inputs_of(lmm: EfficientLMM, asked: Any) -> dict[str, Tensor]:
    return dict(preprocess(lmm.processor, asked, torch.float32, lmm.parts.family))


@pytest.mark.parametrize("methods", METHODS)
def test_every_function_sees_the_callers_ids(lmm: EfficientLMM, methods: Any) -> None:
    for asked in (ASKED[:1], ASKED):
        inputs = inputs_of(lmm, asked)
        prompt, seen = inputs["input_ids"], Seen(lmm.model.config.text_config.vocab_size)
        more = {"streamer": seen.streamer} if len(asked) == 1 else {}
        ids = lmm.generate(**inputs, methods=methods, max_new_tokens=3, **seen.options, **more)
        assert torch.equal(seen.ids["criterion"][-1], ids)
        assert [len(one[0]) - prompt.shape[1] for one in seen.ids["criterion"]] == [1, 2, 3]
        assert torch.equal(seen.ids["processor"][0], prompt)
        for number, row in enumerate(prompt):
            assert torch.equal(seen.ids[f"allowed {number}"][0], row)
        if more:
            assert torch.equal(seen.ids["streamer"][0], prompt)
            assert torch.equal(torch.stack(seen.ids["streamer"][1:], dim=1), ids[:, -3:])
            assert "end" in seen.ids


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "seed": 1}]
)
@pytest.mark.parametrize("asked", [ASKED[:1], ASKED[::2]])
def test_several_rows_for_one_prompt(lmm: EfficientLMM, options: Any, asked: Any) -> None:
    inputs = inputs_of(lmm, asked)
    prompt, seen = inputs["input_ids"], Seen(lmm.model.config.text_config.vocab_size)
    lmm.generate(**inputs, methods="flowcut:9", max_new_tokens=2, **seen.options, **options)
    twice = prompt.repeat_interleave(2, dim=0)
    assert torch.equal(seen.ids["processor"][0], twice)
    judged = seen.ids["criterion"][0][:, : prompt.shape[1]]  # of beams, more than are kept
    rows = prompt.repeat_interleave(len(judged) // len(prompt), dim=0)
    assert torch.equal(judged, rows)
    stock = Seen(lmm.model.config.text_config.vocab_size)
    lmm.generate(**inputs, methods=(), max_new_tokens=2, **stock.options, **options)
    names = [name for name in stock.ids if name.startswith("allowed")]
    assert names
    for name in names:  # as the installed release numbers them
        assert torch.equal(seen.ids[name][0], stock.ids[name][0])


def test_a_limit_of_the_callers_stops_where_it_says(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, ASKED)
    length = inputs["input_ids"].shape[1]
    limit = StoppingCriteriaList([MaxLengthCriteria(length + 4)])
    for methods in METHODS:
        ids = lmm.generate(
            **inputs, methods=methods, stopping_criteria=limit, max_new_tokens=20, eos_token_id=None
        )
        assert ids.shape[1] == length + 4


@pytest.mark.parametrize("methods", METHODS)
def test_what_is_transformers_own_replaces_what_settings_make(
    lmm: EfficientLMM, methods: Any
) -> None:
    """generate() leaves out its own criterion or processor where it is given one of that type."""
    inputs = inputs_of(lmm, ASKED)
    length = inputs["input_ids"].shape[1]
    longer = [MaxLengthCriteria(length + 4)]
    options: dict[str, Any] = {"methods": methods, "eos_token_id": None}
    ids = lmm.generate(**inputs, stopping_criteria=longer, max_new_tokens=2, **options)
    assert ids.shape[1] == length + 4
    plain = lmm.generate(**inputs, max_new_tokens=4, **options)
    neutral = [RepetitionPenaltyLogitsProcessor(1.0)]
    ids = lmm.generate(
        **inputs, logits_processor=neutral, repetition_penalty=9.0, max_new_tokens=4, **options
    )
    assert torch.equal(ids, plain)


# Where an answer ends


@pytest.fixture(scope="module")
def pocket() -> Iterator[EfficientLMM]:
    with load("pocket") as loaded:
        ids = loaded.model.generation_config
        ids.pad_token_id = ids.eos_token_id
        yield loaded


SCENES: list[Any] = [
    ("What is in the picture?", scene("heldout", 56).image),
    ("How many objects are there?", scene("heldout", 57).image),
    ("What is in the picture?", scene("heldout", 58).image),
]


@pytest.mark.parametrize("methods", [(), "flowcut:36"])
@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"stop_strings": ["pig", "1", "ball"]},
        {"stop_strings": ["pig", "1", "ball"], "num_beams": 3},
    ],
)
def test_tokens_are_counted_alike_alone_and_in_a_batch(
    pocket: EfficientLMM, methods: Any, ends: Any
) -> None:
    """The padding behind an answer that ended is no end token, though it looks like one."""
    together = pocket.ask_batch(SCENES, methods=methods, **ends)
    for one, asked in zip(together, SCENES, strict=True):
        alone = pocket.ask(*asked, methods=methods, **ends)
        assert one.text == alone.text
        assert one.finish_reason == alone.finish_reason == "stop"
        assert one.usage.completion_tokens == alone.usage.completion_tokens
    assert len({one.usage.completion_tokens for one in together}) > 1


def test_a_criterion_of_the_callers_that_ends_rows(pocket: EfficientLMM) -> None:
    tokenizer = pocket.processor.tokenizer
    comma = tokenizer.encode(",", add_special_tokens=False)[-1]

    def at_comma(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == comma

    together = pocket.ask_batch(SCENES, stopping_criteria=[at_comma])
    counts = [one.usage.completion_tokens for one in together]
    alone = [pocket.ask(*asked, stopping_criteria=[at_comma]) for asked in SCENES]
    assert counts == [one.usage.completion_tokens for one in alone]
    assert together[0].text.endswith(",")
    assert "," not in together[1].text


def test_rows_that_end_without_an_end_token(pocket: EfficientLMM) -> None:
    """Without one, transformers goes on writing behind what has ended."""
    config = GenerationConfig(eos_token_id=None, pad_token_id=0, stop_strings=["pig", "1"])
    together = pocket.ask_batch(SCENES[:2], generation_config=config, max_new_tokens=12)
    assert [one.text[-3:].strip() for one in together] == ["pig", "1"]


# Settings that would be ignored or fail far below


def test_settings_of_generate_are_no_inputs_of_forward(lmm: EfficientLMM) -> None:
    inputs = inputs_of(lmm, ASKED)
    for name in ("top_k", "max_new_tokens", "pixel_value"):
        with pytest.raises(SettingsError, match=f"forward: '{name}' is unknown"):
            lmm.forward(**inputs, **{name: 5})
    output = lmm.forward(
        **inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1, return_dict=True
    )
    assert output.logits.shape[1] == 1
    assert output.hidden_states is not None


def test_an_early_exit_is_refused(lmm: EfficientLMM) -> None:
    with pytest.raises(UnsupportedError, match="assistant_early_exit.*Leave it out"):
        lmm.generate(**inputs_of(lmm, ASKED[:1]), assistant_early_exit=1)


# Seeds: only where something is drawn, not around the forward


def test_a_seed_does_not_wrap_the_model(lmm: EfficientLMM) -> None:
    modes: list[int] = []
    hook = lmm.model.lm_head.register_forward_hook(
        lambda *_: modes.append(torch._C._len_torch_function_stack())
    )
    inputs = inputs_of(lmm, ASKED[:1])
    drawn = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 6}
    try:
        for options in ({"max_new_tokens": 6}, drawn, {**drawn, "num_beams": 2}):
            lmm.generate(**inputs, seed=3, methods=(), **options)
    finally:
        hook.remove()
    assert len(modes) >= 18
    assert not any(modes)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_a_seed_draws_what_torchs_own_seed_draws(lmm: EfficientLMM, more: Any) -> None:
    inputs = inputs_of(lmm, ASKED[:1])
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8, **more}
    torch.manual_seed(7)
    want = lmm.model.generate(**inputs, **options)
    state = torch.get_rng_state()
    assert torch.equal(lmm.generate(**inputs, methods=(), seed=7, **options), want)
    assert torch.equal(torch.get_rng_state(), state)
    others = [lmm.generate(**inputs, methods=(), seed=seed, **options) for seed in (8, 9)]
    assert any(not torch.equal(other, want) for other in others)


def test_functions_of_the_callers_draw_from_the_seed_too(lmm: EfficientLMM) -> None:
    drawn: list[int] = []

    def draws(input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn.append(int(torch.multinomial(torch.ones(1000), 1)))
        return scores

    inputs, runs = inputs_of(lmm, ASKED[:1]), []
    for sampling in ({"do_sample": True}, {"do_sample": True}, {}, {}):
        drawn.clear()
        lmm.generate(**inputs, seed=3, logits_processor=[draws], max_new_tokens=4, **sampling)
        runs.append(list(drawn))
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert len(set(runs[0])) > 1


def test_a_draw_that_fails_leaves_no_mode_behind(lmm: EfficientLMM) -> None:
    def fails(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        lmm.generate(**inputs_of(lmm, ASKED[:1]), seed=1, do_sample=True, stopping_criteria=[fails])
    assert torch._C._len_torch_function_stack() == 0
