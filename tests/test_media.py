"""Pictures in: every colour mode becomes the right RGB, every bad source its own error."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmlm_efficient.errors import MediaError
from mmlm_efficient.media import MediaLimits, load_image, load_images


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png_header(width: int, height: int) -> bytes:
    """A valid PNG that claims a size and has no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# What is read


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    loaded = load_image(encoded(noise(), form))
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(noise()))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_are_read(form: str) -> None:
    assert load_image(encoded(noise(), form)).size == (40, 30)


def test_path_string_pathlib_bytes_pil_and_array_agree(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(noise()))
    expected = np.asarray(noise())
    for source in (str(path), path, path.read_bytes(), noise(), expected):
        assert np.array_equal(np.asarray(load_image(source)), expected)


def test_result_shares_no_memory_with_a_pil_source() -> None:
    source = noise()
    load_image(source).putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) == noise().getpixel((0, 0))


def test_grey_and_one_bit() -> None:
    grey = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
    assert np.asarray(load_image(encoded(grey)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert np.asarray(load_image(encoded(grey.convert("1")))).max() == 255


def test_palette() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1])
    assert np.asarray(load_image(encoded(picture)))[0].tolist() == [[10, 20, 30], [200, 100, 50]]


def test_palette_with_a_transparent_entry_shows_white_there() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1])
    loaded = load_image(encoded(picture, transparency=0))
    assert np.asarray(loaded)[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_alpha_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    pixels = np.asarray(load_image(encoded(picture)))[0].tolist()
    assert pixels[:2] == [[255, 0, 0], [255, 255, 255]]
    assert all(abs(value - 127) <= 1 for value in pixels[2])


def test_grey_with_alpha() -> None:
    picture = Image.new("LA", (2, 1))
    picture.putdata([(50, 255), (50, 0)])
    assert np.asarray(load_image(encoded(picture)))[0].tolist() == [[50] * 3, [255] * 3]


def test_rgb_with_a_transparent_colour() -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putdata([(1, 2, 3), (9, 9, 9)])
    loaded = load_image(encoded(picture, transparency=(1, 2, 3)))
    assert np.asarray(loaded)[0].tolist() == [[255] * 3, [9] * 3]


def test_cmyk_jpeg() -> None:
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    red, green, blue = load_image(encoded(picture, "JPEG", quality=100)).getpixel((4, 4))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), form))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_sixteen_bit_grey_of_both_byte_orders(byte_order: str) -> None:
    mode = {"<u2": "I;16", ">u2": "I;16B"}[byte_order]
    values = np.array([[0, 32896, 65535]], dtype=byte_order)
    picture = Image.frombytes(mode, (3, 1), values.tobytes())
    assert np.asarray(load_image(picture))[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_grey_with_a_transparent_colour_shows_white_there() -> None:
    values = np.array([[0, 257, 65535], [514, 257, 0]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    # Pillow writes no transparency for this mode: put the piece behind the header.
    piece = b"tRNS" + struct.pack(">H", 257)
    piece = struct.pack(">I", 2) + piece + struct.pack(">I", zlib.crc32(piece))
    loaded = load_image(data[:33] + piece + data[33:])
    assert np.asarray(loaded)[..., 1].tolist() == [[0, 255, 255], [2, 255, 0]]


def test_grey_and_one_bit_with_a_transparent_colour() -> None:
    grey = Image.fromarray(np.array([[7, 128]], dtype=np.uint8))
    assert np.asarray(load_image(encoded(grey, transparency=7)))[0, :, 0].tolist() == [255, 128]
    bits = Image.fromarray(np.array([[False, True]]))
    assert np.asarray(load_image(encoded(bits, transparency=0)))[0, :, 0].tolist() == [255, 255]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_with_a_transparent_colour(depth: int) -> None:
    row = {1: 0b0111_0000, 2: 0b00_01_10_11, 4: 0x0123}[depth].to_bytes(1 + depth // 4, "big")
    pieces = ((b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0)), (b"tRNS", b"\0\1"))
    loaded = np.asarray(load_image(png(*pieces, (b"IDAT", zlib.compress(b"\0" + row)))))
    expected = {1: [0, 255, 255, 255], 2: [0, 255, 170, 255], 4: [0, 255, 34, 51]}[depth]
    assert loaded[0, :, 0].tolist() == expected


def test_palette_with_alpha_of_its_own() -> None:
    picture = Image.new("PA", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([(0, 0), (1, 255)])
    assert np.asarray(load_image(picture))[0].tolist() == [[255] * 3, [200, 100, 50]]


def png(*pieces: tuple[bytes, bytes]) -> bytes:
    """A PNG of pieces (kind, body) and the end."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*pieces, (b"IEND", b""))
    )


def test_colours_of_sixteen_bits() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 32896, 65535, 65535, 257, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = png((b"IHDR", header), (b"IDAT", zlib.compress(rows)))
    assert np.asarray(load_image(data))[0].tolist() == [[0, 128, 255], [255, 1, 0]]


@pytest.mark.parametrize("form", ["PIL", "TIFF"])
def test_integers_that_may_be_of_8_or_16_bits(form: str) -> None:
    """They came out nearly black."""
    for high in (1, 255, 256, 300, 1023):
        picture = Image.fromarray(np.array([[0, 100, high]], dtype=np.int32))
        words = (f"from 0 to {max(high, 100)}", "convert('L')", "convert('I;16')")
        refuse(picture if form == "PIL" else encoded(picture, "TIFF"), *words)
    for mode, expected in (("L", [0, 100, 255]), ("I;16", [0, 0, 4])):
        loaded = load_image(picture.convert(mode))
        assert np.asarray(loaded)[0, :, 0].tolist() == expected
    picture = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.int32))
    assert np.asarray(load_image(picture))[0, :, 0].tolist() == [0, 1, 255]


def test_float_tiff_between_0_and_1() -> None:
    picture = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(load_image(encoded(picture, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_camera_orientation_is_applied() -> None:
    picture = noise(size=(40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: the camera was held upright
    loaded = load_image(encoded(picture, exif=exif))
    assert loaded.size == (20, 40)
    expected = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(loaded), expected)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(form: str) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, form, save_all=True, append_images=[blue])
    assert load_image(data).getpixel((4, 4))[0] > 200


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3, 3), 7, np.uint8), 7),
        (np.full((2, 3), 65535, np.uint16), 255),
        (np.full((2, 3, 3), 65535, np.uint16), 255),
        (np.full((2, 3, 3), 0.5, np.float32), 128),
        (np.full((2, 3), 1.0, np.float64), 255),
        (np.ones((2, 3), np.bool_), 255),
        (np.full((2, 3, 4), [9, 9, 9, 0], np.uint8), 255),
    ],
)
def test_arrays(array: np.ndarray, expected: int) -> None:
    loaded = load_image(array)
    assert loaded.size == (3, 2)
    assert np.all(np.asarray(loaded) == expected)


def test_load_images_takes_none_one_or_many() -> None:
    assert load_images(None) == []
    assert len(load_images(noise())) == 1
    assert len(load_images([noise(), encoded(noise())])) == 2


# What is refused


def refuse(source: object, *parts: str, limits: MediaLimits = MediaLimits()) -> None:  # noqa: B008
    with pytest.raises(MediaError) as caught:
        load_image(source, limits)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "cat.png", "cat.png", "no such file", "exists")
    refuse(tmp_path / "nowhere" / "cat.png", "nowhere does not exist")


def test_empty_path() -> None:
    for path in ("", "  "):
        refuse(path, "image: the path is empty. Give the path of one picture file.")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    noise().save(tmp_path / "cat.png")
    for path in ("~/cat.png", Path("~/cat.png")):
        assert np.array_equal(np.asarray(load_image(path)), np.asarray(noise()))
    refuse("~/dog.png", f"{tmp_path / 'dog.png'}: no such file")
    refuse("~nobody_of_that_name/cat.png", "~nobody_of_that_name/cat.png: no such file")


def test_folder(tmp_path: Path) -> None:
    refuse(tmp_path, str(tmp_path), "is a folder")


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    refuse(tmp_path / "empty.png", "empty.png", "0 bytes")
    refuse(b"", "0 bytes")


def test_text_is_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello, this is not a picture at all")
    refuse(tmp_path / "notes.png", "notes.png", "not a picture", "PNG", "JPEG")


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\0\x2f", "JPEG 2000"),
        (b"\xff\x0a\x7f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    ],
)
def test_formats_that_are_pictures_but_not_read(start: bytes, name: str) -> None:
    refuse(start + bytes(100), f"is of the format {name}", "Convert it to PNG or JPEG")


def test_formats_with_an_interpreter_behind_them_are_not_opened() -> None:
    refuse(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_image(form: str, share: float) -> None:
    data = encoded(noise(size=(160, 120)), form)
    with pytest.raises(MediaError, match=r"truncated or damaged|header is damaged"):
        load_image(data[: int(len(data) * share)])


def test_truncated_image_where_others_are_lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval switches Pillow's check off for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(size=(160, 120)), "PNG")
    with pytest.raises(MediaError, match="truncated or damaged"):
        load_image(data[: len(data) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "others keep what they chose"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_pillow_s_switch_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged anywhere or cut anywhere: the same picture, or the same refusal."""
    rng = np.random.default_rng(2)
    clean = encoded(noise(size=(64, 48)), form)
    sources = [clean[: len(clean) * share // 20] for share in range(1, 20)]
    for _ in range(60):
        data = bytearray(clean)
        data[int(rng.integers(0, len(data)))] ^= int(rng.integers(1, 256))
        sources.append(bytes(data))

    def outcome(source: bytes) -> bytes | None:
        with contextlib.suppress(MediaError):
            return load_image(source).tobytes()
        return None

    with warnings.catch_warnings(action="ignore"):
        strict = [outcome(source) for source in sources]
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        assert [outcome(source) for source in sources] == strict


def test_a_truncated_picture_while_another_thread_turns_the_switch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    sources = [
        data[: len(data) * share // 10]
        for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF")
        for data in [encoded(noise(size=(160, 120)), form)]
        for share in range(5, 10)
    ] * 8
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            ImageFile.LOAD_TRUNCATED_IMAGES = not ImageFile.LOAD_TRUNCATED_IMAGES

    def refused(source: bytes) -> bool:
        try:
            load_image(source)
        except MediaError:
            return True
        return False

    turner = threading.Thread(target=turn)
    turner.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(refused, sources))
    finally:
        stop.set()
        turner.join()


JPEGS = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
    {"optimize": True, "subsampling": 2},
]


@pytest.mark.parametrize("options", JPEGS, ids=str)
@pytest.mark.parametrize("lenient", [False, True])
def test_a_jpeg_without_its_end_marker_is_complete(
    options: dict[str, object], lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encoded(noise(size=(64, 48)), "JPEG", **options)
    expected = load_image(data)
    assert load_image(data[:-2]) == expected
    assert load_image(data[:-1]) == expected
    for cut in range(3, 120):  # what is accepted has lost no pixel
        with contextlib.suppress(MediaError):
            assert load_image(data[:-cut]) == expected
            assert cut < 5


def test_a_progressive_jpeg_that_lacks_a_whole_scan() -> None:
    data = encoded(noise(size=(64, 48)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    table = data.rindex(b"\xff\xc4", 0, last)
    for cut in (last, table):
        refuse(data[:cut], "truncated")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        clean = np.frombuffer(encoded(noise(), form), np.uint8)
        for _ in range(40):
            data = clean.copy()
            data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            with contextlib.suppress(MediaError):
                assert load_image(data.tobytes()).mode == "RGB"


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def os2_bmp_header(width: int, height: int) -> bytes:
    return (
        b"BM" + struct.pack("<IHHI", 26, 0, 0, 26) + struct.pack("<IHHHH", 12, width, height, 1, 24)
    )


@pytest.mark.parametrize(
    ("source", "size"),
    [
        (Image.new("RGB", (0, 5)), "0 x 5"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
        (png_header(0, 10), "0 x 10"),
        (png_header(7, 0), "7 x 0"),
        (gif_header(0, 0), "0 x 0"),
        (gif_header(300, 0), "300 x 0"),
        (bmp_header(0, 5), "0 x 5"),
        (bmp_header(0, -5), "0 x 5"),  # top to bottom
        (bmp_header(5, 0), "5 x 0"),
        (os2_bmp_header(0, 5), "0 x 5"),
        (b"P6 0 0 255 ", "0 x 0"),
        (b"P5\n# made by hand\n0 7\n255\n", "0 x 7"),
        (b"P4\n12 0\n", "12 x 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_zero_pixels(tmp_path: Path, source: Any, size: str) -> None:
    refuse(source, f"has no pixels ({size}).")
    if isinstance(source, bytes):
        path = tmp_path / "picture"
        path.write_bytes(source)
        refuse(path, f"{path}: has no pixels ({size}).")


@pytest.mark.parametrize(
    "data",
    [
        png_header(0, 10)[:20],
        gif_header(0, 0)[:9],
        bmp_header(0, 5)[:24],
        b"BM" + bytes(8),
        b"P6 0",
        b"P6 " + b"0" * 5000,
        b"P6 " + b"#" * 5000,
        b"P6 5 5 ",
        b"P7 0 0 255 ",
    ],
)
def test_other_damaged_headers_are_no_pictures(data: bytes) -> None:
    refuse(data, "header is damaged")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_from_its_header() -> None:
    data = png_header(50_000, 50_000)
    assert len(data) < 100
    refuse(data, "2,500,000,000 pixels", "64,000,000")
    refuse(png_header(12_000, 12_000), "144,000,000 pixels", "64,000,000")
    refuse(png_header(9_000, 9_000), "9000 x 9000", "81,000,000", "64,000,000")


def test_limits_can_be_set() -> None:
    refuse(noise(), "1,200 pixels", "at most 1,000", limits=MediaLimits(max_pixels=1000))
    data = encoded(noise())
    refuse(data, f"{len(data):,} bytes", "at most 100", limits=MediaLimits(max_image_bytes=100))


def test_thin_picture_that_a_resize_would_blow_up() -> None:
    refuse(Image.new("RGB", (1, 500)), "1 x 500", "200 times")


def test_web_address() -> None:
    refuse("https://example.org/cat.png", "https://example.org/cat.png", "not fetched", "path")


def test_bad_arrays() -> None:
    refuse(np.zeros((3, 20, 20), np.uint8), "[3, 20, 20]", "transpose")
    refuse(np.zeros(5, np.uint8), "[5]", "shape")
    refuse(np.zeros((4, 4), np.int64), "int64", "uint8")
    refuse(np.full((4, 4), 200.0), "200", "between 0 and 1")
    refuse(np.full((4, 4), -0.5), "-0.5", "between 0 and 1")
    refuse(np.full((4, 4), np.nan), "nan", "between 0 and 1")


def test_other_types() -> None:
    refuse(42, "int", "path", "numpy array")
    refuse("bad\0name.png", "cannot be read")


def test_32_bit_integers_out_of_range() -> None:
    picture = Image.fromarray(np.array([[0, 70_000]], dtype=np.int32))
    refuse(picture, "70000", "65535")


def test_error_says_which_of_several_images() -> None:
    with pytest.raises(MediaError, match=r"image 2 of 3: .*0 bytes"):
        load_images([noise(), b"", noise()])


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("side", [1, 10, 40, 200])
@pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
def test_pictures_in_base64_are_named_and_not_printed(form: str, side: int, start: str) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, form)
    text = start + base64.b64encode(file.getvalue()).decode()
    with pytest.raises(MediaError, match="is no path of a picture. One in base64 has to") as caught:
        load_image(text)
    assert len(str(caught.value)) < 200
    assert text[:40] in str(caught.value)
    assert load_image(base64.b64decode(text[len(start) :])).size == (side, side)
