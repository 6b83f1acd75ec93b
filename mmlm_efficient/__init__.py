"""Makes LLaVA-style multimodal models of transformers cheaper, without forking their code.

>>> from mmlm_efficient import FlowCut, load
>>> from mmlm_efficient.pocket import scene
>>> lmm = load("pocket", methods=[FlowCut(keep_tokens=36)])
>>> answer = lmm.ask("What is in the picture?", image=scene("heldout", 56).image)
>>> answer.usage.visual_tokens_kept["bridge"]
36
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmlm_efficient.answers import Answer as Answer
    from mmlm_efficient.answers import Usage as Usage
    from mmlm_efficient.errors import MediaError as MediaError
    from mmlm_efficient.errors import MissingExtraError as MissingExtraError
    from mmlm_efficient.errors import MMLMError as MMLMError
    from mmlm_efficient.errors import ModelLoadError as ModelLoadError
    from mmlm_efficient.errors import PromptError as PromptError
    from mmlm_efficient.errors import SettingsError as SettingsError
    from mmlm_efficient.errors import UnsupportedError as UnsupportedError
    from mmlm_efficient.loading import load as load
    from mmlm_efficient.media import ImageLimits as ImageLimits
    from mmlm_efficient.media import load_image as load_image
    from mmlm_efficient.model import EfficientLMM as EfficientLMM
    from mmlm_efficient.prompts import Request as Request
    from mmlm_efficient.pruning.divprune import DivPrune as DivPrune
    from mmlm_efficient.pruning.fastv import FastV as FastV
    from mmlm_efficient.pruning.flowcut import FlowCut as FlowCut
    from mmlm_efficient.pruning.keep_mask import KeepMask as KeepMask
    from mmlm_efficient.pruning.no_pruning import NoPruning as NoPruning
    from mmlm_efficient.pruning.pyramiddrop import PyramidDrop as PyramidDrop
    from mmlm_efficient.pruning.random_pruning import RandomPruning as RandomPruning
    from mmlm_efficient.pruning.sparsevlm import SparseVLM as SparseVLM
    from mmlm_efficient.pruning.uniform_pruning import UniformPruning as UniformPruning
    from mmlm_efficient.pruning.vflowopt import VFlowOpt as VFlowOpt
    from mmlm_efficient.pruning.visionzip import VisionZip as VisionZip
    from mmlm_efficient.pruning.vispruner import VisPruner as VisPruner
    from mmlm_efficient.settings import Config as Config
    from mmlm_efficient.settings import load_config as load_config
    from mmlm_efficient.sinks.var import VAR as VAR
    from mmlm_efficient.tokens import ImageReport as ImageReport
    from mmlm_efficient.tokens import PruningReport as PruningReport
    from mmlm_efficient.video.reader import Video as Video
    from mmlm_efficient.video.reader import load_video as load_video
    from mmlm_efficient.video.sampling import FrameSampling as FrameSampling

# Where each public name lives. Read on first use: `mmlm --help` must not wait for torch.
_HOMES = {
    "Answer": "answers",
    "Config": "settings",
    "DivPrune": "pruning.divprune",
    "EfficientLMM": "model",
    "FastV": "pruning.fastv",
    "FlowCut": "pruning.flowcut",
    "FrameSampling": "video.sampling",
    "ImageLimits": "media",
    "ImageReport": "tokens",
    "KeepMask": "pruning.keep_mask",
    "MMLMError": "errors",
    "MediaError": "errors",
    "MissingExtraError": "errors",
    "ModelLoadError": "errors",
    "NoPruning": "pruning.no_pruning",
    "PromptError": "errors",
    "PruningReport": "tokens",
    "PyramidDrop": "pruning.pyramiddrop",
    "RandomPruning": "pruning.random_pruning",
    "Request": "prompts",
    "SettingsError": "errors",
    "SparseVLM": "pruning.sparsevlm",
    "UniformPruning": "pruning.uniform_pruning",
    "UnsupportedError": "errors",
    "Usage": "answers",
    "VAR": "sinks.var",
    "VFlowOpt": "pruning.vflowopt",
    "Video": "video.reader",
    "VisPruner": "pruning.vispruner",
    "VisionZip": "pruning.visionzip",
    "load": "loading",
    "load_config": "settings",
    "load_image": "media",
    "load_video": "video.reader",
}

__all__ = [*_HOMES, "__version__"]

try:
    __version__ = version("mmlm-efficient")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmlm_efficient' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmlm_efficient.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
