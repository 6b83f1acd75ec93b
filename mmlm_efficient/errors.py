"""The exceptions that users of this project see.

Every message says what is wrong, where, what is allowed and what to do. All of them derive from
:class:`MMLMError`, and each also derives from the built-in exception a caller would expect, so
that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class MMLMError(Exception):
    """Base class of every error that this project raises on purpose."""


class SettingsError(MMLMError, ValueError):
    """A setting is unknown, out of range, or clashes with another one."""


class MediaError(MMLMError, ValueError):
    """An image or a video cannot be read or breaks a limit."""


class PromptError(MMLMError, ValueError):
    """The prompt does not fit its images or the model's context."""


class ContextError(PromptError):
    """The prompt is longer than the model's context."""


class UnsupportedError(MMLMError, ValueError):
    """The combination of model, method and option is not supported."""


class ModelLoadError(MMLMError, OSError):
    """A model cannot be found or loaded."""


class DataError(MMLMError, ValueError):
    """A task or its data set cannot be used: missing, damaged, or not what the task says."""


class RunError(MMLMError, RuntimeError):
    """A run could not be finished; what it had finished is kept."""


class MissingExtraError(MMLMError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name closest to a misspelt one, for "did you mean" hints.

    Args:
        name: what the user wrote.
        names: the valid names.

    Returns:
        The closest valid name, or None when nothing is similar.

    Example:
        >>> nearest("flowcat", ["none", "flowcut"])
        'flowcut'
    """
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency or say which extra installs it.

    Args:
        module: module to import, such as ``"matplotlib"``.
        extra: name of the extra of this project that contains it.

    Raises:
        MissingExtraError: the module is not installed.

    Example:
        >>> require_extra("json", "dev").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A broken import inside an installed package is a different problem: let it show.
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        message = (
            f"'{module}' is not installed. Install it with: pip install 'mmlm-efficient[{extra}]'"
        )
        raise MissingExtraError(message) from error
