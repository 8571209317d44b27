"""A corpus of odd files: what must be read, and what must be refused with a reason, never with a traceback."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from tests.data_helpers import picture

HEIGHT, WIDTH = 33, 47


def write_good(folder: Path) -> dict[str, str]:
    """{name: absolute path} of files that look odd and must be read, all of one scene of 33 x 47 unless named so."""
    rgb = picture(HEIGHT, WIDTH)
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    alpha = image.copy()
    alpha.putalpha(grey)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 10_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "progressive.jpg": (image, {"progressive": True}),
        "profile.jpg": (image, {"icc_profile": profile}),
        "worst_quality.jpg": (image, {"quality": 1}),
        **{f"orientation_{k}.jpg": (image, {"exif": orientation(k)}) for k in (2, 5, 6, 8)},
        "SHOUTING.JPG": (image, {"format": "JPEG"}),
        "palette.png": (palette, {}),
        "palette_transparent.png": (palette, {"transparency": 3}),
        "one_bit.png": (image.convert("1"), {}),
        "alpha.png": (alpha, {}),
        "grey_alpha.png": (alpha.convert("LA"), {}),
        "sixteen_bits.png": (deep, {}),
        "with_text.png": (image, {"pnginfo": text}),
        "animated.png": (image, {"save_all": True, "append_images": [alpha]}),
        "animated.webp": (image, {"save_all": True, "append_images": [alpha], "lossless": True}),
        "lossless.webp": (image, {"lossless": True}),
        "palette.bmp": (palette, {}),
        "grey.bmp": (grey, {}),
        "sixteen_bits.tif": (deep, {}),
        "lzw.tiff": (image, {"compression": "tiff_lzw"}),
        "group4.tif": (image.convert("1"), {"compression": "group4"}),
        "pages.tif": (image, {"save_all": True, "append_images": [grey]}),
        "plain.ppm": (image, {}),
        "plain.pgm": (grey, {}),
        "plain.jp2": (image, {}),
        "jpeg_named.png": (image, {"format": "JPEG"}),
        "png_named.jpg": (image, {"format": "PNG"}),
        "webp_named.jpeg": (image, {"format": "WEBP"}),
        "one_pixel_1x1.png": (image.crop((0, 0, 1, 1)), {}),
        "one_row_1x300.png": (image.resize((300, 1)), {}),
        "one_column_300x1.jpg": (image.resize((1, 300)), {}),
        "größe, 'x' 图像.png": (image, {}),
        f"{'long' * 60}.png": (image, {}),
        os.fsdecode(b"caf\xe9.png"): (image, {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, options) in kinds.items():
        content.save(folder / name, **options)
    (folder / "garbage_after_the_end.jpg").write_bytes((folder / "grey.jpg").read_bytes() + b"garbage" * 99)
    (folder / "half_range.pgm").write_bytes(b"P5\n4 4\n100\n" + bytes(range(16)))
    (folder / "linked.png").symlink_to(folder / "alpha.png")
    return {path.name: str(path) for path in sorted(folder.iterdir())}


def write_bad(folder: Path) -> dict[str, tuple[str, str]]:
    """{name: (absolute path, part of the reason)} of files that must be refused."""
    image = Image.fromarray(picture(HEIGHT, WIDTH))
    encoded = {end: _encoded(image, kind) for end, kind in Image.registered_extensions().items() if end in _CUT}
    png = encoded[".png"]
    middle = png.index(b"IDAT") + 40
    contents: dict[str, tuple[bytes, str]] = {
        **{f"cut{end}": (encoded[end][: len(encoded[end]) // 2], reason) for end, reason in _CUT.items()},
        "empty.png": (b"", "empty file"),
        "signature_only.png": (png[:8], "not an image of a known kind"),
        "header_only.png": (png[: png.index(b"IDAT") - 4], ""),
        "one_byte.jpg": (b"\xff", "not an image of a known kind"),
        "marker_only.jpg": (b"\xff\xd8\xff", "not an image of a known kind"),
        "zeros.jpg": (bytes(5000), "not an image of a known kind"),
        "noise.png": (np.random.default_rng(0).bytes(5000), "not an image of a known kind"),
        "page_not_found.jpg": (b"<!DOCTYPE html><html>404</html>", "not an image of a known kind"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known kind"),
        "document.jpg": (b"%PDF-1.7\n", "not an image of a known kind"),
        "archive.png": (b"PK\x03\x04" + bytes(100), "not an image of a known kind"),
        "pointer_of_git_lfs.png": (b"version https://git-lfs.github.com/spec/v1\n", "not an image of a known kind"),
        "moving.png": (_encoded(image, "GIF"), "not an image of a known kind"),
        "icon.bmp": (_encoded(image, "ICO"), "not an image of a known kind"),
        "bit_flipped.png": (png[:middle] + bytes([png[middle] ^ 255]) + png[middle + 1 :], ""),
        "no_end.png": (png[:-12], "DALI: "),
        "bomb.png": (claim_png(60_000, 60_000), "pixels"),
        "bomb.ppm": (b"P6\n99999 99999\n255\n", "pixels"),
        "large.png": (claim_png(14_000, 10_000), "14000 x 10000 pixels"),
        "no_width.png": (claim_png(0, 10), ""),
        "compressed_text_bomb.png": (_with_text_bomb(png), ""),
        "thirty_two_bits.tif": (
            _encoded(Image.fromarray(np.arange(81, dtype=np.int32).reshape(9, 9)), "TIFF"),
            "",
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    expected = {name: reason for name, (_, reason) in contents.items()}
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    for name, make, reason in _NOT_FILES:
        make(folder / name)
        expected[name] = reason
    return {name: (str(folder / name), reason) for name, reason in expected.items()}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def claim_png(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(100)))


_CUT = {
    ".png": "truncated",
    ".jpg": "runcated",
    ".bmp": "truncated",
    ".webp": "decoder",
    ".tif": "",
    ".jp2": "",
    ".ppm": "truncated",
}

_NOT_FILES: tuple[tuple[str, Callable[[Path], object], str], ...] = (
    ("folder.png", Path.mkdir, "Is a directory"),
    ("pipe.png", os.mkfifo, "not a regular file"),
    ("link_to_nothing.png", lambda path: path.symlink_to("gone.png"), "gone.png, which does not exist"),
    ("link_to_itself.png", lambda path: path.symlink_to(path), "levels of symbolic links"),
    ("absent.png", lambda path: None, "No such file"),
)


def _encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, format=kind)
    return content.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_text_bomb(png: bytes) -> bytes:
    """2 KiB of text that become 2 MiB."""
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 * 2**20), 9))
    return png[:33] + text + png[33:]
