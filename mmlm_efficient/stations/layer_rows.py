"""What a method sees and says at the decoder-layer station.

A :class:`LayerCut` says where visual tokens are cut and how they are ranked: by fixed scores that
an earlier station found, or by a scorer that looks at :class:`SampleRows`, the queries, keys and
values of just the columns that it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import DecoderParts
from mmlm_efficient.groups import group_means
from mmlm_efficient.stations.bridge import Block, PromptLayout


@dataclass
class PromptCache:
    """What scoring one image of a prompt at one layer leaves for the prompt's other images.

    Attributes:
        keys: float32 [h, S, d], `SampleRows.prompt_keys`.
        attention: by query column and causality, float32 [S] head-mean attention to all columns.
    """

    keys: Tensor | None = None
    attention: dict[tuple[int, bool], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleRows:
    """Queries, keys and values of one prompt at one layer, only for the columns asked for.

    Attributes:
        last: column of the last prompt token.
        scaling: factor on the query-key products.
        columns: columns of all prompt tokens, padding left out.
        text: columns of the prompt's tokens that are no visual tokens, on the CPU.
        block: the visual tokens of the image that is being scored, as they are now.
        uncut: the same image's tokens where the prompt entered the decoder.
        uncut_text: what `text` was there, on the CPU; text is never cut.
        shared: what the images of the prompt share at this layer.
        memory: the image's own, for what is the same at every cut; kept until the next prefill.
    """

    last: int
    scaling: float
    columns: Tensor
    _projections: Mapping[int, Tensor]
    _rope: tuple[Tensor, Tensor]
    _parts: DecoderParts
    text: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    block: Block = field(default_factory=lambda: Block(0, 0, 0))
    uncut: Block = field(default_factory=lambda: Block(0, 0, 0))
    uncut_text: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _embeddings: Tensor | None = None
    shared: PromptCache = field(default_factory=PromptCache)
    memory: dict[str, Any] = field(default_factory=dict)

    def query(self, columns: Tensor) -> Tensor:
        """Rotated queries [h, n, d] of the given columns int64 [n]."""
        return self._rotated(self._heads(0, columns, self._parts.heads), columns)

    def keys(self, columns: Tensor) -> Tensor:
        """Rotated keys [h, n, d], repeated to the query heads."""
        return self._repeated(self._rotated(self._heads(1, columns, self._parts.kv_heads), columns))

    def prompt_keys(self) -> Tensor:
        """Rotated keys float32 [h, S, d] of all `columns`, computed once for all images."""
        if self.shared.keys is None:
            self.shared.keys = self.keys(self.columns).float()
        return self.shared.keys

    def values(self, columns: Tensor) -> Tensor:
        """Values [h, n, d], repeated to the query heads."""
        return self._repeated(self._heads(2, columns, self._parts.kv_heads))

    def embeddings(self, columns: Tensor) -> Tensor:
        """Rows [n, D] of the decoder's input; columns count the prompt as it entered.

        Only where the cut asks for them (`LayerCut.embeddings`).
        """
        if self._embeddings is None:
            raise RuntimeError("the cut did not ask for embeddings")
        return self._embeddings[columns.to(self._embeddings.device)]

    def _heads(self, part: int, columns: Tensor, heads: int) -> Tensor:
        projection = self._projections[part]
        rows = projection[columns.to(projection.device)]
        return rows.view(rows.shape[0], heads, self._parts.head_dim).transpose(0, 1)

    def _rotated(self, rows: Tensor, columns: Tensor) -> Tensor:
        columns = columns.to(rows.device)
        cos, sin = self._rope[0][columns], self._rope[1][columns]
        first, second = rows.chunk(2, dim=-1)
        return rows * cos + torch.cat((-second, first), dim=-1) * sin

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows.repeat_interleave(self._parts.heads // self._parts.kv_heads, dim=0)


class LayerScorer(Protocol):
    """Scores the visual tokens of one image at a decoder layer."""

    def __call__(self, rows: SampleRows, columns: Tensor) -> Tensor:
        """Scores [V] of the image's tokens, which stand in columns int64 [V]; larger is better."""


class Recycler(Protocol):
    """Says which of the tokens that a cut drops are merged and stay as new tokens."""

    def __call__(self, scores: Tensor, keep: Tensor, hidden: Tensor) -> Sequence[Tensor]:
        """Groups to merge.

        Args:
            scores: float32 [V] of the image's tokens.
            keep: int64 [k], ascending, the tokens that stay as they are.
            hidden: [V, D], the layer's output at the image's tokens.

        Returns:
            For each new token the int64 positions of its members among the V tokens, the
            carrier (whose place it takes) first. New tokens stand behind the kept ones.
        """


