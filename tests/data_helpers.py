"""Small pictures on disk for the tests of the data side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.data import DaliLoader, Loader, Samples

CPU = torch.device("cpu")


def picture(height: int, width: int, seed: int = 0, noise: float = 12.0) -> np.ndarray:
    """(height, width, 3) uint8: waves, different in every channel and with no symmetry, and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 6, 3)
    waves = [np.sin(x / 9 + y / 14 + phase[0]), np.cos(x / 11 + phase[1]), np.sin(y / 8 - x / 30 + phase[2])]
    image = 127 + 75 * np.stack(waves, axis=-1) + rng.normal(0, noise, (height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def squares(seed: int) -> np.ndarray:
    """(32, 36, 3) uint8: 8 x 9 grey squares; no two seeds are near-duplicates."""
    grey = np.random.default_rng(seed).integers(0, 256, (8, 9, 1), dtype=np.uint8)
    return grey.repeat(4, axis=0).repeat(4, axis=1).repeat(3, axis=2)


def save(path: Path, image: np.ndarray, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return str(path)


def save_picture(path: Path, height: int = 12, width: int = 10, seed: int = 0) -> str:
    return save(path, picture(height, width, seed))


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """``root/NAME/iii.png``, as many as ``counts`` says, each different."""
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save_picture(root / name / f"{i:03d}.png", seed=1000 * c + i)
    return root


def make_samples(folder: Path, counts: Sequence[int], height: int = 12, width: int = 10) -> Samples:
    """As many pictures of classes "0", "1", ... as ``counts`` says, each different."""
    labels = np.repeat(np.arange(len(counts)), counts)
    files = [save_picture(folder / f"{i:03d}.png", height, width, seed=i) for i in range(len(labels))]
    return Samples(tuple(files), labels, tuple(str(c) for c in range(len(counts))))


def make_loader(samples: Samples, *, pipeline: type[Loader] = DaliLoader, **options: Any) -> Loader:
    """A loader on the CPU that gives pixels in [0, 1] unless told otherwise."""
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "img_size": 16,
        "device": CPU,
        "dtype": torch.float32,
        "training": False,
        "workers": 2,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    return pipeline(samples, **(defaults | options))
