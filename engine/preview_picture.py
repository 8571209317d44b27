"""The picture of ``engine.preview``: the balance of the classes above, their images below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PICTURE_FORMATS = ("png", "jpg", "jpeg", "pdf", "svg")
PAIRS = 5
"""In a line, of an image as it is and as it is drawn."""

_IMAGES, _DRAWN, _EXPECTED, _GREY, _PALE = "#a9b4c2", "#1f5fa8", "#d9731a", "#6b7280", "#e5e7eb"
_LONGEST_NAME = 24

# inches
_WIDTH, _LEFT, _RIGHT, _TITLE = 13.0, 0.75, 0.25, 0.95
_BARS = 2.6
_NAME_COLUMN = 1.75
_PAIR_GAP, _TILE_GAP, _LINE_GAP, _ROW_GAP = 0.22, 0.02, 0.05, 0.14
_HEADER, _BOTTOM = 0.45, 0.15
_FEWEST_SLOTS = 6
"""Bars of fewer classes than these get no wider."""


@dataclass(frozen=True, eq=False)
class Balance:
    """Of each class, (num_classes,) each: its name, its images, and the draws of an epoch expected and made."""

    names: tuple[str, ...]
    images: np.ndarray
    expected: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True, eq=False)
class Row:
    """Images of one class: ``plain`` as they are and ``augmented`` as they are drawn, both (n, S, S, 3) in [0, 1]."""

    label: int
    plain: np.ndarray
    augmented: np.ndarray


def draw_preview(balance: Balance, rows: Sequence[Row], caption: str) -> Figure:
    """The picture, as wide as a screen; the classes stand from the largest to the smallest.

    Made for 2 to some hundred classes.
    """
    order = np.argsort(-balance.images, kind="stable")
    names = [_shortened(balance.names[i]) for i in order]
    slot = (_WIDTH - _LEFT - _RIGHT) / max(len(names), _FEWEST_SLOTS)
    name_size = float(np.clip(72 * slot * 0.75, 6, 10))
    upright = max(map(len, names)) * name_size * 0.62 > 72 * slot * 0.95
    below_bars = (max(map(len, names)) * name_size * 0.62 / 72 if upright else 0.2) + 0.25

    tile = (_WIDTH - 0.25 - _NAME_COLUMN - _RIGHT - (PAIRS - 1) * _PAIR_GAP - PAIRS * _TILE_GAP) / (2 * PAIRS)
    lines = [max(1, -(-len(row.plain) // PAIRS)) for row in rows]
    tiles_height = _HEADER + sum(lines) * (tile + _LINE_GAP) + len(rows) * _ROW_GAP
    height = _TITLE + _BARS + below_bars + tiles_height + _BOTTOM

    figure = Figure(figsize=(_WIDTH, height), dpi=140)
    figure.text(
        0.25 / _WIDTH, 1 - 0.16 / height, _title(balance), va="top", fontsize=12, fontweight="bold", parse_math=False
    )
    figure.text(0.25 / _WIDTH, 1 - 0.42 / height, caption, va="top", fontsize=9, color=_GREY, parse_math=False)
    bars = figure.add_axes((_LEFT / _WIDTH, 1 - (_TITLE + _BARS) / height, slot * len(names) / _WIDTH, _BARS / height))
    _draw_bars(bars, balance, order, slot)
    every = max(1, round(6 / (72 * slot * 0.75)))
    bars.set_xticks(
        range(0, len(names), every),
        names[::every],
        rotation=90 if upright else 0,
        fontsize=name_size,
        parse_math=False,
    )
    images = figure.add_axes((0.25 / _WIDTH, _BOTTOM / height, 1 - (0.25 + _RIGHT) / _WIDTH, tiles_height / height))
    images.set_xlim(0, _WIDTH - 0.25 - _RIGHT)
    images.set_ylim(tiles_height, 0)
    images.set_axis_off()
    _draw_rows(images, balance, rows, lines, tile)
    return figure


def _draw_bars(axes: Axes, balance: Balance, order: np.ndarray, slot: float) -> None:
    places = np.arange(len(order))
    images, drawn, expected = balance.images[order], balance.drawn[order], balance.expected[order]
    bars = (
        axes.bar(places - 0.2, images, 0.38, color=_IMAGES),
        axes.bar(places + 0.2, drawn, 0.38, color=_DRAWN),
    )
    lines = axes.hlines(expected, places, places + 0.4, color=_EXPECTED, linewidth=2.2)
    highest = max(images.max(), drawn.max(), expected.max(), 1)
    if len(f"{highest:,.0f}") * 5 < 72 * slot * 0.38:
        for offset, values, color in ((-0.2, images, _GREY), (0.2, drawn, _DRAWN)):
            for place, value, line in zip(places, values, expected, strict=True):
                top = max(value, line) if color == _DRAWN else value
                axes.annotate(
                    f"{value:,}",
                    (place + offset, top),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                    fontsize=8,
                )
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.set_ylim(0, highest * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=_PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", length=0, labelsize=8, labelcolor=_GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    names = ("images in the training set", "drawn in this epoch", "drawn in an epoch on average")
    axes.legend(
        (*bars, lines),
        names,
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        fontsize=9,
        borderaxespad=0.1,
    )


def _draw_rows(axes: Axes, balance: Balance, rows: Sequence[Row], lines: Sequence[int], tile: float) -> None:
    pitch = 2 * tile + _TILE_GAP + _PAIR_GAP
    for k in range(PAIRS):
        for half, title in enumerate(("image", "augmented")):
            x = _NAME_COLUMN + k * pitch + half * (tile + _TILE_GAP) + tile / 2
            axes.text(x, _HEADER - 0.07, title, ha="center", va="bottom", fontsize=8, color=_GREY)
    top = _HEADER
    for row, count in zip(rows, lines, strict=True):
        images, drawn = int(balance.images[row.label]), int(balance.drawn[row.label])
        name = _shortened(balance.names[row.label])
        axes.text(0, top + 0.05, name, va="top", fontsize=_name_size(name), fontweight="bold", parse_math=False)
        about = f"{images:,} image{'s' * (images != 1)}\n{drawn:,} draw{'s' * (drawn != 1)}"
        if drawn > images:
            about += f", {drawn / images:.1f} of each"
        axes.text(0, top + 0.3, about, va="top", fontsize=8.5, color=_GREY, linespacing=1.4)
        if len(row.plain) == 0:
            axes.text(_NAME_COLUMN, top + tile / 2, "none of it is drawn in this epoch", va="center", color=_GREY)
        for k, pair in enumerate(zip(row.plain, row.augmented, strict=True)):
            y = top + k // PAIRS * (tile + _LINE_GAP)
            for half, picture in enumerate(pair):
                x = _NAME_COLUMN + k % PAIRS * pitch + half * (tile + _TILE_GAP)
                axes.imshow(picture, extent=(x, x + tile, y + tile, y), aspect="auto")
        top += count * (tile + _LINE_GAP) + _ROW_GAP
    # imshow fits the view to each picture
    axes.set_xlim(0, _WIDTH - 0.25 - _RIGHT)


def _title(balance: Balance) -> str:
    present = balance.images[balance.images > 0]
    ratio = f"largest : smallest = {present.max() / present.min():.1f} : 1 in the training set"
    drawn = balance.drawn[balance.drawn > 0]
    never = np.count_nonzero(balance.drawn[balance.images > 0] == 0)
    without = f", {never} never drawn" if never else ""
    return f"{len(balance.names)} classes, {ratio}, {drawn.max() / drawn.min():.1f} : 1 as drawn{without}"


def _name_size(name: str) -> float:
    return min(11.0, 72 * (_NAME_COLUMN - 0.1) / (0.66 * len(name)))


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
