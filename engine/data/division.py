"""One division of images: by name, by chance, by groups, into parts or into folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.samples import Samples
from engine.data.splitting import PARTS, fold_stratified, split_first, split_groups, split_stratified
from engine.errors import UserError


@dataclass(frozen=True, eq=False)
class Division:
    """Which part each of n images is in: ``part`` (n,) int64 indexes ``names`` ("train" or "fold0", and so on)."""

    names: tuple[str, ...]
    part: np.ndarray

    def name_of_each(self) -> list[str]:
        return [self.names[p] for p in self.part]


def divide(
    samples: Samples,
    names: Sequence[str],
    *,
    fractions: Sequence[float],
    folds: int | None,
    first: bool,
    seed: int,
) -> Division:
    """The division that ``engine.split`` writes, and by which a run holds out a test set or a fold.

    Args:
        samples: n images; where they have groups, those of one stay in one part (``first`` passes them over).
        names: n distinct names, which the division goes by.
        fractions: of train, val and test; they sum to 1. A part whose fraction is 0 stays empty.
        folds: K parts of one size instead.
        first: test is the first names of each class.

    Raises:
        UserError: fewer images or groups than parts, or a class that could not be trained on where it is tested.
    """
    labels, groups, num_classes = samples.labels, samples.groups, len(samples.class_names)
    units, what = (len(labels), "images") if groups is None else (len(set(groups)), "groups")
    if first:
        shares = np.array(fractions)
        division = Division(PARTS, split_first(names, labels, fractions[PARTS.index("test")]))
    else:
        parts = PARTS if folds is None else tuple(f"fold{k}" for k in range(folds))
        shares = np.array(fractions if folds is None else [1 / folds] * folds)
        wanted = np.flatnonzero(shares)
        if units < len(wanted):
            asked = f"{len(wanted)} parts" if folds is None else f"{folds} folds"
            raise UserError(f"{units} {what} cannot make {asked}: ask for fewer")
        if groups is not None:
            part = wanted[split_groups(labels, groups, shares[wanted].tolist(), seed, num_classes=num_classes)]
        elif folds is not None:
            part = fold_stratified(names, labels, folds, seed)
        else:
            part = split_stratified(names, labels, shares.tolist(), seed)
        division = Division(parts, part)
    for p in np.flatnonzero(shares):
        if not (division.part == p).any():
            raise UserError(f"{division.names[p]} would be empty: the classes are too small, or its fraction is")
    _require_known_classes(samples, division, folds=folds is not None, what=what)
    return division


def _require_known_classes(samples: Samples, division: Division, *, folds: bool, what: str) -> None:
    counts = samples.class_counts()
    for p, name in enumerate(division.names if folds else PARTS[:1]):
        in_train = samples.subset(np.flatnonzero((division.part == p) != folds)).class_counts()
        for label in np.flatnonzero((in_train == 0) & (counts > 0)):
            raise UserError(
                f"class {samples.class_names[label]!r} would have no image in {'the training of ' * folds}{name}: "
                f"it has too few {what}; leave it out, ask for fewer parts, or try another --seed"
            )
