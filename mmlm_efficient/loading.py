"""From a name to a model on its device: the embedded pocket model, a local folder, or a hub id.

Everything that can be wrong is checked before the weights are read: the device, the dtype, the
quantization, and which files of the model are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from mmlm_efficient.errors import ModelLoadError, SettingsError, UnsupportedError, nearest
from mmlm_efficient.families import family_class
from mmlm_efficient.model import EfficientLMM, Methods
from mmlm_efficient.names import POCKET, POCKET_WEIGHTS
from mmlm_efficient.original_llava import (
    is_original,
    load_original,
    missing_original,
    original_config,
)
from mmlm_efficient.prepare import check_methods
from mmlm_efficient.processors import read_processor
from mmlm_efficient.quantization import (
    Quantization,
    check_quantization,
    quantization_config,
    skipped_modules,
    verify_quantized,
)
from mmlm_efficient.settings import as_methods

log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")

# Everything a model folder may hold that transformers reads; old .bin copies are left out.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# Checkpoints of the original LLaVA code are mostly .bin files; a projector alone is not needed.
_ORIGINAL_HUB_FILES = [*_HUB_FILES, "pytorch_model*.bin"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    source: str | os.PathLike[str] = POCKET,
    methods: Methods = (),
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
) -> EfficientLMM:
    """Load a multimodal model and its processor, ready to answer.

    Args:
        source: "pocket" (the small model in this package), the path of a folder in the layout of
            transformers or of the original LLaVA code, or a hub id of either, such as
            "llava-hf/llava-1.5-7b-hf" or "liuhaotian/llava-v1.5-7b".
        methods: what every request goes through unless it says otherwise: method objects, or
            their short forms such as "flowcut:64".
        dtype: "float32", "bfloat16", "float16", "auto" (as stored) or a torch dtype. None is
            float32 on the CPU and as stored elsewhere.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" (cuda if there is one).
        quantization: "int8" or "nf4" for the language model's weights, through bitsandbytes.
        attn_implementation: attention kernel of transformers; None leaves the choice to it.
        revision: branch, tag or commit of a hub id.
        vision_tower: folder of the CLIP or SigLIP tower, for models of the original LLaVA code,
            which mostly store none. None looks where the model's config says: a folder, or a hub
            id that is cached or can be fetched.

    Returns:
        The model in eval mode with its processor.

    Raises:
        SettingsError: unknown dtype, device, quantization or attention kernel, or methods that
            are unknown or clash.
        ModelLoadError: the model is not there, incomplete or damaged, or the device is missing.
        UnsupportedError: the model belongs to no supported family.

    Example:
        >>> from mmlm_efficient.pocket import scene
        >>> lmm = load("pocket")
        >>> answer = lmm.ask("What is in the picture?", image=scene("heldout", 56).image)
        >>> answer.usage.visual_tokens_in
        144
    """
    chosen = as_methods(methods)
    check_methods(chosen)
    target = check_device(device)
    wanted = check_dtype(dtype, target)
    check_quantization(quantization)
    _check_attention(attn_implementation)
    name = os.fspath(source)
    folder = find_folder(name, revision)
    original = is_original(folder)
    if vision_tower is not None and not original:
        raise SettingsError(
            f"vision_tower: {name} has its vision tower in its own weights; the argument is for "
            "models of the original LLaVA code. Leave it out."
        )
    if vision_tower is not None:
        vision_tower = os.path.expanduser(vision_tower)
    config = read_config(folder, name, vision_tower)
    family_class(config, name)
    options: dict[str, Any] = {"dtype": wanted, "attn_implementation": attn_implementation}
    skip: list[str] = []
    if quantization is not None:
        skip = skipped_modules(config)
        compute = wanted if isinstance(wanted, torch.dtype) else torch.bfloat16
        options["quantization_config"] = quantization_config(quantization, skip, compute)
        options["device_map"] = {"": target}
    if original:
        model, processor = load_original(folder, vision_tower=vision_tower, **options)
    else:
        model = _read_weights(folder, name, options)
        processor = read_processor(folder, config, name)
    if quantization is None:
        model = model.to(target)
    else:
        verify_quantized(model, quantization, skip)
    log.info("loaded %s from %s on %s", name, folder, target)
    return EfficientLMM(model.eval(), processor, chosen, name=name)


def check_device(device: str | torch.device) -> torch.device:
    """The torch device of a name, refused when it is malformed or not on this machine.

    Example:
        >>> check_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingsError(
            f"device: {device!r} is unknown; allowed: 'cpu', 'cuda', 'cuda:N', 'mps', 'auto'."
        ) from error
    if target.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(
            f"device: {device!r} is not supported; allowed: 'cpu', 'cuda', 'cuda:N', 'mps', 'auto'."
        )
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (target.index or 0):
            raise ModelLoadError(
                f"device: {str(target)!r} is not there; torch {torch.__version__} sees {count} "
                "CUDA devices. Use device='cpu' or 'auto', or install a CUDA build of torch."
            )
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError("device: 'mps' is not there on this machine. Use device='cpu'.")
    return target


