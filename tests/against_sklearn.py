"""The figures of a finished run beside scikit-learn's, computed from the predictions that the run wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

PRECISION = 1e-6


def require_sklearns_figures(run_dir: Path) -> dict[str, Any]:
    """Compares all of metrics.json, that of each head too, with predictions.csv; what metrics.json holds."""
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    compare_with_sklearn(metrics, run_dir / "predictions.csv")
    for head, of_head in metrics.get("heads", {}).items():
        compare_with_sklearn(of_head, run_dir / f"predictions_{head}.csv")
    return metrics


def compare_with_sklearn(metrics: dict[str, Any], predictions: Path) -> None:
    """Every figure that scikit-learn has, to 1e-6, of all classes together and of each one."""
    names, truth, predicted, probabilities = _read(predictions)
    classes = np.arange(len(names))
    assert list(metrics["per_class"]) == names
    assert metrics["confusion_matrix"] == sk.confusion_matrix(truth, predicted, labels=classes).tolist()

    occurring = sorted({*truth, *predicted})
    of_each = {"labels": occurring, "zero_division": 0.0}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(truth, predicted, average="macro", **of_each)
    aurocs, average_precisions = (_by_class(score, truth, probabilities) for score in (_auroc, _average_precision))
    present = np.isin(classes, truth)
    expected = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.recall_score(
            truth, predicted, labels=classes[present], average="macro", zero_division=0.0
        ),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "weighted_f1": sk.f1_score(truth, predicted, average="weighted", **of_each),
        "mcc": sk.matthews_corrcoef(truth, predicted),
        "loss": sk.log_loss(truth, probabilities, labels=classes),
        "auroc_macro_ovr": _mean(aurocs),
        "average_precision_macro": _mean(average_precisions),
    }
    _require_equal({name: metrics[name] for name in expected}, expected)

    of_each["labels"] = classes
    columns = sk.precision_recall_fscore_support(truth, predicted, average=None, **of_each)
    for label, name in enumerate(names):
        own = dict(zip(("precision", "recall", "f1", "support"), (column[label] for column in columns), strict=True))
        own |= {"auroc": aurocs[label], "average_precision": average_precisions[label]}
        _require_equal({key: metrics["per_class"][name][key] for key in own}, own)
    if len(names) == 2:
        assert metrics["positive_class"] == names[1]
        for key in ("precision", "recall", "f1", "auroc", "average_precision"):
            assert metrics[key] == metrics["per_class"][names[1]][key]


def _read(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Class names; truth (n,), prediction (n,) and probabilities (n, classes)."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    names = [column.removeprefix("prob_") for column in header[3:]]
    truth, predicted = (np.array([names.index(row[column]) for row in rows]) for column in (1, 2))
    return names, truth, predicted, np.array([[float(number) for number in row[3:]] for row in rows])


def _by_class(score: Any, truth: np.ndarray, probabilities: np.ndarray) -> list[float | None]:
    return [score(truth == label, own) for label, own in enumerate(probabilities.T)]


def _auroc(is_true: np.ndarray, probabilities: np.ndarray) -> float | None:
    return sk.roc_auc_score(is_true, probabilities) if is_true.any() and not is_true.all() else None


def _average_precision(is_true: np.ndarray, probabilities: np.ndarray) -> float | None:
    return sk.average_precision_score(is_true, probabilities) if is_true.any() else None


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _require_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert got[name] == (None if value is None else pytest.approx(value, rel=0, abs=PRECISION)), name
