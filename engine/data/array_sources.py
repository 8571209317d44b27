"""Images that come as arrays, whatever keeps them: CIFAR's files or an NPZ file."""

from __future__ import annotations

import zipfile
from pathlib import Path

from engine.data.arrays import read_npz
from engine.data.cifar import find_cifar, read_cifar
from engine.data.samples import Samples
from engine.errors import UserError


def holds_arrays(root: Path) -> bool:
    """Whether it is a source of ``read_arrays``. Raises UserError where it cannot be read."""
    try:
        return find_cifar(root) is not None or (root.is_file() and zipfile.is_zipfile(root))
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error


def read_arrays(root: Path) -> tuple[Samples, Samples | None, Samples | None] | None:
    """Train, validation and test of CIFAR's files or an NPZ file; None: ``root`` is another source.

    Raises UserError where it cannot be read or is damaged.
    """
    try:
        if (cifar := find_cifar(root)) is not None:
            train, test = read_cifar(cifar)
            return train, None, test
        if root.is_file() and zipfile.is_zipfile(root):
            return read_npz(root)
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error
    return None
