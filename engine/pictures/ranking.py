"""A ranking of images by the probability of a class: ROC, precision-recall and the areas under them.

Sources: Fawcett, "An introduction to ROC analysis" (2006); Davis and Goadrich, "The Relationship Between
Precision-Recall and ROC Curves" (2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRID = np.linspace(0, 1, 1001)
"""Where curves are read off to take their mean: false positive rates, or recalls."""

_MOST_POINTS = 1500


@dataclass(frozen=True, eq=False)
class Ranking:
    """Of n images how many of the positive ones, and of the others, have a score of at least each distinct one.

    Attributes:
        thresholds: (k,) float64, falling.
        true_positives, false_positives: (k,) int64, rising; the last are all there are.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray

    @property
    def prevalence(self) -> float:
        """Share of the positive ones."""
        return float(self.true_positives[-1] / (self.true_positives[-1] + self.false_positives[-1]))

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rates, (k + 1,) each, from (0, 0) to (1, 1); needs images of either kind."""
        return (
            np.append(0, self.false_positives) / self.false_positives[-1],
            np.append(0, self.true_positives) / self.true_positives[-1],
        )

    def auroc(self) -> float:
        """Area under the ROC curve."""
        false_rate, true_rate = self.roc()
        return float(np.sum(np.diff(false_rate) * (true_rate[1:] + true_rate[:-1]) / 2))

    def roc_on_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The ROC curve at (0, 0) and each false positive rate of ``GRID``, there at the upper end of a rise."""
        false_rate, true_rate = self.roc()
        upper = np.append(np.flatnonzero(np.diff(false_rate)), len(false_rate) - 1)
        return np.append(0, GRID), np.append(0, np.interp(GRID, false_rate[upper], true_rate[upper]))

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """Recall, rising from 0 to 1, and the highest precision that a threshold gives at it; needs positive images.

        Up to a point, from the one before it, the precision is taken as that of the point: average precision is the
        area. At recall 0 nothing is called positive; the precision there is that of the next point.
        """
        gains = np.diff(self.true_positives, prepend=0) > 0
        found = self.true_positives[gains]
        precision = found / (found + self.false_positives[gains])
        return np.append(0, found) / found[-1], np.append(precision[0], precision)

    def average_precision(self) -> float:
        """Sum of (gain in recall) * precision over the thresholds."""
        recall, precision = self.precision_recall()
        return float(np.sum(np.diff(recall) * precision[1:]))

    def precision_recall_on_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The precision at each recall of ``GRID``."""
        recall, precision = self.precision_recall()
        return GRID, precision[np.searchsorted(recall, GRID)]


def rank(scores: np.ndarray, positive: np.ndarray) -> Ranking:
    """Scores (n,) float64 and positive (n,) bool, n at least 1."""
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    found = np.cumsum(positive, dtype=np.int64)[ends]
    return Ranking(scores[ends], found, ends + 1 - found)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A rising or falling line without the points inside its straight parts; of very many points, some."""
    if len(x) > 2:
        dx, dy = np.diff(x), np.diff(y)
        bends = np.abs(dx[:-1] * dy[1:] - dx[1:] * dy[:-1]) > 1e-15
        kept = np.concatenate([[True], bends, [True]])
        x, y = x[kept], y[kept]
    if len(x) > _MOST_POINTS:
        kept = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).round().astype(int))
        x, y = x[kept], y[kept]
    return x, y
