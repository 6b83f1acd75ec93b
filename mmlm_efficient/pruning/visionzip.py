"""VisionZip: dominant patches, and the rest merged into a few.

Source: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467,
and its reference code (dvlab-research/VisionZip, Apache-2.0), whose numbers these functions
reproduce. Ranking and merging look at the tower alone; the prompt plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.groups import group_members, group_sums, on_cpu
from mmlm_efficient.pruning.attention_scores import float_products
from mmlm_efficient.pruning.base import PruningMethod, Station
from mmlm_efficient.pruning.observed import Crop, Sight
from mmlm_efficient.tokens import CLS_INDEX


class VisionZip(PruningMethod):
    """Keep the patches with the most attention, and merge all others into a few tokens.

    A budget of T tokens is split into dominant and contextual (merged) ones like the published
    54 + 10, unless `contextual_tokens` says otherwise. The tower's CLS token becomes a token and is
    one of the dominant ones, also where the model drops it. A tower without CLS, or a model that
    resizes patches before it uses them, gives none: then all dominant tokens are patches, ranked
    by the attention that each receives. A CLS token has no place among the patches, so positions
    are renumbered; "original" is refused where it enters a model that has no place for it.

    Example:
        >>> VisionZip(keep_tokens=64).split(64, has_cls=True)
        (54, 10)
        >>> VisionZip(keep_tokens=64, contextual_tokens=4).split(64, has_cls=True)
        (60, 4)
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("tower",)
    looks_at: ClassVar[str] = (
        "CLS row (or received attention) and keys of the tower's last used layer"
    )
    merges: ClassVar[bool] = True
    observes: ClassVar[frozenset[Sight]] = frozenset({"relay", "keys"})
    budget_counts: ClassVar[str] = (
        "tokens of each image, CLS and merged ones among them; of each tile of a LLaVA-NeXT image, "
        "each temporal step of a Qwen video; of LLaVA-OneVision the whole image or video, newlines "
        "not counted"
    )

    contextual_tokens: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="merged tokens among the budget; by default 10 of 64",
    )

    @model_validator(mode="after")
    def _check_contextual(self) -> Self:
        tokens = self.keep_tokens
        if tokens is not None:
            self.split(min(tokens) if isinstance(tokens, tuple) else tokens, has_cls=True)
        return self

    def split(self, tokens: int, *, has_cls: bool) -> tuple[int, int]:
        """Dominant tokens (CLS among them if there is one) and contextual ones of a budget.

        Raises:
            SettingsError: contextual_tokens leaves no dominant token.
        """
        if self.contextual_tokens is None:
            return split_budget(tokens, has_cls)
        if self.contextual_tokens >= tokens:
            raise SettingsError(
                f"contextual_tokens={self.contextual_tokens} leaves no dominant token in a budget "
                f"of {tokens}: give fewer, or keep more tokens"
            )
        return tokens - self.contextual_tokens, self.contextual_tokens

    def condense(self, crop: Crop, budget: int) -> Crop:
        """CLS, dominant patches in raster order, contextual tokens in order of their anchors."""
        seen = crop.observed
        if seen is None or seen.relay is None or seen.keys is None:
            raise RuntimeError("the tower's attention and keys were not observed")
        lead = int((crop.index == CLS_INDEX).sum())
        patches, index = crop.features[lead:], crop.index[lead:]
        has_cls = crop.cls is not None
        dominant, contextual = self.split(budget, has_cls=has_cls)
        zipped = zip_tokens(seen.relay, seen.keys, patches, dominant - int(has_cls), contextual)
        kept, rest, anchors, group = on_cpu(
            zipped.dominant, zipped.remaining, zipped.anchors, zipped.assignment
        )
        kept = index[kept]
        groups = group_members(index[rest], group, len(anchors))
        features = [patches[zipped.dominant], zipped.contextual]
        indices = [kept, index[anchors]]
        members = [*((place,) for place in kept.tolist()), *groups]
        if crop.cls is not None:
            features.insert(0, crop.cls.unsqueeze(0))
            indices.insert(0, torch.tensor([CLS_INDEX]))
            members.insert(0, (CLS_INDEX,))
        return replace(
            crop, features=torch.cat(features), index=torch.cat(indices), members=tuple(members)
        )


