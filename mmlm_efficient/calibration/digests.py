"""Short names for what a search depends on: its samples and the model's weights.

A log goes on only with the same ones. Nothing here looks at what a model computes: that changes
in its last bits with the number of threads, the kernels and the device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm_efficient.calibration.data import Sample
from mmlm_efficient.errors import ModelLoadError

_DIGITS = 16
# Of a weight file: its ends (a header, a table of contents with checksums) and pieces between.
_END_BYTES, _PIECE_BYTES, _PIECES = 2**20, 2**12, 256
# Values looked at of every parameter, evenly spread.
_VALUES = 4096
_WEIGHTS = ("*.safetensors", "*.bin")


def samples_digest(samples: Iterable[Sample], prompts: Iterable[Tensor]) -> str:
    """Of the decoded pictures, the questions and the prompts in tokens, in their order.

    Args:
        samples: whose pictures can be read.
        prompts: for each sample its input_ids, int64 [1, S].
    """
    total = hashlib.sha256()
    for sample, ids in zip(samples, prompts, strict=True):
        image = sample.image()
        for part in (sample.question.encode(), repr(image.size).encode(), image.tobytes()):
            total.update(hashlib.sha256(part).digest())
        total.update(repr(ids.tolist()).encode())
    return total.hexdigest()[:_DIGITS]


def weights_digest(model: Any, name: str) -> str:
    """Of a model's weights, without reading all of them.

    Where the model came from a folder: names, sizes and pieces of its weight files, and the signs
    of some values of every parameter, which no dtype changes but training does. Elsewhere: some
    values of every parameter, as they are in memory.

    Args:
        model: a model of transformers.
        name: what it was loaded as.

    Raises:
        ModelLoadError: a weight file cannot be read.
    """
    total = hashlib.sha256()
    files = list(_weight_files(model, name))
    for file in files:
        total.update(_file_digest(file))
    for label, parameter in model.named_parameters():
        total.update(f"{label} {list(parameter.shape)}".encode())
        if parameter.is_meta:  # offloaded: its values are not in memory
            continue
        values = _some(parameter.detach())
        values = torch.signbit(values) if files else values
        total.update(values.numpy().tobytes())
    return total.hexdigest()[:_DIGITS]


def _some(values: Tensor) -> Tensor:
    """Float32 values from all over a tensor, at most twice _VALUES of them, on the CPU."""
    return values.reshape(-1)[:: max(1, values.numel() // _VALUES)].float().cpu()


def _weight_files(model: Any, name: str) -> Iterator[Path]:
    """The weight files in the folder that a model came from, by name; none if it is not known."""
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    for source in (origin, name):
        folder = Path(os.path.expanduser(source)) if source else None
        if folder is not None and folder.is_dir():
            found = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
            if found:
                yield from found
                return


def _file_digest(file: Path) -> bytes:
    """Of the name, the size, both ends and evenly spread pieces of a file."""
    total = hashlib.sha256(file.name.encode())
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            total.update(str(size).encode())
            places = {number * size // _PIECES: _PIECE_BYTES for number in range(_PIECES)}
            places |= {0: _END_BYTES, max(0, size - _END_BYTES): _END_BYTES}
            for place, length in sorted(places.items()):
                opened.seek(place)
                total.update(opened.read(length))
    except OSError as error:
        raise ModelLoadError(f"{file}: cannot be read: {error.strerror or error}") from error
    return total.digest()
