"""The files of an original checkpoint and of its vision tower."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from mmlm_efficient.errors import ModelLoadError, UnsupportedError
from mmlm_efficient.original_llava.config import cut_siglip, hub_id
from mmlm_efficient.original_llava.names import TOWER, converted_name

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEXED = ("model.safetensors", "pytorch_model.bin")
_VISION_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "clip": transformers.CLIPVisionConfig,
    "clip_vision_model": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "siglip_vision_model": transformers.SiglipVisionConfig,
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ModelLoadError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: is not an object of JSON.")
    return content


def weight_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The files of the weights, safetensors before .bin; those of an index may be missing."""
    present = set(names)
    for single in _INDEXED:
        index = f"{single}.index.json"
        if index in present:
            places = read_json(folder / index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ModelLoadError(f"{folder / index}: is damaged, it has no weight_map.")
            return sorted(set(map(str, places.values())))
        if single in present:
            return [single]
    return []


def weight_paths(folder: Path) -> list[Path]:
    """`weight_files` of a folder, as paths."""
    return [folder / file for file in weight_files(folder, {one.name for one in folder.iterdir()})]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """The errors of a damaged file in words."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"{path}: is damaged, truncated, or holds more than tensors ({error}). Files of a few "
            "hundred bytes are pointers of Git LFS: fetch the real ones with `git lfs pull`."
        ) from error


def _unpickled(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped from the disk; "meta" gives names and shapes alone."""
    mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
    with _reading(path):
        content = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ModelLoadError(f"{path}: is not a file of tensors by name.")
    return content


def read_all(files: Sequence[Path], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Every tensor, cast one by one; None leaves the dtypes as stored.

    Files are mapped, not read: at most one tensor is in memory in two dtypes.
    """
    from safetensors import safe_open

    state: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with _reading(path), safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    state[name] = _cast(file.get_tensor(name), dtype)
        else:
            state |= {name: _cast(one, dtype) for name, one in _unpickled(path, "cpu").items()}
    return state


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def tower_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of the vision tower's tensors by the names of transformers; empty without a tower.

    Names that the original does not have are left for `converted_state` to refuse.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        for name, shape in _shapes(path).items():
            if name.startswith(TOWER):
                with suppress(KeyError):
                    new = converted_name(name)
                    shapes |= {} if new is None else {new: shape}
    return shapes


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {name: tuple(one.shape) for name, one in _unpickled(path, "meta").items()}
    with _reading(path), safe_open(path, framework="pt", device="cpu") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# The vision tower


def tower_folder(
    raw: Mapping[str, Any], folder: Path, given: str | PathLike[str] | None
) -> Path | None:
    """The local folder of the tower: the one given, or a folder that the config names."""
    if given is not None:
        place = Path(fspath(given))
        if not (place / "config.json").is_file():
            raise ModelLoadError(
                f"vision_tower: {fspath(given)!r} is no folder with a config.json. Give the folder "
                "of a CLIP or SigLIP checkpoint."
            )
        return place
    named = str(raw["mm_vision_tower"])
    places = (Path(named), folder / named)
    return next((place for place in places if (place / "config.json").is_file()), None)


def vision_config_in(place: Path) -> PreTrainedConfig:
    """The config in the tower's folder, which may be that of a whole CLIP or SigLIP."""
    kind = read_json(place / "config.json").get("model_type")
    if kind not in _VISION_CONFIGS:
        raise UnsupportedError(
            f"{place}: holds a {kind!r} model; a vision tower is a CLIP or SigLIP model."
        )
    try:
        config = _VISION_CONFIGS[str(kind)].from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{place}: config.json cannot be read: {error}") from error
    return cut_siglip(config)


def tower_files(name: str, place: Path | None) -> list[Path]:
    """The files of a tower that is not in the checkpoint."""
    if place is None:
        return [_from_hub(name)]
    files = weight_paths(place)
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        absent = absent or ["model.safetensors or pytorch_model.bin"]
        raise ModelLoadError(
            f"{place}: the checkpoint has no vision tower, and this folder lacks its weights; "
            f"missing: {'; '.join(absent)}."
        )
    return files


def _from_hub(name: str) -> Path:
    """The tower's weights from the cache of the hub, fetched when they are not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    reason = "no folder and no hub id (OWNER/NAME)"
    if _HUB_ID.fullmatch(name):
        try:
            for file in _INDEXED:
                try:
                    return Path(hf_hub_download(name, file))
                except EntryNotFoundError as error:  # offline: not cached; else: no such file
                    reason = str(error)
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error)
    repository = hub_id(name)
    raise ModelLoadError(
        f"mm_vision_tower: the checkpoint has no vision tower, and {name!r} cannot be had "
        f"({reason}). On a connected machine run: hf download {repository} --local-dir DIR   "
        "Then copy DIR here and pass vision_tower='DIR', or write that path as mm_vision_tower "
        "into the model's config.json."
    )
