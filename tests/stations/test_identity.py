"""With nothing to prune, results are bit-identical to the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import (
    FlowCut,
    KeepMask,
    NoPruning,
    PruningMethod,
    RandomPruning,
    UniformPruning,
)
from mmlm_efficient.pruning.base import Method
from tests import tiny

I = tiny.IMAGE_TOKEN  # noqa: E741
PROMPTS = [
    tiny.prompt(1, 5, I, 6, 7),
    tiny.prompt(1, 9, 11),
    tiny.prompt(1, 5, I, I, 6, 7, 8, I, 9, 10),
]
NOTHING_TO_PRUNE: list[list[Method]] = [
    [],
    [NoPruning()],
    [FlowCut(keep_ratio=1.0)],
    [FlowCut(keep_tokens=tiny.N_PATCHES)],
    [FlowCut(keep_tokens=999, position_ids="original", llm_prune_layer=1, llm_keep_tokens=36)],
    [RandomPruning(keep_ratio=1.0), FlowCut(keep_tokens=99)],
    [UniformPruning(keep_tokens=50)],
    [KeepMask(mask=torch.ones(tiny.GRID, tiny.GRID, dtype=torch.bool))],
]


def generated(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and stacked logits of a short greedy generation."""
    output = model.generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_bit_identical(tower: str, text: str, attn: str) -> None:
    stock = tiny.tiny_llava(tower, text, attn=attn)
    model = tiny.tiny_llava(tower, text, attn=attn)
    inputs = tiny.batch(PROMPTS, tiny.images(4))
    with torch.no_grad(), LMMParts(model) as parts:
        want_logits = stock(**inputs).logits
        want_ids, want_steps = generated(stock, dict(inputs))
        for methods in NOTHING_TO_PRUNE:
            prepared = prepare(parts, inputs, methods)
            with prepared.active():
                logits = model(**prepared.model_inputs).logits
                ids, steps = generated(model, prepared.model_inputs)
            assert torch.equal(logits, want_logits)
            assert torch.equal(ids, want_ids)
            assert torch.equal(steps, want_steps)
            for report in prepared.report().images:
                assert report.kept.tolist() == list(range(tiny.N_PATCHES))
                assert set(report.per_station.values()) == {tiny.N_PATCHES}


def test_text_only_passes_through() -> None:
    model = tiny.tiny_llava()
    inputs = tiny.batch([[1, 5, 6], [1, 7]])
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(parts, inputs, [FlowCut(keep_tokens=4)])
        with prepared.active():
            logits = model(**prepared.model_inputs).logits
        assert torch.equal(logits, model(**inputs).logits)
        assert prepared.report().images == ()


@pytest.mark.parametrize(
    "method",
    [
        FlowCut(keep_tokens=7),
        FlowCut(keep_tokens=9, llm_prune_layer=1, llm_keep_tokens=4),
        RandomPruning(keep_tokens=5),
    ],
    ids=["tower", "layer", "bridge"],
)
def test_stock_again_after_a_request_and_after_close(method: PruningMethod) -> None:
    stock, model = tiny.tiny_llava(), tiny.tiny_llava()
    keys = list(model.state_dict())
    inputs = tiny.batch(PROMPTS, tiny.images(4))
    with torch.no_grad():
        want = stock(**inputs).logits
        parts = LMMParts(model)
        prepared = prepare(parts, inputs, [method])
        with prepared.active():
            pruned = model(**prepared.model_inputs).logits
        assert pruned.shape[1] < want.shape[1]
        assert torch.equal(model(**inputs).logits, want)
        assert list(model.state_dict()) == keys
        parts.close()
        parts.close()
        assert torch.equal(model(**inputs).logits, want)
    ours = [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "mmlm_efficient" in getattr(hook, "__module__", "")
    ]
    assert not ours


def test_hooks_are_gone_after_an_error_inside_a_request() -> None:
    stock, model = tiny.tiny_llava(), tiny.tiny_llava()
    inputs = tiny.batch(PROMPTS, tiny.images(4))
    with torch.no_grad(), LMMParts(model) as parts:
        prepared = prepare(
            parts, inputs, [FlowCut(keep_tokens=9, llm_prune_layer=0, llm_keep_tokens=3)]
        )
        with pytest.raises(ZeroDivisionError), prepared.active():
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_two_models_with_different_budgets_do_not_interact() -> None:
    first, second = tiny.tiny_llava(seed=1), tiny.tiny_llava(seed=2)
    inputs = tiny.batch(PROMPTS[:1], tiny.images(1))
    method = FlowCut(keep_tokens=12, llm_prune_layer=1, llm_keep_tokens=5)
    other = FlowCut(keep_tokens=20, llm_prune_layer=2, llm_keep_tokens=8)
    with torch.no_grad(), LMMParts(first) as one, LMMParts(second) as two:
        alone = prepare(one, inputs, [method])
        with alone.active():
            want = first(**alone.model_inputs).logits
        a, b = prepare(one, inputs, [method]), prepare(two, inputs, [other])
        with a.active(), b.active():
            got_b = second(**b.model_inputs).logits
            got = first(**a.model_inputs).logits
        assert torch.equal(got, want)
        assert got_b.shape[1] == got.shape[1] + 3
        assert [r.images[0].per_station["layer"] for r in (a.report(), b.report())] == [5, 8]
