"""Where the presets of this package lie: inside an installed copy, or in configs/ of a checkout."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def preset_folder(kind: str) -> Path:
    """The folder of one kind of presets.

    Args:
        kind: "models", "methods" or "profiles".

    Example:
        >>> preset_folder("methods").name
        'methods'
    """
    inside = Path(str(importlib.resources.files("mmlm_efficient"))) / "configs"
    folder = inside if inside.is_dir() else inside.parents[1] / "configs"
    return folder / kind