@dataclass(frozen=True)
class Zipped:
    """What VisionZip makes of the patches of one image: N patches, Q of them not dominant.

    Attributes:
        dominant: int64 [M], dominant patches, ascending (the CLS token is the caller's).
        remaining: int64 [Q], all other patches, ascending.
        anchors: int64 [R], the remaining patches that absorb the others, ascending.
        assignment: int64 [Q], contextual token 0..R-1 that each remaining patch belongs to, its own
            for an anchor; -1 everywhere when R = 0 (the remaining patches are dropped).
        contextual: [R, C] contextual tokens in anchor order, in the dtype of the features.
    """

    dominant: Tensor
    remaining: Tensor
    anchors: Tensor
    assignment: Tensor
    contextual: Tensor

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Patches of each contextual token, its anchor included, ascending."""
        return group_members(self.remaining, self.assignment, len(self.anchors))


def zip_tokens(
    attention: Tensor, keys: Tensor, features: Tensor, dominant: int, contextual: int
) -> Zipped:
    """Keep the dominant patches and merge the others into contextual tokens.

    Evenly spaced remaining patches are anchors; every other one joins the anchor with the largest
    key cosine. A contextual token is its anchor's feature plus the mean of its members' features.

    Args:
        attention: [N] the relay token's attention to each patch (CLS left out), mean or sum of
            heads.
        keys: [N, d] head-mean keys of the same layer, unscaled.
        features: [N, C] patch features.
        dominant: patches to keep as they are, at least 0; CLS not counted.
        contextual: merged tokens, at least 0; dominant + contextual <= N.

    Returns:
        The dominant patches, and the contextual tokens with their members. Ties: the larger value
        first, then the lower index.

    Raises:
        SettingsError: the counts are negative or exceed the patches.
        ValueError: attention, keys and features are of different lengths.
    """
    n_patches = len(features)
    if attention.shape != (n_patches,) or len(keys) != n_patches:
        raise ValueError(
            f"attention {list(attention.shape)} and keys {list(keys.shape)} must have one row for "
            f"each of the {n_patches} patches (no CLS)"
        )
    if min(dominant, contextual) < 0 or dominant + contextual > n_patches:
        raise SettingsError(
            f"VisionZip cannot make {dominant} dominant and {contextual} contextual tokens of "
            f"{n_patches} patches: both must be >= 0 and their sum at most {n_patches}; lower the "
            "budget"
        )
    order = torch.sort(attention.detach().float(), descending=True, stable=True).indices
    kept, rest = order[:dominant].sort().values, order[dominant:].sort().values
    if contextual == 0:
        return Zipped(kept, rest, rest[:0], torch.full_like(rest, -1), features[:0])

    step = max(1, len(rest) // contextual)
    places = torch.arange(contextual, device=rest.device) * step
    units = functional.normalize(keys.detach().float()[rest], dim=1)
    group = float_products("qd,rd->qr", units, units[places]).argmax(dim=1)
    group[places] = torch.arange(contextual, device=rest.device)

    # Counted on the CPU: the device is not waited for.
    is_member = torch.ones(len(rest), dtype=torch.bool)
    is_member[torch.arange(contextual) * step] = False
    members = is_member.nonzero().squeeze(1).to(rest.device)
    sums, sizes = group_sums(features[rest[members]], group[members], contextual)
    merged = features[rest[places]].float() + sums / sizes.clamp(min=1).unsqueeze(1)
    return Zipped(kept, rest, rest[places], group, merged.to(features.dtype))


def split_budget(tokens: int, has_cls: bool = True) -> tuple[int, int]:
    """Split a budget into dominant and contextual tokens.

    The published presets (162 + 30, 108 + 20, 54 + 10, 27 + 5) have 10 contextual tokens in 64, a
    ratio of 5.4 : 1. So the contextual share is 10/64 of the budget, rounded to the nearest integer
    (half to even), but at least 1 as soon as the budget holds two patches: from 3 tokens on with
    CLS, from 2 on without.

    Args:
        tokens: tokens of one image, at least 1, CLS included if the tower has one.
        has_cls: whether the first dominant token is CLS.

    Returns:
        (dominant, contextual); they sum to tokens. The dominant ones include CLS if there is one.

    Raises:
        SettingsError: tokens is below 1.

    Example:
        >>> [split_budget(tokens) for tokens in (192, 64, 3, 1)]
        [(162, 30), (54, 10), (2, 1), (1, 0)]
        >>> split_budget(2, has_cls=False)
        (1, 1)
    """
    if tokens < 1:
        raise SettingsError(f"VisionZip needs a budget of at least 1 token per image, got {tokens}")
    patches = tokens - int(has_cls)
    contextual = max(round(tokens * 10 / 64), 1) if patches >= 2 else 0
    return tokens - contextual, contextual
