"""The tables of a report, from ``metrics.json`` and the run's other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.metrics import ECE_BINS
from engine.report.runs import ReportedRun

DASH = "\N{EN DASH}"
"""Stands where there is no figure."""
MOST_COLUMNS = 20
"""Classes up to which a confusion matrix is written out; of more the largest confusions are."""
_SHOWN_CONFUSIONS = 20

FIGURES = {
    "macro_f1": ("Macro-F1", "mean over the classes of F1, each counting the same"),
    "balanced_accuracy": ("Balanced accuracy", "mean over the classes of recall"),
    "accuracy": ("Accuracy", "share of images that are right; the frequent classes decide it"),
    "auroc_macro_ovr": ("AUROC, macro", "mean over the classes of the area under the ROC curve against the rest"),
    "average_precision_macro": ("Average precision, macro", "mean over the classes of the area under precision-recall"),
    "macro_precision": ("Macro-precision", "mean over the classes of precision"),
    "macro_recall": ("Macro-recall", "mean over the classes of recall"),
    "weighted_f1": ("Weighted F1", "mean of F1, the classes weighted by their images"),
    "cohen_kappa": ("Cohen's kappa", "agreement beyond chance: 0 none, 1 all"),
    "mcc": ("MCC", "correlation of truth and prediction, -1 to 1"),
    "ece": (f"ECE, {ECE_BINS} bins", "mean gap between confidence and accuracy; lower is better"),
    "loss": ("Loss", "mean of -log(probability of the truth), in nats; lower is better"),
    "brier": ("Brier score", "mean squared error of the probabilities; lower is better"),
}
MAIN_FIGURES = {
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "Balanced accuracy",
    "accuracy": "Accuracy",
    "auroc_macro_ovr": "AUROC",
    "average_precision_macro": "AP",
    "mcc": "MCC",
    "ece": "ECE",
    "brier": "Brier",
}
"""Those that stand side by side, under names that are short."""
BINARY_FIGURES = {
    "recall": ("Sensitivity", "recall: share of its images that are found"),
    "specificity": ("Specificity", "share of the other images that are left alone"),
    "precision": ("Precision", "share of its predictions that are right"),
    "f1": ("F1", "harmonic mean of precision and recall"),
    "auroc": ("AUROC", "chance that one of its images gets a higher probability than one of the others"),
    "average_precision": ("Average precision", "area under precision-recall"),
}


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, the number that it is of, what stands below it, and how far it is from another's.

    ``kind`` is "number", "range", "name" (of a file or class, which may be anything) or "text".
    """

    text: str
    value: float | None = None
    below: str = ""
    kind: str = "number"
    difference: str = ""