def check_dtype(
    dtype: str | torch.dtype | None, device: torch.device
) -> torch.dtype | Literal["auto"]:
    """The torch dtype of a name; None is float32 on the CPU and "auto" elsewhere.

    Example:
        >>> check_dtype("bfloat16", torch.device("cpu"))
        torch.bfloat16
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return "auto"
    if dtype not in DTYPES:
        close = nearest(str(dtype), DTYPES)
        hint = f" Did you mean {close!r}?" if close else ""
        allowed = ", ".join(repr(one) for one in DTYPES)
        raise SettingsError(f"dtype: {dtype!r} is unknown; allowed: {allowed}, 'auto'.{hint}")
    return DTYPES[dtype]


def _check_attention(name: str | None) -> None:
    if name is not None and name not in ATTENTION:
        raise SettingsError(
            f"attn_implementation: {name!r} is unknown; allowed: {', '.join(ATTENTION)}."
        )


def find_folder(source: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched from the hub when it is a hub id that is not cached.

    Args:
        source: "pocket", a folder, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        ModelLoadError: naming the files that are missing and how to get them.
    """
    if source == POCKET:
        missing = missing_files(POCKET_WEIGHTS)
        if missing:
            raise ModelLoadError(
                f"pocket: the embedded weights are incomplete in {POCKET_WEIGHTS}; missing: "
                f"{'; '.join(missing)}. Install the package again, or train them: mmlm train pocket"
            )
        return POCKET_WEIGHTS
    if not source.strip():
        raise ModelLoadError(
            "source: is empty. Give 'pocket', the path of a model folder, or a hub id (OWNER/NAME)."
        )
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for "~nobody"
    if path.is_dir():
        missing = missing_files(path)
        if missing:
            raise ModelLoadError(
                f"{source}: not a complete model folder; missing: {'; '.join(missing)}."
            )
        return path
    if path.exists():
        raise ModelLoadError(
            f"{source}: is a file. Give the folder that holds config.json and the weights."
        )
    if _HUB_ID.fullmatch(source):
        return _from_hub(source, revision)
    close = nearest(source, [POCKET])
    hint = f" Did you mean {close!r}?" if close else ""
    raise ModelLoadError(
        f"{source}: is neither 'pocket', an existing folder, nor a hub id (OWNER/NAME).{hint}"
    )


def missing_files(folder: Path) -> list[str]:
    """What a model folder lacks, in words; empty when it is complete.

    Raises:
        ModelLoadError: the folder cannot be read, or the index of its weights is damaged.
    """
    if is_original(folder):
        return missing_original(folder)
    try:
        names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise ModelLoadError(f"{folder}: the folder cannot be read: {error}") from error
    missing = [] if "config.json" in names else ["config.json"]
    index = "model.safetensors.index.json"
    if index in names:
        missing += sorted(_shards(folder / index) - names)
    elif "model.safetensors" not in names:
        missing.append(f"model.safetensors (or {index} with the files it lists)")
    if not names & {"processor_config.json", "preprocessor_config.json"}:
        missing.append("processor_config.json or preprocessor_config.json")
    if not (names & {"tokenizer.json", "tokenizer.model"} or {"vocab.json", "merges.txt"} <= names):
        missing.append("tokenizer.json or tokenizer.model")
    return missing


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        raise ModelLoadError(f"{index}: cannot be read: {error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{index}: is damaged, it has no readable weight_map.") from error


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    # The config alone says whether the gigabytes are worth fetching.
    config = _fetched(
        source, revision, lambda: hf_hub_download(source, "config.json", revision=revision)
    )
    family_class(read_config(config.parent, source), source)
    files = _ORIGINAL_HUB_FILES if is_original(config.parent) else _HUB_FILES
    folder = _fetched(
        source,
        revision,
        lambda: snapshot_download(source, revision=revision, allow_patterns=files),
    )
    missing = missing_files(folder)
    if missing:
        raise ModelLoadError(_incomplete(source, folder, missing))
    return folder


