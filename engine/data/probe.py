"""What Pillow has to say about one image file."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PpmImagePlugin import PpmImageFile

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
"""What both DALI and Pillow decode, by Pillow's names. A file's content decides, not its extension."""

MAX_PIXELS = 2**27
"""An image with more is taken for a decompression bomb: it would fill 384 MiB."""


@dataclass(frozen=True)
class Probe:
    """One file: ``reason`` says in a few words why it is bad (None: it is good), the rest is of Pillow's reading."""

    reason: str | None
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0


def pillow_failure(file: str) -> str | None:
    """Why Pillow does not decode a file, or why it should not be decoded at all; None: it does."""
    return probe(file).reason


def probe(file: str) -> Probe:
    """Opens and decodes a file with Pillow. Raises nothing for a bad one."""
    try:
        reason = _not_worth_opening(file)
        if reason is not None:
            return Probe(reason)
        with Image.open(file, formats=FORMATS) as image:
            read = image.format or "", image.mode, image.width, image.height
            if not 0 < image.width * image.height <= MAX_PIXELS:
                return Probe(f"{image.width} x {image.height} pixels, not between 1 and {MAX_PIXELS}", *read)
            if isinstance(image, PpmImageFile) and not _has_full_range(image):
                return Probe("PPM whose largest value is neither 255 nor 65535", *read)
            image.load()
            return Probe(None, *read)
    except UnidentifiedImageError:
        return Probe(f"not an image of a known kind ({', '.join(FORMATS)})")
    except Image.DecompressionBombError:
        return Probe(f"more than {MAX_PIXELS} pixels")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Probe((told.splitlines() or [type(error).__name__])[0])


def _not_worth_opening(file: str) -> str | None:
    try:
        status = Path(file).stat()
    except FileNotFoundError:
        if Path(file).is_symlink():
            return f"link to {Path(file).readlink()}, which does not exist"
        raise
    if stat.S_ISDIR(status.st_mode):
        return "Is a directory"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"  # to open a pipe would wait for ever
    return "empty file" if status.st_size == 0 else None


def _has_full_range(image: PpmImageFile) -> bool:
    """DALI takes the values of a PPM as they are, whatever the maximum that its header gives."""
    arguments = image.tile[0].args
    return not isinstance(arguments, tuple) or arguments[-1] in (255, 65535)
