"""transformers' own processors, with their PIL image processors: the same tokens, and answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import PromptError
from mmlm_efficient.families import family_of
from mmlm_efficient.prompts import preprocess
from tests import tiny_families as tiny

# Questions with several images of different sizes, one, and none.
IMAGES = [
    [tiny.picture((40, 30), 0), tiny.picture((16, 60), 1), tiny.picture((64, 64), 2)],
    [tiny.picture((22, 61), 3)],
    [],
]
QUESTIONS = ("w10 w11", "w12", "w13 w14 w15")


def image_text(family: str) -> str:
    """What the chat template writes for an image."""
    return "<begin> <image> <end> " if family in tiny.QWEN else "<image> "


def own_inputs(family: str, samples: list[int]) -> dict[str, Any]:
    """What transformers' processor makes of the questions when it is called directly."""
    processor = tiny.tiny_processor(family)
    inputs = processor(
        text=[
            image_text(family) * len(IMAGES[sample]) + QUESTIONS[sample] + " w9"
            for sample in samples
        ],
        images=[IMAGES[sample] for sample in samples if IMAGES[sample]] or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return dict(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_preprocess_gives_what_the_processor_gives(family: str, dtype: torch.dtype) -> None:
    requests = list(zip(QUESTIONS, IMAGES, strict=True))
    got = preprocess(tiny.tiny_processor(family), requests, dtype)
    want = own_inputs(family, [0, 1, 2])
    assert set(got) == set(want)
    beside = {
        "llava_next": {"image_sizes"},
        "llava_onevision": {"image_sizes", "batch_num_images"},
    }.get(family, {"image_grid_thw", "mm_token_type_ids"})
    assert beside < set(got)
    for name, value in want.items():
        assert torch.equal(got[name], value.to(dtype) if name == "pixel_values" else value), name
        assert got[name].dtype == (dtype if name == "pixel_values" else torch.int64), name
    bound = family_of(tiny.tiny_model(family))
    counts = [bound.tokens_of(visual) for visual in bound.visuals(got)]
    placeholders = (got["input_ids"] == tiny.IMAGE).sum(dim=1).tolist()
    assert placeholders == [sum(counts[:3]), counts[3], 0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_are_those_of_transformers(family: str) -> None:
    model, processor = tiny.tiny_model(family), tiny.tiny_processor(family)
    with EfficientLMM(model, processor) as lmm:
        for sample, (question, images) in enumerate(zip(QUESTIONS, IMAGES, strict=True)):
            inputs = own_inputs(family, [sample])
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            want = processor.decode(ids[0, inputs["input_ids"].shape[1] :])
            answer = lmm.ask(question, image=images or None, max_new_tokens=5, do_sample=False)
            assert answer.text.split() == [w for w in want.split() if w not in tiny.SPECIAL]
            assert answer.usage.visual_tokens_in == int((inputs["input_ids"] == tiny.IMAGE).sum())


@pytest.mark.parametrize("method", ["flowcut:4", "random:3", "uniform:5"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_answers_of_a_batch(family: str, method: str) -> None:
    with EfficientLMM(tiny.tiny_model(family), tiny.tiny_processor(family), method) as lmm:
        requests = [(q, images or None) for q, images in zip(QUESTIONS, IMAGES, strict=True)]
        together = lmm.ask_batch(requests, max_new_tokens=4, do_sample=False)
        alone = [lmm.ask(*request, max_new_tokens=4, do_sample=False) for request in requests]
    for got, want, images in zip(together, alone, IMAGES, strict=True):
        assert got.text == want.text
        assert got.usage.visual_tokens_kept == want.usage.visual_tokens_kept
        assert len(got.report.images) == len(images)
        if images:
            kept = got.usage.visual_tokens_kept["bridge"]
            assert 0 < kept < got.usage.visual_tokens_in


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_image_tokens_in_the_question_say_where_images_go(family: str) -> None:
    processor = tiny.tiny_processor(family)
    images = IMAGES[0][:2]
    inputs = preprocess(processor, [("w10 <image> w11 <image> w12", images)], torch.float32)
    ids = inputs["input_ids"][0].tolist()
    words = [token for token in ids if token not in (tiny.IMAGE, tiny.BEGIN, tiny.END)]
    assert words == [10, 11, 12, 9]
    assert ids[0] == 10
    first = ids.index(tiny.IMAGE)
    assert first < ids.index(11) < ids.index(12)
    with pytest.raises(PromptError, match=r"holds 1 <image>, but 2 image\(s\) were given"):
        preprocess(processor, [("w10 <image>", images)], torch.float32)
