"""What all pictures share: colours, names and the frame of a plot whose sizes are given in inches.

The colours are Okabe and Ito's ("Color Universal Design", 2008), which people with any colour vision tell apart; lines
differ by their dashes too, so that they do in grey print. Text is black or a grey of contrast 4.8 : 1 on white.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from engine.data.listing import printable

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
BLACK, GREY, MIDDLE, PALE = "#000000", "#6b7280", "#a9b4c2", "#e5e7eb"

LINES: tuple[tuple[str, str | tuple[int, tuple[float, ...]]], ...] = (
    (BLUE, "-"),
    (VERMILION, (0, (5, 1.5))),
    (GREEN, (0, (5, 1.5, 1, 1.5))),
    (PURPLE, (0, (1, 1))),
    (ORANGE, (0, (8, 2))),
    (SKY, (0, (3, 1, 1, 1, 1, 1))),
    (PURPLE, "-"),
    (BLUE, (0, (1, 2.5))),
    (VERMILION, "-"),
    (GREEN, (0, (3, 3))),
)
"""Colour and dashes of the first, second, ... line; black is left to a mean."""

TEXT_SIZE = 9.0
_EM = 0.62  # of the font's size: the mean width of a character, a Chinese one is two
_LONGEST_NAME = 24


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """The name on one line, in at most that many columns; what cannot be printed is escaped."""
    name = "".join(char if char.isprintable() else repr(char)[1:-1] for char in printable(name))
    if columns(name) <= longest:
        return name
    kept = ""
    for char in name:
        if columns(kept + char) > longest - 1:
            break
        kept += char
    return f"{kept}…"


def columns(text: str) -> int:
    """A Chinese, Japanese or Korean character is two columns wide, a combining mark none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def text_width(texts: Sequence[str], size: float = TEXT_SIZE) -> float:
    """Inches that the longest of the texts takes at most, by and large, in whatever font it is shown in."""
    return max((columns(line) for text in texts for line in text.split("\n")), default=0) * _EM * size / 72


def new_figure(width: float, height: float, about: str) -> Figure:
    """An empty figure of that many inches; ``about`` says in words what it shows, for those who cannot see it."""
    figure = Figure(figsize=(width, height), dpi=150)
    figure.set_label(about)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at that many inches from the left and from the top of the figure."""
    whole_width, whole_height = figure.get_size_inches()
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(box)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    return axes


def set_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """At the upper left, in the first 0.5 inches."""
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.1 / height, title, va="top", fontsize=10, fontweight="bold", parse_math=False)
    figure.text(0.12 / width, 1 - 0.3 / height, subtitle, va="top", fontsize=TEXT_SIZE, color=GREY, parse_math=False)


def add_legend(axes: Axes, entries: Sequence[tuple[Any, str]], **where: Any) -> Legend:
    """A legend of artists with their texts, which are shown as they are: no mathematics, none left out."""
    how: Any = {"frameon": False, "fontsize": TEXT_SIZE, "handlelength": 2.6, "borderaxespad": 0, **where}
    legend = axes.legend([artist for artist, _ in entries], [str(i) for i in range(len(entries))], **how)
    for shown, (_, text) in zip(legend.get_texts(), entries, strict=True):
        shown.set_parse_math(False)
        shown.set_text(text)
    return legend


def legend_width(texts: Sequence[str]) -> float:
    """Inches of a legend of these texts."""
    return text_width(texts) + 0.65


def line(axes: Axes, x: np.ndarray, y: np.ndarray, k: int, **how: Any) -> Line2D:
    """The ``k``-th line of a plot."""
    color, dashes = LINES[k % len(LINES)]
    own: Any = {"color": color, "linestyle": dashes, "linewidth": 1.8, **how}
    return axes.plot(x, y, **own)[0]


def text_on(color: Any) -> str:
    """Black or white, whichever has the higher contrast: 4.5 : 1 or more on any colour (WCAG 2.2)."""
    channels: np.ndarray = np.asarray(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def show_names(axes: Axes, which: str, places: Sequence[float] | np.ndarray, names: Sequence[str], **how: Any) -> None:
    """Ticks of the axis ``which``, "x" or "y", that are called as the names are."""
    ticks = axes.set_xticks if which == "x" else axes.set_yticks
    ticks(places, [shortened(name) for name in names], parse_math=False, **how)
