"""Checkpoint folders of the original LLaVA code (the ``llava`` package)."""

from mmlm_efficient.original_llava.config import converted_config
from mmlm_efficient.original_llava.load import (
    is_original,
    load_original,
    missing_original,
    original_config,
)
from mmlm_efficient.original_llava.names import converted_state

__all__ = [
    "converted_config",
    "converted_state",
    "is_original",
    "load_original",
    "missing_original",
    "original_config",
]
