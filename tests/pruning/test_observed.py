"""What a pass sees of one tower layer: runs of different lengths, and layers with windows."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from mmlm_efficient.encoding import encode
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import DivPrune, VFlowOpt, VisionZip
from mmlm_efficient.pruning.observed import ObservePass, Sight
from mmlm_efficient.stations.tower import TowerRows
from tests import tiny_families as tiny

EVERYTHING = frozenset(get_args(Sight))
HEADS, LENGTHS = 2, (24, 8, 12)


def rows_of(lengths: tuple[int, ...], parts: list[tuple[Tensor, Tensor]]) -> TowerRows:
    """Rows of some runs, padded with what must not be looked at."""
    longest = max(lengths)
    query, key = (torch.full((len(lengths), longest, 8), 1e4) for _ in range(2))
    for run, (length, (own_query, own_key)) in enumerate(zip(lengths, parts, strict=True)):
        query[run, :length], key[run, :length] = own_query, own_key
    ragged = min(lengths) < longest
    valid = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    known = lengths if ragged else None
    return TowerRows(0, query, key, key, HEADS, False, valid if ragged else None, known)


@pytest.mark.parametrize("unit", [1, 4])
def test_runs_of_different_lengths_are_seen_as_alone(unit: int) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(length, 8), torch.randn(length, 8)) for length in LENGTHS]
    together = ObservePass(0, EVERYTHING, unit)
    together.observe(rows_of(LENGTHS, parts))
    assert len(together.seen) == 3
    for length, own, seen in zip(LENGTHS, parts, together.seen, strict=True):
        alone = ObservePass(0, EVERYTHING, unit)
        alone.observe(rows_of((length,), [own]))
        (want,) = alone.seen
        n_tokens = length // unit
        for got, expected, shape in (
            (seen.relay, want.relay, (n_tokens,)),
            (seen.keys, want.keys, (n_tokens, 4)),
            (seen.map, want.map, (n_tokens, n_tokens)),
        ):
            assert got is not None
            assert expected is not None
            assert got.shape == shape
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        assert seen.map is not None
        torch.testing.assert_close(seen.map.sum(dim=-1), torch.ones(n_tokens))


# Qwen2.5-VL: layers 2 and 5 of 6 attend to the whole picture.


@pytest.fixture(name="windowed", scope="module")
def _windowed() -> LMMParts:
    return LMMParts(tiny.tiny_model("qwen2_5_vl"))


def vflowopt(layer: int) -> VFlowOpt:
    return VFlowOpt(keep_ratio=0.5, profile="none", attention_layer=layer)


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_layers_with_windows_are_not_observed(windowed: LMMParts, layer: int) -> None:
    inputs = tiny.sample_inputs("qwen2_5_vl", "one")
    message = rf"attention_layer={layer}: that layer .* windows .*all of it: 2, 5$"
    with torch.no_grad(), pytest.raises(SettingsError, match=message):
        prepare(windowed, inputs, [vflowopt(layer)])
    with torch.no_grad(), pytest.raises(SettingsError, match=r"windows .*: 2, 5$"):
        encode(windowed, inputs, VFlowOpt.observes, layer)


def test_layers_without_windows_are(windowed: LMMParts) -> None:
    inputs = tiny.sample_inputs("qwen2_5_vl", "one")
    with torch.no_grad():
        for methods in (
            [vflowopt(2)],
            [vflowopt(5)],
            [VisionZip(keep_tokens=5)],
            [DivPrune(keep_tokens=5)],
        ):
            assert prepare(windowed, inputs, methods).tokens
        with pytest.raises(SettingsError, match=r"attention_layer=6.* 6 layers: give 0 to 5"):
            prepare(windowed, inputs, [vflowopt(6)])


def test_a_feature_layer_with_windows_is_not_observed() -> None:
    model = tiny.tiny_model("qwen2_5_vl")
    model.model.visual.config.fullatt_block_indexes = [2]
    with LMMParts(model) as parts:
        method = VFlowOpt(keep_ratio=0.5, profile="none")
        with pytest.raises(SettingsError, match=r"the feature layer=5: .*all of it: 2$"):
            method.observed_layer(parts.family)
        assert vflowopt(2).observed_layer(parts.family) == 2
