"""Several runs beside each other: figures, McNemar's test, recall by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import UserError
from engine.mcnemar import McNemar, compare_predictions
from engine.predictions import Predictions
from engine.report.runs import ReportedRun
from engine.report.tables import DASH, FIGURES, MAIN_FIGURES, Cell, Table, name, number, words

_LEVEL = 0.05


@dataclass(frozen=True)
class Pairing:
    """What became of the test of one run against the first: ``test`` on ``images``, or why there is none."""

    test: McNemar | None
    images: int
    remark: str = ""


def comparable(runs: Sequence[ReportedRun]) -> tuple[list[ReportedRun], list[str]]:
    """The runs whose figures mean the same as the first one's, itself included, and a line on each other one."""
    first, *others = runs
    kept, left_out = [first], []
    for run in others:
        if first.metrics is None or run.metrics is None:
            unfinished = first if first.metrics is None else run
            left_out.append(f"{run.name} is not compared: {unfinished.name} has not finished.")
        elif set(run.class_names) != set(first.class_names):
            left_out.append(
                f"{run.name} is not compared: its classes ({', '.join(run.class_names)}) are not those of {first.name} "
                f"({', '.join(first.class_names)})."
            )
        else:
            kept.append(run)
    return kept, left_out


def figures_table(runs: Sequence[ReportedRun]) -> Table:
    """A row a run: its figures, their intervals, and how far they are from the first run's."""
    first = runs[0].metrics or {}
    rows = []
    for run in runs:
        metrics = run.metrics or {}
        scored = sum(map(sum, metrics["confusion_matrix"]))
        cells: list[Cell] = [name(run.name, f"{scored:,} {metrics['split']} images")]
        for key in MAIN_FIGURES:
            cell = number(metrics.get(key), metrics.get("intervals", {}).get(key))
            if run is not runs[0] and metrics.get(key) is not None and first.get(key) is not None:
                difference = f"{metrics[key] - first[key]:+.4f}".replace("-", "\N{MINUS SIGN}")
                cell = replace(cell, difference=difference)
            cells.append(cell)
        rows.append(cells)
    return Table("Figures of the runs", ("Run", *MAIN_FIGURES.values()), rows)


def recall_table(runs: Sequence[ReportedRun]) -> Table:
    rows = []
    for own in runs[0].class_names:
        cells = []
        for run in runs:
            metrics = run.metrics or {}
            interval = metrics.get("intervals", {}).get("per_class", {}).get(own, {}).get("recall")
            cells.append(number(metrics["per_class"][own]["recall"], interval))
        rows.append([name(own), *cells])
    return Table("Recall of each class", ("Class", *(run.name for run in runs)), rows)


def pair(first: Predictions | None, second: Predictions | None) -> Pairing:
    """McNemar's test on the images that both predicted, which are matched by their names."""
    if first is None or second is None:
        return Pairing(None, 0, "no predictions.csv")
    shared = set(first.files) & set(second.files)
    if not shared:
        return Pairing(None, 0, "no image in common")
    alone = len(first.files) + len(second.files) - 2 * len(shared)
    try:
        test = compare_predictions(_only(first, shared), _only(second, shared))
    except UserError as error:
        return Pairing(None, len(shared), str(error))
    remark = f"not the same images: {alone} were predicted by one run only" if alone else ""
    return Pairing(test, len(shared), remark)


def mcnemar_table(runs: Sequence[ReportedRun]) -> Table:
    rows, note = [], ""
    for run in runs[1:]:
        found = pair(runs[0].predictions.get(None), run.predictions.get(None))
        if found.test is None:
            rows.append([name(run.name, found.remark), number(found.images), *[Cell(DASH)] * 4, words(DASH)])
            continue
        test, below = found.test, ("", "", "")
        if test.by_group is not None:
            total, for_first, for_this = map(_groups, (test.by_group.groups, test.by_group.b, test.by_group.c))
            below = (f"of {total}", f"more in {for_first}", f"more in {for_this}")
            note = (
                "Several images are of one group (patient): p and chi-square are those of whole groups, each of which "
                "counts by how many more of its images one run gets right."
            )
        counts = zip((found.images, test.b, test.c), below, strict=True)
        rows.append(
            [
                name(run.name, found.remark),
                *(replace(number(count), below=text) for count, text in counts),
                Cell(p_text(test.p_exact), test.p_exact),
                Cell(f"{test.chi2:.2f}", test.chi2),
                words(_reading(test, runs[0].name, run.name)),
            ]
        )
    columns = (
        *("Run", "Images of both", f"Only {runs[0].name} right", "Only this run right", "p, exact"),
        *("Chi-square", "Reading at 5%"),
    )
    return Table(f"McNemar's test against {runs[0].name}", columns, rows, note=note)


def p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.1e}" if p >= 1e-100 else "below 1e-100"


@dataclass(frozen=True)
class Mark:
    """A run's figure on an axis: its text, and where it and its interval are, in percent of the axis."""

    name: str
    text: str
    at: float | None
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Axis:
    """A figure of all runs, drawn from ``low`` to ``high``."""

    label: str
    low: str
    high: str
    marks: Sequence[Mark]


def interval_axes(runs: Sequence[ReportedRun]) -> list[Axis]:
    """The drawing of the main figures' intervals."""
    axes = []
    for key in ("macro_f1", "balanced_accuracy", "accuracy", "auroc_macro_ovr"):
        found = [_figure(run, key) for run in runs]
        ends = [end for value, interval in found if value is not None for end in (interval or [value])]
        if ends:
            low, high = _axis(min(ends), max(ends))
            marks = [_mark(run.name, *own, low, high) for run, own in zip(runs, found, strict=True)]
            axes.append(Axis(FIGURES[key][0], f"{low:g}", f"{high:g}", marks))
    return axes


def _figure(run: ReportedRun, key: str) -> tuple[float | None, Sequence[float] | None]:
    metrics = run.metrics or {}
    return metrics.get(key), metrics.get("intervals", {}).get(key)


def _mark(own: str, value: float | None, interval: Sequence[float] | None, low: float, high: float) -> Mark:
    def place(figure: float) -> float:
        return round(100 * (figure - low) / (high - low), 2) if high > low else 50.0

    start, end = map(place, interval) if interval else (None, None)
    return Mark(own, number(value, digits=3).text, None if value is None else place(value), start, end)


def _axis(low: float, high: float) -> tuple[float, float]:
    """Multiples of a tenth around both, within 0 and 1, or of a hundredth where they are close."""
    step = 0.1 if high - low > 0.05 else 0.01
    return max(0.0, math.floor(low / step) * step), min(1.0, math.ceil(high / step) * step)


def _reading(test: McNemar, first: str, second: str) -> str:
    if test.p_exact >= _LEVEL:
        return "no difference shown"
    return f"{first if test.b > test.c else second} is right more often"


def _groups(count: int) -> str:
    return f"{count:,} group{'' if count == 1 else 's'}"


def _only(predictions: Predictions, files: set[str]) -> Predictions:
    rows = [i for i, file in enumerate(predictions.files) if file in files]
    return Predictions(
        tuple(predictions.files[i] for i in rows),
        predictions.class_names,
        predictions.labels[rows],
        predictions.predictions[rows],
        predictions.probabilities[rows],
        None if predictions.groups is None else tuple(predictions.groups[i] for i in rows),
    )
