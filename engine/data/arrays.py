"""Images that come as arrays: NPZ files in MedMNIST's form.

``train_images``, ``train_labels`` and, where there are any, ``val_*`` and ``test_*``: images (n, H, W) or (n, H, W, 3)
uint8, labels (n,) or (n, 1) integers, whose numbers are the names of the classes. (Yang et al., "MedMNIST v2",
Scientific Data 2023.)
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.data.samples import Samples, shorten, sort_class_names
from engine.errors import UserError

_SPLITS = ("train", "val", "test")


def read_npz(path: Path) -> tuple[Samples, Samples | None, Samples | None]:
    """Train, validation and test of a file, the last two where it has them.

    Raises UserError: it cannot be read, an array is missing or of another shape or dtype, or a class is not in train.
    """
    arrays = _load(path)
    if "train_images" not in arrays:
        raise UserError(f"{path} has no array train_images (it has {shorten(arrays) or 'none'})")
    found = {split: _part(path, arrays, split) for split in _SPLITS if f"{split}_images" in arrays}
    names = sort_class_names(map(str, np.unique(found["train"][1])))
    if len(names) < 2:
        raise UserError(f"{path}: train_labels holds one label only ({names[0]}): classification needs at least two")
    values = np.array([int(name) for name in names])
    parts = {}
    for split, (pixels, labels) in found.items():
        unknown = np.setdiff1d(labels, values)
        if len(unknown):
            raise UserError(f"{path}: {split}_labels holds {unknown[0]}, which train_labels does not")
        files = tuple(f"{path.name}/{split}[{i}]" for i in range(len(labels)))
        parts[split] = Samples(files, np.searchsorted(values, labels).astype(np.int64), names, pixels=pixels)
    return parts["train"], parts.get("val"), parts.get("test")


def relabel(samples: Samples, class_names: Sequence[str], source: Path) -> Samples:
    """The same images under other class names; raises UserError where one of theirs is not among them."""
    index = {name: i for i, name in enumerate(class_names)}
    for label in np.flatnonzero(samples.class_counts()):
        if samples.class_names[label] not in index:
            raise UserError(
                f"{source}: training has no class {samples.class_names[label]!r} (it has {shorten(class_names)})"
            )
    mapped = np.array([index.get(name, -1) for name in samples.class_names], dtype=np.int64)[samples.labels]
    return Samples(samples.files, mapped, tuple(class_names), pixels=samples.pixels, heads=samples.heads)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            known = [f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels")]
            return {name: file[name] for name in known if name in file.files}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable NPZ file: {reason}") from error


def _part(path: Path, arrays: Mapping[str, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, H, W, 3) uint8 pixels and (n,) int64 labels."""
    images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
    if labels is None:
        raise UserError(f"{path} has {split}_images and no {split}_labels")
    is_grey = images.ndim == 3
    if images.dtype != np.uint8 or not (is_grey or (images.ndim == 4 and images.shape[3] == 3)) or not images.size:
        raise UserError(
            f"{path}: {split}_images is {images.shape} {images.dtype}, and must be (n, H, W) or (n, H, W, 3) uint8"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{path}: {split}_labels is {labels.shape} {labels.dtype}, and must hold one integer of at least 0 "
            f"for each of {len(images)} images"
        )
    # Grey in three channels takes no more memory than in one.
    pixels = np.broadcast_to(images[..., None], (*images.shape, 3)) if is_grey else images
    return pixels, labels.astype(np.int64)
