"""What transformers hands to layers, masks and attention, by the names of the installed release.

The only file that knows these names. They are read off the signatures when a station is built: a
release that calls things otherwise is refused, because a hook that looks for an argument under a
name of yesterday finds nothing and answers wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from mmlm_efficient.errors import PromptError, UnsupportedError
from mmlm_efficient.families.base import DecoderParts

# The cache of keys and values: from 5.24 on, and until 5.23.
CACHE_NAMES = ("cache", "past_key_values")
_CAUSAL_MASKS = (create_causal_mask, create_sliding_window_causal_mask)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


# A release that knows neither is refused by `check_decoder`.
CACHE = next((name for name in CACHE_NAMES if name in _parameters(create_causal_mask)), "cache")

# Until 5.23, prefix_allowed_tokens_fn counts the sequences that are drawn, not the prompts.
NUMBERS_ROWS = CACHE == "past_key_values"


def cache_of(handed: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a decoder layer, None where it runs without one.

    Raises:
        UnsupportedError: the layer was handed none, not even None.
    """
    if CACHE not in handed:
        raise UnsupportedError(_refusal("decoder layers", [f"'{CACHE}'"], "are not handed"))
    return handed[CACHE]


def given_cache(fields: Mapping[str, Any]) -> Any:
    """The cache among model inputs, or in the output of a model or of generate(), if any."""
    return fields.get(CACHE)


def with_cache_renamed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's model inputs with the cache under the name of the installed release.

    Raises:
        PromptError: it is given under both names.

    Example:
        >>> list(with_cache_renamed({"past_key_values": 1})) == [CACHE]
        True
    """
    given = [name for name in CACHE_NAMES if inputs.get(name) is not None]
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)} are two names of one argument: give one of them")
    renamed = {name: value for name, value in inputs.items() if name not in CACHE_NAMES}
    return {**renamed, CACHE: inputs[given[0]]} if given else renamed


def causal_mask(
    config: Any,
    hidden: Tensor,
    mask: Tensor | None,
    cache: Any,
    layer: int,
    *,
    sliding: bool,
) -> Any:
    """The mask of one decoder layer, in the form of the model's attention implementation.

    Args:
        config: of the text model.
        hidden: [B, L, D], the layer's input.
        mask: bool [B, S], False on padding; None without padding.
        cache: of the layer, or None.
        layer: 0-based; the cache's length is that of this layer.
        sliding: whether the layer attends to a sliding window.
    """
    create: Callable[..., Any] = _CAUSAL_MASKS[sliding]
    return create(
        config=config,
        inputs_embeds=hidden,
        attention_mask=mask,
        layer_idx=layer,
        **{CACHE: cache},
    )


def check_decoder(parts: DecoderParts) -> None:
    """Refuse a release whose decoder layers, masks or attention take other arguments.

    Raises:
        UnsupportedError: naming the release, what takes what no longer, and the known releases.
    """
    layer_takes = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", CACHE)
    _check_layers(parts.layers, layer_takes)
    for create in _CAUSAL_MASKS:
        taken = ("config", "inputs_embeds", "attention_mask", CACHE, "layer_idx")
        _check(create, taken, create.__name__)


def check_attention() -> None:
    """Refuse a release whose attention functions take other arguments.

    Raises:
        UnsupportedError: as `check_decoder`.
    """
    taken = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling")
    _check(sdpa_attention_forward, taken, sdpa_attention_forward.__name__)
    _check(sdpa_mask, ("q_length", "kv_length", "attention_mask"), sdpa_mask.__name__)


def check_tower(layers: Iterable[nn.Module], takes: Iterable[str]) -> None:
    """Refuse a release whose tower layers or masks take other arguments.

    Args:
        layers: of the tower.
        takes: the arguments that the station replaces.

    Raises:
        UnsupportedError: as `check_decoder`.
    """
    _check_layers(layers, takes)
    _check(
        create_bidirectional_mask,
        ("config", "inputs_embeds", "attention_mask"),
        create_bidirectional_mask.__name__,
    )


def _check_layers(layers: Iterable[nn.Module], names: Iterable[str]) -> None:
    # In torch.compile's wrapper is the layer, and under a replaced forward its class's own.
    kinds: set[Any] = {type(getattr(layer, "_orig_mod", layer)) for layer in layers}
    for kind in kinds:
        _check(kind.forward, names, kind.__name__)


def _check(function: Callable[..., Any], names: Iterable[str], what: str) -> None:
    taken = _parameters(function)
    if any(one.kind is one.VAR_POSITIONAL for one in taken.values()):
        return  # a wrapper that hands on whatever it gets; `cache_of` sees what that is
    missing = [repr(name) for name in names if name not in taken]
    if missing:
        raise UnsupportedError(_refusal(what, missing))


def _refusal(what: str, missing: Iterable[str], verb: str = "takes no") -> str:
    return (
        f"transformers {transformers.__version__} is not supported: {what} {verb} "
        f"{', '.join(missing)}. Known to work: 5.23 and 5.24. Install one of them "
        "(pip install 'transformers<5.25'), or a newer mmlm_efficient."
    )
