"""VAR as a method: every family, batches, every pruning method, and never by accident."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from transformers.cache_utils import StaticLayer

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import MMLMError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import METHODS
from mmlm_efficient.pruning.base import PruningMethod
from mmlm_efficient.settings import as_methods
from mmlm_efficient.sinks.recorder import LayerStats
from mmlm_efficient.sinks.var import PRESETS, VAR
from tests import tiny, tiny_families
from tests.test_matrix import FAMILIES, generated, inputs_of, logits_of, method
from tests.tiny_processor import tiny_processor

# Random weights have no massive activations: thresholds are low, so that there are sinks.
SINKS: dict[str, Any] = {
    "sink_dims": [3, 11],
    "sink_threshold": 1.2,
    "min_nonsink_ratio": 0.2,
    "min_image_mass": 0.1,
    "first_layer": 1,
    "skip_last_layer": False,
}


@functools.cache
def parts_of(family: str) -> LMMParts:
    model = tiny.tiny_llava() if family == "llava" else tiny_families.tiny_model(family)
    return LMMParts(model)


def prepared(family: str, *methods: Any, sample: int | None = None, **changes: Any) -> Prepared:
    inputs = {**inputs_of(family, sample), **changes}
    with torch.no_grad():
        return prepare(parts_of(family), inputs, methods)


def stats_of(one: Prepared, sample: int = 0) -> tuple[LayerStats, ...]:
    request: Any = one._attention
    found: tuple[LayerStats, ...] = request.recorder.stats(sample)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_changes_rows_of_every_family(family: str) -> None:
    one = prepared(family, VAR(**SINKS, return_stats=True))
    changed = logits_of(one)
    stock = logits_of(prepared(family))
    assert changed.shape == stock.shape
    assert not torch.equal(changed, stock)
    layers = stats_of(one)
    assert sum(layer.selected for layer in layers) > 0
    for layer in layers:
        assert 0 <= layer.selected <= layer.eligible
        mass = layer.after.sum(dim=1) - layer.before.sum(dim=1)
        assert (mass > -1e-6).all(), "the image as a whole never loses attention"
        assert set(layer.visual_sinks) <= set(layer.visual)
        assert not set(layer.text_sinks) & set(layer.visual)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"redistribute_fraction": 0.0},
        {"sink_threshold": 3.0, "sink_dims": [0], "min_image_mass": 1.0},
    ],
)
@torch.no_grad()
def test_nothing_to_hand_on_is_the_stock_model_to_the_bit(
    family: str, settings: dict[str, Any]
) -> None:
    one = VAR(**{**SINKS, **settings})
    width = parts_of(family).identity.decoder_width
    if "sink_threshold" in settings:
        one = VAR(**{**SINKS, "sink_threshold": 0.999 * width**0.5})
    assert torch.equal(logits_of(prepared(family, one)), logits_of(prepared(family)))
    assert generated(prepared(family, one)) == generated(prepared(family))


@torch.no_grad()
def test_a_prompt_without_pictures_is_untouched() -> None:
    inputs = {"sample": 1}
    one = prepared("llava", VAR(**SINKS), **inputs)  # type: ignore[arg-type]
    assert one._attention is None
    assert torch.equal(logits_of(one), logits_of(prepared("llava", **inputs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_does_not_depend_on_its_batch(family: str) -> None:
    together = prepared(family, VAR(**SINKS))
    logits, tokens = logits_of(together), generated(together)
    for sample in range(len(tokens)):
        alone = prepared(family, VAR(**SINKS), sample=sample)
        own = logits_of(alone)[0]
        torch.testing.assert_close(logits[sample][-own.shape[0] :], own, atol=2e-4, rtol=1e-4)
        assert generated(alone) == [tokens[sample]]


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


@pytest.mark.parametrize("evaluation", ["rows", "partial_sums"])
@torch.no_grad()
def test_all_evaluations_agree(evaluation: Any) -> None:
    auto = logits_of(prepared("llava", VAR(**SINKS)))
    forced = logits_of(prepared("llava", VAR(**SINKS, evaluation=evaluation)))
    torch.testing.assert_close(forced, auto, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, cls in METHODS.items()
        if issubclass(cls, PruningMethod) and name != "keep_mask"
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_every_pruning_method(name: str, family: str) -> None:
    """The visual keys of a layer are the tokens that are left when it runs."""
    pruning = method(name, 0.5)
    both = prepared(family, pruning, VAR(**SINKS, return_stats=True))
    logits = logits_of(both)
    assert torch.isfinite(logits).all()
    reports = both.report().images
    for sample in range(len(both.layout.blocks)):
        counts = [one.decoder_layer_tokens for one in reports if one.sample == sample]
        for layer in stats_of(both, sample):
            assert len(layer.visual) == sum(count[layer.layer] for count in counts)
    pruned = prepared(family, pruning)
    assert not torch.equal(logits_of(pruned), logits)
    assert generated(both) == generated(both, use_cache=False)


def test_an_unknown_backbone_names_the_calibration() -> None:
    with pytest.raises(SettingsError, match="mmlm calibrate sinks"):
        EfficientLMM(tiny.tiny_llava(), tiny_processor(), methods=[VAR()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink_dims": [900]}, "sink_dims"),
        ({"sink_threshold": 50.0}, r"sqrt\(hidden size\)"),
        ({"first_layer": 9}, "decoder layers 0 to"),
        ({"layers": [0, 77]}, r"layers=\[0, 77\]"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        EfficientLMM(tiny.tiny_llava(), tiny_processor(), methods=[VAR(**{**SINKS, **settings})])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_nonsink_ratio": 1.2}, "min_nonsink_ratio"),
        ({"redistribute_fraction": -0.1}, "redistribute_fraction"),
        ({"min_image_mass": float("nan")}, "min_image_mass"),
        ({"rho": 0.5}, "unknown setting 'rho'. The paper's rho is min_nonsink_ratio"),
        ({"sink_threshold": -1.0}, "sink_threshold"),
        ({"sink_dims": []}, "one or more different integers"),
        ({"sink_dims": [3, 3]}, "one or more different integers"),
        ({"layers": [2, 2]}, "different numbers"),
        ({"layers": []}, "one or more"),
        ({"task_preset": "generell"}, "task_preset"),
        ({"evaluation": "eager"}, "evaluation"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        VAR(**settings)


def test_presets_give_what_is_left_out() -> None:
    assert VAR().min_nonsink_ratio == VAR(task_preset="general").min_nonsink_ratio == 0.8
    released = VAR(task_preset="released_config")
    assert (released.redistribute_fraction, released.skip_last_layer) == (0.4, False)
    assert VAR(task_preset="vision_centric", min_nonsink_ratio=0.3).min_nonsink_ratio == 0.3
    [written] = as_methods({"name": "var", "task_preset": "hallucination"})
    assert isinstance(written, VAR)
    assert written.min_nonsink_ratio == PRESETS["hallucination"]["min_nonsink_ratio"]


def test_other_attention_backends_are_refused() -> None:
    model = tiny.tiny_llava(attn="eager")
    with LMMParts(model) as parts, pytest.raises(UnsupportedError, match="attn_implementation"):
        prepare(parts, inputs_of("llava"), [VAR(**SINKS)])


def test_two_of_them_clash() -> None:
    with pytest.raises(SettingsError, match="attention station"):
        prepared("llava", VAR(**SINKS), VAR(**SINKS))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
    ],
)
def test_inputs_that_it_cannot_follow(changes: dict[str, Any], message: str) -> None:
    inputs = {**inputs_of("llava"), **changes}
    with pytest.raises((UnsupportedError, PromptError), match=message):
        prepare(parts_of("llava"), inputs, [VAR(**SINKS)])


def test_a_filled_cache_is_refused_even_without_a_picture() -> None:
    parts = parts_of("llava")
    with torch.no_grad():
        cache = parts.model(**inputs_of("llava", 0), use_cache=True).past_key_values
    turn = {"input_ids": torch.tensor([[5, 6]]), "past_key_values": cache}
    with pytest.raises(UnsupportedError, match="past_key_values"):
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


def test_beams_of_a_mixed_batch_score_as_alone() -> None:
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}

    def scores(sample: int | None) -> torch.Tensor:
        one = prepared("llava", VAR(**SINKS), sample=sample)
        with one.active(), torch.no_grad():
            output = one.parts.model.generate(**one.model_inputs, **options)
        found: torch.Tensor = output.sequences_scores
        return found

    together = scores(None)
    alone = torch.cat([scores(sample) for sample in range(len(together))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_padding_is_no_sink() -> None:
    model = tiny.tiny_llava()
    with torch.no_grad():  # the embedding of the padding is massive
        model.model.language_model.embed_tokens.weight[0, SINKS["sink_dims"][0]] = 50.0
    inputs = inputs_of("llava")
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, 0)
    with LMMParts(model) as parts, torch.no_grad():
        one = prepare(parts, inputs, [VAR(**SINKS, return_stats=True)])
        logits_of(one)
        for sample, row in enumerate(one.layout.mask):
            padding = set(torch.nonzero(~row).flatten().tolist())
            for layer in stats_of(one, sample):
                assert not padding & {*layer.text_sinks, *layer.visual_sinks}


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
        want, cache = output.logits[:, -1].clone(), output.past_key_values
        recorded = [(layer.eligible, layer.by_head) for layer in stats_of(one)]
        cache.crop(-2)
        last = one.model_inputs["input_ids"][:, -2:]
        again = one.parts.model(input_ids=last, past_key_values=cache)
    torch.testing.assert_close(again.logits[:, -1], want, atol=2e-5, rtol=0)
    assert [(layer.eligible, layer.by_head) for layer in stats_of(one)] == recorded


@torch.no_grad()
def test_a_cache_of_another_request_is_refused() -> None:
    first, second = (prepared("llava", VAR(**SINKS), sample=0) for _ in range(2))
    with first.active():
        cache = first.parts.model(**first.model_inputs, use_cache=True).past_key_values
    word = torch.tensor([[5]])
    with second.active(), pytest.raises(UnsupportedError, match="has not seen all"):
        second.parts.model(input_ids=word, past_key_values=cache)


@torch.no_grad()
def test_another_backend_between_requests() -> None:
    model, inputs = tiny.tiny_llava(), inputs_of("llava")
    with EfficientLMM(model, tiny_processor(), methods=[VAR(**SINKS)]) as lmm:
        lmm.forward(**inputs)
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="attn_implementation='eager'"):
            lmm.forward(**inputs)
    assert model.config.text_config._attn_implementation == "eager", "as the user chose"


@torch.no_grad()
def test_features_and_embeddings_are_refused_unless_nothing_is_handed_on() -> None:
    model, inputs = tiny.tiny_llava(), inputs_of("llava", 0)
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with EfficientLMM(model, tiny_processor(), methods=[VAR(**SINKS)]) as lmm:
        for name, value in (("inputs_embeds", embeds), ("mm_encoder_outputs", features)):
            with pytest.raises(MMLMError, match=f"^{name}: "):
                lmm.forward(**inputs, **{name: value})
        idle = VAR(**{**SINKS, "redistribute_fraction": 0.0})
        got = lmm.forward(**inputs, vision_feature_layer=-3, methods=[idle]).logits
        assert torch.equal(got, model(**inputs, vision_feature_layer=-3).logits)
