"""Baseline: every token stays. The model is bit-identical to the stock model."""

from __future__ import annotations

from typing import ClassVar

from mmlm_efficient.pruning.base import Method


class NoPruning(Method):
    """Keep every visual token."""

    name: ClassVar[str] = "none"
