"""95% intervals: the percentile bootstrap for the figures of a test set, and Wilson's for a proportion.

Resamples keep the number of images of each class, as pROC's do: the sets here are put together class by class, and a
resample that lost a rare class would leave its figures undefined. Images count as independent; where there are several
of one patient, the true intervals are wider.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; Robin et al., "pROC: an
open-source package for R and S+ to analyze and compare ROC curves" (2011); Wilson, "Probable Inference, the Law of
Succession, and Statistical Inference" (1927); Newcombe, "Two-sided confidence intervals for the single proportion"
(1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from engine.metrics import count_figures

RESAMPLES = 2000
LARGEST_FOR_AUROC = 2_000_000
"""Samples * classes up to which AUROC, which has to be resampled image by image, gets an interval."""

_TAILS = (0.025, 0.975)
_COUNTED = ("accuracy", "balanced_accuracy", "macro_f1")
_COUNTED_BY_CLASS = ("precision", "recall")
_BLOCK = 2**22  # samples * resamples in memory at a time

Interval = list[float]


def bootstrap_intervals(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What ``metrics.json`` holds as ``intervals``.

    Args:
        logits: (N, classes) float64, finite, N at least 1.
        labels: (N,) int64 in [0, classes).

    Returns:
        ``[low, high]`` of ``accuracy``, ``balanced_accuracy``, ``macro_f1`` and ``auroc_macro_ovr``, and
        ``per_class: {name: {precision, recall, auroc}}``; None where the figure itself is undefined, where the
        interval would be a point (without an error among the samples no resample has one, which says nothing of how
        rare they are), and for AUROC above `LARGEST_FOR_AUROC`. The same samples, resamples and seed give the same
        intervals.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    classes = len(class_names)
    confusion = multiclass_confusion_matrix(logits.argmax(dim=1), labels, num_classes=classes, validate_args=False)
    support = confusion.sum(dim=1)
    correct, predicted = _resampled_counts(confusion.numpy(), resamples, rng)
    figures, of_class = count_figures(correct, predicted, support)
    defined = {"precision": confusion.sum(dim=0) > 0, "recall": support > 0}

    areas = torch.full((resamples, classes), math.nan, dtype=torch.float64)
    if logits.numel() <= LARGEST_FOR_AUROC:
        areas = _resampled_aurocs(logits.softmax(dim=1), labels, resamples, rng)
    has_area = ~areas[0].isnan()
    return {
        **{name: _interval(figures[name]) for name in _COUNTED},
        "auroc_macro_ovr": _interval(areas[:, has_area].mean(dim=1)) if has_area.any() else None,
        "per_class": {
            name: {
                **{
                    key: _interval(of_class[key][:, label]) if defined[key][label] else None
                    for key in _COUNTED_BY_CLASS
                },
                "auroc": _interval(areas[:, label]) if has_area[label] else None,
            }
            for label, name in enumerate(class_names)
        },
    }


def wilson_interval(successes: int, trials: int) -> Interval | None:
    """Wilson's score interval of a proportion, without continuity correction; None of no trials."""
    if trials == 0:
        return None
    z = NormalDist().inv_cdf(_TAILS[1])
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _interval(values: Tensor) -> Interval | None:
    low, high = np.quantile(values.numpy(), _TAILS)
    return [float(low), float(high)] if low < high else None


def _resampled_counts(confusion: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(resamples, classes) int64 each: samples that are of a class and predicted so, and that are predicted so.

    Resampling a class's images is a multinomial draw from its row of the confusion matrix.
    """
    correct, predicted = np.zeros((2, resamples, len(confusion)), dtype=np.int64)
    for truth, row in enumerate(confusion):
        cells = np.flatnonzero(row)  # few, however many classes there are
        if len(cells):
            drawn = rng.multinomial(row.sum(), row[cells] / row.sum(), size=resamples)
            predicted[:, cells] += drawn
            correct[:, truth] = drawn[:, cells == truth].sum(axis=1)
    return torch.from_numpy(correct), torch.from_numpy(predicted)


def _resampled_aurocs(probabilities: Tensor, labels: Tensor, resamples: int, rng: np.random.Generator) -> Tensor:
    """(resamples, classes) float64, of each class against the rest; NaN where a class is empty or all there is."""
    members = [torch.nonzero(labels == label).flatten() for label in range(probabilities.shape[1])]
    ranks = {
        label: _Ranks(probabilities[:, label].contiguous(), labels == label)
        for label, own in enumerate(members)
        if 0 < len(own) < len(labels)
    }
    areas = torch.full((resamples, len(members)), math.nan, dtype=torch.float64)
    block = max(1, _BLOCK // len(labels))
    for start in range(0, resamples if ranks else 0, block):
        size = min(block, resamples - start)
        times = torch.zeros(len(labels), size, dtype=torch.float64)
        for own in members:
            times[own] = _times_drawn(len(own), size, rng)
        for label, ranked in ranks.items():
            areas[start : start + size, label] = ranked.aurocs(times)
    return areas


def _times_drawn(images: int, resamples: int, rng: np.random.Generator) -> Tensor:
    """(images, resamples) float64: how often each image is in a resample of as many."""
    drawn = rng.integers(images, size=(resamples, images)) if images else np.zeros((resamples, 0), dtype=np.int64)
    drawn += images * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * images).reshape(resamples, images)
    return torch.from_numpy(counts.T.astype(np.float64))


class _Ranks:
    """Where samples stand among the positive ones' distinct scores, s_0 < s_1 < ..., once for all resamples."""

    def __init__(self, scores: Tensor, positive: Tensor) -> None:
        levels, level = torch.unique(scores[positive], return_inverse=True)
        self.levels = len(levels)
        self.pairs = int(positive.sum()) * int((~positive).sum())
        self.level_of_positive = torch.full((len(scores),), self.levels)
        self.level_of_positive[positive] = level
        # 2k where s_k-1 < score < s_k, 2k + 1 where it is s_k itself; positive samples after them all
        place = torch.searchsorted(levels, scores) + torch.searchsorted(levels, scores, right=True)
        self.place_of_negative = torch.where(positive, 2 * self.levels + 1, place)

    def aurocs(self, times: Tensor) -> Tensor:
        """The AUROC of each resample, (B,), where ``times`` (N, B) says how often each sample is in it.

        The share of pairs of a positive and a negative sample in which the positive one has the higher score, ties
        counting half (Mann-Whitney). Resamples have as many of each as the samples.
        """
        levels, resamples = self.levels, times.shape[1]
        negatives = times.new_zeros(2 * levels + 2, resamples).index_add_(0, self.place_of_negative, times)
        positives = times.new_zeros(levels + 1, resamples).index_add_(0, self.level_of_positive, times)
        ties = negatives[1 : 2 * levels : 2]
        beaten = negatives.cumsum(dim=0)[0 : 2 * levels : 2] + ties / 2
        return (positives[:levels] * beaten).sum(dim=0) / self.pairs
