"""The sink dimensions of a model: given, calibrated, or published for its language model.

Massive activations, and with them attention sinks, sit in a few hidden dimensions that belong to
the trained weights of a language model. Nothing here ever lends a model the dimensions of another
one: a model that is not known is an error that names the calibration.

Sources of the table: the released code of "See What You Are Told" (seilk/VisAttnSink @ 98e62d6,
arXiv 2503.03321), the paper's appendix as summaries quote it, and "Massive Activations in Large
Language Models" (arXiv 2402.17762) with several repositories that agree. What single third parties
report is listed for information and never used.
"""

from __future__ import annotations

import functools
import logging
import shlex
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Identity
from mmlm_efficient.names import POCKET
from mmlm_efficient.sinks.fingerprint import Fingerprint, signs_digest
from mmlm_efficient.sinks.flags import checked_dims, checked_threshold
from mmlm_efficient.sinks.profiles import SinkProfile, built_in, named_profile

logger = logging.getLogger("mmlm_efficient.sinks")

_Versions: TypeAlias = "tuple[tuple[int, int, int], ...]"
Status = Literal["code", "paper", "literature", "unconfirmed"]
# Added tokens that a vocabulary may have beyond the language model's own.
_ADDED_TOKENS = 64
# Models that a doubt was told of.
_warned: set[tuple[str, str]] = set()
# A digest reads all over the weights: once for each model, and again when they were changed.
_digests: weakref.WeakKeyDictionary[nn.Module, tuple[_Versions, str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shape:
    """What a config must say for a table entry to be the model's.

    Attributes:
        families: of the multimodal models that the entry is known to hold for.
        fingerprint: with the vocabulary of the language model itself.
        context: least ``max_position_embeddings``; what tells LLaMA-2 from LLaMA-1.
    """

    families: tuple[str, ...]
    fingerprint: Fingerprint
    context: int = 1

    def fits(self, config: Any, family: str) -> bool:
        """Whether a model's config is of this shape."""
        own = Fingerprint.of(config)
        added = own.vocab_size - self.fingerprint.vocab_size
        same = own.model_copy(update={"vocab_size": self.fingerprint.vocab_size})
        return (
            family in self.families
            and same == self.fingerprint
            and 0 <= added <= _ADDED_TOKENS
            and config.get_text_config().max_position_embeddings >= self.context
        )


@dataclass(frozen=True)
class Backbone:
    """A language model whose sink dimensions somebody published.

    Attributes:
        name: of the language model, or of the whole where reports name that; models: built on it.
        dims: the dimensions; of an unconfirmed entry all that are reported.
        status: "code" (in the released code), "paper" (read in summaries of the paper),
            "literature" (massive activations of the language model, not tried with VAR), or
            "unconfirmed" (single third parties); the last is never used.
        source: where the dimensions are from.
        shape: what tells the model by; None where no family of this package has it.
    """

    name: str
    models: str
    dims: tuple[int, ...]
    status: Status
    source: str
    shape: Shape | None = None


def _shape(
    families: Sequence[str],
    text_model: str,
    sizes: tuple[int, int, int, int, int],
    vocab_size: int,
    context: int = 1,
) -> Shape:
    """A shape from (hidden size, layers, intermediate size, heads, key/value heads)."""
    hidden_size, layers, intermediate_size, heads, kv_heads = sizes
    fingerprint = Fingerprint(
        text_model=text_model,
        hidden_size=hidden_size,
        layers=layers,
        intermediate_size=intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        vocab_size=vocab_size,
    )
    return Shape(tuple(families), fingerprint, context)


_LLAVA = ("llava", "llava_next")
_CODE = "seilk/VisAttnSink @ 98e62d6"
_APPENDIX = "arXiv 2503.03321, appendix A.1, as quoted by others"
_MASSIVE = "arXiv 2402.17762 and several repositories"
_ONE_REPORT = "one third party"

KNOWN: tuple[Backbone, ...] = (
    Backbone(
        "LLaMA-2-7B / Vicuna-7B-v1.5",
        "LLaVA-1.5-7B; LLaVA-1.6-Vicuna-7B (inferred)",
        (1415, 2533),
        "code",
        f"{_CODE}, and independent repositories",
        _shape(_LLAVA, "llama", (4096, 32, 11008, 32, 32), 32000, 4096),
    ),
    Backbone(
        "LLaMA-2-13B / Vicuna-13B-v1.5",
        "LLaVA-1.5-13B; LLaVA-1.6-Vicuna-13B (inferred)",
        (2100, 4743),
        "code",
        f"{_CODE}, where the entry is never switched on",
        _shape(_LLAVA, "llama", (5120, 40, 13824, 40, 40), 32000, 4096),
    ),
    Backbone(
        "Qwen2-7B",
        "Qwen2-VL-7B",
        (458, 2570),
        "paper",
        f"{_APPENDIX}; a third party's calibration agrees",
        _shape(("qwen2_vl",), "qwen2_vl_text", (3584, 28, 18944, 28, 4), 152064),
    ),
    Backbone("InternLM2.5-7B", "InternVL2-8B", (3584,), "paper", f"{_APPENDIX}, one source"),
    Backbone(
        "LLaMA-3-8B",
        "LLaVA-1.6-LLaMA-3-8B",
        (788, 1384, 4062),
        "literature",
        _MASSIVE,
        _shape(_LLAVA, "llama", (4096, 32, 14336, 32, 8), 128256),
    ),
    Backbone(
        "Mistral-7B",
        "LLaVA-1.6-Mistral-7B",
        (2070,),
        "literature",
        _MASSIVE,
        _shape(_LLAVA, "mistral", (4096, 32, 14336, 32, 8), 32000),
    ),
    Backbone(
        "Qwen2-VL-2B",
        "Qwen2-VL-2B",
        (1073, 534, 940),
        "unconfirmed",
        _ONE_REPORT,
        _shape(("qwen2_vl",), "qwen2_vl_text", (1536, 28, 8960, 12, 2), 151936),
    ),
    Backbone(
        "Qwen2.5-VL-3B",
        "Qwen2.5-VL-3B",
        (318, 1874, 1819),
        "unconfirmed",
        "third parties; one leaves out 318",
        _shape(("qwen2_5_vl",), "qwen2_5_vl_text", (2048, 36, 11008, 16, 2), 151936),
    ),
    Backbone(
        "Qwen2.5-VL-7B",
        "Qwen2.5-VL-7B",
        (458, 2570),
        "unconfirmed",
        "third parties; one adds 3197",
        _shape(("qwen2_5_vl",), "qwen2_5_vl_text", (3584, 28, 18944, 28, 4), 152064),
    ),
    Backbone(
        "Qwen2.5-VL-32B",
        "Qwen2.5-VL-32B",
        (4675, 3094),
        "unconfirmed",
        _ONE_REPORT,
        _shape(("qwen2_5_vl",), "qwen2_5_vl_text", (5120, 64, 27648, 40, 8), 152064),
    ),
    Backbone("Qwen3-VL-2B", "Qwen3-VL-2B", (1793, 1999, 1401), "unconfirmed", "reports differ"),
    Backbone("Qwen3-VL-4B", "Qwen3-VL-4B", (0, 4), "unconfirmed", "reports differ"),
    Backbone("Qwen3-VL-8B", "Qwen3-VL-8B", (1838, 2276), "unconfirmed", "reports differ"),
    Backbone("InternVL3.5-1B", "InternVL3.5-1B", (35, 13), "unconfirmed", _ONE_REPORT),
    Backbone("InternVL3.5-4B", "InternVL3.5-4B", (4, 396, 0), "unconfirmed", _ONE_REPORT),
    Backbone("InternVL3.5-8B", "InternVL3.5-8B", (2276, 233), "unconfirmed", _ONE_REPORT),
    Backbone("InternVL3.5-38B", "InternVL3.5-38B", (731,), "unconfirmed", _ONE_REPORT),
)


@dataclass(frozen=True)
class SinkSettings:
    """What finding a model's sinks needs.

    Attributes:
        dims: hidden dimensions of massive activations.
        threshold: of the sink score, below sqrt(hidden size).
        source: where the dimensions are from, in words.
    """

    dims: tuple[int, ...]
    threshold: float
    source: str


def known_backbone(config: Any, family: str) -> Backbone | None:
    """The table's entry of a model, confirmed or not.

    Args:
        config: the model's config of transformers.
        family: name of the model's family.
    """
    for backbone in KNOWN:
        if backbone.shape is not None and backbone.shape.fits(config, family):
            return backbone
    return None


def sinks_for(
    model: Any,
    identity: Identity,
    sink_dims: str | Sequence[int] = "auto",
    sink_threshold: float | None = None,
) -> SinkSettings:
    """The sink dimensions and the threshold of a model.

    Args:
        model: a multimodal model of transformers.
        identity: which one it is.
        sink_dims: the dimensions themselves; the name or path of a profile; or "auto" for the
            built-in profile of these very weights, else the published dimensions of the language
            model.
        sink_threshold: None takes that of the profile, else `default_threshold`.

    Raises:
        SettingsError: nothing is known about the model, the profile is of another model, or a
            value is out of range.
    """
    subject = _Subject(
        identity.name, identity.family, model.config, functools.partial(weights_of, model)
    )
    return _sinks_of(subject, sink_dims, sink_threshold)


def check_sinks(
    config: Any,
    name: str,
    family: str,
    sink_dims: str | Sequence[int] = "auto",
    sink_threshold: float | None = None,
) -> None:
    """What `sinks_for` refuses, as far as a model's config tells: before weights are loaded.

    Args:
        config: of the model, from transformers.
        name: what the model is loaded as.
        family: name of its family.
        sink_dims, sink_threshold: as in `sinks_for`.

    Raises:
        SettingsError: as in `sinks_for`, but for a profile of the same shape and other weights.
    """
    _sinks_of(_Subject(name, family, config, None), sink_dims, sink_threshold)


@dataclass(frozen=True)
class _Subject:
    """A model; weights gives their digest, None where they are not loaded."""

    name: str
    family: str
    config: Any
    weights: Callable[[], str] | None


def _sinks_of(
    subject: _Subject, sink_dims: str | Sequence[int], sink_threshold: float | None
) -> SinkSettings:
    width = Fingerprint.of(subject.config).hidden_size
    if not isinstance(sink_dims, str):
        dims = checked_dims(sink_dims, width)
        return SinkSettings(dims, checked_threshold(sink_threshold, width), "given")
    profile = _own_profile(subject) if sink_dims == "auto" else _checked(sink_dims, subject)
    if profile is not None:
        chosen = profile.threshold if sink_threshold is None else sink_threshold
        source = f"calibration of {profile.model}"
        return SinkSettings(profile.dims, checked_threshold(chosen, width), source)
    backbone = known_backbone(subject.config, subject.family)
    if backbone is None or backbone.status == "unconfirmed":
        raise SettingsError(_unknown(subject, backbone))
    if backbone.status == "literature" and subject.weights is not None:
        _warn_literature(backbone, subject.name)
    threshold = checked_threshold(sink_threshold, width)
    return SinkSettings(backbone.dims, threshold, f"{backbone.name}: {backbone.source}")


def weights_of(model: nn.Module) -> str:
    """`signs_digest`, computed once for each model object and state of its weights."""
    versions = tuple((id(one), one.data_ptr(), _version(one)) for one in model.parameters())
    known = _digests.get(model)
    if known is None or known[0] != versions:
        known = _digests[model] = (versions, signs_digest(model))
    return known[1]


def _version(parameter: Tensor) -> int:
    """How often a parameter was written to; writes into its ``.data`` are not counted."""
    return 0 if parameter.is_inference() else parameter._version


def _own_profile(subject: _Subject) -> SinkProfile | None:
    """The built-in profile of a model's weights."""
    fingerprint = Fingerprint.of(subject.config)
    for name in built_in():
        profile = named_profile(name)
        # The weights are looked at only where the shape fits.
        if profile.fingerprint == fingerprint and (
            subject.weights is None or profile.weights == subject.weights()
        ):
            return profile
    return None


def _checked(source: str, subject: _Subject) -> SinkProfile:
    """A profile that the user names, refused when it belongs to another model."""
    profile = named_profile(source)
    weights = profile.weights if subject.weights is None else subject.weights()
    fingerprint = Fingerprint.of(subject.config)
    mismatch = profile.mismatch(fingerprint, weights)
    if mismatch is None:
        return profile
    quantized = getattr(subject.config, "quantization_config", None) is not None
    same_shape = profile.fingerprint == fingerprint
    doubt = ". This model is quantized: its weights are others" if quantized and same_shape else ""
    option = " --quantization int8 (or nf4)" if quantized else ""
    raise SettingsError(
        f"sink_dims: the profile {source!r} is of another model: {mismatch}{doubt}. Make one "
        f"for this model with mmlm calibrate sinks{option}, or give the dimensions themselves, "
        f"such as sink_dims={list(profile.dims)}"
    )


def _unknown(subject: _Subject, reported: Backbone | None) -> str:
    """What to do about a model that nothing is known about."""
    doubt = ""
    if reported is not None:
        doubt = (
            f" (of {reported.models}, {list(reported.dims)} is reported, but nobody confirmed it: "
            f"{reported.source})"
        )
    images = POCKET if subject.name == POCKET else "FOLDER"
    return (
        f"sink_dims='auto': the sink dimensions of {subject.name!r} are not known "
        f"({Fingerprint.of(subject.config)}){doubt}. Find them with: mmlm calibrate sinks --model "
        f"{shlex.quote(subject.name)} --images {images}, and give the profile that it writes as "
        "sink_dims='FILE.yaml'; or give dimensions that you know, such as sink_dims=[12, 345]"
    )


def _warn_literature(backbone: Backbone, name: str) -> None:
    """Say, once per model, that nobody has tried the dimensions with VAR."""
    if (name, backbone.name) in _warned:
        return
    _warned.add((name, backbone.name))
    logger.warning(
        "sink_dims='auto': %s are the massive activations of %s itself (%s), not tried in %s. "
        "Check them with: mmlm calibrate sinks --model %s --images FOLDER",
        list(backbone.dims),
        backbone.name,
        backbone.source,
        name,
        shlex.quote(name),
    )
