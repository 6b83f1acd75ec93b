"""Sums and members of groups against plain loops."""

from __future__ import annotations

import pytest
import torch

from mmlm_efficient.groups import group_members, group_sums, on_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sums_and_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Group 1 is empty, group 3 has one row, which it equals to the bit."""
    torch.manual_seed(0)
    group = torch.tensor([2, 0, 2, 3, 0, 2])
    rows = torch.randn(6, *shape).to(dtype)
    sums, sizes = group_sums(rows, group, 5)
    assert sums.dtype is torch.float32
    assert sizes.tolist() == [2, 0, 3, 1, 0]
    for number in range(5):
        torch.testing.assert_close(sums[number], rows[group == number].float().sum(dim=0))
    assert torch.equal(sums[3], rows[3].float())


def test_no_rows_and_not_finite_ones() -> None:
    sums, sizes = group_sums(torch.empty(0, 2), torch.empty(0, dtype=torch.long), 3)
    assert (sums.tolist(), sizes.tolist()) == ([[0.0, 0.0]] * 3, [0, 0, 0])
    # A row that is not finite stays in its own group.
    sums, _ = group_sums(torch.tensor([torch.inf, 1.0]), torch.tensor([1, 0]), 2)
    assert sums.tolist() == [1.0, torch.inf]


def test_sums_are_float32_under_autocast_and_have_gradients() -> None:
    rows = torch.full((1000, 1), 1.001, requires_grad=True)
    group = torch.arange(1000) % 2
    with torch.autocast("cpu", torch.bfloat16):
        sums, _ = group_sums(rows, group, 2)
    # 500 where the rows were rounded to bfloat16.
    torch.testing.assert_close(sums, torch.full((2, 1), 500.5), atol=0.01, rtol=0.0)
    (sums * torch.tensor([[2.0], [3.0]])).sum().backward()
    assert rows.grad is not None
    assert rows.grad.squeeze(1).tolist() == [2.0, 3.0] * 500


def test_members_keep_their_order() -> None:
    positions, group = torch.tensor([9, 4, 7, 1]), torch.tensor([2, 0, 2, 2])
    assert group_members(positions, group, 4) == ((4,), (), (9, 7, 1), ())
    assert group_members(positions, torch.full((4,), -1), 0) == ()


def test_on_cpu_keeps_lengths() -> None:
    first, second, third = on_cpu(torch.arange(3), torch.arange(0), torch.tensor([7]))
    assert (first.tolist(), second.tolist(), third.tolist()) == ([0, 1, 2], [], [7])
