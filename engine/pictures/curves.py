"""Losses, scores and the learning rate by epoch, of one run or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.pictures.style import GREY, add_axes, add_legend, legend_width, line, new_figure, set_title, shortened

Rows = Sequence[Mapping[str, Any]]

_SPLITS = {"val_": "validation", "test_": "test"}
_SCORES = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 3.0, 2.4, 0.5, 0.85, 0.55


def draw_curves(
    runs: Rows | Mapping[str, Rows], *, chosen: int | Mapping[str, int] | None = None, head: str | None = None
) -> Figure:
    """Draws loss, macro-F1 and learning rate by epoch.

    Args:
        runs: rows of ``summary.csv``, or several runs' by name. Values are numbers or text; None or an empty text
            leaves a gap, and so does a column that is not there. The columns of the images that the epoch is chosen on
            begin with ``val_``, or else with ``test_``.
        chosen: the epoch whose weights were kept, or by run; it is marked. Without it, that of the highest macro-F1.
        head: of a model with heads the one whose scores are shown.

    Raises:
        ValueError: there are no rows.
    """
    several = isinstance(runs, Mapping)
    named: dict[str, Rows] = dict(runs) if isinstance(runs, Mapping) else {"": runs}
    if not named or not all(named.values()):
        raise ValueError("no epochs to draw")
    kept: dict[str, int | None] = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(named, chosen)
    prefixes = {name: _prefix(rows, head) for name, rows in named.items()}
    split = " and ".join(dict.fromkeys(_SPLITS[prefix.removesuffix(f"{head}.")] for prefix in prefixes.values()))
    for name, rows in named.items():
        if kept.get(name) is None:
            kept[name] = _highest(rows, f"{prefixes[name]}macro_f1")
    draw = _draw_several if several else _draw_one
    return draw(named, prefixes, kept, split, head)


def _draw_one(
    runs: Mapping[str, Rows],
    prefixes: Mapping[str, str],
    kept: Mapping[str, int | None],
    split: str,
    head: str | None,
) -> Figure:
    ((name, rows),) = runs.items()
    prefix, epoch = prefixes[name], kept[name]
    epochs = _column(rows, "epoch")
    figure = _new_figure(f"{split} macro-F1 {_at(rows, f'{prefix}macro_f1', epoch)}", epoch, head)
    loss, score, rate = _panels(figure, ("loss", f"{split} scores", "learning rate"))

    losses = {f"{prefix}loss": (split, 1)}
    if head is None:  # the training loss is that of all heads together
        losses = {"train_loss": ("training", 0), **losses}
    shown = [(line(loss, epochs, _column(rows, key), k), text) for key, (text, k) in losses.items() if _has(rows, key)]
    _finish(loss, [epochs], shown)
    keys = {f"{prefix}{key}": text for key, text in _SCORES.items() if _has(rows, f"{prefix}{key}")}
    shown = [(line(score, epochs, _column(rows, key), k), text) for k, (key, text) in enumerate(keys.items(), start=1)]
    _finish(score, [epochs], shown)
    if _has(rows, "lr"):
        line(rate, epochs, _column(rows, "lr"), 0)
    _finish(rate, [epochs], [])
    for axes in (loss, score, rate):
        if epoch is not None:
            axes.axvline(epoch, color=GREY, linewidth=1, zorder=1)
    return figure


def _draw_several(
    runs: Mapping[str, Rows],
    prefixes: Mapping[str, str],
    kept: Mapping[str, int | None],
    split: str,
    head: str | None,
) -> Figure:
    texts = [shortened(name) for name in runs]
    figure = _new_figure(f"{len(runs)} runs", None, head, legend_width(texts) + 0.2)
    panels = _panels(figure, ("training loss", f"{split} loss", f"{split} macro-F1"))
    for axes, key in zip(panels, ("train_loss", "loss", "macro_f1"), strict=True):
        lines = []
        for k, (name, rows) in enumerate(runs.items()):
            column = key if key == "train_loss" else f"{prefixes[name]}{key}"
            epochs, values = _column(rows, "epoch"), _column(rows, column)
            lines.append(line(axes, epochs, values, k))
            here = epochs == kept[name]
            axes.plot(epochs[here], values[here], "o", color=lines[-1].get_color(), markersize=6)
        _finish(axes, [_column(rows, "epoch") for rows in runs.values()], [])
    add_legend(panels[-1], list(zip(lines, texts, strict=True)), loc="upper left", bbox_to_anchor=(1.04, 1))
    return figure


def _new_figure(about: str, epoch: int | None, head: str | None, more: float = 0.0) -> Figure:
    whose = "" if head is None else f"{shortened(head)}: "
    marked = "the epoch that is kept is marked" if epoch is None else f"the line is epoch {epoch}, which is kept"
    figure = new_figure(
        _LEFT + 3 * _WIDTH + 2 * _GAP + 0.15 + more, _TOP + _HEIGHT + 0.5, f"Curves by epoch. {whose}{about}; {marked}."
    )
    set_title(figure, f"{whose}curves by epoch", f"{about}; {marked}")
    return figure


def _panels(figure: Figure, titles: Sequence[str]) -> list[Axes]:
    panels = []
    for k, title in enumerate(titles):
        axes = add_axes(figure, _LEFT + k * (_WIDTH + _GAP), _TOP, _WIDTH, _HEIGHT)
        axes.set_title(title, loc="left", fontsize=9)
        panels.append(axes)
    return panels


def _finish(axes: Axes, epochs: Sequence[np.ndarray], shown: Sequence[tuple[Any, str]]) -> None:
    together = np.concatenate(epochs)
    if len(together) <= 30 * len(epochs):
        for drawn in axes.lines:
            if drawn.get_marker() == "None":
                drawn.set_marker(".")
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_xlim(together.min() - 0.5, together.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.margins(y=0.1)
    if shown:
        add_legend(axes, shown, loc="best", fontsize=8)


def _prefix(rows: Rows, head: str | None) -> str:
    """What the columns of the images that the epoch is chosen on begin with."""
    own = "" if head is None else f"{head}."
    return next((split + own for split in _SPLITS if f"{split}{own}loss" in rows[-1]), f"val_{own}")


def _highest(rows: Rows, key: str) -> int | None:
    values = _column(rows, key)
    return int(_column(rows, "epoch")[np.nanargmax(values)]) if np.isfinite(values).any() else None


def _at(rows: Rows, key: str, epoch: int | None) -> str:
    values = _column(rows, key)[_column(rows, "epoch") == (-1 if epoch is None else epoch)]
    return f"{values[0]:.4f}" if len(values) and np.isfinite(values[0]) else "undefined"


def _has(rows: Rows, key: str) -> bool:
    return bool(np.isfinite(_column(rows, key)).any())


def _column(rows: Rows, key: str) -> np.ndarray:
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value is None or value == "" else float(value) for value in values])
