"""What the tower's last layer says about its tokens, for methods that choose behind the tower.

One pass over the unpruned tower serves all of them: the attention that the relay token (CLS)
pays, or, without one, that each token receives; the head-mean keys; and the head-mean attention
map of that single layer where a method asks for it. Nothing but this layer is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmlm_efficient.pruning.attention_scores import mean_received, token_map
from mmlm_efficient.pruning.flowcut_scores import relay_weights
from mmlm_efficient.stations.tower import TowerPass, TowerRows

Sight = Literal["relay", "keys", "map"]


@dataclass(frozen=True)
class Observed:
    """One tower run at the observed layer, L tokens (CLS not among them), float32.

    Attributes:
        relay: [L], head-mean attention of the CLS token to each token (its share of the softmax
            over all tokens), or the mean attention a token receives in a tower without CLS.
        keys: [L, d], head-mean keys.
        map: [L, L], head-mean attention among the tokens, rows sum to 1; None if not asked for.
    """

    relay: Tensor | None
    keys: Tensor | None
    map: Tensor | None


@dataclass(frozen=True)
class Crop:
    """The tokens of one tower run, before they are packed into their image's sequence.

    Attributes:
        features: [K, C], in front of the projector (or packed and behind it, see
            `Family.packs_pruned`).
        index: int64 [K], positions among the run's tokens, CLS_INDEX for CLS.
        observed: of all tokens of the run, or None.
        cls: [C], the CLS token, which most models drop; None if the tower has none.
        members: positions that were merged into each token, or None when nothing was.
    """

    features: Tensor
    index: Tensor
    observed: Observed | None = None
    cls: Tensor | None = None
    members: tuple[tuple[int, ...], ...] | None = None

    def __len__(self) -> int:
        return int(self.index.shape[0])


class ObservePass(TowerPass):
    """Watches one layer of an unpruned tower.

    Args:
        layer: 0-based tower layer.
        sights: what to compute.
        unit: consecutive patches that the tower merges to one token; theirs are averaged.

    Attributes:
        seen: one entry per tower run after the forward.
    """

    def __init__(self, layer: int, sights: frozenset[Sight], unit: int = 1) -> None:
        self.layer = layer
        self.sights = sights
        self.unit = unit
        self.seen: list[Observed] = []

    def begin(self, n_images: int, n_patches: int) -> None:
        """Forget an earlier forward."""
        self.seen = []

    def wants(self, layer: int) -> bool:
        """The one layer."""
        return layer == self.layer

    def observe(self, rows: TowerRows) -> None:
        """Compute what was asked for, for every tower run of the batch."""
        shape = (*rows.query.shape[:2], rows.heads, -1)
        query, key = rows.query.view(shape), rows.key.view(shape)
        if rows.lengths is None:
            self._look(query, key, int(rows.has_cls))
            return
        # Runs of different lengths one by one: padded maps would be of the longest one squared.
        for run, length in enumerate(rows.lengths):
            own = (slice(run, run + 1), slice(length))
            self._look(query[own], key[own], int(rows.has_cls))

    def _look(self, query: Tensor, key: Tensor, lead: int) -> None:
        """Tower runs of one length, queries and keys [B, L, h, d], CLS first if lead is 1."""
        scale = key.shape[-1] ** -0.5
        relay = keys = maps = None
        if "relay" in self.sights and lead:
            relay = self._merged(relay_weights(query[:, 0], key, scale, None)[:, 1:])
        elif "relay" in self.sights:
            relay = self._merged(mean_received(query, key, scale, None))
        if "keys" in self.sights:
            keys = self._merged(key[:, lead:].float().mean(dim=2))
        if "map" in self.sights:
            maps = token_map(query, key, scale, lead=lead, unit=self.unit)
        for run in range(len(query)):
            self.seen.append(
                Observed(*(None if part is None else part[run] for part in (relay, keys, maps)))
            )

    def cut(self, layer: int) -> Sequence[Tensor] | None:
        """Nothing."""
        return None

    def _merged(self, values: Tensor) -> Tensor:
        """Means over the patches of each token, of values [B, L, ..]."""
        if self.unit == 1:
            return values
        return values.reshape(len(values), -1, self.unit, *values.shape[2:]).mean(dim=2)
