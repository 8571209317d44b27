"""Heights and widths of images, read from their headers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from engine.data.decode import BadImage, read_size
from engine.data.failure import cannot_decode
from engine.data.samples import Samples


def image_sizes(samples: Samples, *, workers: int) -> np.ndarray:
    """(n, 2) int32: height and width of each image as it is shown, turned as its EXIF orientation says.

    Raises:
        UserError: a file that is no image; it names the file.
    """
    if samples.pixels is not None:
        return np.tile(np.array(samples.pixels.shape[1:3], dtype=np.int32), (len(samples), 1))
    with ThreadPoolExecutor(workers) as pool:
        sizes = list(pool.map(_size, samples.files))
    return np.array(sizes, dtype=np.int32).reshape(-1, 2)


def _size(file: str) -> tuple[int, int]:
    try:
        return read_size(file)
    except BadImage as error:
        raise cannot_decode(file, str(error)) from error
