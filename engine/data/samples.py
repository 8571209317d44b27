"""Lists of labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.errors import UserError


@dataclass(frozen=True, eq=False)
class Head:
    """A further label of the same images.

    Attributes:
        class_names: the values that it takes.
        labels: (n,) int64, each an index into ``class_names``, or -1 for an image that has none.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images: files, or arrays with a name for each.

    Attributes:
        files: n absolute paths; with ``pixels``, names to show, such as ``"cifar-100-python/train[17]"``.
        labels: (n,) int64, each an index into ``class_names``.
        class_names: the classes, whether or not each has an image here.
        groups: n names of what must not be torn apart by a split, such as patients.
        weights: (n,) float64, how often each image is to be drawn in proportion to the others.
        pixels: (n, H, W, 3) uint8 RGB, in memory or mapped into it: the images themselves, of which there are no files.
        heads: further labels by name.

    Raises:
        ValueError: lengths, shapes or dtypes that do not fit together.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    weights: np.ndarray | None = None
    pixels: np.ndarray | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, Sequence[object] | np.ndarray | None] = {
            "labels": self.labels,
            "groups": self.groups,
            "weights": self.weights,
            "pixels": self.pixels,
            **{name: head.labels for name, head in self.heads.items()},
        }
        for name, column in columns.items():
            if column is not None and len(column) != len(self.files):
                raise ValueError(f"{len(self.files)} files, but {len(column)} {name}")
        pixels = self.pixels
        if pixels is not None and (pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8):
            raise ValueError(f"pixels must be (n, H, W, 3) uint8, not {pixels.shape} {pixels.dtype}")

    def __len__(self) -> int:
        return len(self.files)

    def class_counts(self) -> np.ndarray:
        """Images of each class: (num_classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def pictures(self) -> Sequence[str | np.ndarray]:
        """The files, or arrays (H, W, 3)."""
        return self.files if self.pixels is None else list(self.pixels)

    def subset(self, indices: Iterable[int]) -> Samples:
        """The images at ``indices``, in that order, under the same class names."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return Samples(
            tuple(self.files[i] for i in chosen),
            self.labels[chosen],
            self.class_names,
            tuple(self.groups[i] for i in chosen) if self.groups is not None else None,
            self.weights[chosen] if self.weights is not None else None,
            _take(self.pixels, chosen) if self.pixels is not None else None,
            {name: Head(head.class_names, head.labels[chosen]) for name, head in self.heads.items()},
        )


def _take(pixels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """A copy, so that the whole need not be kept; grey that is shown in three channels stays one channel in memory."""
    if pixels.strides[3] == 0:
        return np.broadcast_to(pixels[..., :1][chosen], (len(chosen), *pixels.shape[1:]))
    return pixels[chosen]


@dataclass(frozen=True)
class Splits:
    """The three sets of one experiment.

    Attributes:
        val: None: nothing is held out for validation, and none was given.
        description: one line for the log that says where they come from.
        warnings: what may not have been meant, a line each.
    """

    train: Samples
    val: Samples | None
    test: Samples | None
    description: str
    warnings: tuple[str, ...] = ()


def label_indices(names: Sequence[str], class_names: Sequence[str], place: Sequence[str] | str) -> np.ndarray:
    """(n,) int64 index of each name in ``class_names``.

    Raises UserError at the first that is not one of them, and says where it stands: ``place`` of it, or of them all.
    """
    index = {name: i for i, name in enumerate(class_names)}
    for i, name in enumerate(names):
        if name not in index:
            where = place if isinstance(place, str) else place[i]
            raise UserError(f"{where}: unknown label {name!r} (known: {shorten(class_names)})")
    return np.array([index[name] for name in names], dtype=np.int64)


def sort_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names, sorted: numerically if every one is an integer ("2" before "10")."""
    unique = set(names)
    if all(name.isdecimal() for name in unique):
        return tuple(sorted(unique, key=lambda name: (int(name), name)))
    return tuple(sorted(unique))


def shorten(names: Iterable[str], limit: int = 10) -> str:
    """The first ``limit`` names and how many more there are, for a message of one line."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
