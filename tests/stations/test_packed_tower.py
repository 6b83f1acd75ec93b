"""Station 1 for packed towers: cuts of any kind against a slow reference."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.stations.packed_tower import (
    PackedTowerRun,
    PackedTowerStation,
    packed_tower_parts,
    slices_of,
)
from mmlm_efficient.stations.tower import TowerPass, TowerRows
from tests import tiny_packed as tiny

GRID = torch.tensor(tiny.GRIDS)
SLICES = slices_of(GRID)
LENGTHS = [rows * cols for rows, cols in SLICES]
OFFSETS = [sum(LENGTHS[:place]) for place in range(len(LENGTHS))]
TOTAL = sum(LENGTHS)
both_towers = pytest.mark.parametrize("kind", tiny.TOWERS)
both_attentions = pytest.mark.parametrize("attn", ["sdpa", "eager"])


class Planned(TowerPass):
    """Keeps what it is told: for each layer, original patches left of each slice."""

    def __init__(self, plan: Mapping[int, Sequence[Tensor]]) -> None:
        self.plan = plan
        self.rows: list[TowerRows] = []
        self.begun: list[tuple[int, int]] = []
        self._now: list[Tensor] = []

    def begin(self, n_images: int, n_patches: int) -> None:
        self.begun.append((n_images, n_patches))
        self._now = []

    def wants(self, layer: int) -> bool:
        return True

    def observe(self, rows: TowerRows) -> None:
        self.rows.append(rows)

    def cut(self, layer: int) -> Sequence[Tensor] | None:
        if layer not in self.plan:
            return None
        left = list(self.plan[layer])
        if not self._now:
            keep = left
        else:
            keep = [
                torch.isin(now, after).nonzero().squeeze(1)
                for now, after in zip(self._now, left, strict=True)
            ]
        self._now = left
        return keep


def random_plan(
    layers: Sequence[int], unit: int, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> dict[int, list[Tensor]]:
    """Nested random cuts of whole squares (unit 4) or patches (unit 1); 4n are left of each."""
    generator = torch.Generator().manual_seed(seed)
    left = [torch.arange(length) for length in lengths]
    plan = {}
    for layer in layers:
        left = [_some(patches, unit, generator) for patches in left]
        plan[layer] = left
    return plan


def _some(patches: Tensor, unit: int, generator: torch.Generator) -> Tensor:
    squares = len(patches) // 4
    keep = int(torch.randint(max(1, squares // 2), squares + 1, (1,), generator=generator))
    chosen = torch.randperm(len(patches) // unit, generator=generator)[: keep * 4 // unit]
    return patches.view(-1, unit)[chosen.sort().values].flatten()


def whole(left: Sequence[Tensor]) -> Tensor:
    """Patches of all slices in one count."""
    return torch.cat([part + offset for part, offset in zip(left, OFFSETS, strict=True)])


def pruned(
    model: Any, plan: Mapping[int, Sequence[Tensor]], **kwargs: Any
) -> tuple[PackedTowerRun, Planned, Any]:
    """One forward of all grids with planned cuts."""
    station = PackedTowerStation(packed_tower_parts(model))
    tower_pass = Planned(plan)
    with torch.no_grad(), station.running(tower_pass, SLICES) as run:
        output = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID, **kwargs)
    station.close()
    return run, tower_pass, output


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_slices() -> None:
    assert SLICES == ((10, 6), (4, 8), (4, 8), (6, 6), (2, 2))


@both_towers
@both_attentions
def test_nothing_cut_is_stock_to_the_bit(kind: str, attn: str) -> None:
    model = tiny.tower(kind, attn)
    with torch.no_grad():
        want = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID)
    run, tower_pass, got = pruned(model, {})
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert len(tower_pass.rows) == tiny.DEPTH
    assert tower_pass.begun == [(len(SLICES), max(LENGTHS))]
    assert [len(kept) for kept in run.kept] == LENGTHS
    assert run.layer_counts == [[length] * tiny.DEPTH for length in LENGTHS]
    assert torch.equal(torch.cat(run.select(got.pooler_output)), want.pooler_output)


@both_towers
@both_attentions
def test_keeping_every_patch_by_name(kind: str, attn: str) -> None:
    """A cut that cuts nothing goes through all the gathering and changes no bit."""
    model = tiny.tower(kind, attn)
    with torch.no_grad():
        want = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID)
    everything = [torch.arange(length) for length in LENGTHS]
    _, _, got = pruned(model, {0: everything, 3: everything})
    assert torch.equal(got.pooler_output, want.pooler_output)


@both_towers
@both_attentions
@pytest.mark.parametrize("unit", [4, 1])
@pytest.mark.parametrize("layers", [(1, 3, 5), (0, 2, 4), (0, 1, 2, 3), (5,)])
def test_against_the_slow_reference(
    kind: str, attn: str, unit: int, layers: tuple[int, ...]
) -> None:
    model = tiny.tower(kind, attn)
    plan = random_plan(layers, unit, seed=len(layers))
    slow = tiny.slow_forward(
        model,
        tiny.pixels(tiny.GRIDS),
        tiny.GRIDS,
        {layer: whole(left) for layer, left in plan.items()},
    )
    run, tower_pass, output = pruned(model, plan)
    # What the pass sees: rows of each slice in the processor's order, padded at the end.
    for layer, rows in enumerate(tower_pass.rows):
        assert rows.layer == layer
        assert not rows.has_cls
        assert rows.valid is not None
        counts = rows.valid.sum(1).tolist()
        assert counts == [counts_of[layer] for counts_of in run.layer_counts]
        assert torch.equal(rows.valid, torch.arange(max(counts)) < torch.tensor(counts)[:, None])
        for name in ("query", "key", "value"):
            want = getattr(slow, name)[layer]
            got = getattr(rows, name)[rows.valid]
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3, msg=f"{name} {layer}")
    # What comes out of the forward.
    last = plan[layers[-1]]
    assert [kept.tolist() for kept in run.kept] == [left.tolist() for left in last]
    for place, length in enumerate(LENGTHS):
        for patch in range(length):
            gone = [layer for layer in layers if patch not in plan[layer][place]]
            assert int(run.cut_layer[place, patch]) == (gone[0] if gone else -1)
    if unit == 4:
        squares = [left.view(-1, 4)[:, 0] // 4 for left in last]
        assert [tokens.tolist() for tokens in run.tokens] == [s.tolist() for s in squares]
    merged = output.pooler_output
    assert merged.shape == (TOTAL // 4, 16)
    chosen = torch.cat(run.select(merged))
    if unit == 4 or kind == "qwen2_vl":
        torch.testing.assert_close(chosen, slow.merged, atol=2e-4, rtol=1e-3)
    assert len(chosen) == sum(len(left) // 4 for left in last)
    assert int((merged.abs().sum(1) > 0).sum()) == len(chosen)


def test_the_slow_reference_is_the_stock_tower() -> None:
    for kind in tiny.TOWERS:
        model = tiny.tower(kind)
        with torch.no_grad():
            want = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID).pooler_output
        slow = tiny.slow_forward(model, tiny.pixels(tiny.GRIDS), tiny.GRIDS, {})
        torch.testing.assert_close(slow.merged, want, atol=1e-4, rtol=1e-3)


@both_towers
def test_a_cut_after_the_last_block_selects_stock_tokens(kind: str) -> None:
    model = tiny.tower(kind)
    with torch.no_grad():
        stock = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID).pooler_output
    run, _, output = pruned(model, random_plan([tiny.DEPTH - 1], 4))
    kept = torch.zeros(TOTAL // 4, dtype=torch.bool)
    for tokens, offset in zip(run.tokens, OFFSETS, strict=True):
        kept[tokens + offset // 4] = True
    torch.testing.assert_close(output.pooler_output[kept], stock[kept], atol=1e-5, rtol=1e-5)
    assert bool((output.pooler_output[~kept] == 0).all())
    assert 0 < int(kept.sum()) < len(kept)


@both_towers
@pytest.mark.parametrize("unit", [4, 1])
def test_an_image_does_not_depend_on_its_batch(kind: str, unit: int) -> None:
    model = tiny.tower(kind)
    plan = random_plan((0, 2, 3), unit, seed=3)
    run, _, output = pruned(model, plan)
    together = run.select(output.pooler_output)
    station = PackedTowerStation(packed_tower_parts(model))
    for place, (rows, cols) in enumerate(SLICES):
        start = OFFSETS[place]
        own = tiny.pixels(tiny.GRIDS)[start : start + LENGTHS[place]]
        only = Planned({layer: [left[place]] for layer, left in plan.items()})
        with torch.no_grad(), station.running(only, [(rows, cols)]) as alone:
            features = model(own, grid_thw=torch.tensor([[1, rows, cols]])).pooler_output
        assert alone.tokens[0].tolist() == run.tokens[place].tolist()
        assert alone.layer_counts[0] == run.layer_counts[place]
        assert all(seen.valid is None for seen in only.rows)
        torch.testing.assert_close(alone.select(features)[0], together[place], atol=1e-4, rtol=1e-3)
    station.close()


@both_towers
def test_what_the_blocks_are_given(kind: str) -> None:
    """Bounds without empty groups that end at the sequence's length; the longest group."""
    model = tiny.tower(kind)
    # One window of the first slice disappears: its squares (0, 0), (0, 1), (1, 0), (1, 1).
    plan = {0: [torch.arange(length) for length in LENGTHS]}
    gone = torch.tensor([square * 4 + patch for square in (0, 1, 3, 4) for patch in range(4)])
    plan[0][0] = plan[0][0][~torch.isin(plan[0][0], gone)]
    seen: list[tuple[Tensor, int, Tensor, int]] = []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(
            (
                kwargs["cu_seqlens"],
                kwargs["max_seqlen"],
                kwargs["position_embeddings"][0],
                len(hidden),
            )
        )

    handles = [
        block.attn.register_forward_pre_hook(watch, with_kwargs=True) for block in model.blocks
    ]
    # As for flash attention, whose longest groups the tower is told.
    longest = {"max_seqlen": 60}
    if kind == "qwen2_5_vl":
        longest["max_window_seqlen"] = 16
    pruned(model, plan, **longest)
    for handle in handles:
        handle.remove()
    windows_before = len(seen[0][0]) - 1
    for layer, (bounds, most, cos, length) in enumerate(seen):
        assert bounds.dtype == torch.int32
        assert int(bounds[-1]) == length == len(cos) == (TOTAL if layer == 0 else TOTAL - 16)
        assert bool((bounds.diff() > 0).all())
        assert most == int(bounds.diff().max())
        windowed = kind == "qwen2_5_vl" and layer not in tiny.FULL
        if layer > 0:
            assert len(bounds) - 1 == (windows_before - 1 if windowed else len(SLICES))


