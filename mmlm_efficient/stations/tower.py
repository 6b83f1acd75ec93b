"""Station 1: the vision tower. Patches are scored and cut between encoder layers.

A method hands in a :class:`TowerPass`; the station feeds it the query, key and value projections
of the layers it wants and cuts the rows it drops. The images of a batch may keep different counts:
shorter images are padded at the end and their padding is masked as attention keys, so an image's
result does not depend on its batch mates. No attention map is ever built or requested.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from mmlm_efficient.families.base import TowerParts
from mmlm_efficient.stations.active import activate
from mmlm_efficient.stations.handed import check_tower
from mmlm_efficient.stations.hooks import Arguments, LayerHooks, check_seen


@dataclass(frozen=True)
class TowerRows:
    """Projections of one layer's self-attention, as the layer itself computed them.

    Attributes:
        layer: 0-based tower layer.
        query: [B, L, C] before the head split and before scaling; CLS first if there is one.
        key: [B, L, C].
        value: [B, L, C].
        heads: attention heads.
        has_cls: row 0 is the CLS token.
        valid: bool [B, L], False on padding rows; None when no image is padded.
        lengths: rows of each image that are no padding, as `valid` says, known without asking
            the device; None when no image is padded.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    has_cls: bool
    valid: Tensor | None
    lengths: tuple[int, ...] | None = None


class TowerPass(ABC):
    """What a method does during one forward of the tower.

    Attributes:
        scores: float32 [B, N], last score of every patch, for the report; or None.
        entropy_ratios: for each image, FlowCut's ratio at each adaptive cut, for the report.
    """

    scores: Tensor | None = None
    entropy_ratios: Sequence[Sequence[float]] = ()

    @abstractmethod
    def begin(self, n_images: int, n_patches: int) -> None:
        """A forward starts with n_images images of n_patches patches each."""

    @abstractmethod
    def wants(self, layer: int) -> bool:
        """Whether :meth:`observe` needs the projections of this layer."""

    @abstractmethod
    def observe(self, rows: TowerRows) -> None:
        """The layer's attention has run."""

    @abstractmethod
    def cut(self, layer: int) -> Sequence[Tensor] | None:
        """The layer has run: which of its patches go on.

        Returns:
            One ascending int64 tensor of positions among the current patches (CLS not counted)
            per image, or None to keep all.
        """


