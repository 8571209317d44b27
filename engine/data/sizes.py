"""Heights and widths of images, read from their headers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import ExifTags, Image

from engine.data.samples import Samples
from engine.errors import UserError

_LYING = range(5, 9)  # EXIF orientations that swap height and width


def image_sizes(samples: Samples, *, workers: int) -> np.ndarray:
    """(n, 2) int32: height and width of each image as it is shown, turned as its EXIF orientation says.

    Raises:
        UserError: a file that is no image; it names the file.
    """
    with ThreadPoolExecutor(workers) as pool:
        sizes = list(pool.map(_size, samples.files))
    return np.array(sizes, dtype=np.int32).reshape(-1, 2)


def _size(file: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            width, height = image.size
            lies = image.getexif().get(ExifTags.Base.Orientation) in _LYING
    except OSError as error:
        raise UserError(f"cannot read {file} ({error}): remove or replace it, then start again") from error
    return (width, height) if lies else (height, width)