def test_max_seqlen_stays_none_without_flash_attention() -> None:
    model = tiny.tower("qwen2_vl")
    seen: list[object] = []
    handle = model.blocks[3].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["max_seqlen"]), with_kwargs=True
    )
    pruned(model, random_plan([1], 4))
    handle.remove()
    assert seen == [None]


@both_towers
def test_the_recorded_hidden_states_are_the_cut_ones(kind: str) -> None:
    model = tiny.tower(kind)
    plan = random_plan([1, 3], 4)
    with torch.no_grad():
        # transformers installs its recorders lazily: here before our hooks.
        model(tiny.pixels(tiny.GRIDS), grid_thw=GRID, output_hidden_states=True)
    run, _, output = pruned(model, plan, output_hidden_states=True)
    counts = [sum(slice_counts[layer] for slice_counts in run.layer_counts) for layer in range(6)]
    assert [len(state) for state in output.hidden_states[:6]] == counts


@both_towers
def test_gradients_and_checkpointing(kind: str) -> None:
    """Gradients reach the pixels of what is left, the same ones with checkpointing."""
    plan = random_plan([1, 3], 4)
    grads = []
    for reentrant in (None, False, True):
        model = tiny.tower(kind).train()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        station = PackedTowerStation(packed_tower_parts(model))
        patches = tiny.pixels(tiny.GRIDS).requires_grad_()
        tower_pass = Planned(plan)
        with station.running(tower_pass, SLICES) as run:
            merged = model(patches, grid_thw=GRID).pooler_output
            torch.cat(run.select(merged)).square().sum().backward()
        assert len(tower_pass.rows) == tiny.DEPTH
        assert patches.grad is not None
        grads.append(patches.grad)
        station.close()
    assert int((grads[0].abs().sum(1) > 0).sum()) > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-5)


