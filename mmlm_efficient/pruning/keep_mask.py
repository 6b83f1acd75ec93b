"""The user's own selection of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from mmlm_efficient.errors import SettingsError
from mmlm_efficient.pruning.base import PruningMethod, Station, check_per_image
from mmlm_efficient.tokens import VisualTokens


@dataclass(frozen=True)
class Selection:
    """Patches to keep of one image.

    Attributes:
        indices: raster indices, ascending.
        shape: (rows, cols) or (patches,) of the mask it was made from; None for plain indices.
    """

    indices: tuple[int, ...]
    shape: tuple[int, ...] | None = None


class KeepMask(PruningMethod):
    """Keep exactly the patches that a mask names.

    ``mask`` is a boolean mask [rows, cols] or flat [patches], or the raster indices to keep: an
    array, a tensor or a plain list, for all images alike. A boolean array [images, rows, cols],
    or a list of arrays (or of index lists), gives every image its own.

    Example:
        >>> KeepMask(mask=[5, 3, 4]).mask.indices
        (3, 4, 5)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str] = "keep_mask"
    stations: ClassVar[tuple[Station, ...]] = ("bridge",)
    looks_at: ClassVar[str] = "the user's mask"

    exact: ClassVar[bool] = False

    mask: Selection | tuple[Selection, ...] = Field(
        description="patches to keep, as a boolean mask or raster indices"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_budget(cls, settings: Any) -> Any:
        # Before the fields: without a mask, the advice must not be to add one to the budget.
        for name in ("keep_tokens", "keep_ratio"):
            if isinstance(settings, dict) and settings.get(name) is not None:
                raise SettingsError(
                    f"takes no {name}: the mask says how many tokens stay. Leave it out, or use "
                    "a method with a budget"
                )
        return settings

    @field_validator("mask", mode="before")
    @classmethod
    def _read_mask(cls, value: Any) -> Selection | tuple[Selection, ...]:
        return _selections(value)

    def check_budget(self) -> None:
        """The mask is the budget."""

    def budgets(self, n_tokens: Sequence[int]) -> tuple[int, ...]:
        """Size of every image's selection."""
        check_per_image("mask", self.mask, len(n_tokens))
        return tuple(
            min(count, len(self._of(image).indices)) for image, count in enumerate(n_tokens)
        )

    def budget(self, image: int, n_tokens: int) -> int:
        """Size of an image's selection, at most n_tokens."""
        return min(len(self._of(image).indices), n_tokens)

    def select(self, tokens: VisualTokens, budget: int, pixels: Tensor) -> Tensor:
        """The positions of the selected patches."""
        selection = self._of(tokens.image)
        # Tiles, frames and newlines fit no mask of rows and columns.
        plain = tokens.n_in == tokens.grid[0] * tokens.grid[1]
        if selection.shape not in (None, tokens.grid if plain else None, (tokens.n_in,)):
            has = f"{tokens.grid[0]} x {tokens.grid[1]} patches"
            if not plain:
                has = (
                    f"{tokens.n_in} tokens (tiles or frames, newlines among them): give a flat "
                    "mask of that length, or the indices to keep"
                )
            raise SettingsError(
                f"mask of image {tokens.image} has shape {list(selection.shape or ())}, but the "
                f"image has {has}"
            )
        if selection.indices[-1] >= tokens.n_in:
            raise SettingsError(
                f"mask of image {tokens.image} names patch {selection.indices[-1]}, but the image "
                f"has patches 0 to {tokens.n_in - 1}"
            )
        wanted = torch.isin(tokens.index.to("cpu"), torch.tensor(selection.indices))
        keep = wanted.nonzero().squeeze(1)
        if len(keep) == 0:
            raise SettingsError(
                f"mask of image {tokens.image} keeps none of the tokens that reached the bridge"
            )
        return keep

    def _of(self, image: int) -> Selection:
        return self.mask[image] if isinstance(self.mask, tuple) else self.mask


def _selections(value: Any) -> Selection | tuple[Selection, ...]:
    """Read any of the accepted forms of a mask."""
    if isinstance(value, Selection):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype == np.bool_ and value.ndim == 3:
            return tuple(_selection(mask) for mask in value)
        return _selection(value)
    if not isinstance(value, list | tuple) or not value:
        raise SettingsError(
            f"mask must be a boolean array, a list of patch indices or a list of those, got "
            f"{type(value).__name__}"
        )
    if all(isinstance(item, Selection) for item in value):
        return tuple(value)
    rows_of_bools = all(
        isinstance(row, list | tuple) and row and all(isinstance(cell, bool) for cell in row)
        for row in value
    )
    if rows_of_bools or all(isinstance(item, int) for item in value):
        return _selection(np.asarray(value))
    return tuple(
        _selection(item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item))
        for item in value
    )


def _selection(array: np.ndarray[Any, Any]) -> Selection:
    """One image's mask or indices."""
    if array.dtype == np.bool_ and array.ndim in (1, 2):
        chosen, shape = np.flatnonzero(array), tuple(array.shape)
    elif np.issubdtype(array.dtype, np.integer) and array.ndim == 1:
        chosen, shape = np.unique(array), None
        if array.size != chosen.size or (array.size and int(chosen[0]) < 0):
            raise SettingsError("mask indices must be distinct and not negative")
    else:
        raise SettingsError(
            "mask must hold booleans [rows, cols] or [patches], or whole patch indices [n]; got "
            f"shape {list(array.shape)} of {array.dtype}"
        )
    if chosen.size == 0:
        raise SettingsError("mask keeps nothing: keep at least one patch per image")
    return Selection(tuple(int(index) for index in chosen), shape)
