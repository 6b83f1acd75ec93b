"""Pictures in: every kind of source becomes an upright 8-bit RGB picture, or a clear error.

Sizes are read from the header and checked before a single pixel is decoded, so a small file that
claims to be a huge picture costs nothing. Limits and the checks of paths are those of videos too.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from mmlm_efficient.errors import MediaError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.generic]"

# Named, so that formats with an outside interpreter behind them (EPS) are never opened.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Formats that are pictures, but not read: what their files begin with.
_FOREIGN = {
    "AVIF": rb"....ftyp(?:....){0,16}?avi[fs]",
    "HEIC": rb"....ftyp(?:....){0,16}?(?:hei[cxms]|hev[cx]|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
}

_HEADER_BYTES = 1024
# A number of a PPM's header, after comments.
_PPM_NUMBER = rb"(?:\s|#[^\r\n]*[\r\n])*(\d{1,9})\s"
_JPEG_END = b"\xff\xd9"
_JPEG_MARKER = re.compile(rb"\xff+([^\0\xff\xd0-\xd7])(..)", re.DOTALL)

# What Pillow's decoders raise on broken data.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)

# Pillow's switch for truncated files is the whole process's, and other code (such as lmms-eval)
# turns it on, maybe in another thread while a picture is decoded. This is Pillow's own loop with
# a switch of its own, which is off.
_load_strictly = FunctionType(
    ImageFile.ImageFile.load.__code__, {**vars(ImageFile), "LOAD_TRUNCATED_IMAGES": False}
)


@dataclass(frozen=True)
class MediaLimits:
    """What a picture or a video may cost, checked before it is decoded.

    Attributes:
        max_pixels: width x height of a picture or a frame, pixels.
        max_aspect: longer side divided by the shorter one. Image processors resize by the shorter
            side, so a 1 x 50,000,000 picture would grow without bound.
        max_image_bytes: size of a picture's file or of the bytes given, bytes.
        max_video_bytes: the same of a video, bytes.
        max_frames_decoded: frames of a video file that are gone through, picked or not.
        max_selected_frames: frames of a video that are picked and kept.
        max_selected_pixels: pixels of all frames kept together; three bytes of memory each.
    """

    max_pixels: int = 64_000_000
    max_aspect: int = 200
    max_image_bytes: int = 64 * 1024**2
    max_video_bytes: int = 4 * 1024**3
    max_frames_decoded: int = 2_000_000
    max_selected_frames: int = 4096
    max_selected_pixels: int = 2_000_000_000


ImageLimits = MediaLimits  # its public name
DEFAULT_LIMITS = MediaLimits()


def load_image(source: ImageSource, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
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
        where, n_bytes = f"image of {len(bytes(source)):,} bytes", len(bytes(source))
        return _decode(io.BytesIO(source), where, n_bytes, limits)
    if isinstance(source, str | os.PathLike):
        file, path, n_bytes = open_file(os.fspath(source), "picture")
        with file:
            return _decode(file, path, n_bytes, limits)
    raise MediaError(
        f"image: cannot read a {type(source).__name__}. "
        "Give a path, the bytes of a file, a PIL image or a numpy array."
    )


def load_images(
    source: ImageSource | Sequence[ImageSource] | None, limits: MediaLimits = DEFAULT_LIMITS
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


# Paths are shorter, or end in a file's kind; other texts are often a picture in base64.
_LONG_PATH, _LONG_NAME = 255, 80


def open_file(given: str, kind: str) -> tuple[BinaryIO, str, int]:
    """Open a picture or a video file.

    Args:
        given: its path; `~` is the home folder.
        kind: "picture" or "video", for messages.

    Returns:
        The file, its path, its size in bytes.

    Raises:
        MediaError: an address, a folder, a pipe, no file, or no permission.
    """
    if not given.strip():
        name = "image" if kind == "picture" else kind
        raise MediaError(f"{name}: the path is empty. Give the path of one {kind} file.")
    path = os.path.expanduser(given)
    encoded = (
        f"{given[:40]!r}... ({len(given):,} characters): is no path of a {kind}. One in base64 has "
        "to be decoded first: give its bytes, base64.b64decode(text)."
    )
    if given.startswith("data:"):
        raise MediaError(encoded)
    if re.match(r"(?i)([a-z][a-z0-9+.-]*://|(?:file|https?|ftp):)", path):
        raise MediaError(
            f"{path[:80]}: addresses are not fetched. Download the {kind} and give its path."
        )
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{path}: is a folder. Give the path of one {kind} file.")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{path}: is not a regular file. Give the path of one {kind} file.")
        # Opened by number, so that FFmpeg sees no name: what is in the file counts.
        return open(os.open(path, os.O_RDONLY), "rb"), path, status.st_size
    except FileNotFoundError:
        if len(given) > (_LONG_PATH if Path(given).suffix else _LONG_NAME):
            raise MediaError(encoded) from None
        folder = Path(path).parent
        exists = "exists; check the spelling" if folder.is_dir() else "does not exist either"
        raise MediaError(f"{path}: no such file. The folder {folder} {exists}.") from None
    except PermissionError as error:
        raise MediaError(f"{path}: no permission to read it.") from error
    except (OSError, ValueError) as error:  # a name too long, a null byte, a disk that fails
        if isinstance(error, MediaError):
            raise
        if len(given) > _LONG_PATH:
            raise MediaError(encoded) from error
        raise MediaError(f"{path!r}: cannot be read ({error}).") from error


def check_bytes(n_bytes: int, limit: int, where: str) -> None:
    """Refuse an empty file and one of more bytes than the limit."""
    if n_bytes == 0:
        raise MediaError(f"{where}: is empty (0 bytes).")
    if n_bytes > limit:
        raise MediaError(
            f"{where}: has {n_bytes:,} bytes; at most {limit:,} are allowed. Make it smaller first."
        )


def picture_format(file: BinaryIO) -> str | None:
    """Name of the picture format that a file is of, "huge" if it is too large for Pillow.

    Example:
        >>> picture_format(io.BytesIO(b"BM, but no more")) is None
        True
    """
    file.seek(0)
    found = _foreign_format(file.read(_HEADER_BYTES))
    if found is None:
        try:
            with Image.open(file, formats=FORMATS) as picture:
                found = picture.format
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            found = "huge"
        except _BROKEN:
            pass
    file.seek(0)
    return found


def _foreign_format(header: bytes) -> str | None:
    found = (name for name, start in _FOREIGN.items() if re.match(start, header, re.DOTALL))
    return next(found, None)


def _decode(file: BinaryIO, where: str, n_bytes: int, limits: MediaLimits) -> Image.Image:
    check_bytes(n_bytes, limits.max_image_bytes, where)
    try:
        data = file.read()
    except OSError as error:  # such as a disk or network folder that fails
        raise MediaError(f"{where}: cannot be read ({error}).") from error
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            data = _essential(data)
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise MediaError(f"{where}: {_no_picture(data[:_HEADER_BYTES])}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow refuses far larger pictures than ours by itself, before we can ask for the size.
        found = re.search(r"\((\d+) pixels", str(error))
        pixels = f"{int(found.group(1)):,}" if found else "far too many"
        raise MediaError(
            f"{where}: claims {pixels} pixels; at most {limits.max_pixels:,} are allowed."
        ) from error
    except _BROKEN as error:
        raise MediaError(f"{where}: its header is damaged ({error}).") from error
    check_size(*picture.size, where, limits)
    if isinstance(picture, JpegImageFile) and _lacks_only_its_end(data):
        picture = Image.open(io.BytesIO(data + _JPEG_END), formats=FORMATS)
    if picture.format == "PNG" and "transparency" in picture.info:
        # Pillow scales grey of 2 and 4 bits to 8, but not the transparent one.
        picture.info["transparency"] *= {b"\2\0": 85, b"\4\0": 17}.get(data[24:26], 1)
    return _to_rgb(picture, where, limits)


def _no_picture(header: bytes) -> str:
    # Pillow takes a picture without pixels for no picture at all.
    width, height = _claimed_size(header)
    if width == 0 or height == 0:
        return f"has no pixels ({width} x {height})."
    foreign = _foreign_format(header)
    if foreign is not None:
        return f"is of the format {foreign}, which is not read here. Convert it to PNG or JPEG."
    return f"is not a picture, or its header is damaged. Readable formats: {', '.join(FORMATS)}."


def _essential(png: bytes) -> bytes:
    """A PNG with the pieces alone that make its pixels and turn it upright.

    What else is in it (texts, colour profiles) is not used, and Pillow reads it differently where
    its switch for truncated files is on.
    """
    kept, position = [png[:8]], 8
    while position + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        piece = png[position : position + length + 12]
        position += length + 12
        if kind in (b"tRNS", b"eXIf") and zlib.crc32(piece[4:-4]).to_bytes(4, "big") != piece[-4:]:
            raise SyntaxError(f"bad checksum in {kind.decode()}")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"):
            kept.append(piece)
    return b"".join(kept)


def _lacks_only_its_end(jpeg: bytes) -> bool:
    """True for a JPEG without end marker whose pixels are all there.

    Decoders fill up what is missing with what follows. So all of it is there if different things
    may follow without changing a pixel.
    """
    if jpeg.endswith(_JPEG_END) or not _has_all_scans(jpeg):
        return False
    # Numbered restart markers too: at the one that is due a decoder takes what is behind it.
    junk = [b"\xd5\x6b\x1a\x93" * 16 + bytes((0xFF, 0xD0 + n % 8)) for n in range(20)]
    tails = (b"", b"".join(junk), b"".join(junk[4:]))
    whole = jpeg.rstrip(b"\xff")  # half an end marker
    try:
        decoded = {
            _load_pixels(Image.open(io.BytesIO(whole + tail + _JPEG_END))).tobytes()
            for tail in tails
        }
    except _BROKEN:
        return False
    return len(decoded) == 1


def _has_all_scans(jpeg: bytes) -> bool:
    """True where no end marker comes, but every bit of every coefficient is in some scan.

    A progressive JPEG has many scans.
    """
    missing, position = {(0, -1)}, 2
    while marker := _JPEG_MARKER.search(jpeg, position):
        kind, length = marker[1][0], int.from_bytes(marker[2], "big")
        if kind == _JPEG_END[1]:
            return False
        body = jpeg[marker.end() : marker.end() + length - 2]
        if kind in (0xC0, 0xC1, 0xC2):
            missing = {(component, n) for component in body[6::3] for n in range(64)}
        elif kind == 0xDA and len(body) >= 4:
            first, last, approximation = body[-3:]
            if approximation & 15 == 0:
                components = body[1:-3:2]
                missing -= {(one, n) for one in components for n in range(first, last + 1)}
        position = marker.end() + length - 2
    return not missing


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


def check_size(width: int, height: int, where: str, limits: MediaLimits) -> None:
    """Refuse a picture or a frame without pixels, with too many, or that is too long and thin."""
    if width < 1 or height < 1:
        raise MediaError(f"{where}: has no pixels ({width} x {height}).")
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


def _load_pixels(picture: Image.Image) -> Image.Image:
    """Decode a picture, a truncated one with an error whatever Pillow's switch says."""
    if isinstance(picture, JpegImageFile):
        # Pillow's own puts an end marker behind a truncated file where the switch is on.
        picture.load_read = picture.fp.read  # type: ignore
    # What reads all of a file by itself does not ask the switch.
    alone = getattr(picture, "use_load_libtiff", False) or picture.format == "WEBP"
    if isinstance(picture, ImageFile.ImageFile) and not alone:
        _load_strictly(picture)
    else:
        picture.load()
    return picture


