"""Training sequences: one visual prefix, several independent question turns behind it.

A turn sees the prefix and itself, never another turn, and its positions restart behind the
prefix: every turn looks exactly like a prompt of its own, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmlm_efficient.pocket.architecture import TEXT_WIDTH
from mmlm_efficient.pocket.objects import NAMES, OBJECTS
from mmlm_efficient.pocket.questions import Question, Thing, unique
from mmlm_efficient.pocket.scenes import BINS

VISUAL = -1  # stands for "a visual token" in a prefix
_NO_LABEL = -100
_NOT_SHOWN, _NOT_NAMED = -2, -1
# (layer, head) that learn where to look: a frame's patches at its time, words at what they name,
# answers at the question's first and last key word (a name or a number), at what they are about,
# and, when they say a time, at the time of the first frame that shows it
CLOCK_HEADS, MOMENT_HEADS = ((0, 0),), ((5, 0), (5, 1))
POINTING_HEADS = ((1, 0), (2, 0))
FIRST_KEY_HEADS, LAST_KEY_HEADS = ((2, 1),), ((2, 2),)
AIMING_HEADS = ((3, 0), (4, 0))
_POINTING_WEIGHT, _PLACES_WEIGHT = 0.3, 0.3


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
        places: kind of object -> position as it is spoken, of objects that occur once.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    next_position: int
    shown: Sequence[int] | npt.NDArray[np.int64]
    clocks: Sequence[int] = ()
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)


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
        clock: column of the time of a visual token's frame, -1 = none.
        moment: for targets that say a time, the column where that time stands, -1 = none.
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
    clock: torch.Tensor
    moment: torch.Tensor
    place: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Additive attention mask, float32 [B, 1, S, S]: causal, turns apart from each other."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]
        allowed = causal & ((key == 0) | (key == query))
        allowed |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no empty rows
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]


def places_of(things: list[Thing]) -> dict[int, tuple[int, int]]:
    """`Prefix.places` of a picture."""
    return {NAMES.index(thing.name): thing.bins for thing in unique(things)}


class Encoder:
    """Turns prefixes and questions into batches, remembering tokenised texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.bos, self.user = self.token("<s>"), self.token("<user>")
        self.assistant, self.eos = self.token("<assistant>"), self.token("</s>")
        self._named = np.full(len(tokenizer), _NOT_NAMED)
        for number, kind in enumerate(OBJECTS):
            self._named[[self.token(kind.name), self.token(kind.plural)]] = number
        # far apart for tokens that are no numbers, so that these are never "off by one"
        self.numbers = torch.arange(len(tokenizer)) * 1000
        for number in range(100):
            self.numbers[self.token(str(number))] = -number
        self._is_key = (self._named != _NOT_NAMED) | (self.numbers.numpy() <= 0)
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
        longest = max(len(row[0]) for row in rows)
        fills = (0, 0, -1, _NO_LABEL, 0.0, _NOT_NAMED, -1, -1)
        columns = []
        for k, fill in enumerate(fills):
            dtype = np.float32 if isinstance(fill, float) else np.int64
            table = np.full((len(rows), longest), fill, dtype)
            for i, row in enumerate(rows):
                table[i, : len(row[k])] = row[k]
            columns.append(torch.from_numpy(table))
        ids, positions, turn, labels, weights, about, first_key, last_key = columns
        visual = (ids == VISUAL) & (turn == 0)
        ids = ids.clamp(min=0)
        shown = torch.full_like(ids, _NOT_SHOWN)
        kinds = torch.from_numpy(np.concatenate([np.asarray(p.shown) for p in prefixes]))
        shown[visual] = kinds.where((kinds >= 0) & (kinds < len(OBJECTS)), _NOT_SHOWN)
        named = torch.from_numpy(self._named)[ids].where(turn > 0, _NOT_NAMED)
        clock = torch.full_like(ids, -1)
        for i, prefix in enumerate(prefixes):
            if len(prefix.clocks):
                clock[i, visual[i]] = torch.tensor(prefix.clocks)
        place = torch.full((len(rows), len(OBJECTS), 2), _NO_LABEL)
        for i, prefix in enumerate(prefixes):
            for kind, bins in prefix.places.items():
                place[i, kind] = torch.tensor(bins)
        return Batch(
            ids=ids,
            visual=visual,
            positions=positions,
            turns=turn,
            labels=labels,
            weights=weights,
            shown=shown,
            named=named,
            about=about,
            first_key=first_key,
            last_key=last_key,
            clock=clock,
            moment=self._moments(labels, shown, about, clock),
            place=place,
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

    def _row(self, prefix: Prefix, questions: Sequence[Question]) -> tuple[list[float], ...]:
        ids, positions = list(prefix.ids), list(prefix.positions)
        turn = [0] * len(ids)
        labels, weights = [_NO_LABEL] * len(ids), [0.0] * len(ids)
        about = [_NOT_NAMED] * len(ids)
        first_key, last_key = [-1] * len(ids), [-1] * len(ids)
        for number, question in enumerate(questions, start=1):
            asked = [*self.text(question.text), self.assistant]
            answer = [*self.text(question.answer), self.eos]
            tokens = asked + answer[:-1]  # the end token is only a target
            keys = [len(ids) + k for k, token in enumerate(asked) if self._is_key[token]]
            ids += tokens
            positions += range(prefix.next_position, prefix.next_position + len(tokens))
            turn += [number] * len(tokens)
            labels += [_NO_LABEL] * (len(asked) - 1) + answer
            # long answers should count more than short ones, but not in proportion
            weights += [0.0] * (len(asked) - 1) + [len(answer) ** -0.5] * len(answer)
            about += [_NOT_NAMED] * (len(asked) - 1) + self._about(asked, answer)
            for column, which in ((first_key, 0), (last_key, -1)):
                place = keys[which] if keys else -1
                column += [-1] * (len(asked) - 1) + [place] * len(answer)
        return ids, positions, turn, labels, weights, about, first_key, last_key  # type: ignore[return-value]

    def _about(self, asked: list[int], answer: list[int]) -> list[int]:
        """Kind of object that each answer token is about, see `Batch.about`."""
        kinds = {int(kind) for kind in self._named[asked] if kind != _NOT_NAMED}
        single = kinds.pop() if len(kinds) == 1 else _NOT_NAMED
        said = [int(kind) for kind in self._named[answer]]
        return [kind if kind != _NOT_NAMED else single for kind in said]


class PlaceProbes(nn.Module):
    """Linear read-outs of positions from hidden states, which exist only while training.

    Words must know where the object is that they name after two layers; answers where the
    objects of the question are after four, and where the object is that they are about after five.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, 2 * BINS) for _ in range(4))

    def forward(self, batch: Batch, hidden: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Mean cross-entropy of all positions that are known; scalar."""
        keys = [
            batch.named.gather(1, column.clamp(min=0)).masked_fill(column < 0, _NOT_NAMED)
            for column in (batch.first_key, batch.last_key)
        ]
        asked = ((batch.named, 2), (keys[0], 4), (keys[1], 4), (batch.about, 5))
        losses = []
        for head, (kinds, depth) in zip(self.heads, asked, strict=True):
            rows, words = (kinds != _NOT_NAMED).nonzero(as_tuple=True)
            target = batch.place[rows, kinds[rows, words]]
            if not bool((target >= 0).any()):
                continue
            states = functional.rms_norm(hidden[depth][rows, words], (TEXT_WIDTH,))
            logits = head(states).unflatten(-1, (2, BINS))
            losses.append(
                functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), ignore_index=_NO_LABEL
                )
            )
        return torch.stack(losses).mean() if losses else torch.zeros(())


