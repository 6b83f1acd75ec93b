"""Training sequences: one visual prefix, several independent question turns behind it.

A turn sees the prefix and itself, never another turn, and its positions restart behind the
prefix: every turn looks exactly like a prompt of its own, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mmlm_efficient.pocket.objects import OBJECTS
from mmlm_efficient.pocket.questions import Question

VISUAL = -1  # stands for "a visual token" in a prefix
_NO_LABEL = -100
_NOT_SHOWN, _NOT_NAMED = -2, -1
POINTING_HEADS = ((1, 0), (2, 0))  # (layer, head) that learn to look at what a word names
_POINTING_WEIGHT = 0.3


@dataclass(frozen=True)
class Prefix:
    """What comes before the questions of one sample.

    Attributes:
        ids: token ids, `VISUAL` where a visual token stands.
        positions: position of each token.
        next_position: where the text behind the prefix starts.
        shown: for the visual tokens in order, the object kind each one shows (index into
            `objects.NAMES`; anything else = none).
    """

    ids: Sequence[int]
    positions: Sequence[int]
    next_position: int
    shown: Sequence[int]


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
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    turns: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    shown: torch.Tensor
    named: torch.Tensor

    def mask(self) -> torch.Tensor:
        """Additive attention mask, float32 [B, 1, S, S]: causal, turns apart from each other."""
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = self.turns[:, :, None], self.turns[:, None, :]
        allowed = causal & ((key == 0) | (key == query))
        allowed |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no empty rows
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]


class Encoder:
    """Turns prefixes and questions into batches, remembering tokenised texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        ids = tokenizer.convert_tokens_to_ids(["<s>", "<user>", "<assistant>", "</s>"])
        self.bos, self.user, self.assistant, self.eos = ids
        self._named = np.full(len(tokenizer), _NOT_NAMED)
        for number, kind in enumerate(OBJECTS):
            words = tokenizer.convert_tokens_to_ids([kind.name, kind.plural])
            self._named[words] = number

    def text(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]

    def batch(self, prefixes: Sequence[Prefix], turns: Sequence[Sequence[Question]]) -> Batch:
        """Pad prefixes with their questions to one batch (padding at the end)."""
        rows = [self._row(p, t) for p, t in zip(prefixes, turns, strict=True)]
        longest = max(len(row[0]) for row in rows)
        fills = (0, 0, -1, _NO_LABEL, 0.0)
        columns = []
        for k, fill in enumerate(fills):
            kind = np.float32 if isinstance(fill, float) else np.int64
            table = np.full((len(rows), longest), fill, kind)
            for i, row in enumerate(rows):
                table[i, : len(row[k])] = row[k]
            columns.append(torch.from_numpy(table))
        ids, positions, turn, labels, weights = columns
        visual = (ids == VISUAL) & (turn == 0)
        ids = ids.clamp(min=0)
        shown = torch.full_like(ids, _NOT_SHOWN)
        kinds = torch.from_numpy(np.concatenate([np.asarray(p.shown) for p in prefixes]))
        shown[visual] = kinds.where((kinds >= 0) & (kinds < len(OBJECTS)), _NOT_SHOWN)
        named = torch.from_numpy(self._named)[ids].where(turn > 0, _NOT_NAMED)
        return Batch(ids, visual, positions, turn, labels, weights, shown, named)

    def _row(self, prefix: Prefix, questions: Sequence[Question]) -> tuple[list[float], ...]:
        ids, positions = list(prefix.ids), list(prefix.positions)
        turn = [0] * len(ids)
        labels, weights = [_NO_LABEL] * len(ids), [0.0] * len(ids)
        for number, question in enumerate(questions, start=1):
            asked = [*self.text(question.text), self.assistant]
            answer = [*self.text(question.answer), self.eos]
            tokens = asked + answer[:-1]  # the end token is only a target
            ids += tokens
            positions += range(prefix.next_position, prefix.next_position + len(tokens))
            turn += [number] * len(tokens)
            labels += [_NO_LABEL] * (len(asked) - 1) + answer
            # long answers should count more than short ones, but not in proportion
            weights += [0.0] * (len(asked) - 1) + [len(answer) ** -0.5] * len(answer)
        return ids, positions, turn, labels, weights  # type: ignore[return-value]


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, visual: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weighted cross-entropy of the answers, and how well two heads look at what words name.

    Args:
        visual: visual tokens of the whole batch in reading order [total, C].

    Returns:
        losses: "answer", "pointing" and their weighted sum "loss", scalars.
        right: bool [targets], whether each answer token would have been chosen.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = embeds.masked_scatter(batch.visual[..., None], visual)
    output = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
        output_attentions=True,
    )
    wanted = batch.labels != _NO_LABEL
    logits = model.lm_head(output.last_hidden_state[wanted])
    target, weight = batch.labels[wanted], batch.weights[wanted]
    each = functional.cross_entropy(logits, target, reduction="none")
    answer = (each * weight).sum() / weight.sum()
    pointing = _pointing_loss(batch, output.attentions)
    losses = {"loss": answer + _POINTING_WEIGHT * pointing, "answer": answer, "pointing": pointing}
    return losses, logits.argmax(-1) == target


def _pointing_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Minus log of the attention that naming words pay to the patches that show the object.

    For an object that is not there, the attention paid to the first token counts instead: that
    is how the decoder comes to know that there is none.
    """
    rows, words = (batch.named != _NOT_NAMED).nonzero(as_tuple=True)
    wanted = batch.shown[rows] == batch.named[rows, words, None]
    wanted[:, 0] |= ~wanted.any(-1)
    paid = [attentions[layer][rows, head, words] for layer, head in POINTING_HEADS]
    shares = [(p * wanted).sum(-1).clamp(min=1e-6) for p in paid]
    return -torch.stack(shares).log().mean()


def turn_accuracy(batch: Batch, right: torch.Tensor, turns: Sequence[Sequence[Question]]) -> dict[str, list[bool]]:
    """Whether every token of each answer was right (teacher-forced), by kind."""
    wanted = batch.labels != _NO_LABEL
    ok = torch.ones_like(wanted)
    ok[wanted] = right
    result: dict[str, list[bool]] = {}
    for i, questions in enumerate(turns):
        for number, question in enumerate(questions, start=1):
            mine = wanted[i] & (batch.turns[i] == number)
            result.setdefault(question.kind, []).append(bool(ok[i][mine].all()))
    return result
