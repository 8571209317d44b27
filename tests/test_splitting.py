"""How images are divided: fixed counts, balanced folds, whole groups, whatever order they are listed in."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from engine.data.splitting import fold_stratified, merge_groups, split_first, split_groups, split_stratified

THIRDS = (0.7, 0.15, 0.15)


# The first names of each class


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.2, 0), (4, 0.2, 0), (5, 0.2, 1), (9, 0.2, 1), (7, 0.5, 3)]
)
def test_first_split_rounds_down(count, fraction, expected):
    names = [f"{i}" for i in reversed(range(count))]
    part = split_first(names, np.zeros(count, dtype=int), fraction)
    assert sorted(names[i] for i in np.flatnonzero(part == 2)) == sorted(names)[:expected]


# By chance, class by class


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_keeps_the_shares_and_every_class_everywhere(seed):
    counts = [3, 4, 7, 20, 133, 432]
    labels = np.repeat(np.arange(6), counts)
    names = [f"{label}/{i}" for i, label in enumerate(labels)]
    part = split_stratified(names, labels, THIRDS, seed)
    for label, count in enumerate(counts):
        found = np.bincount(part[labels == label], minlength=3)
        assert (found >= 1).all()
        assert (
            np.abs(found[1:] - count * 0.15).max() <= 0.85
        )  # half an image by rounding, or the one that must be there
        assert found.sum() == count


@pytest.mark.parametrize(("count", "fractions", "expected"), [
    (1, THIRDS, [1, 0, 0]),
    (2, (0.6, 0.15, 0.25), [1, 0, 1]),
    (3, (0.1, 0.45, 0.45), [1, 1, 1]),
    (4, (0.1, 0.45, 0.45), [1, 1, 2]),
    (2, (0.8, 0.0, 0.2), [1, 0, 1]),
    (10, (0.8, 0.0, 0.2), [8, 0, 2]),
])  # fmt: skip
def test_small_classes_are_spread_as_far_as_they_reach(count, fractions, expected):
    part = split_stratified([str(i) for i in range(count)], np.zeros(count, dtype=int), fractions, 0)
    assert np.bincount(part, minlength=3).tolist() == expected


@pytest.mark.parametrize("way", ["stratified", "folds", "groups"])
def test_a_split_does_not_depend_on_the_order_of_the_list(way):
    rng = np.random.default_rng(0)
    names = [f"{i:03d}" for i in range(90)]
    labels = rng.integers(0, 3, 90)
    groups = [f"g{g}" for g in rng.integers(0, 30, 90)]

    def parts(order, seed=1):
        chosen, of = [names[i] for i in order], labels[order]
        if way == "groups":
            part = split_groups(of, [groups[i] for i in order], THIRDS, seed, num_classes=3)
        else:
            part = (
                split_stratified(chosen, of, THIRDS, seed)
                if way == "stratified"
                else fold_stratified(chosen, of, 4, seed)
            )
        return dict(zip(chosen, part.tolist(), strict=True))

    assert parts(np.arange(90)) == parts(rng.permutation(90))
    assert parts(np.arange(90)) != parts(np.arange(90), seed=2)


def test_one_class_does_not_depend_on_another():
    names = [f"a{i:02d}" for i in range(30)] + [f"b{i:02d}" for i in range(30)]
    labels = np.repeat([0, 1], 30)
    whole = split_stratified(names, labels, THIRDS, 5)
    without = split_stratified(names[:10] + names[30:], np.repeat([0, 1], [10, 30]), THIRDS, 5)
    assert whole[30:].tolist() == without[10:].tolist()


def test_a_seed_means_what_it_meant():
    """A seed in a paper has to mean the same division tomorrow."""
    part = split_stratified([f"{i:02d}" for i in range(20)], np.repeat([0, 1], 10), (0.6, 0.2, 0.2), 42)
    assert "".join(str(p) for p in part) == "20010102000002100201"


# Folds


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_a_balanced_partition(seed):
    counts = [2, 5, 11, 40]
    labels = np.repeat(np.arange(4), counts)
    fold = fold_stratified([str(i) for i in range(58)], labels, 4, seed)
    table = np.array([np.bincount(fold[labels == label], minlength=4) for label in range(4)])
    assert table.sum() == 58
    assert (table.max(axis=1) - table.min(axis=1)).max() <= 1
    assert np.ptp(table.sum(axis=0)) <= 1


# Groups


@pytest.mark.parametrize("seed", range(25))
def test_groups_are_never_divided_and_every_class_reaches_every_part(seed):
    rng = np.random.default_rng(seed)
    num_groups, classes = rng.integers(12, 80), rng.integers(2, 5)
    group_of = rng.integers(0, num_groups, rng.integers(100, 400))
    label_of_group = rng.choice(classes, num_groups, p=rng.dirichlet(np.full(classes, 2)))
    mixed = rng.random(len(group_of)) < rng.choice([0, 0.1])
    labels = np.where(mixed, rng.integers(0, classes, len(group_of)), label_of_group[group_of])
    part = split_groups(labels, [f"p{g}" for g in group_of], THIRDS, seed, num_classes=classes)
    for g in np.unique(group_of):
        assert len(set(part[group_of == g])) == 1
    assert set(part) == {0, 1, 2}
    for label in np.unique(labels):
        if not mixed.any() and len(set(group_of[labels == label])) >= 3:
            assert set(part[labels == label]) == {0, 1, 2}


def test_grouped_folds_are_as_balanced_as_those_of_scikit_learn():
    ours, theirs = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        group_of = rng.choice(60, 400, p=rng.dirichlet(np.full(60, 1.0)))
        labels = (rng.random(60) < 0.2)[group_of].astype(int)
        peer = np.zeros(400, dtype=int)
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed).split(labels, labels, group_of)
        for k, (_, val) in enumerate(folds):
            peer[val] = k
        mine = split_groups(labels, [str(g) for g in group_of], [0.25] * 4, seed, num_classes=2)
        for fold, into in ((mine, ours), (peer, theirs)):
            shares = [np.bincount(fold[labels == c], minlength=4) / np.sum(labels == c) for c in (0, 1)]
            into.append(np.abs(np.array(shares) - 0.25).mean())
    assert np.mean(ours) < 1.05 * np.mean(theirs)


def test_merged_groups_join_through_each_other():
    groups = ["a", "b", "c", "d", "b", "e"]
    assert merge_groups(groups, [(2, 3), (0, 1), (4, 3)]) == ["a", "a", "a", "a", "a", "e"]
    assert merge_groups(groups, []) == groups
