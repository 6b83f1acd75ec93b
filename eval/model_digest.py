"""What tells the files of one model from those of another, as a short text."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# Files beside the weights that decide what a model computes.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


def model_digest(source: str) -> str:
    """The commit of a hub id, else a digest of the folder's files.

    Args:
        source: "pocket", a folder, or a hub id, which is fetched if need be.

    Raises:
        ModelLoadError: it is not there.
    """
    from mmlm_efficient.loading import find_folder

    folder = find_folder(source)
    if folder.parent.name == "snapshots":
        return f"{source} @ {folder.name}"
    return _folder_digest(folder)


def tower_digest(source: str, vision_tower: str | None) -> str | None:
    """The same of a vision tower that is not in the model's own weights; None if it is.

    Args:
        source: of the model, as `model_digest`.
        vision_tower: folder of the tower; None looks where the model's config says.

    Raises:
        ModelLoadError: model or tower are not there.
    """
    from mmlm_efficient.loading import find_folder
    from mmlm_efficient.original_llava import is_original
    from mmlm_efficient.original_llava.files import (
        read_json,
        tower_files,
        tower_folder,
        tower_shapes,
        weight_paths,
    )

    if vision_tower is not None:
        given = Path(os.path.expanduser(vision_tower))
        return _folder_digest(given) if given.is_dir() else vision_tower
    folder = find_folder(source)
    if not is_original(folder) or tower_shapes(weight_paths(folder)):
        return None
    config = read_json(folder / "config.json")
    name, place = str(config["mm_vision_tower"]), tower_folder(config, folder, None)
    [file, *_] = tower_files(name, place)
    return f"{name} @ {file.parent.name}" if place is None else _folder_digest(place)


def _folder_digest(folder: Path) -> str:
    """Of the weights, by pieces, and of the small files, as a whole."""
    from mmlm_efficient.calibration.digests import _file_digest, _weight_files

    total = hashlib.sha256()
    for file in _weight_files(None, str(folder)):
        total.update(_file_digest(file))
    for file in sorted(file for pattern in _SMALL_FILES for file in folder.glob(pattern)):
        total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
