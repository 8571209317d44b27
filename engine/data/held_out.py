"""What a run takes from its training images for validation and testing, and what it keeps on one side of that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.data.counter import Purpose, generator
from engine.data.division import divide
from engine.data.leakage import (
    find_identical,
    find_leakage,
    find_near_sets,
    find_shared_groups,
    hash_pictures,
)
from engine.data.listing import printable
from engine.data.samples import Samples
from engine.data.splitting import merge_groups, split_groups
from engine.errors import UserError

TEST_METHODS = {"stratified": "{} of each class", "first": "the first {} of each class by name"}
"""How a test set is taken from train, and how that is told of a share."""
DUPLICATES = ("none", "identical", "near")
"""What is looked for to be kept on one side."""


@dataclass(frozen=True, eq=False)
class Tied:
    """``samples`` whose groups hold each set of duplicates together; ``told`` of it in a few words; ``undecoded``: how
    many files could not be compared."""

    samples: Samples
    told: str
    undecoded: int


def take_test(
    train: Samples, names: Sequence[str], fraction: float, *, method: str, seed: int
) -> tuple[Samples, Samples]:
    """Train without the test set, and the test set: what ``engine.split`` would divide the same names into.

    Args:
        names: one for each image, that the division goes by.
        fraction: share of each class; where the samples have groups, of whole ones.
        method: one of ``TEST_METHODS``: by chance, or of each class the first ``int(fraction * n)`` names.

    Raises:
        UserError: a part would be empty, train would lose a class, or "first" would tear a group apart.
    """
    fractions = (1 - fraction, 0.0, fraction)
    try:
        division = divide(train, names, fractions=fractions, folds=None, first=method == "first", seed=seed)
    except UserError as error:
        raise UserError(f"--test-fraction {fraction:g}: {error}") from error
    torn = find_shared_groups(train.groups, division.part) if train.groups is not None else []
    if torn:
        raise UserError(
            f"--test-method first would put {printable(names[torn[0].first])} and {printable(names[torn[0].second])} "
            "on two sides, which are of one group; use --test-method stratified"
        )
    is_test = division.part == division.names.index("test")
    return train.subset(np.flatnonzero(~is_test)), train.subset(np.flatnonzero(is_test))


def take_validation(train: Samples, names: Sequence[str], fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Train without the validation set, and the validation set: of every class at least one image where it has two.

    Where the samples have groups, whole ones; else by ``names``, one for each image. Raises UserError where nothing can
    be left out.
    """
    is_val = (
        _validation_groups(train, fraction, seed) if train.groups else _validation_images(train, names, fraction, seed)
    )
    if not is_val.any():
        what = "no class has two groups" if train.groups else "no class has two images"
        raise UserError(f"{what}, so none can be left out for validation: give a validation set")
    return train.subset(np.flatnonzero(~is_val)), train.subset(np.flatnonzero(is_val))


def tie_duplicates(samples: Samples, names: Sequence[str], *, near_distance: int, workers: int) -> Tied:
    """The samples with each set of duplicates in one group, those that they were in before merged.

    Duplicates are files of the same bytes or arrays of the same pixels, and unless ``near_distance`` is negative
    pictures whose difference hashes (`engine.data.leakage`) are so many bits apart or less, and what is so tied by way
    of others. ``names`` are distinct, and become groups where there are none.
    """
    pictures = samples.pictures()
    sets: list[Sequence[int]] = list(find_identical(pictures, workers=workers))
    undecoded = 0
    if near_distance >= 0:
        hashes = hash_pictures(pictures, workers=workers)
        sets += find_near_sets(hashes, near_distance)
        undecoded = int((~hashes.any(axis=1)).sum())
    if not sets:
        return Tied(samples, "no duplicates", undecoded)
    groups = merge_groups(samples.groups if samples.groups is not None else names, sets)
    told = _describe_ties(merge_groups(names, sets), samples.labels)
    return Tied(replace(samples, groups=tuple(groups)), told, undecoded)


def find_given_duplicates(parts: Sequence[Samples], *, near_distance: int, workers: int) -> str | None:
    """One line that says so where sets that were given share duplicates, as ``tie_duplicates`` has them."""
    pictures = [picture for part in parts for picture in part.pictures()]
    found = find_leakage(
        pictures,
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        groups=None,
        identical=find_identical(pictures, workers=workers),
        near_distance=near_distance,
        workers=workers,
    )
    leaks = [*found.shared, *found.near]
    if not leaks:
        return None
    files = [file for part in parts for file in part.files]
    first, second = (printable(files[i]) for i in (leaks[0].first, leaks[0].second))
    kind = "near or identical" if near_distance >= 0 else "identical"
    return f"{len(leaks)} {kind} in two of the given sets, such as {first} and {second} ({leaks[0].why})"


def _describe_ties(tied: Sequence[str], labels: np.ndarray) -> str:
    labels_of = defaultdict(list)
    for name, label in zip(tied, labels.tolist(), strict=True):
        labels_of[name].append(label)
    sets = [own for own in labels_of.values() if len(own) > 1]
    contradictory = sum(len(set(own)) > 1 for own in sets)
    told = f"{sum(map(len, sets))} images in {len(sets)} set{'s' * (len(sets) > 1)} of duplicates kept on one side"
    return f"{told}, {contradictory} of them under several labels" if contradictory else told


def _validation_groups(train: Samples, fraction: float, seed: int) -> np.ndarray:
    """(n,) bool: whole groups, and never all that hold a class."""
    names, classes = train.groups or (), len(train.class_names)
    is_val = split_groups(train.labels, names, (1 - fraction, fraction), seed, num_classes=classes) == 1
    left = np.bincount(train.labels[~is_val], minlength=classes)
    groups = np.array(names)
    return is_val & ~np.isin(groups, groups[left[train.labels] == 0])


def _validation_images(train: Samples, names: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    is_val = np.zeros(len(train), dtype=bool)
    for label in range(len(train.class_names)):
        # By name and not by place, so that a manifest's order does not matter either.
        members = sorted(np.flatnonzero(train.labels == label).tolist(), key=names.__getitem__)
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            shuffled = generator(Purpose.VALIDATION_SPLIT, seed, label).permutation(members)
            is_val[shuffled[:count]] = True
    return is_val
