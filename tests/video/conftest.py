"""How the frames of a film were found."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from mmlm_efficient.video import film as film_module
from mmlm_efficient.video.film import Film


@pytest.fixture
def seeks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every try to find frames by seeking, whether it went well; small films seek too."""
    tries: list[bool] = []
    original = Film.seek

    def counted(*args: Any) -> list[Image.Image]:
        tries.append(False)
        frames = original(*args)
        tries[-1] = True
        return frames

    monkeypatch.setattr(Film, "seek", counted)
    monkeypatch.setattr(film_module, "_DECODED_WHOLE_PX", 0)
    return tries
