"""Answers to samples: failing alone, independent of batches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.answering import Batch, LocalAnswers, answer_batch
from eval.engine import Engine, cut, seed_of
from eval.record import failed_record, record_of
from eval.task import IMAGE, Sample
from mmlm_efficient import EfficientLMM, FlowCut, load
from mmlm_efficient.errors import MediaError, RunError, UnsupportedError
from mmlm_efficient.pocket import scene
from mmlm_efficient.settings import Config
from tests.eval.conftest import SmallTask


@pytest.fixture(scope="module")
def lmm() -> Iterator[EfficientLMM]:
    with load("pocket") as loaded:
        yield loaded


def samples(count: int, **changes: Any) -> list[Sample]:
    task = SmallTask(count)
    return [replace(task.sample(one), **changes) for one in task.ids]


@pytest.mark.parametrize("methods", [(), (FlowCut(keep_tokens=36),)])
def test_batches_do_not_change_answers(lmm: EfficientLMM, methods: Any) -> None:
    engine = Engine(lmm)
    asked = samples(6, question="what is in the picture?", generation={"max_new_tokens": 32})
    together = engine.answer(asked, methods)
    alone = [engine.answer([one], methods)[0] for one in asked]
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({one.text for one in together}) > 3
    direct = lmm.ask("what is in the picture?", asked[0].images[0], methods, 32)
    assert together[0].text == direct.text
    assert [one.usage["batch_size"] for one in together] == [6] * 6


def test_usage_is_that_of_the_answer(lmm: EfficientLMM) -> None:
    [outcome] = Engine(lmm).answer(samples(1), (FlowCut(keep_tokens=36),))
    usage = outcome.usage
    assert usage["visual_tokens_in"] == 144
    assert usage["visual_tokens_kept"] == usage["visual_tokens_mean"] == 36
    parts = usage["preprocess_s"] + usage["tower_s"] + usage["prefill_s"]
    assert usage["ttft_s"] == pytest.approx(parts, abs=1e-5)
    assert usage["kv_bytes"] > 0
    assert outcome.images[0].kept.shape == (36,)
    assert outcome.finish_reason == "stop"


def test_mean_tokens_are_over_the_layers(lmm: EfficientLMM) -> None:
    from mmlm_efficient import FastV

    method = FastV(keep_tokens=36, layer=2)
    [outcome] = Engine(lmm).answer(samples(1), (method,))
    assert outcome.usage["visual_tokens_kept"] == 144
    assert outcome.usage["visual_tokens_mean"] == (2 * 144 + 4 * 36) / 6


def test_until_cuts_the_answer(lmm: EfficientLMM) -> None:
    asked = samples(3, question="what is in the picture?", generation={"max_new_tokens": 32})
    whole = Engine(lmm).answer(asked, ())
    cuts = Engine(lmm).answer([replace(one, until=("\n\n", ",")) for one in asked], ())
    assert [one.text for one in cuts] == [str(one.text).split(",")[0] for one in whole]
    assert any("," in str(one.text) for one in whole)
    assert cut("a b", ["", "b"]) == "a"
    assert cut("xab", ["b", "ab"]) == cut("xab", ["ab", "b"]) == "x"


def test_one_failing_sample_fails_alone(lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmm.ask_batch
    calls: list[int] = []

    def broken(requests: Any, *rest: Any, **more: Any) -> Any:
        calls.append(len(requests))
        if any("dog" in one.question for one in requests):
            raise RuntimeError("CUDA error: an illegal\n memory access")
        return real(requests, *rest, **more)

    asked = samples(4)
    asked[2] = replace(asked[2], question="is there a dog?")
    whole = Engine(lmm).answer(samples(4), ())
    monkeypatch.setattr(lmm, "ask_batch", broken)
    outcomes = Engine(lmm).answer(asked, ())
    assert calls == [4, 1, 1, 1, 1]
    assert outcomes[2].text is None
    assert outcomes[2].error == {
        "where": "model",
        "type": "RuntimeError",
        "message": "CUDA error: an illegal memory access",
    }
    assert [outcomes[k].text for k in (0, 1, 3)] == [whole[k].text for k in (0, 1, 3)]


def test_out_of_memory_is_asked_again_in_smaller_pieces(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lmm.ask_batch

    def small_only(requests: Any, *rest: Any, **more: Any) -> Any:
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(requests, *rest, **more)

    monkeypatch.setattr(lmm, "ask_batch", small_only)
    outcomes = Engine(lmm).answer(samples(3), ())
    assert [one.error for one in outcomes] == [None] * 3
    assert [one.usage["batch_size"] for one in outcomes] == [1] * 3


def test_a_failed_batch_is_forgotten_before_its_samples_are_asked(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its tensors would still fill the memory that the samples need."""
    real = lmm.ask_batch
    kept: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    class Tensors:
        pass

    def out_of_memory(requests: Any, *rest: Any, **more: Any) -> Any:
        if len(requests) > 1:
            tensors = Tensors()
            kept.append(weakref.ref(tensors))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(kept[0]() is not None)
        return real(requests, *rest, **more)

    monkeypatch.setattr(lmm, "ask_batch", out_of_memory)
    Engine(lmm).answer(samples(2), ())
    assert alive == [False, False]


