"""A folder that loads, for tests that then damage it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.original_llava.sources import (
    original_names,
    original_settings,
    source,
    write,
)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A complete folder that a test may damage."""
    stock = source("llava", "llama")
    return write(tmp_path / "good", original_names(stock), original_settings(stock, "llava"))
