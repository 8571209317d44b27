"""What ROC and precision-recall pictures share: which curves are shown, and the square that they are shown in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.pictures.ranking import Ranking, rank, thinned
from engine.pictures.style import BLACK, GREY, add_axes, legend_width, line, new_figure, set_title, shortened
from engine.predictions import Predictions

MOST_CLASSES = 8
"""Classes up to which each has a curve of its own; of more the ``WORST`` have one, and the mean of all."""
WORST = 5

_SIDE, _LEFT, _TOP = 3.8, 0.6, 0.65
_Points = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """What is shown of a ranking: its points, the area, the points on a common grid; and whether it needs others."""

    points: Callable[[Ranking], _Points]
    area: Callable[[Ranking], float]
    on_grid: Callable[[Ranking], _Points]
    needs_others: bool


@dataclass(frozen=True, eq=False)
class Curve:
    """A line of the picture: of one class, whose share of the images is its ``prevalence``, or the mean of several.

    ``stands_out`` is for a mean among the classes that it is of.
    """

    name: str
    points: _Points
    area: float
    prevalence: float | None = None
    stands_out: bool = False


def default_positive(predictions: Predictions, positive_class: str | None) -> str | None:
    """The class that is drawn alone: the one that is named, or of two the second."""
    two = len(predictions.class_names) == 2
    return predictions.class_names[1] if positive_class is None and two else positive_class


def curves_of(
    runs: Predictions | Mapping[str, Predictions], positive_class: str | None, kind: Kind
) -> tuple[list[Curve], str]:
    """The curves to draw, and in a line of words what they are. Raises ValueError where there are no runs."""
    if isinstance(runs, Predictions):
        positive_class = default_positive(runs, positive_class)
        if positive_class is None:
            return _curves_of_classes(runs, kind)
        runs = {positive_class: runs}
    if not runs:
        raise ValueError("no predictions to draw")
    positive_class = default_positive(next(iter(runs.values())), positive_class)
    if positive_class is None:
        means = [_mean(name, _rankings(run, kind), kind) for name, run in runs.items()]
        return [mean for mean in means if mean is not None], "mean of the classes, each against the rest"
    own = {name: _rankings(run, kind, positive_class).get(positive_class) for name, run in runs.items()}
    curves = [_curve(name, ranking, kind) for name, ranking in own.items() if ranking is not None]
    return curves, f"{shortened(positive_class)} against the rest"


def new_square(curves: Sequence[Curve], title: str, about: str, legend: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes from 0 to 1 with room for a legend of these texts at their right."""
    figure = new_figure(
        _LEFT + _SIDE + 0.2 + max(legend_width(legend), 1.2),
        _TOP + _SIDE + 0.5,
        f"{title}: {about}. {' '.join('; '.join(legend).split()) or 'No curve'}.",
    )
    set_title(figure, title, about)
    axes = add_axes(figure, _LEFT, _TOP, _SIDE, _SIDE)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    if not curves:
        axes.text(0.5, 0.5, "undefined: it needs images\nof the class and of others", ha="center", color=GREY)
    return figure, axes


def draw(axes: Axes, curves: Sequence[Curve], **how: Any) -> list[Line2D]:
    """The curves as lines; one that stands out is black and wide."""
    lines = []
    for k, curve in enumerate(curves):
        x, y = thinned(*curve.points)
        apart: dict[str, Any] = {"color": BLACK, "linestyle": "-", "linewidth": 2.6} if curve.stands_out else {}
        lines.append(line(axes, x, y, k, **apart, **how))
    return lines


def _curves_of_classes(predictions: Predictions, kind: Kind) -> tuple[list[Curve], str]:
    rankings = _rankings(predictions, kind)
    mean = _mean("mean", rankings, kind, stands_out=True)
    areas = {name: kind.area(ranking) for name, ranking in rankings.items()}
    shown, about = list(rankings), "each class against the rest"
    if len(rankings) > MOST_CLASSES:
        shown = sorted(areas, key=areas.__getitem__)[:WORST]
        about = f"{about}: the {WORST} worst of {len(rankings)} classes"
    absent = len(predictions.class_names) - len(rankings)
    if absent:
        about += f" ({absent} without images)" if rankings else ""
    curves = [_curve(name, rankings[name], kind) for name in shown]
    return [*curves, mean] if mean is not None and len(rankings) > 1 else curves, about


def _rankings(predictions: Predictions, kind: Kind, only: str | None = None) -> dict[str, Ranking]:
    """Each class's against the rest, of those for which it is defined."""
    labels, probabilities = predictions.labels.numpy(), predictions.probabilities.numpy()
    counts = np.bincount(labels, minlength=len(predictions.class_names))
    return {
        name: rank(probabilities[:, label], labels == label)
        for label, name in enumerate(predictions.class_names)
        if only in (None, name) and counts[label] and (counts[label] < len(labels) or not kind.needs_others)
    }


def _curve(name: str, ranking: Ranking, kind: Kind) -> Curve:
    return Curve(name, kind.points(ranking), kind.area(ranking), ranking.prevalence)


def _mean(name: str, rankings: Mapping[str, Ranking], kind: Kind, *, stands_out: bool = False) -> Curve | None:
    """The mean of the curves at each place of the grid, and of their areas."""
    if not rankings:
        return None
    points = [kind.on_grid(ranking) for ranking in rankings.values()]
    area = float(np.mean([kind.area(ranking) for ranking in rankings.values()]))
    return Curve(name, (points[0][0], np.mean([y for _, y in points], axis=0)), area, stands_out=stands_out)
