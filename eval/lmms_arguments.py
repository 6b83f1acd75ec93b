"""The --model_args of lmms-eval, read with the schema of everything else.

lmms-eval cuts them at commas outside brackets and turns whole numbers, decimals, true and false
into values; None, lists and anything else stay texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.registry import METHODS, method_class
from mmlm_efficient.settings import Config, as_methods, load_config, refuse_unknown

_WHERE = "model_args"
# Argument by field of Config.
_TEXTS = {
    "pretrained": "model",
    "dtype": "dtype",
    "device": "device",
    "quantization": "quantization",
    "attn_implementation": "attn_implementation",
    "vision_tower": "vision_tower",
}
_OWN = (
    "config",
    "methods",
    "method",
    "max_new_tokens",
    "seed",
    "config_sha",
    "batch_size",
    "max_batch_size",
)


@dataclass(frozen=True)
class Arguments:
    """What the adapter was asked to do.

    Attributes:
        model: what to load, with methods and the generation settings that tasks leave open.
        batch_size: samples at once.
        seed: of sampling.
    """

    model: Config
    batch_size: int
    seed: int


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check and read the arguments of the adapter.

    Args:
        given: by name:
            pretrained: "pocket", a folder or a hub id.
            config: YAML file or preset; every other argument overrides what it says.
            methods: "flowcut:72+fastv:36", "[flowcut:72,fastv:36]", "none".
            method: one method by name, with its settings as arguments beside it.
            dtype, device, quantization, attn_implementation, vision_tower: as in `Config`.
            max_new_tokens: where a task sets no limit.
            seed: of sampling, 0 if not given.
            config_sha: a label that tells lmms-eval's cache one config from another; not used.
            batch_size, max_batch_size: whole numbers; the second one is only for lmms-eval's
                automatic batch size, which is refused.

    Raises:
        SettingsError: an unknown argument, naming the nearest, or a bad value.

    Example:
        >>> read_arguments({"method": "flowcut", "keep_tokens": 36}).model.methods[0].keep_tokens
        36
    """
    values = {
        name: None if value == "None" and name != "methods" else value
        for name, value in given.items()
    }
    fields = _method_fields(values)
    base = _base(values)
    for name, field in _TEXTS.items():
        if values.get(name) is not None:
            base[field] = str(values[name])
    methods = _methods(values, fields)
    if methods is not None:
        base["methods"] = methods
    generation = dict(base.get("generation", {}))
    if values.get("max_new_tokens") is not None:
        generation["max_new_tokens"] = _whole("max_new_tokens", values["max_new_tokens"], 1)
    seed = values.get("seed")
    seed = generation.pop("seed", None) if seed is None else seed
    base["generation"] = generation
    batch_size = values.get("batch_size")
    if values.get("max_batch_size") is not None:
        _whole("max_batch_size", values["max_batch_size"], 1)
    return Arguments(
        model=Config.read(base, _WHERE),
        batch_size=1 if batch_size is None else _whole("batch_size", batch_size, 1),
        seed=0 if seed is None else _whole("seed", seed, 0),
    )


def _base(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("config") is None:
        return {}
    config = load_config(str(values["config"]))
    return {name: getattr(config, name) for name in Config.model_fields}


def _method_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that belong to the method; names that belong to nothing are refused."""
    known = {*_TEXTS, *_OWN}
    method = values.get("method")
    if method is None:
        of_methods = {name for one in METHODS.values() for name in one.model_fields}
        for name in values:
            if name not in known and name in of_methods:
                raise SettingsError(
                    f"{_WHERE}: {name!r} is a setting of a method, but no method is named. Write "
                    f"method=flowcut,{name}=..., or methods=flowcut:64."
                )
        refuse_unknown(values, known, _WHERE)
        return {}
    if values.get("methods") is not None:
        raise SettingsError(
            f"{_WHERE}: method and methods exclude each other. Write method=flowcut,keep_tokens=64 "
            "for one method, methods=flowcut:72+fastv:36 for several."
        )
    fields = set(method_class(str(method)).model_fields) - known
    refuse_unknown(values, known | fields, f"{_WHERE} (method {method})")
    return {name: _value(value) for name, value in values.items() if name in fields}


def _methods(values: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[Method, ...] | None:
    if values.get("method") is not None:
        return as_methods({"name": str(values["method"]), **fields})
    written = values.get("methods")
    if not isinstance(written, str):
        return None if written is None else as_methods(written)
    text = written.strip()
    if "{" in text:
        return as_methods(_value(text))
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    names = [name.strip().strip("'\"") for name in text.replace("+", ",").split(",")]
    return as_methods(["none" if name == "None" else name for name in names if name])


def _value(value: Any) -> Any:
    """Lists and mappings, which lmms-eval leaves texts."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"{_WHERE}: {value!r} cannot be read: {error}") from error


def _whole(name: str, value: Any, least: int) -> int:
    if name.endswith("batch_size") and isinstance(value, str) and value.startswith("auto"):
        raise SettingsError(
            f"{name}={value}: finding the batch size automatically is not supported. Write a "
            "whole number; answers do not depend on it."
        )
    try:
        number = int(value) if isinstance(value, int | str) else None
    except ValueError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise SettingsError(f"{name} must be a whole number >= {least}, got {value!r}.")
    return number
