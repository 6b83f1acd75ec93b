"""Labels follow the tokens: the loss is that of what is left, wherever it was cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import PromptError, UnsupportedError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, PruningMethod, RandomPruning
from tests import tiny
from tests.tiny_processor import tiny_processor

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [tiny.prompt(1, 5, I, 6, 7, 8), tiny.prompt(1, 9, 11), tiny.prompt(1, I, 6, I, 9, 10)]


def training_batch(
    padding_side: str, prompts: list[list[int]] = PROMPTS
) -> dict[str, torch.Tensor]:
    """Prompts with labels on all words but not on images and padding."""
    count = sum(ids.count(I) for ids in prompts) // tiny.N_PATCHES
    inputs = tiny.batch(prompts, tiny.images(count), padding_side)
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


# In the second batch the widest prompt is text alone: a cut leaves the batch as wide as before, and
# nothing but a wrong loss would show that labels and logits belong to different tokens.
BATCHES = [PROMPTS, [tiny.prompt(1, 5, I, 6, 7, 8), list(range(10, 60))]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prompts", BATCHES, ids=["narrower", "as wide"])
def test_the_models_own_loss_is_refused_after_a_cut_in_the_language_model(
    prompts: list[list[int]], padding_side: Any
) -> None:
    """The message names two ways; both give the same loss."""
    model = tiny.tiny_llava()
    method = FlowCut(keep_tokens=14, llm_prune_layer=1, llm_keep_tokens=5)
    inputs = training_batch(padding_side, prompts)
    with EfficientLMM(model, tiny_processor(), method) as lmm, torch.no_grad():
        want = lmm.forward(**inputs).loss
    with LMMParts(model) as parts, torch.no_grad():
        prepared = prepare(parts, inputs, [method], padding_side=padding_side)
        model_inputs = prepared.model_inputs
        with prepared.active():
            with pytest.raises(UnsupportedError, match="after decoder layer 1") as caught:
                model(**model_inputs)
            assert "EfficientLMM.forward(labels=...)" in str(caught.value)
            labels = model_inputs.pop("labels")
            logits = model(**model_inputs).logits
        left = prepared.labels_left(labels)
        got = model.loss_function(logits=logits, labels=left, vocab_size=tiny.VOCAB)
        assert torch.equal(got, want)
        # Outside of the request, and after it, labels are the model's own affair.
        assert bool(torch.isfinite(model(**inputs).loss))


PRUNING = [
    FlowCut(keep_tokens=14),
    RandomPruning(keep_tokens=9),
    FlowCut(keep_ratio=1.0, llm_prune_layer=1, llm_keep_tokens=5),
]


@pytest.mark.parametrize("method", PRUNING, ids=["tower", "bridge", "layer"])
@pytest.mark.parametrize("keep", [3, torch.tensor([0, 1])], ids=["count", "columns"])
def test_labels_with_logits_to_keep_are_refused(method: PruningMethod, keep: Any) -> None:
    inputs = training_batch("right")
    with EfficientLMM(tiny.tiny_llava(), tiny_processor(), method) as lmm, torch.no_grad():
        want = lmm.forward(**inputs).loss
        for labels in (inputs["labels"], inputs["labels"][:, -3:]):
            with pytest.raises(UnsupportedError, match="Leave logits_to_keep out"):
                lmm.forward(**{**inputs, "labels": labels}, logits_to_keep=keep)
        assert torch.equal(lmm.forward(**inputs, logits_to_keep=0).loss, want)
        inputs.pop("labels")
        assert lmm.forward(**inputs, logits_to_keep=keep).logits.shape[1] in (2, 3)


@pytest.mark.parametrize("method", PRUNING, ids=["tower", "bridge", "layer"])
def test_labels_of_another_shape_are_refused(method: PruningMethod) -> None:
    inputs = training_batch("left")
    inputs["labels"] = inputs["labels"][:, 1:]
    with (
        EfficientLMM(tiny.tiny_llava(), tiny_processor(), method) as lmm,
        pytest.raises(PromptError, match=r"labels: expected shape \[3, 76\].*got \[3, 75\]"),
    ):
        lmm.forward(**inputs)


def test_with_nothing_to_prune_both_are_the_stock_models_affair() -> None:
    inputs = training_batch("left")
    inputs["labels"] = inputs["labels"][:, -3:]
    method = FlowCut(keep_ratio=1.0)
    with EfficientLMM(tiny.tiny_llava(), tiny_processor(), method) as lmm, torch.no_grad():
        want = lmm.model(**inputs, logits_to_keep=3).loss
        assert torch.equal(lmm.forward(**inputs, logits_to_keep=3).loss, want)