class TowerRun:
    """State and outcome of one forward of the tower.

    Attributes:
        kept: int64 [K_i] per image, original indices of the patches that are left, ascending.
        cut_layer: int64 [B, N], layer after which a patch was cut, -1 = kept.
        layer_counts: for each image, the patches entering each layer.
        n_left: layers that have run.
        seconds: host seconds spent in scoring and cutting.
    """

    def __init__(self, tower_pass: TowerPass, has_cls: bool) -> None:
        self.tower_pass = tower_pass
        self.kept: list[Tensor] = []
        self.cut_layer = torch.empty(0, 0, dtype=torch.long)
        self.layer_counts: list[list[int]] = []
        self.n_left = 0
        self.seconds = 0.0
        self._lead = int(has_cls)
        self._valid: Tensor | None = None
        self._lengths: tuple[int, ...] | None = None
        self._mask: Tensor | None = None
        self._projections: dict[int, Tensor] = {}

    def begin(self, hidden: Tensor) -> None:
        """Start a forward; hidden is the input [B, L, C] of layer 0."""
        n_images, n_patches = hidden.shape[0], hidden.shape[1] - self._lead
        everything = torch.arange(n_patches, device=hidden.device)
        self.kept = [everything] * n_images
        self.cut_layer = torch.full((n_images, n_patches), -1, device=hidden.device)
        self.layer_counts = [[] for _ in range(n_images)]
        self.n_left = 0
        self.seconds = 0.0
        self._valid = self._lengths = self._mask = None
        self._projections.clear()
        self.tower_pass.begin(n_images, n_patches)

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: TowerParts
    ) -> Arguments | None:
        """Count the patches entering a layer; its arguments with the mask to inject, if any."""
        if layer == 0:
            self.begin(args[0])
        for counts, kept in zip(self.layer_counts, self.kept, strict=True):
            counts.append(int(kept.shape[0]))
        if self._mask is None:
            return None
        if len(args) > 1:
            return (args[0], self._mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": self._mask}

    def wants(self, layer: int) -> bool:
        """Whether the pass needs the projections of this layer."""
        return self.tower_pass.wants(layer)

    def capture(self, part: int, output: Tensor) -> None:
        """Remember a projection until the layer's attention is done."""
        self._projections[part] = output

    def observe(self, layer: int, parts: TowerParts) -> None:
        """Score a layer and let go of its projections."""
        if len(self._projections) < 3:
            return
        start = time.perf_counter()
        query, key, value = (self._projections[part] for part in range(3))
        self._projections.clear()
        heads, has_cls = parts.heads, parts.has_cls
        self.tower_pass.observe(
            TowerRows(layer, query, key, value, heads, has_cls, self._valid, self._lengths)
        )
        self.seconds += time.perf_counter() - start

    def leave(self, layer: int, hidden: Tensor, parts: TowerParts) -> Tensor | None:
        """Cut a layer's output [B, L, C] to [B, L', C], or None when every patch goes on."""
        self.n_left += 1
        start = time.perf_counter()
        keep = self.tower_pass.cut(layer)
        if keep is None:
            self.seconds += time.perf_counter() - start
            return None
        for image, positions in enumerate(keep):
            before = self.kept[image]
            self.kept[image] = before[positions]
            self.cut_layer[image, before] = layer
            self.cut_layer[image, self.kept[image]] = -1
        rows, self._valid = _padded_rows(keep, self._lead, hidden.device)
        shorter = torch.take_along_dim(hidden, rows.unsqueeze(-1), dim=1)
        self._mask = self._lengths = None
        if self._valid is not None:
            self._lengths = tuple(self._lead + len(positions) for positions in keep)
            self._mask = _key_mask(shorter, self._valid, parts.config)
        self.seconds += time.perf_counter() - start
        return shorter

    def selected(self, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What the tower's output holds of each image.

        Args:
            rows: for each image its rows of the tower's output, padding behind them.

        Returns:
            For each image int64 [K], indices of the tokens that are left, ascending, and their
            features [K, C], CLS first if there is one.
        """
        return [
            (kept, own[: self._lead + len(kept)]) for own, kept in zip(rows, self.kept, strict=True)
        ]


def _padded_rows(
    keep: Sequence[Tensor], lead: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Rows [B, L] to gather for the kept patches, and bool [B, L] what of it is no padding.

    Args:
        keep: ascending positions among the patches, per image.
        lead: leading tokens (CLS) that always stay.
        device: where the hidden states are.
    """
    lengths = [int(positions.shape[0]) for positions in keep]
    longest = max(lengths)
    rows = torch.zeros(len(keep), lead + longest, dtype=torch.long, device=device)
    for image, positions in enumerate(keep):
        rows[image, lead : lead + lengths[image]] = positions + lead
    if min(lengths) == longest:
        return rows, None
    columns = torch.arange(lead + longest, device=device)
    valid = columns < torch.tensor(lengths, device=device).unsqueeze(1) + lead
    return rows, valid


def _key_mask(hidden: Tensor, valid: Tensor, config: Any) -> Tensor | None:
    """The mask, in the form of the tower's attention implementation, that hides padded keys."""
    mask = create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        # All queries see the same keys: one broadcast row instead of an L x L mask.
        return mask[:, :, :1]
    return cast("Tensor | None", mask)


class TowerStation(LayerHooks[TowerParts]):
    """Hooks of one vision tower, registered once and idle until a pass is running.

    Args:
        parts: the tower, from its family.

    Example::

        with station.running(tower_pass) as run:
            features = family.run_tower(inputs, visuals)
        run.kept  # per image
    """

    def __init__(self, parts: TowerParts) -> None:
        check_tower(parts.layers, ("hidden_states", "attention_mask"))
        super().__init__(parts)

    @contextmanager
    def running(
        self, tower_pass: TowerPass, slices: Sequence[tuple[int, int]] = ()
    ) -> Iterator[TowerRun]:
        """Run a pass in the forwards of this thread inside the ``with`` block.

        Args:
            tower_pass: the method's.
            slices: only of interest to packed towers, whose station takes the same arguments.

        Raises:
            UnsupportedError: the station is closed, or the tower ran without its hooks.
        """
        self.check_open()
        run = TowerRun(tower_pass, self._parts.has_cls)
        with activate(self.key, run):
            yield run
        check_seen(run.n_left == len(self._parts.layers), "the vision tower")
