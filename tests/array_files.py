"""Small files of CIFAR and MedMNIST, as the original ones are made."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.data_helpers import picture


def images(n: int, seed: int = 0, side: int = 32) -> np.ndarray:
    """(n, side, side, 3) uint8, each its own."""
    return np.stack([picture(side, side, seed=1000 * seed + i) for i in range(n)])


def batch(pixels: np.ndarray, **labels: list[int]) -> dict[str, Any]:
    """A row of ``data`` holds the red values of an image, then the green, then the blue ones."""
    return {"data": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1), **labels}


def write_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    """Protocol 2 is that of the original files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar10(root: Path, per_batch: int = 4, protocol: int = 2) -> Path:
    """``root/cifar-10-batches-py`` of two classes, taken in turn; the test batch is number 6."""
    folder = root / "cifar-10-batches-py"
    labels = [i % 2 for i in range(per_batch)]
    for i in range(1, 7):
        name = f"data_batch_{i}" if i < 6 else "test_batch"
        write_pickle(folder / name, batch(images(per_batch, i), labels=labels), protocol)
    write_pickle(folder / "batches.meta", {"label_names": ["airplane", "frog"], "num_vis": 3072}, protocol)
    return folder


def write_cifar100(
    root: Path, train: int = 12, test: int = 4, fine: Sequence[str] = ("ant", "bee", "cod", "eel")
) -> Path:
    """``root/cifar-100-python`` of fine classes that are taken in turn, and two coarse ones."""
    folder = root / "cifar-100-python"
    for name, n in (("train", train), ("test", test)):
        labels = [i % len(fine) for i in range(n)]
        coarse = [2 * label // len(fine) for label in labels]
        content = batch(images(n, len(name)), fine_labels=labels, coarse_labels=coarse)
        write_pickle(folder / name, content)
    names = {"fine_label_names": list(fine), "coarse_label_names": ["insect", "fish"]}
    write_pickle(folder / "meta", names)
    return folder


def pack(folder: Path, archive: Path) -> Path:
    """The folder as a .tar.gz, and gone."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return archive


def write_npz(path: Path, counts: dict[str, int], grey: bool = False, **changes: Any) -> Path:
    """Classes 0, 1 and 2 taken in turn; ``changes`` replace arrays, and None leaves one out."""
    arrays: dict[str, Any] = {}
    for seed, (split, n) in enumerate(counts.items()):
        pixels = images(n, seed, side=28)
        arrays[f"{split}_images"] = pixels[..., 0] if grey else pixels
        arrays[f"{split}_labels"] = (np.arange(n) % 3).astype(np.uint8)[:, None]
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path
