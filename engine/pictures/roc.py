"""ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.pictures.ranked_curves import Curve, Kind, curves_of, default_positive, draw, new_square
from engine.pictures.ranking import Ranking
from engine.pictures.style import GREY, add_legend, shortened
from engine.predictions import Predictions

_KIND = Kind(Ranking.roc, Ranking.auroc, Ranking.roc_on_grid, needs_others=True)
_MARKERS = "osD^v<>p"


def draw_roc(
    runs: Predictions | Mapping[str, Predictions],
    *,
    positive_class: str | None = None,
    operating_points: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Draws true against false positive rate, with the area under each curve in the legend.

    Of one run it is each class against the rest and their mean, of more than 8 classes the 5 worst and the mean; or the
    ``positive_class`` alone. Of several runs it is that class, or the mean of the classes: that of the true positive
    rates at each false positive rate, whose area is the macro AUROC.

    Args:
        runs: what a run says of its images, or several runs by name.
        positive_class: of two classes the second unless named.
        operating_points: those of ``metrics.json``; marked are those of the one class that is drawn, of one run.

    Raises:
        ValueError: there are no runs.
    """
    curves, about = curves_of(runs, positive_class, _KIND)
    points = []
    if isinstance(runs, Predictions):
        drawn = default_positive(runs, positive_class)
        points = [point for point in operating_points if point["class"] == drawn and _is_known(point)]
    texts = [_text(curve) for curve in curves] + [_point_text(point) for point in points]
    figure, axes = new_square(curves, "ROC", about, texts)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    lines = draw(axes, curves)
    marks = [_mark(axes, point, k) for k, point in enumerate(points)]
    axes.set_xlabel("false positive rate (1 - specificity)", fontsize=9)
    axes.set_ylabel("true positive rate (sensitivity)", fontsize=9)
    entries = list(zip([*lines, *marks], texts, strict=True))
    if entries:
        add_legend(axes, entries, loc="upper left", bbox_to_anchor=(1.03, 1), title="AUROC", alignment="left")
    return figure


def _text(curve: Curve) -> str:
    return f"{shortened(curve.name)}: {curve.area:.4f}"


def _point_text(point: Mapping[str, Any]) -> str:
    wanted, sensitivity, specificity = (point[key] for key in ("wanted_sensitivity", "sensitivity", "specificity"))
    return f"sensitivity {sensitivity:.3f} ({wanted:g} wanted),\nspecificity {specificity:.3f}"


def _is_known(point: Mapping[str, Any]) -> bool:
    return point["sensitivity"] is not None and point["specificity"] is not None


def _mark(axes: Axes, point: Mapping[str, Any], k: int) -> Line2D:
    marker = _MARKERS[k % len(_MARKERS)]
    place = [1 - point["specificity"]], [point["sensitivity"]]
    how: Any = {"linestyle": "none", "markersize": 7, "markerfacecolor": "white", "color": "black", "zorder": 4}
    return axes.plot(*place, marker, **how)[0]
