"""What sampling makes of the classes: their shares in the data, and in what was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from engine.pictures.style import (
    BLUE,
    MIDDLE,
    VERMILION,
    add_axes,
    add_legend,
    new_figure,
    set_title,
    shortened,
    show_names,
    text_width,
)

_MOST_NAMED = 40
"""Classes up to which each has a row; more stand side by side, by their rank."""


def draw_class_balance(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws each class's share of the training images and of all that was drawn, the largest class first.

    Args:
        rows: those of ``sampling.csv``: ``epoch``, ``class``, ``images``, ``expected``, ``drawn``, as numbers or text.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no draws to show")
    names = list(dict.fromkeys(str(row["class"]) for row in rows))
    place = {name: i for i, name in enumerate(names)}
    images, expected, drawn = np.zeros((3, len(names)))
    for row in rows:
        i = place[str(row["class"])]
        images[i] = float(row["images"])
        expected[i] += float(row["expected"])
        drawn[i] += float(row["drawn"])
    order = np.argsort(-images, kind="stable")
    names = [names[i] for i in order]
    images, expected, drawn = (values[order] / max(1, values.sum()) for values in (images, expected, drawn))
    epochs = len({str(row["epoch"]) for row in rows})
    about = f"{len(names)} classes, draws of {epochs} epoch{'s' * (epochs != 1)}"
    drawing = _draw_rows if len(names) <= _MOST_NAMED else _draw_ranks
    return drawing(names, images, expected, drawn, about)


def _draw_rows(names: Sequence[str], images: np.ndarray, expected: np.ndarray, drawn: np.ndarray, about: str) -> Figure:
    row, top, bars = 0.34, 0.85, 4.6
    left = text_width([shortened(name) for name in names]) + 0.25
    figure = new_figure(left + bars + 0.55, top + row * len(names) + 0.55, _words(about, names, images, drawn))
    set_title(figure, "Classes before and after sampling", about)
    axes = add_axes(figure, left, top, bars, row * len(names))
    places = np.arange(len(names))
    before = axes.barh(places - 0.19, images, 0.36, color=MIDDLE)
    after = axes.barh(places + 0.19, drawn, 0.36, color=BLUE)
    mean = axes.vlines(expected, places + 0.01, places + 0.37, color=VERMILION, linewidth=2)
    for offset, values in ((-0.19, images), (0.19, np.maximum(drawn, expected))):
        for i, value in enumerate(values):
            shown = (images if offset < 0 else drawn)[i]
            axes.annotate(
                f"{shown:.1%}", (value, i + offset), (3, 0), textcoords="offset points", va="center", fontsize=7
            )
    show_names(axes, "y", places, names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, max(1e-9, images.max(), drawn.max(), expected.max()) * 1.1)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of all images", fontsize=9)
    entries = [(before, "in the data"), (after, "as drawn"), (mean, "expected")]
    add_legend(axes, entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    return figure


def _draw_ranks(
    names: Sequence[str], images: np.ndarray, expected: np.ndarray, drawn: np.ndarray, about: str
) -> Figure:
    figure = new_figure(7.6, 3.9, _words(about, names, images, drawn))
    set_title(figure, "Classes before and after sampling", about)
    axes = add_axes(figure, 0.7, 0.85, 6.7, 2.5)
    places = np.arange(1, len(names) + 1)
    before = axes.bar(places, images, 1.0, color=MIDDLE)
    (after,) = axes.plot(places, drawn, ".", color=BLUE, markersize=5)
    (mean,) = axes.plot(places, expected, color=VERMILION, linewidth=1.2)
    axes.set_xlim(0, len(names) + 1)
    axes.set_ylim(0, max(1e-9, images.max(), drawn.max(), expected.max()) * 1.1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("class, from the largest to the smallest", fontsize=9)
    axes.set_ylabel("share of all images", fontsize=9)
    entries = [(before, "in the data"), (after, "as drawn"), (mean, "expected")]
    add_legend(axes, entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    return figure


def _words(about: str, names: Sequence[str], images: np.ndarray, drawn: np.ndarray) -> str:
    largest, smallest = (
        f"{shortened(names[i])} has {images[i]:.1%} of the images and {drawn[i]:.1%} of the draws" for i in (0, -1)
    )
    return f"Classes before and after sampling, {about}. {largest}; {smallest}."
