"""Attention among a tower's tokens in chunks, against the plain softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning import attention_scores
from mmlm_efficient.pruning.attention_scores import mean_received, token_map


class Largest(TorchDispatchMode):
    """The most elements that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def eager_map(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Head-mean attention map [B, L, L] of [B, L, h, d], all at once."""
    logits = query.transpose(1, 2).double() @ key.transpose(1, 2).double().transpose(2, 3)
    return (logits * scale).softmax(dim=-1).mean(dim=1)


@pytest.fixture(name="rows")
def _rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 25, 3, 4), torch.randn(2, 25, 3, 4)


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize(("lead", "unit"), [(0, 1), (1, 1), (1, 4), (1, 2), (0, 5)])
def test_token_map(rows: tuple[Tensor, Tensor], lead: int, unit: int, chunk: int | None) -> None:
    query, key = rows
    n_tokens = (25 - lead) // unit
    want = eager_map(query, key, 0.5)[:, lead:, lead:]
    want = want.reshape(2, n_tokens, unit, n_tokens, unit).mean(dim=(2, 4))
    want = want / want.sum(dim=-1, keepdim=True)
    got = token_map(query, key, 0.5, lead=lead, unit=unit, chunk=chunk)
    torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=0)
    assert got.dtype == torch.float32
    half = token_map(query.bfloat16(), key.bfloat16(), 0.5, lead=lead, unit=unit, chunk=chunk)
    torch.testing.assert_close(half, got, atol=2e-2, rtol=0)


def test_attention_that_all_goes_to_cls_counts_as_even() -> None:
    query = torch.ones(1, 3, 1, 1)
    key = torch.tensor([300.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert token_map(query, key, 1.0, lead=1).tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


def test_a_map_of_patches_is_never_held() -> None:
    """64 patches in 16 tokens: nothing larger than a few rows of weights, or the result."""
    rows = torch.randn(1, 64, 8, 2)
    with Largest() as largest:
        token_map(rows, rows, 0.7, unit=4, chunk=4)
    assert largest.elements == 4 * 64 == 16 * 16
    many = torch.randn(1, 512, 1, 1)
    with Largest() as largest:
        token_map(many, many, 0.7, unit=4, chunk=16)
    assert largest.elements == 128 * 128
    with Largest() as largest:
        token_map(many, many, 0.7, chunk=16)
    assert largest.elements == 512 * 512


def test_weights_held_have_a_bound_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_scores, "_MOST_ROW_WEIGHTS", 3 * 40 * 8)
    rows = torch.randn(3, 40, 2, 1)
    with Largest() as largest:
        token_map(rows, rows, 0.7, unit=4)
    assert largest.elements == 3 * 40 * 8


def test_images_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, keys = torch.randn(5, 16, 2, 1), torch.randn(5, 16, 2, 1)
    valid = torch.arange(16) < torch.tensor([16, 3, 9, 1, 12]).unsqueeze(1)
    want = [mean_received(rows, keys, 0.7, mask, chunk=8) for mask in (None, valid)]
    monkeypatch.setattr(attention_scores, "_MOST_WEIGHTS", 2 * (2 * 8 * 16))
    with Largest() as largest:
        got = [mean_received(rows, keys, 0.7, mask, chunk=8) for mask in (None, valid)]
    assert largest.elements == 2 * (2 * 8 * 16)
    torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_a_bad_chunk_is_refused() -> None:
    rows = torch.ones(1, 2, 1, 1)
    with pytest.raises(SettingsError, match="chunk must be an integer >= 1 .*got 0"):
        token_map(rows, rows, 1.0, chunk=0)
