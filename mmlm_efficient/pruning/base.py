"""The shape that all methods share: settings that check themselves, and what they decide where.

A method is one frozen settings class. It names the stations where it decides and overrides the
matching station methods of :class:`PruningMethod`; everything else (hooks, prompts, positions,
masks, reports) is done for it. See ``docs/adding_a_method.md``.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError, nearest
from mmlm_efficient.families.base import Family, Identity, Visual
from mmlm_efficient.pruning.observed import Crop, Observed, Sight
from mmlm_efficient.stations.attention import AttentionRequest
from mmlm_efficient.stations.bridge import PromptLayout
from mmlm_efficient.stations.layer_rows import LayerCut
from mmlm_efficient.stations.tower import TowerPass
from mmlm_efficient.tokens import VisualTokens

logger = logging.getLogger("mmlm_efficient.pruning")

Station = Literal["tower", "bridge", "layer", "attention", "cache"]
PositionIds = Literal["auto", "compact", "original"]
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

    def check_model(self, identity: Identity, family: Family) -> None:
        """Refuse settings that do not fit the model, whatever its images are.

        Called as soon as method and model are known, and again before every request.

        Args:
            identity: which model it is.
            family: of the model.

        Raises:
            SettingsError: they do not fit.
        """

    def attention_request(
        self, family: Family, identity: Identity, layout: Callable[[], PromptLayout]
    ) -> AttentionRequest | None:
        """Station "attention": the work of one request inside the decoder's attention.

        Args:
            family: of the model.
            identity: which model it is.
            layout: gives the prompts as they enter the layer that runs now.
        """
        return None


@dataclass(frozen=True)
class TowerJob:
    """One forward of the tower that a method may prune.

    Attributes:
        targets: patches (CLS not counted) to keep of each tower run.
        n_patches: patches of each tower run; of the longest where they differ (`lengths`).
        last_cut_layer: last tower layer whose output may be cut (0-based).
        has_cls: the tower has a CLS token.
        lengths: patches of each tower run where they differ; None where all have n_patches.
        groups: for each tower run, the picture that it is a part of (tiles of one picture share
            one); None where each is a picture of its own.
        merge_unit: consecutive patches that the tower makes one visual token of.
        score_only: nothing may be cut; the pass's scores decide behind the tower.
    """

    targets: tuple[int, ...]
    n_patches: int
    last_cut_layer: int
    has_cls: bool
    lengths: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    merge_unit: int = 1
    score_only: bool = False


@dataclass(frozen=True)
class Scene:
    """What a bridge method may look at beside the tokens of one image or video.

    Attributes:
        visual: the image or video, as its family lays it out.
        observed: what the tower's last layer said about the tokens of each crop; empty unless
            the method `observes` something.
        n_together: images and videos in the same prompt.
        budget: the method's budget for this image, tokens.
        pixels: gives the pixel values [n_crops, 3, H, W] of its tower runs.
        pack: puts numbers [n_crops, L, D] per tower token into the order of the tokens [N, D],
            with a value for newline tokens.
        identity: which model it is.
        stats: the image processor's (mean, std) per channel, or None when it is not known.
        cache: for what depends on the image alone; lasts as long as its encoded tower outcome.
    """

    visual: Visual
    observed: Sequence[Observed]
    n_together: int
    budget: int
    pixels: Callable[[], Tensor]
    pack: Callable[[Tensor, float], Tensor]
    identity: Identity
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    cache: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerJob:
    """One request at the decoder-layer station.

    Attributes:
        tokens: the tokens of each image and video that enter the language model.
        stock: how many each had before anything was pruned.
        samples: for each, the prompt of the batch that it belongs to.
        n_layers: decoder layers.
        identity: which model it is.
    """

    tokens: tuple[VisualTokens, ...]
    stock: tuple[int, ...]
    samples: tuple[int, ...]
    n_layers: int
    identity: Identity


class PruningMethod(Method):
    """A method that keeps fewer visual tokens of each image.

    The budget T is a number of visual tokens per image: ``keep_tokens``, or
    ``max(1, floor(keep_ratio * N))`` of the N tokens an image has. A tuple gives each image of a
    call its own budget. Exactly T tokens are kept; with T >= N nothing is pruned.

    Class attributes:
        exact: :meth:`select` keeps exactly the budget, and is not called when that is all tokens.
            False for a method that counts by itself.
        observes: what :meth:`reduce` or :meth:`condense` need to know from the tower's last
            layer; the tower then runs unpruned.
        default_positions: what position_ids="auto" means where positions count along one axis.
        budget_counts: what the budget counts, for documentation.
        looks_at: what the ranking is computed from; sees_prompt: whether the text has a say;
            merges: whether tokens are merged, not only dropped; all for documentation.
    """

    exact: ClassVar[bool] = True
    observes: ClassVar[frozenset[Sight]] = frozenset()
    default_positions: ClassVar[Literal["compact", "original"]] = "compact"
    budget_counts: ClassVar[str] = "tokens of each image that enter the language model"
    looks_at: ClassVar[str] = "nothing"
    sees_prompt: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    keep_tokens: Budget = Field(None, description="tokens to keep per image, >= 1")
    keep_ratio: Ratio = Field(None, description="share of the tokens to keep per image, in (0, 1]")
    position_ids: PositionIds = Field(
        "auto",
        description="positions of kept tokens in the language model: renumbered, their own, or "
        "what the method's authors do",
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
        for name, value in (("keep_tokens", self.keep_tokens), ("keep_ratio", self.keep_ratio)):
            check_per_image(name, value, len(n_tokens))
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

    def positions(self, axes: bool) -> Literal["compact", "original"]:
        """The position rule in force.

        Args:
            axes: positions count along several axes (M-RoPE), where tokens keep their own.

        Raises:
            SettingsError: renumbering was asked for where it has no meaning.
        """
        if axes and self.position_ids == "compact":
            raise SettingsError(
                f"{self.name}: position_ids='compact' has no meaning in a model whose positions "
                "count along rows, columns and time: kept tokens keep theirs. Use 'original' or "
                "'auto'"
            )
        if self.position_ids != "auto":
            return self.position_ids
        return "original" if axes else self.default_positions

    def layer_positions(self, axes: bool) -> Literal["compact", "original"]:
        """The rule behind cuts inside the language model; that of `positions` unless overridden."""
        return self.positions(axes)

    def check_request(self, identity: Identity, n_tokens: Sequence[int]) -> None:
        """Refuse, before the tower runs, settings that do not fit the model or its images.

        Args:
            identity: which model it is.
            n_tokens: tokens of every image, CLS not counted.

        Raises:
            SettingsError: they do not fit.
        """

    def idle(self, n_tokens: Sequence[int]) -> bool:
        """Whether images of so many tokens all stay whole, so that nothing need be observed."""
        return False

    @property
    def cuts_tower(self) -> bool:
        """Whether patches are cut while the tower runs, or scored there for a cut behind it."""
        return type(self).tower_pass is not PruningMethod.tower_pass

    @property
    def keeps_newlines(self) -> bool:
        """Whether, of an image cut into tiles, newlines of rows that have a token left stay."""
        return False

    @property
    def condenses(self) -> bool:
        """Whether the tokens of each tower run are reduced right behind the tower."""
        return type(self).condense is not PruningMethod.condense

    # -- what a method overrides: one or more of these -------------------------------------

    def tower_pass(self, job: TowerJob) -> TowerPass | None:
        """Station "tower": how to prune inside one forward of the tower; None to leave it alone."""
        return None

    def condense(self, crop: Crop, budget: int) -> Crop:
        """Station "tower", behind its last layer: fewer tokens of one tower run.

        Args:
            crop: the run's tokens in front of the projector.
            budget: how many may be left, fewer than there are.
        """
        return crop

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor | None:
        """Station "bridge": which tokens of one image to keep.

        Args:
            tokens: the image's tokens (CLS not among them), after the projector.
            budget: how many to keep, at most all of them.
            pixels: [3, H, W] pixel values of the image (its overview, or first frame).

        Returns:
            int64 [budget] ascending positions among the tokens, or None to keep all.
        """
        return None

    def reduce(self, tokens: VisualTokens, scene: Scene) -> VisualTokens:
        """Station "bridge": fewer tokens of one image; by default those that `select` names.

        Args:
            tokens: the image's tokens (CLS not among them), after the projector.
            scene: what else is known about the image, its budget among it.
        """
        if self.exact and scene.budget >= len(tokens):
            return tokens
        keep = self.select(tokens, scene.budget, scene.pixels()[0])
        if keep is None:
            return tokens
        return tokens.take(self._checked_selection(keep, tokens, scene.budget))

    def layer_cuts(self, job: LayerJob) -> tuple[LayerCut, ...]:
        """Station "layer": cuts inside the language model."""
        return ()

    def observed_layer(self, family: Family) -> int:
        """The tower layer (0-based) whose attention the method observes.

        Raises:
            SettingsError: the layer attends to windows of the picture only.
        """
        family.check_observed(family.feature_layer, "the feature layer")
        return family.feature_layer

    def _checked_selection(self, keep: Any, tokens: VisualTokens, budget: int) -> Tensor:
        """A selection on the CPU, refused unless it is what ``select`` has to return."""
        where = f"method '{self.name}', image {tokens.image}: select() must return"
        whole = isinstance(keep, Tensor) and keep.dtype in (torch.int64, torch.int32)
        if not whole or keep.ndim != 1:
            got = f"{list(keep.shape)} of {keep.dtype}" if isinstance(keep, Tensor) else type(keep)
            raise SettingsError(f"{where} a tensor of int64 positions [{budget}], got {got}")
        chosen: Tensor = keep.detach().to("cpu", torch.int64)
        if self.exact and len(chosen) != budget:
            raise SettingsError(
                f"{where} exactly {budget} positions (the budget), got {len(chosen)}"
            )
        if bool((chosen.diff() <= 0).any()):
            raise SettingsError(f"{where} positions in ascending order, each once: sort them")
        if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < len(tokens):
            raise SettingsError(
                f"{where} positions from 0 to {len(tokens) - 1} among the tokens that it was given "
                f"(not patch indices), got {int(chosen[0])} to {int(chosen[-1])}"
            )
        return chosen


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
        if detail["type"] == "missing" and field in method.model_fields:
            known = method.model_fields.get(str(detail["loc"][0]))
            what = "" if known is None else f": {known.description}"
            lines.append(f"{field} is missing{what}")
        elif detail["type"] == "extra_forbidden" and not method.model_fields:
            lines.append(f"takes no settings, got '{field}'")
        elif detail["type"] == "extra_forbidden":
            hint = nearest(field, method.model_fields)
            lines.append(
                f"unknown setting '{field}'"
                + (f", did you mean '{hint}'?" if hint is not None else ".")
                + f" Valid: {', '.join(method.model_fields)}."
            )
        elif detail["type"] == "value_error":
            lines.append(str(detail["ctx"]["error"]))
        else:
            lines.append(f"{field}: {detail['msg']}, got {detail['input']!r}")
    return f"{method.name}: " + "; ".join(lines)
