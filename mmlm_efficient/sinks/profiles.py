"""Sink profiles: the sink dimensions that a calibration found for one model, as a YAML file.

``mmlm calibrate sinks`` writes them. ``configs/profiles/sinks`` is the folder of those that belong
to this package, found by their name or by the weights that they were made with; none is shipped
yet, and the folder need not exist.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.files import write_text
from mmlm_efficient.presets import preset_folder
from mmlm_efficient.sinks.fingerprint import Fingerprint
from mmlm_efficient.sinks.flags import checked_dims, checked_threshold

KIND: Final = "sinks"
_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerActivity(BaseModel):
    """What a calibration saw where tokens enter one decoder layer.

    Attributes:
        first: score of the first token, median over the prompts.
        visual: largest score of a visual token, over all prompts.
        rest: largest |x| / RMS(x) of a visual token in any other dimension.
        share: of the visual tokens that are sinks.
        per_prompt: sinks among the visual tokens of a prompt, mean.
        attention_sinks, attention_others: attention that the last prompt token gives to a visual
            sink, and to another visual token, mean over heads, tokens and the prompts that have
            both; None where none has.
    """

    model_config = _STRICT

    layer: int = Field(ge=0)
    first: float = Field(ge=0)
    visual: float = Field(ge=0)
    rest: float = Field(ge=0)
    share: float = Field(ge=0, le=1)
    per_prompt: float = Field(ge=0)
    attention_sinks: float | None = Field(None, ge=0)
    attention_others: float | None = Field(None, ge=0)


class SinkProfile(BaseModel):
    """What a calibration found for one model.

    Attributes:
        model: what the model was loaded as; for people, nothing is looked up by it.
        fingerprint, weights: which model it is, see `sinks.fingerprint`.
        dims: sink dimensions, the most massive one first.
        threshold: of the sink score.
        visual_only: the dimensions are massive on visual tokens, but not on the first token.
        attention_ratio: attention to a visual sink over that to another visual token.
        warnings: what makes the result doubtful.
        layers: what was seen, by layer.
        search: how it was found: samples and their digest, date, versions.
    """

    model_config = _STRICT

    kind: Literal["sinks"] = KIND
    model: str = Field(min_length=1)
    family: str = Field(min_length=1)
    fingerprint: Fingerprint
    weights: str = Field(pattern=r"^[0-9a-f]{16}$")
    dims: tuple[int, ...]
    threshold: float
    visual_only: bool = False
    attention_ratio: float | None = Field(None, ge=0)
    warnings: tuple[str, ...] = ()
    search: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[LayerActivity, ...] = ()

    @model_validator(mode="after")
    def _check_reach(self) -> Self:
        checked_dims(self.dims, self.fingerprint.hidden_size, "dims")
        checked_threshold(self.threshold, self.fingerprint.hidden_size, "threshold")
        return self

    def mismatch(self, fingerprint: Fingerprint, weights: str) -> str | None:
        """What keeps the profile from being this model's, in words; None when it is."""
        difference = self.fingerprint.difference(fingerprint)
        if difference is not None:
            return f"it was made for {self.model!r}: {difference}"
        if self.weights != weights:
            return (
                f"it was made for {self.model!r}, which has the same shape but other weights "
                f"({self.weights} there, {weights} here)"
            )
        return None


def built_in() -> dict[str, Path]:
    """The sink profiles of this package by name; empty as long as none is shipped."""
    folder = preset_folder("profiles") / KIND
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def named_profile(source: str) -> SinkProfile:
    """A profile by its name, or from a file, which is read again when it has changed.

    Args:
        source: a name in ``configs/profiles/sinks``, or the path of a YAML file.

    Raises:
        SettingsError: neither, not YAML, or not a sink profile.
    """
    own = built_in()
    path = own.get(source, Path(source).expanduser())
    if not path.is_file():
        close = nearest(source, own)
        hint = f" Did you mean {close!r}?" if close else ""
        raise SettingsError(
            f"sink profile: {source!r} is neither a file ({path.absolute()} is not there) nor a "
            f"built-in profile.{hint} Built in: "
            f"{', '.join(own) or 'none'}. Make one with: mmlm calibrate sinks"
        )
    path = path.resolve()
    return _read(source, path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read(source: str, path: Path, _: int) -> SinkProfile:
    """The profile in a file as it was at a time; source is what the user called it."""
    where = f"sink profile {source}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{where}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: is not valid YAML: {error}") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise SettingsError(
            f"{where}: is no sink profile (no 'kind: {KIND}' in it). Make one with: "
            "mmlm calibrate sinks"
        )
    try:
        return SinkProfile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{where}: {place}{message}") from error


def write_profile(profile: SinkProfile, path: Path) -> None:
    """Write a profile as YAML, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    head = f"# Sink dimensions of {profile.model}.\n# Made by: mmlm calibrate sinks\n"
    values = profile.model_dump(mode="json", exclude_none=True)
    write_text(path, head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
