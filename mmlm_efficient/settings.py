"""One schema for every way in: YAML files, presets, the command line, and keyword arguments.

```yaml
model: pocket            # or a folder, or a hub id
dtype: float32
device: cpu
quantization: null       # or int8, nf4
methods:
  - {name: flowcut, keep_tokens: 36}
  - random:0.25          # the compact form: NAME:TOKENS or NAME:RATIO
generation: {max_new_tokens: 32, do_sample: false}
```
Unknown keys are refused with the nearest valid one, never ignored.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, ValidationError
from torch import Tensor

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.registry import method_class

MethodLike: TypeAlias = "Method | str | Mapping[str, Any]"

# Arguments of generate() that are objects of a program, not settings of a file.
_PROGRAM_ARGUMENTS = ("inputs", "kwargs", "self")
# What generate() takes without having it in its signature.
_UNSIGNED_ARGUMENTS = ("tokenizer", "assistant_tokenizer")


def as_methods(value: MethodLike | Sequence[MethodLike] | None) -> tuple[Method, ...]:
    """Methods from every form they are written in.

    Args:
        value: a method object, a compact string such as "flowcut:64" or "none", a mapping such as
            {"name": "flowcut", "keep_tokens": 64}, a list of those, or None for no method.

    Raises:
        SettingsError: unknown method or option, naming the nearest valid one.

    Example:
        >>> [method.keep_tokens for method in as_methods("flowcut:64")]
        [64]
    """
    if value is None:
        return ()
    if isinstance(value, Method | str | Mapping):
        return (as_method(value),)
    if not isinstance(value, list | tuple):
        raise SettingsError(
            f"methods: expected a list of methods, got {value!r}. Write [flowcut:64], for example."
        )
    return tuple(as_method(one) for one in value)


def as_method(value: MethodLike) -> Method:
    """One method from an object, a compact string or a mapping; see `as_methods`."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return parse_method(value)
    if not isinstance(value, Mapping):
        raise SettingsError(
            f"methods: cannot read {value!r}. "
            "Write 'flowcut:64' or {name: flowcut, keep_tokens: 64}."
        )
    options = dict(value)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise SettingsError(
            f"methods: {dict(value)!r} has no name. Write {{name: flowcut, keep_tokens: 64}}."
        )
    return method_class(name)(**options)


