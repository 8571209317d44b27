"""The train, validation and test sets of an experiment, from a folder, from CSV manifests or from the embedded digits.

No image is opened here: ``engine.data.check`` does that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.counter import Purpose, generator
from engine.data.digits import write_digits
from engine.data.folder import read_known_classes, read_splits_folder, require_folder
from engine.data.manifest import read_manifest
from engine.data.samples import Samples, Splits
from engine.errors import UserError

StrPath = str | os.PathLike[str]


def open_splits(
    *,
    data_dir: StrPath | None = None,
    csv: StrPath | None = None,
    val_csv: StrPath | None = None,
    test_csv: StrPath | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
) -> Splits:
    """The three sets; a test set is never touched for validation.

    Args:
        data_dir: ``DIR/train/CLASS/*`` with, where there are any, ``DIR/val/CLASS/*`` (or ``valid``, ``validation``)
            and ``DIR/test/CLASS/*``; or ``DIR/CLASS/*``, all of it train. With ``csv``: the folder that the manifests'
            relative file names start from, by default each manifest's own.
        csv, val_csv, test_csv: manifests with the columns ``filename,label``.
        val_fraction: the part of train, class by class, that becomes the validation set where none is given: at least
            one image of every class that has two, never the whole of a class.
        seed: decides which images those are; their names do the rest, so that the split can be made again elsewhere.

    Neither ``data_dir`` nor ``csv``: scikit-learn's scanned digits, made long-tailed (``engine.data.digits``).

    Raises:
        UserError: something is missing, empty, contradictory or unknown.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: give a part between 0 and 1, such as 0.15")
    if csv is None and (val_csv is not None or test_csv is not None):
        flag = "--val-csv" if val_csv is not None else "--test-csv"
        raise UserError(f"{flag} without --csv: where one set comes from a manifest, training must as well")

    if csv is not None:
        source = str(csv)
        train, val, test = _read_manifests(data_dir, csv, val_csv, test_csv)
    else:
        source = str(data_dir) if data_dir is not None else "embedded digits"
        train, val, test = read_splits_folder(Path(data_dir) if data_dir is not None else write_digits())
    origin = "given"
    if val is None:
        train, val = _take_validation(train, val_fraction, seed)
        origin = f"taken from train, {val_fraction:.0%} of each class"
    _refuse_shared_files(train, val, test)

    description = (
        f"{source}: {len(train.class_names)} classes, train {len(train)}, val {len(val)} ({origin}), "
        f"test {len(test) if test is not None else 'none'}"
    )
    return Splits(train, val, test, description)


def open_samples(class_names: Sequence[str], *, data_dir: StrPath | None = None, csv: StrPath | None = None) -> Samples:
    """One set to score a trained model on, labelled by the model's own classes.

    Args:
        class_names: the classes in the model's order.
        data_dir: ``DIR/test/CLASS/*`` where DIR has a test folder, else ``DIR/CLASS/*``. With ``csv``: the folder that
            its relative file names start from.
        csv: a manifest with the columns ``filename,label``.

    Neither: the test set of the embedded digits.

    Raises:
        UserError: as ``open_splits``, and at a class that the model does not know.
    """
    names = tuple(class_names)
    if csv is not None:
        return read_manifest(Path(csv), _base(data_dir), names)
    root = Path(data_dir) if data_dir is not None else write_digits()
    require_folder(root)
    if (root / "test").is_dir() and "test" not in names:
        return read_known_classes(root / "test", names)
    if (root / "train").is_dir() and "train" not in names:
        raise UserError(f"{root} has train/ but no test/: name the folder whose class folders are to be scored")
    return read_known_classes(root, names)


def _read_manifests(
    data_dir: StrPath | None, csv: StrPath, val_csv: StrPath | None, test_csv: StrPath | None
) -> tuple[Samples, Samples | None, Samples | None]:
    base = _base(data_dir)
    if base is not None and (base / "train").is_dir():
        raise UserError(
            f"--data-dir {base} has its own train/, and --csv {csv} names another: give one of the two "
            "(without --data-dir, names in the manifest start from its own folder)"
        )
    train = read_manifest(Path(csv), base)
    val = read_manifest(Path(val_csv), base, train.class_names) if val_csv is not None else None
    test = read_manifest(Path(test_csv), base, train.class_names) if test_csv is not None else None
    return train, val, test


def _base(data_dir: StrPath | None) -> Path | None:
    if data_dir is None:
        return None
    require_folder(Path(data_dir))
    return Path(data_dir)


def _take_validation(train: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    is_val = np.zeros(len(train), dtype=bool)
    for label in range(len(train.class_names)):
        # By name and not by place, so that a manifest's order does not matter either.
        members = sorted(np.flatnonzero(train.labels == label), key=train.files.__getitem__)
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            shuffled = generator(Purpose.VALIDATION_SPLIT, seed, label).permutation(members)
            is_val[shuffled[:count]] = True
    if not is_val.any():
        raise UserError("no class has two images, so none can be left out for validation: give a validation set")
    return train.subset(np.flatnonzero(~is_val)), train.subset(np.flatnonzero(is_val))


def _refuse_shared_files(train: Samples, val: Samples, test: Samples | None) -> None:
    owner: dict[str, str] = {}
    for split, samples in (("train", train), ("val", val), ("test", test)):
        for file in samples.files if samples is not None else ():
            if owner.setdefault(file, split) != split:
                raise UserError(f"{file} is in both {owner[file]} and {split}: leave it in one of them")
