"""The reference decoder: what the pixels of an image file are, whichever pipeline reads it.

JPEG, PNG, BMP, TIFF, WebP, PPM and JPEG 2000 by Pillow, DICOM by ``engine.data.dicom``. An image is turned as its EXIF
orientation says. Palettes, grey, one bit, CMYK and 16 bits (by their full range) become 8-bit RGB; alpha is dropped; of
several frames or pages the first counts. A file's content decides what it is, not its name.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.data import dicom
from engine.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
"""By Pillow's names."""

MAX_PIXELS = 2**27
"""An image with more is taken for a decompression bomb: it would fill 384 MiB."""

_HEADER_BYTES = 132
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by the value of its EXIF orientation."""
_LYING = range(5, 9)


class BadImage(ValueError):
    """A file that cannot be decoded, or should not be; its text is one line that says why and leaves out the name."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """``pixels`` (H, W, 3) uint8 RGB, and what the file held: ``format`` and ``mode`` by Pillow's names, or DICOM and
    its photometric interpretation."""

    pixels: np.ndarray
    format: str
    mode: str


def decode_image(file: str) -> np.ndarray:
    """The file's pixels: (H, W, 3) uint8 RGB.

    Raises:
        BadImage: it cannot be decoded.
        UserError: it is a DICOM file, and pydicom is not installed.
    """
    return decode(file).pixels


def decode(file: str) -> Decoded:
    """As ``decode_image``, and what the file held."""
    header = read_header(file)
    if not header:
        raise BadImage("empty file")
    try:
        if dicom.is_dicom(header):
            pixels, photometric = dicom.decode_dicom(file, MAX_PIXELS)
            return Decoded(pixels, "DICOM", photometric)
        with Image.open(file, formats=FORMATS) as image:
            return Decoded(decode_opened(image), image.format or "", image.mode)
    except (BadImage, UserError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image of a known kind ({', '.join((*FORMATS, 'DICOM'))})") from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # of pydicom's, and Pillow's while it opens, any
        raise BadImage(_first_line(error)) from error


def decode_opened(image: Image.Image) -> np.ndarray:
    """The pixels of an image that Pillow has opened, or made: (H, W, 3) uint8 RGB. Raises BadImage."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} pixels, not between 1 and {MAX_PIXELS}")
    try:
        image.load()
        return _to_rgb(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadImage(_first_line(error)) from error


def read_size(file: str) -> tuple[int, int]:
    """Height and width of what ``decode_image`` gives, from the header alone where it says so. Raises as that does."""
    try:
        if not dicom.is_dicom(read_header(file)):
            with Image.open(file, formats=FORMATS) as image:
                if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
                    image.load()  # which turns a TIFF, and in a PNG the orientation may stand behind the pixels
                lies = _orientation(image) in _LYING
                return (image.width, image.height) if lies else (image.height, image.width)
    except Exception:  # what is wrong with it is said where it is decoded
        pass
    height, width = decode_image(file).shape[:2]
    return height, width


def read_area(file: str) -> int:
    """Height times width of what ``decode_image`` gives, from the header alone but for DICOM. Raises as that does.

    Unlike ``read_size`` it has no use for the orientation, which some kinds of file give only when they are decoded.
    """
    try:
        if not dicom.is_dicom(read_header(file)):
            with Image.open(file, formats=FORMATS) as image:
                if 0 < image.width * image.height <= MAX_PIXELS:
                    return image.width * image.height
    except Exception:  # what is wrong with it is said where it is decoded
        pass
    height, width = decode_image(file).shape[:2]
    return height * width


def read_header(file: str) -> bytes:
    """The first bytes, which tell what kind of file it is. Raises BadImage."""
    try:
        status = Path(file).stat()
        if stat.S_ISREG(status.st_mode):
            with Path(file).open("rb") as opened:
                return opened.read(_HEADER_BYTES)
    except OSError as error:
        if Path(file).is_symlink() and isinstance(error, FileNotFoundError):
            raise BadImage(f"link to {Path(file).readlink()}, which does not exist") from error
        raise BadImage(error.strerror or "cannot be opened") from error
    # A named pipe in place of an image would be waited for.
    raise BadImage("Is a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")


def dali_decodes(header: bytes) -> bool:
    """Whether DALI makes the same pixels of a file that begins so.

    It does of all JPEG, and of the plain kinds of the others. It differs or fails at colour of 16 bits in PNG (it
    rounds where Pillow cuts off), BMP and WebP with extended headers, many kinds of TIFF (one bit, palette, float,
    CMYK, YCbCr, LZMA), grey JPEG 2000 with alpha, and PPM whose largest value is not 255.
    """
    if header.startswith(b"\xff\xd8\xff"):
        return True
    if header.startswith(b"\x89PNG\r\n\x1a\n"):
        depth, color_type = header[24:25], header[25:26]
        return depth != b"\x10" or color_type == b"\0"
    if header.startswith(b"BM"):
        header_bytes, bits, compression = header[14:18], header[28:30], header[30:34]
        return header_bytes == b"\x28\0\0\0" and bits == b"\x18\0" and compression == bytes(4)
    if header.startswith(b"RIFF") and header[8:12] == b"WEBP":
        return header[12:16] in (b"VP8 ", b"VP8L")
    return False


def _to_rgb(image: Image.Image) -> np.ndarray:
    turn = _TURNS.get(_orientation(image))
    upright = image.transpose(turn) if turn is not None else image
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise BadImage("32-bit values have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.rint(np.asarray(upright).clip(0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    upright.info.pop("transparency", None)  # else Pillow warns that it is dropped
    return np.asarray(upright.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """As EXIF gives it, which DALI reads too; Pillow's own ``exif_transpose`` also goes by XMP."""
    if "exif" not in image.info:  # TIFF has none there: Pillow turns it while it loads
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(_ORIENTATION_TAG, 1))
    except Exception:  # whatever is wrong with the metadata, the image can be seen
        return 1


def _first_line(error: Exception) -> str:
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (told.strip().splitlines() or [type(error).__name__])[0]
