"""What Pillow has to say about one image file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PpmImagePlugin import PpmImageFile

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
"""What both DALI and Pillow decode, by Pillow's names. A file's content decides, not its extension."""

MAX_PIXELS = 2**27
"""An image with more is taken for a decompression bomb: it would fill 384 MiB."""


def pillow_failure(file: str) -> str | None:
    """Why Pillow does not decode a file, or why it should not be decoded at all; None: it does."""
    try:
        if Path(file).stat().st_size == 0:
            return "empty file"
        with Image.open(file, formats=FORMATS) as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                return f"{image.width} x {image.height} pixels, not between 1 and {MAX_PIXELS}"
            if isinstance(image, PpmImageFile) and not _has_full_range(image):
                return "PPM whose largest value is neither 255 nor 65535"
            image.load()
    except UnidentifiedImageError:
        return f"not an image of a known kind ({', '.join(FORMATS)})"
    except Image.DecompressionBombError:
        return f"more than {MAX_PIXELS} pixels"
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _has_full_range(image: PpmImageFile) -> bool:
    """DALI takes the values of a PPM as they are, whatever the maximum that its header gives."""
    arguments = image.tile[0].args
    return not isinstance(arguments, tuple) or arguments[-1] in (255, 65535)
