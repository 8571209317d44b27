"""The drawings of a report, as SVG that stands in the page itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from engine.pictures import (
    alt_text,
    draw_class_balance,
    draw_class_figures,
    draw_confusion_matrix,
    draw_curves,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    to_svg,
)
from engine.predictions import Predictions
from engine.report.runs import ReportedRun

_PIXELS_AN_INCH = 92
_NAMESPACES = (' xmlns="http://www.w3.org/2000/svg"', ' xmlns:xlink="http://www.w3.org/1999/xlink"')
"""What an SVG element says in a file of its own; in HTML it is known."""
_ID = re.compile(r'(id="|href="#|url\(#)p[0-9a-f]{10}-')
"""An id, or a reference to one, as `to_svg` begins them."""


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element, what it shows in words, and how many CSS pixels wide it is made to be."""

    svg: str
    label: str
    width: int

    def with_ids(self, prefix: str) -> Markup:
        """The element for a page, where its ids begin with ``prefix``."""
        # to_svg has escaped every name that it was given
        return Markup(_ID.sub(rf"\g<1>{prefix}-", self.svg))


def as_picture(figure: Figure) -> Picture:
    svg = to_svg(figure)
    for namespace in _NAMESPACES:
        svg = svg.replace(namespace, "", 1)
    return Picture(svg, alt_text(figure), round(figure.get_size_inches()[0] * _PIXELS_AN_INCH))


def draw_confusion(metrics: Mapping[str, Any]) -> Picture:
    return as_picture(draw_confusion_matrix(metrics))


def draw_figures_by_class(metrics: Mapping[str, Any]) -> Picture:
    """Of what metrics.json holds, or of several runs' by name."""
    return as_picture(draw_class_figures(metrics))


def draw_roc_curves(predictions: Predictions, metrics: Mapping[str, Any]) -> Picture:
    points = metrics.get("operating_points", ())
    positive = metrics.get("positive_class")
    return as_picture(draw_roc(predictions, positive_class=positive, operating_points=points))


def draw_precision_recall_curves(predictions: Predictions, metrics: Mapping[str, Any]) -> Picture:
    return as_picture(draw_precision_recall(predictions, positive_class=metrics.get("positive_class")))


def draw_reliability_diagram(predictions: Predictions, metrics: Mapping[str, Any]) -> Picture:
    """With a second one at the temperature, where that was fitted on other images."""
    temperature = metrics.get("temperature") if "calibrated" in metrics else None
    return as_picture(draw_reliability(predictions, temperature=temperature))


def draw_own_curves(run: ReportedRun) -> Picture | None:
    chosen = run.metrics.get("epoch") if run.metrics else None
    return as_picture(draw_curves(run.history, chosen=chosen)) if run.history else None


def draw_all_curves(runs: Sequence[ReportedRun]) -> Picture | None:
    """Of the runs that have any."""
    drawn = {run.name: run.history for run in runs if run.history}
    chosen = {run.name: run.metrics["epoch"] for run in runs if run.metrics and run.history}
    return as_picture(draw_curves(drawn, chosen=chosen)) if len(drawn) > 1 else None


def draw_rankings(runs: Sequence[ReportedRun]) -> tuple[Picture, Picture] | None:
    """ROC and precision-recall curves of the runs that have predictions; None of fewer than two."""
    drawn = {run.name: run.predictions[None] for run in runs if None in run.predictions}
    return (as_picture(draw_roc(drawn)), as_picture(draw_precision_recall(drawn))) if len(drawn) > 1 else None


def draw_balance(run: ReportedRun) -> Picture | None:
    return as_picture(draw_class_balance(run.draws)) if run.draws else None
