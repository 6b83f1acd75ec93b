"""What pocket's decoder is taught to look at: losses are 0 where it looks right, else not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmlm_efficient.pocket.guidance import (
    AIMING_HEADS,
    BEFORE_HEADS,
    COUNT_HEADS,
    MOMENT_HEADS,
    PROGRESS_HEADS,
    RANK_HEADS,
    Heads,
    Probes,
    attention_losses,
)
from mmlm_efficient.pocket.objects import NAMES
from mmlm_efficient.pocket.prompts import NONE_LEFT, VISUAL, Batch, Encoder, Prefix
from mmlm_efficient.pocket.questions import Question, Thing
from mmlm_efficient.pocket.vocabulary import build_tokenizer

CAT, DOG = NAMES.index("cat"), NAMES.index("dog")
# in reading order: cat (patch 0), dog (patch 13), cat (patch 26)
THINGS = [Thing("cat", 40, 40, 20), Thing("cat", 8, 8, 20), Thing("dog", 24, 24, 20)]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(build_tokenizer())


def _picture(encoder: Encoder, last_patch: int = 26) -> tuple[Batch, list[int]]:
    """Columns 2.. are: cat's centre, background, dog's centre, cat's edge, cat's centre (26)."""
    prefix = Prefix(
        ids=[encoder.bos, encoder.user, *[VISUAL] * 5],
        positions=range(7),
        next_position=7,
        shown=[CAT, 64, DOG, CAT, CAT],
        things=THINGS,
        patches=[0, 1, 13, 25, last_patch],
        owner=[1, -1, 2, 0, 0],
    )
    turns = [
        Question("how_many", "how many cats are there?", "2"),
        Question("list", "list all objects.", "cat, dog, cat", order=(1, 2, 0)),
    ]
    batch = encoder.batch([prefix], [turns])
    return batch, (batch.ids[0] == encoder.assistant).nonzero().flatten().tolist()


def _attentions(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Six layers of three heads that look at nothing at all."""
    length = batch.ids.shape[1]
    return tuple(torch.full((len(batch.ids), 3, length, length), 1e-6) for _ in range(6))


def _look(
    attentions: tuple[torch.Tensor, ...], heads: Heads, word: int, paid: dict[int, float]
) -> None:
    for layer, head in heads:
        for column, share in paid.items():
            attentions[layer][0, head, word, column] = share


def test_a_batch_knows_ranks_centres_and_whose_turn_it_is(encoder: Encoder) -> None:
    batch, (count, start) = _picture(encoder)
    assert batch.ranks[0].tolist() == [2, 0, 1, -1, -1, -1]
    assert batch.kinds[0].tolist() == [CAT, CAT, DOG, -1, -1, -1]
    assert batch.middle[0].nonzero().flatten().tolist() == [2, 4, 6]
    assert batch.owner[0, :7].tolist() == [-1, -1, 1, -1, 2, 0, 0]
    assert batch.place[0, DOG].tolist() == [4, 4]
    assert (batch.place[0, CAT] == -100).all(), "there are two cats"
    assert batch.counted[0, count] == CAT
    assert (batch.counted >= 0).sum() == 1
    assert batch.listed[0, start:].tolist() == [1, 2, 2, 0, 0, NONE_LEFT]
    assert batch.marked[0].nonzero().flatten().tolist() == [start + k for k in (0, 1, 3, 5)]


def test_counting_is_an_even_look_at_each_object_and_the_first_token(encoder: Encoder) -> None:
    batch, (count, _) = _picture(encoder)
    attentions = _attentions(batch)
    before = attention_losses(batch, attentions)["counting"]
    _look(attentions, COUNT_HEADS, count, {0: 1 / 3, 2: 1 / 3, 6: 1 / 3})
    halfway = attention_losses(batch, attentions)["counting"]
    _look(attentions, RANK_HEADS, 2, {0: 1.0})
    _look(attentions, RANK_HEADS, 4, {0: 1 / 2, 2: 1 / 2})
    _look(attentions, RANK_HEADS, 6, {0: 1 / 3, 2: 1 / 3, 4: 1 / 3})
    after = attention_losses(batch, attentions)["counting"]
    assert before > halfway + 1 > after + 2
    assert after == pytest.approx(0, abs=1e-4)
    _look(attentions, COUNT_HEADS, count, {0: 0.2, 2: 0.6, 6: 0.2})
    assert attention_losses(batch, attentions)["counting"] > 0.05, "uneven"


