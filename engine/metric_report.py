"""The figures of ``metrics.json`` as text for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from engine.metrics import BINARY_METRIC_NAMES, ECE_BINS

_MORE_TOTALS = {
    "weighted F1": "weighted_f1",
    "Cohen's kappa": "cohen_kappa",
    "MCC": "mcc",
    "Brier": "brier",
}
_WITH_INTERVALS = {
    "accuracy": "accuracy",
    "balanced accuracy": "balanced_accuracy",
    "macro-F1": "macro_f1",
    "AUROC": "auroc_macro_ovr",
}
_CLASS_COLUMNS = {
    "precision": "precision",
    "recall": "recall",
    "specificity": "specificity",
    "f1": "f1",
    "support": "support",
    "auroc": "auroc",
    "ap": "average_precision",
}


def format_reports(metrics: Mapping[str, Any]) -> str:
    """``format_report`` of what metrics.json holds, and below it that of each head where there are any."""
    parts = [format_report(metrics)]
    for name, of_head in metrics.get("heads", {}).items():
        parts.append(f"Head {name}\n\n{format_report({'split': metrics['split'], **of_head})}")
    return "\n\n\n".join(parts)


def format_report(metrics: Mapping[str, Any], width: int = 120) -> str:
    """The figures of ``classification_metrics`` or ``final_metrics`` for a terminal of `width` columns.

    Lines of totals, a table with a row for each class, one of the operating points where there are any, and the
    confusion matrix; where that is wider than the terminal even with numbers for names, its largest off-diagonal cells
    instead.
    """
    totals = {
        "accuracy": metrics["accuracy"],
        "balanced accuracy": metrics["balanced_accuracy"],
        f"ECE ({ECE_BINS} bins)": metrics["ece"],
        "loss": metrics["loss"],
    }
    lines = []
    if metrics.get("selected_on") is not None and metrics["selected_on"] == metrics.get("split"):
        lines += [f"optimistic: the epoch was chosen on these very {metrics['split']} images", ""]
    lines += [_joined(totals), _joined({name: metrics[key] for name, key in _MORE_TOTALS.items()})]
    if "intervals" in metrics:
        ends = (f"{name} {_range(metrics['intervals'][key])}" for name, key in _WITH_INTERVALS.items())
        lines.append("95% intervals:   " + "   ".join(ends))
    if "calibrated" in metrics:
        calibrated = {name: metrics["calibrated"][name.lower()] for name in ("ECE", "loss", "Brier")}
        lines.append(f"at temperature {metrics['temperature']:.4g}:   {_joined(calibrated)}")
    if "positive_class" in metrics:
        figures = _joined({name.replace("_", " "): metrics[name] for name in BINARY_METRIC_NAMES})
        lines.append(f"positive class {metrics['positive_class']}:   {figures}")
    names = [_shortened(name) for name in metrics["per_class"]]
    confusion = metrics["confusion_matrix"]
    confusion_table = _confusion_table(names, confusion)
    if _columns(confusion_table[0]) > width:
        confusion_table = _confusion_table(names, confusion, numbered=True)
    if _columns(confusion_table[0]) > width:
        title, confusion_table = "Most frequent confusions", _largest_confusions(names, confusion)
    else:
        title = "Confusion matrix (rows: truth, columns: prediction)"
    lines += ["", *_class_table(names, metrics), ""]
    if "operating_points" in metrics:
        these = "these very images: in-sample" if metrics.get("split") == "validation" else "the validation images"
        lines += [f"Operating points (thresholds chosen on {these})", "", *_operating_points(metrics), ""]
    return "\n".join([*lines, title, "", *confusion_table])


def _joined(figures: Mapping[str, float | None]) -> str:
    return "   ".join(f"{name} {_figure(value)}" for name, value in figures.items())


def _class_table(names: Sequence[str], metrics: Mapping[str, Any]) -> list[str]:
    rows = [["class", *_CLASS_COLUMNS]]
    for name, row in zip(names, metrics["per_class"].values(), strict=True):
        rows.append([name, *(_figure(row[key]) for key in _CLASS_COLUMNS.values())])
    of_all = {key: metrics[f"macro_{key}"] for key in ("precision", "recall", "f1")} | {
        "support": sum(row["support"] for row in metrics["per_class"].values()),
        "auroc": metrics["auroc_macro_ovr"],
        "average_precision": metrics["average_precision_macro"],
    }
    cells = [_figure(of_all[key]) if key in of_all else "" for key in _CLASS_COLUMNS.values()]
    return _aligned([*rows, ["macro", *cells]])


def _operating_points(metrics: Mapping[str, Any]) -> list[str]:
    rows = [["class", "wanted", "threshold", "chosen on", "sensitivity", "95% interval", "specificity", "95% interval"]]
    for point in metrics["operating_points"]:
        tried = [
            cell
            for name in ("sensitivity", "specificity")
            for cell in (_figure(point[name]), _range(point[f"{name}_interval"]))
        ]
        threshold = "-" if point["threshold"] is None else f"{point['threshold']:.3g}"
        chosen = [f"{point['wanted_sensitivity']:g}", threshold, str(point["chosen_on"])]
        rows.append([_shortened(point["class"]), *chosen, *tried])
    return _aligned(rows)


def _confusion_table(names: Sequence[str], confusion: Sequence[Sequence[int]], numbered: bool = False) -> list[str]:
    labels = [str(label) for label in range(len(names))]
    rows = [["", *(labels if numbered else names)]]
    for label, counts in enumerate(confusion):
        # A dot for zero: what is left to read are the errors.
        cells = [str(count) if count else "." for count in counts]
        rows.append([f"{label:>{len(labels[-1])}} {names[label]}" if numbered else names[label], *cells])
    return _aligned(rows)


def _largest_confusions(names: Sequence[str], confusion: Sequence[Sequence[int]], shown: int = 20) -> list[str]:
    cells = [
        (count, truth, prediction)
        for truth, counts in enumerate(confusion)
        for prediction, count in enumerate(counts)
        if count and truth != prediction
    ]
    if not cells:
        return ["none"]
    rows = [["truth", "prediction", "samples", "of the class"]]
    for count, truth, prediction in sorted(cells, key=lambda cell: (-cell[0], cell[1:]))[:shown]:
        rows.append([names[truth], names[prediction], str(count), f"{count / sum(confusion[truth]):.1%}"])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first one to the left, the others to the right."""
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padding = [" " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)]
        right = (space + cell for cell, space in zip(row[1:], padding[1:], strict=True))
        lines.append("  ".join([row[0] + padding[0], *right]))
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _range(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"


def _shortened(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _columns(text: str) -> int:
    """Terminal columns: a Chinese, Japanese or Korean character takes two, a combining mark none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
