"""The shape that all methods share: settings that check themselves, and what they decide where.

A method is one frozen settings class. It names the stations where it decides and overrides the
matching station methods of :class:`PruningMethod`; everything else (hooks, prompts, positions,
masks, reports) is done for it. See ``docs/adding_a_method.md``.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.stations.layer import LayerCut
from mmlm_efficient.stations.tower import TowerPass
from mmlm_efficient.tokens import VisualTokens

logger = logging.getLogger("mmlm_efficient.pruning")

Station = Literal["tower", "bridge", "layer", "attention", "cache"]
Budget = int | tuple[int, ...] | None
Ratio = float | tuple[float, ...] | None


class Method(BaseModel):
    """Settings of any method. Invalid settings raise :class:`SettingsError`.

    Class attributes:
        name: the method's name in settings files and on the command line.
        paper: title and arXiv number, or an empty string.
        stations: stations where the method can decide something.
        families: names of the supported model families, or "all".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    stations: ClassVar[tuple[Station, ...]] = ()
    families: ClassVar[tuple[str, ...] | Literal["all"]] = "all"

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**{name: _plain(value) for name, value in settings.items()})
        except ValidationError as error:
            raise SettingsError(_explained(type(self), error)) from None

    @property
    def owned_stations(self) -> tuple[Station, ...]:
        """Stations where the method decides something with these settings."""
        return self.stations


@dataclass(frozen=True)
class TowerJob:
    """One forward of the tower that a method may prune.

    Attributes:
        targets: patches (CLS not counted) to keep of each image.
        n_patches: patches of each image.
        last_cut_layer: last tower layer whose output may be cut (0-based).
        has_cls: the tower has a CLS token.
    """

    targets: tuple[int, ...]
    n_patches: int
    last_cut_layer: int
    has_cls: bool


class PruningMethod(Method):
    """A method that keeps fewer visual tokens of each image.

    The budget T is a number of visual tokens per image: ``keep_tokens``, or
    ``max(1, floor(keep_ratio * N))`` of the N tokens an image has. A tuple gives each image of a
    call its own budget. Exactly T tokens are kept; with T >= N nothing is pruned.

    Class attributes:
        exact: :meth:`select` keeps exactly the budget, and is not called when that is all tokens.
            False for a method that counts by itself.
    """

    exact: ClassVar[bool] = True

    keep_tokens: Budget = Field(None, description="tokens to keep per image, >= 1")
    keep_ratio: Ratio = Field(None, description="share of the tokens to keep per image, in (0, 1]")
    position_ids: Literal["compact", "original"] = Field(
        "compact",
        description="positions of kept tokens in the language model: renumbered or their own",
    )

    @field_validator("keep_tokens", mode="before")
    @classmethod
    def _check_keep_tokens(cls, value: Any) -> Any:
        return checked_counts("keep_tokens", value)

    @field_validator("keep_ratio", mode="before")
    @classmethod
    def _check_keep_ratio(cls, value: Any) -> Any:
        return _each("keep_ratio", value, _checked_ratio)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        self.check_budget()
        return self

    def check_budget(self) -> None:
        """Exactly one of keep_tokens and keep_ratio must be given.

        Raises:
            SettingsError: none or both are given.
        """
        if self.keep_tokens is not None and self.keep_ratio is not None:
            raise SettingsError("keep_tokens and keep_ratio are both given: give one of them")
        if self.keep_tokens is None and self.keep_ratio is None:
            raise SettingsError("give a budget: keep_tokens (>= 1) or keep_ratio (in (0, 1])")

    def budget(self, image: int, n_tokens: int) -> int:
        """Tokens to keep of an image that has n_tokens, at most n_tokens.

        Args:
            image: position of the image in the call.
            n_tokens: visual tokens the image has.
        """
        if self.keep_tokens is not None:
            tokens = self.keep_tokens
            wanted = tokens[image] if isinstance(tokens, tuple) else tokens
        else:
            ratio = (
                self.keep_ratio[image] if isinstance(self.keep_ratio, tuple) else self.keep_ratio
            )
            # The small term keeps 0.29 * 100 at 29 in spite of binary fractions.
            wanted = max(1, math.floor((1.0 if ratio is None else ratio) * n_tokens + 1e-9))
        return min(wanted, n_tokens)

    def budgets(self, n_tokens: Sequence[int]) -> tuple[int, ...]:
        """The budget of every image of a call.

        Args:
            n_tokens: visual tokens of each image.

        Raises:
            SettingsError: a tuple of budgets has another length than the call has images.
        """
        for field, value in (("keep_tokens", self.keep_tokens), ("keep_ratio", self.keep_ratio)):
            check_per_image(field, value, len(n_tokens))
        budgets = tuple(self.budget(image, count) for image, count in enumerate(n_tokens))
        whole = [image for image, count in enumerate(n_tokens) if budgets[image] >= count]
        if whole and self.keep_tokens is not None:
            logger.warning(
                "%s: keep_tokens=%s is no less than the tokens of image(s) %s: nothing is pruned",
                self.name,
                self.keep_tokens,
                ", ".join(map(str, whole)),
            )
        return budgets

    # -- what a method overrides: one or more of these -------------------------------------

    def tower_pass(self, job: TowerJob) -> TowerPass | None:
        """Station "tower": how to prune inside one forward of the tower; None to leave it alone."""
        return None

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor | None:
        """Station "bridge": which tokens of one image to keep.

        Args:
            tokens: the image's patch tokens, after the projector.
            budget: how many to keep, at most all of them.
            pixels: [3, H, W] pixel values of the image.

        Returns:
            int64 [budget] ascending positions among the tokens, or None to keep all.
        """
        return None

    def layer_cuts(self, n_images: int, n_layers: int) -> tuple[LayerCut, ...]:
        """Station "layer": cuts inside the language model of n_layers decoder layers."""
        return ()