def test_an_object_counts_with_all_its_patches_when_its_centre_was_pruned(
    encoder: Encoder,
) -> None:
    batch, (count, _) = _picture(encoder, last_patch=27)
    attentions = _attentions(batch)
    _look(attentions, RANK_HEADS, 2, {0: 1.0})
    _look(attentions, RANK_HEADS, 4, {0: 1 / 2, 2: 1 / 2})
    _look(attentions, COUNT_HEADS, count, {0: 1 / 3, 2: 1 / 3, 5: 1 / 12, 6: 1 / 4})
    assert attention_losses(batch, attentions)["counting"] == pytest.approx(0, abs=1e-4)


def test_a_list_looks_at_what_was_said_and_at_what_is_next(encoder: Encoder) -> None:
    batch, (_, start) = _picture(encoder)
    attentions = _attentions(batch)
    patches = {1: {2: 1.0}, 2: {4: 1.0}, 0: {5: 0.5, 6: 0.5}, NONE_LEFT: {0: 1.0}}
    said = [start, start + 1, start + 3, start + 5]
    for word, thing in enumerate(batch.listed[0, start:].tolist(), start=start):
        _look(attentions, AIMING_HEADS, word, patches[thing])
        own = [k for k in said if k <= word]
        _look(attentions, PROGRESS_HEADS, word, dict.fromkeys(own, 1 / len(own)))
    assert attention_losses(batch, attentions)["listing"] == pytest.approx(0, abs=1e-4)
    _look(attentions, AIMING_HEADS, start, {2: 0.1, 6: 0.9})  # the other cat
    assert attention_losses(batch, attentions)["listing"] > 0.1


def test_a_frame_looks_for_its_objects_in_earlier_frames(encoder: Encoder) -> None:
    prefix = Prefix(
        ids=[encoder.bos, *encoder.text("0 s"), VISUAL, *encoder.text("3 s"), VISUAL, VISUAL],
        positions=range(8),
        next_position=8,
        shown=[CAT, CAT, DOG],
        clocks=[1, 4, 4],
    )
    asked = Question("video_time", "when does the dog appear?", "3 s")
    batch = encoder.batch([prefix], [[asked]])
    assert batch.moment[0][batch.moment[0] >= 0].tolist() == [4], "only the number is a time"
    assert (batch.owner == -1).all()
    assert not batch.middle.any()
    attentions = _attentions(batch)
    _look(attentions, BEFORE_HEADS, 3, {0: 1.0})
    _look(attentions, BEFORE_HEADS, 6, {3: 1.0})
    without = attention_losses(batch, attentions)["keys"]
    _look(attentions, BEFORE_HEADS, 7, {0: 1.0})
    _look(attentions, MOMENT_HEADS, int((batch.ids[0] == encoder.assistant).nonzero()), {4: 1.0})
    assert attention_losses(batch, attentions)["keys"] < without - 1


def test_probes_tell_places_and_ranks_from_states(encoder: Encoder) -> None:
    """Both losses fall when the states hold what is asked for; a video asks for nothing."""
    torch.manual_seed(0)
    batch, _ = _picture(encoder)
    probes = Probes()
    hidden = tuple(torch.randn(*batch.ids.shape, 192) for _ in range(7))
    first = probes(batch, hidden)
    optimizer = torch.optim.Adam(probes.parameters(), lr=0.02)
    for _ in range(40):
        losses = probes(batch, hidden)
        optimizer.zero_grad()
        (losses["places"] + losses["ranks"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name in ("places", "ranks"):
        assert np.isfinite(first[name].item())
        assert losses[name] < 0.5 * first[name]
    video = Prefix([encoder.bos, VISUAL], [0, 1], 2, [CAT], clocks=[0])
    asked = Question("video_presence", "does a cat appear?", "yes")
    empty = probes(encoder.batch([video], [[asked]]), hidden)
    assert empty["places"] == empty["ranks"] == 0
