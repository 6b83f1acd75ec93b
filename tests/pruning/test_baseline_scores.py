"""DivPrune's, VisPruner's and VisionZip's arithmetic: recorded arrays, toy examples, invariants."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import divprune
from mmlm_efficient.pruning.divprune import farthest_order
from mmlm_efficient.pruning.visionzip import split_budget, zip_tokens
from mmlm_efficient.pruning.vispruner import important_and_diverse

GOLDEN = Path(__file__).parents[1] / "golden" / "flowcut" / "baselines.npz"


def golden(name: str) -> Tensor:
    """One array that a method's official code recorded."""
    with np.load(GOLDEN) as file:
        return torch.from_numpy(file[name])


def angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane at some angles, [N, 2]."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


# DivPrune


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ratio", [0.25, 0.098])
def test_divprune_golden(seed: int, ratio: float) -> None:
    want = golden(f"divprune/s{seed}/r{ratio}/order")
    tokens = golden(f"divprune/s{seed}/tokens")
    assert farthest_order(tokens, round(ratio * len(tokens))).tolist() == want.tolist()


def test_divprune_toy() -> None:
    """Nearest others: .015, .015, .826, 1, so 180 degrees first; then 0 at 2, then 90 at 1."""
    assert farthest_order(angles(0, 10, 90, 180), 4).tolist() == [3, 0, 2, 1]


def test_divprune_fewer_picks_are_a_prefix() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(40, 6)
    order = farthest_order(tokens, 40).tolist()
    assert sorted(order) == list(range(40))
    for n in (1, 2, 17, 39):
        assert farthest_order(tokens, n).tolist() == order[:n]


@pytest.mark.parametrize("whole", [2048, 10])
def test_divprune_of_equal_tokens_keeps_the_first(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divprune, "WHOLE_MATRIX_TOKENS", whole)
    torch.manual_seed(0)
    tokens = torch.randn(1, 333).expand(130, 333)
    assert farthest_order(tokens, 50).tolist() == list(range(50))


def test_divprune_never_picks_a_duplicate_twice() -> None:
    torch.manual_seed(1)
    tokens = torch.randn(3, 8).repeat(4, 1)
    order = farthest_order(tokens, 12).tolist()
    assert sorted(order) == list(range(12))
    # After one of each kind all distances are 0, and the lowest index is next.
    assert sorted(place % 3 for place in order[:3]) == [0, 1, 2]
    assert order[3:] == sorted(order[3:])


