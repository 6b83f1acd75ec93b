"""VFlowOpt's profiles: the schedule that a search found for one model and one budget.

Source: "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", ICCV 2025, arXiv 2508.05211. The three released profiles of LLaVA-OneVision-7B and
our own lie in ``configs/profiles``; ``mmlm calibrate vflowopt`` makes more.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.families.base import Identity
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.pruning.vflowopt_plan import (
    Schedule,
    Segments,
    achieved_ratio,
    segments,
    solve_last_ratio,
)

logger = logging.getLogger("mmlm_efficient.pruning")

# How far a profile's ratios may miss its budget; the released ones miss it by 0.0008.
_TOLERANCE = 0.01
# Models without a profile that a warning was given for.
_warned: set[str] = set()


class Profile(BaseModel):
    """What a search found for one model and one budget.

    Example:
        >>> named_profile("onevision-7b-25").stage_layers
        (9, 18)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, description="hub id, folder or name of the model")
    aliases: tuple[str, ...] = Field((), description="other names of the same weights")
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
    search: dict[str, Any] = Field(default_factory=dict, description="how it was found")

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for ratio in self.stage_keep_ratios:
            if not 0.0 < ratio <= 1.0:
                raise SettingsError(f"stage_keep_ratios must be in (0, 1], got {ratio}")
        mean = achieved_ratio(*self.stage_keep_ratios, self.segments)
        if abs(mean - self.keep_ratio) > _TOLERANCE:
            raise SettingsError(
                f"stage_keep_ratios keep {mean:.4f} on average, but keep_ratio is {self.keep_ratio}"
            )
        return self

    @property
    def segments(self) -> Segments:
        """Decoder layers before stage 1, between the stages, and after stage 2."""
        return segments(self.stage_layers, self.decoder_layers)

    def mismatch(self, identity: Identity) -> str | None:
        """What keeps the profile from fitting a model, in words; None when it fits."""
        names = {name.rstrip("/").rpartition("/")[2] for name in (self.model, *self.aliases)}
        if identity.short_name not in names:
            return f"it was made for {self.model!r}, but this is {identity.name!r}"
        for field in ("family", "decoder_layers", "decoder_width", "tower_layers"):
            mine, theirs = getattr(self, field), getattr(identity, field)
            if mine != theirs:
                return f"it has {field}={mine!r}, but this model has {theirs!r}"
        return None

    def schedule(self, budget: float, parts: Segments | None = None) -> Schedule:
        """The schedule for a budget near the profile's own, or for other stage layers: the first
        ratio is kept in proportion to the budget, and the last one solved anew.

        Args:
            budget: kept fraction averaged over the decoder layers, (0, 1].
            parts: see :func:`segments`; the profile's own if None.

        Raises:
            SettingsError: the stages lie so late that nothing is left of the budget for the last.
        """
        r0, r1, r2 = self.stage_keep_ratios
        parts = self.segments if parts is None else parts
        if abs(budget - self.keep_ratio) > 1e-9 or parts != self.segments:
            r0, r1, r2 = fitted(budget, r0 * budget / self.keep_ratio, r1, parts)
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


def named_profile(source: str) -> Profile:
    """A profile by its name, or from a file, which is read again when it has changed.

    Args:
        source: a name in ``configs/profiles``, or the path of a YAML file.

    Raises:
        SettingsError: neither, not YAML, or not a profile.
    """
    if source in built_in():
        return _read(source, built_in()[source], 0)
    path = Path(source).expanduser()
    if not path.is_file():
        close = nearest(source, built_in())
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(
            f"profile: {source!r} is neither a file nor a built-in profile.{hint} Built in: "
            f"{', '.join(built_in()) or 'none'}. Make one with: mmlm calibrate vflowopt"
        )
    path = path.resolve()
    return _read(source, path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(source: str, path: Path, _: int) -> Profile:
    """The profile in a file as it was at a time; source is what the user called it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"profile {source}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"profile {source}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"profile {source}: holds {type(values).__name__}, not a profile.")
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise SettingsError(
            f"profile {source}: {place}{first['msg'].removeprefix('Value error, ')}"
        ) from error


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


def warn_untuned(name: str, budget: float) -> None:
    """Say, once per model, that a schedule is used that nobody tuned for it."""
    if name in _warned:
        return
    _warned.add(name)
    logger.warning(
        "vflowopt: there is no profile of %s, so an untuned schedule is used for keep_ratio=%.3g. "
        "Make one with: mmlm calibrate vflowopt --model %s --budget %.3g --data FOLDER",
        name,
        budget,
        name,
        budget,
    )


__all__ = [
    "Profile",
    "built_in",
    "checked_profile",
    "fitted",
    "named_profile",
    "profile_of",
    "warn_untuned",
]
