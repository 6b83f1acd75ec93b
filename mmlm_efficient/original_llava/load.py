"""Checkpoint folders of the original LLaVA code, loaded into the classes of transformers.

Such a folder (``liuhaotian/llava-v1.5-7b``, ``llava-v1.6-*``, ``lmms-lab/llava-onevision-*``) has
one flat config.json, tensors under the names of the ``llava`` package, no image token, no
processor, and mostly no vision tower: the LLaVA-1.5 checkpoints leave CLIP in its own repository.
`config` and `names` beside this file translate configs and names; here the files are read, the
image token is added and the processor is built.

The image token takes the next free id of the tokenizer. Where the embedding has no row for it, the
embedding and the language model's head grow to a multiple of 64 rows, as in the checkpoints that
transformers converted. Each new row is the mean of the old ones. In the embedding it is never
read, because image features replace it. In the head it gives the mean of all other logits, which
no argmax picks; sampling picks one of the new rows with a probability below (new rows) / (old
rows), as exp is convex. The logits of the old tokens stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from mmlm_efficient.errors import ModelLoadError
from mmlm_efficient.original_llava.config import TEXT_CONFIGS, converted_config, tower_config
from mmlm_efficient.original_llava.files import (
    read_all,
    read_json,
    tower_files,
    tower_folder,
    tower_shapes,
    vision_config_in,
    weight_files,
    weight_paths,
)
from mmlm_efficient.original_llava.names import (
    EMBEDDING,
    HEAD,
    NEWLINE,
    converted_state,
    converted_tower,
    left_over,
    original_name,
    without_cut,
)
from mmlm_efficient.original_llava.processor import (
    IMAGE,
    VIDEO,
    chat_end,
    original_processor,
    original_tokenizer,
)

ROWS = 64  # embeddings grow to a multiple of this
_MODELS = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
    "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
}


def is_original(folder: Path) -> bool:
    """Whether this is a model folder of the original LLaVA code.

    The folders that transformers writes have the model type "llava" too, but no
    ``mm_vision_tower`` in the config.

    Example:
        >>> is_original(Path("nowhere"))
        False
    """
    try:
        config = read_json(folder / "config.json")
    except ModelLoadError:  # reported by whoever reads the config for good
        return False
    return config.get("model_type") in TEXT_CONFIGS and "mm_vision_tower" in config


def missing_original(folder: Path) -> list[str]:
    """What an original folder lacks, in words; empty when it is complete.

    Raises:
        ModelLoadError: the folder or the index of the weights cannot be read.
    """
    try:
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise ModelLoadError(f"{folder}: the folder cannot be read: {error}") from error
    missing = [] if "config.json" in names else ["config.json"]
    files = weight_files(folder, names)
    missing += sorted(set(files) - names)
    if not files:
        missing.append("model.safetensors or pytorch_model.bin (or an index with the files it has)")
    if not (names & {"tokenizer.json", "tokenizer.model"} or {"vocab.json", "merges.txt"} <= names):
        missing.append("tokenizer.json or tokenizer.model")
    return missing


def original_config(
    folder: Path, vision_tower: str | PathLike[str] | None = None
) -> PreTrainedConfig:
    """The config of transformers for an original folder; no weights are read.

    Args:
        folder: with the config.json. Where the weights are there too, the sizes of a tower inside
            them are read off; the rest is in config.json and in the name of the tower.
        vision_tower: folder of the tower, for one that is not known by name.

    Raises:
        UnsupportedError: a projector, a tower or an image layout that is not known.
        ModelLoadError: config.json or the head of a file of weights cannot be read.
    """
    raw = read_json(folder / "config.json")
    place = tower_folder(raw, folder, vision_tower)
    if place is not None:
        return converted_config(raw, vision_config_in(place))
    shapes = tower_shapes([file for file in weight_paths(folder) if file.is_file()])
    if not shapes:
        return converted_config(raw)
    return converted_config(raw, tower_config(str(raw["mm_vision_tower"]), shapes))


def load_original(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    vision_tower: str | PathLike[str] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """The model and the processor of an original folder.

    Args:
        folder: with config.json, weights (safetensors or .bin, with their index) and tokenizer.
        dtype: of the model; "auto" is the one in the config, else as stored.
        attn_implementation: attention kernel of transformers; None leaves the choice to it.
        vision_tower: folder of the vision tower, for checkpoints without it. None looks at
            ``mm_vision_tower``: a folder, or a hub id that is cached or can be fetched.
        options: more options of ``from_pretrained``, such as quantization_config and device_map.

    Returns:
        A LlavaForConditionalGeneration, LlavaNextForConditionalGeneration or
        LlavaOnevisionForConditionalGeneration in eval mode, and its processor.

    Raises:
        UnsupportedError: a projector, a tower or an image layout that is not known.
        ModelLoadError: a file is missing or damaged, or a tensor is missing or has no place.
    """
    missing = missing_original(folder)
    if missing:
        raise ModelLoadError(
            f"{folder}: not a complete folder of an original LLaVA model; missing: "
            f"{'; '.join(missing)}."
        )
    raw = read_json(folder / "config.json")
    config = original_config(folder, vision_tower)  # refuses before anything large is read
    tokenizer = original_tokenizer(folder, config)
    files = weight_paths(folder)
    apart: list[Path] = []
    if not tower_shapes(files):
        place = tower_folder(raw, folder, vision_tower)
        apart = tower_files(str(raw["mm_vision_tower"]), place)
    wanted = _wanted_dtype(dtype, raw)
    state = converted_state(read_all(files, wanted))
    if EMBEDDING not in state:
        raise ModelLoadError(_absent([EMBEDDING]))
    wanted = state[EMBEDDING].dtype if wanted is None else wanted
    state |= converted_tower(read_all(apart, wanted))
    state = _prepared(without_cut(state, config.vision_config), config, tokenizer)
    model = _build(config, state, {"dtype": wanted, **options}, attn_implementation)
    _set_generation(model, folder, tokenizer)
    return model, original_processor(raw, config, tokenizer)


def _wanted_dtype(dtype: torch.dtype | str, raw: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype to cast to; None leaves the tensors as stored."""
    if isinstance(dtype, torch.dtype):
        return dtype
    named = raw.get("dtype", raw.get("torch_dtype")) if dtype == "auto" else dtype
    if named is None:
        return None
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelLoadError(f"dtype: {named!r} is not a floating point dtype of torch.")
    return found


