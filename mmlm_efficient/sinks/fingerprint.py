"""What tells one language model from another: its shape, and some of its weights.

Sink dimensions belong to trained weights, and models of the same width have different ones. A
name is not enough (folders are renamed), a shape is not enough either (LLaMA-2-7B and what was
fine-tuned far from it share one), so a calibration is kept with both shape and weights.
"""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

_DIGITS = 16
# Values looked at of every parameter, evenly spread.
_VALUES = 4096


class Fingerprint(BaseModel):
    """The shape of a language model inside a multimodal one.

    Attributes:
        text_model: its ``model_type`` in transformers, such as "llama".
        hidden_size, layers, intermediate_size, heads, kv_heads, vocab_size: of its config.

    Example:
        >>> from transformers import LlamaConfig
        >>> Fingerprint.of(LlamaConfig(num_hidden_layers=3)).layers
        3
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text_model: str = Field(min_length=1)
    hidden_size: int = Field(ge=1)
    layers: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    vocab_size: int = Field(ge=1)

    @classmethod
    def of(cls, config: Any) -> Self:
        """Of a model's config, or of its text config."""
        text = config.get_text_config()
        return cls(
            text_model=text.model_type,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            intermediate_size=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            vocab_size=text.vocab_size,
        )

    def difference(self, other: Fingerprint) -> str | None:
        """The first thing that differs, in words; None when nothing does."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine} there and {theirs} here"
        return None

    def __str__(self) -> str:
        return f"{self.text_model} text model, {self.hidden_size} wide, {self.layers} layers"


def signs_digest(model: nn.Module) -> str:
    """Short name of a model's weights, 16 hexadecimal digits.

    The signs of evenly spread values of every parameter, in the order of the model: neither dtype
    nor device nor the names of parameters change it, training does. Of packed 4-bit weights, which
    have no signs and which a first run may put into another order, it counts the values; what is
    not in memory (offloaded) is left out.
    """
    total = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().reshape(-1)
        if parameter.dtype == torch.uint8:
            total.update(repr(values.numel()).encode())
            if not parameter.is_meta:
                total.update(repr(_nibble_counts(values)).encode())
            continue
        total.update(repr(tuple(parameter.shape)).encode())
        if not parameter.is_meta:
            some = torch.signbit(values[:: max(1, values.numel() // _VALUES)])
            total.update(some.cpu().numpy().tobytes())
    return total.hexdigest()[:_DIGITS]


def _nibble_counts(packed: Tensor) -> list[int]:
    """How often each of the 16 values occurs in bytes of two."""
    pairs = torch.bincount(packed, minlength=256).view(16, 16)
    counts: list[int] = (pairs.sum(dim=0) + pairs.sum(dim=1)).tolist()
    return counts
