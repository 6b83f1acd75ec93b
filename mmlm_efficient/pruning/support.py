"""Which method works on which model family, and how it works there."""

from __future__ import annotations

from mmlm_efficient.families import FAMILIES, Family
from mmlm_efficient.pruning.base import Method, PruningMethod


def support(method: type[Method], family: type[Family]) -> str | None:
    """How a method works on a family, in a few words; None where it is refused.

    Example:
        >>> from mmlm_efficient.families import LlavaOnevision
        >>> from mmlm_efficient.pruning import DivPrune, FlowCut
        >>> support(DivPrune, LlavaOnevision)
        'per image'
        >>> support(FlowCut, LlavaOnevision)
        'scored in the tower, cut behind packing'
    """
    if method.families != "all" and family.name not in method.families:
        return None
    if "attention" in method.stations:
        return "in the decoder's attention"
    if not issubclass(method, PruningMethod):
        return "yes"
    if "tower" in method.stations:
        return _in_tower(method, family)
    if "bridge" in method.stations and "layer" in method.stations:
        return "per image, then per prompt in the decoder"
    return "per image" if "bridge" in method.stations else "per image in the decoder"


def _in_tower(method: type[PruningMethod], family: type[Family]) -> str:
    cuts_inside = method.tower_pass is not PruningMethod.tower_pass
    if not family.packs_pruned:
        return "scored in the tower, cut behind packing" if cuts_inside else "behind packing"
    if family.merges_patches:
        where = "inside the tower, whole 2x2 squares" if cuts_inside else "behind the 2x2 merger"
        return f"{where}, per temporal step"
    run = "per tile" if family.tiles else "per image"
    return f"inside the tower, {run}" if cuts_inside else f"behind the tower, {run}"


def matrix(methods: dict[str, type[Method]]) -> list[list[str]]:
    """A row per method: its name, then how it works on each family ("no" where it is refused)."""
    return [
        [name, *(support(method, family) or "no" for family in FAMILIES)]
        for name, method in methods.items()
    ]