@both_towers
def test_closing_leaves_the_stock_tower(kind: str) -> None:
    model = tiny.tower(kind)
    patches = tiny.pixels(tiny.GRIDS)
    with torch.no_grad():
        want = model(patches, grid_thw=GRID).pooler_output
    before, keys = hook_count(model), list(model.state_dict())
    station = PackedTowerStation(packed_tower_parts(model))
    assert hook_count(model) > before
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(patches, grid_thw=GRID).pooler_output, want)
        with station.running(Planned(random_plan([1], 4)), SLICES):
            cut = model(patches, grid_thw=GRID).pooler_output
        assert not torch.equal(cut, want)
        assert torch.equal(model(patches, grid_thw=GRID).pooler_output, want)
    station.close()
    assert hook_count(model) == before
    with pytest.raises(UnsupportedError, match="closed"), station.running(Planned({}), SLICES):
        pass


@both_towers
def test_two_forwards_of_one_run_start_anew(kind: str) -> None:
    model = tiny.tower(kind)
    station = PackedTowerStation(packed_tower_parts(model))
    tower_pass = Planned(random_plan([0, 2], 4))
    with torch.no_grad(), station.running(tower_pass, SLICES) as run:
        first = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID).pooler_output
        second = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID).pooler_output
    assert torch.equal(first, second)
    assert [len(counts) for counts in run.layer_counts] == [tiny.DEPTH] * len(SLICES)
    station.close()


