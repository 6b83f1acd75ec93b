"""Which request is active at a station in the current thread (or asyncio task).

State belongs to a request, never to a module of the model: hooks stay registered for the life of a
station and ask here for the request of their own thread. So concurrent requests on one model never
see each other. One wrapper of a model adds and removes no hook while threads run the model; making,
closing or dropping further wrappers of the same model does, and must not happen meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ACTIVE: ContextVar[tuple[tuple[object, object], ...]] = ContextVar(
    "mmlm_efficient_active_requests", default=()
)
# Whether anything is active in any thread. torch.compile can follow a plain flag into a hook, and
# compiles anew when it changes; a ContextVar breaks the graph.
_anything = False
_count = 0
_LOCK = threading.Lock()


def anything_active() -> bool:
    """Whether a request is active at any station in any thread."""
    return _anything


def active_request(station: object) -> object | None:
    """The innermost request that is active at a station in this thread, or None."""
    for owner, request in reversed(_ACTIVE.get()):
        if owner is station:
            return request
    return None


@contextmanager
def activate(station: object, request: object) -> Iterator[None]:
    """Make a request active at a station inside the ``with`` block, in this thread only."""
    token = _ACTIVE.set((*_ACTIVE.get(), (station, request)))
    _counted(1)
    try:
        yield
    finally:
        _counted(-1)
        _ACTIVE.reset(token)


def _counted(change: int) -> None:
    global _anything, _count
    with _LOCK:
        _count += change
        _anything = _count > 0
