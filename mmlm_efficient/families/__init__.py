"""Model families: one file each, one line each in :data:`FAMILIES`."""

from __future__ import annotations

from typing import Any

from mmlm_efficient.errors import UnsupportedError
from mmlm_efficient.families.base import DecoderParts, Family, TowerParts
from mmlm_efficient.families.llava import Llava

__all__ = ["FAMILIES", "DecoderParts", "Family", "TowerParts", "family_of"]

FAMILIES: tuple[type[Family], ...] = (Llava,)


def family_of(model: Any) -> Family:
    """The family of a model, bound to it.

    Args:
        model: a transformers model.

    Raises:
        UnsupportedError: no family knows this kind of model; the message lists those that exist.
    """
    config = getattr(model, "config", None)
    for family in FAMILIES:
        if family.matches(config):
            return family(model)
    kinds = [getattr(config, "model_type", type(model).__name__)]
    for part in ("vision_config", "text_config"):
        if (sub_config := getattr(config, part, None)) is not None:
            kinds.append(f"{part}: {getattr(sub_config, 'model_type', '?')}")
    supported = "; ".join(f"{family.name} ({family.describes})" for family in FAMILIES)
    raise UnsupportedError(
        f"{type(model).__name__} ({', '.join(kinds)}) belongs to no supported model family. "
        f"Supported: {supported}."
    )
