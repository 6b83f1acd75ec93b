"""Sampling with a seed of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, StoppingCriteria

from mmlm_efficient.errors import SettingsError


def check_seed(seed: int | None) -> None:
    """Refuse a seed that is no whole number from 0 to 2**63 - 1; None is fine.

    Example:
        >>> check_seed(7)
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise SettingsError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}.")


class Draws:
    """Draws of one request from a generator of its own, in this thread only.

    transformers samples from torch's global generator: seeding that would disturb the caller's own
    random numbers, and two requests at the same time would disturb each other. While this is on,
    random draws read a private generator; they are those that `torch.manual_seed(seed)` would give.

    Being on costs time at every call of torch, most of which are in the model. As `processor` and
    `criterion` of generate(), it is on from the logits to the check for the end alone. Leaving the
    `with` block switches it off in any case.

    Args:
        seed: whole number from 0 to 2**63 - 1.
        device: where the logits are.

    Raises:
        SettingsError: the seed is no such number.

    Example:
        >>> def drawn(seed):
        ...     with Draws(seed, torch.device("cpu")) as draws:
        ...         draws.on()
        ...         return torch.multinomial(torch.ones(9), 5)
        >>> torch.equal(drawn(1), drawn(1))
        True
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        check_seed(seed)
        self._mode = _OwnGenerator(torch.Generator(device=device).manual_seed(seed))
        self._is_on = False
        self.processor = _On(self)
        self.criterion = _Off(self)

    def on(self) -> None:
        """Draw from the private generator from now on."""
        if not self._is_on:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            self._is_on = True

    def off(self) -> None:
        """Leave draws to torch again."""
        if self._is_on:
            self._is_on = False
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.off()


class _On(LogitsProcessor):
    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._draws.on()
        return scores


class _Off(StoppingCriteria):
    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._draws.off()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _OwnGenerator(TorchFunctionMode):
    """Gives every draw of this thread one generator."""

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
        elif func is torch.rand_like:  # of assisted decoding; takes no generator itself
            like = args[0]
            return torch.rand(
                like.shape, generator=self.generator, dtype=like.dtype, device=like.device
            )
        return func(*args, **options)
