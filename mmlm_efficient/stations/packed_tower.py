"""Station 1 for packed towers (Qwen2-VL, Qwen2.5-VL): patches are cut between the blocks.

Such a tower sees all images of a call as one sequence [S, C]: patches of an image (of each
temporal step of a video) are one *slice*, four consecutive patches are the 2x2 square that the
merger at the end makes one visual token of. Attention stays inside a slice, or inside windows of
it, by the bounds that every block gets; rotary tables are arguments of every block too. A cut
shortens the sequence, the tables and the bounds; no padding is needed, and a slice's result does
not depend on the others.

The merger's output goes back to full length, zeros at the dropped places, because what follows in
the models counts on it: Qwen2.5-VL undoes its order of windows, and features are split by image.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.vision_utils import get_vision_window_index

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families.packed import PackedTowerParts, packed_tower_parts
from mmlm_efficient.stations.active import activate
from mmlm_efficient.stations.handed import check_tower
from mmlm_efficient.stations.hooks import Arguments, LayerHooks, StationHook, check_seen
from mmlm_efficient.stations.tower import TowerPass, TowerRows, TowerRun

__all__ = [
    "PackedTowerParts",
    "PackedTowerRun",
    "PackedTowerStation",
    "packed_tower_parts",
    "slices_of",
]


def slices_of(grid_thw: Tensor) -> tuple[tuple[int, int], ...]:
    """The slices of a call: (rows, cols) of patches of every image and temporal step.

    Args:
        grid_thw: int64 [n, 3], temporal steps, rows and columns of patches of each image or video.

    Example:
        >>> slices_of(torch.tensor([[1, 4, 6], [2, 2, 2]]))
        ((4, 6), (2, 2), (2, 2))
    """
    return tuple((rows, cols) for steps, rows, cols in grid_thw.tolist() for _ in range(steps))


@dataclass(frozen=True)
class _Order:
    """Where the patches of all slices stand in the tower's sequence.

    Attributes:
        lengths: patches of each slice.
        row: int64 [S], row of each patch; patches count through the slices as the processor
            gives them. None when that is the order of the sequence.
        patch: int64 [S], patch in each row; None as above.
        window: int64 [S], attention window of each row; None without windows.
    """

    lengths: tuple[int, ...]
    row: Tensor | None = None
    patch: Tensor | None = None
    window: Tensor | None = None

    @classmethod
    def of(cls, slices: Sequence[tuple[int, int]], parts: PackedTowerParts) -> _Order:
        """The order of a call's slices.

        Raises:
            SettingsError: a slice does not consist of whole squares of the merger.
        """
        side = int(parts.config.spatial_merge_size)
        for rows, cols in slices:
            if rows < 1 or cols < 1 or rows % side or cols % side:
                raise SettingsError(
                    f"a slice of {rows} x {cols} patches cannot be merged: rows and columns must "
                    f"be multiples of {side}. Give (rows, cols) of grid_thw for every image and "
                    "temporal step."
                )
        lengths = tuple(rows * cols for rows, cols in slices)
        if parts.full_attention is None:
            return cls(lengths)
        # Windows never reach beyond a temporal step, so that every slice counts as an image.
        squares, bounds = get_vision_window_index(
            torch.tensor([(1, rows, cols) for rows, cols in slices]),
            spatial_merge_size=side,
            window_size=parts.config.window_size,
            patch_size=parts.config.patch_size,
        )
        unit = parts.merge_unit
        patch = (squares.unsqueeze(1) * unit + torch.arange(unit)).flatten()
        sizes = bounds.diff()
        window = torch.arange(len(sizes)).repeat_interleave(sizes)
        return cls(lengths, torch.argsort(patch), patch, window)

    def to(self, device: torch.device) -> _Order:
        """The same on a device."""
        row, patch, window = (
            None if part is None else part.to(device)
            for part in (self.row, self.patch, self.window)
        )
        return _Order(self.lengths, row, patch, window)


@dataclass(frozen=True)
class _Bounds:
    """Which rows attend to each other.

    Attributes:
        cu_seqlens: int32 [n + 1], cumulative lengths of the n groups of rows.
        longest: the largest length.
    """

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> _Bounds:
        """Bounds of groups of consecutive rows; empty groups are left out.

        Example:
            >>> _Bounds.of([3, 0, 2], torch.device("cpu")).cu_seqlens.tolist()
            [0, 3, 5]
        """
        filled = [0, *(length for length in lengths if length > 0)]
        total = torch.tensor(filled, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(total.to(device), max(filled))


class PackedTowerRun(TowerRun):
    """State and outcome of one forward of a packed tower; an "image" of the pass is one slice.

    Patches are numbered in each slice in the order of the processor, four by four in the squares
    of the merger, squares in raster order; whatever order the tower works in.

    Attributes:
        kept: int64 [K_i] per slice, original indices of the patches that are left, ascending.
        cut_layer: int64 [B, N], layer after which a patch was cut, -1 = kept (and behind the end
            of a slice shorter than the longest, which has N).
        layer_counts: for each slice, the patches entering each layer.
        seconds: host seconds spent in scoring and cutting.
        tokens: int64 [M_i] per slice, ascending indices of the visual tokens of the slice (4
            patches each, raster order) that the merger's output has; all others are zeros. Where
            squares were cut in part, a merged token stands at the square of its first patch.
    """

    def __init__(
        self,
        tower_pass: TowerPass,
        slices: Sequence[tuple[int, int]],
        parts: PackedTowerParts,
    ) -> None:
        super().__init__(tower_pass, has_cls=False)
        self.tokens: list[Tensor] = []
        self._unit = parts.merge_unit
        self._order = _Order.of(slices, parts)
        self._offsets = [0]
        for length in self._order.lengths:
            self._offsets.append(self._offsets[-1] + length)
        self._layer = -1
        # Rows of the uncut sequence that are left, ascending; None before the first cut.
        self._rows: Tensor | None = None
        self._rotary: tuple[Tensor, ...] = ()
        self._slices: _Bounds | None = None
        self._windows: _Bounds | None = None
        self._gather: Tensor | None = None
        self._arranged = False

    def begin(self, hidden: Tensor) -> None:
        """Start a forward; hidden is the input [S, C] of block 0.

        Raises:
            SettingsError: the slices are not those of the sequence.
        """
        lengths, total, device = self._order.lengths, self._offsets[-1], hidden.device
        if hidden.shape[0] != total:
            raise SettingsError(
                f"the tower runs {hidden.shape[0]} patches, but the slices given are "
                f"{list(lengths)}, {total} in all: give the slices of the same grid_thw"
            )
        self._order = self._order.to(device)
        self.kept = [torch.arange(length, device=device) for length in lengths]
        self.tokens = [kept[: len(kept) // self._unit] for kept in self.kept]
        self.cut_layer = torch.full((len(lengths), max(lengths)), -1, device=device)
        self.layer_counts = [[] for _ in lengths]
        self.n_left = 0
        self.seconds = 0.0
        self._projections.clear()
        self._rows = self._slices = self._windows = None
        self._arranged = False
        self.tower_pass.begin(len(lengths), max(lengths))

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any
    ) -> Arguments | None:
        """Count the patches entering a block; its arguments after a cut."""
        kwargs = {
            **dict(zip(("cu_seqlens", "position_embeddings"), args[1:], strict=False)),
            **kwargs,
        }
        if layer == 0:
            self.begin(args[0])
            self._rotary = kwargs["position_embeddings"]
        self._layer = layer
        for counts, kept in zip(self.layer_counts, self.kept, strict=True):
            counts.append(int(kept.shape[0]))
        full = parts.full_attention is None or layer in parts.full_attention
        bounds = self._slices if full else self._windows
        if bounds is None:
            return None
        kwargs["position_embeddings"] = self._rotary
        kwargs["cu_seqlens"] = bounds.cu_seqlens
        # Given only to flash attention, which sizes its work by it.
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = bounds.longest
        return args[:1], kwargs

    def wants(self, layer: int) -> bool:
        """Whether the pass needs the projections of this layer, which runs now.

        A layer that gradient checkpointing runs again was not entered: it is not scored again.
        """
        return layer == self._layer and super().wants(layer)

    def observe(self, layer: int, parts: Any) -> None:
        """Score a layer and let go of its projection."""
        fused = self._projections.pop(0, None)
        if fused is None:
            return
        start = time.perf_counter()
        query, key, value = fused.view(len(fused), 3, parts.heads, -1).unbind(1)
        cos, sin = (table.unsqueeze(-2).float() for table in self._rotary)
        query, key = (_rotated(part, cos, sin) for part in (query, key))
        if not self._arranged:
            self._arrange(fused.device)
        query, key, value = (self._per_slice(part.flatten(1)) for part in (query, key, value))
        self.tower_pass.observe(
            TowerRows(layer, query, key, value, parts.heads, False, self._valid, self._lengths)
        )
        self.seconds += time.perf_counter() - start

    def leave(self, layer: int, hidden: Tensor, parts: Any) -> Tensor | None:
        """Cut a block's output [S, C] to [S', C], or None when every patch goes on."""
        self._layer = -1
        self.n_left += 1
        start = time.perf_counter()
        keep = self.tower_pass.cut(layer)
        if keep is None:
            self.seconds += time.perf_counter() - start
            return None
        for place, positions in enumerate(keep):
            before = self.kept[place]
            self.kept[place] = before[positions]
            self.cut_layer[place, before] = layer
            self.cut_layer[place, self.kept[place]] = -1
        rows = self._rows_of_kept().sort().values
        now = rows if self._rows is None else torch.searchsorted(self._rows, rows)
        self._rows = rows
        self._rotary = tuple(table[now.to(table.device)] for table in self._rotary)
        self._bound(hidden.device)
        self._arranged = False
        self.seconds += time.perf_counter() - start
        return hidden[now.to(hidden.device)]

    def check_merge(self) -> None:
        """Refuse to merge patches of different slices into one token.

        Raises:
            UnsupportedError: the patches left of a slice are no multiple of the merge unit.
        """
        for place, kept in enumerate(self.kept):
            if len(kept) % self._unit:
                raise UnsupportedError(
                    f"{len(kept)} patches are left of slice {place}, but this tower merges "
                    f"{self._unit} patches into one token: keep a multiple of {self._unit} of "
                    "each slice"
                )

    def merge(self, merged: Tensor) -> Tensor | None:
        """The merger's output [M', D] at full length [M, D]; None when nothing was cut."""
        rows, unit = self._rows, self._unit
        if rows is None:
            return None
        counts = [len(kept) for kept in self.kept]
        first = rows[::unit]
        patch = first if self._order.patch is None else self._order.patch[first]
        tokens = torch.split(patch // unit, [count // unit for count in counts])
        self.tokens = [
            (token - offset // unit).sort().values
            for token, offset in zip(tokens, self._offsets[:-1], strict=True)
        ]
        full = merged.new_zeros(self._offsets[-1] // unit, merged.shape[-1])
        return full.index_copy(0, (first // unit).to(merged.device), merged)

    def selected(self, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each slice its `tokens` and their features [M_i, D].

        Args:
            rows: for each slice its rows of the tower's output, which is at full length.
        """
        return [
            (token, own[token.to(own.device)]) for own, token in zip(rows, self.tokens, strict=True)
        ]

    def select(self, merged: Tensor) -> list[Tensor]:
        """For each slice the rows [M_i, D] of its tokens, out of the tower's output [M, D]."""
        parts = torch.split(merged, [length // self._unit for length in self._order.lengths])
        return [features for _, features in self.selected(parts)]

    # -- parts -----------------------------------------------------------------------------

    def _rows_of_kept(self) -> Tensor:
        """Rows of the uncut sequence of all kept patches, in the order of the patches."""
        patches = torch.cat(
            [kept + offset for kept, offset in zip(self.kept, self._offsets[:-1], strict=True)]
        )
        return patches if self._order.row is None else self._order.row[patches]

    def _bound(self, device: torch.device) -> None:
        """Bounds of the slices and windows after a cut."""
        self._slices = _Bounds.of([len(kept) for kept in self.kept], device)
        if self._order.window is not None and self._rows is not None:
            window = self._order.window[self._rows]
            _, counts = torch.unique_consecutive(window, return_counts=True)
            self._windows = _Bounds.of(counts.tolist(), device)

    def _arrange(self, device: torch.device) -> None:
        """Where the rows of each slice's patches are now, padded to the longest slice."""
        self._arranged = True
        lengths = [len(kept) for kept in self.kept]
        longest = max(lengths)
        ragged = min(lengths) < longest
        self._valid = self._lengths = self._gather = None
        if ragged:
            self._lengths = tuple(lengths)
            columns = torch.arange(longest, device=device)
            self._valid = columns < torch.tensor(lengths, device=device).unsqueeze(1)
        if ragged or self._order.row is not None:
            rows = self._rows_of_kept()
            now = rows if self._rows is None else torch.searchsorted(self._rows, rows)
            self._gather = pad_sequence(list(torch.split(now, lengths)), batch_first=True)

    def _per_slice(self, packed: Tensor) -> Tensor:
        """Rows [S, C] as [B, L, C], in the order of the patches."""
        if self._gather is None:
            return packed.view(len(self.kept), -1, packed.shape[-1])
        return packed[self._gather.to(packed.device)]


def _rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [S, h, d] turned by tables [S, 1, d], in float32 as the towers do it."""
    wide = rows.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(rows.dtype)


class PackedTowerStation(LayerHooks[Any]):
    """Hooks of one packed vision tower, registered once and idle until a pass is running.

    Args:
        parts: the tower, from its family.

    Example::

        with station.running(tower_pass, slices_of(image_grid_thw)) as run:
            merged = tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        features = run.select(merged)  # one tensor per slice, at run.tokens
    """

    def __init__(self, parts: PackedTowerParts) -> None:
        check_tower(parts.layers, ("hidden_states", "cu_seqlens", "position_embeddings"))
        super().__init__(parts)
        check, merge = StationHook(self.key, _check_merge), StationHook(self.key, _merge)
        self._handles.append(parts.merger.register_forward_pre_hook(check))
        # First among the merger's hooks, as on the blocks.
        self._handles.append(parts.merger.register_forward_hook(merge, prepend=True))

    @contextmanager
    def running(
        self, tower_pass: TowerPass, slices: Sequence[tuple[int, int]] = ()
    ) -> Iterator[PackedTowerRun]:
        """Run a pass in the forwards of this thread inside the ``with`` block.

        Args:
            tower_pass: the method's.
            slices: (rows, cols) of patches of every image and temporal step of the call, see
                :func:`slices_of`.

        Raises:
            UnsupportedError: the station is closed, or the tower ran without its hooks.
            SettingsError: a slice that cannot be merged, or in the tower other slices.
        """
        self.check_open()
        run = PackedTowerRun(tower_pass, slices, self._parts)
        with activate(self.key, run):
            yield run
        check_seen(run.n_left == len(self._parts.layers), "the vision tower")


def _check_merge(work: Any, *_: Any) -> None:
    if isinstance(work, PackedTowerRun):
        work.check_merge()


def _merge(work: Any, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    return work.merge(output) if isinstance(work, PackedTowerRun) else None
