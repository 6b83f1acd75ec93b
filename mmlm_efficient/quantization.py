"""8-bit and 4-bit weights for the language model, through bitsandbytes.

Only the linear layers of the language model are quantised. The vision tower, the projector and the
output head stay as they are: they are small, and pruning decisions read the tower's attention. It
saves memory, not time.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from mmlm_efficient.errors import ModelLoadError, SettingsError, nearest, require_extra

Quantization: TypeAlias = Literal["int8", "nf4"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


def check_quantization(name: str | None) -> None:
    """Refuse an unknown kind of quantization, and a known one without bitsandbytes.

    Raises:
        SettingsError: the name is neither None, "int8" nor "nf4".
        MissingExtraError: bitsandbytes is not installed.
    """
    if name is None:
        return
    if name not in QUANTIZATIONS:
        close = nearest(str(name), QUANTIZATIONS)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(
            f"quantization: {name!r} is unknown; allowed: None, 'int8', 'nf4'.{hint}"
        )
    require_extra("bitsandbytes", "quantization")


def skipped_modules(config: Any) -> list[str]:
    """Full names of the largest modules beside the language model of a config.

    bitsandbytes ignores names without their full prefix, and as soon as a list is given it no
    longer skips the output head by itself. So the names are read off the model, built without
    memory: everything that branches off on the way down to the language model.

    Args:
        config: config of a multimodal model.

    Returns:
        For Llava: ["lm_head", "model.multi_modal_projector", "model.vision_tower"].
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    path = language_model_name(model)
    skipped = []
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        beside = parent == "" or path.startswith(parent + ".")
        on_path = path == name or path.startswith(name + ".")
        if name and beside and not on_path and any(True for _ in module.parameters()):
            skipped.append(name)
    return sorted(skipped)


def language_model_name(model: Any) -> str:
    """Full module name of the language model inside a multimodal model, as "model.language_model".

    Raises:
        ModelLoadError: the model has no language model inside it.
    """
    decoder = model.get_decoder()
    name: str
    for name, module in model.named_modules():
        if module is decoder and name:
            return name
    raise ModelLoadError(
        f"{type(model).__name__}: no language model inside it to quantise. "
        "Load it with quantization=None."
    )


def quantization_config(name: Quantization, skip: list[str], compute_dtype: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig for one kind of quantization.

    Args:
        name: "int8" (LLM.int8, outliers above 6 in half precision) or "nf4" (4-bit normal float).
        skip: modules that stay as they are, with their full names.
        compute_dtype: dtype of the activations of 4-bit layers.
    """
    from transformers import BitsAndBytesConfig

    if name == "int8":
        # One line per layer and call that activations are cast to float16: known and documented.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def verify_quantized(model: nn.Module, name: Quantization, skip: list[str]) -> None:
    """Check that exactly the language model's linear layers were quantised.

    Raises:
        ModelLoadError: a skip name matched no module, a layer outside the language model was
            quantised, or one inside was not.
    """
    bnb = require_extra("bitsandbytes", "quantization")
    quantized = bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit
    modules = dict(model.named_modules())
    unmatched = [module for module in skip if module not in modules]
    if unmatched:
        raise ModelLoadError(
            f"quantization {name}: the names to leave out match no module: {', '.join(unmatched)}. "
            f"Modules of this model: {', '.join(child for child, _ in model.named_children())}."
        )
    prefix = language_model_name(model) + "."
    linear = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    outside = [
        p for p, m in linear.items() if isinstance(m, quantized) and not p.startswith(prefix)
    ]
    missed = [p for p, m in linear.items() if p.startswith(prefix) and not isinstance(m, quantized)]
    if outside or missed:
        wrong = ", ".join((outside + missed)[:4])
        raise ModelLoadError(
            f"quantization {name}: expected the linear layers of {prefix[:-1]} and no others, but "
            f"{len(outside)} outside were quantised and {len(missed)} inside were not ({wrong})."
        )
