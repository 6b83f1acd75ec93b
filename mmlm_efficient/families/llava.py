"""LLaVA-1.5 and its likes: ``LlavaForConditionalGeneration`` of transformers.

A CLIP or SigLIP tower, a projector applied to every token, and a Llama, Mistral or Qwen2 text
model. One image is one square grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families.base import DecoderParts, Family, TowerParts

TOWERS = ("clip_vision_model", "siglip_vision_model")
TEXT_MODELS = ("llama", "mistral", "qwen2")


class Llava(Family):
    """The ``llava`` family; see the module's description."""

    name: ClassVar[str] = "llava"
    describes: ClassVar[str] = (
        "LlavaForConditionalGeneration with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2 "
        "text model"
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        no_cls = config.vision_config.model_type == "siglip_vision_model"
        if no_cls and config.vision_feature_select_strategy != "full":
            raise UnsupportedError(
                "vision_feature_select_strategy='default' drops the first token, but a SigLIP "
                "tower has no CLS token: a patch would be lost. Set it to 'full' in the config."
            )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether the config is a Llava with a tower and a text model that we know."""
        return (
            getattr(config, "model_type", None) == "llava"
            and config.vision_config.model_type in TOWERS
            and config.text_config.model_type in TEXT_MODELS
        )

    @cached_property
    def tower(self) -> TowerParts:
        """The CLIP or SigLIP encoder."""
        tower = self.model.model.vision_tower
        return tower_parts(tower)

    @cached_property
    def decoder(self) -> DecoderParts:
        """The Llama, Mistral or Qwen2 decoder."""
        return decoder_parts(self.model.model.language_model, head=self.model)

    @property
    def placeholder_id(self) -> int:
        """The image token of the config."""
        return int(self.model.config.image_token_id)

    @property
    def max_context(self) -> int:
        """``max_position_embeddings`` of the text model."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def feature_layer(self) -> int:
        """The config's ``vision_feature_layer`` (an index into hidden states) as a layer index."""
        index = self.model.config.vision_feature_layer
        if not isinstance(index, int):
            raise SettingsError(
                f"vision_feature_layer={list(index)} in the model's config concatenates several "
                "layers, which would have different tokens after pruning inside the tower. "
                "Use a model with one feature layer or a method of the bridge station."
            )
        depth = len(self.tower.layers)
        # hidden_states[0] is the input of layer 0, hidden_states[i] the output of layer i - 1.
        return index - 1 if index >= 0 else depth + index

    @property
    def keeps_cls(self) -> bool:
        """True for a CLIP tower with feature selection "full"."""
        full = self.model.config.vision_feature_select_strategy == "full"
        return bool(self.tower.has_cls and full)

    @property
    def config_grid(self) -> tuple[int, int]:
        """``image_size`` over ``patch_size`` of the tower."""
        size, patch = (
            getattr(self.model.config.vision_config, name) for name in ("image_size", "patch_size")
        )
        height, width = (size, size) if isinstance(size, int) else size
        return int(height) // int(patch), int(width) // int(patch)

    @property
    def feature_arguments(self) -> Mapping[str, Any]:
        """The config's layer and feature selection; no image sizes."""
        config = self.model.config
        return {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_sizes": None,
        }

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Patches down and across."""
        patch = int(self.model.config.vision_config.patch_size)
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def encode(self, pixel_values: Tensor) -> list[Tensor]:
        """The model's own ``get_image_features``."""
        outputs = self.model.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        return list(outputs.pooler_output)

    def wrap_features(self, features: Sequence[Tensor]) -> BaseModelOutputWithPooling:
        """The output class that ``get_image_features`` returns."""
        # transformers annotates the field as one tensor but stores a list of per-image tensors.
        return BaseModelOutputWithPooling(pooler_output=cast(Any, list(features)))


def tower_parts(tower: nn.Module) -> TowerParts:
    """The parts of a ``CLIPVisionModel`` or ``SiglipVisionModel``."""
    module: Any = tower
    layers = list(module.encoder.layers)
    attentions = [layer.self_attn for layer in layers]
    return TowerParts(
        layers=layers,
        attentions=attentions,
        projections=[(a.q_proj, a.k_proj, a.v_proj) for a in attentions],
        heads=int(module.config.num_attention_heads),
        has_cls=hasattr(module.embeddings, "class_embedding"),
        config=module.config,
    )


def decoder_parts(language_model: nn.Module, head: nn.Module | None = None) -> DecoderParts:
    """The parts of a ``LlamaModel``, ``MistralModel`` or ``Qwen2Model``, and the model on it."""
    module: Any = language_model
    config = module.config
    layers = list(module.layers)
    attentions = [layer.self_attn for layer in layers]
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = getattr(config, "sliding_window", None)
        sliding = tuple(window is not None for _ in layers)
    else:
        sliding = tuple(kind == "sliding_attention" for kind in layer_types)
    return DecoderParts(
        layers=layers,
        attentions=attentions,
        projections=[(a.q_proj, a.k_proj, a.v_proj) for a in attentions],
        rotary=module.rotary_emb,
        config=config,
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attentions[0].head_dim),
        sliding=sliding,
        head=head,
    )
