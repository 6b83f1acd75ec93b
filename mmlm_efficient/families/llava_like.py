"""What the LLaVA families share: a CLIP or SigLIP tower, a projector, a plain decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmlm_efficient.errors import SettingsError, UnsupportedError
from mmlm_efficient.families.base import DecoderParts, Family, Kind, TowerParts, Visual

TOWERS = ("clip_vision_model", "siglip_vision_model")
TEXT_MODELS = ("llama", "mistral", "qwen2")


class LlavaLike(Family):
    """Base of the families whose tower runs on square crops and whose projector on single tokens.

    Class attributes:
        model_type: of the config.
    """

    model_type: ClassVar[str]

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        no_cls = config.vision_config.model_type == "siglip_vision_model"
        if no_cls and config.vision_feature_select_strategy != "full":
            raise UnsupportedError(
                "vision_feature_select_strategy='default' drops the first token, but a SigLIP "
                "tower has no CLS token: a patch would be lost. Set it to 'full' in the config."
            )

    def refuse_cls(self) -> None:
        """Refuse a model that would have CLS tokens among the patches that it stitches.

        Raises:
            UnsupportedError: a CLIP tower with feature selection "full".
        """
        if self.keeps_cls:
            raise UnsupportedError(
                "vision_feature_select_strategy='full' keeps the CLS token of every tile, which "
                "cannot be stitched to a grid. Set it to 'default' in the config."
            )

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Whether the config is of this type with a tower and a text model that we know."""
        return (
            getattr(config, "model_type", None) == cls.model_type
            and config.vision_config.model_type in TOWERS
            and config.text_config.model_type in TEXT_MODELS
        )

    @cached_property
    def tower(self) -> TowerParts:
        """The CLIP or SigLIP encoder."""
        return tower_parts(self.model.model.vision_tower)

    @cached_property
    def decoder(self) -> DecoderParts:
        """The Llama, Mistral or Qwen2 decoder."""
        return decoder_parts(self.model.model.language_model, head=self.model)

    @property
    def placeholders(self) -> Mapping[Kind, int]:
        """The image token of the config."""
        return {"image": int(self.model.config.image_token_id)}

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
        """The config's layer and feature selection."""
        config = self.model.config
        return {
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def crops(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> Tensor:
        """Pixel values [n, 3, H, W] of all tower runs, in order."""
        return torch.cat(self.crop_pixels(inputs, visuals))

    def run_tower(self, inputs: Mapping[str, Any], visuals: Sequence[Visual]) -> list[Tensor]:
        """The tower's hidden states at the feature layer, before CLS is dropped."""
        index = self.model.config.vision_feature_layer
        outputs = self.model.model.vision_tower(
            self.crops(inputs, visuals), output_hidden_states=index, return_dict=True
        )
        if isinstance(index, int):
            return list(outputs.hidden_states[index])
        return list(torch.cat([outputs.hidden_states[one] for one in index], dim=-1))

    def project(self, features: Tensor) -> Tensor:
        """The model's projector."""
        return cast("Tensor", self.model.model.multi_modal_projector(features))

    def wrap_features(self, features: Sequence[Tensor], kinds: Sequence[Kind]) -> dict[str, Any]:
        """The output class that ``get_image_features`` returns."""
        # transformers annotates the field as one tensor but stores a list of per-image tensors.
        return {"image": BaseModelOutputWithPooling(pooler_output=cast(Any, list(features)))}


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
    """The parts of a Llama, Mistral, Qwen2 or Qwen2-VL text model, and the model on it."""
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
        norms=[layer.input_layernorm for layer in layers],
        rotary=module.rotary_emb,
        config=config,
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(attentions[0].head_dim),
        sliding=sliding,
        head=head,
        module=language_model,
    )
