"""Losses, scores and the learning rate by epoch, of one run or of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.pictures.style import GREY, add_axes, add_legend, legend_width, line, new_figure, set_title, shortened

Rows = Sequence[Mapping[str, Any]]

_SPLITS = {"val_": "validation", "test_": "test"}
_SCORES = {"macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "accuracy": "accuracy"}
_FEW_EPOCHS = 12
"""Up to which each has a mark on the line; a line of one has no length."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 3.0, 2.4, 0.5, 0.85, 0.55


def draw_curves(
    runs: Rows | Mapping[str, Rows], *, chosen: int | Mapping[str, int] | None = None, head: str | None = None
) -> Figure:
    """Draws losses, scores and the learning rate by epoch; of several runs losses and macro-F1.

    Args:
        runs: rows of ``summary.csv``, or several runs' by name. Values are numbers or text; None or an empty text
            leaves a gap, and so does a column that is not there. The columns of the images that the epoch is chosen on
            begin with ``val_``, or else with ``test_``.
        chosen: the epoch whose weights were kept, or by run; it is marked. Without it, that of the highest macro-F1.
        head: of a model with heads the one whose losses and scores are shown.

    Raises:
        ValueError: there are no rows.
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    if not named or not all(named.values()):
        raise ValueError("no epochs to draw")
    opened = {
        name: _Run.of(rows, chosen.get(name) if isinstance(chosen, Mapping) else chosen, head)
        for name, rows in named.items()
    }
    return _draw_several(opened, head) if isinstance(runs, Mapping) else _draw_one(opened[""], head)


@dataclass(frozen=True, eq=False)
class _Run:
    """Rows of one run, what its columns begin with that are not of training, and the epoch to mark."""

    rows: Rows
    split: str
    prefix: str
    chosen: int | None

    @classmethod
    def of(cls, rows: Rows, chosen: int | None, head: str | None) -> _Run:
        own = "" if head is None else f"{head}."
        start = next((start for start in _SPLITS if f"{start}{own}loss" in rows[-1]), "val_")
        run = cls(rows, _SPLITS[start], f"{start}{own}", chosen)
        macro_f1 = run.scored("macro_f1")
        if chosen is None and np.isfinite(macro_f1).any():
            return replace(run, chosen=int(run.column("epoch")[np.nanargmax(macro_f1)]))
        return run

    def column(self, key: str) -> np.ndarray:
        """(epochs,) float64, NaN where there is nothing."""
        values = (row.get(key) for row in self.rows)
        return np.array([np.nan if value is None or value == "" else float(value) for value in values])

    def scored(self, key: str) -> np.ndarray:
        return self.column(f"{self.prefix}{key}")


def _draw_one(run: _Run, head: str | None) -> Figure:
    epochs = run.column("epoch")
    at = run.scored("macro_f1")[epochs == run.chosen]
    about = f"the line is epoch {run.chosen}, which is kept" if run.chosen is not None else "no epoch has a score"
    if len(at) and np.isfinite(at[0]):
        about += f": {run.split} macro-F1 {at[0]:.4f}"
    figure = _new_figure(about, head)
    loss, score, rate = _panels(figure, ("loss", f"{run.split} scores", "learning rate"))

    # the training loss of a model with heads is that of all of them together
    losses = {"training": run.column("train_loss")} if head is None else {}
    losses[run.split] = run.scored("loss")
    scores = {name: run.scored(key) for key, name in _SCORES.items()}
    for axes, values in ((loss, losses), (score, scores), (rate, {"": run.column("lr")})):
        drawn = [
            (line(axes, epochs, own, k), name)
            for k, (name, own) in enumerate(values.items(), start=int(axes is score))
            if np.isfinite(own).any()
        ]
        _finish(axes, [epochs])
        if drawn and axes is not rate:
            add_legend(axes, drawn, loc="best", fontsize=8)
        if run.chosen is not None:
            axes.axvline(run.chosen, color=GREY, linewidth=1, zorder=1)
    loss.set_ylim(bottom=0)
    return figure


def _draw_several(runs: Mapping[str, _Run], head: str | None) -> Figure:
    names = [shortened(name) for name in runs]
    splits = " or ".join(dict.fromkeys(run.split for run in runs.values()))
    figure = _new_figure(f"{', '.join(names)}; the epoch that is kept is marked", head, legend_width(names) + 0.2)
    panels = _panels(figure, ("training loss", f"{splits} loss", f"{splits} macro-F1"))
    for panel, axes in enumerate(panels):
        drawn = []
        for k, run in enumerate(runs.values()):
            values = (run.column("train_loss"), run.scored("loss"), run.scored("macro_f1"))[panel]
            epochs = run.column("epoch")
            drawn.append(line(axes, epochs, values, k))
            here = epochs == run.chosen
            axes.plot(epochs[here], values[here], "o", color=drawn[-1].get_color(), markersize=6)
        _finish(axes, [run.column("epoch") for run in runs.values()])
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    add_legend(panels[-1], list(zip(drawn, names, strict=True)), loc="upper left", bbox_to_anchor=(1.04, 1))
    return figure


def _new_figure(about: str, head: str | None, more: float = 0.0) -> Figure:
    title = "Curves by epoch" if head is None else f"Curves by epoch, head {shortened(head)}"
    figure = new_figure(_LEFT + 3 * _WIDTH + 2 * _GAP + 0.15 + more, _TOP + _HEIGHT + 0.5, f"{title}: {about}.")
    set_title(figure, title, about)
    return figure


def _panels(figure: Figure, titles: Sequence[str]) -> list[Axes]:
    panels = []
    for k, title in enumerate(titles):
        axes = add_axes(figure, _LEFT + k * (_WIDTH + _GAP), _TOP, _WIDTH, _HEIGHT)
        axes.set_title(title, loc="left", fontsize=9)
        panels.append(axes)
    return panels


def _finish(axes: Axes, epochs: Sequence[np.ndarray]) -> None:
    if max(map(len, epochs)) <= _FEW_EPOCHS:
        for drawn in axes.lines:
            if drawn.get_marker() == "None":
                drawn.set_marker(".")
    together = np.concatenate(epochs)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_xlim(together.min() - 0.5, together.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.margins(y=0.1)
