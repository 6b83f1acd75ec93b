"""The methods by name: one line each."""

from __future__ import annotations

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.pruning.base import Method
from mmlm_efficient.pruning.divprune import DivPrune
from mmlm_efficient.pruning.fastv import FastV
from mmlm_efficient.pruning.flowcut import FlowCut
from mmlm_efficient.pruning.keep_mask import KeepMask
from mmlm_efficient.pruning.no_pruning import NoPruning
from mmlm_efficient.pruning.pyramiddrop import PyramidDrop
from mmlm_efficient.pruning.random_pruning import RandomPruning
from mmlm_efficient.pruning.sparsevlm import SparseVLM
from mmlm_efficient.pruning.uniform_pruning import UniformPruning
from mmlm_efficient.pruning.vflowopt import VFlowOpt
from mmlm_efficient.pruning.visionzip import VisionZip
from mmlm_efficient.pruning.vispruner import VisPruner
from mmlm_efficient.sinks.var import VAR

METHODS: dict[str, type[Method]] = {
    "none": NoPruning,
    "flowcut": FlowCut,
    "vflowopt": VFlowOpt,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "random": RandomPruning,
    "uniform": UniformPruning,
    "keep_mask": KeepMask,
    "var": VAR,
}


def method_class(name: str) -> type[Method]:
    """The method with a name.

    Raises:
        SettingsError: there is none; the message lists the names.

    Example:
        >>> method_class("flowcut").__name__
        'FlowCut'
    """
    if name in METHODS:
        return METHODS[name]
    hint = nearest(name, METHODS)
    raise SettingsError(
        f"unknown method '{name}'"
        + (f", did you mean '{hint}'?" if hint is not None else ".")
        + f" Known methods: {', '.join(METHODS)}."
    )
