"""What reaches DALI of each image: its path, where DALI decodes it as the reference does, else its pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from engine.data.decode import BadImage, dali_decodes, decode_image, read_header
from engine.data.failure import Failure
from engine.data.samples import Samples
from engine.errors import UserError

_NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)


class ImageFeed:
    """Images by their index, in two steps, so that decoding here goes on while DALI works.

    Which files DALI decodes is found out when each is first asked for, and kept.

    Args:
        samples: files or arrays.
        workers: threads; they start when they are needed.
    """

    def __init__(self, samples: Samples, workers: int) -> None:
        self._samples = samples
        self._left_to_dali = np.zeros(len(samples), dtype=bool)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def begin(self, indices: np.ndarray) -> list[Future[np.ndarray | None] | None]:
        """Starts to decode what DALI will not; the answer goes to ``finish``, with the same indices."""
        if self._samples.pixels is not None:
            return []
        files = self._samples.files
        return [None if self._left_to_dali[i] else self._pool.submit(_pixels_unless_dali, files[i]) for i in indices]

    def finish(
        self, indices: np.ndarray, begun: Sequence[Future[np.ndarray | None] | None]
    ) -> tuple[tuple[Any, ...], list[Failure]]:
        """A batch's inputs: (pixels,) of arrays, or (pixels, paths, whether DALI is to decode it) of files.

        With them the images that could not be decoded.
        """
        if self._samples.pixels is not None:
            return ([np.ascontiguousarray(self._samples.pixels[i]) for i in indices],), []
        pixels, left_to_dali = [_NO_PIXELS] * len(indices), np.ones(len(indices), dtype=bool)
        failures: list[Failure] = []
        for place, (i, future) in enumerate(zip(indices, begun, strict=True)):
            if future is None:
                continue
            try:
                decoded = future.result()
            except (BadImage, UserError) as error:
                left_to_dali[place] = False
                failures.append(Failure(int(i), str(error)))
                continue
            if decoded is None:
                self._left_to_dali[i] = True
            else:
                pixels[place], left_to_dali[place] = decoded, False
        paths = [encode_path(self._samples.files[i]) for i in indices]
        return (pixels, paths, left_to_dali), failures


def _pixels_unless_dali(file: str) -> np.ndarray | None:
    return None if dali_decodes(read_header(file)) else np.ascontiguousarray(decode_image(file))


def encode_path(file: str) -> np.ndarray:
    return np.frombuffer(os.fsencode(file), dtype=np.uint8)
