"""Training sequences: one visual prefix, several independent question turns behind it.

A turn sees the prefix and itself, never another turn, and its positions restart behind the
prefix: every turn looks exactly like a prompt of its own, at a fraction of the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from mmlm_efficient.pocket.objects import NAMES, OBJECTS
from mmlm_efficient.pocket.questions import Question, Thing, reading_order, unique
from mmlm_efficient.pocket.scenes import MAX_OBJECTS

VISUAL = -1  # stands for "a visual token" in a prefix
NO_LABEL = -100
NOT_SHOWN, NOT_NAMED = -2, -1
NOT_LISTED, NONE_LEFT = -1, -2


@dataclass(frozen=True)
class Prefix:
    """What comes before the questions of one sample.

    Attributes:
        ids: token ids, `VISUAL` where a visual token stands.
        positions: position of each token.
        next_position: where the text behind the prefix starts.
        shown: for the visual tokens in order, the object kind each one shows (index into
            `objects.NAMES`; anything else = none).
        clocks: for the visual tokens in order, where in `ids` the time of their frame stands;
            empty for a picture.
        things: a picture's objects.
        patches: of a picture, the raster index of each visual token.
        owner: of a picture, the index into `things` that each visual token shows, -1 = none.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    next_position: int
    shown: Sequence[int] | npt.NDArray[np.int64]
    clocks: Sequence[int] = ()
    things: Sequence[Thing] = ()
    patches: Sequence[int] | npt.NDArray[np.int64] = ()
    owner: Sequence[int] | npt.NDArray[np.int64] = ()