def _fetched(source: str, revision: str | None, fetch: Callable[[], str]) -> Path:
    """What a call of huggingface_hub fetched; its errors in words."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(fetch())
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{source}: access is restricted. Accept its terms on the hub, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"{source}: no such model on the hub, and no folder of that name here. "
            "Check the spelling, or log in for a private one: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelLoadError(f"{source}: has no revision {revision!r} on the hub.") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:  # not cached, or only in part
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else Path("-")
        missing = missing_files(folder)
        raise ModelLoadError(f"{_offline(source, missing)} ({error})") from error
    except EntryNotFoundError as error:
        raise ModelLoadError(
            f"{source}: its repository on the hub lacks a file: {error}. "
            "A model in the layout of transformers is needed."
        ) from error
    except HfHubHTTPError as error:
        raise ModelLoadError(f"{source}: the hub answered with an error: {error}") from error
    except (OSError, ValueError) as error:  # such as a full disk
        raise ModelLoadError(f"{source}: could not be fetched from the hub: {error}") from error


def _incomplete(source: str, folder: Path, missing: list[str]) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _offline(source, missing)
    return (
        f"{source}: its files in {folder} are incomplete; missing: {'; '.join(missing)}. Either "
        "the repository on the hub does not hold them (a model in the layout of transformers, "
        "with safetensors weights, is needed), or the hub did not answer and only a part was "
        "cached before: try again."
    )


def _offline(source: str, missing: list[str]) -> str:
    folder = source.rpartition("/")[2]
    return (
        f"{source}: not complete on this machine, and the hub cannot be reached (no network, or "
        f"HF_HUB_OFFLINE is set). Missing: {'; '.join(missing) or 'some files of the snapshot'}. "
        f"On a connected machine run: hf download {source} --local-dir {folder}   Then copy that "
        f"folder here and pass its path: load({folder!r})"
    )


def read_config(folder: Path, name: str, vision_tower: str | os.PathLike[str] | None = None) -> Any:
    """The config of transformers of a model in a folder; no weights are loaded.

    Args:
        folder: in the layout of transformers or of the original LLaVA code.
        name: how the message calls the model.
        vision_tower: as in :func:`load`.

    Raises:
        ModelLoadError: config.json cannot be read.
        UnsupportedError: an original folder with parts that are not known.
    """
    from transformers import AutoConfig

    if vision_tower is not None:
        vision_tower = os.path.expanduser(vision_tower)
    if is_original(folder):
        try:
            return original_config(folder, vision_tower)
        except (ModelLoadError, UnsupportedError) as error:
            raise type(error)(f"{name}: {error}") from error
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{name}: config.json cannot be read: {error}") from error


def _read_weights(folder: Path, name: str, options: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    read: Any = AutoModelForImageTextToText.from_pretrained
    try:
        model, info = read(folder, local_files_only=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ModelLoadError(
            f"{name}: the weights in {folder} are damaged ({error}). Files of a few hundred bytes "
            "are pointers of Git LFS: fetch the real ones with `git lfs pull`."
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelLoadError(f"{name}: cannot be loaded from {folder}: {error}") from error
    absent = sorted(info["missing_keys"])
    if absent:
        raise ModelLoadError(
            f"{name}: {len(absent)} tensors are missing from the weights in {folder}, such as "
            f"{', '.join(absent[:3])}. The folder belongs to another model, or is incomplete."
        )
    return model
