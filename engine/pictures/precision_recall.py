"""Precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from engine.pictures.ranked_curves import Curve, Kind, curves_of, draw, new_square
from engine.pictures.ranking import Ranking
from engine.pictures.style import add_legend, shortened
from engine.predictions import Predictions

_KIND = Kind(Ranking.precision_recall, Ranking.average_precision, Ranking.precision_recall_on_grid, needs_others=False)


def draw_precision_recall(
    runs: Predictions | Mapping[str, Predictions], *, positive_class: str | None = None
) -> Figure:
    """Draws precision against recall, with the average precision of each curve in the legend.

    Which curves there are is said at `draw_roc`; the mean here is that of the precisions at each recall. They are
    steps, so that the area under a curve is its average precision. A dotted line at the prevalence of the class is what
    chance would give.

    Args:
        runs: what a run says of its images, or several runs by name.
        positive_class: of two classes the second unless named.

    Raises:
        ValueError: there are no runs.
    """
    curves, about = curves_of(runs, positive_class, _KIND)
    texts = [_text(curve) for curve in curves]
    if any(curve.prevalence is not None for curve in curves):
        about += "; dotted: chance"
    figure, axes = new_square(curves, "Precision and recall", about, texts)
    lines = draw(axes, curves, drawstyle="steps-pre")
    for curve, shown in zip(curves, lines, strict=True):
        if curve.prevalence is not None:
            axes.axhline(curve.prevalence, color=shown.get_color(), linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel("recall (sensitivity)", fontsize=9)
    axes.set_ylabel("precision", fontsize=9)
    if curves:
        add_legend(
            axes,
            list(zip(lines, texts, strict=True)),
            loc="upper left",
            bbox_to_anchor=(1.03, 1),
            title="average precision",
            alignment="left",
        )
    return figure


def _text(curve: Curve) -> str:
    chance = "" if curve.prevalence is None else f" (chance {curve.prevalence:.2g})"
    return f"{shortened(curve.name)}: {curve.area:.4f}{chance}"
