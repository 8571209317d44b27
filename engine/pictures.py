"""The pictures of a run: the confusion matrix and the training curves.

They are made without pyplot: no display, no global state. The suffix of the path names the format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_BLUE, _ORANGE, _GREY, _PALE = "#1f5fa8", "#d9731a", "#6b7280", "#e5e7eb"
# Starts in white, so that empty cells recede; dark enough at the end for white figures.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#c6dbef", "#6baed6", _BLUE, "#08306b"])


def save_confusion_matrix(metrics: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the confusion matrix of ``engine.metrics``: colour is the share of the true class, numbers are counts.

    Made for 2 to 50 classes; the picture grows with their number.
    """
    counts = np.asarray(metrics["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_shortened(name) for name in metrics["per_class"]]
    longest_name = max(map(len, names))
    digits = len(str(counts.max()))

    cell = max(0.3, 1.6 / len(names) ** 0.45)  # inches
    count_size = min(13, 72 * cell * min(0.45, 1.1 / digits))
    name_size = min(10, 36 * cell)
    side = len(names) * cell + 0.7 + longest_name * name_size * 0.65 / 72
    figure = Figure(figsize=(side + 1.1, side + 0.3), dpi=150, layout="compressed")
    axes = figure.add_subplot()
    # The square root makes room for the small shares: a class that loses 5% to another must be seen.
    image = axes.imshow(shares, cmap=_SHARES, norm=PowerNorm(0.5, vmin=0, vmax=1))
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=30, shrink=0.9, ticks=[0, 0.05, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=_GREY)

    axes.set_title(
        f"accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.3f}\n{counts.sum()} samples", fontsize=10
    )
    axes.set_xlabel("prediction")
    axes.set_ylabel("truth")
    names_overlap = longest_name * name_size * 0.65 > 72 * cell
    axes.set_xticks(range(len(names)), names, rotation=90 if names_overlap else 0, fontsize=name_size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=name_size, parse_math=False)
    for between in (axes.set_xticks, axes.set_yticks):
        between(np.arange(1, len(names)) - 0.5, minor=True)
    axes.grid(which="minor", color=_PALE, linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(_GREY)
    for truth, prediction in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[truth, prediction] > 0.35 else "black"
        text = str(counts[truth, prediction])
        axes.text(prediction, truth, text, ha="center", va="center", fontsize=count_size, color=color)
    figure.savefig(path, bbox_inches="tight")


def save_curves(summary_rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws loss and validation macro-F1 by epoch, and marks the epoch of the highest macro-F1.

    Args:
        summary_rows: rows of ``summary.csv``: ``epoch``, ``train_loss``, ``val_loss``, ``val_macro_f1``, as numbers or
            text; None or an empty text leaves a gap. With ``test_`` in place of ``val_`` it is the test images' own.
        path: where the picture goes.

    Raises:
        ValueError: there are no rows.
    """
    if not summary_rows:
        raise ValueError("no epochs to draw")
    prefix, split = ("test", "test") if "test_loss" in summary_rows[0] else ("val", "validation")
    epochs, train_loss, loss, macro_f1 = (
        np.array([_number(row[name]) for row in summary_rows])
        for name in ("epoch", "train_loss", f"{prefix}_loss", f"{prefix}_macro_f1")
    )
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    loss_axes, f1_axes = figure.subplots(1, 2)
    _draw(loss_axes, epochs, train_loss, "training", _BLUE)
    _draw(loss_axes, epochs, loss, split, _ORANGE)
    loss_axes.set_title("loss", loc="left")
    loss_axes.set_ylim(bottom=0)
    if loss_axes.lines:
        loss_axes.legend(frameon=False)
    _draw(f1_axes, epochs, macro_f1, split, _ORANGE)
    f1_axes.set_title(f"{split} macro-F1", loc="left")
    if np.isfinite(macro_f1).any():
        best = int(np.nanargmax(macro_f1))
        f1_axes.plot(epochs[best], macro_f1[best], "o", markersize=8, markerfacecolor="none", color=_GREY)
        f1_axes.set_title(f"best {macro_f1[best]:.4f} at epoch {epochs[best]:g}", loc="right", color=_GREY, fontsize=10)
    figure.savefig(path)


def _draw(axes: Axes, epochs: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    if np.isfinite(values).any():
        marker = "." if len(epochs) <= 30 else None
        axes.plot(epochs, values, label=label, color=color, linewidth=1.8, marker=marker)
    axes.set_xlabel("epoch")
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(y=0.1)
    axes.grid(color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float | str | None) -> float:
    return float("nan") if value is None or value == "" else float(value)


def _shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
