"""Several pictures with text between them: only the text's rows are worked on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.prepare import Prepared, prepare
from mmlm_efficient.sinks import evaluations
from mmlm_efficient.sinks.recorder import LayerStats
from mmlm_efficient.sinks.request import RedistributionRequest
from mmlm_efficient.sinks.var import VAR
from tests import tiny
from tests.sinks.test_var import SINKS, parts_of, stats_of

TWO = tiny.prompt(1, 5, tiny.IMAGE_TOKEN, 6, 7, tiny.IMAGE_TOKEN, 8, 9)
ONE = tiny.prompt(1, tiny.IMAGE_TOKEN, 8, 10, 12, 14)


def ready(*prompts: list[int], images: int, evaluation: Any = "auto") -> Prepared:
    inputs = tiny.batch(list(prompts), tiny.images(images))
    chosen = VAR(**SINKS, evaluation=evaluation, return_stats=True)
    with torch.no_grad():
        return prepare(parts_of("llava"), inputs, [chosen])


def request_of(one: Prepared) -> RedistributionRequest:
    found: Any = one._attention
    return found


def picks(one: Prepared) -> list[int | None]:
    """How many rows were picked in each forward of the prompt."""
    tables = next(iter(request_of(one)._tables.values()))[1]
    return [None if rows is None else len(rows) for rows in tables._picked.values()]


@torch.no_grad()
def run(one: Prepared, **options: Any) -> tuple[Tensor, tuple[LayerStats, ...]]:
    """Scores of four new tokens, and what was done to the first prompt."""
    with one.active():
        output = one.parts.model.generate(
            **one.model_inputs,
            max_new_tokens=4,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(output.scores), stats_of(one)


@pytest.mark.parametrize("evaluation", ["rows", "partial_sums"])
@pytest.mark.parametrize(
    ("prompts", "images", "expected"),
    [
        # Behind the first picture: 2 tokens, a picture, 2 tokens.
        ((TWO,), 2, [4]),
        # Padded on the left: 2 between the pictures, and the last 4 of one or the other.
        ((TWO, ONE), 3, [6]),
        # One picture: all rows behind it are eligible.
        ((ONE,), 1, [None]),
    ],
)
def test_the_same_with_and_without_picking(
    monkeypatch: pytest.MonkeyPatch,
    evaluation: Any,
    prompts: Any,
    images: int,
    expected: list[int | None],
) -> None:
    one = ready(*prompts, images=images, evaluation=evaluation)
    scores, stats = run(one)
    assert picks(one) == expected
    monkeypatch.setattr(evaluations, "_PICKED_SHARE", 0.0)
    other = ready(*prompts, images=images, evaluation=evaluation)
    without, plain_stats = run(other)
    assert picks(other) == [None]
    torch.testing.assert_close(scores, without, atol=2e-6, rtol=0)
    for ours, theirs in zip(stats, plain_stats, strict=True):
        assert ours.by_head == theirs.by_head
        assert ours.eligible == theirs.eligible
        assert ours.decoded == theirs.decoded
        assert ours.gain == pytest.approx(theirs.gain, rel=1e-5)
    assert sum(layer.selected for layer in stats) > 0


def test_in_chunks_and_without_a_cache() -> None:
    expected, stats = run(ready(TWO, images=2))
    for options in ({"prefill_chunk_size": 7}, {"use_cache": False}):
        one = ready(TWO, images=2)
        scores, found = run(one, **options)
        torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)
        if "use_cache" not in options:
            assert [layer.by_head for layer in found] == [layer.by_head for layer in stats]


def test_the_index_is_made_once_for_all_layers() -> None:
    one = ready(TWO, images=2)
    run(one)
    assert len(request_of(one)._tables) == 1
    assert picks(one) == [4]  # decoding adds none
