"""What generate() calls while it decodes, with the caller's own prompt in front of the new tokens.

The prompt that the model runs lost the placeholders of pruned tokens. The caller's functions count
and compare with the prompt that they know, so they get that one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mmlm_efficient.inputs import behind

# What criteria and processors of transformers call a column of the prompt and what follows.
_COLUMNS = ("max_length", "min_length", "prompt_length_to_skip", "begin_index", "regulation_start")


def is_transformers_own(function: Any) -> bool:
    """Whether a criterion or processor is one of transformers' own classes."""
    return type(function).__module__.startswith("transformers.")


@dataclass(frozen=True)
class CallersPrompt:
    """A prompt as the caller gave it, and how long it is where the model runs.

    Attributes:
        own_ids: int64 [B, S], the caller's.
        width: columns of the prompt that the model runs.
    """

    own_ids: Tensor
    width: int

    @property
    def removed(self) -> int:
        """Columns that the longest prompt lost."""
        return self.own_ids.shape[1] - self.width

    def restored(self, ids: Tensor) -> Tensor:
        """Ids [B * n, width + new] with the caller's prompts in front: [B * n, S + new]."""
        return behind(self.own_ids, ids[:, self.width :])

    def callbacks(self, given: Mapping[str, Any], repeats: int) -> dict[str, Any]:
        """The functions among the arguments of generate(), made to see the caller's prompt.

        Args:
            given: arguments of generate().
            repeats: how many numbers of prefix_allowed_tokens_fn stand for one prompt.
        """
        wrapped: dict[str, Any] = {}
        for name, kind in (("stopping_criteria", _Criterion), ("logits_processor", _Processor)):
            if given.get(name):
                wrapped[name] = [
                    self._counting(one) if is_transformers_own(one) else kind(self, one)
                    for one in given[name]
                ]
        if (function := given.get("prefix_allowed_tokens_fn")) is not None:
            wrapped["prefix_allowed_tokens_fn"] = partial(self._allowed, function, repeats)
        if given.get("streamer") is not None:
            wrapped["streamer"] = _Streamer(self, given["streamer"])
        return wrapped

    def _counting(self, own: Any) -> Any:
        """A class of transformers, which counts columns at most. It stays what it is: generate()
        leaves out what it would make of settings where it is given one of the same type."""
        own = copy.copy(own)
        for name in _COLUMNS:
            if isinstance(value := getattr(own, name, None), int):
                setattr(own, name, value - self.removed)
        return own

    def _allowed(self, function: Callable[..., Any], repeats: int, number: int, ids: Tensor) -> Any:
        own = CallersPrompt(self.own_ids[number // repeats].unsqueeze(0), self.width)
        return function(number, own.restored(ids.unsqueeze(0)).squeeze(0))


class _Criterion(StoppingCriteria):
    def __init__(self, prompt: CallersPrompt, function: Callable[..., Any]) -> None:
        self._prompt, self._function = prompt, function

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._function(self._prompt.restored(input_ids), scores, **kwargs)


class _Processor(LogitsProcessor):
    def __init__(self, prompt: CallersPrompt, function: Callable[..., Any]) -> None:
        self._prompt, self._function = prompt, function

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return self._function(self._prompt.restored(input_ids), scores)


class _Streamer(BaseStreamer):
    """Hands on what it is given; the first thing is the prompt."""

    def __init__(self, prompt: CallersPrompt, streamer: Any) -> None:
        self._prompt: CallersPrompt | None = prompt
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        prompt, self._prompt = self._prompt, None
        self._streamer.put(value if prompt is None else prompt.restored(value))

    def end(self) -> None:
        self._streamer.end()