def test_a_device_that_has_failed_ends_the_run(
    lmm: EfficientLMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(lmm, "ask_batch", broken)
    with pytest.raises(RunError, match="device-side assert"):
        Engine(lmm).answer(samples(2), ())


def test_a_picture_that_cannot_be_read_is_a_media_failure(
    lmm: EfficientLMM, tmp_path: Path
) -> None:
    asked = samples(2)
    asked[0] = replace(asked[0], images=(tmp_path / "missing.png",))
    bad, good = Engine(lmm).answer(asked, ())
    assert bad.error is not None
    assert bad.error["where"] == "media"
    assert "missing.png" in bad.error["message"]
    assert good.text in ("yes", "no")


def test_media_marks_become_the_models_tokens(lmm: EfficientLMM) -> None:
    pictures = (scene("heldout", 0).image, scene("heldout", 1).image)
    marked = Sample("a", f"first {IMAGE} second {IMAGE} is there a cat?", pictures)
    [outcome] = Engine(lmm).answer([marked], ())
    assert outcome.usage["visual_tokens_in"] == 288
    [wrong] = Engine(lmm).answer([Sample("b", f"{IMAGE} what?", pictures)], ())
    assert wrong.error is not None
    assert wrong.error["type"] == "PromptError"


def test_samples_with_other_settings_are_not_batched(lmm: EfficientLMM) -> None:
    asked = samples(4)
    asked[2] = replace(asked[2], generation={"max_new_tokens": 1})
    outcomes = Engine(lmm).answer(asked, ())
    assert [one.id for one in outcomes] == [one.id for one in asked]
    assert [one.usage["batch_size"] for one in outcomes] == [2, 2, 1, 1]
    assert outcomes[2].usage["completion_tokens"] == 1


def test_sampled_answers_depend_on_seed_and_sample_only(lmm: EfficientLMM) -> None:
    drawn = {"max_new_tokens": 24, "do_sample": True, "temperature": 3.0, "top_k": 0}
    asked = samples(4, question="what is in the picture?", generation=drawn)
    engine = Engine(lmm)
    together = [one.text for one in engine.answer(asked, (), seed=1)]
    alone = [engine.answer([one], (), seed=1)[0].text for one in reversed(asked)]
    assert together == alone[::-1]
    assert together != [one.text for one in engine.answer(asked, (), seed=2)]
    assert seed_of(0, "1") != seed_of(0, "2")


def test_records_hold_the_score_or_the_error(lmm: EfficientLMM) -> None:
    task = SmallTask(2)
    sample = task.sample("s0")
    [outcome] = Engine(lmm).answer([sample], ())
    record = record_of("none", sample, outcome, task)
    assert record["ok"]
    assert record["scores"] == {"right": float(outcome.text == "yes")}
    assert (record["group"], record["cluster"], record["target"]) == ("even", "s0", "yes")

    class Broken(SmallTask):
        def score(self, id: str, answer: str) -> dict[str, Any]:
            raise ZeroDivisionError("no words")

    class Odd(SmallTask):
        def score(self, id: str, answer: str) -> dict[str, Any]:
            return {"right": object()}

    odd = record_of("none", sample, outcome, Odd())
    assert (odd["ok"], odd["error"]["where"], odd["group"]) == (False, "score", "even")
    broken = record_of("none", sample, outcome, Broken())
    assert not broken["ok"]
    assert "answer" not in broken
    assert broken["error"]["where"] == "score"
    assert failed_record("none", "s1", MediaError("gone"), "model")["error"]["where"] == "media"


def test_a_batch_goes_through_its_rows_and_keeps_the_pictures_asked_for() -> None:
    flowcut = (FlowCut(keep_tokens=36),)
    asked = samples(3)
    rows: Any = {"none": ((), {"s0", "s2"}), "flowcut:36": (flowcut, {"s0", "s1", "s2"})}
    batch = Batch(tuple(asked), rows, frozenset(["s2"]))
    with LocalAnswers(Config(methods=("random:9",))) as answers:
        assert answers.place.hardware["device"] == "cpu"
        got = {label: outcomes for _, label, outcomes in answers.run([batch])}
        direct = dict(answer_batch(answers._engine, batch))
    assert {label: [one.id for one in found] for label, found in got.items()} == {
        "none": ["s0", "s2"],
        "flowcut:36": ["s0", "s1", "s2"],
    }
    assert [len(one.images) for one in got["flowcut:36"]] == [0, 0, 1]
    assert [one.text for one in direct["none"]] == [one.text for one in got["none"]]
    assert got["none"][0].usage["visual_tokens_kept"] == 144, "the model's own methods are not used"


def test_answers_end_with_their_block() -> None:
    with LocalAnswers(Config()) as answers:
        pass
    [(_, _, [outcome])] = answers.run([Batch(tuple(samples(1)), {"none": ((), {"s0"})})])  # type: ignore[dict-item]
    assert outcome.error is not None
    assert outcome.error["type"] == UnsupportedError.__name__
