"""What differs between model families, as data and a few questions.

A family is one file with one :class:`Family` subclass. It tells the stations where the parts of
the model are (:class:`TowerParts`, :class:`DecoderParts`), which images and videos a request has
(:class:`Visual`), how the tower's tokens become the sequence that the prompt holds, and which
placeholders stand for them. Nobody outside this package asks which model class it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmlm_efficient.errors import PromptError, SettingsError
from mmlm_efficient.families.frames import FrameProcessor
from mmlm_efficient.families.wrapped import input_device
from mmlm_efficient.tokens import TokenPlaces

Kind = Literal["image", "video"]
# How a picture is made to fit the tower's grid: the middle is cut out, all is distorted, or the
# shorter side is padded.
Fit = Literal["crop", "stretch", "pad"]


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
        merge_unit: consecutive patches that become one visual token.
        full_attention: layers that attend to the whole picture, all others to windows of it;
            None when there are no windows.
    """

    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    projections: Sequence[tuple[nn.Module, nn.Module, nn.Module]]
    heads: int
    has_cls: bool
    config: Any
    merge_unit: int = 1
    full_attention: frozenset[int] | None = None


@dataclass(frozen=True)
class DecoderParts:
    """The pieces of a language model that the layer station hooks.

    Attributes:
        layers: decoder layers in order.
        attentions: the self-attention module of each layer.
        projections: (query, key, value) projection of each layer.
        norms: the norm in front of each layer's attention.
        rotary: module that maps (hidden states, position ids [B, L]) to (cos, sin) [B, L, d].
        config: the text config; masks are built for its attention implementation.
        heads: query heads; kv_heads: key and value heads; head_dim: width of a head.
        sliding: for each layer, whether its attention uses the sliding-window mask.
        head: the model whose forward takes labels for the decoder's logits, if there is one.
        module: the text model itself, whose `set_attn_implementation` reaches its attention alone.
    """

    layers: Sequence[nn.Module]
    attentions: Sequence[nn.Module]
    projections: Sequence[tuple[nn.Module, nn.Module, nn.Module]]
    norms: Sequence[nn.Module]
    rotary: nn.Module
    config: Any
    heads: int
    kv_heads: int
    head_dim: int
    sliding: tuple[bool, ...]
    head: nn.Module | None = None
    module: Any = None


@dataclass(frozen=True)
class Identity:
    """Which model this is, for settings that were tuned for one model.

    Attributes:
        name: what it was loaded as: a hub id, the path of a folder, or "pocket".
        family: name of its family.
        decoder_layers, decoder_width: of the language model.
        tower_layers: of the vision tower.
    """

    name: str
    family: str
    decoder_layers: int
    decoder_width: int
    tower_layers: int

    @property
    def short_name(self) -> str:
        """The last part of the name: what the owner's name or the parent folders do not change.

        Example:
            >>> Identity("llava-hf/llava-1.5-7b-hf", "llava", 32, 4096, 24).short_name
            'llava-1.5-7b-hf'
        """
        return self.name.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Visual:
    """One image or video of a request.

    Attributes:
        kind: "image" or "video"; each kind has a placeholder of its own in the prompt.
        crop_grids: for every run of the tower that it takes (image, tile, frame, or temporal
            step), the (rows, cols) of tokens that come out of it.
        places: where its tokens stand in the prompt, CLS not counted.
        size: (height, width) of the original picture in pixels, where packing depends on it.
    """

    kind: Kind
    crop_grids: tuple[tuple[int, int], ...]
    places: TokenPlaces = field(repr=False)
    size: tuple[int, int] | None = None

    @property
    def n_crops(self) -> int:
        """Runs of the tower."""
        return len(self.crop_grids)


