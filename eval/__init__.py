"""The evaluation runner: methods x budgets x benchmarks, and the plug-in for lmms-eval.

A package of its own so that lmms-eval can find the plug-in by its entry point and so that the core
never imports lmms-eval. Its public names are listed in `__all__` as they come into being.
"""

from __future__ import annotations

__all__: list[str] = []

# Its own requirements name an av that is too old for the video reader.
INSTALL_LMMS_EVAL = "pip install 'mmlm-efficient[lmms-eval]' && pip install --no-deps lmms-eval"
