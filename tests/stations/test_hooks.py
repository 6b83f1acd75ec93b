"""Hooks come and go with their wrapper, do not travel with copies, and do not break compilation."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlm_efficient import EfficientLMM, FastV
from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.sinks.var import VAR
from tests import tiny
from tests.tiny_processor import tiny_processor

SINKS: dict[str, Any] = {"sink_dims": [3], "sink_threshold": 1.5, "layers": [1]}
METHODS: list[Any] = [
    (),
    "flowcut:9",
    FastV(keep_tokens=9, layer=1),
    VAR(**SINKS),
]
PROMPT = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 9)], tiny.images(1))


@pytest.fixture(autouse=True)
def _compiled_code_is_forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> Any:
    return tiny.tiny_llava()


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits_of(lmm: EfficientLMM, methods: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = lmm.forward(**PROMPT, methods=methods).logits
    return logits


# Wrappers that are dropped


def test_wrappers_that_are_dropped_leave_nothing(model: Any) -> None:
    with torch.no_grad():
        want = model(**PROMPT).logits
    stock = hooks_of(model)
    for _ in range(3):
        lmm = EfficientLMM(model, tiny_processor())
        changed = logits_of(lmm, [FastV(keep_tokens=9, layer=1), VAR(**SINKS)])
    assert not torch.equal(changed[:, -1], want[:, -1])
    seen = weakref.ref(lmm)
    del lmm
    gc.collect()
    assert seen() is None
    assert hooks_of(model) == stock
    assert model.model.language_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**PROMPT).logits, want)


def test_the_hooks_of_another_wrapper_stay(model: Any) -> None:
    kept, dropped = (EfficientLMM(model, tiny_processor()) for _ in range(2))
    methods = [FastV(keep_tokens=9, layer=1), VAR(**SINKS)]
    want = logits_of(kept, methods)
    assert torch.equal(logits_of(dropped, methods), want)
    del dropped
    assert torch.equal(logits_of(kept, methods), want)
    kept.close()


def test_a_stream_keeps_its_wrapper(model: Any) -> None:
    with torch.no_grad():
        model.generate(**PROMPT, max_new_tokens=2)  # transformers' own hooks come with it
    stock = hooks_of(model)
    lmm: Any = EfficientLMM(model, tiny_processor())
    want = lmm.ask("where cat ?", tiny_image(), methods="fastv:9", max_new_tokens=4).text
    stream = lmm.stream("where cat ?", tiny_image(), methods="fastv:9", max_new_tokens=4)
    lmm = None
    gc.collect()
    assert "".join(stream) == want
    gc.collect()
    assert hooks_of(model) == stock


def tiny_image() -> Any:
    from tests.tiny_processor import picture

    return picture(0)


# Copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_model_is_stock(model: Any, way: str) -> None:
    with EfficientLMM(model, tiny_processor()) as lmm:
        other = _copied(model, way)
        with torch.no_grad():
            want = model(**PROMPT).logits
            one = lmm._prepare(PROMPT, FastV(keep_tokens=9, layer=1))
            with one.active():  # of this model alone
                assert torch.equal(other(**PROMPT).logits, want)
        with EfficientLMM(other, tiny_processor()) as theirs:
            for methods in METHODS:
                assert torch.equal(logits_of(theirs, methods), logits_of(lmm, methods))


def test_a_copy_made_while_attention_is_changed(model: Any, tmp_path: Path) -> None:
    """It names our attention function, which a new process has to know."""
    lmm = EfficientLMM(model, tiny_processor())
    words = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        want = model(words).logits
        with lmm.parts.attention.active(_Idle()):
            assert torch.equal(model(words).logits, want)
        torch.save(model, tmp_path / "model.pt")
        assert torch.equal(copy.deepcopy(model)(words).logits, want)
    torch.save(want, tmp_path / "want.pt")
    code = (
        "import torch, sys; from pathlib import Path; folder = Path(sys.argv[1]);"
        "model, want = (torch.load(folder / f'{n}.pt', weights_only=False) "
        "for n in ('model', 'want'));"
        "assert torch.equal(model(torch.tensor([[1, 5, 6]])).logits, want)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


class _Idle:
    """A request that wants nothing."""

    def enter(self, *_: Any) -> None:
        return None


def _copied(model: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_wrapper_is_not_pickled(model: Any) -> None:
    with (
        EfficientLMM(model, tiny_processor()) as lmm,
        pytest.raises(UnsupportedError, match="cannot be copied or pickled"),
    ):
        pickle.dumps(lmm)


def test_a_station_that_is_dropped_while_another_switches_on(model: Any) -> None:
    """The garbage collector may drop a wrapper at any moment, here within the switch."""
    wrappers = [EfficientLMM(model, tiny_processor()) for _ in range(2)]
    logits_of(wrappers[1], VAR(**SINKS))
    decoder = model.model.language_model
    decoder.set_attn_implementation("sdpa")  # somebody switched it back
    switch = decoder.set_attn_implementation

    def dropping(name: str) -> None:
        wrappers[1:] = []
        switch(name)

    decoder.set_attn_implementation = dropping
    want = logits_of(wrappers[0], VAR(**SINKS))
    del decoder.set_attn_implementation
    assert torch.equal(logits_of(wrappers[0], VAR(**SINKS)), want)


# Compilation


def graphs_and_breaks(decoder: Any) -> tuple[int, int]:
    hidden = torch.zeros(1, 6, 32)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return output

    with torch.no_grad():
        found = torch._dynamo.explain(run)(hidden)
    return found.graph_count, found.graph_break_count


def test_an_idle_wrapped_decoder_is_one_graph(model: Any) -> None:
    decoder = model.model.language_model
    assert graphs_and_breaks(decoder) == (1, 0)
    torch.compiler.reset()
    with EfficientLMM(model, tiny_processor()):
        assert graphs_and_breaks(decoder) == (1, 0)


@pytest.mark.slow
def test_a_compiled_model_gives_what_the_model_gives(model: Any) -> None:
    methods = [FastV(keep_tokens=9, layer=1), VAR(**SINKS)]
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as plain:
        want = logits_of(plain, methods)
    with EfficientLMM(torch.compile(model, backend="eager"), tiny_processor()) as lmm:
        logits_of(lmm, ())  # compiled while idle, then compiled anew
        assert torch.allclose(logits_of(lmm, methods), want, atol=1e-5)


@pytest.mark.slow
def test_code_from_before_the_wrapper_is_refused_where_it_prunes_nothing(model: Any) -> None:
    with EfficientLMM(tiny.tiny_llava(), tiny_processor()) as plain:
        want = logits_of(plain, "fastv:9")
    model.model.language_model.compile(backend="eager")
    with torch.no_grad():
        model(**PROMPT)
    with EfficientLMM(model, tiny_processor()) as lmm:
        with pytest.raises(UnsupportedError, match=r"call torch.compiler.reset\(\)"):
            logits_of(lmm, "fastv:9")
        torch.compiler.reset()
        assert torch.allclose(logits_of(lmm, "fastv:9"), want, atol=1e-5)
