"""Groups of rows: their sums, their members, and small index tensors on the CPU in one copy.

Merging methods average tokens in groups. The sums here are the same on every run, also on CUDA,
where ``index_add`` is not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_sums(rows: Tensor, group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each group, and the groups' sizes.

    Linear in the rows, differentiable, deterministic on every device, in float32 also under
    autocast. Does not wait for the device.

    Args:
        rows: [P, ..]; group: int64 [P] in 0..n_groups-1.
        n_groups: how many groups, at least 1.

    Returns:
        float32 [n_groups, ..] sums (0 for an empty group) and int64 [n_groups] sizes.

    Example:
        >>> sums, sizes = group_sums(torch.ones(3, 1), torch.tensor([1, 0, 1]), 2)
        >>> sums.tolist(), sizes.tolist()
        ([[1.0], [2.0]], [1, 2])
    """
    ordered, order = torch.sort(group, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(n_groups + 1, device=group.device))
    sizes = edges.diff()
    if len(rows) == 0:
        return rows.new_zeros((n_groups, *rows.shape[1:]), dtype=torch.float32), sizes
    # The sizes fit by construction; checking them would wait for the device.
    sums = torch.segment_reduce(rows[order].float(), "sum", lengths=sizes, axis=0, unsafe=True)
    return sums, sizes


def group_means(rows: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Means of the rows of each group as the methods' code takes them: sum / (size + 1e-6).

    Args:
        rows, group, n_groups: as in `group_sums`.

    Returns:
        float32 [n_groups, ..].

    Example:
        >>> group_means(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 1).round(decimals=3)
        tensor([[2.]])
    """
    sums, sizes = group_sums(rows, group, n_groups)
    return sums / (sizes.float() + 1e-6).view(-1, *[1] * (sums.ndim - 1))


def group_members(positions: Tensor, group: Tensor, n_groups: int) -> tuple[tuple[int, ...], ...]:
    """Positions of each group, in their given order.

    Args:
        positions: int64 [P]; group: int64 [P] in 0..n_groups-1, not looked at for no groups.
        n_groups: how many groups.

    Example:
        >>> group_members(torch.tensor([3, 5, 8]), torch.tensor([1, 0, 1]), 2)
        ((5,), (3, 8))
    """
    if n_groups == 0:
        return ()
    positions, group = on_cpu(positions, group)
    ordered = positions[torch.sort(group, stable=True).indices]
    sizes = torch.bincount(group, minlength=n_groups).tolist()
    return tuple(tuple(part.tolist()) for part in torch.split(ordered, sizes))


def on_cpu(*indices: Tensor) -> tuple[Tensor, ...]:
    """Index tensors int64 [any] of one device on the CPU, by one copy.

    Example:
        >>> [one.tolist() for one in on_cpu(torch.tensor([1, 2]), torch.tensor([3]))]
        [[1, 2], [3]]
    """
    return torch.split(torch.cat(indices).to("cpu"), [len(one) for one in indices])
