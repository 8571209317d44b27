"""Which image comes when: the re-weighted random sampler, as a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from engine.data.counter import Purpose, generator
from engine.errors import UserError

WEIGHTINGS = ("inverse", "none")


class WeightedSampler:
    """An epoch is as many draws as there are images.

    ``"inverse"``: with replacement, with class_weight * class_count the same for every class, so that each class that
    has an image at all is drawn equally often on average. ``"none"``: every image once, in random order.

    A draw picks a class by binary search in the cumulative class weights (float64) and then an image of it: exact for
    any number of images, where ``torch.multinomial`` ends at 2^24 categories.

    Args:
        labels: (n,) integers in [0, num_classes).
        num_classes: classes, with or without images.
        weighting: one of ``WEIGHTINGS``.
        seed: any integer.

    Raises:
        UserError: an unknown weighting.
    """

    def __init__(self, labels: np.ndarray, num_classes: int, *, weighting: str, seed: int) -> None:
        if weighting not in WEIGHTINGS:
            raise UserError(f"unknown sample weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = num_classes
        self.weighting = weighting
        self.seed = seed
        self._counts = np.bincount(self.labels, minlength=num_classes)
        self._by_class = np.argsort(self.labels, kind="stable")

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, epoch: int) -> np.ndarray:
        """The epoch's images in order: (n,) int64 indices into ``labels``."""
        rng = generator(Purpose.SAMPLER, self.seed, epoch)
        if self.weighting == "none":
            return rng.permutation(len(self.labels)).astype(np.int64)
        cumulative = np.cumsum(self.class_weights() * self._counts)
        drawn = np.searchsorted(cumulative / cumulative[-1], rng.random(len(self.labels)), side="right")
        within = (rng.random(len(self.labels)) * self._counts[drawn]).astype(np.int64)
        starts = np.cumsum(self._counts) - self._counts
        return self._by_class[starts[drawn] + within]

    def class_weights(self) -> np.ndarray:
        """The weight of an image of each class: (num_classes,) float64; 0 for a class without images."""
        if self.weighting == "none":
            return (self._counts > 0).astype(np.float64)
        return np.divide(1.0, self._counts, out=np.zeros(self.num_classes), where=self._counts > 0)

    def histogram(self, epoch: int) -> np.ndarray:
        """How often the epoch draws each class: (num_classes,) int64."""
        return np.bincount(self.labels[self.draw(epoch)], minlength=self.num_classes).astype(np.int64)
