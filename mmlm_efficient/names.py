"""What a model is called: by messages, and by settings that belong to one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

POCKET = "pocket"
POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"


def model_name(model: Any, name: str | None = None) -> str:
    """What a model was loaded as.

    Args:
        model: a transformers model.
        name: what its owner calls it; None to ask the model.

    Returns:
        The name, else the folder or hub id that transformers read the model from, else the name
        of its class; "pocket" for the folder of the model in this package.

    Example:
        >>> model_name(None, str(POCKET_WEIGHTS))
        'pocket'
    """
    found = str(name or getattr(model, "name_or_path", None) or type(model).__name__)
    folder = os.path.realpath(os.path.expanduser(found))
    return POCKET if folder == os.path.realpath(POCKET_WEIGHTS) else found
