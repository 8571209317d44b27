"""Small image folders that a network learns in seconds: each class has its own colour, under noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def write_image(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (20, 24)) -> None:
    noise = np.random.default_rng(seed).normal(0, 25, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def write_folder(root: Path, counts: dict[str, int], test: int = 4) -> Path:
    """root/train/CLASS/* with ``counts`` images, and root/test/CLASS/* with ``test`` of each class."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / "train" / name / f"{i:03d}.png", COLOURS[name], seed=1000 * label + i)
        for i in range(test):
            write_image(root / "test" / name / f"{i:03d}.jpg", COLOURS[name], seed=1000 * label + 500 + i)
    return root
