"""VisPruner: important patches, and diverse ones among the rest.

Source: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
arXiv 2412.01818, and the list order of its reference code (Theia-4869/VisPruner, Apache-2.0), whose
indices this module reproduces. Both rankings look at the tower alone; the prompt plays no part.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.attention_scores import float_products
from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.pruning.observed import Crop, Sight
from mmlm_efficient.tokens import CLS_INDEX

_STEP = 8
"""Most patches that one round of pairwise comparison removes from a list."""

_LIST = 1280
"""Most patches that are compared with each other: no tower run of the paper's models has more
(576), the reference rule holds up to here."""


class VisPruner(PruningMethod):
    """Keep important patches, and patches unlike them and each other.

    A tower without CLS ranks by the attention that each patch receives. The patches are compared
    in front of the projector; where a model resizes them before it uses them (LLaVA-OneVision),
    behind it. A CLS token that the model keeps stays, and is one of the budget.

    Example:
        >>> VisPruner(keep_tokens=64).important_ratio
        0.5
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs "
        "(arXiv 2412.01818)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("tower",)
    looks_at: ClassVar[str] = (
        "CLS row (or received attention) of the tower's last used layer; features in front of the "
        "projector"
    )
    observes: ClassVar[frozenset[Sight]] = frozenset({"relay"})
    budget_counts: ClassVar[str] = (
        "tokens of each image; of each tile of a LLaVA-NeXT image, each temporal step of a Qwen "
        "video; of LLaVA-OneVision the whole image or video, newlines not counted"
    )

    important_ratio: float = Field(
        0.5, ge=0.0, le=1.0, description="share of the kept tokens chosen by attention, in [0, 1]"
    )

    def condense(self, crop: Crop, budget: int) -> Crop:
        """The patches of `important_and_diverse`, in raster order."""
        lead = int((crop.index == CLS_INDEX).sum())
        if crop.observed is None or crop.observed.relay is None:
            raise RuntimeError("the tower's attention was not observed")
        keep = torch.arange(lead)
        if budget > lead:
            patches = important_and_diverse(
                crop.observed.relay, crop.features[lead:], budget - lead, self.important_ratio
            )
            keep = torch.cat([keep, patches.to("cpu") + lead])
        features = crop.features[keep.to(crop.features.device)]
        return replace(crop, features=features, index=crop.index[keep])


def important_and_diverse(
    attention: Tensor, features: Tensor, keep: int, important_ratio: float
) -> Tensor:
    """The patches that VisPruner keeps.

    The int(keep * important_ratio) patches with the most attention stay. From the rest, in
    descending attention order, rounds of bipartite matching remove those that resemble another one
    most, until keep are left in all. In the reference an odd list, or a round that wants to remove
    more patches than it compares, fails; here the first half takes the odd place, and a round
    removes at most that half.

    A rest of more than 1,280 patches, as whole LLaVA-OneVision pictures have, is dealt like cards
    into lists of at most so many; each is halved by the same rounds, and what is left is dealt
    anew. So a round removes 8 patches of every list, more of a longer rest, and time and memory
    grow with the number of patches, not with its square.

    Args:
        attention: [N] the relay token's attention to each patch (CLS left out).
        features: [N, C] patch features before the projector.
        keep: how many to keep, 1..N.
        important_ratio: share of keep chosen by attention, in [0, 1].

    Returns:
        int64 [keep], ascending. Ties: the larger value first, then the earlier place in the list.

    Raises:
        SettingsError: keep or important_ratio is out of range.
        ValueError: attention and features are of different lengths.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
        >>> important_and_diverse(torch.tensor([0.4, 0.3, 0.2, 0.1]), features, 3, 0.4).tolist()
        [0, 2, 3]
    """
    n_patches = len(features)
    if attention.shape != (n_patches,):
        raise ValueError(
            f"attention {list(attention.shape)} must have one value for each of the {n_patches} "
            "patches (no CLS)"
        )
    if not 1 <= keep <= n_patches:
        raise SettingsError(
            f"VisPruner cannot keep {keep} of {n_patches} patches: give a number in 1..{n_patches}"
        )
    if not 0.0 <= important_ratio <= 1.0:
        raise SettingsError(f"important_ratio must be in [0, 1], got {important_ratio}")
    order = torch.sort(attention.detach().float(), descending=True, stable=True).indices
    n_important = int(keep * important_ratio)
    important, rest = order[:n_important], order[n_important:]
    places = _diverse_places(features.detach()[rest], keep - n_important)
    return torch.sort(torch.cat([important, rest[places]])).values


def _diverse_places(features: Tensor, count: int) -> Tensor:
    """Places of the list [R, C] that survive, int64 [count]."""
    places = torch.arange(len(features), device=features.device)
    if count == 0:
        return places[:0]
    while len(places) > count:
        n_lists = math.ceil(len(places) / _LIST)
        target = count if n_lists == 1 else max(count, len(places) // 2)
        hands = [places[number::n_lists] for number in range(n_lists)]
        sizes = [target // n_lists + int(number < target % n_lists) for number in range(n_lists)]
        places = torch.cat(
            [hand[_rounds(features[hand], size)] for hand, size in zip(hands, sizes, strict=True)]
        )
    return places


def _rounds(features: Tensor, count: int) -> Tensor:
    """Places of one list [R, C] that survive the reference's rounds, int64 [count], in order."""
    places = torch.arange(len(features), device=features.device)
    if count >= len(places):
        return places
    units = functional.normalize(features.float(), dim=1)
    cosine = float_products("id,jd->ij", units, units)
    while len(places) > count:
        first, second = places[0::2], places[1::2]
        score = cosine.index_select(0, first).index_select(1, second).amax(dim=1)
        remove = min(_STEP, len(places) - count, len(first))
        # The most alike lead the list and are cut; the survivors keep this order, which decides
        # the halves of the next round.
        alike = torch.sort(score, descending=True, stable=True).indices
        places = torch.cat([first[alike[remove:]], second])
    return places