@dataclass(frozen=True)
class Table:
    """A table: the first cell of a row is its header; ``foot`` rows stand below a line."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Sequence[Cell]] = ()
    note: str = ""


def number(value: float | None, interval: Sequence[float] | None = None, digits: int = 4) -> Cell:
    """A figure, with its 95% interval below it."""
    if value is None:
        return Cell(DASH, below="undefined")
    text = str(value) if isinstance(value, int) else f"{value:.{digits}f}"
    return Cell(text, value, span(interval))


def span(interval: Sequence[float] | None, digits: int = 3) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else ""


def range_cell(interval: Sequence[float] | None) -> Cell:
    return Cell(span(interval) or DASH, kind="range")


def name(text: str, below: str = "") -> Cell:
    return Cell(text, below=below, kind="name")


def words(text: str, below: str = "") -> Cell:
    return Cell(text, below=below, kind="text")


def headline(metrics: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """The few figures that a report begins with: label and cell."""
    intervals = metrics.get("intervals", {})
    shown = [(FIGURES[key][0], key) for key in ("macro_f1", "balanced_accuracy", "auroc_macro_ovr", "accuracy")]
    tiles = [(label, number(metrics.get(key), intervals.get(key), digits=3)) for label, key in shown]
    if "positive_class" in metrics:
        found = {key: (metrics[key], binary_interval(metrics, key)) for key in ("recall", "specificity")}
        tiles = [(BINARY_FIGURES[key][0], number(*found[key], digits=3)) for key in found] + tiles
        return [tile for tile in tiles if tile[0] != "Balanced accuracy"]
    scaled = f"{metrics['calibrated']['ece']:.3f} scaled" if "calibrated" in metrics else ""
    return [*tiles, ("ECE", replace(number(metrics.get("ece"), digits=3), below=scaled))]


def binary_interval(metrics: Mapping[str, Any], key: str) -> Sequence[float] | None:
    """Of a figure of the positive class; the specificity of one class is the recall of the other."""
    of_class = metrics.get("intervals", {}).get("per_class", {})
    positive = metrics["positive_class"]
    if key == "specificity":
        others = [own for own in of_class if own != positive]
        interval: Sequence[float] | None = of_class[others[0]]["recall"] if others else None
        return interval
    own_interval: Sequence[float] | None = of_class.get(positive, {}).get(key)
    return own_interval


def figures_table(metrics: Mapping[str, Any]) -> Table:
    intervals = metrics.get("intervals", {})
    rows = [
        [words(label, below), number(metrics[key]), range_cell(intervals.get(key))]
        for key, (label, below) in FIGURES.items()
        if key in metrics
    ]
    return Table("Figures over all classes", ("Figure", "Value", "95% interval"), rows)


def binary_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [words(label, below), number(metrics[key]), range_cell(binary_interval(metrics, key))]
        for key, (label, below) in BINARY_FIGURES.items()
        if key in metrics
    ]
    return Table(
        f"Figures of the positive class, {metrics['positive_class']}", ("Figure", "Value", "95% interval"), rows
    )


def class_table(metrics: Mapping[str, Any]) -> Table:
    columns = {
        "Images": "support",
        "Recall": "recall",
        "Precision": "precision",
        "Specificity": "specificity",
        "F1": "f1",
        "AUROC": "auroc",
        "AP": "average_precision",
    }
    intervals = metrics.get("intervals", {}).get("per_class", {})
    rows = [
        [name(own), *(number(row.get(key), intervals.get(own, {}).get(key)) for key in columns.values())]
        for own, row in metrics["per_class"].items()
    ]
    of_all = {key: metrics.get(f"macro_{key}") for key in ("recall", "precision", "f1")} | {
        "support": sum(row["support"] for row in metrics["per_class"].values()),
        "auroc": metrics.get("auroc_macro_ovr"),
        "average_precision": metrics.get("average_precision_macro"),
    }
    foot = [words("All, macro"), *(number(of_all[key]) if key in of_all else words("") for key in columns.values())]
    return Table("Figures of each class against the rest", ("Class", *columns), rows, [foot])


def confusion_table(metrics: Mapping[str, Any]) -> Table:
    """The matrix, its columns by number where names are long; of many classes the most frequent confusions."""
    names, counts = list(metrics["per_class"]), metrics["confusion_matrix"]
    if len(names) > MOST_COLUMNS:
        return _largest_confusions(names, counts)
    numbered = max(map(len, names)) > 8 and len(names) > 4
    labels = [f"{i + 1}" for i in range(len(names))] if numbered else names
    rows = [
        [name(f"{i + 1} {own}" if numbered else own), *(number(count) for count in row)]
        for i, (own, row) in enumerate(zip(names, counts, strict=True))
    ]
    return Table("Confusion matrix: rows are the truth, columns the prediction", ("Truth", *labels), rows)


def _largest_confusions(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Table:
    cells = [
        (count, truth, prediction)
        for truth, row in enumerate(counts)
        for prediction, count in enumerate(row)
        if count and truth != prediction
    ]
    rows = [
        [name(names[truth]), name(names[prediction]), number(count), words(f"{count / sum(counts[truth]):.1%}")]
        for count, truth, prediction in sorted(cells, key=lambda cell: (-cell[0], cell[1:]))[:_SHOWN_CONFUSIONS]
    ]
    return Table("The most frequent confusions", ("Truth", "Prediction", "Images", "Of the class"), rows)


def operating_table(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [
            name(point["class"]),
            number(point["wanted_sensitivity"], digits=2),
            _threshold(point),
            number(point["chosen_on"]),
            number(point["sensitivity"], point["sensitivity_interval"]),
            number(point["specificity"], point["specificity_interval"]),
        ]
        for point in metrics["operating_points"]
    ]
    columns = ("Class", "Wanted sensitivity", "Threshold", "Chosen on", "Sensitivity", "Specificity")
    return Table("Operating points", columns, rows)


def _threshold(point: Mapping[str, Any]) -> Cell:
    """Of a cross-validation each fold has its own."""
    if point["threshold"] is not None:
        return Cell(f"{point['threshold']:.4g}", point["threshold"])
    of_folds = point.get("thresholds", [])
    return Cell(DASH, below=", ".join(DASH if value is None else f"{value:.3g}" for value in of_folds))


def folds_table(metrics: Mapping[str, Any]) -> Table | None:
    """A row a fold of a cross-validation, below it their mean and spread and the figure of all images together."""
    if "over_folds" not in metrics:
        return None
    folds, over = metrics["folds"], metrics["over_folds"]
    keys = [key for key in MAIN_FIGURES if key in over]
    rows = [
        [
            name(str(fold["fold"])),
            number(fold["images"]),
            number(fold.get("epoch")),
            *(number(fold[key]) for key in keys),
        ]
        for fold in folds
    ]
    foot = [
        [words(label), words(""), words(""), *(number(over[key][part]) for key in keys)]
        for label, part in (("Mean", "mean"), ("SD", "sd"))
    ]
    images = number(sum(fold["images"] for fold in folds))
    foot.append([words("All images"), images, words(""), *(number(metrics.get(key)) for key in keys)])
    return Table("Figures of each fold", ("Fold", "Images", "Epoch", *(MAIN_FIGURES[key] for key in keys)), rows, foot)


def calibration_table(metrics: Mapping[str, Any]) -> Table | None:
    """Before and after temperature scaling; None where there is no "after"."""
    if "calibrated" not in metrics:
        return None
    rows = [
        [words(FIGURES[key][0], FIGURES[key][1]), number(metrics[key]), number(metrics["calibrated"][key])]
        for key in ("ece", "loss", "brier")
    ]
    return Table("Before and after temperature scaling", ("Figure", "As trained", "Scaled"), rows)


def epochs_table(run: ReportedRun) -> Table:
    """The rows of ``summary.csv``, its main columns."""
    # the images that the epoch was chosen on
    split = "test" if "test_loss" in run.history[-1] else "val"
    labels = {
        "lr": "Learning rate",
        "train_loss": "Training loss",
        f"{split}_loss": "Test loss" if split == "test" else "Validation loss",
        f"{split}_accuracy": "Accuracy",
        f"{split}_balanced_accuracy": "Balanced accuracy",
        f"{split}_macro_f1": "Macro-F1",
    }
    chosen_by = run.args.get("eval_metric", "macro_f1")
    labels.setdefault(f"{split}_{chosen_by}", chosen_by)
    keys = [key for key in labels if key in run.history[-1]]
    rows = [[words(row["epoch"]), *(_logged(row.get(key)) for key in keys)] for row in run.history]
    return Table("Training by epoch", ("Epoch", *(labels[key] for key in keys)), rows)


def _logged(text: str | None) -> Cell:
    return Cell(f"{float(text):.4g}", float(text)) if text else Cell(DASH, below="undefined")


def balance_table(run: ReportedRun) -> Table | None:
    """Images of each class in each split, and the draws of all epochs; None where nothing says."""
    counts: dict[str, Mapping[str, int]] = dict(run.about.get("data", {}).get("counts", {}))
    drawn: dict[str, int] = {}
    trained: dict[str, int] = {}
    for row in run.draws:
        drawn[row["class"]] = drawn.get(row["class"], 0) + int(row["drawn"])
        trained[row["class"]] = int(row["images"])
    if not counts and trained:
        counts["train"] = trained
    if not counts:
        return None
    epochs = len({row["epoch"] for row in run.draws})
    classes = list(counts["train"])
    rows = []
    for own in classes:
        cells = [number(part.get(own, 0)) for part in counts.values()]
        if drawn:
            each = drawn.get(own, 0) / max(1, counts["train"][own]) / epochs
            cells += [number(drawn.get(own, 0) / epochs, digits=1), number(each, digits=2)]
        rows.append([name(own), *cells])
    totals = [number(sum(part.values())) for part in counts.values()]
    if drawn:
        totals += [number(sum(drawn.values()) / epochs, digits=1), words("")]
    columns = [f"{part.capitalize()} images" for part in counts] + (
        ["Drawn an epoch", "Draws an image"] if drawn else []
    )
    return Table("Images of each class", ("Class", *columns), rows, [[words("All"), *totals]])