@both_towers
def test_threads_share_a_tower(kind: str) -> None:
    model = tiny.tower(kind)
    station = PackedTowerStation(packed_tower_parts(model))
    plans: list[dict[int, list[Tensor]]] = [
        random_plan([0, 2, 4], 4, seed=1),
        random_plan([1, 5], 4, seed=2),
        {},
    ]
    failures: list[int] = []

    @torch.no_grad()
    def forward(plan: Mapping[int, Sequence[Tensor]]) -> Tensor:
        with station.running(Planned(plan), SLICES):
            merged: Tensor = model(tiny.pixels(tiny.GRIDS), grid_thw=GRID).pooler_output
        return merged

    want = [forward(plan) for plan in plans]
    barrier = threading.Barrier(len(plans))

    def worker(place: int) -> None:
        barrier.wait()
        for _ in range(10):
            if not torch.equal(forward(plans[place]), want[place]):
                failures.append(place)

    threads = [threading.Thread(target=worker, args=(place,)) for place in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    station.close()
    assert not failures
    assert not torch.equal(want[0], want[1])


def test_half_precision_rows_keep_their_dtype() -> None:
    model = tiny.tower("qwen2_5_vl").to(torch.bfloat16)
    station = PackedTowerStation(packed_tower_parts(model))
    tower_pass = Planned(random_plan([1], 4))
    with torch.no_grad(), station.running(tower_pass, SLICES) as run:
        merged = model(tiny.pixels(tiny.GRIDS).bfloat16(), grid_thw=GRID).pooler_output
    station.close()
    assert {rows.query.dtype for rows in tower_pass.rows} == {torch.bfloat16}
    assert merged.dtype == torch.bfloat16
    assert bool(torch.isfinite(torch.cat(run.select(merged))).all())


@both_towers
def test_bad_input(kind: str) -> None:
    model = tiny.tower(kind)
    station = PackedTowerStation(packed_tower_parts(model))
    with (
        pytest.raises(SettingsError, match="5 x 6 patches cannot be merged"),
        station.running(Planned({}), [(5, 6)]),
    ):
        pass
    with (
        torch.no_grad(),
        pytest.raises(SettingsError, match=r"164 patches, but the slices given are \[16\]"),
        station.running(Planned({}), [(4, 4)]),
    ):
        model(tiny.pixels(tiny.GRIDS), grid_thw=GRID)
    odd = {5: [torch.arange(length) for length in LENGTHS]}
    odd[5][3] = odd[5][3][:-1]
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="35 patches are left of slice 3"),
        station.running(Planned(odd), SLICES),
    ):
        model(tiny.pixels(tiny.GRIDS), grid_thw=GRID)
    station.close()
