"""Pruning methods: one file each, one line each in :mod:`mmlm_efficient.pruning.registry`."""

from __future__ import annotations

from mmlm_efficient.pruning.base import Method, PruningMethod
from mmlm_efficient.pruning.divprune import DivPrune
from mmlm_efficient.pruning.fastv import FastV
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.keep_mask import KeepMask
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.pyramiddrop import PyramidDrop
from mmlm_efficient.pruning.random_pruning import RandomPruning
from mmlm_efficient.pruning.registry import METHODS, method_class
from mmlm_efficient.pruning.sparsevlm import SparseVLM
from mmlm_efficient.pruning.uniform_pruning import UniformPruning
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.visionzip import VisionZip
from mmlm_efficient.pruning.vispruner import VisPruner

__all__ = [
    "METHODS",
    "DivPrune",
    "FastV",
    "FlowCut",
    "KeepMask",
    "Method",
    "NoPruning",
    "PruningMethod",
    "PyramidDrop",
    "RandomPruning",
    "SparseVLM",
    "UniformPruning",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "method_class",
]
