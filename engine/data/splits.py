"""The train, validation and test sets of an experiment, whatever they come from.

A folder of class folders, manifests (CSV or Parquet), CIFAR's files, an NPZ file, or the embedded digits. No image file
is decoded here: ``engine.data.check`` does that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.data.array_sources import read_arrays
from engine.data.arrays import relabel
from engine.data.cautions import find_class_gaps, find_patients
from engine.data.digits import dealt_order, write_digits
from engine.data.folder import find_split_names, read_splits_folder, read_test_folder, require_folder
from engine.data.folds import hold_out_fold, join
from engine.data.held_out import TEST_METHODS, find_given_duplicates, take_test, take_validation, tie_duplicates
from engine.data.leakage import NEAR_DISTANCE
from engine.data.listing import relative_names
from engine.data.long_tail import make_long_tailed
from engine.data.manifest import read_manifest, read_manifest_splits
from engine.data.samples import Samples, Splits
from engine.data.selection import Selection
from engine.errors import UserError

StrPath = str | os.PathLike[str]


def open_splits(
    *,
    data_dir: StrPath | None = None,
    csv: StrPath | None = None,
    val_csv: StrPath | None = None,
    test_csv: StrPath | None = None,
    val_fraction: float | None = 0.15,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    allow_links: bool = False,
    selection: Selection | None = None,
    test_fraction: float = 0.0,
    test_method: str = "stratified",
    duplicates: str = "none",
    workers: int = 4,
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
            one image of every class that has two, never the whole of a class. Where there are groups, whole ones. None:
            there is no validation set where none is given.
        folds, fold: of train and validation together (``engine.data.folds``), test is fold number ``fold`` of
            0 ... ``folds`` - 1, and validation a part of the others; a test set that the data has itself is left alone,
            and none is taken.
        seed: decides which images those are; their names do the rest, so that the split can be made again elsewhere.
        allow_links: follow links that lead out of ``data_dir``.
        selection: what of the source counts, and what names say of it.
        test_fraction: the part of train that becomes the test set where none is given, before validation is taken; 0:
            there is then no test set.
        test_method: how: "stratified", class by class at random, whole groups where there are any; or "first", the
            first names of each class.
        duplicates: "identical" (the same bytes or pixels) or "near" ones (``held_out.tie_duplicates``) are kept on one
            side of what is taken from train, and those that given sets share are warned of; "none" are looked for.
        workers: threads that look for them.
        imbalance_ratio: train is made long-tailed (``engine.data.long_tail``), after a test set is taken from it and
            before a validation set is, so that this one is long-tailed as well; given ones stay whole.

    Neither ``data_dir`` nor ``csv``: scikit-learn's scanned digits, balanced (``engine.data.digits``); their long tail
    is the same for every seed.

    Raises:
        UserError: something is missing, empty, contradictory or unknown.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: give a part between 0 and 1, such as 0.15")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction}: give a part between 0 and 1, such as 0.2")
    if csv is None and (val_csv is not None or test_csv is not None):
        flag = "--val-csv" if val_csv is not None else "--test-csv"
        raise UserError(f"{flag} without --csv: where one set comes from a manifest, training must as well")
    selection = selection or Selection()
    if csv is not None:
        source, folder = str(csv), Path(csv).parent if data_dir is None else Path(data_dir)
        found = _read_manifests(data_dir, csv, val_csv, test_csv, selection)
    else:
        source = str(data_dir) if data_dir is not None else "embedded digits"
        folder = Path(data_dir) if data_dir is not None else write_digits()
        found = _read_arrays(folder, selection) or read_splits_folder(
            folder, allow_links=allow_links, selection=selection
        )
    selection.require_each_class(found[0], source)
    folders = [
        folder if data_dir is not None or path is None else Path(path).parent for path in (csv, val_csv, test_csv)
    ]
    train = _grouped(found[0], folder, selection)
    val, test = (
        None if part is None else _grouped(part, own, selection)
        for part, own in zip(found[1:], folders[1:], strict=True)
    )
    _refuse_shared(train, val, test if folds is None else None, groups=folds is None)
    name_of = _names_to_divide_by((train, folders[0]), (val, folders[1]))

    def names(samples: Samples) -> list[str]:
        return [name_of[file] for file in samples.files]

    origins = {"train": "", "val": "given", "test": ""}
    if folds is not None:
        own = "" if test is None else f"; the data's own {len(test)} test images are left alone"
        origins["test"] = f"fold {fold} of 0 to {folds - 1}{own}"
        train, val, test = train if val is None else join(train, val), None, None

    remarks = selection.remarks
    remarks += ["--test-fraction passed over"] if test_fraction and (folds or test) else []
    warnings = selection.warnings
    if csv is None and (read_as_class := find_split_names(folder, train, selection)):
        warnings.append(read_as_class)
    takes_test = test is None and (folds is not None or test_fraction > 0)
    divides = takes_test or (val is None and val_fraction is not None)
    if divides and (patients := find_patients(train, names(train))):
        warnings.append(patients)
    only_ties = False
    if duplicates != "none":
        near_distance = NEAR_DISTANCE if duplicates == "near" else -1
        given = [part for part in (train, val, test) if part is not None]
        if len(given) > 1 and (shared := find_given_duplicates(given, near_distance=near_distance, workers=workers)):
            warnings.append(shared)
        if divides:
            only_ties = train.groups is None
            tied = tie_duplicates(train, names(train), near_distance=near_distance, workers=workers)
            train = tied.samples
            remarks.append(tied.told)
    if folds is not None:
        train, test = hold_out_fold(train, folds, fold, seed, names=names(train))
    elif test is None and test_fraction > 0:
        train, test = take_test(train, names(train), test_fraction, method=test_method, seed=seed)
        groups = train.groups if test_method == "stratified" else None  # "first" has refused to tear one apart
        origins["test"] = f"taken from train, {TEST_METHODS[test_method].format(_share(test_fraction, groups))}"
    if imbalance_ratio is not None:
        order = dealt_order(folder) if data_dir is None and csv is None else None
        train = make_long_tailed(train, imbalance_ratio, seed, names=names(train), order=order)
        source += f", long-tailed with U = {imbalance_ratio:g}"
    if val is None and val_fraction is not None:
        origins["val"] = f"taken from train, {_share(val_fraction, train.groups)} of each class"
        train, val = take_validation(train, names(train), val_fraction, seed)
    if only_ties and folds is None:  # the folds of a cross-validation have a column of groups all or none
        val, test = (part and _without_single_groups(part) for part in (val, test))
    warnings += find_class_gaps({name: part for name, part in (("val", val), ("test", test)) if part is not None})
    sizes = [_size(name, part, origins[name]) for name, part in (("train", train), ("val", val), ("test", test))]
    about = f"{source}: {len(train.class_names)} classes, {', '.join(sizes)}"
    return Splits(train, val, test, "; ".join([about, *remarks]), tuple(warnings))


def open_samples(
    class_names: Sequence[str],
    *,
    data_dir: StrPath | None = None,
    csv: StrPath | None = None,
    allow_links: bool = False,
    selection: Selection | None = None,
) -> Samples:
    """One set to score a trained model on, labelled by the model's own classes.

    Args:
        class_names: the classes in the model's order.
        data_dir: ``DIR/test/CLASS/*`` where DIR has a test folder, else ``DIR/CLASS/*``; or CIFAR's or an NPZ file's
            test set. With ``csv``: the folder that its relative file names start from.
        csv: a manifest; with a column ``split``, its rows of test.
        allow_links: follow links that lead out of ``data_dir``.
        selection: what of the source counts; its classes need not all be there. Its ``label_regex`` is for folders;
            its ``group_regex`` counts where there are no groups and it matches every name, else stderr says so.

    Neither: the test set of the embedded digits.

    Raises:
        UserError: as ``open_splits``, and at a class that the model does not know.
    """
    names = tuple(class_names)
    selection = selection or Selection()
    if csv is not None:
        selection = replace(selection, label_regex=None)  # as it may have been trained on a folder
        of_classes = read_manifest(Path(csv), _base(data_dir), names, classes=selection.classes)
        found = selection.of_samples(of_classes, csv)
        return _grouped_if_named(found, Path(csv).parent if data_dir is None else Path(data_dir), selection)
    root = Path(data_dir) if data_dir is not None else write_digits()
    if (arrays := _read_arrays(root, replace(selection, label_regex=None))) is not None:
        test = arrays[2]
        if test is None:
            raise UserError(f"{root} has no test_images: name a file that has")
        found = relabel(test, names, root)
    else:
        found = read_test_folder(root, names, allow_links=allow_links, selection=selection)
    return _grouped_if_named(found, root, selection)


def _read_arrays(root: Path, selection: Selection) -> tuple[Samples, Samples | None, Samples | None] | None:
    found = read_arrays(root)
    if found is None:
        return None
    train, val, test = found
    return (
        selection.of_samples(train, root),
        None if val is None else selection.of_samples(val, root),
        None if test is None else selection.of_samples(test, root),
    )


def _read_manifests(
    data_dir: StrPath | None,
    csv: StrPath,
    val_csv: StrPath | None,
    test_csv: StrPath | None,
    selection: Selection,
) -> tuple[Samples, Samples | None, Samples | None]:
    base = _base(data_dir)
    if base is not None and (base / "train").is_dir():
        raise UserError(
            f"--data-dir {base} has its own train/, and --csv {csv} names another: give one of the two "
            "(without --data-dir, names in the manifest start from its own folder)"
        )
    classes = selection.classes
    train, val, test = read_manifest_splits(Path(csv), base, classes)
    for flag, given, has in (("--val-csv", val_csv, val), ("--test-csv", test_csv, test)):
        if given is not None and has is not None:
            raise UserError(
                f"{flag} {given}: --csv {csv} has such rows itself, by its column split: give one of the two"
            )
    if val_csv is not None:
        val = read_manifest(Path(val_csv), base, train.class_names, train.heads, "val", classes)
    if test_csv is not None:
        test = read_manifest(Path(test_csv), base, train.class_names, train.heads, "test", classes)
    return (
        selection.of_samples(train, csv),
        None if val is None else selection.of_samples(val, val_csv or csv),
        None if test is None else selection.of_samples(test, test_csv or csv),
    )


def _base(data_dir: StrPath | None) -> Path | None:
    if data_dir is None:
        return None
    require_folder(Path(data_dir))
    return Path(data_dir)


def _grouped(samples: Samples, folder: Path, selection: Selection) -> Samples:
    groups = selection.groups_of(relative_names(samples, folder), samples.groups)
    return replace(samples, groups=None if groups is None else tuple(groups))


def _names_to_divide_by(*parts: tuple[Samples | None, Path]) -> dict[str, str]:
    """Of each file a name of its own, relative to its set's folder, so that no division goes by where that stands."""
    name_of: dict[str, str] = {}
    taken: set[str] = set()
    for samples, folder in parts:
        if samples is not None:
            # no path has three slashes in a row, so that this one is no other's
            names = [f"///{name}" if name in taken else name for name in relative_names(samples, folder)]
            name_of.update(zip(samples.files, names, strict=True))
            taken.update(names)
    return name_of


def _without_single_groups(samples: Samples) -> Samples:
    if samples.groups is None or len(set(samples.groups)) < len(samples):
        return samples
    return replace(samples, groups=None)


def _grouped_if_named(samples: Samples, folder: Path, selection: Selection) -> Samples:
    """With the groups that names tell where there are none; the names may be others than those trained on."""
    if selection.group_regex is None or samples.groups is not None:
        return samples
    try:
        return _grouped(samples, folder, selection)
    except UserError as error:
        print(f"warning: without groups, each image counts for itself: {error}", file=sys.stderr)
        return samples


def _share(fraction: float, groups: Sequence[str] | None) -> str:
    return f"{100 * fraction:g}%" if groups is None else f"in whole groups about {100 * fraction:g}%"


def _size(name: str, part: Samples | None, origin: str) -> str:
    if part is None:
        return f"{name} none"
    return f"{name} {len(part)} ({origin})" if origin else f"{name} {len(part)}"


def _refuse_shared(train: Samples, val: Samples | None, test: Samples | None, *, groups: bool) -> None:
    """Raises UserError where a file, or with ``groups`` a group, is in two of the sets."""
    parts = [(split, samples) for split, samples in (("train", train), ("val", val), ("test", test)) if samples]
    file_in: dict[str, str] = {}
    group_in: dict[str, str] = {}
    for split, samples in parts:
        for file in samples.files:
            if file_in.setdefault(file, split) != split:
                raise UserError(f"{file} is in both {file_in[file]} and {split}: leave it in one of them")
        for group in (samples.groups or ()) if groups else ():
            if group_in.setdefault(group, split) != split:
                raise UserError(
                    f"the group {group!r} is in both {group_in[group]} and {split}: divide the images again with "
                    "python -m engine.split --group-column group"
                )
