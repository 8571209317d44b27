"""How images are divided into train, validation and test, or into folds: pure functions of names, labels and seed.

The order in which files are listed never matters: what chance decides, it decides over sorted names, by a generator
that the seed and the class start anew (``engine.data.counter``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.counter import Purpose, generator

PARTS = ("train", "val", "test")


def split_first(names: Sequence[str], labels: np.ndarray, test_fraction: float) -> np.ndarray:
    """Class by class, the first ``int(test_fraction * n)`` names in ascending order are test, the others train.

    Returns:
        (n,) int64, each an index into ``PARTS``.
    """
    part = np.full(len(names), PARTS.index("train"))
    for members in _members_by_class(names, labels):
        part[members[: int(test_fraction * len(members))]] = PARTS.index("test")
    return part


def split_stratified(names: Sequence[str], labels: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Class by class at random, in numbers as near to ``fractions`` as they come.

    A class has an image in every part whose fraction is not 0, where it has as many images as there are such parts;
    with fewer, train comes first, then the others by their fraction. No class depends on another.

    Args:
        names: n distinct names.
        labels: (n,) int64.
        fractions: one for each part, train's first; they sum to 1.

    Returns:
        (n,) int64, each an index into ``fractions``.
    """
    part = np.zeros(len(names), dtype=np.int64)
    for label, members in enumerate(_members_by_class(names, labels)):
        counts = _apportion(len(members), fractions)
        shuffled = generator(Purpose.SPLIT, seed, label).permutation(members)
        part[shuffled] = np.repeat(np.arange(len(fractions)), counts)
    return part


def fold_stratified(names: Sequence[str], labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Class by class at random; folds differ by one image at most, in each class and altogether.

    Returns:
        (n,) int64: the fold that validates on each image.
    """
    fold = np.zeros(len(names), dtype=np.int64)
    dealt = 0
    for label, members in enumerate(_members_by_class(names, labels)):
        shuffled = generator(Purpose.SPLIT, seed, label).permutation(members)
        fold[shuffled] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return fold


def split_groups(
    labels: np.ndarray, groups: Sequence[str], fractions: Sequence[float], seed: int, *, num_classes: int
) -> np.ndarray:
    """Whole groups, so that each class comes as near to ``fractions`` as they allow.

    Groups are placed one after the other, those that weigh most in their classes first, each in the part where the
    squared distance from the wished counts (as shares of their class) is smallest afterwards. That is the rule of
    scikit-learn's StratifiedGroupKFold, and as even, for parts of any size; besides, no part stays empty, and a class
    that has as many groups as there are parts gets one in each. Groups of like weight come in the order that the seed
    gives.

    Args:
        labels: (n,) int64 below ``num_classes``.
        groups: n names of groups.
        fractions: one for each part, none of them 0; they sum to 1.

    Returns:
        (n,) int64, each an index into ``fractions``.
    """
    names, group_of = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    counts = np.zeros((len(names), num_classes))
    np.add.at(counts, (group_of, labels), 1)
    share = counts / np.maximum(counts.sum(axis=0), 1)
    has = np.column_stack([counts > 0, np.ones(len(names), dtype=bool)])  # the last column: any class, for empty parts

    shuffled = generator(Purpose.SPLIT, seed, 0).permutation(len(names))
    weight = np.log2((share[shuffled] ** 2).sum(axis=1)).round()  # rounded, so that like ones stay shuffled
    part = np.zeros(len(names), dtype=np.int64)
    missing = np.outer(fractions, share.sum(axis=0))  # (parts, classes): the wished share less what is placed
    lacks = np.ones((len(fractions), num_classes + 1), dtype=bool)
    remaining = has.sum(axis=0)
    for g in shuffled[np.argsort(-weight, kind="stable")]:
        urgent = has[g] & (remaining <= lacks.sum(axis=0))
        needed = (lacks & urgent).sum(axis=1)
        gain = np.where(needed == needed.max(), missing @ share[g], -np.inf)
        part[g] = gain.argmax()
        missing[part[g]] -= share[g]
        lacks[part[g]] &= ~has[g]
        remaining -= has[g]
    return part[group_of]


def merge_groups(groups: Sequence[str], sets: Sequence[Sequence[int]]) -> list[str]:
    """The groups once all members of each of ``sets`` (of indices) are of one: a merged one goes by its first name."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := leader.get(name, name)) != name:
            name = above
        return name

    for members in sets:
        roots = sorted({find(groups[i]) for i in members})
        leader.update(dict.fromkeys(roots[1:], roots[0]))
    return [find(name) for name in groups]


def _members_by_class(names: Sequence[str], labels: np.ndarray) -> list[list[int]]:
    """The indices of each class, in ascending order of their names."""
    classes = int(labels.max()) + 1
    return [sorted(np.flatnonzero(labels == label).tolist(), key=names.__getitem__) for label in range(classes)]


def _apportion(count: int, fractions: Sequence[float]) -> list[int]:
    wanted = [i for i, fraction in enumerate(fractions) if fraction > 0]
    if count < len(wanted):
        first = sorted(wanted, key=lambda i: (i != 0, -fractions[i]))[:count]
        return [int(i in first) for i in range(len(fractions))]
    counts = [max(1, round(fraction * count)) if fraction > 0 else 0 for fraction in fractions]
    counts[0] = count - sum(counts[1:])
    while counts[0] < 1:  # two roundings upwards can leave nothing for train
        counts[int(np.argmax(counts[1:])) + 1] -= 1
        counts[0] += 1
    return counts
