"""Reliability diagrams (Guo et al., "On Calibration of Modern Neural Networks", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.metrics import ECE_BINS
from engine.pictures.style import BLUE, GREY, VERMILION, add_axes, add_legend, new_figure, set_title
from engine.predictions import Predictions

_SIDE, _COUNTS, _LEFT, _TOP = 3.0, 0.9, 0.6, 0.9


@dataclass(frozen=True, eq=False)
class Bins:
    """Of each of ``ECE_BINS`` ranges of the largest probability, (bins,): its images, and the means over them.

    ``confidence`` is the mean of the largest probability, ``accuracy`` the share that is right; NaN without images.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    def ece(self) -> float:
        """Expected calibration error, as `engine.metrics` has it."""
        gaps = np.abs(np.nan_to_num(self.accuracy - self.confidence))
        return float((self.counts * gaps).sum() / max(1, self.counts.sum()))


def calibration_bins(predictions: Predictions, temperature: float = 1.0) -> Bins:
    """The bins of softmax(log(probabilities) / temperature), which is that of the logits by the temperature."""
    probabilities = predictions.probabilities.numpy()
    if temperature != 1.0:
        logits = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)) / temperature
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    largest = probabilities.max(axis=1)
    right = (predictions.predictions == predictions.labels).numpy()
    of_bin = np.minimum((largest * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    counts = np.bincount(of_bin, minlength=ECE_BINS)
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (
            np.bincount(of_bin, weights=values, minlength=ECE_BINS) / counts for values in (largest, right)
        )
    return Bins(counts, confidence, accuracy)


def draw_reliability(predictions: Predictions, *, temperature: float | None = None) -> Figure:
    """Draws accuracy against confidence in 15 bins, and below how many images each holds; and again at a temperature.

    Bars are the accuracy of a bin, marks stand at its mean confidence; on the diagonal a model is as often right as it
    says. ``temperature`` is that of ``metrics.json``, None where there is none.
    """
    sides = {"as it is": calibration_bins(predictions)}
    if temperature is not None:
        sides[f"at temperature {temperature:.4g}"] = calibration_bins(predictions, temperature)
    errors = "; ".join(f"{name}: ECE {bins.ece():.4f}" for name, bins in sides.items())
    width = _LEFT + len(sides) * (_SIDE + 0.6)
    about = f"{len(predictions.labels):,} images in {ECE_BINS} bins"
    figure = new_figure(width, _TOP + _SIDE + 0.15 + _COUNTS + 0.5, f"Reliability diagram, {about}. {errors}.")
    set_title(figure, "Reliability", about)
    edges = np.arange(ECE_BINS) / ECE_BINS
    most = max(1, *(bins.counts.max() for bins in sides.values()))
    for k, (name, bins) in enumerate(sides.items()):
        left = _LEFT + k * (_SIDE + 0.6)
        axes = add_axes(figure, left, _TOP, _SIDE, _SIDE)
        axes.set_title(f"{name}: ECE {bins.ece():.4f}", loc="left", fontsize=9)
        bars = axes.bar(edges, np.nan_to_num(bins.accuracy), 1 / ECE_BINS, align="edge", color=BLUE, edgecolor="white")
        (diagonal,) = axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        (marks,) = axes.plot(
            bins.confidence, bins.accuracy, "D", color=VERMILION, markersize=5, markeredgecolor="white"
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.tick_params(labelbottom=False)
        counts = add_axes(figure, left, _TOP + _SIDE + 0.15, _SIDE, _COUNTS)
        counts.bar(edges, bins.counts, 1 / ECE_BINS, align="edge", color=GREY, edgecolor="white")
        counts.set_xlim(0, 1)
        counts.set_ylim(0, most * 1.05)
        counts.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        counts.set_xlabel("confidence (largest probability)", fontsize=9)
        if k == 0:
            axes.set_ylabel("accuracy", fontsize=9)
            counts.set_ylabel("images", fontsize=9)
            entries = [(bars, "accuracy of the bin"), (marks, "at its mean confidence"), (diagonal, "calibrated")]
            add_legend(axes, entries, loc="upper left", fontsize=8, bbox_to_anchor=(0.02, 0.98))
    return figure
