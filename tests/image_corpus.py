"""A corpus of odd and bad image files, each with what is expected of it. Pictures are square, of ``WIDTH`` pixels.

Odd ones must be read, and to which pixels; bad ones must be named, and with what reason. The pixels of files that lose
nothing are those that were put in, so that neither decoder is the judge of itself.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data_helpers import picture

HEIGHT = WIDTH = 47
RGB = picture(HEIGHT, WIDTH, seed=3)
GREY = np.ascontiguousarray(RGB[..., 0])
DEEP = (np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 22 % 65536).astype(np.uint16)
ONE_BIT = GREY > 127

ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}
"""What the EXIF orientation makes of stored pixels (Exif 2.3, tag 0x0112: where the stored 0th row and column lie)."""


@dataclass(frozen=True)
class Good:
    """A file that must be read; ``pixels`` (H, W, 3) uint8 where they are known exactly."""

    path: str
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Bad:
    """A file that must be named; ``reason`` is part of what is said."""

    path: str
    reason: str


def make_good(folder: Path) -> list[Good]:
    return [Good(_write(folder, name, content), pixels) for name, content, pixels in _good()]


def make_bad(folder: Path) -> list[Bad]:
    made = [Bad(_write(folder, name, content), reason) for name, content, reason in _bad()]
    (folder / "folder.png").mkdir()
    (folder / "broken_link.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    for name, reason in (
        ("folder.png", "Is a directory"),
        ("broken_link.png", "which does not exist"),
        ("loop.png", "Too many levels of symbolic links"),
        ("pipe.png", "not a regular file"),
    ):
        made.append(Bad(str(folder / name), reason))
    return made


def _write(folder: Path, name: str, content: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = os.fsencode(folder) + b"/" + os.fsencode(name)
    Path(os.fsdecode(path)).write_bytes(content)
    return os.fsdecode(path)


def _good() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    rgb, grey, one_bit = Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(ONE_BIT)
    alpha = Image.fromarray(np.dstack([RGB, GREY]))
    grey_alpha = Image.merge("LA", (grey, grey))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(DEEP)
    of_palette, of_grey, of_bits = np.asarray(palette.convert("RGB")), _three(GREY), _three(ONE_BIT * np.uint8(255))
    of_deep = _three(np.rint(DEEP / 257).astype(np.uint8))

    for name, options in (
        ("baseline", {}),
        ("progressive", {"progressive": True}),
        ("low_quality", {"quality": 10}),
        ("no_subsampling", {"quality": 98, "subsampling": 0}),
        ("horizontal_subsampling", {"subsampling": 1}),
        ("restarts", {"restart_marker_blocks": 2}),
        ("stored_as_rgb", {"keep_rgb": True}),
        ("comment", {"comment": b"\xff\xd9" * 9}),
        ("icc", {"icc_profile": b"\0" * 3000}),
        ("broken_exif", {"exif": b"Exif\0\0MM\0*" + b"\xff" * 40}),
    ):
        yield f"{name}.jpg", _encoded(rgb, "JPEG", **options), None
    yield "grey.jpg", _encoded(grey, "JPEG"), None
    yield "cmyk.jpg", _encoded(rgb.convert("CMYK"), "JPEG"), None
    yield "after_the_end.jpg", _encoded(rgb, "JPEG") + b"trailing bytes", None
    yield "no_huffman_tables.jpg", _encoded(rgb, "JPEG").replace(b"\xff\xc4", b"\xff\xfe"), None
    for value, turn in ORIENTED.items():
        exif = Image.Exif()
        exif[0x0112] = value
        yield f"turned_{value}.jpg", _encoded(rgb, "JPEG", exif=exif), None
        yield f"turned_{value}.png", _encoded(rgb, "PNG", exif=exif), turn(RGB)
        yield f"turned_{value}.tif", _encoded(rgb, "TIFF", exif=exif), turn(RGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "turned_6.webp", _encoded(rgb, "WEBP", lossless=True, exif=exif), ORIENTED[6](RGB)

    yield "rgb.png", _encoded(rgb, "PNG"), RGB
    yield "interlaced.png", _png(8, 2, _interlaced(RGB), interlace=1), RGB
    yield "palette.png", _encoded(palette, "PNG"), of_palette
    yield "palette_clear.png", _encoded(palette, "PNG", transparency=0), of_palette
    yield "palette_alpha.png", _encoded(palette, "PNG", transparency=bytes(range(256))), of_palette
    yield "one_bit.png", _encoded(one_bit, "PNG"), of_bits
    four_bits = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16).astype(np.uint8)
    packed = np.packbits(np.unpackbits(four_bits[..., None], axis=2)[..., 4:].reshape(HEIGHT, -1), axis=1)
    yield "four_bits.png", _png(4, 0, _filtered(packed)), _three(four_bits * np.uint8(17))
    yield "alpha.png", _encoded(alpha, "PNG"), RGB
    yield "grey_alpha.png", _encoded(grey_alpha, "PNG"), of_grey
    yield "clear_colour.png", _encoded(rgb, "PNG", transparency=tuple(map(int, RGB[0, 0]))), RGB
    yield "sixteen_bits.png", _encoded(deep, "PNG"), of_deep
    high = np.dstack([RGB, GREY]).astype(np.uint16) * 256 + 200  # colour loses its lower byte; rounding would show
    for name, color_type, channels in (("rgb", 2, slice(0, 3)), ("rgba", 6, slice(0, 4))):
        yield f"sixteen_bits_{name}.png", _png(16, color_type, _filtered(high[..., channels].astype(">u2"))), RGB
    yield "gamma.png", _png(8, 2, _filtered(RGB), extra=_chunk(b"gAMA", struct.pack(">I", 45455))), RGB
    yield "animated.png", _encoded(rgb, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB

    yield "rgb.bmp", _encoded(rgb, "BMP"), RGB
    yield "grey.bmp", _encoded(grey, "BMP"), of_grey
    yield "palette.bmp", _encoded(palette, "BMP"), of_palette
    yield "one_bit.bmp", _encoded(one_bit, "BMP"), of_bits
    yield "top_down.bmp", _top_down_bmp(), RGB

    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        yield f"{compression}.tif", _encoded(rgb, "TIFF", compression=compression), RGB
    yield "in_jpeg.tif", _encoded(rgb, "TIFF", compression="jpeg"), None
    for compression in ("raw", "group3", "group4"):
        yield f"one_bit_{compression}.tif", _encoded(one_bit, "TIFF", compression=compression), of_bits
    yield "palette.tif", _encoded(palette, "TIFF"), of_palette
    yield "alpha.tif", _encoded(alpha, "TIFF"), RGB
    yield "grey_alpha.tif", _encoded(grey_alpha, "TIFF"), of_grey
    yield "cmyk.tif", _encoded(rgb.convert("CMYK"), "TIFF"), RGB
    yield "sixteen_bits.tif", _encoded(deep, "TIFF"), of_deep
    pages = [Image.fromarray(255 - RGB)]
    yield "pages.tif", _encoded(rgb, "TIFF", save_all=True, append_images=pages, compression="tiff_lzw"), RGB

    yield "lossy.webp", _encoded(rgb, "WEBP"), None
    yield "lossless.webp", _encoded(rgb, "WEBP", lossless=True), RGB
    yield "alpha.webp", _encoded(alpha, "WEBP", lossless=True, exact=True), RGB
    yield "alpha_lossy.webp", _encoded(alpha, "WEBP"), None
    yield "animated.webp", _encoded(rgb, "WEBP", save_all=True, append_images=pages, lossless=True), RGB

    yield "rgb.jp2", _encoded(rgb, "JPEG2000"), RGB
    yield "alpha.jp2", _encoded(grey_alpha, "JPEG2000"), of_grey
    yield "sixteen_bits.jp2", _encoded(deep, "JPEG2000"), of_deep
    yield "rgb.ppm", _encoded(rgb, "PPM"), RGB
    yield "text.ppm", b"P3\n47 47\n255\n" + b" ".join(b"%d" % value for value in RGB.ravel()), RGB
    yield "one_bit.pbm", _encoded(one_bit, "PPM"), of_bits
    fives = (four_bits % 6).astype(np.uint8)
    yield "largest_5.pgm", b"P5\n47 47\n5\n" + fives.tobytes(), _three(fives * np.uint8(51))

    yield "a_jpeg_inside.png", _encoded(rgb, "JPEG"), None
    yield "a_png_inside.jpg", _encoded(rgb, "PNG"), RGB
    yield "a name, with \u00e9 & 'quotes'.png", _encoded(rgb, "PNG"), RGB
    yield os.fsdecode(b"not_utf8_\xff\xfe.png"), _encoded(rgb, "PNG"), RGB


def _bad() -> Iterator[tuple[str, bytes, str]]:
    rgb = Image.fromarray(RGB)
    kinds = {kind: _encoded(rgb, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM")}
    yield "empty.jpg", b"", "empty file"
    for name, content in (
        ("text.jpg", b"hello, I am no picture"),
        ("page.png", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        ("script.svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("zeros.png", bytes(4096)),
        ("one_byte.jpg", b"\xff"),
        ("signature_alone.png", kinds["PNG"][:8]),
        ("picture.gif.jpg", _encoded(rgb, "GIF")),
        ("archive.png", b"PK\x03\x04" + bytes(100)),
    ):
        yield name, content, "not an image of a known kind"
    for kind, name in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("BMP", "bmp"),
        ("TIFF", "tif"),
        ("WEBP", "webp"),
        ("PPM", "ppm"),
    ):
        for share in (30, 60, 90):
            yield f"cut_at_{share}.{name}", kinds[kind][: len(kinds[kind]) * share // 100], ""
    yield "cut_at_50.jp2", kinds["JPEG2000"][: len(kinds["JPEG2000"]) // 2], ""
    yield "cut_in_the_header.jpg", kinds["JPEG"][:40], ""
    yield "no_end.png", kinds["PNG"][:-12], ""
    yield "flipped_byte.png", _flipped(kinds["PNG"], len(kinds["PNG"]) // 2), ""
    yield "bad_header_sum.png", _flipped(kinds["PNG"], 20), ""
    yield "bomb.png", _png(8, 2, b"", size=(60000, 60000)), "pixels"
    yield "bomb.ppm", b"P6\n99999 99999\n255\n", "pixels"
    yield "bomb.bmp", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6), "pixels"
    yield "float.tif", _encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "32-bit"
    yield "thirty_two_bits.tif", _encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "32-bit"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format=kind, **options)
    return buffer.getvalue()


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(
    depth: int,
    color_type: int,
    rows: bytes,
    *,
    extra: bytes = b"",
    interlace: int = 0,
    size: tuple[int, int] | None = None,
) -> bytes:
    width, height = size or (WIDTH, HEIGHT)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _filtered(rows: np.ndarray) -> bytes:
    """Each row after its filter type, none."""
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in rows)


def _interlaced(image: np.ndarray) -> bytes:
    """Adam7: (first column, first row, column step, row step) of each pass."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return b"".join(_filtered(image[y::dy, x::dx]) for x, y, dx, dy in passes)


def _top_down_bmp() -> bytes:
    """A negative height: the first row comes first."""
    row = -(-3 * WIDTH // 4) * 4
    pixels = np.zeros((HEIGHT, row), dtype=np.uint8)
    pixels[:, : 3 * WIDTH] = RGB[..., ::-1].reshape(HEIGHT, -1)
    header = struct.pack("<IHHIIiiHHIIiiII", 54 + pixels.size, 0, 0, 54, 40, WIDTH, -HEIGHT, 1, 24, *[0] * 6)
    return b"BM" + header + pixels.tobytes()
