"""Lists of labelled image files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled image files.

    Attributes:
        files: n absolute paths.
        labels: (n,) int64, each an index into ``class_names``.
        class_names: the classes, whether or not each has a file here.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def class_counts(self) -> np.ndarray:
        """Files in each class: (num_classes,) int64."""
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def subset(self, indices: Iterable[int]) -> Samples:
        """The files at ``indices``, in that order, under the same class names."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return Samples(tuple(self.files[i] for i in chosen), self.labels[chosen], self.class_names)


@dataclass(frozen=True)
class Splits:
    """The three sets of one experiment; ``description`` is one line for the log that says where they come from."""

    train: Samples
    val: Samples
    test: Samples | None
    description: str


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