def parse_method(text: str) -> Method:
    """A method from its compact form: NAME, NAME:TOKENS (a whole number) or NAME:RATIO (a decimal).

    Example:
        >>> parse_method("flowcut:0.25").keep_ratio
        0.25
    """
    name, colon, budget = text.strip().partition(":")
    cls = method_class(name.strip())
    if not colon:
        return cls()
    budget = budget.strip()
    whole = re.fullmatch(r"[+-]?\d+", budget) is not None
    field = "keep_tokens" if whole else "keep_ratio"
    if field not in cls.model_fields:
        raise SettingsError(f"method {text!r}: {name} takes no budget. Write {name!r} alone.")
    try:
        value = int(budget) if whole else float(budget)
    except ValueError as error:
        raise SettingsError(
            f"method {text!r}: the budget {budget!r} is no number. Write {name}:64 for 64 tokens "
            f"or {name}:0.25 for a quarter of them."
        ) from error
    return cls(**{field: value})


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Refuse names that do not exist, with the nearest one that does.

    Example:
        >>> refuse_unknown(["keep_tokens"], ["keep_tokens", "keep_ratio"], "method flowcut")
    """
    names = sorted(allowed)
    for name in given:
        if name not in names:
            close = nearest(str(name), names)
            hint = f"Did you mean {close!r}?" if close else f"Allowed: {', '.join(names)}."
            raise SettingsError(f"{where}: {name!r} is unknown. {hint}")


@functools.cache
def generation_names() -> frozenset[str]:
    """Every argument that transformers' generate() takes beside the model's inputs."""
    from transformers import GenerationConfig, GenerationMixin

    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    fields |= {*inspect.signature(GenerationMixin.generate).parameters, *_UNSIGNED_ARGUMENTS}
    return frozenset(fields - {"transformers_version", *_PROGRAM_ARGUMENTS})


def check_generation(given: Iterable[str], also: Iterable[str] = ()) -> None:
    """Refuse an argument that transformers' generate() does not have, naming the nearest.

    Args:
        given: argument names.
        also: further names that are allowed here, such as the model's inputs.
    """
    refuse_unknown(given, generation_names().union(also), "generation")


# Smallest whole number that each of these may be.
_AT_LEAST = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_length": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "prefill_chunk_size": 1,
    "prompt_lookup_num_tokens": 1,
}
# Numbers above 0, up to a limit.
_ABOVE_ZERO = {
    "temperature": math.inf,
    "repetition_penalty": math.inf,
    "top_p": 1.0,
    "typical_p": 1.0,
}


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_real(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return _is_number(value, int, float) and least <= value <= most


def _is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(fits(one) for one in value)


def _is_token_id(value: Any) -> bool:
    return _is_number(value, int, numbers.Integral)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_token_id(value) or _is_list_of(value, _is_token_id)


def _are_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return _is_list_of(texts, lambda text: isinstance(text, str) and text != "") and bool(texts)


# What else each of these may be, and how to say so.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "use_cache": (lambda value: isinstance(value, bool), "true or false"),
    "length_penalty": (_is_real, "a number"),
    "guidance_scale": (_is_real, "a number"),
    "min_p": (lambda value: _is_real(value, 0, 1), "a number from 0 to 1"),
    "max_time": (lambda value: _is_real(value, 0), "a number of seconds >= 0"),
    "eos_token_id": (_are_token_ids, "a token id (a whole number) or a list of them"),
    "pad_token_id": (_are_token_ids, "a token id (a whole number)"),
    "bos_token_id": (_are_token_ids, "a token id (a whole number)"),
    "stop_strings": (_are_texts, "a text or a list of texts, none of them empty"),
    "logits_processor": (lambda value: _is_list_of(value, callable), "a list of LogitsProcessor"),
    "stopping_criteria": (lambda value: _is_list_of(value, callable), "a list of StoppingCriteria"),
    "prefix_allowed_tokens_fn": (callable, "a function"),
    "custom_generate": (
        lambda value: callable(value) or isinstance(value, str),
        "a function, a folder or a hub id",
    ),
    "watermarking_config": (
        lambda value: isinstance(value, Mapping) or hasattr(value, "validate"),
        "a WatermarkingConfig or its names and values",
    ),
    "assistant_model": (lambda value: hasattr(value, "config"), "a model of transformers"),
}


def check_generation_values(given: Mapping[str, Any]) -> None:
    """Refuse values that transformers' generate() would stumble over later.

    Args:
        given: arguments of generate() by name.

    Raises:
        SettingsError: naming the argument and what it may be.

    Example:
        >>> check_generation_values({"num_beams": 2, "temperature": 0.7})
    """
    from transformers import GenerationConfig

    for name, least in _AT_LEAST.items():
        value = given.get(name)
        if value is not None and (not _is_number(value, int) or value < least):
            raise SettingsError(f"{name} must be a whole number >= {least}, got {value!r}.")
    for name, most in _ABOVE_ZERO.items():
        value = given.get(name)
        # Temperature 0 is a common way to say "no sampling".
        unused = name == "temperature" and value == 0 and not given.get("do_sample")
        if value is None or (unused and _is_number(value, int, float)):
            continue
        if not _is_number(value, int, float) or not 0 < value <= most or value == math.inf:
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise SettingsError(f"{name} must be a number above 0{limit}, got {value!r}.")
    for name, (fits, allowed) in _FORMS.items():
        value = given.get(name)
        if value is not None and not fits(value):
            raise SettingsError(f"{name} must be {allowed}, got {value!r:.80}.")
    config = given.get("generation_config")
    if not isinstance(config, GenerationConfig | None):
        raise SettingsError(
            f"generation_config: expected a transformers.GenerationConfig, got {config!r:.80}."
        )


# Arguments of generate() whose results do not fit into one answer.
_NOT_FOR_ANSWERS = {
    "max_length": "Use max_new_tokens, which does not depend on the prompt.",
    "num_return_sequences": "An answer is one text; use generate().",
    "return_dict_in_generate": "The answer holds the result already; use generate() for tensors.",
    "streamer": "Use stream(), or generate() with a streamer of your own.",
}


def check_for_answers(given: Mapping[str, Any], max_new_tokens: Any) -> None:
    """Refuse generation settings that a question cannot be answered with.

    Args:
        given: arguments of generate() by name.
        max_new_tokens: upper limit of the answer.

    Raises:
        SettingsError: naming the argument and what to use instead.

    Example:
        >>> check_for_answers({"num_beams": 2}, max_new_tokens=64)
    """
    check_generation(given)
    for name, advice in _NOT_FOR_ANSWERS.items():
        if name in given:
            raise SettingsError(f"{name}: cannot be used here. {advice}")
    check_generation_values(given)
    config = given.get("generation_config")
    if config is not None and (config.num_return_sequences or 1) > 1:
        raise SettingsError(
            "generation_config.num_return_sequences: cannot be used here. "
            + _NOT_FOR_ANSWERS["num_return_sequences"]
        )
    if not _is_number(max_new_tokens, int) or max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens must be an integer >= 1, got {max_new_tokens!r}.")


def _generation(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SettingsError(
            f"generation: expected names and values, got {value!r}. Write {{max_new_tokens: 32}}."
        )
    check_generation(value, also=("seed",))
    check_generation_values(value)
    return dict(value)


class Config(BaseModel):
    """One model with its methods and generation settings: what a YAML file holds.

    Raises:
        SettingsError: from `Config.read` and `load_config`; building it directly raises
            pydantic's own error, which is a ValueError too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field("pocket", min_length=1, description="'pocket', a folder, or a hub id")
    dtype: str | None = Field(None, description="float32, bfloat16, float16 or auto")
    device: str = Field("cpu", description="cpu, cuda, cuda:N, mps or auto")
    quantization: str | None = Field(None, description="int8 or nf4, the language model only")
    attn_implementation: str | None = Field(None, description="attention kernel of transformers")
    vision_tower: str | None = Field(
        None, description="folder of the tower, for models of the original LLaVA code"
    )
    methods: Annotated[tuple[SkipValidation[Method], ...], BeforeValidator(as_methods)] = ()
    generation: Annotated[dict[str, Any], BeforeValidator(_generation)] = Field(
        default_factory=dict, description="arguments of transformers' generate(), and seed"
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str = "config") -> Config:
        """Check a mapping against the schema.

        Args:
            values: what a YAML file or a request holds.
            where: how errors name it.

        Raises:
            SettingsError: unknown key (with the nearest valid one) or bad value, with its place.

        Example:
            >>> Config.read({"methods": ["none"]}).model
            'pocket'
        """
        refuse_unknown(values, cls.model_fields, where)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, SettingsError):
                raise SettingsError(f"{where}: {cause}") from cause
            place = ".".join(str(part) for part in first["loc"])
            raise SettingsError(
                f"{where}: {place}: {first['msg']}, got {first['input']!r}."
            ) from error

    def load_options(self) -> dict[str, Any]:
        """The arguments of `mmlm_efficient.load` that this config stands for."""
        names = ("methods", "dtype", "device", "quantization", "attn_implementation")
        options = {name: getattr(self, name) for name in (*names, "vision_tower")}
        return {"source": self.model, **options}


