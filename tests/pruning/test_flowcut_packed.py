"""FlowCut in packed towers: the official code's arrays, and invariants of cutting squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.pruning.base import TowerJob
from mmlm_efficient.pruning.flowcut_packed import (
    MergeAlignment,
    PackedFlowCutPass,
    offset_entropy_ratio,
)
from mmlm_efficient.pruning.flowcut_scores import entropy_ratio
from mmlm_efficient.pruning.flowcut_tower import LayerTerms
from mmlm_efficient.stations.packed_tower import (
    PackedTowerRun,
    PackedTowerStation,
    packed_tower_parts,
    slices_of,
)
from mmlm_efficient.stations.tower import TowerRows
from tests import tiny_packed as tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "flowcut" / "qwen2vl_vit_seed0.npz"
Grid = tuple[int, int, int]
both_towers = pytest.mark.parametrize("kind", tiny.TOWERS)
both_attentions = pytest.mark.parametrize("attn", ["sdpa", "eager"])
both_alignments = pytest.mark.parametrize("alignment", ["window", "reference"])


def job(slices: Sequence[tuple[int, int]], targets: Sequence[int]) -> TowerJob:
    """Targets in patches."""
    lengths = tuple(rows * cols for rows, cols in slices)
    return TowerJob(
        targets=tuple(targets),
        n_patches=max(lengths),
        last_cut_layer=tiny.DEPTH - 1,
        has_cls=False,
        lengths=lengths,
        merge_unit=4,
    )


class Pruned:
    """One pruned forward."""

    def __init__(
        self,
        model: Any,
        grids: Sequence[Grid],
        targets: Sequence[int],
        alignment: MergeAlignment = "window",
        patches: Tensor | None = None,
        **settings: Any,
    ) -> None:
        self.terms: dict[int, LayerTerms] = {}
        grid = torch.tensor(grids)
        slices = slices_of(grid)
        method = FlowCut(**{"keep_tokens": 1, **settings})
        self.tower_pass = PackedFlowCutPass(method, job(slices, targets), alignment, self._keep)
        station = PackedTowerStation(packed_tower_parts(model))
        patches = tiny.pixels(grids) if patches is None else patches
        with torch.no_grad(), station.running(self.tower_pass, slices) as run:
            self.merged: Tensor = model(patches, grid_thw=grid).pooler_output
        station.close()
        self.run: PackedTowerRun = run
        self.features = run.select(self.merged)
        self.kept = [kept.tolist() for kept in run.kept]

    def _keep(self, terms: LayerTerms) -> None:
        self.terms[terms.layer] = terms

    def kept_after(self, layer: int, image: int = 0) -> list[int]:
        """Original patches of a slice that are left after a layer."""
        cut = self.run.cut_layer[image, : self.run.layer_counts[image][0]]
        left: list[int] = ((cut < 0) | (cut > layer)).nonzero().squeeze(1).tolist()
        return left


def golden() -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Tensor]]:
    """The recorded arrays and the state dict among them."""
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    weights = {k[2:]: torch.from_numpy(a) for k, a in arrays.items() if k.startswith("w/")}
    return arrays, weights


def golden_tower(weights: dict[str, Tensor], attn: str) -> Any:
    """The recorded tower."""
    config = Qwen2VLVisionConfig(
        depth=6,
        embed_dim=16,
        num_heads=2,
        mlp_ratio=1,
        patch_size=4,
        hidden_size=16,
        attn_implementation=attn,
    )
    model: Any = Qwen2VisionTransformerPretrainedModel(config).eval()
    model.load_state_dict(weights)
    return model


@both_attentions
class TestGolden:
    @pytest.mark.parametrize("budget", [6, 3])
    def test_every_array(self, budget: int, attn: str) -> None:
        arrays, weights = golden()
        prefix = f"T{budget}/"
        got = Pruned(
            golden_tower(weights, attn),
            [(1, 10, 10)],
            [8 * budget],
            "reference",
            torch.from_numpy(arrays["pixel_values"]),
        )
        want = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        counts = got.run.layer_counts[0]
        after = [*counts[1:], len(got.kept[0])]
        assert counts == want.pop("n_in").tolist()
        assert after == want.pop("n_out").tolist()
        planned = want.pop("prune_count").tolist()
        assert len([count for count in planned if count >= 0]) == 2
        for layer, count in enumerate(planned):
            assert count in (-1, counts[layer] - after[layer])
        assert got.kept[0] == want.pop("keep").tolist()
        np.testing.assert_allclose(got.features[0].numpy(), want.pop("merged"), atol=1e-4)
        assert {int(key.split("/")[0][1:]) for key in want} == set(got.terms)
        for key, array in want.items():
            layer, name = int(key.split("/")[0][1:]), key.split("/")[1]
            if name == "keep_orig":
                assert got.kept_after(layer) == array.tolist()
                continue
            terms = got.terms[layer]
            fields = {
                "attn": terms.attention,
                "vl1": terms.norm,
                "score": terms.score,
                "cum": terms.total,
            }
            value = fields[name]
            assert value is not None
            np.testing.assert_allclose(value[0].numpy(), array, rtol=1e-4, err_msg=key)
        assert all(terms.semantic is None for terms in got.terms.values())

    def test_unpruned(self, attn: str) -> None:
        arrays, weights = golden()
        pixels = torch.from_numpy(arrays["pixel_values"])
        got = Pruned(golden_tower(weights, attn), [(1, 10, 10)], [100], "reference", pixels)
        np.testing.assert_allclose(got.merged.numpy(), arrays["unpruned/merged"], atol=1e-4)
        assert not got.terms


@both_towers
@both_attentions
@both_alignments
def test_nothing_to_prune_is_stock(kind: str, attn: str, alignment: MergeAlignment) -> None:
    model = tiny.tower(kind, attn)
    with torch.no_grad():
        want = model(tiny.pixels(tiny.GRIDS), grid_thw=torch.tensor(tiny.GRIDS)).pooler_output
    got = Pruned(model, tiny.GRIDS, [60, 32, 32, 36, 4], alignment)
    assert torch.equal(got.merged, want)
    assert not got.terms


@both_towers
@both_attentions
@both_alignments
def test_counts_nesting_and_squares(kind: str, attn: str, alignment: MergeAlignment) -> None:
    targets = [20, 4, 32, 16, 4]
    got = Pruned(tiny.tower(kind, attn), tiny.GRIDS, targets, alignment)
    assert [len(kept) for kept in got.kept] == targets
    for image, target in enumerate(targets):
        counts = got.run.layer_counts[image]
        for layer, (before, after) in enumerate(zip(counts, [*counts[1:], target], strict=True)):
            assert target <= after <= before
            # rem(l) = depth - 1 - l must be even.
            if layer % 2 == 0:
                assert before == after
        if alignment == "window":
            squares = torch.tensor(got.kept[image]).view(-1, 4)
            assert bool((squares % 4 == torch.arange(4)).all())
            assert bool((squares // 4 == squares[:, :1] // 4).all())
            assert got.run.tokens[image].tolist() == (squares[:, 0] // 4).tolist()
        assert len(got.features[image]) == target // 4
        assert len(got.tower_pass.entropy_ratios[image]) <= 2
    scores = got.tower_pass.scores
    assert scores is not None
    assert scores.shape == (5, 60)
    assert bool(torch.isfinite(scores).all())
    assert bool((scores[0] > 0).all())
    assert bool((scores[1, 32:] == 0).all())


@both_towers
@both_alignments
def test_an_image_does_not_depend_on_its_batch(kind: str, alignment: MergeAlignment) -> None:
    model = tiny.tower(kind)
    grids: list[Grid] = [(1, 10, 6), (1, 4, 8), (1, 6, 6), (1, 8, 8), (1, 2, 2)]
    targets = [12, 20, 4, 32, 4]
    every = tiny.pixels(grids)
    lengths = [steps * rows * cols for steps, rows, cols in grids]
    own = torch.split(every, lengths)
    alone = [Pruned(model, [grids[i]], [targets[i]], alignment, own[i]) for i in range(5)]
    assert len({tuple(one.run.layer_counts[0][1:5]) for one in alone}) > 1
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3, 3, 0], [1, 2]):
        together = Pruned(
            model,
            [grids[i] for i in order],
            [targets[i] for i in order],
            alignment,
            torch.cat([own[i] for i in order]),
        )
        for place, image in enumerate(order):
            assert together.kept[place] == alone[image].kept[0]
            assert together.run.layer_counts[place] == alone[image].run.layer_counts[0]
            torch.testing.assert_close(
                together.features[place], alone[image].features[0], atol=1e-4, rtol=1e-3
            )
            assert together.tower_pass.entropy_ratios[place] == pytest.approx(
                alone[image].tower_pass.entropy_ratios[0], abs=1e-5
            )
            if alone[image].tower_pass.scores is not None:
                want = alone[image].tower_pass.scores[0]
                got = together.tower_pass.scores
                assert got is not None
                torch.testing.assert_close(got[place, : len(want)], want, atol=1e-5, rtol=1e-3)


@both_towers
def test_squares_cut_after_the_last_block_are_stock_tokens(kind: str) -> None:
    model = tiny.tower(kind)
    with torch.no_grad():
        stock = model(tiny.pixels(tiny.GRIDS), grid_thw=torch.tensor(tiny.GRIDS)).pooler_output
    got = Pruned(model, tiny.GRIDS, [20, 4, 12, 16, 4], prune_start_layer=tiny.DEPTH - 1)
    assert got.run.layer_counts[0] == [60] * tiny.DEPTH
    stock_slices = torch.split(stock, [15, 8, 8, 9, 1])
    for image, tokens in enumerate(got.run.tokens):
        torch.testing.assert_close(
            got.features[image], stock_slices[image][tokens], atol=1e-5, rtol=1e-5
        )


@both_towers
def test_the_scores_of_squares_are_means(kind: str) -> None:
    """At the first layer both alignments see the same rows."""
    model = tiny.tower(kind)
    squares = Pruned(model, [(1, 10, 6)], [20], "window").terms[0]
    patches = Pruned(model, [(1, 10, 6)], [20], "reference").terms[0]
    assert squares.score.shape == (1, 15)
    torch.testing.assert_close(squares.score, patches.score.view(1, 15, 4).mean(-1))
    assert squares.norm is not None
    assert patches.norm is not None
    torch.testing.assert_close(patches.score, patches.attention * patches.norm)
    torch.testing.assert_close(squares.attention, patches.attention)
    assert float(patches.attention.sum()) == pytest.approx(1.0, abs=1e-5)


def test_alignments_differ() -> None:
    model = tiny.tower("qwen2_vl")
    window = Pruned(model, [(1, 10, 6)], [20], "window")
    reference = Pruned(model, [(1, 10, 6)], [20], "reference")
    assert window.kept != reference.kept


def rows(shares: Tensor) -> TowerRows:
    """Rows whose attention shares are given: with query 1 the keys are their logarithms."""
    ones = torch.ones(*shares.shape, 1)
    return TowerRows(0, ones, shares.log().unsqueeze(-1), ones, heads=1, has_cls=False, valid=None)


def test_toy_count_of_squares() -> None:
    """The eight shares of the toy count as squares of four unequal patches: 8 -> 7 squares."""
    shares = torch.tensor([1 / 3, 2 / 9, 1 / 9, 1 / 9, 1 / 18, 1 / 18, 1 / 18, 1 / 18])
    inside = torch.tensor([0.1, 0.2, 0.3, 0.4])
    work = TowerJob((8,), 32, last_cut_layer=4, has_cls=False, merge_unit=4)
    tower_pass = PackedFlowCutPass(FlowCut(keep_tokens=2), work)
    tower_pass.begin(1, 32)
    tower_pass.observe(rows((shares.unsqueeze(1) * inside).view(1, 32)))
    keep = tower_pass.cut(0)
    assert keep is not None
    assert tower_pass.entropy_ratios[0] == pytest.approx([0.880535], abs=1e-5)
    assert len(keep[0]) == 28
    gone = set(range(32)) - set(keep[0].tolist())
    assert len({patch // 4 for patch in gone}) == 1
    assert gone <= set(range(16, 32))
    scores = tower_pass.scores
    assert scores is not None
    # Values are 1: the score of a square is its share over four patches.
    torch.testing.assert_close(scores[0], (shares / 4).repeat_interleave(4))


def test_uniform_attention_cuts_only_at_the_end() -> None:
    work = TowerJob((8,), 32, last_cut_layer=2, has_cls=False, merge_unit=4)
    tower_pass = PackedFlowCutPass(FlowCut(keep_tokens=2), work)
    tower_pass.begin(1, 32)
    tower_pass.observe(rows(torch.full((1, 32), 1 / 32)))
    assert tower_pass.cut(0) is None
    assert tower_pass.entropy_ratios[0] == pytest.approx([1.0])
    assert tower_pass.cut(1) is None
    keep = tower_pass.cut(2)
    assert keep is not None
    assert keep[0].tolist() == list(range(8))


def test_offset_entropy() -> None:
    attention = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    counts = torch.tensor([4, 4])
    torch.testing.assert_close(
        offset_entropy_ratio(attention, counts), torch.tensor([0.5, 0.0]), atol=1e-6, rtol=0
    )
    small = torch.tensor([[1e-7, 1 - 1e-7]])
    two = torch.tensor([2])
    assert float(offset_entropy_ratio(small, two)) < float(entropy_ratio(small, two))


@pytest.mark.parametrize(
    ("alignment", "ratio"),
    [("window", 0.0), ("reference", -math.log(1 + 2**-23) / math.log(32))],
)
def test_only_the_reference_adds_to_the_logarithm(alignment: MergeAlignment, ratio: float) -> None:
    """All attention on one patch: in float32, 1 + 1e-7 is the next number after 1."""
    work = TowerJob((8,), 32, last_cut_layer=4, has_cls=False, merge_unit=4)
    tower_pass = PackedFlowCutPass(FlowCut(keep_tokens=2), work, alignment)
    tower_pass.begin(1, 32)
    tower_pass.observe(rows(torch.eye(32)[:1]))
    keep = tower_pass.cut(0)
    assert keep is not None
    assert tower_pass.entropy_ratios[0] == pytest.approx([ratio], rel=1e-3, abs=1e-12)
    # round((N - T) / sqrt(4)): of 8 squares 3, of 32 patches 12 go.
    assert len(keep[0]) == 20


@both_alignments
def test_static_counts_are_in_units(alignment: MergeAlignment) -> None:
    model = tiny.tower("qwen2_5_vl")
    unit = 4 if alignment == "window" else 1
    counts = tuple(count // unit for count in (48, 32, 20))
    got = Pruned(
        model, [(1, 10, 6), (1, 8, 8)], [20, 20], alignment, schedule="static", counts=counts
    )
    assert got.run.layer_counts == [[60, 60, 48, 48, 32, 32], [64, 64, 48, 48, 32, 32]]
    assert [len(kept) for kept in got.kept] == [20, 20]


@both_alignments
@pytest.mark.parametrize("terms", [("attention",), ("value_norm",), ("semantic", "value_norm")])
def test_score_terms(terms: tuple[str, ...], alignment: MergeAlignment) -> None:
    got = Pruned(
        tiny.tower("qwen2_vl"), tiny.GRIDS, [20, 4, 12, 16, 4], alignment, score_terms=terms
    )
    assert [len(kept) for kept in got.kept] == [20, 4, 12, 16, 4]
    assert (got.terms[0].norm is None) == (terms == ("attention",))
    assert got.terms[0].semantic is None
    scores = got.tower_pass.scores
    assert scores is not None
    assert bool((scores[1, 32:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_alignments
def test_constant_images_in_half_precision(dtype: torch.dtype, alignment: MergeAlignment) -> None:
    model = tiny.tower("qwen2_5_vl").to(dtype)
    grids: list[Grid] = [(1, 8, 8), (1, 4, 4)]
    got = Pruned(model, grids, [12, 8], alignment, torch.ones(80, 96, dtype=dtype))
    assert [len(kept) for kept in got.kept] == [12, 8]
    assert all(bool(torch.isfinite(features).all()) for features in got.features)
    assert got.tower_pass.scores is not None
    assert bool(torch.isfinite(got.tower_pass.scores).all())


@pytest.mark.parametrize(
    ("changes", "settings", "alignment", "message"),
    [
        ({}, {}, "square", "merge_alignment must be 'window' or 'reference', got 'square'"),
        ({}, {"score_terms": ("semantic",)}, "window", "has no semantic term"),
        ({}, {"relay": "cls"}, "window", "no CLS token"),
        ({"targets": (6, 4)}, {}, "window", "targets .* multiples of 4, got 6"),
        ({"targets": (6, 4)}, {}, "reference", "targets .* multiples of 4, got 6"),
        ({"targets": (0, 4)}, {}, "window", "positive multiples of 4, got 0"),
        ({"lengths": (16, 10)}, {}, "window", "lengths .* multiples of 4, got 10"),
        ({"lengths": (16,)}, {}, "window", "do not fit 2 target"),
        ({"lengths": (12, 8)}, {}, "window", "longest slice of 16"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], settings: dict[str, Any], alignment: Any, message: str
) -> None:
    work: dict[str, Any] = {
        "targets": (8, 4),
        "n_patches": 16,
        "last_cut_layer": 5,
        "has_cls": False,
        "lengths": (16, 8),
        "merge_unit": 4,
    }
    with pytest.raises(SettingsError, match=message):
        PackedFlowCutPass(
            FlowCut(keep_tokens=2, **settings), TowerJob(**{**work, **changes}), alignment
        )


def test_a_pass_for_other_images() -> None:
    model = tiny.tower("qwen2_vl")
    station = PackedTowerStation(packed_tower_parts(model))
    tower_pass = PackedFlowCutPass(FlowCut(keep_tokens=2), job([(4, 4)], [8]))
    with (
        torch.no_grad(),
        pytest.raises(SettingsError, match="this pass is for 1 image"),
        station.running(tower_pass, [(4, 8)]),
    ):
        model(tiny.pixels([(1, 4, 8)]), grid_thw=torch.tensor([[1, 4, 8]]))
    station.close()
