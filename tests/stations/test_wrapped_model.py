"""What a wrapper of a model refuses rather than run the stock model, unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mmlm_efficient import EfficientLMM
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.prepare import prepare
from mmlm_efficient.sinks.var import VAR
from tests import tiny
from tests.tiny_processor import tiny_processor

SINKS: dict[str, Any] = {"sink_dims": [3], "sink_threshold": 1.5, "layers": [1]}


@pytest.fixture
def lmm() -> Iterator[EfficientLMM]:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as made:
        yield made


def test_a_wrapper_is_not_copied(lmm: EfficientLMM) -> None:
    with pytest.raises(UnsupportedError, match=r"EfficientLMM\(copy.deepcopy\(lmm.model\)"):
        copy.deepcopy(lmm)


@torch.no_grad()
def test_the_way_that_the_message_names(lmm: EfficientLMM) -> None:
    prompt = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 9)], tiny.images(1))
    with EfficientLMM(copy.deepcopy(lmm.model), lmm.processor) as other:
        for methods in ([VAR(**SINKS)], ["fastv:4"]):
            ours, theirs = (one.forward(methods=methods, **prompt).logits for one in (lmm, other))
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours[:, -1], lmm.forward(methods=(), **prompt).logits[:, -1])


@pytest.mark.parametrize("methods", [[VAR(**SINKS)], ["fastv:4", VAR(**SINKS)]])
def test_an_attention_backend_is_refused_when_the_wrapper_is_made(methods: Any) -> None:
    model = tiny.tiny_llava()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="'eager'.*'sdpa' only"):
        EfficientLMM(model, tiny_processor(), methods)
    with EfficientLMM(model, tiny_processor()) as lmm:
        with pytest.raises(UnsupportedError, match="'eager'.*'sdpa' only"):
            lmm.ask("where?", methods=methods)
        lmm.ask("where?", methods=[VAR(**SINKS, redistribute_fraction=0)], max_new_tokens=1)


@torch.no_grad()
def test_a_backend_that_changes_while_a_request_runs(lmm: EfficientLMM) -> None:
    prompt = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 9)], tiny.images(1))
    one = prepare(lmm._parts, prompt, [VAR(**SINKS)])
    decoder = lmm.model.model.language_model
    with pytest.raises(UnsupportedError, match="changed to 'sdpa' while"), one.active():
        decoder.set_attn_implementation("sdpa")
    with one.active():
        lmm.model(**one.model_inputs)
