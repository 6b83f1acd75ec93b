"""VAR as a method: every family, batches, every pruning method, and never by accident."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

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
