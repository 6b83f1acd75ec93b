"""VFlowOpt's profiles: the schedule that a search found for one model and one budget.

Source: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", ICCV 2025, arXiv 2508.05211. The three released profiles of LLaVA-OneVision-7B and
our own lie in ``configs/profiles``; ``mmlm calibrate vflowopt`` makes more.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.families.base import Identity
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.pruning.vflowopt_plan import (
    Schedule,
    Segments,
    achieved_ratio,
    default_stage_layers,
    segments,
    solve_last_ratio,
    untuned,
)

logger = logging.getLogger("mmlm_efficient.pruning")


class Profile(BaseModel):
    """What a search found for one model and one budget.

    Example:
        >>> named_profile("onevision-7b-25").stage_layers
        (9, 18)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="hub id, folder or name of the model")
    family: str = Field(min_length=1, description="its family")
    decoder_layers: int = Field(ge=3, description="layers of its language model")
    decoder_width: int = Field(ge=1, description="width of its language model")
    tower_layers: int = Field(ge=1, description="layers of its vision tower")
    keep_ratio: float = Field(gt=0, le=1, description="mean kept fraction over decoder layers")
    stage_layers: tuple[int, int] = Field(description="0-based layers whose input is cut")
    stage_keep_ratios: tuple[float, float, float] = Field(description="of stages 0, 1 and 2")
    anchor_threshold: float = Field(ge=0)
    entropy_weight: float = Field(ge=-1, le=1)
    merge_grid_size: float | None = Field(ge=1)
    exact_budget: bool = Field(False, description="stage 0 keeps exactly its share")
    attention_layer: int | None = Field(None, ge=0, description="tower layer; None for the last")
    search: dict[str, Any] = Field(default_factory=dict, description="how it was found")

    @property
    def segments(self) -> Segments:
        """Decoder layers before stage 1, between the stages, and after stage 2."""
        return segments(self.stage_layers, self.decoder_layers)

    def mismatch(self, identity: Identity) -> str | None:
        """What keeps the profile from fitting a model, in words; None when it fits."""
        short = self.model.rstrip("/").rpartition("/")[2]
        if short != identity.short_name:
            return f"it was made for {self.model!r}, but this is {identity.name!r}"
        for field in ("family", "decoder_layers", "decoder_width", "tower_layers"):
            mine, theirs = getattr(self, field), getattr(identity, field)
            if mine != theirs:
                return f"it has {field}={mine!r}, but this model has {theirs!r}"
        return None

    def schedule(self, budget: float) -> Schedule:
        """The schedule for a budget near the profile's own: what was found for another budget is
        kept in proportion, and the last ratio solved anew."""
        r0, r1, r2 = self.stage_keep_ratios
        if abs(budget - self.keep_ratio) > 1e-9:
            r0, r1, r2 = fitted(budget, r0 * budget / self.keep_ratio, r1, self.segments)
        return Schedule(
            (r0, r1, r2),
            self.anchor_threshold,
            self.entropy_weight,
            self.merge_grid_size,
            self.exact_budget,
        )


def fitted(budget: float, r0: float, r1: float, parts: Segments) -> tuple[float, float, float]:
    """Ratios near the given ones that spend the budget exactly.

    Args:
        budget: kept fraction averaged over the decoder layers, (0, 1].
        r0, r1: wanted ratios of stages 0 and 1; raised where even r2 = 1 would not spend it.
        parts: see :func:`segments`.

    Example:
        >>> [round(one, 3) for one in fitted(0.9, 1.3, 0.75, (9, 9, 10))]
        [1.0, 0.853, 1.0]
    """
    l0, l1, l2 = parts
    r0 = min(1.0, max(r0, budget))
    least = (sum(parts) * budget - r0 * l0) / (r0 * (l1 + l2))
    r1 = min(1.0, max(r1, least))
    return r0, r1, solve_last_ratio(budget, r0, r1, parts)


@functools.cache
def built_in() -> dict[str, Path]:
    """The profiles of this package by name."""
    return {file.stem: file for file in sorted(preset_folder("profiles").glob("*.yaml"))}


@functools.lru_cache(maxsize=64)
def named_profile(source: str) -> Profile:
    """A profile by its name, or from a file.

    Args:
        source: a name in ``configs/profiles``, or the path of a YAML file.

    Raises:
        SettingsError: neither, not YAML, or not a profile.
    """
    path = Path(os.path.expanduser(source))
    if source in built_in():
        path = built_in()[source]
    elif not path.is_file():
        close = nearest(source, built_in())
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(
            f"profile: {source!r} is neither a file nor a built-in profile.{hint} Built in: "
            f"{', '.join(built_in()) or 'none'}. Make one with: mmlm calibrate vflowopt"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"profile {source}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"profile {source}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"profile {source}: holds {type(values).__name__}, not a profile.")
    try:
        return Profile(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"profile {source}: {place}: {first['msg']}.") from error


def profile_of(identity: Identity, budget: float) -> Profile | None:
    """The built-in profile of a model whose budget is nearest."""
    own = [named_profile(name) for name in built_in()]
    own = [profile for profile in own if profile.mismatch(identity) is None]
    return min(own, key=lambda profile: abs(profile.keep_ratio - budget), default=None)


def checked_profile(source: str, identity: Identity, allow_mismatch: bool) -> Profile:
    """A profile that the user names, refused when it belongs to another model.

    Raises:
        SettingsError: it does, and that was not allowed, or the depth differs.
    """
    profile = named_profile(source)
    mismatch = profile.mismatch(identity)
    if mismatch is None:
        return profile
    if not allow_mismatch:
        raise SettingsError(
            f"profile {source!r} is of another model: {mismatch}. Make one for this model with "
            "mmlm calibrate vflowopt, or set allow_profile_mismatch=True"
        )
    if profile.decoder_layers != identity.decoder_layers:
        raise SettingsError(
            f"profile {source!r} is for {profile.decoder_layers} decoder layers, this model has "
            f"{identity.decoder_layers}: its stages cannot be used here"
        )
    return profile


@functools.lru_cache(maxsize=64)
def _warn_untuned(name: str, budget: float) -> None:
    logger.warning(
        "vflowopt: there is no profile of %s for keep_ratio=%g, so an untuned schedule is used. "
        "Make one with: mmlm calibrate vflowopt --model %s --budget %g --data FOLDER",
        name,
        budget,
        name,
        budget,
    )


def untuned_schedule(identity: Identity, budget: float) -> tuple[tuple[int, int], Schedule]:
    """Stage layers and schedule of a model without a profile; warns once per model and budget."""
    _warn_untuned(identity.name, budget)
    layers = default_stage_layers(identity.decoder_layers)
    return layers, untuned(budget, segments(layers, identity.decoder_layers))


__all__ = [
    "Profile",
    "achieved_ratio",
    "built_in",
    "checked_profile",
    "fitted",
    "named_profile",
    "profile_of",
    "untuned_schedule",
]