def answer_loss(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    visual: torch.Tensor,
    probes: PlaceProbes | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weighted cross-entropy of the answers, and how well some heads look where they should.

    Args:
        visual: visual tokens of the whole batch in reading order [total, C].
        probes: adds the loss "places".

    Returns:
        losses: "answer", "pointing", "aiming", "keys" and their weighted sum "loss", scalars.
        said: int64 [targets], the token that would have been chosen for each target.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = embeds.masked_scatter(batch.visual[..., None], visual)
    output = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
        output_attentions=True,
        output_hidden_states=probes is not None,
    )
    wanted = batch.labels != _NO_LABEL
    logits = model.lm_head(output.last_hidden_state[wanted])
    target, weight = batch.labels[wanted], batch.weights[wanted]
    each = functional.cross_entropy(logits, target, reduction="none")
    answer = (each * weight).sum() / weight.sum()
    pointing = _looking_loss(batch, batch.named, output.attentions, POINTING_HEADS)
    aiming = _looking_loss(batch, batch.about, output.attentions, AIMING_HEADS, first_only=True)
    keys = _key_loss(batch.first_key, output.attentions, FIRST_KEY_HEADS)
    keys = keys + _key_loss(batch.last_key, output.attentions, LAST_KEY_HEADS)
    if bool((batch.clock >= 0).any()):
        keys = keys + _key_loss(batch.clock, output.attentions, CLOCK_HEADS)
    if bool((batch.moment >= 0).any()):
        keys = keys + _key_loss(batch.moment, output.attentions, MOMENT_HEADS)
    loss = answer + _POINTING_WEIGHT * (pointing + aiming + keys)
    losses = {"loss": loss, "answer": answer, "pointing": pointing, "aiming": aiming, "keys": keys}
    if probes is not None and bool((batch.place >= 0).any()):
        losses["places"] = probes(batch, output.hidden_states)
        losses["loss"] = losses["loss"] + _PLACES_WEIGHT * losses["places"]
    return losses, logits.argmax(-1)


