"""What the original LLaVA code calls its tensors, in the words of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedConfig

from mmlm_efficient.errors import ModelLoadError

TOWER = "model.vision_tower."
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
NEWLINE = "model.image_newline"

# Original prefix, ours; the first that fits counts. Towers saved by transformers 5 lack
# "vision_model.".
_RENAMES = (
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_tower.", TOWER),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    (NEWLINE, NEWLINE),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    (HEAD, HEAD),
)
# Buffers that old versions of transformers stored; they are computed.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|(^|\.)embeddings\.position_ids$")
# The parts of CLIPModel and SiglipModel beside the tower.
_BESIDE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_")
_LAYER = re.compile(r"^model\.vision_tower\.encoder\.layers\.(\d+)\.")


def layers_of(names: Iterable[str]) -> int:
    """How many tower layers these names of transformers hold."""
    return 1 + max((int(found[1]) for name in names if (found := _LAYER.match(name))), default=-1)


def converted_name(name: str) -> str | None:
    """The name of transformers for a tensor of the original; None for a buffer that is computed.

    Raises:
        KeyError: the original has no such tensor.

    Example:
        >>> converted_name("model.mm_projector.2.bias")
        'model.multi_modal_projector.linear_2.bias'
        >>> converted_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
        True
    """
    if _BUFFERS.search(name):
        return None
    for old, new in _RENAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def original_name(name: str) -> str:
    """The original's name for a tensor of transformers, for messages.

    Example:
        >>> original_name("model.vision_tower.pre_layrnorm.bias")
        'model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias'
    """
    for old, new in _RENAMES:
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def converted_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of transformers, without the buffers.

    Args:
        state: by their original names.

    Raises:
        ModelLoadError: naming the tensors that have no place.
    """
    converted: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        try:
            new = converted_name(name)
        except KeyError:
            unknown.append(name)
            continue
        if new is not None:
            converted[new] = tensor
    if unknown:
        raise ModelLoadError(left_over(unknown))
    return converted


def converted_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower in a separate CLIP or SigLIP checkpoint, under the names it has in a LLaVA.

    The text model, the projections and the logit scale beside it are dropped.
    """
    return {
        TOWER + name.removeprefix("vision_model."): tensor
        for name, tensor in state.items()
        if not name.startswith(_BESIDE_TOWER) and not _BUFFERS.search(name)
    }


def without_cut(state: dict[str, Tensor], vision: PreTrainedConfig) -> dict[str, Tensor]:
    """Without what the original deletes from a SigLIP tower: the last layer and the head."""
    if vision.model_type != "siglip_vision_model":
        return state
    gone = (f"{TOWER}head.", f"{TOWER}encoder.layers.{vision.num_hidden_layers}.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(gone)}


def left_over(names: Sequence[str]) -> str:
    """The message for tensors that have no place, by their original names."""
    shown = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
    return (
        f"{len(names)} tensors of the weights have no place in the model: {shown}. The folder "
        "holds another kind of model than its config.json says."
    )