def _to_rgb(picture: Image.Image, where: str, limits: MediaLimits) -> Image.Image:
    check_size(*picture.size, where, limits)
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
        return _from_integers(np.asarray(picture), picture.info.get("transparency"), mode, where)
    if mode == "F":
        return _from_unit_floats(np.asarray(picture), where)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(page, layer).convert("RGB")
    return picture.copy() if mode == "RGB" else picture.convert("RGB")


def _from_integers(
    values: npt.NDArray[np.generic], transparent: int | None, mode: str, where: str
) -> Image.Image:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise MediaError(
            f"{where}: integer pixels from {low} to {high}; "
            "8-bit or 16-bit (0 to 65535) are allowed. Convert it first."
        )
    # Also 8 bits with a few values beyond, and 10 bits.
    if mode == "I" and 0 < high < 1024:
        raise MediaError(
            f"{where}: 32-bit integer pixels from {low} to {high} may be an 8-bit picture or a "
            "dark 16-bit one. Convert it first: picture.convert('L') for 8 bits (what is above 255 "
            "becomes 255), picture.convert('I;16') for 16."
        )
    pixels = _eight_bits(values)
    if transparent is not None:
        pixels[values == transparent] = 255
    return Image.fromarray(pixels).convert("RGB")


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


def _from_array(array: npt.NDArray[np.generic], limits: MediaLimits) -> Image.Image:
    where = f"array {array.dtype}{list(array.shape)}"
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise MediaError(
            f"{where}: the shape must be [height, width], or [height, width, channels] with 1, 3 "
            "or 4 channels. For [channels, height, width] transpose it: array.transpose(1, 2, 0)."
        )
    check_size(array.shape[1], array.shape[0], where, limits)
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
