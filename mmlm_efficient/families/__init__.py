"""Model families: one file each, one line each in :data:`FAMILIES`."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts, Family, TowerParts
from mmlm_efficient.families.llava import Llava
from mmlm_efficient.families.llava_next import LlavaNext
from mmlm_efficient.families.llava_onevision import LlavaOnevision
from mmlm_efficient.families.qwen_vl import Qwen2_5VL, Qwen2VL
from mmlm_efficient.families.wrapped import model_inside

__all__ = ["FAMILIES", "DecoderParts", "Family", "TowerParts", "family_class", "family_of"]

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, LlavaOnevision, Qwen2VL, Qwen2_5VL)


def family_class(config: Any, name: str) -> type[Family]:
    """The family that a model with this config belongs to.

    Args:
        config: a config of transformers, or None.
        name: how the message calls the model.

    Raises:
        UnsupportedError: no family knows this kind of model; the message lists those that exist.
    """
    for family in FAMILIES:
        if family.matches(config):
            return family
    parts = []
    for part in ("vision_config", "text_config"):
        if (inner := getattr(config, part, None)) is not None:
            parts.append(f"{part} {getattr(inner, 'model_type', '?')!r}")
    supported = "; ".join(f"{family.name} ({family.describes})" for family in FAMILIES)
    raise UnsupportedError(
        f"{name}: is a {getattr(config, 'model_type', 'model')!r} model with "
        f"{', '.join(parts) or 'no vision tower'}, which belongs to no supported model family. "
        f"Supported: {supported}."
    )


def family_of(model: Any) -> Family:
    """The family of a model, bound to it.

    Args:
        model: a transformers model, or one in a wrapper, see `model_inside`.

    Raises:
        UnsupportedError: as :func:`family_class` and `model_inside`.
    """
    inside = model_inside(model)
    family = family_class(getattr(inside, "config", None), type(inside).__name__)
    if not isinstance(inside, nn.Module):
        raise UnsupportedError(
            f"{type(inside).__name__}: is no module of torch. Give the model itself."
        )
    return family(inside)
