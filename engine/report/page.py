"""The page: what stands in it, and its HTML."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.data.listing import printable
from engine.predictions import Predictions
from engine.report import comparison, tables
from engine.report.cautions import comparison_cautions, run_cautions, scored_split, selecting_split
from engine.report.drawings import (
    Picture,
    draw_all_curves,
    draw_balance,
    draw_confusion,
    draw_figures_by_class,
    draw_own_curves,
    draw_precision_recall_curves,
    draw_rankings,
    draw_reliability_diagram,
    draw_roc_curves,
)
from engine.report.mistakes import Mistake
from engine.report.runs import ReportedRun
from engine.report.settings import data_name, differences_table, settings_table, without_folders
from engine.report.tables import Cell, Table

_TEMPLATES = Path(__file__).parent.parent / "templates"


@dataclass(frozen=True)
class Scores:
    """What the templates show of one ``metrics.json``, or of a head in it."""

    headline: Sequence[tuple[str, Cell]]
    figures: Table
    classes: Table
    by_class: Picture
    confusion: Picture
    confusion_values: Table
    whole_matrix: bool
    split: str
    in_sample: bool
    temperature: float | None
    groups: int | None = None
    folds: Table | None = None
    positive: str | None = None
    binary: Table | None = None
    operating: Table | None = None
    calibration: Table | None = None
    roc: Picture | None = None
    precision_recall: Picture | None = None
    reliability: Picture | None = None


@dataclass(frozen=True)
class Head:
    name: str
    scores: Scores


@dataclass(frozen=True)
class RunView:
    """What the templates show of a run. ``prefix`` begins the ids of its sections."""

    name: str
    prefix: str
    model: str
    data: str
    split: str
    selected_on: str
    epoch: int | None
    chosen_by: str
    images: int
    started: str
    warnings: Sequence[tuple[str, str]]
    scores: Scores | None
    heads: Sequence[Head]
    end_to_end: bool
    mistakes: Sequence[Mistake]
    mistakes_remark: str
    curves: Picture | None
    epochs: Table | None
    balance: Picture | None
    balance_values: Table | None
    description: str
    left_out: Sequence[Mapping[str, str]] | None
    settings: Table
    args_text: str
    versions: Sequence[tuple[str, str]]
    device: str
    precision: str


@dataclass(frozen=True)
class ComparisonView:
    first: str
    remarks: Sequence[str]
    differences: Table | None
    figures: Table | None = None
    intervals: Sequence[comparison.Axis] = ()
    mcnemar: Table | None = None
    recall: Table | None = None
    by_class: Picture | None = None
    rankings: Sequence[Picture] | None = None
    curves: Picture | None = None


@dataclass(frozen=True)
class Page:
    title: str
    kind: str
    heading: str
    runs: Sequence[RunView]
    comparison: ComparisonView | None = None
    contents: Sequence[tuple[str, str, Sequence[tuple[str, str]]]] = field(default_factory=list)


def make_page(runs: Sequence[ReportedRun], mistakes: Sequence[tuple[Sequence[Mistake], str]]) -> str:
    """The HTML of a report.

    Args:
        runs: at least one.
        mistakes: of each run what its section of mistakes shows, and a remark below it.
    """
    single = len(runs) == 1
    views = [
        _view(run, "" if single else f"run{i}-", *own)
        for i, (run, own) in enumerate(zip(runs, mistakes, strict=True), start=1)
    ]
    if single:
        page = Page(f"{views[0].name}: report", "Training report", views[0].name, views, contents=_contents(views[0]))
    else:
        compared = _compare(runs)
        own = [(f"{view.prefix}run", view.name, [(id, text) for id, text, _ in _contents(view)]) for view in views]
        contents = [*_contents_of_comparison(compared), *own]
        heading = f"{len(runs)} runs compared"
        page = Page(f"{heading}: report", "Training report", heading, views, compared, contents)
    return _environment().get_template("report.html").render(page=page)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # a name from a file system may hold what is no character
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    numbers = itertools.count(1)

    def unique(stem: str) -> str:
        return f"{stem}-{next(numbers)}"

    environment.globals["unique"] = unique
    # two runs may have the very same drawing, with the same ids in it
    environment.filters["drawing"] = lambda picture: picture.with_ids(unique("drawing"))
    return environment


def _view(run: ReportedRun, prefix: str, mistakes: Sequence[Mistake], mistakes_remark: str) -> RunView:
    metrics = run.metrics
    data = run.about.get("data", {})
    heads = (metrics or {}).get("heads", {})
    return RunView(
        name=run.name,
        prefix=prefix,
        model=str(run.args.get("model", "unknown")),
        data=data_name(run.args),
        split=scored_split(metrics),
        selected_on=selecting_split(metrics),
        epoch=metrics.get("epoch") if metrics else None,
        chosen_by=str(run.args.get("eval_metric", "macro_f1")).replace("_", " "),
        images=sum(map(sum, metrics["confusion_matrix"])) if metrics else 0,
        started=str(run.about.get("started", "")),
        warnings=run_cautions(run),
        scores=_scores(metrics, metrics, run.predictions.get(None)) if metrics else None,
        heads=[Head(head, _scores(own, metrics or {}, run.predictions.get(head))) for head, own in heads.items()],
        end_to_end=all(list(own["per_class"]) != list(run.class_names) for own in heads.values()),
        mistakes=mistakes,
        mistakes_remark=mistakes_remark,
        curves=draw_own_curves(run),
        epochs=tables.epochs_table(run) if run.history else None,
        balance=draw_balance(run),
        balance_values=tables.balance_table(run),
        description=without_folders(str(data.get("description", "")), run.args),
        left_out=data.get("left_out"),
        settings=settings_table(run),
        args_text=run.args_text,
        versions=sorted(run.about.get("versions", {}).items()),
        device=str(run.about.get("device", "")),
        precision=str(run.about.get("precision", "")),
    )


def _scores(metrics: Mapping[str, Any], of_run: Mapping[str, Any], predictions: Predictions | None) -> Scores:
    binary = "positive_class" in metrics
    return Scores(
        headline=tables.headline(metrics),
        figures=tables.figures_table(metrics),
        classes=tables.class_table(metrics),
        by_class=draw_figures_by_class(metrics),
        confusion=draw_confusion(metrics),
        confusion_values=tables.confusion_table(metrics),
        whole_matrix=len(metrics["per_class"]) <= tables.MOST_COLUMNS,
        split=scored_split(of_run),
        in_sample=scored_split(of_run) == "validation",
        temperature=metrics.get("temperature"),
        groups=metrics.get("groups") if metrics.get("intervals_by") == "group" else None,
        folds=tables.folds_table(metrics),
        positive=metrics.get("positive_class"),
        binary=tables.binary_table(metrics) if binary else None,
        operating=tables.operating_table(metrics) if metrics.get("operating_points") else None,
        calibration=tables.calibration_table(metrics),
        roc=draw_roc_curves(predictions, metrics) if predictions else None,
        precision_recall=draw_precision_recall_curves(predictions, metrics) if predictions else None,
        reliability=draw_reliability_diagram(predictions, metrics) if predictions else None,
    )


def _compare(runs: Sequence[ReportedRun]) -> ComparisonView:
    compared, remarks = comparison.comparable(runs)
    remarks += comparison_cautions(compared)
    shared: dict[str, Any] = {}
    if len(compared) > 1:
        shared = {
            "figures": comparison.figures_table(compared),
            "intervals": comparison.interval_axes(compared),
            "mcnemar": comparison.mcnemar_table(compared),
            "recall": comparison.recall_table(compared),
            "by_class": draw_figures_by_class({run.name: run.metrics for run in compared}),
            "rankings": draw_rankings(compared),
        }
    return ComparisonView(runs[0].name, remarks, differences_table(runs), curves=draw_all_curves(runs), **shared)


def _contents_of_comparison(compared: ComparisonView) -> list[tuple[str, str, Sequence[tuple[str, str]]]]:
    sections = [
        ("comparison", "Comparison", True),
        ("mcnemar", "Test", compared.mcnemar),
        ("recall", "By class", compared.recall),
        ("thresholds", "Thresholds", compared.rankings),
        ("curves", "Training", compared.curves),
        ("differences", "Differences", True),
    ]
    return [(id, text, ()) for id, text, is_there in sections if is_there]


def _contents(view: RunView) -> list[tuple[str, str, Sequence[tuple[str, str]]]]:
    scores = view.scores
    sections = [
        ("folds", "Folds", scores and scores.folds),
        ("positive", "Positive class", scores and scores.binary),
        ("classes", "Classes", scores),
        ("thresholds", "Thresholds", scores and (scores.roc or scores.operating)),
        ("calibration", "Calibration", scores),
        ("figures", "All figures", scores),
        ("heads", "Heads", view.heads),
        ("mistakes", "Worst mistakes", scores),
        ("training", "Training", view.curves),
        ("data", "Data", True),
        ("configuration", "Configuration", True),
    ]
    return [(view.prefix + id, text, ()) for id, text, is_there in sections if is_there]
