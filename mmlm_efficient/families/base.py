"""What differs between model families, as data and a few questions.

A family is one file with one :class:`Family` subclass. It tells the stations where the parts of
the model are (:class:`TowerParts`, :class:`DecoderParts`), how many tokens an image has and which
placeholder stands for them. Nobody outside this package asks which model class it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mmlm_efficient.errors import SettingsError


@dataclass(frozen=True)
class TowerParts:
    """The pieces of a vision tower that the tower station hooks.

    Attributes:
        layers: encoder layers in order; each maps hidden states [B, L, C] to the same shape.
        attentions: the self-attention module of each layer.
        projections: (query, key, value) projection of each layer, each giving [B, L, C].
        heads: attention heads.
        has_cls: token 0 is a CLS token that is no patch.
        config: the tower's config; masks are built for its attention implementation.
    """

    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    projections: Sequence[tuple[nn.Module, nn.Module, nn.Module]]
    heads: int
    has_cls: bool
    config: Any


@dataclass(frozen=True)
class DecoderParts:
    """The pieces of a language model that the layer station hooks.

    Attributes:
        layers: decoder layers in order.
        attentions: the self-attention module of each layer.
        projections: (query, key, value) projection of each layer.
        rotary: module that maps (hidden states, position ids [B, L]) to (cos, sin) [B, L, d].
        config: the text config; masks are built for its attention implementation.
        heads: query heads; kv_heads: key and value heads; head_dim: width of a head.
        sliding: for each layer, whether its attention uses the sliding-window mask.
        head: the model whose forward takes labels for the decoder's logits, if there is one.
    """

    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    projections: Sequence[tuple[nn.Module, nn.Module, nn.Module]]
    rotary: nn.Module
    config: Any
    heads: int
    kv_heads: int
    head_dim: int
    sliding: tuple[bool, ...]
    head: nn.Module | None = None


class Family(ABC):
    """One family of multimodal models, bound to one model.

    Args:
        model: a model of this family, as transformers builds it.
    """

    name: ClassVar[str]
    describes: ClassVar[str]

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, config: Any) -> bool:
        """Whether a model with this config belongs to the family."""

    @property
    @abstractmethod
    def tower(self) -> TowerParts:
        """The vision tower."""

    @property
    @abstractmethod
    def decoder(self) -> DecoderParts:
        """The language model."""

    @property
    @abstractmethod
    def placeholder_id(self) -> int:
        """Token id that stands for one visual token in a prompt."""

    @property
    @abstractmethod
    def max_context(self) -> int:
        """Longest sequence of the language model, in tokens."""

    @property
    @abstractmethod
    def feature_layer(self) -> int:
        """0-based tower layer whose output is the visual feature.

        Raises:
            SettingsError: the config asks for the features of several layers.
        """

    @property
    @abstractmethod
    def keeps_cls(self) -> bool:
        """Whether the tower's CLS token is one of the visual tokens of an image."""

    @property
    @abstractmethod
    def config_grid(self) -> tuple[int, int]:
        """(rows, cols) of patches of an image of the size that the config names."""

    @property
    @abstractmethod
    def feature_arguments(self) -> Mapping[str, Any]:
        """Arguments of the model's forward that change its image features, with the values that
        they have when they are left out."""

    @abstractmethod
    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """(rows, cols) of patches of each image in pixel_values [n, 3, height, width]."""

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> list[Tensor]:
        """Run the tower and the projector as the stock model does.

        Args:
            pixel_values: [n, 3, height, width].

        Returns:
            n tensors [L, D]. With a pass active at the tower station, L is the longest image's
            count and the rows after an image's own count are padding.
        """

    @abstractmethod
    def wrap_features(self, features: Sequence[Tensor]) -> Any:
        """The object that the model takes as ``mm_encoder_outputs["image"]``.

        Args:
            features: one tensor [T_i, D] per image, in prompt order.
        """

    def tokens_per_image(self, grid: tuple[int, int]) -> int:
        """Visual tokens, and so placeholders in the prompt, of one unpruned image."""
        return grid[0] * grid[1] + int(self.keeps_cls)

    @property
    def last_cut_layer(self) -> int:
        """Last tower layer whose output may still be cut: one before the feature layer.

        Raises:
            SettingsError: the tower has too few layers below the feature layer.
        """
        last = self.feature_layer - 1
        if last < 1:
            raise SettingsError(
                f"vision_feature_layer points at tower layer {self.feature_layer} (0-based): "
                "pruning inside the tower needs at least layer 2. Use a deeper feature layer or "
                "a method of the bridge station."
            )
        return last
