"""The files that a row's settings name, by their contents: an edited profile is another row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.names import model_name
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.vflowopt_profiles import built_in, named_profile

_DIGITS = 12


def file_digests(method: Method, model: str) -> dict[str, str]:
    """A digest of the files behind each setting of a method that stands for files.

    Args:
        method: of a row.
        model: what it is used with: "pocket", a folder or a hub id. It is not loaded.

    Returns:
        By name of the setting with "_sha" behind it, 12 hex digits. Where the model itself
        chooses among several files ("auto"), the digest is of all that it may choose; settings
        without any file are left out.

    Raises:
        SettingsError: a profile that is not there or is none.

    Example:
        >>> sorted(file_digests(VFlowOpt(keep_ratio=0.25), "pocket"))
        ['profile_sha']
    """
    files: dict[str, Sequence[Path]] = {}
    if isinstance(method, VFlowOpt):
        files["profile"] = _profile_files(method.profile, model)
    # Other methods: whatever file a text of their settings names.
    for name, value in method.model_dump(mode="json").items():
        path = Path(value).expanduser() if isinstance(value, str) else None
        if name not in files and path is not None and path.suffix and path.is_file():
            files[name] = [path]
    return {f"{name}_sha": _digest(found) for name, found in files.items() if found}


def profiles_of(model: str) -> list[Path]:
    """VFlowOpt's built-in profiles that were made for a model of this name.

    Example:
        >>> profiles_of("nobody/nothing")
        []
    """
    short = _short(model_name(None, model))
    found = []
    for name, path in built_in().items():
        profile = named_profile(name)
        if short in map(_short, (profile.model, *profile.aliases)):
            found.append(path)
    return found


def _profile_files(source: str, model: str) -> list[Path]:
    if source == "none":
        return []
    if source == "auto":
        return profiles_of(model)
    named_profile(source)  # refuses what is no profile
    return [built_in().get(source, Path(source).expanduser())]


def _short(name: str) -> str:
    """The last part of a model's name."""
    return name.rstrip("/").rpartition("/")[2]


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        try:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise SettingsError(f"{file}: cannot be read ({error}).") from error
    return total.hexdigest()[:_DIGITS]