@dataclass(frozen=True)
class LayerCut:
    """Cut the output of one decoder layer.

    Attributes:
        layer: 0-based decoder layer; it still runs on, and caches, all tokens.
        targets: visual tokens to keep of each image of the request; an image that has no more
            than its target is left alone. Empty where `ratios` count.
        score: scores an image's tokens; the target's number of largest stay.
        ratios: instead of targets, for each image the share of its prompt's visual tokens to
            keep: all images of a prompt are ranked together, and of n tokens
            n - round(n * (1 - ratio)) stay, at least one. Images of one prompt share a ratio.
        fixed: instead of a scorer, float32 scores of each image's tokens as they entered the
            decoder.
        lookahead: score with the next layer's projections of this layer's output, as methods do
            that rank at the input of a layer.
        embeddings: the scorer asks for `SampleRows.embeddings`.
        recycler: merges dropped tokens into new ones, which come on top of the target.
    """

    layer: int
    targets: tuple[int, ...] = ()
    score: LayerScorer | None = None
    ratios: tuple[float, ...] | None = None
    fixed: Mapping[int, Tensor] | None = None
    lookahead: bool = False
    embeddings: bool = False
    recycler: Recycler | None = None

    def target(self, images: Sequence[int], counts: Sequence[int]) -> int:
        """Tokens to keep of images of one prompt that have counts tokens; one image by target."""
        total = sum(counts)
        if self.ratios is None:
            return min(self.targets[images[0]], total)
        return max(1, total - round(total * (1.0 - self.ratios[images[0]])))

    def check_ratios(self, samples: Sequence[Sequence[Block]]) -> None:
        """Refuse ratios that differ between images of one prompt, which are ranked together.

        Args:
            samples: the image blocks of every prompt.

        Raises:
            SettingsError: they differ.
        """
        for sample, blocks in enumerate(samples if self.ratios is not None else ()):
            own = [(self.ratios or ())[block.image] for block in blocks]
            if len(set(own)) > 1:
                raise SettingsError(
                    f"the cut after decoder layer {self.layer} ranks all images of a prompt "
                    f"together, but prompt {sample} has images with the ratios "
                    f"{', '.join(map(str, own))}: give the images of one prompt the same ratio, "
                    "or use targets, which count for each image"
                )

    def due(self, image: int, count: int) -> bool:
        """Whether the cut can remove something of an image that has count tokens."""
        return self.ratios[image] < 1.0 if self.ratios is not None else count > self.targets[image]


@dataclass(frozen=True)
class Merge:
    """Rows of a cut hidden state that are means of rows before the cut, in one sample.

    Attributes:
        sample: prompt of the batch.
        columns: int64 [c], columns after the cut that are overwritten.
        members: int64 [m], columns before the cut; group: int64 [m], which of c they belong to.
    """

    sample: int
    columns: Tensor
    members: Tensor
    group: Tensor


def merges_of(
    before: PromptLayout, after: PromptLayout, groups: Mapping[int, Sequence[Tensor]]
) -> list[Merge]:
    """The merged rows of a cut: they stand at the end of their image's block."""
    merges = []
    pairs = zip(before.blocks, after.blocks, strict=True)
    for sample, (old_blocks, new_blocks) in enumerate(pairs):
        for old, new in zip(old_blocks, new_blocks, strict=True):
            own = groups.get(old.image, ())
            if own:
                sizes = torch.tensor([len(group) for group in own])
                numbers = torch.arange(len(own)).repeat_interleave(sizes)
                columns = torch.arange(new.stop - len(own), new.stop)
                merges.append(Merge(sample, columns, torch.cat(list(own)) + old.start, numbers))
    return merges


def cut_rows(hidden: Tensor, source: Tensor, merges: Sequence[Merge], copies: int) -> Tensor:
    """Columns source [B, L'] of hidden [B * copies, L, D], merged rows filled in."""
    rows = source.repeat_interleave(copies, dim=0).to(hidden.device)
    shorter = torch.take_along_dim(hidden, rows.unsqueeze(-1), dim=1)
    if not merges:
        return shorter
    old, new, group = [], [], []
    n_groups = 0
    for merge in merges:
        for row in range(merge.sample * copies, (merge.sample + 1) * copies):
            old.append(torch.stack([torch.full_like(merge.members, row), merge.members]))
            new.append(torch.stack([torch.full_like(merge.columns, row), merge.columns]))
            group.append(merge.group + n_groups)
            n_groups += len(merge.columns)
    members, places = (torch.cat(pair, dim=1).to(hidden.device) for pair in (old, new))
    numbers = torch.cat(group).to(hidden.device)
    means = group_means(hidden[members[0], members[1]], numbers, n_groups)
    # In place: the gathered rows are new, and nothing needs them for a gradient.
    return shorter.index_put_((places[0], places[1]), means.to(hidden.dtype))