class Family(ABC):
    """One family of multimodal models, bound to one model.

    Args:
        model: a model of this family, as transformers builds it.

    Class attributes:
        name: of the family; describes: the models in words.
        pixel_inputs: inputs of the model that hold images or videos.
        consumed: inputs of the model that the tower uses up, absent from what the language
            model's part is given.
        tables: inputs of the model that hold whole numbers about the pictures; nested lists are
            taken too.
        packs_pruned: whether tokens can be cut inside and right behind the tower, before they
            are packed. False where packing resizes grids: there all tokens go through, and
            scores are packed as features are.
        tiles: whether an image may be an overview and tiles.
        merges_patches: whether the tower makes one token of several patches.
        axes: whether positions count along several axes (M-RoPE), which pruning always keeps.
    """

    name: ClassVar[str]
    describes: ClassVar[str]
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    consumed: ClassVar[tuple[str, ...]] = ("pixel_values",)
    tables: ClassVar[tuple[str, ...]] = ()
    packs_pruned: ClassVar[bool] = True
    tiles: ClassVar[bool] = False
    merges_patches: ClassVar[bool] = False
    axes: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, config: Any) -> bool:
        """Whether a model with this config belongs to the family."""

    def identity(self, name: str) -> Identity:
        """Which model this is.

        Args:
            name: what it was loaded as.
        """
        return Identity(
            name=name,
            family=self.name,
            decoder_layers=len(self.decoder.layers),
            decoder_width=int(self.model.config.get_text_config().hidden_size),
            tower_layers=len(self.tower.layers),
        )

    # -- parts -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def tower(self) -> Any:
        """The vision tower: `TowerParts`, or `PackedTowerParts` of a packed one."""

    @property
    @abstractmethod
    def decoder(self) -> DecoderParts:
        """The language model."""

    @property
    @abstractmethod
    def placeholders(self) -> Mapping[Kind, int]:
        """For each kind of input, the token id that stands for one visual token in a prompt."""

    @property
    def input_device(self) -> torch.device:
        """Where the model's inputs belong; its weights may be elsewhere, see `input_device`.

        Raises:
            UnsupportedError: the model has no weights in memory.
        """
        return input_device(self.model)

    @property
    def backbone(self) -> Any:
        """The model without its output head: gives the state behind the last norm."""
        return self.model.model

    @property
    def max_context(self) -> int:
        """Longest sequence of the language model, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    @abstractmethod
    def feature_layer(self) -> int:
        """0-based tower layer whose output is the visual feature.

        Raises:
            SettingsError: the config asks for the features of several layers.
        """

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

    def check_observed(self, layer: int, source: str) -> None:
        """Refuse to look at attention that a tower layer does not compute.

        Args:
            layer: 0-based tower layer to observe.
            source: which setting names it, for the message.

        Raises:
            SettingsError: the layer does not exist, or attends to windows of the picture only.
        """
        depth, full = len(self.tower.layers), self.tower.full_attention
        if not 0 <= layer < depth:
            raise SettingsError(
                f"{source}={layer}, but the vision tower has {depth} layers: give 0 to {depth - 1}"
            )
        if full is not None and layer not in full:
            raise SettingsError(
                f"{source}={layer}: that layer of the vision tower attends to windows only, so "
                "there is no attention over the whole picture to rank by. Layers that attend to "
                f"all of it: {', '.join(map(str, sorted(full))) or 'none'}"
            )

    @property
    def keeps_cls(self) -> bool:
        """Whether the tower's CLS token is one of the visual tokens of an image."""
        return False

    @property
    def usual_tokens(self) -> int:
        """Placeholders of an image of the size that the config names, for messages."""
        rows, cols = self.config_grid
        return rows * cols + int(self.keeps_cls)

    @property
    @abstractmethod
    def config_grid(self) -> tuple[int, int]:
        """(rows, cols) of tokens of one tower run of the size that the config names."""

    @property
    @abstractmethod
    def feature_arguments(self) -> Mapping[str, Any]:
        """Arguments of the model's forward that change its image features, with the values that
        they have when they are left out."""

    # -- pictures and frames in front of the model -----------------------------------------

    def frame_processor(self, processor: Any) -> FrameProcessor | None:
        """What lays out the frames of videos; None where every frame is an image of the prompt.

        Args:
            processor: the model's processor of transformers.
        """
        return None

    @property
    def usual_frames(self) -> int:
        """Frames to take of a video when the request does not say."""
        return 32 if "video" in self.placeholders else 8

    def image_fit(self, processor: Any) -> Fit:
        """How the image processor makes a picture fit the grid of one tower run."""
        images = getattr(processor, "image_processor", None)
        return "crop" if getattr(images, "do_center_crop", False) else "stretch"

    # -- a request's images ----------------------------------------------------------------

    def as_tensors(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with `tables` as tensors of integers, lists beside the other inputs.

        Raises:
            PromptError: one holds no whole numbers.
        """
        result = dict(inputs)
        given = [inputs.get(name) for name in ("input_ids", *self.pixel_inputs)]
        device = next((one.device for one in given if isinstance(one, Tensor)), None)
        for name in self.tables:
            if (value := result.get(name)) is not None:
                table = whole_numbers(name, value)
                result[name] = table if isinstance(value, Tensor) else table.to(device)
        return result

    @abstractmethod
    def visuals(self, inputs: Mapping[str, Any]) -> tuple[Visual, ...]:
        """The images, then the videos of model inputs, each kind in prompt order.

        Raises:
            PromptError: inputs of another shape than the processor gives.
        """

    @abstractmethod
    def crop_pixels(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """Pixel values [n_crops, 3, H, W] of the tower runs of every image and video."""

    def tokens_of(self, visual: Visual) -> int:
        """Visual tokens, and so placeholders in the prompt, of one unpruned image or video."""
        return len(visual.places) + int(self.keeps_cls)

    @abstractmethod
    def stock_features(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The model's own features [tokens_of, D] of every image and video."""

    @abstractmethod
    def run_tower(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """Run the tower on every crop.

        Returns:
            For each crop of each visual, in order, features [L, C] in front of the projector,
            CLS first where the tower has one. With a pass active at the tower station the rows
            behind a crop's own count are padding.
        """

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Tower features [n, L, C] as inputs [n, L, D] of the language model."""

    @abstractmethod
    def pack(self, values: Tensor, visual: Visual, newline: Tensor | None) -> Tensor:
        """Anything that the tower's tokens have, in the order and form of the prompt's tokens.

        Args:
            values: [n_crops, L, D'], any numbers per token (CLS not among them).
            visual: whose they are.
            newline: [D'], what newline tokens get; None for zeros.

        Returns:
            [N, D'] as the model packs its features: stitched, unpadded, resized, newlines added.
        """

    @property
    def newline(self) -> Tensor | None:
        """The model's own newline embedding [D], if it has one."""
        return None

    def position_axes(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Positions [3, B, S] of an uncut prompt where they count along several axes."""
        return None

    @abstractmethod
    def wrap_features(self, features: Sequence[Tensor], kinds: Sequence[Kind]) -> dict[str, Any]:
        """What the model takes as ``mm_encoder_outputs``.

        Args:
            features: one tensor [T_i, D] per image or video.
            kinds: of each.
        """


def pixels_of(inputs: Mapping[str, Any], name: str) -> Tensor | None:
    """An input that holds pictures; None where there are none.

    Raises:
        PromptError: it is no tensor.
    """
    pixels = inputs.get(name)
    if pixels is not None and not isinstance(pixels, Tensor):
        raise PromptError(
            f"{name}: expected a tensor, got {type(pixels).__name__}. Give what the processor "
            "returns with return_tensors='pt'."
        )
    return pixels


def whole_numbers(name: str, value: Any) -> Tensor:
    """Whole numbers about pictures as a tensor.

    Args:
        name: of the input, for the message.
        value: a tensor, array, or nested sequence of numbers.

    Returns:
        A tensor of integers; a tensor of integers is returned itself.

    Raises:
        PromptError: something else, or fractions.

    Example:
        >>> whole_numbers("image_sizes", [[22, 61], [70, 70]]).tolist()
        [[22, 61], [70, 70]]
    """
    if isinstance(value, Tensor):
        table = value
    else:
        try:
            rows = [row.tolist() if hasattr(row, "tolist") else row for row in value]
            table = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise PromptError(
                f"{name}: expected a tensor or nested lists of whole numbers, got {value!r}. Give "
                "what the processor returns."
            ) from error
    if not table.is_floating_point():
        return table
    if not bool((table == table.round()).all()):
        raise PromptError(
            f"{name}: must hold whole numbers, got {table.tolist()}. Give what the processor "
            "returns."
        )
    return table.to(torch.int64)


def padded_stack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors [L_i, C] as one [n, L, C], zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
