"""Station 2 for one request: methods choose among the tokens, the prompt shrinks to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlm_efficient.encoding import Tower
from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families import Family
from mmlm_efficient.families.base import Visual
from mmlm_efficient.pruning.base import PruningMethod, Scene
from mmlm_efficient.stations.bridge import PromptLayout, check_visible, shortened
from mmlm_efficient.tokens import CLS_INDEX, VisualTokens

if TYPE_CHECKING:
    from mmlm_efficient.prepare import LMMParts


def reduced(
    method: PruningMethod,
    parts: LMMParts,
    tower: Tower,
    samples: Sequence[int],
) -> list[VisualTokens]:
    """The tokens of every image after a bridge method.

    Args:
        method: who decides at the bridge.
        parts: the model.
        tower: what station 1 gave.
        samples: for each image its prompt.
    """
    family = parts.family
    lead = int(family.keeps_cls)
    budgets = method.budgets([len(tokens) for tokens in tower.tokens])
    encoded = tower.encoded
    result = []
    for image, (tokens, budget) in enumerate(zip(tower.tokens, budgets, strict=True)):
        # A CLS token always stays, and is one of the budget.
        n_cls = int((tokens.index[:lead] == CLS_INDEX).sum())
        patches = tokens.take(torch.arange(n_cls, len(tokens)))
        observed = []
        if encoded is not None and encoded.crops is not None:
            observed = [crop.observed for crop in encoded.crops[image] if crop.observed is not None]
        scene = Scene(
            visual=tower.visuals[image],
            observed=observed,
            n_together=list(samples).count(samples[image]),
            budget=max(0, budget - n_cls),
            pixels=tower.pixels[image],
            pack=_packer(family, tower.visuals[image]),
            identity=parts.identity,
            stats=parts.image_stats,
            cache={} if encoded is None else encoded.caches[image],
        )
        fewer = method.reduce(patches, scene)
        result.append(_behind_cls(tokens, n_cls, fewer))
    return result


def _packer(family: Family, visual: Visual) -> Any:
    def pack(values: Tensor, newline: float) -> Tensor:
        return family.pack(values, visual, values.new_full((values.shape[-1],), newline))

    return pack


def _behind_cls(tokens: VisualTokens, n_cls: int, fewer: VisualTokens) -> VisualTokens:
    """The reduced tokens with the CLS token in front again."""
    if n_cls == 0:
        return fewer
    members, scores = fewer.members, fewer.scores
    return VisualTokens(
        features=torch.cat([tokens.features[:n_cls], fewer.features]),
        index=torch.cat([tokens.index[:n_cls], fewer.index]),
        places=tokens.places,
        image=tokens.image,
        members=None if members is None else (((),) * n_cls + members),
        # CLS always stays: later stations rank it first.
        scores=None
        if scores is None
        else torch.cat([scores.new_full((n_cls,), torch.inf), scores]),
        notes=fewer.notes,
    )


def cut_prompt(
    parts: LMMParts,
    inputs: Mapping[str, Any],
    layout: PromptLayout,
    tokens: Sequence[VisualTokens],
    stock: Sequence[int],
    *,
    original: bool,
    names: Sequence[str],
) -> tuple[PromptLayout, dict[str, Any]] | None:
    """The prompt without the placeholders of tokens that are gone; None if nothing is.

    Args:
        parts: the model.
        inputs: model inputs without pixels.
        layout: the uncut prompt.
        tokens: the tokens of every image that enter the language model.
        stock: how many each had.
        original: kept tokens keep their positions.
        names: of the methods, for messages.

    Raises:
        SettingsError: a token without a place of its own was to keep its position.
    """
    family = parts.family
    lead = int(family.keeps_cls)
    keep = {}
    for one in tokens:
        whole = len(one) == stock[one.image] and one.ordered
        if whole:
            continue
        places = one.index + lead
        if bool((places < 0).any()):
            if original:
                raise SettingsError(
                    f"{', '.join(names)}: the CLS token that is kept has no position among the "
                    "patches: position_ids='original' is not possible, use 'compact' or 'auto'"
                )
            places = torch.arange(len(one))
        keep[one.image] = places
    if not keep:
        return None
    check_visible(layout)
    axes = family.position_axes(inputs) if family.axes else None
    layout, source = layout.cut(keep)
    config = family.model.config
    pad = getattr(config, "pad_token_id", None)
    if pad is None:
        pad = getattr(config.get_text_config(), "pad_token_id", None)
    return layout, shortened(
        inputs,
        layout,
        source,
        pad_token_id=0 if pad is None else int(pad),
        original_positions=original,
        axes=axes,
    )
