"""The folds of a cross-validation: of what a run would train and validate on, one part in K is its test set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.division import divide
from engine.data.samples import Head, Samples
from engine.errors import UserError


def hold_out_fold(
    samples: Samples, folds: int, fold: int, seed: int, *, names: Sequence[str] | None = None
) -> tuple[Samples, Samples]:
    """What is left to train and validate on, and the images of fold number ``fold`` of 0 ... ``folds`` - 1.

    Each image is in one fold, class by class at random, or whole groups where they have any; which one is a pure
    function of ``names`` (by default the files), labels, groups and seed.

    Raises:
        UserError: fewer images or groups than folds, or a class that is in one fold alone, or in one image or group.
    """
    try:
        division = divide(samples, names or samples.files, fractions=(), folds=folds, first=False, seed=seed)
    except UserError as error:
        raise UserError(f"--folds {folds}: {error}") from error
    is_held_out = division.part == fold
    return samples.subset(np.flatnonzero(~is_held_out)), samples.subset(np.flatnonzero(is_held_out))


def join(train: Samples, val: Samples) -> Samples:
    """The images of both, of the same classes, which folds are to be made of.

    Raises UserError where one alone has groups, weights or a further label, or their arrays differ in size.
    """
    heads = train.heads.keys() | val.heads.keys()
    columns = {
        "group": (train.groups, val.groups),
        "weight": (train.weights, val.weights),
        **{f"label_{name}": (train.heads.get(name), val.heads.get(name)) for name in sorted(heads)},
    }
    for column, (first, second) in columns.items():
        if (first is None) != (second is None):
            has, lacks = ("train", "val") if second is None else ("val", "train")
            raise UserError(
                f"--folds: {has} has a column {column} and {lacks}, which is divided with it, has none; give it to both"
            )
    return Samples(
        train.files + val.files,
        np.concatenate([train.labels, val.labels]),
        train.class_names,
        None if train.groups is None or val.groups is None else train.groups + val.groups,
        None if train.weights is None or val.weights is None else np.concatenate([train.weights, val.weights]),
        None if train.pixels is None or val.pixels is None else _joined_pixels(train.pixels, val.pixels),
        {
            name: Head(head.class_names, np.concatenate([head.labels, val.heads[name].labels]))
            for name, head in train.heads.items()
        },
    )


def _joined_pixels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.shape[1:] != second.shape[1:]:
        raise UserError(
            f"--folds: images of train are {first.shape[1:3]} pixels and those of val, which are divided with them, "
            f"{second.shape[1:3]}; give both one size"
        )
    if first.strides[3] == second.strides[3] == 0:  # grey shown in three channels stays one in memory
        grey = np.concatenate([first[..., :1], second[..., :1]])
        return np.broadcast_to(grey, (*grey.shape[:3], 3))
    return np.concatenate([first, second])
