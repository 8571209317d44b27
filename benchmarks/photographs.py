"""Photographs that nobody took: JPEG files of the detail, and so of the size, that a camera's have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 2048  # of the fields that pictures are cut from


class Photographs:
    """Pictures cut out of random fields whose spectrum falls with the frequency as that of natural scenes does."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._luma = _field(rng, power=1.3)
        self._chroma = [_field(rng, power=1.8) for _ in range(2)]

    def picture(self, height: int, width: int, seed: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        rng = np.random.default_rng(seed)
        luma, *chroma = (_cut(field, height, width, rng) for field in (self._luma, *self._chroma))
        weights = rng.normal(0, 0.5, (3, 2)).astype(np.float32)
        channels = [luma + sum(w * field for w, field in zip(row, chroma, strict=True)) for row in weights]
        return np.clip(120 + 45 * np.stack(channels, axis=-1), 0, 255).astype(np.uint8)

    def write(self, folder: Path, count: int, height: int, width: int) -> tuple[str, ...]:
        """JPEG files of quality 90, their sides up to 8% off, every fourth upright; the same ones every time."""
        folder.mkdir(parents=True)
        rng = np.random.default_rng(1)
        files = []
        for i in range(count):
            h, w = (round(side * rng.uniform(0.92, 1.08)) for side in (height, width))
            files.append(str(folder / f"{i:04d}.jpg"))
            Image.fromarray(self.picture(*((w, h) if i % 4 == 0 else (h, w)), seed=i)).save(files[-1], quality=90)
        return tuple(files)


def _field(rng: np.random.Generator, power: float) -> np.ndarray:
    spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE)))
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE))
    frequency[0, 0] = 1
    field = np.fft.irfft2(spectrum / frequency**power, s=(SIDE, SIDE))
    return (field / field.std()).astype(np.float32)


def _cut(field: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    # The field is periodic: it goes on at its other side, for a picture that is larger than it
    top, left = rng.integers(0, SIDE, 2)
    rows, columns = np.arange(top, top + height) % SIDE, np.arange(left, left + width) % SIDE
    return field[rows[:, None], columns]
