"""95% intervals: the percentile bootstrap for the figures of a test set, and Wilson's for a proportion.

Resamples keep the number of images of each class, as pROC's do: the sets here are put together class by class, and a
resample that lost a rare class would leave its figures undefined.

Images of one patient are not independent, and an interval that takes them for it is too narrow. Where images have
groups, whole groups are drawn, each with all its images: the cluster bootstrap. Groups of one class are drawn among
those of that class, which is what pROC's rule is for them, and groups of several classes among themselves. Wilson's
interval is then that of so many images as independent ones would have to be to vary as the groups do.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; Robin et al., "pROC: an
open-source package for R and S+ to analyze and compare ROC curves" (2011); Rutter, "Bootstrap estimation of diagnostic
accuracy with patient-clustered data" (2000); Field and Welsh, "Bootstrapping clustered data" (2007); Wilson, "Probable
Inference, the Law of Succession, and Statistical Inference" (1927); Newcombe, "Two-sided confidence intervals for the
single proportion" (1998); Rao and Scott, "A simple method for the analysis of clustered binary data" (1992).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
_BLOCK = 2**22  # images * resamples in memory at a time

Interval = list[float]


def bootstrap_intervals(
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """What ``metrics.json`` holds as ``intervals``.

    Args:
        logits: (N, classes) float64, finite, N at least 1.
        labels: (N,) int64 in [0, classes).
        groups: N names of what is drawn as a whole, such as patients; None: each image is drawn for itself.

    Returns:
        ``[low, high]`` of ``accuracy``, ``balanced_accuracy``, ``macro_f1`` and ``auroc_macro_ovr``, and
        ``per_class: {name: {precision, recall, auroc}}``; None where the figure itself is undefined, where the
        interval would be a point (without an error among the samples no resample has one, which says nothing of how
        rare they are), and for AUROC above `LARGEST_FOR_AUROC`. Of resamples in which groups of several classes leave
        a figure undefined, it is the others' interval. The same samples, resamples and seed give the same intervals.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    classes = len(class_names)
    predictions = logits.argmax(dim=1)
    confusion = multiclass_confusion_matrix(predictions, labels, num_classes=classes, validate_args=False)
    support = confusion.sum(dim=1)
    defined = {"precision": confusion.sum(dim=0) > 0, "recall": support > 0}
    ranks = _ranks(logits.softmax(dim=1), labels) if logits.numel() <= LARGEST_FOR_AUROC else {}

    counts: list[tuple[Tensor, ...]] = []
    if groups is None:  # counts can be drawn without the images
        counts = [(*_resampled_counts(confusion.numpy(), resamples, rng), support.expand(resamples, -1))]
    areas = torch.full((resamples, classes), math.nan, dtype=torch.float64)
    start = 0
    for times in _drawn(labels, groups, resamples, rng) if ranks or groups is not None else ():
        if groups is not None:
            counts.append(_counts_of(times, labels, predictions, classes))
        for label, ranked in ranks.items():
            areas[start : start + times.shape[1], label] = ranked.aurocs(times)
        start += times.shape[1]
    correct, predicted, drawn = (torch.cat(parts) for parts in zip(*counts, strict=True))
    figures, of_class = count_figures(correct, predicted, drawn)
    of_class["recall"][drawn == 0] = math.nan
    return {
        **{name: _interval(figures[name]) for name in _COUNTED},
        "auroc_macro_ovr": _interval(areas.nanmean(dim=1)),
        "per_class": {
            name: {
                **{
                    key: _interval(of_class[key][:, label]) if defined[key][label] else None
                    for key in _COUNTED_BY_CLASS
                },
                "auroc": _interval(areas[:, label]),
            }
            for label, name in enumerate(class_names)
        },
    }


def wilson_interval(successes: float, trials: float) -> Interval | None:
    """Wilson's score interval of a proportion, without continuity correction; None of no trials."""
    if trials == 0:
        return None
    z = NormalDist().inv_cdf(_TAILS[1])
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def proportion_interval(right: Tensor, groups: Sequence[str] | None = None) -> Interval | None:
    """Wilson's interval of the share of images that are ``right``, (n,) bool; None of none, or of a single group.

    With ``groups`` n is divided by the design effect: the variance of the share as the groups show it over that of
    independent images, and at least 1. Where all images are right or all wrong, which shows no variance, each group
    counts as one image.
    """
    images, share = len(right), right.double().mean().item()
    if groups is None or not images:
        return wilson_interval(int(right.sum()), images)
    group_of = _group_indices(groups)
    sizes = group_of.bincount().double()
    if len(sizes) < 2:
        return None
    beyond = group_of.bincount(right.double()) - share * sizes
    independent = images * share * (1 - share)
    between = len(sizes) / (len(sizes) - 1) * beyond.square().sum().item()
    effect = max(1.0, between / independent) if independent else images / len(sizes)
    return wilson_interval(share * images / effect, images / effect)