def checked_counts(field: str, value: Any) -> Any:
    """A count >= 1, a tuple of them, or None; booleans and floats are refused.

    Raises:
        SettingsError: anything else.
    """
    return _each(field, value, _checked_count)


def check_per_image(field: str, value: object, n_images: int) -> None:
    """Refuse a tuple of per-image settings that does not fit the images of a call.

    Raises:
        SettingsError: the lengths differ.
    """
    if isinstance(value, tuple) and len(value) != n_images:
        raise SettingsError(
            f"{field} has {len(value)} values, but the call has {n_images} image(s): give one "
            "value per image, or one number for all"
        )


def _each(field: str, value: Any, check: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if not value:
            raise SettingsError(f"{field} is empty: give one value per image, or one number")
        return tuple(check(field, item) for item in value)
    return check(field, value)


def _checked_count(field: str, value: Any) -> int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{field} must be an integer >= 1 (tokens per image), got {value!r}")
    return value


def _checked_ratio(field: str, value: Any) -> float:
    value = _plain(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        raise SettingsError(f"{field} must be a number in (0, 1], got {value!r}")
    return float(value)


def _plain(value: Any) -> Any:
    """Python's own int or float for a number of another kind, such as NumPy's."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _explained(method: type[Method], error: ValidationError) -> str:
    """One line per invalid setting: field, value, what is allowed."""
    lines = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "missing":
            lines.append(f"{field} is missing: {method.model_fields[field].description}")
        elif detail["type"] == "extra_forbidden" and not method.model_fields:
            lines.append(f"takes no settings, got '{field}'")
        elif detail["type"] == "extra_forbidden":
            hint = nearest(field, method.model_fields)
            lines.append(
                f"unknown setting '{field}'"
                + (f", did you mean '{hint}'?" if hint is not None else "")
                + f" Valid: {', '.join(method.model_fields)}."
            )
        elif detail["type"] == "value_error":
            lines.append(str(detail["ctx"]["error"]))
        else:
            lines.append(f"{field}: {detail['msg']}, got {detail['input']!r}")
    return f"{method.name}: " + "; ".join(lines)
