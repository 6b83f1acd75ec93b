"""Station 4: the attention of decoder layers, between queries, keys and values and the output.

Transformers looks attention functions up by name (`AttentionInterface`), with a mask function of
the same name (`AttentionMaskInterface`; without it a model silently gets no mask). The station
registers one name per stock implementation that it can stand in for. A layer that no request works
on runs the stock function, so its results are bit-identical.

What a request wants at a layer travels as one more keyword argument from a pre-hook on the decoder
layer to the attention function: no state on modules, none that is global.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts
from mmlm_efficient.stations.active import activate
from mmlm_efficient.stations.bridge import PromptLayout
from mmlm_efficient.stations.handed import check_attention, check_decoder
from mmlm_efficient.stations.hooks import StationHook, beside_the_graph, remove_all
from mmlm_efficient.tokens import LayerRedistribution, VisualTokens

# No "/" (a kernel of the hub), no "flash", "flex" or "paged": transformers reads names.
NAME = "mmlm_attention"
_WORK = "mmlm_attention_work"
_BASE = "sdpa"

# How many open stations have switched a text model to `NAME`: the last one switches it back.
_USERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
# Reentrant: a dropped station switches back wherever the garbage collector happens to run.
_LOCK = threading.RLock()


class AttentionWork(Protocol):
    """What one request does inside the attention of one layer in one forward."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor | None:
        """The output of the attention instead of the stock one, or None.

        Args:
            module: the attention module.
            query: [B, H, Q, d]; key, value: [B, Hkv, K, d], the cache's among them; positions are
                in them already. A sliding window's cache returns its last keys only.
            mask: bool [B, 1, Q, K], True where a query sees a key; None for causal attention of
                Q == K tokens, or of one query that sees all keys.
            scaling: of the products.

        Returns:
            [B, Q, H, d], or None.
        """


class AttentionRequest(Protocol):
    """What one request wants at the decoder's layers."""

    def enter(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> AttentionWork | None:
        """A layer starts with its input [B, L, D]: what to do in its attention, or None."""

    def check_acted(self, new_tokens: int) -> None:
        """The model has run: refuse its result where the request should have worked and did not.

        Args:
            new_tokens: tokens that were generated, 0 for a plain forward.

        Raises:
            UnsupportedError: it did not work on the prompt, or not while decoding.
        """

    def report(
        self, tokens: Sequence[VisualTokens], layout: PromptLayout
    ) -> tuple[LayerRedistribution, ...]:
        """What was done, for the report of the request; empty when nobody wants to know.

        Args:
            tokens: the images' tokens that entered the decoder.
            layout: the prompts as they entered it.
        """


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The attention function that the model finds under `NAME`."""
    work: AttentionWork | None = kwargs.pop(_WORK, None)
    if work is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = query.shape[2]
        if attention_mask is None and 1 < rows < key.shape[2]:
            # An empty static cache: behind the prompt's keys is room that no causal row sees.
            key, value = key[:, :, :rows], value[:, :, :rows]
        args = (module, query, key, value, attention_mask, scale)
        output = beside_the_graph(work.attend, args)
        if output is not None:
            return output, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class _Switch:
    """One station's say in which attention its text model uses.

    Attributes:
        module: the text model.
        config: its config.
        counted: whether the station is one of `_USERS`.
    """

    module: Any
    config: Any
    counted: bool = False

    def on(self) -> None:
        """Make the decoder use `NAME`."""
        # Counted first: another station may be dropped at any moment, and switch back.
        if not self.counted:
            _USERS[self.module] = _USERS.get(self.module, 0) + 1
            self.counted = True
        if self.config._attn_implementation != NAME:
            self.module.set_attn_implementation(NAME)

    def off(self) -> None:
        """The last station gives the model its own attention back."""
        with _LOCK:
            if not self.counted:
                return
            self.counted = False
            _USERS[self.module] -= 1
            # Anything else than NAME was chosen by the user since.
            if not _USERS[self.module] and self.config._attn_implementation == NAME:
                self.module.set_attn_implementation(_BASE)


class AttentionStation:
    """Station 4 of one model: idle, and the model untouched, until a request is active.

    A request makes the decoder use `NAME` in place of "sdpa". It stays so until the last station
    that had a request on this decoder is closed, because other threads, also of other wrappers, may
    be running the model. With no request the results are the same bits.

    Args:
        parts: the pieces of the decoder, from its family.

    Raises:
        UnsupportedError: a release of transformers whose layers or attention are called otherwise.
    """

    def __init__(self, parts: DecoderParts) -> None:
        check_decoder(parts)
        check_attention()
        self._config = parts.config
        self._switch = _Switch(parts.module, parts.config)
        self.key = object()
        handles: list[RemovableHandle] = [
            # After the layer station's: what enters the layer is what is left behind its cuts.
            module.register_forward_pre_hook(
                StationHook(self.key, partial(_enter, layer)), with_kwargs=True
            )
            for layer, module in enumerate(parts.layers)
        ]
        self._end = weakref.finalize(self, _end, handles, self._switch)

    def close(self) -> None:
        """Remove the hooks and give the model its own attention back. Safe to call twice."""
        self._end()

    def check_open(self) -> None:
        """Refuse to work without hooks.

        Raises:
            UnsupportedError: `close` was called.
        """
        if not self._end.alive:
            raise UnsupportedError(
                "this EfficientLMM was closed: its hooks are off the model, so that attention "
                "could not be changed. Ask inside the 'with' block, make a new one (load, or "
                "EfficientLMM on the same model), or call the model itself for what the stock "
                "model gives."
            )

    def check_backend(self) -> None:
        """Refuse an attention implementation that the station cannot stand in for.

        Raises:
            UnsupportedError: naming it and what is supported.
        """
        current = self._config._attn_implementation
        if current not in (_BASE, NAME):
            raise UnsupportedError(
                f"attn_implementation={current!r}: methods at the attention station stand in for "
                f"'{_BASE}' only. Load the model with attn_implementation='{_BASE}'."
            )

    @contextmanager
    def active(self, request: AttentionRequest) -> Iterator[None]:
        """Let a request work inside the `with` block, in this thread.

        Raises:
            UnsupportedError: the station is or was closed meanwhile, or another attention
                implementation was chosen before or meanwhile.
        """
        with _LOCK:
            self.check_open()
            self.check_backend()
            self._switch.on()
        with activate(self.key, request):
            yield
        self.check_open()
        if self._config._attn_implementation != NAME:
            raise UnsupportedError(
                f"attn_implementation was changed to {self._config._attn_implementation!r} while "
                "a request ran that works at the attention station, so that it did not. Change it "
                "between requests."
            )


def _enter(
    layer: int,
    request: AttentionRequest,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    work = request.enter(layer, args[0], kwargs)
    return None if work is None else (args, {**kwargs, _WORK: work})


def _end(handles: list[RemovableHandle], switch: _Switch) -> None:
    remove_all(handles)
    switch.off()
