"""Sampling with a seed of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mmlm_efficient.errors import SettingsError


class _OwnGenerator(TorchFunctionMode):
    """Gives every `torch.multinomial` of this thread one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.multinomial and options.get("generator") is None:
            options["generator"] = self.generator
        return func(*args, **options)


def check_seed(seed: int | None) -> None:
    """Refuse a seed that is no whole number from 0 to 2**63 - 1; None is fine.

    Example:
        >>> check_seed(7)
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise SettingsError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}.")


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample tokens from a generator of this request alone.

    transformers samples from torch's global generator: seeding that would disturb the caller's own
    random numbers, and two requests at the same time would disturb each other. Inside this block,
    and in this thread only, sampling reads a private generator; the draws are those that
    `torch.manual_seed(seed)` would give.

    Args:
        seed: whole number from 0 on, or None to leave sampling alone.
        device: where the logits are.

    Raises:
        SettingsError: the seed is no whole number from 0 to 2**63 - 1.

    Example:
        >>> with seeded(1, torch.device("cpu")):
        ...     first = torch.multinomial(torch.ones(9), 5)
        >>> with seeded(1, torch.device("cpu")):
        ...     torch.equal(first, torch.multinomial(torch.ones(9), 5))
        True
    """
    check_seed(seed)
    if seed is None:
        yield
        return
    generator = torch.Generator(device=device).manual_seed(seed)
    with _OwnGenerator(generator):
        yield