def _interval(values: Tensor) -> Interval | None:
    values = values[~values.isnan()]
    if not len(values):
        return None
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


def _counts_of(times: Tensor, labels: Tensor, predictions: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, classes) float64 each: as `_resampled_counts`, and the samples of a class, where ``times`` is (N, B)."""
    right = labels == predictions
    kinds = ((labels[right], times[right]), (predictions, times), (labels, times))
    correct, predicted, support = (times.new_zeros(classes, times.shape[1]).index_add_(0, *kind).T for kind in kinds)
    return correct, predicted, support


def _drawn(labels: Tensor, groups: Sequence[str] | None, resamples: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """(N, B) float64, block by block: how often each image is in each of B resamples, ``resamples`` in all.

    What is drawn are the groups, or of None the images; of those that hold one class as many as there are, class by
    class, and of those that hold several likewise.
    """
    unit_of = torch.arange(len(labels)) if groups is None else _group_indices(groups)
    holds = torch.zeros(int(unit_of.max()) + 1, int(labels.max()) + 1, dtype=torch.bool)
    holds[unit_of, labels] = True
    stratum = torch.where(holds.sum(dim=1) > 1, holds.shape[1], holds.int().argmax(dim=1))
    strata = [torch.nonzero(stratum == k).flatten() for k in stratum.unique()]
    block = max(1, _BLOCK // len(labels))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        times = torch.zeros(len(holds), size, dtype=torch.float64)
        for units in strata:
            times[units] = _times_drawn(len(units), size, rng)
        yield times if groups is None else times[unit_of]


def _group_indices(groups: Sequence[str]) -> Tensor:
    """(n,) int64, each group's index in sorted order."""
    return torch.from_numpy(np.unique(np.asarray(groups, dtype=object), return_inverse=True)[1])


def _times_drawn(units: int, resamples: int, rng: np.random.Generator) -> Tensor:
    """(units, resamples) float64: how often each unit is in a resample of as many."""
    drawn = rng.integers(units, size=(resamples, units))
    drawn += units * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units)
    return torch.from_numpy(counts.T.astype(np.float64))


def _ranks(probabilities: Tensor, labels: Tensor) -> dict[int, _Ranks]:
    """Of each class against the rest, without those that are empty or all there is."""
    return {
        label: _Ranks(probabilities[:, label].contiguous(), labels == label)
        for label in labels.unique().tolist()
        if not (labels == label).all()
    }


class _Ranks:
    """Where samples stand among the positive ones' distinct scores, s_0 < s_1 < ..., once for all resamples."""

    def __init__(self, scores: Tensor, positive: Tensor) -> None:
        levels, level = torch.unique(scores[positive], return_inverse=True)
        self.levels = len(levels)
        self.level_of_positive = torch.full((len(scores),), self.levels)
        self.level_of_positive[positive] = level
        # 2k where s_k-1 < score < s_k, 2k + 1 where it is s_k itself; positive samples after them all
        place = torch.searchsorted(levels, scores) + torch.searchsorted(levels, scores, right=True)
        self.place_of_negative = torch.where(positive, 2 * self.levels + 1, place)

    def aurocs(self, times: Tensor) -> Tensor:
        """The AUROC of each resample, (B,), where ``times`` (N, B) says how often each sample is in it.

        The share of pairs of a positive and a negative sample in which the positive one has the higher score, ties
        counting half (Mann-Whitney); NaN where there is no pair.
        """
        levels, resamples = self.levels, times.shape[1]
        negatives = times.new_zeros(2 * levels + 2, resamples).index_add_(0, self.place_of_negative, times)
        positives = times.new_zeros(levels + 1, resamples).index_add_(0, self.level_of_positive, times)
        ties = negatives[1 : 2 * levels : 2]
        beaten = negatives.cumsum(dim=0)[0 : 2 * levels : 2] + ties / 2
        pairs = positives[:levels].sum(dim=0) * positives[levels]  # to the last level belongs what is not positive
        return (positives[:levels] * beaten).sum(dim=0) / pairs