def test_divprune_zero_vectors_are_at_distance_one() -> None:
    tokens = torch.cat([angles(0, 180), torch.zeros(2, 2)])
    # The nearest others of 0 and 180 degrees are the zeros, at 1: all tie, then 180 degrees at 2.
    assert farthest_order(tokens, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("whole", [1, 7, 20, 41])
def test_divprune_row_by_row_equals_the_matrix(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    tokens = torch.randn(41, 9)
    want = farthest_order(tokens, 30).tolist()
    monkeypatch.setattr(divprune, "WHOLE_MATRIX_TOKENS", whole)
    assert farthest_order(tokens, 30).tolist() == want


def test_divprune_ignores_length_and_half_precision_limits() -> None:
    tokens = angles(0, 10, 90, 180) * torch.tensor([[1.0], [700.0], [3.0], [9.0]])
    assert farthest_order(tokens.half(), 4).tolist() == [3, 0, 2, 1]
    assert farthest_order(tokens[:1], 1).tolist() == [0]


@pytest.mark.parametrize("n", [0, -1, 5])
def test_divprune_refuses_an_impossible_count(n: int) -> None:
    with pytest.raises(SettingsError, match=rf"pick {n} of 4 .* 1\.\.4"):
        farthest_order(torch.eye(4), n)


# VisPruner


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("keep", "ratio"), [(24, 0.5), (32, 0.75)])
def test_vispruner_golden(seed: int, keep: int, ratio: float) -> None:
    attention = golden(f"vispruner/s{seed}/cls_attn_heads")[0].mean(dim=0)
    features = golden(f"vispruner/s{seed}/features")[0]
    want = golden(f"vispruner/s{seed}/T{keep}_r{ratio}/keep")
    assert important_and_diverse(attention, features, keep, ratio).tolist() == want.tolist()


def test_vispruner_toy() -> None:
    """One round: of places 0 and 2, place 2 at 80 degrees is next to place 1 at 90."""
    attention = torch.tensor([0.4, 0.3, 0.2, 0.1])
    features = angles(0, 90, 80, 180)
    assert important_and_diverse(attention, features, 3, 0.0).tolist() == [0, 1, 3]
    # By attention order 3, 2, 1, 0 the even places are 3 and 1, and 1 goes.
    assert important_and_diverse(attention.flip(0), features, 3, 0.0).tolist() == [0, 2, 3]


def test_vispruner_small_and_odd_lists() -> None:
    """Six left, two wanted: all three even places go; of the odd list 3, 5, 7 then the 3."""
    attention = torch.linspace(1.0, 0.1, 8)
    features = angles(200, 300, 40, 6, 70, 0, 20, 90)
    assert important_and_diverse(attention, features, 4, 0.5).tolist() == [0, 1, 5, 7]


def by_lists(attention: list[float], features: Tensor, keep: int, ratio: float) -> list[int]:
    """The rule in plain lists."""
    order = sorted(range(len(attention)), key=lambda patch: (-attention[patch], patch))
    important, rest = order[: int(keep * ratio)], order[int(keep * ratio) :]
    units = functional.normalize(features.double(), dim=1)
    while len(rest) > keep - len(important):
        first, second = rest[::2], rest[1::2]
        score = {a: max(float(units[a] @ units[b]) for b in second) for a in first}
        remove = min(8, len(rest) - keep + len(important), len(first))
        rest = sorted(first, key=lambda patch: -score[patch])[remove:] + second
    return sorted(important + rest)


@pytest.mark.parametrize(
    ("patches", "keep", "ratio"),
    [(65, 24, 0.5), (50, 7, 0.5), (37, 36, 0.3), (31, 1, 0.0), (12, 4, 0.0), (40, 13, 0.99)],
)
def test_vispruner_follows_the_list_order(patches: int, keep: int, ratio: float) -> None:
    torch.manual_seed(patches)
    attention, features = torch.rand(patches), torch.randn(patches, 5)
    got = important_and_diverse(attention, features, keep, ratio).tolist()
    assert got == by_lists(attention.tolist(), features, keep, ratio)
    assert len(set(got)) == keep


def by_matrix(features: Tensor, keep: int) -> list[int]:
    """The reference's rounds of one list, in plain lists."""
    units = functional.normalize(features.double(), dim=1)
    cosine, rest = (units @ units.T).tolist(), list(range(len(features)))
    while len(rest) > keep:
        first, second = rest[::2], rest[1::2]
        score = {a: max(cosine[a][b] for b in second) for a in first}
        rest = sorted(first, key=lambda a: -score[a])[min(8, len(rest) - keep) :] + second
    return rest


def test_vispruner_follows_the_reference_up_to_the_patches_of_its_models() -> None:
    torch.manual_seed(0)
    features = torch.randn(576, 48)
    got = important_and_diverse(torch.arange(576, 0, -1), features, 500, 0.0)
    assert got.tolist() == sorted(by_matrix(features, 500))


def test_vispruner_deals_longer_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 patches in three hands of at most 40 are halved, then 50 in two thinned to 30."""
    monkeypatch.setattr("mmlm_efficient.pruning.vispruner._LIST", 40)
    torch.manual_seed(0)
    features, rest = torch.randn(100, 16), list(range(100))
    for hands, sizes in ((3, (17, 17, 16)), (2, (15, 15))):
        dealt = [rest[number::hands] for number in range(hands)]
        rest = [
            hand[place]
            for hand, size in zip(dealt, sizes, strict=True)
            for place in by_matrix(features[hand], size)
        ]
    got = important_and_diverse(torch.arange(100, 0, -1), features, 30, 0.0)
    assert got.tolist() == sorted(rest)


class Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("keep", [1, 1822, 7289])
def test_vispruner_of_a_whole_picture_stays_small(keep: int) -> None:
    """7,290 patches of which nearly all are copies: never more than a square of 1,280."""
    torch.manual_seed(0)
    kinds = torch.randn(600, 8)
    features = kinds[torch.cat([torch.arange(600), torch.randint(0, 600, (6690,))])]
    with Largest() as seen:
        got = important_and_diverse(torch.rand(7290), features, keep, 0.5)
    assert len(set(got.tolist())) == keep
    assert got.tolist() == sorted(got.tolist())
    assert seen.elements <= 1280 * 1280
    if keep == 1822:
        # Copies leave first: hardly a kind is lost.
        assert len({tuple(row) for row in features[got].tolist()}) > 590


def test_vispruner_extremes() -> None:
    torch.manual_seed(3)
    attention, features = torch.rand(20), torch.randn(20, 4)
    top = sorted(attention.argsort(descending=True)[:6].tolist())
    assert important_and_diverse(attention, features, 6, 1.0).tolist() == top
    assert important_and_diverse(attention, features, 20, 0.5).tolist() == list(range(20))
    equal = important_and_diverse(torch.ones(20), torch.ones(20, 4), 4, 1.0)
    assert equal.tolist() == [0, 1, 2, 3]
    # Equal everywhere: each round drops the earliest of the even places (0, 2, .. 14, then 16, 1).
    rest = important_and_diverse(torch.ones(20), torch.ones(20, 4), 12, 0.0)
    assert rest.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18, 19]
    rest = important_and_diverse(torch.ones(20), torch.ones(20, 4), 11, 0.0)
    assert rest.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 18, 19]


def test_vispruner_bad_input() -> None:
    attention, features = torch.rand(4), torch.eye(4)
    for keep in (0, 5):
        with pytest.raises(SettingsError, match=rf"keep {keep} of 4 .* 1\.\.4"):
            important_and_diverse(attention, features, keep, 0.5)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match=r"important_ratio must be in \[0, 1\]"):
            important_and_diverse(attention, features, 2, ratio)
    with pytest.raises(ValueError, match="no CLS"):
        important_and_diverse(torch.rand(5), features, 2, 0.5)


# VisionZip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("dominant", "contextual"), [(20, 4), (10, 3)])
def test_visionzip_golden(seed: int, dominant: int, contextual: int) -> None:
    prefix = f"visionzip/s{seed}"
    hidden = golden(f"{prefix}/hidden")[0]
    attention = golden(f"{prefix}/cls_attn_heads")[0].sum(dim=0)[1:]
    keys = golden(f"{prefix}/key_mean")[0, 1:]
    zipped = zip_tokens(attention, keys, hidden[1:], dominant - 1, contextual)
    want = golden(f"{prefix}/d{dominant}_c{contextual}/dominant_idx")[0]
    assert [0, *(zipped.dominant + 1).tolist()] == want.tolist()
    out = torch.cat([hidden[:1], hidden[1:][zipped.dominant], zipped.contextual])
    want = golden(f"{prefix}/d{dominant}_c{contextual}/out")[0]
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_visionzip_toy() -> None:
    """Patch 1 dominates; anchors 0 and 3 of the rest 0, 2, 3, 4, 5; patch 5 is a tie."""
    attention = torch.tensor([0.1, 0.5, 0.1, 0.05, 0.2, 0.05])
    keys = torch.tensor([[1.0, 0], [9, 9], [0, 3], [0, 1], [2, 1], [1, 1]])
    features = torch.tensor([1.0, 10, 2, 4, 8, 16]).unsqueeze(1)
    zipped = zip_tokens(attention, keys, features, dominant=1, contextual=2)
    assert zipped.dominant.tolist() == [1]
    assert zipped.remaining.tolist() == [0, 2, 3, 4, 5]
    assert zipped.anchors.tolist() == [0, 3]
    assert zipped.assignment.tolist() == [0, 1, 1, 0, 0]
    assert zipped.members == ((0, 4, 5), (2, 3))
    # Anchor plus the mean of the others: 1 + (8 + 16) / 2 and 4 + 2.
    assert zipped.contextual.tolist() == [[13.0], [6.0]]


def test_visionzip_accounts_for_every_patch() -> None:
    torch.manual_seed(4)
    for patches, dominant, contextual in ((30, 7, 4), (11, 1, 10), (9, 0, 2), (5, 5, 0)):
        attention, keys = torch.rand(patches), torch.randn(patches, 3)
        features = torch.randn(patches, 6)
        zipped = zip_tokens(attention, keys, features, dominant, contextual)
        merged = [patch for group in zipped.members for patch in group]
        assert sorted(zipped.dominant.tolist() + merged) == list(range(patches))
        assert all(
            anchor in group
            for anchor, group in zip(zipped.anchors.tolist(), zipped.members, strict=True)
        )
        assert zipped.contextual.shape == (contextual, 6)


def test_visionzip_empty_groups_are_the_anchor_alone() -> None:
    """All keys are equal: everything joins the first anchor. No patch beside the anchors: none."""
    features = torch.arange(6.0).unsqueeze(1)
    zipped = zip_tokens(torch.zeros(6), torch.ones(6, 2), features, 2, 2)
    assert zipped.dominant.tolist() == [0, 1]
    assert zipped.members == ((2, 3, 5), (4,))
    assert zipped.contextual.tolist() == [[6.0], [4.0]]
    zipped = zip_tokens(torch.zeros(6), torch.zeros(6, 2), features, 2, 4)
    assert zipped.contextual.tolist() == [[2.0], [3.0], [4.0], [5.0]]


def test_visionzip_without_contextual_tokens_drops_the_rest() -> None:
    zipped = zip_tokens(torch.tensor([0.1, 0.3, 0.2]), torch.eye(3), torch.eye(3), 1, 0)
    assert zipped.dominant.tolist() == [1]
    assert zipped.assignment.tolist() == [-1, -1]
    assert zipped.members == ()
    assert zipped.contextual.shape == (0, 3)


def test_visionzip_returns_the_dtype_of_the_features_and_gradients() -> None:
    features = torch.ones(8, 2, dtype=torch.bfloat16, requires_grad=True)
    zipped = zip_tokens(torch.arange(8.0).half(), torch.ones(8, 2).half(), features, 2, 2)
    assert zipped.contextual.dtype == torch.bfloat16
    zipped.contextual.sum().backward()
    assert features.grad is not None
    # Anchors 0 and 3; the four others share the first one's mean; 6 and 7 are dominant.
    assert features.grad[:, 0].tolist() == [1.0, 0.25, 0.25, 1.0, 0.25, 0.25, 0.0, 0.0]


def test_visionzip_bad_input() -> None:
    attention, keys = torch.rand(6), torch.randn(6, 2)
    for dominant, contextual in ((4, 3), (7, 0), (-1, 2), (2, -1)):
        with pytest.raises(SettingsError, match="of 6 patches.*lower the budget"):
            zip_tokens(attention, keys, keys, dominant, contextual)
    with pytest.raises(ValueError, match="no CLS"):
        zip_tokens(torch.rand(7), keys, keys, 2, 2)
    with pytest.raises(ValueError, match="no CLS"):
        zip_tokens(attention, torch.rand(7, 2), keys, 2, 2)


@pytest.mark.parametrize(
    ("tokens", "split"),
    [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5)), (16, (14, 2))],
)
def test_split_budget_presets(tokens: int, split: tuple[int, int]) -> None:
    assert split_budget(tokens) == split
    assert split_budget(tokens, has_cls=False) == split


def test_split_budget_small() -> None:
    assert [split_budget(tokens) for tokens in (1, 2, 3, 4)] == [(1, 0), (2, 0), (2, 1), (3, 1)]
    without = [split_budget(tokens, has_cls=False) for tokens in (1, 2, 3)]
    assert without == [(1, 0), (1, 1), (2, 1)]
    for tokens in range(1, 600):
        assert sum(split_budget(tokens)) == tokens
    with pytest.raises(SettingsError, match="at least 1 token per image, got 0"):
        split_budget(0)
