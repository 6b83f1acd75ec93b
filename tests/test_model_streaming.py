"""EfficientLMM.stream: the same answer as `ask`, in pieces, and no thread that outlives it."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from mmlm_efficient import EfficientLMM, FastV, FlowCut
from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.prepare import Prepared
from tests.tiny import tiny_llava
from tests.tiny_processor import picture, tiny_processor

QUESTION = "where cat ?"


def no_stream_threads() -> bool:
    return not any(thread.name == "mmlm-stream" for thread in threading.enumerate())


@pytest.mark.parametrize("method", ["none", "flowcut:9"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5}])
def test_stream_equals_ask(lmm: EfficientLMM, method: str, sampling: dict[str, Any]) -> None:
    options: dict[str, Any] = {"methods": method, "max_new_tokens": 10, **sampling}
    stream = lmm.stream(QUESTION, picture(), **options)
    pieces = list(stream)
    answer = lmm.ask(QUESTION, picture(), **options)
    assert len(pieces) > 3
    assert "".join(pieces) == answer.text
    assert stream.answer is not None
    assert stream.answer.text == answer.text
    assert stream.answer.usage.kv_bytes == answer.usage.kv_bytes
    assert list(stream) == []
    assert no_stream_threads()


def test_stream_uses_the_methods_of_its_caller(lmm: EfficientLMM) -> None:
    with lmm.using("flowcut:9"):
        stream = lmm.stream(QUESTION, picture(), max_new_tokens=3)
    list(stream)
    assert stream.answer is not None
    assert stream.answer.usage.visual_tokens_kept["layer"] == 9


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_a_stream_early_stops_the_generation(lmm: EfficientLMM, how: str) -> None:
    stream = lmm.stream(QUESTION, picture(), max_new_tokens=400)
    assert next(stream)
    if how == "close":
        stream.close()
        stream.close()
    elif how == "with":
        with stream:
            next(stream)
    if how == "drop":
        del stream
    else:
        assert stream.answer is not None
        assert stream.answer.finish_reason == "cancelled"
        assert 1 <= stream.answer.usage.completion_tokens < 400
    assert no_stream_threads()


def test_bad_input_raises_before_the_stream_starts(lmm: EfficientLMM) -> None:
    with pytest.raises(PromptError, match="is empty"):
        lmm.stream("", picture())
    with pytest.raises(SettingsError, match="num_beams"):
        lmm.stream(QUESTION, picture(), num_beams=2)
    with pytest.raises(SettingsError, match="seed must be"):
        lmm.stream(QUESTION, picture(), seed=-1)
    with pytest.raises(SettingsError, match="temperature must be"):
        lmm.stream(QUESTION, picture(), temperature=-1)
    with pytest.raises(SettingsError, match="keep_tokens"):
        lmm.stream(QUESTION, picture(), methods=FlowCut(keep_tokens=(9, 9)))
    with (
        EfficientLMM(
            tiny_llava(language={"max_position_embeddings": 40}), tiny_processor()
        ) as small,
        pytest.raises(PromptError, match=r"42 positions.* 40"),
    ):
        small.stream(QUESTION, picture())
    assert no_stream_threads()


def test_an_error_while_generating_reaches_the_reader(lmm: EfficientLMM) -> None:
    def fail(batch: int, ids: torch.Tensor) -> list[int]:
        raise RuntimeError("broken on purpose")

    stream = lmm.stream(QUESTION, picture(), prefix_allowed_tokens_fn=fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(stream)
    assert list(stream) == []
    assert no_stream_threads()


def test_a_stream_that_outlives_the_module(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the interpreter's exit modules are emptied before the last objects go."""
    stream = lmm.stream(QUESTION, picture(), max_new_tokens=2)
    assert list(stream)
    monkeypatch.setattr("mmlm_efficient.streaming.threading", None)
    stream.__del__()


@pytest.mark.parametrize("method", ["none", "flowcut:9", FastV(keep_tokens=9, layer=1)])
def test_a_finished_stream_lets_go_of_what_it_ran_on(lmm: EfficientLMM, method: Any) -> None:
    """Features, masks and the cache go with the generation, not with the answer."""
    gc.collect()
    stream = lmm.stream(QUESTION, picture(), methods=method, max_new_tokens=3)
    seen = [weakref.ref(one) for one in gc.get_objects() if type(one) is Prepared]
    assert seen
    list(stream)
    assert stream.answer is not None
    gc.collect()
    assert not any(one() for one in seen)


def test_a_stream_that_fails_lets_go_as_well(lmm: EfficientLMM) -> None:
    def fails(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mine")

    gc.collect()
    stream = lmm.stream(QUESTION, picture(), stopping_criteria=[fails])
    seen = [weakref.ref(one) for one in gc.get_objects() if type(one) is Prepared]
    assert seen
    with pytest.raises(RuntimeError, match="mine"):
        list(stream)
    gc.collect()
    assert not any(one() for one in seen)
