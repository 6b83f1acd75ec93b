"""What pocket's decoder is told besides the answers: where some heads look, what states hold.

Answers alone teach a small decoder to look things up only after many thousand steps. Told what
a few heads should look at, it learns in hundreds. The heads make up short programs:

- "where is the cat?": the word looks at the cat's patches, the answer at the word and there.
- "how many cats?": the answer spreads its attention evenly over the cats and the first token,
  so that the share of the first token is 1 / (1 + cats).
- lists: the centre of each object looks evenly at the centres before it, an answer at the names
  it has said; both thereby know a rank, and the answer looks at the object whose rank it is.
- "when does the cat appear?": a frame's patches look at its time and at earlier cats; the answer
  looks at cats without earlier ones, and at their time.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from mmlm_efficient.pocket.architecture import TEXT_WIDTH
from mmlm_efficient.pocket.prompts import NO_LABEL, NONE_LEFT, NOT_LISTED, NOT_NAMED, Batch
from mmlm_efficient.pocket.scenes import BINS, MAX_OBJECTS

Heads = tuple[tuple[int, int], ...]  # (layer, head)

CLOCK_HEADS: Heads = ((0, 0),)  # a frame's patches: at its time
POINTING_HEADS: Heads = ((1, 0), (2, 0))  # words: at what they name
RANK_HEADS: Heads = (
    (1, 1),
    (1, 2),
    (2, 0),
    (2, 2),
)  # centres of objects: at the centres before them
PROGRESS_HEADS: Heads = ((1, 2),)  # answers of lists: at the names said so far
FIRST_KEY_HEADS: Heads = ((2, 1),)  # answers: at the question's first name or number
LAST_KEY_HEADS: Heads = ((2, 2),)  # ... and at its last
BEFORE_HEADS: Heads = ((2, 1),)  # a frame's patches: at the same kind in earlier frames
AIMING_HEADS: Heads = ((3, 0), (4, 0))  # answers: at what they are about
COUNT_HEADS: Heads = ((3, 1), (3, 2), (4, 1), (4, 2))  # answers that count: at what they count
MOMENT_HEADS: Heads = ((5, 0), (5, 1))  # answers that say a time: at that time
_WEIGHTS = {"counting": 0.6}
_WEIGHT = 0.3  # of all other losses


class Probes(nn.Module):
    """Linear read-outs of hidden states, which exist only while training.

    Words must know where the object is that they name after two layers; answers where the
    objects of the question are after four, and where the object is that they are about after
    five. Centres of objects must know their rank after three, answers of lists after two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(TEXT_WIDTH, 2 * BINS) for _ in range(4))
        self.ranks = nn.ModuleList(nn.Linear(TEXT_WIDTH, MAX_OBJECTS + 1) for _ in range(2))

    def forward(self, batch: Batch, hidden: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Mean cross-entropies "places" and "ranks" of all that is known; scalars."""
        keys = [
            batch.named.gather(1, column.clamp(min=0)).masked_fill(column < 0, NOT_NAMED)
            for column in (batch.first_key, batch.last_key)
        ]
        asked = ((batch.named, 2), (keys[0], 4), (keys[1], 4), (batch.about, 5))
        places = []
        for head, (kinds, depth) in zip(self.places, asked, strict=True):
            rows, words = (kinds != NOT_NAMED).nonzero(as_tuple=True)
            target = batch.place[rows, kinds[rows, words]].flatten()
            logits = _read(head, hidden[depth][rows, words]).reshape(-1, BINS)
            places.append(_cross_entropy(logits, target))
        ranks = []
        ranked = ((_middles(batch), 3), (batch.listed, 2))
        for head, (things, depth) in zip(self.ranks, ranked, strict=True):
            rows, words = (things != NOT_LISTED).nonzero(as_tuple=True)
            thing = things[rows, words]
            count = (batch.kinds[rows] >= 0).sum(-1)
            target = batch.ranks[rows, thing.clamp(min=0)].where(thing != NONE_LEFT, count)
            ranks.append(_cross_entropy(_read(head, hidden[depth][rows, words]), target))
        return {"places": torch.stack(places).mean(), "ranks": torch.stack(ranks).mean()}


def _read(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(functional.rms_norm(states, (TEXT_WIDTH,)))
    return logits


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the known targets; 0 if there are none."""
    known = (target != NO_LABEL).sum().clamp(min=1)
    return functional.cross_entropy(logits, target, ignore_index=NO_LABEL, reduction="sum") / known


def _middles(batch: Batch) -> torch.Tensor:
    """The thing whose centre a token holds [B, S], -1 = none."""
    return batch.owner.where(batch.middle, -1)


def answer_loss(
    model: LlavaForConditionalGeneration,
    batch: Batch,
    visual: torch.Tensor,
    probes: Probes | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weighted cross-entropy of the answers, and how well some heads look where they should.

    Args:
        visual: visual tokens of the whole batch in reading order [total, C].
        probes: adds the losses "places" and "ranks".

    Returns:
        losses: "answer", those of `attention_losses`, and their weighted sum "loss", scalars.
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
    wanted = batch.labels != NO_LABEL
    logits = model.lm_head(output.last_hidden_state[wanted])
    target, weight = batch.labels[wanted], batch.weights[wanted]
    each = functional.cross_entropy(logits, target, reduction="none")
    losses = attention_losses(batch, output.attentions)
    if probes is not None:
        losses |= probes(batch, output.hidden_states)
    answer = (each * weight).sum() / weight.sum()
    parts = [_WEIGHTS.get(name, _WEIGHT) * loss for name, loss in losses.items()]
    total = answer + torch.stack(parts).sum()
    return {"loss": total, "answer": answer, **losses}, logits.argmax(-1)


def attention_losses(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Minus log of the attention that the taught heads pay where they should; scalars >= 0.

    Args:
        attentions: of each layer, probabilities [B, H, S, S].

    Returns:
        "pointing" (words), "aiming" (answers), "keys" (key words and times), "listing",
        "counting".
    """
    single = batch.about.where(batch.listed == NOT_LISTED, NOT_NAMED)
    keys = [
        _column_loss(batch.first_key, attentions, FIRST_KEY_HEADS),
        _column_loss(batch.last_key, attentions, LAST_KEY_HEADS),
        _column_loss(batch.clock, attentions, CLOCK_HEADS),
        _column_loss(batch.moment, attentions, MOMENT_HEADS),
        _before_loss(batch, attentions),
    ]
    return {
        "pointing": _kind_loss(batch, batch.named, attentions, POINTING_HEADS),
        "aiming": _kind_loss(batch, single, attentions, AIMING_HEADS, first_only=True),
        "keys": torch.stack(keys).sum(),
        "listing": _next_loss(batch, attentions) + _progress_loss(batch, attentions),
        "counting": _rank_loss(batch, attentions) + _count_loss(batch, attentions),
    }


def _paid(
    attentions: tuple[torch.Tensor, ...], heads: Heads, rows: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """Attention that words of rows pay, of several heads: [heads, words, S]."""
    return torch.stack([attentions[layer][rows, head, words] for layer, head in heads])


def _mean_log(shares: torch.Tensor) -> torch.Tensor:
    """Mean of minus log of shares; 0 if there are none."""
    return -shares.clamp(min=1e-6).log().sum() / max(1, shares.numel())


def _kind_loss(
    batch: Batch,
    kinds: torch.Tensor,
    attentions: tuple[torch.Tensor, ...],
    heads: Heads,
    *,
    first_only: bool = False,
) -> torch.Tensor:
    """Tokens look at the patches that show their kind of object.

    For an object that is not there, the attention paid to the first token counts instead: that
    is how the decoder comes to know that there is none.

    Args:
        kinds: kind of object that each token should look at [B, S], -1 = any.
        first_only: of a video, only the first frame that shows the object counts.
    """
    rows, words = (kinds != NOT_NAMED).nonzero(as_tuple=True)
    wanted = batch.shown[rows] == kinds[rows, words, None]
    if first_only:
        clock = batch.clock[rows].masked_fill(~wanted, 10**6)
        wanted &= clock == clock.min(-1, keepdim=True).values
    wanted[:, 0] |= ~wanted.any(-1)
    return _mean_log((_paid(attentions, heads, rows, words) * wanted).sum(-1))


def _column_loss(
    columns: torch.Tensor, attentions: tuple[torch.Tensor, ...], heads: Heads
) -> torch.Tensor:
    """Tokens look at the given column [B, S], -1 = any."""
    rows, words = (columns >= 0).nonzero(as_tuple=True)
    targets = columns[rows, words]
    return _mean_log(
        torch.stack([attentions[layer][rows, head, words, targets] for layer, head in heads])
    )


def _before_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Patches of a video look at their kind in earlier frames, or at the first token."""
    rows, words = ((batch.clock >= 0) & (batch.shown >= 0)).nonzero(as_tuple=True)
    wanted = batch.shown[rows] == batch.shown[rows, words, None]
    wanted &= batch.clock[rows] < batch.clock[rows, words, None]
    wanted[:, 0] |= ~wanted.any(-1)
    return _mean_log((_paid(attentions, BEFORE_HEADS, rows, words) * wanted).sum(-1))


def _next_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Answers of lists look at the object whose turn it is, or at the first token."""
    rows, words = (batch.listed != NOT_LISTED).nonzero(as_tuple=True)
    wanted = batch.owner[rows] == batch.listed[rows, words, None]
    wanted[:, 0] |= ~wanted.any(-1)
    return _mean_log((_paid(attentions, AIMING_HEADS, rows, words) * wanted).sum(-1))


def _progress_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Answers of lists look evenly at <assistant> and the names said so far."""
    rows, words = (batch.listed != NOT_LISTED).nonzero(as_tuple=True)
    said = batch.marked[rows] & (batch.turns[rows] == batch.turns[rows, words, None])
    said &= torch.arange(said.shape[1]) <= words[:, None]
    paid = _paid(attentions, PROGRESS_HEADS, rows, words)
    return _even_loss(paid, said)


def _rank_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Centres of objects look evenly at the objects before them and the first token."""
    rows, words = batch.middle.nonzero(as_tuple=True)
    own = batch.ranks[rows, batch.owner[rows, words]]
    earlier = (batch.ranks[rows] >= 0) & (batch.ranks[rows] < own[:, None])
    return _tally_loss(batch, earlier, rows, words, _paid(attentions, RANK_HEADS, rows, words))


def _count_loss(batch: Batch, attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Answers that count look evenly at the objects they count and the first token."""
    rows, words = (batch.counted != NOT_NAMED).nonzero(as_tuple=True)
    same = batch.kinds[rows] == batch.counted[rows, words, None]
    return _tally_loss(batch, same, rows, words, _paid(attentions, COUNT_HEADS, rows, words))


def _tally_loss(
    batch: Batch,
    things: torch.Tensor,
    rows: torch.Tensor,
    words: torch.Tensor,
    paid: torch.Tensor,
) -> torch.Tensor:
    """Even attention over the first token and the chosen things: their centres, if in sight.

    Args:
        things: bool [words, 6]; those without a visual token before the word do not count.
    """
    own = _one_hot(batch.owner)
    centre = _one_hot(_middles(batch))
    own = torch.where(centre.any(1, keepdim=True), centre, own)
    column = torch.arange(own.shape[1])[:, None]
    first = torch.where(own > 0, column, own.shape[1]).amin(1)
    things = things & (first[rows] < words[:, None])
    shares = torch.einsum("hns,nst->hnt", paid, own[rows])
    always = torch.ones(len(rows), 1, dtype=torch.bool)
    return _even_loss(torch.cat([paid[..., :1], shares], -1), torch.cat([always, things], -1))


def _one_hot(things: torch.Tensor) -> torch.Tensor:
    """Indices [B, S], -1 = none -> float32 [B, S, 6]."""
    return functional.one_hot(things + 1, MAX_OBJECTS + 1)[..., 1:].float()


def _even_loss(shares: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Divergence of shares [heads, words, N] from even shares of the wanted ones [words, N]."""
    even = wanted / wanted.sum(-1, keepdim=True)
    gap = (even * ((even + ~wanted).log() - shares.clamp(min=1e-6).log())).sum(-1)
    return gap.sum() / max(1, gap.numel())
