"""Labels follow the tokens: the loss is that of what is left, wherever it was cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmlm_efficient import EfficientLMM
from mmlm_efficient.pruning import FlowCut
from tests import tiny
from tests.tiny_processor import tiny_processor

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [tiny.prompt(1, 5, I, 6, 7, 8), tiny.prompt(1, 9, 11), tiny.prompt(1, I, 6, I, 9, 10)]


def training_batch(padding_side: str) -> dict[str, torch.Tensor]:
    """Prompts with labels on all words but not on images and padding."""
    inputs = tiny.batch(PROMPTS, tiny.images(3), padding_side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    inputs["labels"] = ids.masked_fill((ids == I) | (mask == 0), -100)
    return inputs


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_loss_after_a_cut_in_the_language_model(layer: int, padding_side: str) -> None:
    """Against a loss computed by hand: the last word tokens of each sample, one by one."""
    method = FlowCut(keep_tokens=14, llm_prune_layer=layer, llm_keep_tokens=(3, 5, 9))
    inputs = training_batch(padding_side)
    with EfficientLMM(tiny.tiny_llava(), tiny_processor(), method) as lmm, torch.no_grad():
        output = lmm.forward(**inputs)
    kept = [3, 5, 9]
    lengths = [6 - 1 + kept[0], 3, 6 - 2 + kept[1] + kept[2]]
    width = max(lengths)
    assert output.logits.shape[1] == width
    losses = []
    for sample, (ids, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        words = [1 if token == I else token for token in ids]
        first = width - length if padding_side == "left" else 0
        logits = output.logits[sample, first : first + length]
        left: list[int] = []
        sizes = {0: [kept[0]], 1: [], 2: kept[1:]}[sample]
        column = 0
        while column < len(words):
            if ids[column] == I:
                left.extend([-100] * sizes.pop(0))
                column += tiny.N_PATCHES
            else:
                left.append(ids[column])
                column += 1
        # Left padding: transformers also counts the first word, behind a padding column.
        if first:
            before = output.logits[sample, first - 1 : first]
            logits, left = torch.cat([before, logits]), [-100, *left]
        target = torch.tensor(left[1:])
        losses.append(cross_entropy(logits[:-1], target, reduction="none")[target != -100])
    torch.testing.assert_close(output.loss, torch.cat(losses).mean())
    assert output[0] is output.loss


def test_gradients_reach_the_language_model() -> None:
    model = tiny.tiny_llava()
    method = FlowCut(keep_tokens=14, llm_prune_layer=1, llm_keep_tokens=5)
    with EfficientLMM(model, tiny_processor(), method) as lmm:
        lmm.forward(**training_batch("right")).loss.backward()
    for layer in model.model.language_model.layers:
        gradient: Any = layer.self_attn.q_proj.weight.grad
        assert gradient is not None
        assert bool(gradient.abs().sum() > 0)


def test_other_cuts_leave_the_loss_to_the_model() -> None:
    inputs = training_batch("right")
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as lmm, torch.no_grad():
        stock = lmm.model(**inputs).loss
        assert torch.equal(lmm.forward(**inputs).loss, stock)
        kept = lmm.forward(methods=FlowCut(keep_tokens=14), **inputs)
        assert kept.logits.shape[1] == max(5 + 14, 4 + 2 * 14)
        assert bool(torch.isfinite(kept.loss))