def load_config(source: str | os.PathLike[str]) -> Config:
    """Read a YAML file, or a preset by its name.

    Args:
        source: path of a YAML file, or a name that `preset_names` lists, as "flowcut-llava15-64".

    Raises:
        SettingsError: no such file or preset, not YAML, or against the schema.

    Example:
        >>> load_config("pocket").model
        'pocket'
    """
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    presets = _presets()
    if not path.is_file():
        if name not in presets:
            close = nearest(name, presets)
            hint = f" Did you mean {close!r}?" if close else ""
            raise SettingsError(
                f"config: {name!r} is neither a file nor a preset.{hint} "
                f"Presets: {', '.join(presets)}."
            )
        path = presets[name]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}: is not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise SettingsError(f"{name}: holds {type(values).__name__}, not names and values.")
    return Config.read(values, name)


def preset_names() -> list[str]:
    """Names that `load_config` takes beside paths.

    Example:
        >>> "flowcut-llava15-64" in preset_names()
        True
    """
    return list(_presets())


def _presets() -> dict[str, Path]:
    """Preset files by name: inside an installed package, or in configs/ of a checkout."""
    files = [file for kind in ("models", "methods") for file in preset_folder(kind).glob("*.yaml")]
    return {file.stem: file for file in sorted(files)}
