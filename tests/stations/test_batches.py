"""An image's and a prompt's result do not depend on what else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlm_efficient.prepare import LMMParts, Prepared, prepare
from mmlm_efficient.pruning import (
    FlowCut,
    KeepMask,
    PruningMethod,
    RandomPruning,
    UniformPruning,
)
from mmlm_efficient.stations.bridge import PaddingSide
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
# (prompt, number of its images): uneven lengths, text only, several and adjacent images.
SAMPLES = [
    (tiny.prompt(1, 5, I, 6, 7), 1),
    (tiny.prompt(1, 9, 11), 0),
    (tiny.prompt(1, 5, I, I, 6, 7, 8, 12, 14, I, 9, 10), 3),
    (tiny.prompt(1, I, 17, 18), 1),
]
BUDGETS = (9, 13, 5, 36, 7)
LAST = (4, 13, 2, 11, 30)


def mask_of(image: int) -> torch.Tensor:
    """A mask for an image: another number of patches for each."""
    return torch.arange(tiny.N_PATCHES) % (image + 2) == 0


METHODS: dict[str, Any] = {
    "flowcut": lambda s: FlowCut(keep_tokens=BUDGETS[s]),
    "original": lambda s: FlowCut(keep_tokens=BUDGETS[s], position_ids="original"),
    "two_stage": lambda s: FlowCut(
        keep_tokens=BUDGETS[s], llm_prune_layer=1, llm_keep_tokens=LAST[s]
    ),
    "two_stage_original": lambda s: FlowCut(
        keep_tokens=BUDGETS[s],
        llm_prune_layer=0,
        llm_keep_tokens=LAST[s],
        position_ids="original",
    ),
    "random": lambda s: RandomPruning(keep_tokens=BUDGETS[s], seed=3),
    "uniform": lambda s: UniformPruning(keep_tokens=BUDGETS[s]),
    "keep_mask": lambda s: KeepMask(mask=[mask_of(i) for i in range(5)[s]]),
}


def method(name: str, images: slice) -> PruningMethod:
    """The method with the budgets of some of the five images."""
    return METHODS[name](images)


def single(parts: LMMParts, name: str, sample: int, pixels: torch.Tensor) -> Prepared:
    """One sample prepared alone."""
    first = sum(count for _, count in SAMPLES[:sample])
    ids, count = SAMPLES[sample]
    images = slice(first, first + count)
    methods = [method(name, images)] if count else []
    return prepare(parts, tiny.batch([ids], pixels[images] if count else None), methods)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    ("tower", "text", "attn"),
    [
        ("clip", "llama", "sdpa"),
        pytest.param("siglip", "qwen2", "eager", marks=pytest.mark.slow),
    ],
)
def test_forward_equals_single(
    tower: str, text: str, attn: str, padding_side: PaddingSide, name: str
) -> None:
    model = tiny.tiny_llava(tower, text, attn=attn)
    pixels = tiny.images(5)
    inputs = tiny.batch([ids for ids, _ in SAMPLES], pixels, padding_side)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepare(parts, inputs, [method(name, slice(5))], padding_side=padding_side)
        with together.active():
            output = model(**together.model_inputs)
        cut = output.logits.shape[1] < together.layout.mask.shape[1]
        assert cut == name.startswith("two_stage")
        reports = together.report().images
        image = 0
        for sample in range(len(SAMPLES)):
            alone = single(parts, name, sample, pixels)
            with alone.active():
                want = model(**alone.model_inputs).logits[0]
            column = -1 if padding_side == "left" else len(want) - 1
            got = output.logits[sample]
            torch.testing.assert_close(got[column], want[-1], atol=1e-4, rtol=0)
            own = got[-len(want) :] if padding_side == "left" else got[: len(want)]
            torch.testing.assert_close(own, want, atol=1e-4, rtol=0)
            for report in alone.report().images:
                assert reports[image].sample == sample
                assert reports[image].kept.tolist() == report.kept.tolist()
                assert reports[image].per_station == report.per_station
                assert reports[image].decoder_layer_tokens == report.decoder_layer_tokens
                image += 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("text", "use_cache"),
    [
        ("llama", True),
        ("llama", False),
        pytest.param("mistral", True, marks=pytest.mark.slow),
        pytest.param("qwen2", True, marks=pytest.mark.slow),
    ],
)
def test_generate_equals_single(text: str, name: str, use_cache: bool) -> None:
    model = tiny.tiny_llava("clip", text)
    pixels = tiny.images(5)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": use_cache,
        # A generated image token would ask for features when the whole sequence runs again.
        "suppress_tokens": [I],
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    inputs = tiny.batch([ids for ids, _ in SAMPLES], pixels)
    with torch.no_grad(), LMMParts(model) as parts:
        together = prepare(parts, inputs, [method(name, slice(5))])
        with together.active():
            output = model.generate(**together.model_inputs, **options)
        for sample in range(len(SAMPLES)):
            alone = single(parts, name, sample, pixels)
            with alone.active():
                want = model.generate(**alone.model_inputs, **{**options, "use_cache": True})
            assert output.sequences[sample, -6:].tolist() == want.sequences[0, -6:].tolist()
            for got_step, want_step in zip(output.logits, want.logits, strict=True):
                torch.testing.assert_close(got_step[sample], want_step[0], atol=1e-4, rtol=0)


def test_results_really_depend_on_image_prompt_and_budget() -> None:
    """Guards the tests above: a model that ignores its input would pass them all."""
    model = tiny.tiny_llava()
    pixels = tiny.images(2)
    ids = [tiny.prompt(1, 5, I, 6, 7)]
    with torch.no_grad(), LMMParts(model) as parts:

        def last(image: int, prompt: list[list[int]], budget: int) -> torch.Tensor:
            inputs = tiny.batch(prompt, pixels[image : image + 1])
            prepared = prepare(parts, inputs, [FlowCut(keep_tokens=budget)])
            return model(**prepared.model_inputs).logits[0, -1]

        base = last(0, ids, 9)
        for other in (last(1, ids, 9), last(0, [tiny.prompt(1, 8, I, 6, 7)], 9), last(0, ids, 12)):
            assert float((base - other).abs().max()) > 1e-2
