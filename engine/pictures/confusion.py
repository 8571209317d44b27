"""The confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from engine.pictures.style import (
    BLUE,
    GREY,
    PALE,
    add_axes,
    new_figure,
    set_title,
    shortened,
    show_names,
    text_on,
    text_width,
)

_MOST_COUNTED = 60
"""Classes up to which every cell has its number; beyond, there is no room for it."""
# Starts in white, so that empty cells recede; dark enough at the end for white figures.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#cfe3f3", "#6fb1dc", BLUE, "#00304d"])
# The square root makes room for the small shares: a class that loses 5% to another must be seen.
_NORM = PowerNorm(0.5, vmin=0, vmax=1)


def draw_confusion_matrix(metrics: Mapping[str, Any], *, title: str = "Confusion matrix") -> Figure:
    """Draws the confusion matrix of ``engine.metrics``: colour is the share of the true class, numbers are counts.

    The picture grows with the classes up to 60 of them; of more it keeps its size and has no numbers.
    """
    counts = np.asarray(metrics["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [shortened(name) for name in metrics["per_class"]]
    counted = len(names) <= _MOST_COUNTED

    cell = max(0.24, 1.3 / len(names) ** 0.45) if counted else 12.0 / len(names)  # inches
    name_size = float(np.clip(40 * cell, 5, 9))
    side, name_width = len(names) * cell, text_width(names, name_size) + 0.1
    upright = name_width > cell + 0.05
    below = (name_width if upright else 0.2) + 0.35
    left = max(name_width, 0.2) + 0.35
    width = max(left + side + 1.0, 3.6)
    accuracy = f"accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}, {counts.sum():,} images"
    figure = new_figure(width, 0.65 + side + below, f"{title}. {accuracy}.")
    set_title(figure, title, accuracy)

    axes = add_axes(figure, left, 0.6, side, side)
    axes.grid(visible=False)
    image = axes.imshow(shares, cmap=_SHARES, norm=_NORM, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(
        image,
        cax=add_axes(figure, left + side + 0.15, 0.6, 0.12, min(side, 4.0)),
        ticks=[0, 0.05, 0.25, 0.5, 0.75, 1],
    )
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.grid(visible=False)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=GREY, fontsize=8)

    axes.set_xlabel("prediction", fontsize=9)
    axes.set_ylabel("truth", fontsize=9)
    every = max(1, round(name_size * 1.15 / (72 * cell)))
    places = range(0, len(names), every)
    show_names(axes, "x", places, names[::every], rotation=90 if upright else 0, fontsize=name_size)
    show_names(axes, "y", places, names[::every], fontsize=name_size)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GREY)
    if counted:
        _show_counts(axes, counts, shares, cell)
    return figure


def _show_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, cell: float) -> None:
    for between in (axes.set_xticks, axes.set_yticks):
        between(np.arange(1, len(counts)) - 0.5, minor=True)
    axes.grid(which="minor", color=PALE, linewidth=0.5)
    axes.tick_params(which="both", length=0)
    size = min(12, 72 * cell * min(0.45, 1.3 / len(str(counts.max()))))
    colors = _SHARES(_NORM(shares))
    for truth, prediction in zip(*np.nonzero(counts), strict=True):
        color = text_on(colors[truth, prediction])
        text = str(counts[truth, prediction])
        axes.text(prediction, truth, text, ha="center", va="center", fontsize=size, color=color, parse_math=False)
