"""Pruning methods: one file each, one line each in :mod:`mmlm_efficient.pruning.registry`."""

from __future__ import annotations

from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.keep_mask import KeepMask
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.random_pruning import RandomPruning
from mmlm_efficient.pruning.registry import METHODS, method_class
from mmlm_efficient.pruning.uniform_pruning import UniformPruning
from mmlm_efficient.pruning.vflowopt import VFlowOpt

__all__ = [
    "METHODS",
    "FlowCut",
    "KeepMask",
    "Method",
    "NoPruning",
    "PruningMethod",
    "RandomPruning",
    "UniformPruning",
    "VFlowOpt",
    "method_class",
]
