"""The hooks that the tower and the layer station put on the layers of a transformer.

Both watch the same places: the query, key and value projections of a layer, the end of its
attention, its input and its output. What happens there is up to the :class:`LayerWork` that is
active in the thread; without one, every hook returns None at once.
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts, TowerParts
from mmlm_efficient.stations.active import active_request

Parts = TypeVar("Parts", TowerParts, DecoderParts)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LayerWork(Protocol):
    """What one request does at the layers; parts are those of the station that asks."""

    def enter(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any
    ) -> Arguments | None:
        """A layer starts: other arguments for it, or None; args[0] is its input [B, L, C]."""

    def wants(self, layer: int) -> bool:
        """Whether the projections of this layer are needed."""

    def capture(self, part: int, output: Tensor) -> None:
        """A projection has run: output [B, L, C]; part 0 is the query, 1 the key, 2 the value."""

    def observe(self, layer: int, parts: Any) -> None:
        """The layer's attention has run. Called without gradients: scores only choose."""

    def leave(self, layer: int, hidden: Tensor, parts: Any) -> Tensor | None:
        """A layer has run: instead of its output [B, L, C] another one, or None."""


class LayerHooks(Generic[Parts]):
    """Hooks on all layers of one transformer, registered once and idle until a request is active.

    Args:
        parts: the pieces of the transformer, from its family.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts: Parts = parts
        self._handles: list[RemovableHandle] = []
        self._closed = False
        for layer, module in enumerate(parts.layers):
            for part, projection in enumerate(parts.projections[layer]):
                self._handles.append(projection.register_forward_hook(self._capture(layer, part)))
            attention = parts.attentions[layer]
            self._handles.append(attention.register_forward_hook(self._observe(layer)))
            self._handles.append(
                module.register_forward_pre_hook(self._enter(layer), with_kwargs=True)
            )
            # First among the layer's hooks: what transformers records must be the cut output.
            self._handles.append(module.register_forward_hook(self._leave(layer), prepend=True))

    def close(self) -> None:
        """Remove the hooks; the model is stock again."""
        self._closed = True
        while self._handles:
            self._handles.pop().remove()

    def check_open(self) -> None:
        """Refuse to work without hooks.

        Raises:
            UnsupportedError: `close` was called.
        """
        if self._closed:
            raise UnsupportedError(
                "this EfficientLMM was closed: its hooks are off the model, so that nothing could "
                "be pruned. Ask inside the 'with' block, make a new one (load, or EfficientLMM on "
                "the same model), or call the model itself for what the stock model gives."
            )

    def _work(self) -> LayerWork | None:
        return cast("LayerWork | None", active_request(self))

    def _capture(self, layer: int, part: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            work = self._work()
            if work is not None and work.wants(layer):
                work.capture(part, output)

        return hook

    def _observe(self, layer: int) -> Any:
        def hook(_: nn.Module, __: Any, ___: Any) -> None:
            work = self._work()
            if work is not None:
                # Gradient checkpointing runs a layer again in the backward pass, where nothing is
                # left to score. It must find the same graph as before: scoring leaves none.
                with torch.no_grad():
                    work.observe(layer, self._parts)

        return hook

    def _enter(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            work = self._work()
            return None if work is None else work.enter(layer, args, kwargs, self._parts)

        return hook

    def _leave(self, layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            work = self._work()
            return None if work is None else work.leave(layer, output, self._parts)

        return hook
