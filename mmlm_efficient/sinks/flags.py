"""Which tokens are attention sinks: those with a massive activation in the model's sink dimensions.

Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025,
arXiv 2503.03321, section 3. The state x of a token where it enters a decoder layer, before the
layer's norm, scores max over the sink dimensions of |x_d| / RMS(x), and is a sink where this
exceeds a threshold. No norm weight takes part, and the epsilon is 1e-6 whatever the model's own.

The score cannot exceed sqrt(width): a threshold says which share threshold^2 / width of a state's
energy a single dimension must hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmlm_efficient.errors import SettingsError

EPSILON = 1e-6
# What the paper uses for all of its models, which are 3584 to 5120 wide.
PUBLISHED_THRESHOLD = 20.0
# The narrowest of them; and LLaMA-2-7B, whose share of energy narrower models get.
_PUBLISHED_WIDTH = 3584
_REFERENCE_WIDTH = 4096


def sink_scores(hidden: Tensor, dims: Sequence[int]) -> Tensor:
    """How massive each token's state is in the sink dimensions.

    Args:
        hidden: [..., L, D], any floating dtype: what enters a decoder layer, before its norm.
        dims: sink dimensions, at least one, each in [0, D).

    Returns:
        float32 [..., L], in [0, sqrt(D)].

    Example:
        >>> sink_scores(torch.tensor([[3.0, 1.0, 1.0, 1.0]]), [0])
        tensor([1.7321])
    """
    # Views of a few columns: an index tensor would be copied to the device at every layer.
    most = torch.stack([hidden[..., dim] for dim in dims]).float().abs().amax(dim=0)
    return most / _root_mean_square(hidden).squeeze(-1)


def relative_activations(hidden: Tensor) -> Tensor:
    """Every dimension's |x_d| / RMS(x), float32, of states [..., D]."""
    return hidden.float().abs() / _root_mean_square(hidden)


def _root_mean_square(hidden: Tensor) -> Tensor:
    """sqrt(mean(x^2) + epsilon) over the last dimension, float32 [..., 1]."""
    return (hidden.float().square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()


def sink_flags(hidden: Tensor, dims: Sequence[int], threshold: float, visible: Tensor) -> Tensor:
    """Which tokens are sinks, text and visual ones alike.

    Args:
        hidden, dims: as in `sink_scores`.
        threshold: see `checked_threshold`; the comparison is strict.
        visible: bool [..., L], False on padding, which is never a sink.

    Returns:
        bool [..., L].
    """
    return (sink_scores(hidden, dims) > threshold) & visible


def default_threshold(width: int) -> float:
    """The threshold of a language model of some width.

    The paper's 20 from its narrowest model (3584) on. It would be out of reach below a width of
    400 and hard to reach below 2000, so narrower models get the threshold that asks for the same
    share of a state's energy as 20 does in LLaMA-2-7B, 9.8 %: 20 * sqrt(width / 4096). That is an
    inference of this project, not the paper's.

    Args:
        width: hidden size of the language model, at least 1.

    Example:
        >>> [round(default_threshold(width), 2) for width in (5120, 4096, 3584, 1024, 192)]
        [20.0, 20.0, 20.0, 10.0, 4.33]
    """
    if width >= _PUBLISHED_WIDTH:
        return PUBLISHED_THRESHOLD
    return PUBLISHED_THRESHOLD * math.sqrt(width / _REFERENCE_WIDTH)


def checked_threshold(threshold: float | None, width: int, field: str = "sink_threshold") -> float:
    """A threshold that states of some width can exceed.

    Args:
        threshold: what the user gave; None for `default_threshold`.
        width: hidden size of the language model.
        field: name of the setting, for the message.

    Raises:
        SettingsError: it is no number in (0, sqrt(width)).
    """
    if threshold is None:
        return default_threshold(width)
    limit = math.sqrt(width)
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0.0 < threshold < limit:
        raise SettingsError(
            f"{field} must be a number in (0, {limit:.4g}), got {threshold!r}: |x| / RMS(x) never "
            f"exceeds sqrt(hidden size) = sqrt({width}) = {limit:.4g}. The default for this width "
            f"is {default_threshold(width):.4g}"
        )
    return float(threshold)


def checked_dims(dims: Sequence[int], width: int, field: str = "sink_dims") -> tuple[int, ...]:
    """Sink dimensions that a language model of some width has.

    Args:
        dims: what the user gave.
        width: hidden size of the language model.
        field: name of the setting, for the message.

    Raises:
        SettingsError: none, one twice, or one that is no integer in [0, width).
    """
    whole = all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims)
    if not dims or not whole or len(set(dims)) < len(dims):
        raise SettingsError(
            f"{field} must be one or more different integers, such as [1415, 2533], got "
            f"{list(dims)}"
        )
    for dim in dims:
        if not 0 <= dim < width:
            raise SettingsError(
                f"{field}: {dim} is no dimension of this language model, which is {width} wide: "
                f"give 0 to {width - 1}"
            )
    return tuple(dims)
