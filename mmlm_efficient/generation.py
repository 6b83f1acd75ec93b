"""What transformers' generate() is told: settings in force, and whose fault a refusal is."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmlm_efficient.errors import MMLMError, PromptError, SettingsError, UnsupportedError

# Steps of generate() that run the model: what fails inside them is no matter of settings.
_DECODING = ("_sample", "_beam_search", "_assisted_decoding", "_prefill")
_RUNNING = (nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__)


class Settings:
    """The generation settings of one call, and what is in force where the call gives none.

    Args:
        given: arguments of generate().
        default: the model's own GenerationConfig, which is never changed.

    Example:
        >>> from transformers import GenerationConfig
        >>> settings = Settings({"top_k": 3}, GenerationConfig(top_k=9, eos_token_id=2))
        >>> settings.value("top_k"), settings.token_ids("eos_token_id")
        (3, [2])
    """

    def __init__(self, given: Mapping[str, Any], default: Any) -> None:
        self.given = dict(given)
        self._default = default

    def value(self, name: str) -> Any:
        """A setting in force: the call's argument, its config's or the model's own."""
        value = self.given.get(name)
        for config in (self.given.get("generation_config"), self._default):
            if value is None and config is not None:
                value = getattr(config, name, None)
        return value

    def token_ids(self, name: str) -> list[int]:
        """Special token ids in force."""
        value = self.value(name)
        if value is None:
            return []
        if isinstance(value, Tensor):
            value = value.tolist()
        return [value] if isinstance(value, int) else list(value)

    def check_max_length(self, length: int) -> None:
        """Refuse a max_length that the caller's prompt of so many tokens uses up.

        Raises:
            PromptError: with both numbers.
        """
        longest = self.value("max_length")
        if longest is None or self.value("max_new_tokens") is not None:
            return
        if longest <= length:
            raise PromptError(
                f"max_length is {longest}, but the prompt alone has {length} tokens. "
                "Raise it, or use max_new_tokens."
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a cache that another device than the model's would have to hold.

        Raises:
            UnsupportedError: an offloaded cache without an accelerator.
        """
        cache = self.value("cache_implementation")
        if device.type == "cpu" and isinstance(cache, str) and "offloaded" in cache:
            raise UnsupportedError(
                f"cache_implementation={cache!r} moves keys and values from an accelerator to the "
                "CPU, but the model runs on the CPU already. Leave it out, or load the model on a "
                "GPU (device='cuda')."
            )

    def check_one_prompt(self) -> None:
        """Refuse a second prompt beside one that methods change inside the language model.

        Raises:
            UnsupportedError: guidance_scale.
        """
        scale = self.value("guidance_scale")
        if scale is not None and scale != 1:
            raise UnsupportedError(
                f"guidance_scale={scale!r} runs a second, unconditional prompt through the model, "
                "and methods inside the language model (or position_ids='original' without a "
                "cache) would take it for the first. Leave it out, or use only methods that "
                "prune before the language model (mmlm methods tells which do)."
            )

    def arguments(self, removed: int, tokenizer: Any = None, **own: Any) -> dict[str, Any]:
        """Arguments for generate() on a prompt that is shorter than the caller's.

        Args:
            removed: tokens by which it is; max_length and min_length count the caller's own.
            tokenizer: reads stop strings, if there are any and the call brings no other.
            own: further arguments, which win.
        """
        arguments = {**self.given, **own}
        for name in ("max_length", "min_length"):
            value = self.value(name)
            if value is not None and removed != 0:
                arguments[name] = max(0, value - removed)
        if self.value("stop_strings") is not None and tokenizer is not None:
            arguments.setdefault("tokenizer", tokenizer)
        return _folded(arguments)


def _folded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings beside a generation_config written into a copy of it: transformers gives up taking
    both. None stays an argument: in a config it means "not set", as an argument "off"."""
    if arguments.get("generation_config") is None:
        return arguments
    config = copy.deepcopy(arguments["generation_config"])
    rest = {"generation_config": config}
    for name, value in arguments.items():
        if name == "generation_config":
            continue
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
        else:
            rest[name] = value
    return rest


@contextmanager
def refusals(given: Mapping[str, Any]) -> Iterator[None]:
    """Turn what generate() refuses before it runs the model into errors of ours.

    What fails while the model runs, and in functions that the caller gave, comes through as it is.

    Args:
        given: the caller's settings, for the message.

    Raises:
        UnsupportedError: something is not installed, not found or not implemented.
        SettingsError: any other refusal.
    """
    try:
        yield
    except MMLMError:
        raise
    except (ImportError, OSError, NotImplementedError, AssertionError) as error:
        if _while_running(error, given):
            raise
        raise UnsupportedError(_refusal(error, given)) from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if _while_running(error, given):
            raise
        raise SettingsError(_refusal(error, given)) from error


def _refusal(error: Exception, given: Mapping[str, Any]) -> str:
    names = ", ".join(given)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"generate() of transformers refuses this call{f' ({names})' if names else ''}: {text}"


def _while_running(error: Exception, given: Mapping[str, Any]) -> bool:
    """Whether the error comes from the model, the decoding loop or the caller's own function."""
    own = getattr(given.get("custom_generate"), "__code__", None)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code in _RUNNING or code is own:
            return True
        if code.co_name in _DECODING and "transformers" in code.co_filename:
            return True
    return False
