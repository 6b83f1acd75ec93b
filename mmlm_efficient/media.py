"""Pictures in: every kind of source becomes an upright 8-bit RGB picture, or a clear error.

Sizes are read from the header and checked before a single pixel is decoded, so a small file that
claims to be a huge picture costs nothing.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mmlm_efficient.errors import MediaError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.generic]"

# Named, so that formats with an outside interpreter behind them (EPS) are never opened.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_HEADER_BYTES = 1024
# A number of a PPM's header, after comments.
_PPM_NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])*(\d{1,9})\s"

# What Pillow's decoders raise on broken data.
# Pillow's switch for truncated files is the whole process's.
_DECODING = threading.Lock()
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may cost before it is decoded.

    Attributes:
        max_pixels: width x height, pixels.
        max_file_bytes: size of the file or of the bytes given, bytes.
        max_aspect: longer side divided by the shorter one. Image processors resize by the shorter
            side, so a 1 x 50,000,000 picture would grow without bound.
    """

    max_pixels: int = 64_000_000
    max_file_bytes: int = 64 * 1024 * 1024
    max_aspect: int = 200


DEFAULT_LIMITS = ImageLimits()


def load_image(source: ImageSource, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Load one picture as upright 8-bit RGB.

    Transparency is laid on white, 16-bit grey is scaled (not clipped), the camera's orientation is
    applied, of an animation the first frame is taken.

    Args:
        source: path, encoded bytes, PIL picture, or array: [H, W], [H, W, 1], [H, W, 3] or
            [H, W, 4] of uint8 (0 to 255), uint16 (0 to 65535), bool, or float (0 to 1).
        limits: sizes that are refused before decoding.

    Returns:
        PIL picture of mode RGB that shares no memory with the source.

    Raises:
        MediaError: naming the source, what is wrong with it and what is allowed.

    Example:
        >>> load_image(np.zeros((4, 6), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "PIL image", limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _decode(io.BytesIO(data), f"image of {len(data):,} bytes", len(data), limits)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fspath(source), limits)
    raise MediaError(
        f"image: cannot read a {type(source).__name__}. "
        "Give a path, the bytes of a file, a PIL image or a numpy array."
    )


def load_images(
    source: ImageSource | Sequence[ImageSource] | None, limits: ImageLimits = DEFAULT_LIMITS
) -> list[Image.Image]:
    """Load no, one or several pictures, in order; an error says which one is at fault.

    Example:
        >>> load_images(None)
        []
    """
    if source is None:
        return []
    if not isinstance(source, list | tuple):
        return [load_image(source, limits)]  # type: ignore[arg-type]
    pictures = []
    for position, one in enumerate(source):
        try:
            pictures.append(load_image(one, limits))
        except MediaError as error:
            raise MediaError(f"image {position + 1} of {len(source)}: {error}") from error
    return pictures


def _from_path(given: str, limits: ImageLimits) -> Image.Image:
    if not given.strip():
        raise MediaError("image: the path is empty. Give the path of one picture file.")
    path = os.path.expanduser(given)
    if re.match(r"(?i)(https?|ftp|data|file):", path):
        raise MediaError(
            f"{path[:80]}: addresses are not fetched. Download the picture and give its path."
        )
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file. {_neighbours(path)}") from None
    except (OSError, ValueError) as error:  # no permission, name too long, a null byte
        raise MediaError(f"{path!r}: cannot be read ({error}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{path}: is a folder. Give the path of one picture file.")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path}: is not a regular file. Give the path of one picture file.")
    try:
        with open(path, "rb") as file:
            return _decode(file, path, status.st_size, limits)
    except PermissionError as error:
        raise MediaError(f"{path}: no permission to read it.") from error
    except OSError as error:  # such as a disk or network folder that fails
        raise MediaError(f"{path}: cannot be read ({error}).") from error


def _neighbours(path: str) -> str:
    folder = Path(path).parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    return f"Check the spelling; the folder {folder} exists."


def _decode(file: BinaryIO, where: str, n_bytes: int, limits: ImageLimits) -> Image.Image:
    if n_bytes == 0:
        raise MediaError(f"{where}: is empty (0 bytes).")
    if n_bytes > limits.max_file_bytes:
        raise MediaError(
            f"{where}: has {n_bytes:,} bytes; at most {limits.max_file_bytes:,} are allowed."
        )
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        # Pillow takes a picture without pixels for no picture at all.
        file.seek(0)
        width, height = _claimed_size(file.read(_HEADER_BYTES))
        if width == 0 or height == 0:
            raise MediaError(_no_pixels(where, width, height)) from error
        raise MediaError(
            f"{where}: is not a picture, or its header is damaged. "
            f"Readable formats: {', '.join(FORMATS)}."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow refuses far larger pictures than ours by itself, before we can ask for the size.
        found = re.search(r"\((\d+) pixels", str(error))
        pixels = f"{int(found.group(1)):,}" if found else "far too many"
        raise MediaError(
            f"{where}: claims {pixels} pixels; at most {limits.max_pixels:,} are allowed."
        ) from error
    except _BROKEN as error:
        raise MediaError(f"{where}: its header is damaged ({error}).") from error
    return _to_rgb(picture, where, limits)


def _claimed_size(header: bytes) -> tuple[int, int]:
    """Width and height in the header of a PNG, GIF, BMP or PPM; (1, 1) where there is none.

    Example:
        >>> _claimed_size(b"P6 0 5 255 ")
        (0, 5)
    """
    plain = re.match(rb"P[1-6]\s" + _PPM_NUMBER + _PPM_NUMBER, header)
    if plain is not None:
        return int(plain[1]), int(plain[2])
    form, offset = "", 0
    if header.startswith(b"\x89PNG\r\n\x1a\n") and header[12:16] == b"IHDR":
        form, offset = ">II", 16
    elif header.startswith((b"GIF87a", b"GIF89a")):
        form, offset = "<HH", 6
    elif header.startswith(b"BM"):
        # OS/2's header has 12 bytes and shorter numbers; a negative height means top to bottom.
        form, offset = ("<HH" if header[14:18] == b"\x0c\0\0\0" else "<ii"), 18
    if not form or len(header) < offset + struct.calcsize(form):
        return 1, 1
    width, height = struct.unpack_from(form, header, offset)
    return abs(width), abs(height)


def _no_pixels(where: str, width: int, height: int) -> str:
    return f"{where}: has no pixels ({width} x {height})."


def _check_size(width: int, height: int, where: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise MediaError(_no_pixels(where, width, height))
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{where}: has {width} x {height} = {width * height:,} pixels; "
            f"at most {limits.max_pixels:,} are allowed. Make it smaller first."
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise MediaError(
            f"{where}: {width} x {height} is too long and thin; the longer side may be at most "
            f"{limits.max_aspect} times the shorter one. Cut it into pieces first."
        )


def _load_pixels(picture: Image.Image) -> None:
    """Decode a picture, a truncated one with an error even where other code in this process (such
    as lmms-eval) has told Pillow to fill up what is missing."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        picture.load()
        return
    with _DECODING:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            picture.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _to_rgb(picture: Image.Image, where: str, limits: ImageLimits) -> Image.Image:
    _check_size(*picture.size, where, limits)
    try:
        _load_pixels(picture)
    except _BROKEN as error:
        raise MediaError(
            f"{where}: is truncated or damaged, its pixels cannot be decoded ({error})."
        ) from error
    try:
        upright = ImageOps.exif_transpose(picture)
    except _BROKEN:
        upright = picture  # damaged metadata is no reason to refuse good pixels
    try:
        return _convert(upright, where)
    except ValueError as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{where}: colour mode {picture.mode} cannot become RGB.") from error


def _convert(picture: Image.Image, where: str) -> Image.Image:
    mode = picture.mode
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError(
                f"{where}: integer pixels from {values.min()} to {values.max()}; "
                "8-bit or 16-bit (0 to 65535) are allowed. Convert it first."
            )
        return Image.fromarray(_eight_bits(values)).convert("RGB")
    if mode == "F":
        return _from_unit_floats(np.asarray(picture), where)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(page, layer).convert("RGB")
    return picture.copy() if mode == "RGB" else picture.convert("RGB")


def _eight_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale 0..65535 to 0..255 and round: 65535 / 257 is exactly 255."""
    scaled: npt.NDArray[np.uint8] = np.rint(values.astype(np.float32) / 257.0).astype(np.uint8)
    return scaled


def _from_unit_floats(values: npt.NDArray[np.generic], where: str) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0.0 or high > 1.0:
        raise MediaError(
            f"{where}: float pixels from {low:g} to {high:g}; they must lie between 0 and 1. "
            "Divide by the largest value, or convert to uint8."
        )
    return _to_picture(np.rint(values.astype(np.float64) * 255.0).astype(np.uint8))


def _from_array(array: npt.NDArray[np.generic], limits: ImageLimits) -> Image.Image:
    where = f"array {array.dtype}{list(array.shape)}"
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise MediaError(
            f"{where}: the shape must be [height, width], or [height, width, channels] with 1, 3 "
            "or 4 channels. For [channels, height, width] transpose it: array.transpose(1, 2, 0)."
        )
    _check_size(array.shape[1], array.shape[0], where, limits)
    if array.dtype == np.uint8:
        return _to_picture(array.astype(np.uint8))
    if array.dtype == np.bool_:
        return _to_picture(array.astype(np.uint8) * np.uint8(255))
    if array.dtype == np.uint16:
        return _to_picture(_eight_bits(array))
    if np.issubdtype(array.dtype, np.floating):
        return _from_unit_floats(array, where)
    raise MediaError(
        f"{where}: the dtype must be uint8 (0 to 255), uint16 (0 to 65535), bool or float (0 to 1)."
    )


def _to_picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return _convert(Image.fromarray(np.ascontiguousarray(pixels)), "array")
