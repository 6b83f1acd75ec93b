"""Gradient checkpointing recomputes layers in the backward pass: same results, same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient import EfficientLMM
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut, PruningMethod, RandomPruning, SparseVLM
from tests import tiny
from tests.tiny_processor import tiny_processor

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [
    tiny.prompt(1, 5, I, 6, 7),
    tiny.prompt(1, 9, 11),
    tiny.prompt(1, 5, I, 6, 7, 8, I, 9, 10),
]
METHODS: dict[str, PruningMethod] = {
    "tower": FlowCut(keep_tokens=14),
    "tower, uneven": FlowCut(keep_tokens=(7, 14, 36)),
    "bridge": RandomPruning(keep_tokens=9),
    "layer": FlowCut(keep_ratio=1.0, llm_prune_layer=1, llm_keep_tokens=5),
    "tower and layer": FlowCut(keep_tokens=14, llm_prune_layer=0, llm_keep_tokens=(3, 5, 14)),
    "layer, merging": SparseVLM(stage_keep_tokens=(9, 6, 3)),
}


def training_model(reentrant: bool | None, tower: str = "clip", text: str = "llama") -> Any:
    """A model in training mode, with checkpointing unless reentrant is None."""
    model: Any = tiny.tiny_llava(tower, text).train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model


def trained(
    model: Any, method: PruningMethod, backward_inside: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of one forward, and the gradients of a loss on them."""
    with LMMParts(model) as parts:
        prepared = prepare(parts, tiny.batch(PROMPTS, tiny.images(3)), [method])
        with prepared.active():
            logits = model(**prepared.model_inputs).logits
            if backward_inside:
                logits.square().mean().backward()
        if not backward_inside:
            logits.square().mean().backward()
        assert {image.per_station["layer"] for image in prepared.report().images} != {36}
    return logits.detach(), {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


def check_same(method: PruningMethod, reentrant: bool, inside: bool = False, **kind: str) -> None:
    want_logits, want = trained(training_model(None, **kind), method)
    logits, got = trained(training_model(reentrant, **kind), method, inside)
    assert torch.equal(logits, want_logits)
    assert any("vision_tower" in name for name in want)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_gradients_are_those_without_it(
    method: PruningMethod, reentrant: bool, backward_inside: bool
) -> None:
    """Also when the backward pass, which runs the layers again, still sees the request."""
    check_same(method, reentrant, backward_inside)


@pytest.mark.parametrize(("tower", "text"), [("siglip", "mistral"), ("siglip", "qwen2")])
def test_gradients_of_other_parts(tower: str, text: str) -> None:
    check_same(METHODS["tower and layer"], False, tower=tower, text=text)


def test_layers_run_twice_and_their_hooks_once() -> None:
    """What exactness rests on: transformers checkpoints inside the layer, not around its hooks."""
    model = training_model(False)
    calls: list[str] = []
    for part in (model.model.vision_tower.encoder, model.model.language_model):
        part.layers[1].register_forward_hook(lambda *_: calls.append("layer"))
        part.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("query"))
    trained(model, METHODS["tower and layer"])
    assert sorted(calls) == ["layer"] * 2 + ["query"] * 4


def test_loss_of_forward() -> None:
    """`EfficientLMM.forward(labels=...)` trains the same with it."""
    inputs = tiny.batch(PROMPTS, tiny.images(3), "right")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == I) | (inputs["attention_mask"] == 0), -100)
    results = []
    for reentrant in (None, False):
        model = training_model(reentrant)
        with EfficientLMM(model, tiny_processor(), METHODS["tower and layer"]) as lmm:
            loss = lmm.forward(labels=labels, **inputs).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
