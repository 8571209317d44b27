"""Which image comes when: a re-weighted random sampler, as a pure function of (seed, epoch, position)."""

from __future__ import annotations

import math

import numpy as np

from engine.data.counter import Purpose, generator
from engine.errors import UserError

SAMPLINGS = ("none", "inverse", "sqrt", "power", "effective", "column")
EPOCH_SIZES = ("data", "over", "under")


class WeightedSampler:
    """Draws images by a weight that follows from the number of images c in their class, or by one of their own.

    ========== =========================== =====================================================================
    sampling   weight of an image
    ========== =========================== =====================================================================
    none       1
    inverse    1 / c                       every class equally often
    sqrt       1 / sqrt(c)                 half-way between the two, on a logarithmic scale
    power      1 / c^alpha                 alpha = 0, 1/2 and 1 are the three above
    effective  (1 - beta) / (1 - beta^c)   Cui et al., "Class-Balanced Loss Based on Effective Number of Samples",
                                           CVPR 2019
    column     as given                    a manifest's column ``weight``
    ========== =========================== =====================================================================

    An epoch is as many draws as there are images ("data"); so many that every image is expected at least once
    ("over": with inverse weights, classes * largest class); or so many that none is expected more than once ("under":
    classes * smallest class). An image of weight 0 is never drawn and does not count.

    With replacement, a draw picks a class by binary search in the cumulative float64 weights, then an image of it:
    exact for any number of images, where ``torch.multinomial`` ends at 2^24 categories. Without, an image that is
    expected e times comes floor(e) or ceil(e) times and a class likewise (systematic sampling; Madow, "On the Theory of
    Systematic Sampling, II", 1949, over the images of each class in random order).

    Args:
        labels: (n,) integers in [0, num_classes).
        num_classes: classes, with or without images.
        sampling: one of ``SAMPLINGS``.
        seed: any integer.
        alpha: of "power", at least 0.
        beta: of "effective", in [0, 1).
        weights: (n,) of "column": finite, at least 0, not all 0.
        epoch_size: one of ``EPOCH_SIZES``.
        replacement: None: with replacement unless ``sampling`` is "none".

    Raises:
        UserError: an unknown name, or a value out of its range.
    """

    def __init__(
        self,
        labels: np.ndarray,
        num_classes: int,
        *,
        sampling: str,
        seed: int,
        alpha: float = 0.5,
        beta: float = 0.999,
        weights: np.ndarray | None = None,
        epoch_size: str = "data",
        replacement: bool | None = None,
    ) -> None:
        for flag, value, known in (("--sampling", sampling, SAMPLINGS), ("--epoch-size", epoch_size, EPOCH_SIZES)):
            if value not in known:
                raise UserError(f"{flag} {value!r} is not one of {', '.join(known)}")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = num_classes
        self.sampling = sampling
        self.seed = seed
        self.replacement = sampling != "none" if replacement is None else replacement
        self._counts = np.bincount(self.labels, minlength=num_classes)
        self._keys = self.labels.astype(np.min_scalar_type(num_classes))  # narrow integers are sorted in linear time
        self._by_class = np.argsort(self._keys, kind="stable")
        self._own_weights = _checked_weights(weights, len(self.labels)) if sampling == "column" else None
        self._class_weights = sampling_weights(self._counts, sampling, alpha, beta)
        self._size = self._draws_of_an_epoch(epoch_size)

    def __len__(self) -> int:
        """Draws in an epoch, over all ranks."""
        return self._size

    def draw(self, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The epoch's images in order, int64 indices into ``labels``.

        Of several ranks, each takes every ``world_size``-th of the same draws, and all take equally many: up to
        ``world_size - 1`` draws at the end are left out.
        """
        rng = generator(Purpose.SAMPLER, self.seed, epoch)
        drawn = self._with_replacement(rng) if self.replacement else self._without_replacement(rng)
        return drawn[rank : len(drawn) - len(drawn) % world_size : world_size]

    def expected(self) -> np.ndarray:
        """How often an epoch draws each class on average: (num_classes,) float64."""
        mass = self._class_mass()
        return self._size * mass / mass.sum()

    def histogram(self, epoch: int) -> np.ndarray:
        """How often the epoch draws each class: (num_classes,) int64."""
        return np.bincount(self.labels[self.draw(epoch)], minlength=self.num_classes).astype(np.int64)

    def image_weights(self) -> np.ndarray:
        """(n,) float64, in proportion to how often an image is drawn."""
        return self._class_weights[self.labels] if self._own_weights is None else self._own_weights

    def _class_mass(self) -> np.ndarray:
        if self._own_weights is None:
            return self._class_weights * self._counts
        return np.bincount(self.labels, weights=self._own_weights, minlength=self.num_classes)

    def _draws_of_an_epoch(self, epoch_size: str) -> int:
        if epoch_size == "data":
            return len(self.labels)
        weights = self.image_weights()
        positive = weights[weights > 0]
        rarest = positive.min() if epoch_size == "over" else positive.max()
        exact = positive.sum() / rarest
        # what rounding makes of a whole number is that number
        nearest = round(exact)
        if math.isclose(exact, nearest, rel_tol=1e-9):
            return nearest
        return math.ceil(exact) if epoch_size == "over" else math.floor(exact)

    def _with_replacement(self, rng: np.random.Generator) -> np.ndarray:
        if self._own_weights is not None:
            cumulative = np.cumsum(self._own_weights)
            return np.searchsorted(cumulative / cumulative[-1], rng.random(self._size), side="right")
        cumulative = np.cumsum(self._class_mass())
        drawn = np.searchsorted(cumulative / cumulative[-1], rng.random(self._size), side="right")
        within = (rng.random(self._size) * self._counts[drawn]).astype(np.int64)
        starts = np.cumsum(self._counts) - self._counts
        return self._by_class[starts[drawn] + within]

    def _without_replacement(self, rng: np.random.Generator) -> np.ndarray:
        shuffled = rng.permutation(len(self.labels))
        by_class = shuffled[np.argsort(self._keys[shuffled], kind="stable")]
        weights = self.image_weights()[by_class]
        # points one apart, over images each as wide as it is expected often
        ends = np.cumsum(weights)
        ends *= self._size / ends[-1]
        hits = np.searchsorted(ends, np.arange(self._size) + rng.random(), side="right")
        last = np.flatnonzero(weights)[-1]  # a point that rounding has put past the end
        return rng.permutation(by_class[np.minimum(hits, last)])


def sampling_weights(counts: np.ndarray, sampling: str, alpha: float, beta: float) -> np.ndarray:
    """(num_classes,) float64; 0 for a class without images."""
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise UserError(f"--sampling-alpha {alpha} does not work: it must be at least 0")
    if not 0 <= beta < 1:
        raise UserError(f"--sampling-beta {beta} does not work: it must be at least 0 and below 1")
    c = np.maximum(counts, 1).astype(np.float64)
    if sampling == "effective":
        weights = effective_weights(c, beta)
    else:
        weights = c ** -{"none": 0.0, "inverse": 1.0, "sqrt": 0.5, "power": alpha, "column": 0.0}[sampling]
    return np.where(counts > 0, weights, 0.0)


def effective_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta) / (1 - beta^c) of counts c (float64, at least 1) and beta in [0, 1): one over the effective number."""
    return (1 - beta) / -np.expm1(counts * np.log(beta)) if beta > 0 else np.ones_like(counts)


def _checked_weights(weights: np.ndarray | None, n: int) -> np.ndarray:
    if weights is None:
        raise UserError("--sampling column needs a manifest with a column 'weight': name one with --csv")
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (n,):
        raise ValueError(f"weights have shape {weights.shape}, and there are {n} images")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError(
            f"the column 'weight' holds {weights[~(weights >= 0) | ~np.isfinite(weights)][0]}: "
            "a weight is a finite number, at least 0"
        )
    if not weights.any():
        raise UserError("the column 'weight' is 0 for every training image: no image could be drawn")
    return weights