# The model


def _prepared(
    state: dict[str, Tensor], config: PreTrainedConfig, tokenizer: Any
) -> dict[str, Tensor]:
    """The state with rows for the image token; writes the token's id into the config."""
    text: Any = config.get_text_config()
    if config.model_type == "llava":
        state.pop(NEWLINE, None)  # stored by some, read for several crops only
    if text.tie_word_embeddings and HEAD in state:
        if not torch.equal(state[HEAD], state[EMBEDDING]):
            raise ModelLoadError(
                f"config.json says tie_word_embeddings, but {original_name(HEAD)} differs from "
                f"{original_name(EMBEDDING)} in the weights. Set it to false."
            )
        del state[HEAD]
    old = state[EMBEDDING].shape[0]
    if old != text.vocab_size:
        raise ModelLoadError(
            f"{original_name(EMBEDDING)}: has {old} rows, but vocab_size in config.json is "
            f"{text.vocab_size}."
        )
    tokens = [IMAGE, VIDEO] if config.model_type == "llava_onevision" else [IMAGE]
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    for name, number in zip(("image_token_id", "video_token_id"), ids, strict=False):
        setattr(config, name, number)
    highest = max(ids)
    if highest < old:  # Qwen2's embedding is larger than its vocabulary
        return state
    rows = -(-(highest + 1) // ROWS) * ROWS
    text.vocab_size = rows
    return {
        name: _grown(tensor, rows) if name in (EMBEDDING, HEAD) else tensor
        for name, tensor in state.items()
    }


def _grown(weight: Tensor, rows: int) -> Tensor:
    """More rows [rows, D], each the mean of the old ones; see the module's description."""
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def _build(
    config: PreTrainedConfig, state: dict[str, Tensor], options: dict[str, Any], attn: str | None
) -> Any:
    """The model around these tensors, which are not copied."""
    made: Any = _MODELS[str(config.model_type)]
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in made(config).state_dict().items()}
    if config.get_text_config().tie_word_embeddings:
        del expected[HEAD]
    absent = sorted(set(expected) - set(state))
    if absent:
        raise ModelLoadError(_absent(absent))
    extra = sorted(set(state) - set(expected))
    if extra:
        raise ModelLoadError(left_over([original_name(name) for name in extra]))
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ModelLoadError(
                f"{original_name(name)}: has the shape {list(state[name].shape)}, but config.json "
                f"asks for {list(shape)}."
            )
    if attn is not None:
        options = {**options, "attn_implementation": attn}
    try:
        model = made.from_pretrained(None, config=config, state_dict=state, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"the converted model cannot be built: {error}") from error
    return model.eval()


def _absent(names: Sequence[str]) -> str:
    shown = ", ".join(map(original_name, names[:3])) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} tensors are missing from the weights, such as {shown}. The folder belongs "
        "to another model, or is incomplete."
    )


def _set_generation(model: Any, folder: Path, tokenizer: Any) -> None:
    """End and padding tokens: those of the configs, of the tokenizer and of the chat style."""
    generation = model.generation_config
    path = folder / "generation_config.json"
    stored = read_json(path).get("eos_token_id") if path.is_file() else None
    ends: list[int] = []
    for given in (generation.eos_token_id, stored, tokenizer.eos_token_id, chat_end(tokenizer)):
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number not in ends:
                ends.append(number)
    generation.eos_token_id = ends or None
    generation.pad_token_id = tokenizer.pad_token_id
