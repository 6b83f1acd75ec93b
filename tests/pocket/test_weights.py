"""The shipped weights: loaded by stock classes, small enough, and right often enough."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmlm_efficient import EfficientLMM, FlowCut, RandomPruning, UniformPruning, load
from mmlm_efficient.pocket import is_right, questions, scene
from mmlm_efficient.pocket.questions import IMAGE_KINDS
from mmlm_efficient.pocket.train import MAX_WEIGHTS_BYTES, WEIGHTS


@pytest.fixture(scope="module")
def pocket() -> EfficientLMM:
    return load("pocket")


def test_stock_classes_load_the_folder(pocket: EfficientLMM) -> None:
    files = {path.name for path in WEIGHTS.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert (WEIGHTS / "model.safetensors").stat().st_size <= MAX_WEIGHTS_BYTES
    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    assert sum(p.numel() for p in model.parameters()) <= 15e6
    item = scene("heldout", 21)
    content = [{"type": "image"}, {"type": "text", "text": "list all objects."}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=item.image, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 144
    output = model.generate(**inputs, max_new_tokens=32)
    said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert pocket.ask("list all objects.", image=item.image, max_new_tokens=32).text == said


def _answers(lmm: EfficientLMM, scenes: int) -> tuple[Counter[str], Counter[str]]:
    """Right answers and answers by kind, on scenes that no other figure is measured on."""
    rng = np.random.default_rng(5)
    asked = [(k, q) for k in range(scenes) for q in questions(scene("heldout", 700_000 + k), rng)]
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for start in range(0, len(asked), 32):
        part = asked[start : start + 32]
        pictures = [(q.text, scene("heldout", 700_000 + k).image) for k, q in part]
        for (_, q), answer in zip(part, lmm.ask_batch(pictures, max_new_tokens=32), strict=True):
            right[q.kind] += is_right(q, answer.text)
            total[q.kind] += 1
    return right, total


@pytest.mark.slow
@pytest.mark.parametrize(("keep_ratio", "worst_kind"), [(1.0, 0.7), (0.5, 0.6)])
def test_answers_are_right(pocket: EfficientLMM, keep_ratio: float, worst_kind: float) -> None:
    """The unpruned model keeps the floor of 70 % in every kind; lists lose most by pruning."""
    with pocket.using(FlowCut(keep_ratio=keep_ratio)):
        right, total = _answers(pocket, 80)
    assert right.total() / total.total() > 0.88
    shares = {kind: right[kind] / total[kind] for kind in total}
    assert shares.keys() == set(IMAGE_KINDS)
    assert min(shares.values()) > worst_kind, shares


@pytest.mark.slow
def test_flowcut_keeps_what_questions_are_about(pocket: EfficientLMM) -> None:
    """At a quarter of the tokens it beats a random choice and an even grid by a clear margin."""
    shares = {}
    for method in (FlowCut, RandomPruning, UniformPruning):
        with pocket.using(method(keep_ratio=0.25)):
            right, total = _answers(pocket, 40)
        shares[method.name] = right.total() / total.total()
    assert shares["flowcut"] > shares["random"] + 0.1, shares
    assert shares["flowcut"] > shares["uniform"] + 0.04, shares
