"""VAR: attention that text rows give to sinks is handed on to the rest of the image.

A few visual tokens draw much attention from every text token and carry almost nothing. VAR finds
them by their massive activations, picks the attention rows that really look at the image, and
takes a share of what those rows give to sinks for the visual tokens that are none. No training, no
extra pass; nothing happens in layers without visual sinks.

Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (ICLR 2025, arXiv
2503.03321), sections 4 and 5. The paper's rho is `min_nonsink_ratio`, its p is
`redistribute_fraction`, its tau `sink_threshold`, the least mass `min_image_mass`; the released
code's rho and p are 1 minus these.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.families.base import Family, Identity
from mmlm_efficient.pruning.base import Method, Station
from mmlm_efficient.sinks.dimensions import SinkSettings, check_sinks, sinks_for
from mmlm_efficient.sinks.evaluations import Evaluation
from mmlm_efficient.sinks.recorder import Recorder
from mmlm_efficient.sinks.redistribution import Rule
from mmlm_efficient.sinks.request import RedistributionRequest
from mmlm_efficient.stations.bridge import PromptLayout

Preset = Literal["general", "hallucination", "vision_centric", "released_config"]

# What the paper chose by kind of task (as summaries quote it), and what its code was shipped with.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "general": {"min_nonsink_ratio": 0.8},
    "hallucination": {"min_nonsink_ratio": 0.5},
    "vision_centric": {"min_nonsink_ratio": 0.9},
    "released_config": {
        "min_nonsink_ratio": 0.5,
        "redistribute_fraction": 0.4,
        "skip_last_layer": False,
    },
}


# The paper's names are not taken: its code uses two of them for 1 minus what the paper means.
_PAPER_NAMES = {
    "rho": "The paper's rho is min_nonsink_ratio; the released code's rho is 1 minus it.",
    "p": "The paper's p is redistribute_fraction; the released code's p is 1 minus it.",
    "tau": "The paper's tau is sink_threshold.",
    "mu": "The paper's mu is min_image_mass.",
    "summ": "The released code's summ is min_image_mass.",
}
# Text that is meant as numbers, not as the name of a calibration: one number, or a comma between.
_NUMBERS = re.compile(r"\s*[+-]?[0-9]+\s*|[0-9+\-.\s]*,[0-9+\-.,\s]*")


class VAR(Method):
    """Visual attention redistribution in the decoder's attention; no token is dropped.

    Settings left out come from `task_preset`, else from the paper's general setting. With
    `redistribute_fraction` 0, without an image, or where no visual sink is found, the model is
    bit-identical to the stock one on a CPU.

    Example:
        >>> VAR(task_preset="hallucination").min_nonsink_ratio
        0.5
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = (
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models (arXiv 2503.03321)"
    )
    stations: ClassVar[tuple[Station, ...]] = ("attention",)

    task_preset: Preset | None = Field(
        None, description="general, hallucination, vision_centric or released_config"
    )
    min_nonsink_ratio: float = Field(
        0.8,
        ge=0,
        le=1,
        description="rows change whose image attention is at least so much on "
        "tokens that are no sinks (the paper's rho), 0 to 1",
    )
    redistribute_fraction: float = Field(
        0.6,
        ge=0,
        le=1,
        description="share of the sinks' attention that is handed on (the paper's p), 0 to 1",
    )
    min_image_mass: float = Field(
        0.2,
        ge=0,
        le=1,
        description="rows change that give the image at least so much of their attention, 0 to 1",
    )
    sink_dims: str | tuple[int, ...] = Field(
        "auto",
        description="dimensions of massive activations, such as 1415,2533; a calibration's name or "
        "path; or auto: the known ones of the language model",
    )
    sink_threshold: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="activation relative to the RMS above which a token is a sink (the "
        "paper's tau), below sqrt(hidden size)",
    )
    include_text_sinks: bool = Field(True, description="text sinks give their share too")
    require_visual_sink: bool = Field(
        True, description="rows change only if they see a visual sink"
    )
    first_layer: int = Field(2, ge=0, description="first decoder layer that changes")
    skip_last_layer: bool = Field(True, description="leave the last decoder layer alone")
    layers: tuple[int, ...] | None = Field(
        None, description="decoder layers that change, instead of first_layer and skip_last_layer"
    )
    evaluation: Evaluation = Field(
        "auto",
        description="form of the changed rows; exact, partial_sums in float32 and float64 only",
    )
    return_stats: bool = Field(
        False, description="report sinks, changed rows and attention to the image, by layer"
    )

    def __init__(self, /, **settings: Any) -> None:
        for foreign, ours in _PAPER_NAMES.items():
            if foreign in settings:
                valid = ", ".join(type(self).model_fields)
                raise SettingsError(f"var: unknown setting '{foreign}'. {ours} Valid: {valid}.")
        preset = settings.get("task_preset")
        chosen = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        super().__init__(**{**chosen, **settings})

    @field_validator("sink_dims", mode="before")
    @classmethod
    def _check_dims(cls, value: Any) -> str | tuple[int, ...]:
        if isinstance(value, os.PathLike):
            value = str(value)
        if isinstance(value, str) and value and not _NUMBERS.fullmatch(value):
            return value
        dims = _different_integers(value)
        if dims is None:
            raise ValueError(
                "sink_dims must be one or more different integers >= 0, such as [1415, 2533], the "
                f"name or path of a calibration, or 'auto', got {value!r:.80}"
            )
        return dims

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> tuple[int, ...] | None:
        layers = None if value is None else _different_integers(value)
        if layers is None and value is not None:
            raise ValueError(
                "layers must be one or more different numbers of layers (integers >= 0, such as "
                f"[2, 3]) or None, got {value!r:.80}"
            )
        return layers

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        self.rule  # noqa: B018 (checks its values)
        return self

    @property
    def owned_stations(self) -> tuple[Station, ...]:
        """None when nothing is handed on."""
        return self.stations if self.redistribute_fraction > 0 else ()

    @property
    def rule(self) -> Rule:
        """The thresholds."""
        return Rule(
            min_nonsink_ratio=self.min_nonsink_ratio,
            min_image_mass=self.min_image_mass,
            redistribute_fraction=self.redistribute_fraction,
            include_text_sinks=self.include_text_sinks,
            require_visual_sink=self.require_visual_sink,
        )

    def active_layers(self, n_layers: int) -> frozenset[int]:
        """The decoder layers that change.

        Raises:
            SettingsError: one that the model does not have, or none at all.
        """
        last = n_layers - 1 if self.skip_last_layer else n_layers
        chosen = range(self.first_layer, last) if self.layers is None else self.layers
        if not chosen or max(chosen) >= n_layers:
            given = f"first_layer={self.first_layer}"
            given = given if self.layers is None else f"layers={list(self.layers)}"
            kept = ", the last of which is left alone" if self.layers is None else ""
            raise SettingsError(
                f"var: {given} does not fit: the model has decoder layers 0 to {n_layers - 1}"
                f"{kept if self.skip_last_layer else ''}. Give layers that it has"
            )
        return frozenset(chosen)

    def sinks(self, model: Any, identity: Identity) -> SinkSettings:
        """Sink dimensions and threshold on a model.

        Raises:
            SettingsError: nothing is known about it; the message names the calibration.
        """
        return sinks_for(model, identity, self.sink_dims, self.sink_threshold)

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse a model whose sinks are not known or that lacks a layer.

        Raises:
            SettingsError: see `sinks` and `active_layers`.
        """
        if self.owned_stations:
            self.active_layers(identity.decoder_layers)
            self.sinks(family.model, identity)

    def check_config(self, config: Any, name: str, family: str) -> None:
        """Refuse what `check_model` refuses, as far as a model's config tells.

        Raises:
            SettingsError: see `sinks` and `active_layers`.
        """
        if self.owned_stations:
            self.active_layers(config.get_text_config().num_hidden_layers)
            check_sinks(config, name, family, self.sink_dims, self.sink_threshold)

    def attention_request(
        self, family: Family, identity: Identity, layout: Callable[[], PromptLayout]
    ) -> RedistributionRequest:
        """Station "attention": the work of one request.

        Args:
            family: of the model.
            identity: which model it is.
            layout: gives the prompt as it enters the layer that runs now.
        """
        found = self.sinks(family.model, identity)
        return RedistributionRequest(
            layout,
            self.rule,
            found.dims,
            found.threshold,
            self.active_layers(identity.decoder_layers),
            self.evaluation,
            Recorder() if self.return_stats else None,
        )


def _different_integers(value: Any) -> tuple[int, ...] | None:
    """Integers >= 0 from one, a list, or text with commas; None where it is anything else."""
    if isinstance(value, str):
        parts = value.split(",")
        # Nine digits: more is no dimension, and Python refuses to read thousands of them.
        readable = all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts)
        value = [int(part) for part in parts] if readable else None
    elif hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if isinstance(value, numbers.Integral):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        return None
    given = list(value)
    if any(isinstance(one, bool) or not isinstance(one, numbers.Integral) for one in given):
        return None
    found = tuple(int(one) for one in given)
    return found if found and min(found) >= 0 and len(set(found)) == len(found) else None
