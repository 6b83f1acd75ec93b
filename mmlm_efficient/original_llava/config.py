"""The config of transformers for a config of the original LLaVA code.

Covers what the ``llava`` package writes: LLaVA-1.5 and 1.6 (github.com/haotian-liu/LLaVA) and
LLaVA-OneVision (github.com/LLaVA-VL/LLaVA-NeXT). Three things are not what the original config
says at first sight:

- A SigLIP tower is cut by the original code: its last layer and its pooling head are deleted and
  the output of the last layer that is left is used, whatever ``mm_vision_select_layer`` says (-2,
  which is the same place in the tower before the cut). Here: one layer less, feature layer -1,
  selection "full" (there is no CLS token to drop).
- The original lists grid pinpoints as (width, height), transformers as (height, width). They are
  swapped here, so that of two equally good grids the one that the original takes is taken.
- The original has no image token in its vocabulary (it writes -200 into the ids).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from mmlm_efficient.errors import ModelLoadError, UnsupportedError
from mmlm_efficient.original_llava.names import TOWER, layers_of

TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llava": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_qwen": Qwen2Config,
}
PROJECTOR = "mlp2x_gelu"


@dataclass(frozen=True)
class Tower:
    """A vision tower that the original code knows by name; sizes before the SigLIP cut."""

    owner: str
    kind: str
    hidden_size: int
    intermediate_size: int
    layers: int
    head_width: int
    image_size: int
    patch_size: int


TOWERS = {
    "clip-vit-large-patch14-336": Tower("openai", "clip", 1024, 4096, 24, 64, 336, 14),
    "clip-vit-large-patch14": Tower("openai", "clip", 1024, 4096, 24, 64, 224, 14),
    "siglip-so400m-patch14-384": Tower("google", "siglip", 1152, 4304, 27, 72, 384, 14),
}


def converted_config(
    config: Mapping[str, Any], vision: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """The config of transformers for a config of the original code.

    Args:
        config: what the original ``config.json`` holds.
        vision: config of the tower as it is in the checkpoint (SigLIP: already cut); None takes
            it from the table by the name in ``mm_vision_tower``.

    Returns:
        A LlavaConfig for one square image (``image_aspect_ratio`` "pad", "square" or absent), a
        LlavaNextConfig for "anyres", a LlavaOnevisionConfig for "anyres_max_N". Its image token
        is the first id after the vocabulary.

    Raises:
        UnsupportedError: a projector, a tower or an image layout that is not known, by name.
        ModelLoadError: a field has a value that transformers cannot take.

    Example:
        >>> tiny = {"model_type": "llava", "hidden_size": 64, "num_attention_heads": 4}
        >>> clip = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
        >>> made = converted_config({**tiny, **clip, "mm_projector_type": "mlp2x_gelu"})
        >>> made.model_type, made.text_config.hidden_size, made.vision_config.image_size
        ('llava', 64, 336)
    """
    _check(config)
    tower = tower_config(str(config["mm_vision_tower"])) if vision is None else vision
    text = _text_config(config)
    options: dict[str, Any] = {
        "vision_config": tower,
        "text_config": text,
        "image_token_index": text.vocab_size,
        "tie_word_embeddings": text.tie_word_embeddings,
        **_features(config, tower),
    }
    aspect = config.get("image_aspect_ratio")
    if aspect in (None, "pad", "square"):
        grid = tower.image_size // tower.patch_size
        return LlavaConfig(**options, image_seq_length=grid * grid)
    options["image_grid_pinpoints"] = _pinpoints(config, tower.image_size)
    if aspect == "anyres":
        return LlavaNextConfig(**options)
    return LlavaOnevisionConfig(
        **options, video_token_index=text.vocab_size + 1, vision_aspect_ratio=aspect
    )


def _check(config: Mapping[str, Any]) -> None:
    """Refuse, by name, what transformers' classes would compute differently."""
    kind = config.get("model_type")
    if kind not in TEXT_CONFIGS:
        raise UnsupportedError(
            f"model_type: {kind!r} is unknown; allowed: {', '.join(map(repr, TEXT_CONFIGS))}."
        )
    # The original code reads an absent projector type as "linear".
    projector = config.get("mm_projector_type", "linear")
    if projector != PROJECTOR:
        raise UnsupportedError(
            f"mm_projector_type: {projector!r} is not supported; allowed: {PROJECTOR!r}."
        )
    aspect = config.get("image_aspect_ratio")
    several = isinstance(aspect, str) and re.fullmatch(r"anyres|anyres_max_\d+", aspect)
    if not several and aspect not in (None, "pad", "square"):
        raise UnsupportedError(
            f"image_aspect_ratio: {aspect!r} is not supported; allowed: 'pad', 'square', absent, "
            "'anyres', 'anyres_max_N'."
        )
    merge = config.get("mm_patch_merge_type", "flat")
    if several and merge != "spatial_unpad":
        raise UnsupportedError(
            f"mm_patch_merge_type: {merge!r} is not supported with image_aspect_ratio {aspect!r}; "
            "allowed: 'spatial_unpad'."
        )
    for name in ("mm_use_im_start_end", "mm_resampler_type", "s2"):
        if config.get(name):
            raise UnsupportedError(
                f"{name}: {config[name]!r} is not supported; only models without it are."
            )


