"""The shipped weights: loaded by stock classes, small enough, and right often enough."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmlm_efficient import EfficientLMM, FlowCut, load
from mmlm_efficient.pocket import is_right, questions, scene
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


@pytest.mark.slow
@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_answers_are_right(pocket: EfficientLMM, keep_ratio: float) -> None:
    """Not worse than measured for the model card, with room for a sample of 80 scenes."""
    rng = np.random.default_rng(5)
    asked = [(k, q) for k in range(80) for q in questions(scene("heldout", 700_000 + k), rng)]
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with pocket.using(FlowCut(keep_ratio=keep_ratio)):
        for start in range(0, len(asked), 32):
            part = asked[start : start + 32]
            pictures = [(q.text, scene("heldout", 700_000 + k).image) for k, q in part]
            for (_, q), answer in zip(
                part, pocket.ask_batch(pictures, max_new_tokens=32), strict=True
            ):
                right[q.kind] += is_right(q, answer.text)
                total[q.kind] += 1
    assert sum(right.values()) / sum(total.values()) > 0.8
    shares = {kind: right[kind] / total[kind] for kind in total}
    # lists are the kind that this model is worst at: 59 % right on 1,000 scenes
    assert shares.pop("list") > 0.42
    assert min(shares.values()) > 0.65, shares
