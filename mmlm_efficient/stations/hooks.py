"""The hooks that the tower and the layer station put on the layers of a transformer.

Both watch the same places: the query, key and value projections of a layer, the end of its
attention, its input and its output. What happens there is up to the :class:`LayerWork` that is
active in the thread; without one, every hook returns None at once.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts, TowerParts
from mmlm_efficient.stations.active import active_request, anything_active

Parts = TypeVar("Parts", TowerParts, DecoderParts)
T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def beside_the_graph(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """What a function returns; torch.compile breaks its graph there and does not look inside."""
    # The switch costs microseconds at every call, so only compiled code has it.
    if torch.compiler.is_dynamo_compiling():
        return cast("T", _called(function, args))
    return function(*args)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _called(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    return function(*args)


class StationHook:
    """A hook on a module: idle unless a request of this thread is active at the hook's station.

    It knows the station by its key alone, so that a wrapper that nobody holds any more can go. Its
    copies, in a deep-copied or pickled model, do nothing.

    Args:
        key: of the station.
        act: what to do; called with the active request and what torch gives a hook.
    """

    def __init__(self, key: object = None, act: Callable[..., Any] | None = None) -> None:
        self._key = key
        self._act = act

    def __call__(self, *args: Any) -> Any:
        return beside_the_graph(self._answer, args) if anything_active() else None

    def _answer(self, *args: Any) -> Any:
        work = active_request(self._key)
        return None if work is None or self._act is None else self._act(work, *args)

    def __reduce__(self) -> Any:
        return _idle_hook, ()


def _idle_hook() -> StationHook:
    """The hook of a copy. The copied model may name our attention function: it must exist."""
    importlib.import_module("mmlm_efficient.stations.attention")
    return StationHook()


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

    They leave the model with `close`, or when the station is no longer held.

    Args:
        parts: the pieces of the transformer, from its family.

    Attributes:
        key: what requests are activated by, see `activate`.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts: Parts = parts
        self.key = object()
        self._handles: list[RemovableHandle] = []
        self._end: weakref.finalize[Any, Any] = weakref.finalize(self, remove_all, self._handles)
        for layer, module in enumerate(parts.layers):
            for part, projection in enumerate(parts.projections[layer]):
                capture = StationHook(self.key, partial(_capture, layer, part))
                self._handles.append(projection.register_forward_hook(capture))
            observe = StationHook(self.key, partial(_observe, layer, parts))
            self._handles.append(parts.attentions[layer].register_forward_hook(observe))
            enter = StationHook(self.key, partial(_enter, layer, parts))
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            # First among the layer's hooks: what transformers records must be the cut output.
            leave = StationHook(self.key, partial(_leave, layer, parts))
            self._handles.append(module.register_forward_hook(leave, prepend=True))

    def close(self) -> None:
        """Remove the hooks; the model is stock again. Safe to call twice."""
        self._end()

    def check_open(self) -> None:
        """Refuse to work without hooks.

        Raises:
            UnsupportedError: `close` was called.
        """
        if not self._end.alive:
            raise UnsupportedError(
                "this EfficientLMM was closed: its hooks are off the model, so that nothing could "
                "be pruned. Ask inside the 'with' block, make a new one (load, or EfficientLMM on "
                "the same model), or call the model itself for what the stock model gives."
            )


def check_seen(seen: bool, where: str) -> None:
    """Refuse what a part of the model made without its hooks: nothing was done there.

    Args:
        seen: whether the hooks ran.
        where: the part, for the message.

    Raises:
        UnsupportedError: they did not.
    """
    if not seen:
        raise UnsupportedError(
            f"{where} ran, but its hooks did not, so that methods could do nothing. torch.compile "
            "leaves out hooks that come after its first run: call torch.compiler.reset() once "
            "the EfficientLMM is made. A forward() that was replaced may leave them out too."
        )


def remove_all(handles: list[RemovableHandle]) -> None:
    """Take hooks off their modules."""
    while handles:
        handles.pop().remove()


def _capture(layer: int, part: int, work: LayerWork, _: nn.Module, __: Any, output: Tensor) -> None:
    if work.wants(layer):
        work.capture(part, output)


def _observe(layer: int, parts: Any, work: LayerWork, *_: Any) -> None:
    # Gradient checkpointing runs a layer again in the backward pass, where nothing is left to
    # score. It must find the same graph as before: scoring leaves none.
    with torch.no_grad():
        work.observe(layer, parts)


def _enter(
    layer: int,
    parts: Any,
    work: LayerWork,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Arguments | None:
    return work.enter(layer, args, kwargs, parts)


def _leave(
    layer: int, parts: Any, work: LayerWork, _: nn.Module, __: Any, output: Tensor
) -> Tensor | None:
    return work.leave(layer, output, parts)
