"""Which model inputs methods can work on, and where the images are in their prompts.

What methods cannot follow (a filled cache, features instead of pixels, another feature layer, a
mask of another form) is the stock model's to run where there is nothing for them to do, and refused
by its name where there is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from mmlm_efficient.errors import MMLMError, PromptError, UnsupportedError
from mmlm_efficient.families import Family
from mmlm_efficient.families.base import Visual
from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.stations.bridge import (
    Block,
    PaddingSide,
    PromptLayout,
    check_images_given,
    check_mask,
    find_blocks,
)
from mmlm_efficient.stations.handed import CACHE, given_cache


def forward_arguments(family: Family) -> set[str]:
    """Names of the arguments that a model's forward() takes."""
    takes: set[str] = set()
    for part in (family.model, family.backbone, family.decoder.module):
        takes.update(inspect.signature(type(part).forward).parameters)
    # What the models take as `**kwargs` and hand on.
    return {*takes, *TransformersKwargs.__annotations__, "return_dict"} - {"self", "kwargs"}


def input_ids_of(inputs: Mapping[str, Any]) -> Tensor:
    """The token ids [B, S] of model inputs.

    Raises:
        PromptError: there are none.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise PromptError(
            "input_ids: expected an int64 tensor [batch, length], as the processor returns it "
            "with return_tensors='pt'."
        )
    return ids


def behind(own_ids: Tensor, new_ids: Tensor) -> Tensor:
    """The caller's prompts [B, S] in front of the new tokens [B * n, new].

    Example:
        >>> behind(torch.tensor([[1, 2]]), torch.tensor([[7], [8]])).tolist()
        [[1, 2, 7], [1, 2, 8]]
    """
    own_ids = own_ids.to(new_ids.device)
    repeats = new_ids.shape[0] // own_ids.shape[0]
    return torch.cat([own_ids.repeat_interleave(repeats, dim=0), new_ids], dim=1)


def needs_stock(family: Family, inputs: Mapping[str, Any], methods: Sequence[Method]) -> bool:
    """Whether only the stock model can run the inputs; refused if methods have images to work on.

    A filled cache may hold images: methods that change attention refuse it whatever is shown.

    Args:
        family: of the model.
        inputs: model inputs, none of them None.
        methods: of the request.

    Raises:
        UnsupportedError, PromptError: naming the input, why, and what to do.
    """
    ids = inputs["input_ids"]
    shows_images = any(name in inputs for name in (*family.consumed, "mm_encoder_outputs")) or any(
        bool((ids == one).any()) for one in family.placeholders.values()
    )
    working = any(isinstance(one, PruningMethod) or one.owned_stations for one in methods)
    attending = any("attention" in one.owned_stations for one in methods)
    try:
        _check_followed(family, inputs)
    except MMLMError:
        if (working and shows_images) or (attending and _cached(inputs)):
            raise
        return True
    return False


def _check_followed(family: Family, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that methods cannot follow, each by its name."""
    stock = "or give methods=() to run the stock model"
    if cached := _cached(inputs):
        raise UnsupportedError(
            f"{CACHE}: holds {cached} tokens already. Methods see images only in a prompt "
            "that starts with an empty cache: leave it out and give the whole conversation with "
            f"its pixel_values, {stock}."
        )
    for name in ("mm_encoder_outputs", "inputs_embeds"):
        if name in inputs:
            raise UnsupportedError(
                f"{name}: holds what the vision tower made of the images, but with methods the "
                f"tower runs here. Give pixel_values and input_ids instead, {stock}."
            )
    for name, value in family.feature_arguments.items():
        if name in inputs and inputs[name] != value:
            raise UnsupportedError(
                f"{name}: with methods, images have the features that the model's config names "
                f"({name}={value!r}), and this call asks for others. Leave it out, set it in the "
                f"config before the EfficientLMM is made, {stock}."
            )
    check_mask(inputs)


def _cached(inputs: Mapping[str, Any]) -> int:
    """Tokens that the caller's cache holds."""
    cache = given_cache(inputs)
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise PromptError(
            f"{CACHE}: expected a Cache of transformers, got {type(cache).__name__}. Give "
            "the object that an earlier call returned, or leave it out."
        )
    return int(cache.get_seq_length())


def uncut_layout(
    family: Family, inputs: Mapping[str, Any], visuals: Sequence[Visual], side: PaddingSide
) -> PromptLayout:
    """Find and check the image blocks; there are none where the stock model runs the images.

    Args:
        family: of the model.
        inputs: model inputs, none of them None.
        visuals: the images and videos that run before the model.
        side: side on which shortened prompts are padded.

    Raises:
        PromptError: placeholders and images do not match.
    """
    ids, placeholders = inputs["input_ids"], family.placeholders
    blocks: tuple[tuple[Block, ...], ...] = ((),) * len(ids)
    given = {*family.pixel_inputs, "mm_encoder_outputs", "inputs_embeds"}
    if visuals:
        sizes = [(placeholders[visual.kind], family.tokens_of(visual)) for visual in visuals]
        blocks = find_blocks(ids, sizes)
        left = set(placeholders.values()) - {placeholder for placeholder, _ in sizes}
        for placeholder in left:
            check_images_given(ids, placeholder, family.usual_tokens, _cached(inputs))
    elif not given & set(inputs):
        for placeholder in placeholders.values():
            check_images_given(ids, placeholder, family.usual_tokens, _cached(inputs))
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    return PromptLayout.of(mask, blocks, side)
