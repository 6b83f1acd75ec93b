"""The serving application: an OpenAI-compatible HTTP service for `mmlm_efficient` on Ray Serve.

A package of its own so that a Serve configuration can import it by name (`ray_serve`) and so that
the core never imports Ray. Its public names are listed in `__all__` as they come into being.
"""

from __future__ import annotations

__all__: list[str] = []