@dataclass(frozen=True)
class Batch:
    """Padded sequences of a training step, all [B, S] unless said otherwise.

    Attributes:
        ids: token ids (0 at visual tokens and padding).
        visual: True at visual tokens.
        positions: rotary positions.
        turns: 0 = prefix, k = turn k, -1 = padding.
        labels: next-token targets, -100 = no loss.
        weights: weight of each target.
        shown: kind of object that a visual token shows, -2 = none or not visual.
        named: kind of object that a text token behind the prefix names, -1 = none.
        about: kind of object that the target of a token is about, -1 = none: the kind that it
            names, or else the only kind that its question names.
        first_key, last_key: column of the question's first and last key word, for tokens with a
            target; -1 = none.
        counted: kind of object whose number is the target, -1 = no such target.
        listed: in the answer of a list, the thing whose turn it is (its index), -2 = none is
            left; -1 outside of lists.
        marked: True at a list's <assistant> and at the names said behind it.
        clock: column of the time of a visual token's frame, -1 = none.
        moment: for targets that say a time, the column where that time stands, -1 = none.
        owner: the thing that a visual token of a picture shows, -1 = none.
        middle: True at the visual token that holds the centre of its thing.
        kinds: kind of each thing [B, 6], -1 = there are fewer.
        ranks: place of each thing in reading order [B, 6], -1 = there are fewer.
        place: spoken position [B, kinds, 2] of the objects that occur once, -100 = unknown.
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    turns: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    shown: torch.Tensor
    named: torch.Tensor
    about: torch.Tensor
    first_key: torch.Tensor
    last_key: torch.Tensor
    counted: torch.Tensor
    listed: torch.Tensor
    marked: torch.Tensor
    clock: torch.Tensor
    moment: torch.Tensor
    owner: torch.Tensor
    middle: torch.Tensor
    kinds: torch.Tensor
    ranks: torch.Tensor
    place: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Additive attention mask, float32 [B, 1, S, S]: causal, turns apart from each other."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]
        allowed = causal & ((key == 0) | (key == query))
        allowed |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no empty rows
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]


# columns of a row that the encoder writes, and what padding holds
_FILLS: dict[str, Any] = {
    "ids": 0,
    "positions": 0,
    "turns": -1,
    "labels": NO_LABEL,
    "weights": 0.0,
    "about": NOT_NAMED,
    "first_key": -1,
    "last_key": -1,
    "counted": NOT_NAMED,
    "listed": NOT_LISTED,
    "marked": False,
}


class Encoder:
    """Turns prefixes and questions into batches, remembering tokenised texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.bos, self.user = self.token("<s>"), self.token("<user>")
        self.assistant, self.eos = self.token("<assistant>"), self.token("</s>")
        self._named = np.full(len(tokenizer), NOT_NAMED)
        for number, kind in enumerate(OBJECTS):
            self._named[[self.token(kind.name), self.token(kind.plural)]] = number
        # far apart for tokens that are no numbers, so that these are never "off by one"
        self.numbers = torch.arange(len(tokenizer)) * 1000
        for number in range(100):
            self.numbers[self.token(str(number))] = -number
        self._is_key = (self._named != NOT_NAMED) | (self.numbers.numpy() <= 0)
        self._is_key[0] = False  # padding

    def token(self, piece: str) -> int:
        """Id of a piece of the vocabulary."""
        return int(self.tokenizer.get_vocab()[piece])

    def text(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def batch(self, prefixes: Sequence[Prefix], turns: Sequence[Sequence[Question]]) -> Batch:
        """Pad prefixes with their questions to one batch (padding at the end)."""
        rows = [self._row(p, t) for p, t in zip(prefixes, turns, strict=True)]
        longest = max(len(row["ids"]) for row in rows)
        columns = {}
        for name, fill in _FILLS.items():
            table = np.full((len(rows), longest), fill, np.asarray(fill).dtype)
            for i, row in enumerate(rows):
                table[i, : len(row[name])] = row[name]
            columns[name] = torch.from_numpy(table)
        columns["weights"] = columns["weights"].float()
        ids = columns["ids"]
        visual = (ids == VISUAL) & (columns["turns"] == 0)
        ids = columns["ids"] = ids.clamp(min=0)
        shown = torch.full_like(ids, NOT_SHOWN)
        kinds = torch.from_numpy(np.concatenate([np.asarray(p.shown) for p in prefixes]))
        shown[visual] = kinds.where((kinds >= 0) & (kinds < len(OBJECTS)), NOT_SHOWN)
        clock = torch.full_like(ids, -1)
        for i, prefix in enumerate(prefixes):
            if len(prefix.clocks):
                clock[i, visual[i]] = torch.tensor(prefix.clocks)
        columns["named"] = torch.from_numpy(self._named)[ids].where(columns["turns"] > 0, NOT_NAMED)
        columns["moment"] = self._moments(columns["labels"], shown, columns["about"], clock)
        return Batch(
            visual=visual, shown=shown, clock=clock, **columns, **_things(prefixes, visual)
        )

    def _moments(
        self, labels: torch.Tensor, shown: torch.Tensor, about: torch.Tensor, clock: torch.Tensor
    ) -> torch.Tensor:
        """See `Batch.moment`."""
        moment = torch.full_like(labels, -1)
        says_number = (labels >= 0) & (self.numbers[labels.clamp(min=0)] <= 0) & (about >= 0)
        rows, words = (says_number & (clock >= 0).any(-1, keepdim=True)).nonzero(as_tuple=True)
        wanted = shown[rows] == about[rows, words, None]
        first = clock[rows].masked_fill(~wanted, clock.shape[1]).amin(-1)
        moment[rows, words] = first.where(first < clock.shape[1], -1)
        return moment

    def _row(self, prefix: Prefix, questions: Sequence[Question]) -> dict[str, list[Any]]:
        """The columns of `_FILLS` for one sample."""
        row: dict[str, list[Any]] = defaultdict(list)
        row["ids"] += prefix.ids
        row["positions"] += prefix.positions
        for name in _FILLS.keys() - {"ids", "positions", "turns"}:
            row[name] += [_FILLS[name]] * len(prefix.ids)
        row["turns"] += [0] * len(prefix.ids)
        for number, question in enumerate(questions, start=1):
            asked = [*self.text(question.text), self.assistant]
            answer = [*self.text(question.answer), self.eos]
            start, silent = len(row["ids"]), len(asked) - 1  # asked tokens without a target
            tokens = asked + answer[:-1]  # the end token is only a target
            keys = [start + k for k, token in enumerate(asked) if self._is_key[token]] or [-1]
            about = self._about(asked, answer)
            counted = [about[0] if question.kind == "how_many" else NOT_NAMED]
            row["ids"] += tokens
            row["positions"] += range(prefix.next_position, prefix.next_position + len(tokens))
            row["turns"] += [number] * len(tokens)
            # long answers should count more than short ones, but not in proportion
            spoken = {
                "labels": answer,
                "weights": [len(answer) ** -0.5] * len(answer),
                "about": about,
                "first_key": [keys[0]] * len(answer),
                "last_key": [keys[-1]] * len(answer),
                "counted": counted + [NOT_NAMED] * (len(answer) - 1),
                "listed": self._listed(question, len(answer)),
                "marked": [bool(question.order) and (k == 0 or k % 2) for k in range(len(answer))],
            }
            for name, values in spoken.items():
                row[name] += [_FILLS[name]] * silent + values
        return row

    def _about(self, asked: list[int], answer: list[int]) -> list[int]:
        """Kind of object that each answer token is about, see `Batch.about`."""
        kinds = {int(kind) for kind in self._named[asked] if kind != NOT_NAMED}
        single = kinds.pop() if len(kinds) == 1 else NOT_NAMED
        said = [int(kind) for kind in self._named[answer]]
        return [kind if kind != NOT_NAMED else single for kind in said]

    def _listed(self, question: Question, length: int) -> list[int]:
        """Thing whose turn it is at each target; names and commas (at last the end) alternate."""
        if not question.order:
            return [NOT_LISTED] * length
        upcoming = [*question.order, NONE_LEFT]
        return [upcoming[(k + 1) // 2] for k in range(length)]


def _things(prefixes: Sequence[Prefix], visual: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of a batch that describe the pictures' objects."""
    owner = torch.full(visual.shape, -1)
    middle = torch.zeros(visual.shape, dtype=torch.bool)
    kinds, ranks = torch.full((2, len(prefixes), MAX_OBJECTS), -1)
    place = torch.full((len(prefixes), len(OBJECTS), 2), NO_LABEL)
    for i, prefix in enumerate(prefixes):
        if not len(prefix.owner):
            continue
        mine = torch.as_tensor(np.asarray(prefix.owner))
        owner[i, visual[i]] = mine
        centres = torch.tensor([*(thing.patch for thing in prefix.things), -1])
        middle[i, visual[i]] = torch.as_tensor(np.asarray(prefix.patches)) == centres[mine]
        for rank, k in enumerate(reading_order(prefix.things)):
            kinds[i, k], ranks[i, k] = NAMES.index(prefix.things[k].name), rank
        for thing in unique(list(prefix.things)):
            place[i, NAMES.index(thing.name)] = torch.tensor(thing.bins)
    return {"owner": owner, "middle": middle, "kinds": kinds, "ranks": ranks, "place": place}


def turn_accuracy(
    batch: Batch, said: torch.Tensor, turns: Sequence[Sequence[Question]], encoder: Encoder
) -> dict[str, list[bool]]:
    """Whether every token of each answer was right (teacher-forced), by kind.

    Positions may be off by one bin, as in `questions.is_right`.
    """
    wanted = batch.labels != NO_LABEL
    right, near = torch.ones_like(wanted), torch.ones_like(wanted)
    labels = batch.labels[wanted]
    right[wanted] = said == labels
    gap = (encoder.numbers[said] - encoder.numbers[labels]).abs()
    near[wanted] = (said == labels) | (gap <= 1)
    result: dict[str, list[bool]] = {}
    for i, questions in enumerate(turns):
        for number, question in enumerate(questions, start=1):
            mine = wanted[i] & (batch.turns[i] == number)
            ok = near if question.kind == "where_is" else right
            result.setdefault(question.kind, []).append(bool(ok[i][mine].all()))
    return result