def _text_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    made = TEXT_CONFIGS[config["model_type"]]
    # rope_theta and rope_scaling became rope_parameters, which transformers still translates.
    # use_cache may be false from training; the original passes True to generate.
    names = (set(made().to_dict()) | {"rope_theta", "rope_scaling"}) - {
        *("model_type", "architectures", "transformers_version", "dtype", "use_cache")
    }
    try:
        return made(**{name: config[name] for name in names & set(config)})
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelLoadError(f"config.json: is not a config of {made.__name__}: {error}") from error


def _features(config: Mapping[str, Any], tower: PreTrainedConfig) -> dict[str, Any]:
    """Which layer and which tokens of the tower are used; see the module's description."""
    aspect = str(config.get("image_aspect_ratio"))
    if tower.model_type == "siglip_vision_model":
        return {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    feature = config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise UnsupportedError(
            f"mm_vision_select_feature: {feature!r} is unknown; allowed: 'patch', 'cls_patch'."
        )
    if feature == "cls_patch" and aspect.startswith("anyres"):
        raise UnsupportedError(
            "mm_vision_select_feature: 'cls_patch' does not go with image_aspect_ratio "
            f"{aspect!r}: several crops with a CLS token form no grid. Allowed: 'patch'."
        )
    if aspect.startswith("anyres_max"):
        raise UnsupportedError(
            f"image_aspect_ratio: {aspect!r} is supported with a SigLIP tower only, but "
            f"mm_vision_tower is {config['mm_vision_tower']!r}."
        )
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise UnsupportedError(f"mm_vision_select_layer: {layer!r} is not a whole number.")
    strategy = "default" if feature == "patch" else "full"
    return {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}


def _pinpoints(config: Mapping[str, Any], unit: int) -> list[list[int]]:
    """``image_grid_pinpoints`` as (height, width) in pixels.

    The original gives a list of (width, height), the same written as a string, or the range
    "(1x1),...,(6x6)" in units of the tower's image size.
    """
    given = config.get("image_grid_pinpoints")
    points: Any = given
    try:
        if isinstance(given, str) and "x" in given:
            ends = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", given)]
            (low, high), (width, height) = ends[0], ends[-1]
            rows = range(high, height + 1)
            points = [(unit * w, unit * h) for w in range(low, width + 1) for h in rows]
        elif isinstance(given, str):
            points = ast.literal_eval(given)
        pairs = [[int(height), int(width)] for width, height in points]
    except (TypeError, ValueError, IndexError, SyntaxError) as error:
        raise ModelLoadError(f"image_grid_pinpoints: {given!r} is not a list of sizes.") from error
    if not pairs or any(side <= 0 or side % unit for pair in pairs for side in pair):
        raise ModelLoadError(
            f"image_grid_pinpoints: {given!r} is not a list of multiples of {unit}, the tower's "
            "image size."
        )
    return pairs


def tower_config(name: str, shapes: Mapping[str, Sequence[int]] | None = None) -> PreTrainedConfig:
    """The config of a tower that is known by name; a SigLIP tower is cut.

    Args:
        name: ``mm_vision_tower``: a hub id or a path; its last part counts.
        shapes: of the tensors in the checkpoint, by the names of transformers. The sizes are
            read off them; the width of a head, which no shape tells, is the one of the name.

    Raises:
        UnsupportedError: the name is not in the table.
        ModelLoadError: the shapes are those of no tower of this kind.
    """
    known = TOWERS.get(_last_part(name))
    if known is None:
        raise UnsupportedError(
            f"mm_vision_tower: {name!r} is not known; known: {', '.join(TOWERS)}. For another "
            "CLIP or SigLIP tower pass vision_tower=FOLDER, a folder with its config.json."
        )
    siglip = known.kind == "siglip"
    sizes: dict[str, Any] = {
        "hidden_size": known.hidden_size,
        "intermediate_size": known.intermediate_size,
        "num_hidden_layers": known.layers - siglip,
        "image_size": known.image_size,
        "patch_size": known.patch_size,
    }
    if shapes is not None:
        sizes = _sizes(shapes, sizes, has_cls=not siglip)
    heads, rest = divmod(sizes["hidden_size"], known.head_width)
    if rest:
        raise ModelLoadError(
            f"mm_vision_tower: {name!r} has heads {known.head_width} wide, but the tower in the "
            f"checkpoint is {sizes['hidden_size']} wide, which is no multiple."
        )
    if siglip:
        return SiglipVisionConfig(**sizes, num_attention_heads=heads, vision_use_head=False)
    return CLIPVisionConfig(**sizes, num_attention_heads=heads)


def hub_id(name: str) -> str:
    """The hub id of a tower that is known by name; any other name as it is.

    Example:
        >>> hub_id("/data/siglip-so400m-patch14-384")
        'google/siglip-so400m-patch14-384'
    """
    last = _last_part(name)
    return f"{TOWERS[last].owner}/{last}" if last in TOWERS else name


def _last_part(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _sizes(
    shapes: Mapping[str, Sequence[int]], known: Mapping[str, int], has_cls: bool
) -> dict[str, int]:
    try:
        hidden, _, _, patch = shapes[f"{TOWER}embeddings.patch_embedding.weight"]
        positions = shapes[f"{TOWER}embeddings.position_embedding.weight"][0] - has_cls
        inner = shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ModelLoadError(
            f"the vision tower in the checkpoint is incomplete or of another kind: {error}"
        ) from error
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise ModelLoadError(
            f"the vision tower in the checkpoint has {positions} patch positions, which form no "
            "square."
        )
    # 384 pixels hold 27 patches of 14 and a rest: only the name tells the rest.
    fits = known["patch_size"] == patch and known["image_size"] // patch == grid
    depth = layers_of(shapes)
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": depth if has_cls else min(depth, known["num_hidden_layers"]),
        "image_size": known["image_size"] if fits else grid * patch,
        "patch_size": patch,
    }


def cut_siglip(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a SigLIP tower's config without its last layer and its head; CLIP stays.

    Example:
        >>> cut_siglip(SiglipVisionConfig(num_hidden_layers=27)).num_hidden_layers
        26
    """
    if config.model_type != "siglip_vision_model":
        return config
    changes = {"num_hidden_layers": config.num_hidden_layers - 1, "vision_use_head": False}
    return SiglipVisionConfig.from_dict({**config.to_dict(), **changes})
