"""Precision, recall and F1 of each class, of one run or of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from engine.pictures.style import (
    BLUE,
    GREEN,
    MIDDLE,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_axes,
    add_legend,
    new_figure,
    set_title,
    shortened,
    show_names,
    text_width,
)

_FIGURES = ("precision", "recall", "f1")
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, MIDDLE)
_MOST_CLASSES = 24
"""Of more, so many of the worst are shown."""


def draw_class_figures(runs: Mapping[str, Any]) -> Figure:
    """Draws a bar of precision, recall and F1 for each class, with the 95% interval where there is one.

    Classes stand in their order; of more than 24 the 24 of the lowest F1, that of the first run, of those with images.

    Args:
        runs: what metrics.json holds, or ``{run: that}`` for several runs, which have a bar each.
    """
    named: dict[str, Mapping[str, Any]] = {"": runs} if "confusion_matrix" in runs else dict(runs)
    first = next(iter(named.values()))["per_class"]
    names = list(dict.fromkeys(name for metrics in named.values() for name in metrics["per_class"]))
    about = f"{len(names)} classes"
    if len(names) > _MOST_CLASSES:
        seen = [
            name
            for name in names
            if any(metrics["per_class"].get(name, {}).get("support") for metrics in named.values())
        ]
        if len(seen) < len(names):
            about += f", {len(names) - len(seen)} of them without images"
        names = sorted(seen, key=lambda name: first.get(name, {}).get("f1", 0.0))[:_MOST_CLASSES]
        about = f"the {len(names)} of the lowest F1 of {about}"
    if any("intervals" in metrics for metrics in named.values()):
        about += "; lines: 95% intervals"

    row, top, bars, gap = max(0.24, 0.14 * len(named) + 0.08), 0.85, 2.1, 0.22
    if len(named) > 1:
        top += 0.2 * (-(-len(named) // 4))
    left = text_width([shortened(name) for name in names]) + 0.25
    width = left + 3 * (bars + gap) + 0.25
    words = "; ".join(f"{shortened(name) or 'macro-F1'} {metrics['macro_f1']:.3f}" for name, metrics in named.items())
    figure = new_figure(width, top + row * len(names) + 0.45, f"Figures of each class, {about}. {words}.")
    set_title(figure, "Figures of each class", about)
    places = np.arange(len(names))
    height = 0.8 / len(named)
    for k, figure_name in enumerate(_FIGURES):
        axes = add_axes(figure, left + k * (bars + gap), top, bars, row * len(names))
        axes.set_title("F1" if figure_name == "f1" else figure_name, loc="left", fontsize=9)
        shown = []
        for i, metrics in enumerate(named.values()):
            own = places - 0.4 + (i + 0.5) * height
            values = np.array([metrics["per_class"].get(name, {}).get(figure_name) or 0.0 for name in names])
            shown.append(axes.barh(own, values, height * 0.92, color=_COLOURS[i % len(_COLOURS)]))
            intervals = metrics.get("intervals", {}).get("per_class", {})
            ends = [intervals.get(name, {}).get(figure_name) for name in names]
            for place, interval in zip(own, ends, strict=True):
                if interval is not None:
                    axes.plot(interval, [place, place], color="black", linewidth=1.2, solid_capstyle="butt")
        axes.set_xlim(0, 1)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        show_names(axes, "y", places, names if k == 0 else [""] * len(names), fontsize=9)
        if k == 0 and len(named) > 1:
            entries = [(bar, shortened(name)) for bar, name in zip(shown, named, strict=True)]
            where = {"loc": "upper left", "bbox_to_anchor": (0.12 / width, 1 - 0.5 / figure.get_figheight())}
            add_legend(axes, entries, bbox_transform=figure.transFigure, ncols=4, **where)
    return figure
