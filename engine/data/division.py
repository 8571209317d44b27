"""One division of a listing: by name, by chance, by groups, into parts or into folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.listing import Listing
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
    listing: Listing,
    groups: Sequence[str] | None,
    *,
    fractions: Sequence[float],
    folds: int | None,
    first: bool,
    seed: int,
) -> Division:
    """The division that ``engine.split`` writes.

    Args:
        groups: n names; images of one stay in one part (``first`` passes them over). None: each image by itself.
        fractions: of train, val and test; they sum to 1. A part whose fraction is 0 stays empty.
        folds: K parts of one size instead.
        first: test is the first names of each class.

    Raises:
        UserError: fewer images or groups than parts, or a class that could not be trained on where it is tested.
    """
    labels, num_classes = listing.samples.labels, len(listing.samples.class_names)
    if first:
        shares = np.array(fractions)
        division = Division(PARTS, split_first(listing.names, labels, fractions[PARTS.index("test")]))
    else:
        names = PARTS if folds is None else tuple(f"fold{k}" for k in range(folds))
        shares = np.array(fractions if folds is None else [1 / folds] * folds)
        wanted = np.flatnonzero(shares)
        units, what = (len(labels), "images") if groups is None else (len(set(groups)), "groups")
        if units < len(wanted):
            raise UserError(f"{units} {what} cannot make {len(wanted)} parts: ask for fewer")
        if groups is not None:
            part = wanted[split_groups(labels, groups, shares[wanted].tolist(), seed, num_classes=num_classes)]
        elif folds is not None:
            part = fold_stratified(listing.names, labels, folds, seed)
        else:
            part = split_stratified(listing.names, labels, shares.tolist(), seed)
        division = Division(names, part)
    for p in np.flatnonzero(shares):
        if not (division.part == p).any():
            raise UserError(f"{division.names[p]} would be empty: the classes are too small, or its fraction is")
    _require_known_classes(listing, division, folds=folds is not None)
    return division


def _require_known_classes(listing: Listing, division: Division, *, folds: bool) -> None:
    samples = listing.samples
    for p, name in enumerate(division.names if folds else PARTS[:1]):
        is_train = division.part != p if folds else division.part == p
        in_train = np.bincount(samples.labels[is_train], minlength=len(samples.class_names))
        for label in np.flatnonzero(in_train == 0):
            raise UserError(
                f"class {samples.class_names[label]!r} would have no image in {'the training of ' * folds}{name}: "
                "it has too few images or groups; leave it out, ask for fewer parts, or try another --seed"
            )
