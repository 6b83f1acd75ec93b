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

from mmlm_efficient.pocket.questions import Question

VISUAL = -1  # stands for "a visual token" in a prefix
_NO_LABEL = -100


@dataclass(frozen=True)
class Prefix:
    """What comes before the questions of one sample.

    Attributes:
        ids: token ids, `VISUAL` where a visual token stands.
        positions: position of each token.
        next_position: where the text behind the prefix starts.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    next_position: int


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
    """

    ids: torch.Tensor
    visual: torch.Tensor
    positions: torch.Tensor
    turns: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

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
        return Batch(ids.clamp(min=0), visual, positions, turn, labels, weights)

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy of the answers.

    Args:
        visual: visual tokens of the whole batch in reading order [total, C].

    Returns:
        loss: scalar.
        right: bool [targets], whether each answer token would have been chosen.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    embeds = embeds.masked_scatter(batch.visual[..., None], visual)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.labels != _NO_LABEL
    logits = model.lm_head(hidden[wanted])
    target, weight = batch.labels[wanted], batch.weights[wanted]
    loss = functional.cross_entropy(logits, target, reduction="none")
    return (loss * weight).sum() / weight.sum(), logits.argmax(-1) == target


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
