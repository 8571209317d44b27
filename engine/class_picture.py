"""The picture of the class balance: a bar for each class, a colour for each part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = ("#1f5fa8", "#d9731a", "#6b7280", "#6baed6", "#c6dbef")
_GREY, _PALE = "#6b7280", "#e5e7eb"
_LONGEST_NAME = 24


def save_class_counts(counts: Mapping[str, Mapping[str, int]], file: BinaryIO) -> None:
    """Draws ``{part: {class: images}}`` as stacked bars, the classes from top to bottom, with their totals.

    Made for 2 to 200 classes and a few parts; the picture grows with the classes. It is written as PNG.
    """
    names = list(dict.fromkeys(name for part in counts.values() for name in part))
    rows = np.array([[part.get(name, 0) for name in names] for part in counts.values()])
    totals = rows.sum(axis=0)
    places = np.arange(len(names))

    figure = Figure(figsize=(8, 1.3 + 0.27 * len(names)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(names))
    for k, (part, row) in enumerate(zip(counts, rows, strict=True)):
        axes.barh(places, row, left=left, height=0.72, label=part, color=_COLOURS[k % len(_COLOURS)])
        left += row
    for place, total in zip(places, totals, strict=True):
        axes.annotate(f"{total:,}", (total, place), (4, 0), textcoords="offset points", va="center", color=_GREY)
    axes.set_yticks(
        places,
        [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names],
        parse_math=False,
    )
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(1, totals.max()) * 1.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("images")
    axes.set_title(_title(totals), loc="left", fontsize=10)
    if len(counts) > 1:
        axes.legend(frameon=False, loc="best")
    axes.grid(axis="x", color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, format="png")


def _title(totals: np.ndarray) -> str:
    smallest = totals.min()
    ratio = f", largest : smallest = {totals.max() / smallest:.1f} : 1" if smallest else ", an empty class"
    return f"{totals.sum():,} images in {len(totals)} classes{ratio}"