def _looking_loss(
    batch: Batch,
    kinds: torch.Tensor,
    attentions: tuple[torch.Tensor, ...],
    heads: Sequence[tuple[int, int]],
    *,
    first_only: bool = False,
) -> torch.Tensor:
    """Minus log of the attention that tokens pay to the patches that show their kind of object.

    For an object that is not there, the attention paid to the first token counts instead: that
    is how the decoder comes to know that there is none.

    Args:
        kinds: kind of object that each token should look at [B, S], -1 = any.
        heads: the (layer, head) pairs that are taught.
        first_only: of a video, only the first frame that shows the object counts.
    """
    rows, words = (kinds != _NOT_NAMED).nonzero(as_tuple=True)
    wanted = batch.shown[rows] == kinds[rows, words, None]
    if first_only:
        clock = batch.clock[rows].masked_fill(~wanted, 10**6)
        wanted &= clock == clock.min(-1, keepdim=True).values
    wanted[:, 0] |= ~wanted.any(-1)
    paid = [attentions[layer][rows, head, words] for layer, head in heads]
    shares = [(p * wanted).sum(-1).clamp(min=1e-6) for p in paid]
    return -torch.stack(shares).log().mean()


def _key_loss(
    columns: torch.Tensor, attentions: tuple[torch.Tensor, ...], heads: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Minus log of the attention that tokens pay to the given column [B, S], -1 = any."""
    rows, words = (columns >= 0).nonzero(as_tuple=True)
    targets = columns[rows, words]
    paid = [attentions[layer][rows, head, words, targets] for layer, head in heads]
    return -torch.stack(paid).clamp(min=1e-6).log().mean()


def turn_accuracy(
    batch: Batch, said: torch.Tensor, turns: Sequence[Sequence[Question]], encoder: Encoder
) -> dict[str, list[bool]]:
    """Whether every token of each answer was right (teacher-forced), by kind.

    Positions may be off by one bin, as in `questions.is_right`.
    """
    wanted = batch.labels != _NO_LABEL
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
