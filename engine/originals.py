"""The images that a run's predictions.csv names, found again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from engine.build import data_folder, open_data
from engine.config import Config
from engine.data import Samples
from engine.data.decode import decode_image
from engine.data.splits import holds_arrays
from engine.errors import UserError


class Originals:
    """Images by their names in predictions.csv: files, or the arrays of an NPZ file or of CIFAR's.

    Args:
        config: that of the run.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = data_folder(config.data_dir, config.test_csv or config.csv)

    def pixels(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises BadImage where it is not there any more, or cannot be read."""
        if name in self._arrays:
            return self._arrays[name]
        return decode_image(str(self.folder.absolute() / name))

    def samples(self, names: Sequence[str]) -> Samples:
        """The images for a loader, with the labels 0, 1, ...; whether they can be read is not looked at."""
        shown = tuple(names)
        labels = np.arange(len(shown))
        if shown and all(name in self._arrays for name in shown):
            arrays = np.stack([self._arrays[name] for name in shown])
            return Samples(shown, labels, shown, pixels=arrays)
        return Samples(tuple(str(self.folder.absolute() / name) for name in shown), labels, shown)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """Empty where the images are files."""
        try:
            if self.config.data_dir is None or not holds_arrays(Path(self.config.data_dir)):
                return {}
            splits = open_data(self.config)
        except UserError:
            return {}
        return {
            name: pixels
            for part in (splits.test, splits.val)
            if part is not None and part.pixels is not None
            for name, pixels in zip(part.files, part.pixels, strict=True)
        }
