"""A long-tailed part of a training set, so that methods can be compared at an imbalance that is chosen.

The rule is that of Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019: of k classes,
class x = 0, 1, ... keeps n * u^(x / (k - 1)) images, where u is the size of the last class over that of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.data.counter import Purpose, generator
from engine.data.samples import Samples


def long_tail_counts(counts: np.ndarray, ratio: float) -> np.ndarray:
    """What the rule leaves of each class, rounded down and at least one image of every class that has any.

    n is the largest whole number at which every class has enough: of balanced data the size of a class. So the counts
    have the rule's own shape whatever shape ``counts`` have.

    Args:
        counts: (classes,) int64, at least two classes.
        ratio: u, above 0 and at most 1; 1 leaves every class as many as the smallest has.

    Returns:
        (classes,) int64.
    """
    shares = ratio ** (np.arange(len(counts)) / (len(counts) - 1))
    has = counts > 0
    n = np.ceil((counts[has] + 1) / shares[has]).min() - 1
    return np.minimum(np.maximum(np.floor(n * shares).astype(np.int64), 1), counts)


def make_long_tailed(
    samples: Samples,
    ratio: float,
    seed: int,
    *,
    names: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
) -> Samples:
    """The part of ``samples`` that ``long_tail_counts`` leaves, in their order.

    Which images those are follows from the names, the label and the seed. Of balanced data a smaller ratio keeps some
    of what a larger one keeps.

    Args:
        samples: the training images.
        ratio: as in ``long_tail_counts``.
        seed: shuffles each class, whose first images are kept.
        names: one for each image, that chance goes by; by default the files.
        order: all files of ``samples``, to keep the first of each class in this order instead, whatever the seed.
    """
    place = None if order is None else {file: i for i, file in enumerate(order)}
    kept: list[int] = []
    for label, count in enumerate(long_tail_counts(samples.class_counts(), ratio)):
        members = np.flatnonzero(samples.labels == label).tolist()
        if place is not None:
            first = sorted(members, key=lambda i: place[samples.files[i]])
        else:
            by_name = sorted(members, key=(names or samples.files).__getitem__)
            first = generator(Purpose.LONG_TAIL, seed, label).permutation(by_name).tolist()
        kept += first[:count]
    return samples.subset(sorted(kept))
