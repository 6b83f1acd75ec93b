"""What transformers' generate() is told: settings in force, and whose fault a refusal is."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StopStringCriteria

from mmlm_efficient.callbacks import CallersPrompt, is_transformers_own
from mmlm_efficient.clock import Watch
from mmlm_efficient.errors import MMLMError, PromptError, SettingsError, UnsupportedError
from mmlm_efficient.prepare import Prepared
from mmlm_efficient.sampling import Draws
from mmlm_efficient.stations.handed import NUMBERS_ROWS

# Steps of generate() that run the model: what fails inside them is no matter of settings.
_DECODING = ("_sample", "_beam_search", "_assisted_decoding", "_prefill")
CALLBACKS = ("logits_processor", "stopping_criteria")
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

    def check_possible(self, device: torch.device) -> None:
        """Refuse what no multimodal model, or none on this device, can do.

        Raises:
            UnsupportedError: an offloaded cache without an accelerator, or an early exit.
        """
        if self.value("assistant_early_exit") is not None:
            raise UnsupportedError(
                "assistant_early_exit: transformers drafts tokens with fewer layers of a text "
                "model alone; a multimodal one has no such layers of its own. Leave it out, or "
                "draft with assistant_model or prompt_lookup_num_tokens."
            )
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

    def arguments(self, prompt: CallersPrompt | None, tokenizer: Any = None) -> dict[str, Any]:
        """Arguments for generate() on a prompt that may be shorter than the caller's.

        Args:
            prompt: the caller's, which max_length, min_length and the caller's functions go by;
                None where the model runs just that.
            tokenizer: reads stop strings, if there are any and the call brings no other.
        """
        arguments = dict(self.given)
        if self.value("stop_strings") is not None and tokenizer is not None:
            arguments.setdefault("tokenizer", tokenizer)
        if prompt is None:
            return arguments
        for name in ("max_length", "min_length"):
            if (value := self.value(name)) is not None:
                arguments[name] = max(0, value - prompt.removed)
        beams, copies = self.value("num_beams") or 1, self.value("num_return_sequences") or 1
        repeats = max(beams, copies) // beams if NUMBERS_ROWS else 1
        return {**arguments, **prompt.callbacks(arguments, repeats)}

    def stop_strings(self, arguments: Mapping[str, Any]) -> list[StoppingCriteria]:
        """The criterion that generate() makes of stop strings, if there are any."""
        strings = self.value("stop_strings")
        if strings is None:
            return []
        return [StopStringCriteria(tokenizer=arguments["tokenizer"], stop_strings=strings)]


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
def seeded(
    seed: int, device: torch.device, settings: Settings, arguments: dict[str, Any]
) -> Iterator[None]:
    """Seed the draws of a call of generate(), where it draws.

    Args:
        seed: whole number from 0 to 2**63 - 1.
        device: where the logits are.
        settings: of the call.
        arguments: for generate(); functions that switch the draws on and off are added.
    """
    with Draws(seed, device) as draws:
        if settings.value("custom_generate") is not None:
            draws.on()  # where a loop of the caller's draws is not known
        elif settings.value("do_sample") or settings.given.keys() & CALLBACKS:
            # The caller's own functions may draw as well: on before them, off behind them.
            given = (arguments.get(name) or [] for name in CALLBACKS)
            processors, criteria = given
            arguments["logits_processor"] = [draws.processor, *processors]
            arguments["stopping_criteria"] = [*criteria, draws.criterion]
        yield


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


def generated(
    model: Any,
    prepared: Prepared,
    settings: Settings,
    seed: int | None,
    prompt: CallersPrompt,
    tokenizer: Any,
    watch: Watch | None = None,
    **own: Any,
) -> Any:
    """What transformers' generate() returns for a prepared request, under all its methods.

    Args:
        model: what runs, wrappers of others among it.
        prepared: the request.
        settings: of the call.
        seed: of its draws, or None.
        prompt: the caller's, of which the model may run less.
        tokenizer: reads stop strings.
        watch: looks on, if anybody wants to know.
        own: further arguments of generate(), which win.

    Raises:
        SettingsError, UnsupportedError: a setting that generate() refuses, or that does not go
            with the request's methods; a method that did not act.
    """
    device = prepared.parts.family.input_device
    settings.check_possible(device)
    without_cache = prepared.watches_layers and settings.value("use_cache") is False
    if prepared.cuts_layers or prepared.changes_attention or without_cache:
        settings.check_one_prompt()
    cut = bool(prepared.layout.removed.any())
    arguments = {**settings.arguments(prompt if cut else None, tokenizer), **own}
    if watch is not None:
        given = arguments.get("stopping_criteria") or []
        # transformers' own stay in sight of generate(), which knows them by their type.
        watch.criteria = [one for one in given if not is_transformers_own(one)]
        watch.stop_strings = [
            *(one for one in given if isinstance(one, StopStringCriteria)),
            *settings.stop_strings(arguments),
        ]
        arguments["stopping_criteria"] = [*filter(is_transformers_own, given), watch]
    with ExitStack() as stack:
        stack.enter_context(prepared.active())
        if seed is not None:
            stack.enter_context(seeded(seed, device, settings, arguments))
        stack.enter_context(refusals(settings.given))
        output = model.generate(**prepared.model_inputs, **_folded(arguments))
    sequences = output if isinstance(output, Tensor) else output.sequences
    prepared.check_acted(sequences.shape[1] - prompt.width)
    return output
