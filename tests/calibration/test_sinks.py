"""Finding sink dimensions: planted ones are found, absent ones are not, doubts are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient import EfficientLMM
from mmlm_efficient.calibration.data import Sample
from mmlm_efficient.calibration.sinks import MOST_DIMS, SinkCalibration, calibrate_sinks
from mmlm_efficient.calibration.sinks_plot import plot_sinks
from mmlm_efficient.calibration.vflowopt import model_inputs
from mmlm_efficient.errors import ContextError, SettingsError, UnsupportedError
from mmlm_efficient.sinks.dimensions import sinks_for
from mmlm_efficient.sinks.fingerprint import Fingerprint
from mmlm_efficient.sinks.flags import default_threshold, sink_flags, sink_scores
from mmlm_efficient.sinks.profiles import named_profile, write_profile
from tests import tiny, tiny_families
from tests.tiny_processor import picture, tiny_processor

WIDTH, LAYERS = 128, 8
LANGUAGE = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}
THRESHOLD = 5.0
FIRST, VISUAL = 0, (6, 21)
DIMS = (90, 37)  # by how massive they are


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return small_samples(tmp_path)


def small_samples(folder: Path, count: int = 4) -> list[Sample]:
    """Prompts for the tiny LLaVA: one begin token, then words and an image."""
    for number in range(count):
        picture(number).save(folder / f"p{number}.png")
    return [Sample(f"p{n}.png", "where cat ?", folder / f"p{n}.png") for n in range(count)]


def language_of(model: Any) -> Any:
    return model.model.language_model


@contextmanager
def planted(
    plants: Sequence[tuple[int, Sequence[int], float]],
    every: int = 1,
    model: Any = None,
    processor: Any = None,
) -> Iterator[EfficientLMM]:
    """A model into whose residual stream values are written in front of the first layer.

    Args:
        plants: (column, dimensions, value).
        every: only prompts number 0, every, 2 * every, ... get them.
        model, processor: another model than the tiny LLaVA.
    """
    model = tiny.tiny_llava(language=LANGUAGE) if model is None else model
    calls = [0]

    def plant(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = args[0].clone()
        if calls[0] % every == 0:
            for column, dims, value in plants:
                for place, dim in enumerate(dims):
                    # Not all the same: the order is a part of the result.
                    hidden[:, column, dim] = value * (1.0 - 0.1 * place) * (-1) ** column
        calls[0] += 1
        return (hidden, *args[1:])

    language_of(model).layers[0].register_forward_pre_hook(plant)
    with EfficientLMM(model, processor or tiny_processor(), name="planted") as lmm:
        yield lmm


def everywhere(dims: Sequence[int] = DIMS, value: float = 300.0) -> list[Any]:
    return [(column, dims, value) for column in (FIRST, *VISUAL)]


def calibrated(lmm: EfficientLMM, samples: Sequence[Sample], **options: Any) -> SinkCalibration:
    return calibrate_sinks(lmm, samples, **{"threshold": THRESHOLD, "progress": False, **options})


# -- what is found -----------------------------------------------------------------------------


def test_planted_dimensions_are_found_exactly(samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples).profile
    assert profile.dims == DIMS
    assert not profile.visual_only
    assert profile.threshold == THRESHOLD
    assert profile.model == "planted"
    assert profile.search["samples"] == 4
    assert len(profile.layers) == LAYERS
    for layer in profile.layers:
        # Two of 36 visual tokens are sinks, in every layer.
        assert layer.per_prompt == 2
        assert layer.share == pytest.approx(2 / tiny.N_PATCHES, rel=1e-4)
        assert layer.rest < THRESHOLD < min(layer.first, layer.visual) <= math.sqrt(WIDTH)


def test_the_default_threshold_finds_them_too(samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples, threshold=None).profile
    assert profile.threshold == default_threshold(WIDTH)
    assert profile.dims == DIMS


def test_dimensions_that_only_visual_tokens_have(samples: list[Sample]) -> None:
    with planted([(column, (61,), 300.0) for column in VISUAL]) as lmm:
        profile = calibrated(lmm, samples).profile
    assert profile.dims == (61,)
    assert profile.visual_only
    assert any(warning.startswith("visual-only: dims [61]") for warning in profile.warnings)
    assert profile.search["candidates"] == []


def test_other_dimensions_at_the_first_token_do_not_count(samples: list[Sample]) -> None:
    # The first token is massive elsewhere than visual tokens.
    plants = [(FIRST, (3, 4), 300.0), *[(column, (61,), 300.0) for column in VISUAL]]
    with planted(plants) as lmm:
        profile = calibrated(lmm, samples).profile
    assert profile.dims == (61,)
    assert profile.visual_only
    assert profile.search["candidates"] == [3, 4]


def test_what_is_left_out_on_visual_tokens_is_told(samples: list[Sample]) -> None:
    plants = [*everywhere((37,)), (30, (61,), 300.0)]
    with planted(plants) as lmm:
        profile = calibrated(lmm, samples).profile
    assert profile.dims == (37,)
    assert not profile.visual_only
    assert "visual tokens are massive in dims [61] too, which were left out" in profile.warnings


def test_at_most_four_dimensions_the_most_massive_ones(samples: list[Sample]) -> None:
    many = (5, 99, 17, 64, 80, 2)
    with planted(everywhere(many)) as lmm:
        profile = calibrated(lmm, samples, threshold=2.0).profile
    assert profile.dims == many[:MOST_DIMS]


@pytest.mark.parametrize(("every", "found"), [(10, True), (11, False)])
def test_a_tenth_of_the_prompts_is_enough(tmp_path: Path, every: int, found: bool) -> None:
    # With 10 prompts every tenth is one, of 11 prompts every eleventh is fewer than a tenth.
    prompts = small_samples(tmp_path, every)
    with planted([(VISUAL[0], (61,), 300.0)], every=every) as lmm:
        if found:
            assert calibrated(lmm, prompts).profile.dims == (61,)
        else:
            with pytest.raises(UnsupportedError, match="no dimension is massive"):
                calibrated(lmm, prompts)


# -- nothing there ---------------------------------------------------------------------------


def test_nothing_planted_is_an_error_that_says_what_was_seen(samples: list[Sample]) -> None:
    model = EfficientLMM(tiny.tiny_llava(language=LANGUAGE), tiny_processor(), name="plain")
    with pytest.raises(UnsupportedError) as caught:
        calibrated(model, samples, threshold=8.0)
    message = str(caught.value)
    assert "plain: no dimension is massive in 4 prompts with the threshold 8." in message
    assert "middle layers (2 to 5)" in message
    assert "sqrt(128) = 11.31" in message


def test_a_massive_first_token_alone_makes_no_visual_sinks(samples: list[Sample]) -> None:
    with (
        planted([(FIRST, (11,), 300.0)]) as lmm,
        pytest.raises(UnsupportedError, match=r"first token is at most 11\S* in dimension 11"),
    ):
        calibrated(lmm, samples, threshold=8.0)


# -- doubts ----------------------------------------------------------------------------------


def test_given_dimensions_that_are_wrong_look_inert(samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples, dims=[5]).profile
    assert profile.dims == (5,)
    assert profile.search["given"] is True
    assert profile.attention_ratio is None
    warnings = "\n".join(profile.warnings)
    assert "dims look inert: no prompt has both" in warnings
    assert "dims [5] are massive on a visual token in fewer than a tenth" in warnings
    assert "visual tokens are massive in dims [37, 90] too" in warnings


def test_given_dimensions_that_are_right_raise_no_such_doubt(samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples, dims=list(DIMS)).profile
    assert not any("fewer than a tenth" in warning for warning in profile.warnings)


def test_sinks_without_attention_look_inert(samples: list[Sample]) -> None:
    model = tiny.tiny_llava(language=LANGUAGE)
    with torch.no_grad():
        for layer in language_of(model).layers:
            layer.self_attn.q_proj.weight.zero_()  # every token looks at all others alike
    with planted(everywhere(), model=model) as lmm:
        profile = calibrated(lmm, samples).profile
    assert profile.attention_ratio == pytest.approx(1.0, abs=1e-4)
    assert any("visual sinks get 1.00 times the attention" in one for one in profile.warnings)


def test_too_many_sinks_are_told(samples: list[Sample]) -> None:
    plants = [(column, (61,), 300.0) for column in range(2, 20)]
    with planted([*everywhere((61,)), *plants]) as lmm:
        warnings = "\n".join(calibrated(lmm, samples).profile.warnings)
    assert (
        "more than 10% of the visual tokens are sinks at decoder layers 2, 3, 4, 5, 6" in warnings
    )
    assert "only 4 prompts: 32 or more are better" in warnings


# -- the numbers -----------------------------------------------------------------------------


def tiny_llava() -> tuple[Any, Any]:
    return tiny.tiny_llava(language=LANGUAGE, attn="eager"), tiny_processor()


def tiny_qwen() -> tuple[Any, Any]:
    model = tiny_families.tiny_model("qwen2_vl")
    model.set_attn_implementation("eager")
    return model, tiny_families.tiny_processor("qwen2_vl")


@pytest.mark.parametrize("build", [tiny_llava, tiny_qwen])
def test_activity_is_what_eager_attention_and_hidden_states_say(
    build: Callable[[], tuple[Any, Any]], samples: list[Sample]
) -> None:
    model, processor = build()
    config = model.config.get_text_config()
    dims = [3, config.hidden_size - 1]
    threshold = 1.01 * math.sqrt(config.hidden_size / 64)  # some tokens are above it
    if processor.__class__.__name__.startswith("Qwen"):
        samples = [Sample(one.name, "w20 w21", one.source) for one in samples]
    with EfficientLMM(model, processor, name="eager") as lmm:
        result = calibrated(lmm, samples, threshold=threshold, dims=dims)
        placeholder = next(iter(lmm._parts.family.placeholders.values()))
        first, visual, pairs, sinks, total = [], [], [], 0, 0
        layer = config.num_hidden_layers // 2
        for sample in samples:
            inputs = model_inputs(lmm, sample)
            with torch.no_grad():
                output = model(**inputs, output_hidden_states=True, output_attentions=True)
            state = output.hidden_states[layer][0]
            shown = inputs["input_ids"][0] == placeholder
            row = output.attentions[layer][0, :, -1].mean(dim=0)[shown]
            flags = sink_flags(state, dims, threshold, shown)[shown]
            first.append(sink_scores(state[:1], [dims[0]]).item())
            visual.append(sink_scores(state[shown], dims).max().item())
            sinks, total = sinks + int(flags.sum()), total + len(flags)
            if flags.any() and not flags.all():
                pairs.append((row[flags].mean().item(), row[~flags].mean().item()))
    seen = result.profile.layers[layer]
    assert pairs
    assert seen.visual == pytest.approx(max(visual), rel=1e-4)
    assert seen.share == pytest.approx(sinks / total, rel=1e-4)
    assert result.first[layer, dims[0]] == pytest.approx(
        sorted(first)[1] / 2 + sorted(first)[2] / 2, rel=1e-4
    )
    to_sinks, to_others = (sum(values) / len(values) for values in zip(*pairs, strict=True))
    assert seen.attention_sinks == pytest.approx(to_sinks, rel=1e-4)
    assert seen.attention_others == pytest.approx(to_others, rel=1e-4)


def test_the_model_runs_once_for_a_prompt_and_is_left_as_it_was(samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        inputs = model_inputs(lmm, samples[0])
        with torch.no_grad():
            before = lmm.model(**inputs).logits
        calls = []
        handle = language_of(lmm.model).register_forward_hook(lambda *_: calls.append(1))
        calibrated(lmm, samples)
        handle.remove()
        assert len(calls) == len(samples)
        with torch.no_grad():
            assert torch.equal(lmm.model(**inputs).logits, before)


# -- profile and picture ---------------------------------------------------------------------


def test_the_profile_serves_its_model_and_no_other(tmp_path: Path, samples: list[Sample]) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples).profile
        write_profile(profile, tmp_path / "made" / "own.yaml")
        path = str(tmp_path / "made" / "own.yaml")
        assert named_profile(path) == profile
        found = sinks_for(lmm.model, lmm._parts.identity, path)
        assert (found.dims, found.threshold) == (DIMS, THRESHOLD)
        assert sinks_for(lmm.model, lmm._parts.identity, path, 6.0).threshold == 6.0
        identity = lmm._parts.identity
    with pytest.raises(SettingsError, match="same shape but other weights"):
        sinks_for(tiny.tiny_llava(language=LANGUAGE, seed=1), identity, path)
    with pytest.raises(SettingsError, match="layers is 8 there and 4 here"):
        sinks_for(tiny.tiny_llava(language={"hidden_size": WIDTH}), identity, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_are_known_again_in_another_dtype(
    samples: list[Sample], dtype: torch.dtype
) -> None:
    with planted(everywhere()) as lmm:
        profile = calibrated(lmm, samples).profile
    model = tiny.tiny_llava(language=LANGUAGE).to(dtype)
    with planted(everywhere(), model=model) as lmm:
        other = calibrated(lmm, samples).profile
    assert other.weights == profile.weights
    assert other.dims == DIMS
    assert profile.mismatch(Fingerprint.of(model.config), other.weights) is None


def test_the_picture_is_a_png(tmp_path: Path, samples: list[Sample]) -> None:
    pytest.importorskip("matplotlib")
    with planted(everywhere()) as lmm:
        result = calibrated(lmm, samples)
    data = plot_sinks(result, tmp_path / "own.png")
    assert data.startswith(b"\x89PNG")
    assert (tmp_path / "own.png").read_bytes() == data


# -- wrong input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 11.4}, r"threshold must be a number in \(0, 11.31\)"),
        ({"threshold": 1.0}, "threshold 1 is too low .* at least 1.414"),
        ({"dims": [WIDTH]}, "dims: 128 is no dimension"),
        ({"dims": []}, "dims must be one or more different integers"),
    ],
)
def test_settings_out_of_range_are_refused(
    samples: list[Sample], options: dict[str, Any], message: str
) -> None:
    with planted(everywhere()) as lmm, pytest.raises(SettingsError, match=message):
        calibrated(lmm, samples, **options)


def test_no_samples_are_refused() -> None:
    with planted([]) as lmm, pytest.raises(SettingsError, match="at least 1 sample"):
        calibrated(lmm, [])


def test_states_that_are_no_numbers_name_their_sample(samples: list[Sample]) -> None:
    with (
        planted([(3, (5,), math.inf)]) as lmm,
        pytest.raises(UnsupportedError, match=r"sample 'p0.png': .*no numbers.*dtype"),
    ):
        calibrated(lmm, samples)


def test_a_prompt_longer_than_the_context_names_its_sample(samples: list[Sample]) -> None:
    model = tiny.tiny_llava(language={**LANGUAGE, "max_position_embeddings": 30})
    with (
        planted([], model=model) as lmm,
        pytest.raises(ContextError, match=r"sample 'p0.png': .*Calibration prunes nothing"),
    ):
        calibrated(lmm, samples)
