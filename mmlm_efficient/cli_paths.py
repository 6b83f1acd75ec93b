"""Files and folders on the command line, refused now rather than after the work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mmlm_efficient.errors import MMLMError, SettingsError


def checked_png(option: str, path: Path) -> Path:
    """The path with its "~" filled in; refused now rather than after the work."""
    target = Path(os.path.expanduser(path))
    if target.suffix.lower() != ".png":
        raise SettingsError(f"{option} {path}: must end in '.png'.")
    if os.path.isdir(target):
        raise SettingsError(f"{option} {path}: is a folder. Give the path of a PNG file.")
    check_folder(f"{option} {path}", target.parent)
    return target


def check_folder(where: str, folder: Path) -> None:
    """Refuse a folder where no file can be written; one that is missing will be made."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MMLMError(
            f"{where}: cannot be written, {folder} takes no new files ({reason(error)}). "
            "Give another path."
        ) from error


def reason(error: OSError) -> str:
    """What went wrong, without the name of a file that the user did not choose."""
    return error.strerror or str(error)
