"""Models that somebody wrapped before us: compiled, off-loaded, split over devices, with adapters.

What is inside says what kind of model it is; what was given is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmlm_efficient.errors import UnsupportedError


def model_inside(model: Any) -> Any:
    """The model of transformers in a wrapper such as torch.compile's or PEFT's; itself without one.

    Raises:
        UnsupportedError: there is none inside, or the wrapper cannot stand in for it.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    inside = next((one for one in parts if isinstance(one, PreTrainedModel)), model)
    if inside is model:
        return model
    kind = type(model).__name__
    if not hasattr(model, "generate"):
        raise UnsupportedError(
            f"{kind}: has no generate(). Give the {type(inside).__name__} that is inside it."
        )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UnsupportedError(
            f"{kind} with {type(adapter).__name__}: puts learnt tokens before the prompt, which "
            "methods cannot follow. Adapters of the weights work, such as LoRA."
        )
    return inside


def input_device(model: Any) -> torch.device:
    """Where a model's inputs belong: with its input embeddings, or where accelerate runs them.

    Args:
        model: a model of transformers.

    Raises:
        UnsupportedError: the weights are on the meta device and nothing brings them elsewhere.
    """
    embeddings = model.get_input_embeddings()
    for hook in _hooks_of(embeddings):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    device: torch.device = next(embeddings.parameters()).device
    if device.type == "meta":
        raise UnsupportedError(
            f"{type(model).__name__}: its weights are on the meta device, which holds none. Load "
            "them (from_pretrained), or dispatch the model with accelerate first."
        )
    return device


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Have the parameters that a module holds itself in memory inside the ``with`` block.

    accelerate brings those it has put elsewhere for the module's forward() alone; this is for
    calling other methods of the module.
    """
    hooks = _hooks_of(module)
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
