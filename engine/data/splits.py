"""The train, validation and test sets of an experiment, whatever they come from.

A folder of class folders, manifests (CSV or Parquet), CIFAR's files, an NPZ file, or the embedded digits. No image file
is decoded here: ``engine.data.check`` does that.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.data.arrays import read_npz, relabel
from engine.data.cifar import find_cifar, read_cifar
from engine.data.counter import Purpose, generator
from engine.data.digits import dealt_order, write_digits
from engine.data.folder import read_known_classes, read_splits_folder, require_folder
from engine.data.long_tail import make_long_tailed
from engine.data.manifest import read_manifest, read_manifest_splits
from engine.data.samples import Samples, Splits
from engine.data.splitting import split_groups
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
    allow_links: bool = False,
    imbalance_ratio: float | None = None,
) -> Splits:
    """The three sets; a test set is never touched for validation.

    Args:
        data_dir: ``DIR/train/CLASS/*`` with, where there are any, ``DIR/val/CLASS/*`` (or ``valid``, ``validation``)
            and ``DIR/test/CLASS/*``; or ``DIR/CLASS/*``, all of it train. Or CIFAR-10 or CIFAR-100 as torchvision keeps
            them, a folder or the .tar.gz, or an NPZ file in MedMNIST's form: the content decides. With ``csv``: the
            folder that the manifests' relative file names start from, by default each manifest's own.
        csv, val_csv, test_csv: manifests (``engine.data.manifest``), CSV or Parquet. ``csv`` is that of train, or with
            a column ``split`` that of all three.
        val_fraction: the part of train, class by class, that becomes the validation set where none is given: at least
            one image of every class that has two, never the whole of a class. Where a manifest has groups, whole ones.
        seed: decides which images those are; their names do the rest, so that the split can be made again elsewhere.
        allow_links: follow links that lead out of ``data_dir``.
        imbalance_ratio: train is made long-tailed (``engine.data.long_tail``), and before a validation set is taken
            from it, so that this one is as well; a given one stays whole, and so does test.

    Neither ``data_dir`` nor ``csv``: scikit-learn's scanned digits, balanced (``engine.data.digits``); their long tail
    is the same for every seed.

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
        root = Path(data_dir) if data_dir is not None else write_digits()
        train, val, test = read_arrays(root) or read_splits_folder(root, allow_links=allow_links)
    if imbalance_ratio is not None:
        order = dealt_order(root) if data_dir is None and csv is None else None
        train = make_long_tailed(train, imbalance_ratio, seed, order=order)
        source += f", long-tailed with U = {imbalance_ratio:g}"
    origin = "given"
    if val is None:
        train, val = _take_validation(train, val_fraction, seed)
        origin = f"taken from train, {val_fraction:.0%} of each class"
    _refuse_shared(train, val, test)

    description = (
        f"{source}: {len(train.class_names)} classes, train {len(train)}, val {len(val)} ({origin}), "
        f"test {len(test) if test is not None else 'none'}"
    )
    return Splits(train, val, test, description)


def open_samples(
    class_names: Sequence[str],
    *,
    data_dir: StrPath | None = None,
    csv: StrPath | None = None,
    allow_links: bool = False,
) -> Samples:
    """One set to score a trained model on, labelled by the model's own classes.

    Args:
        class_names: the classes in the model's order.
        data_dir: ``DIR/test/CLASS/*`` where DIR has a test folder, else ``DIR/CLASS/*``; or CIFAR's or an NPZ file's
            test set. With ``csv``: the folder that its relative file names start from.
        csv: a manifest; with a column ``split``, its rows of test.
        allow_links: follow links that lead out of ``data_dir``.

    Neither: the test set of the embedded digits.

    Raises:
        UserError: as ``open_splits``, and at a class that the model does not know.
    """
    names = tuple(class_names)
    if csv is not None:
        return read_manifest(Path(csv), _base(data_dir), names)
    root = Path(data_dir) if data_dir is not None else write_digits()
    if (arrays := read_arrays(root)) is not None:
        test = arrays[2]
        if test is None:
            raise UserError(f"{root} has no test_images: name a file that has")
        return relabel(test, names, root)
    require_folder(root)
    within = None if allow_links else root
    if (root / "test").is_dir() and "test" not in names:
        return read_known_classes(root / "test", names, within)
    if (root / "train").is_dir() and "train" not in names:
        raise UserError(f"{root} has train/ but no test/: name the folder whose class folders are to be scored")
    return read_known_classes(root, names, within)


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


def _read_manifests(
    data_dir: StrPath | None, csv: StrPath, val_csv: StrPath | None, test_csv: StrPath | None
) -> tuple[Samples, Samples | None, Samples | None]:
    base = _base(data_dir)
    if base is not None and (base / "train").is_dir():
        raise UserError(
            f"--data-dir {base} has its own train/, and --csv {csv} names another: give one of the two "
            "(without --data-dir, names in the manifest start from its own folder)"
        )
    train, val, test = read_manifest_splits(Path(csv), base)
    for flag, given, has in (("--val-csv", val_csv, val), ("--test-csv", test_csv, test)):
        if given is not None and has is not None:
            raise UserError(
                f"{flag} {given}: --csv {csv} has such rows itself, by its column split: give one of the two"
            )
    if val_csv is not None:
        val = read_manifest(Path(val_csv), base, train.class_names, train.heads, split="val")
    if test_csv is not None:
        test = read_manifest(Path(test_csv), base, train.class_names, train.heads, split="test")
    return train, val, test


def _base(data_dir: StrPath | None) -> Path | None:
    if data_dir is None:
        return None
    require_folder(Path(data_dir))
    return Path(data_dir)


def _take_validation(train: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    is_val = _validation_groups(train, fraction, seed) if train.groups else _validation_images(train, fraction, seed)
    if not is_val.any():
        what = "no class has two groups" if train.groups else "no class has two images"
        raise UserError(f"{what}, so none can be left out for validation: give a validation set")
    return train.subset(np.flatnonzero(~is_val)), train.subset(np.flatnonzero(is_val))


def _validation_groups(train: Samples, fraction: float, seed: int) -> np.ndarray:
    """(n,) bool: whole groups, and never all that hold a class."""
    names, classes = train.groups or (), len(train.class_names)
    is_val = split_groups(train.labels, names, (1 - fraction, fraction), seed, num_classes=classes) == 1
    left = np.bincount(train.labels[~is_val], minlength=classes)
    groups = np.array(names)
    return is_val & ~np.isin(groups, groups[left[train.labels] == 0])


def _validation_images(train: Samples, fraction: float, seed: int) -> np.ndarray:
    is_val = np.zeros(len(train), dtype=bool)
    for label in range(len(train.class_names)):
        # By name and not by place, so that a manifest's order does not matter either.
        members = sorted(np.flatnonzero(train.labels == label), key=train.files.__getitem__)
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            shuffled = generator(Purpose.VALIDATION_SPLIT, seed, label).permutation(members)
            is_val[shuffled[:count]] = True
    return is_val


def _refuse_shared(train: Samples, val: Samples, test: Samples | None) -> None:
    """Raises UserError where a file, or a group of the manifest's, is in two of the sets."""
    parts = [(split, samples) for split, samples in (("train", train), ("val", val), ("test", test)) if samples]
    file_in: dict[str, str] = {}
    group_in: dict[str, str] = {}
    for split, samples in parts:
        for file in samples.files:
            if file_in.setdefault(file, split) != split:
                raise UserError(f"{file} is in both {file_in[file]} and {split}: leave it in one of them")
        for group in samples.groups or ():
            if group_in.setdefault(group, split) != split:
                raise UserError(
                    f"the group {group!r} is in both {group_in[group]} and {split}: divide the images again with "
                    "python -m engine.split --group-column group"
                )
