"""Every figure of metrics.json by scikit-learn, of any predictions and of those that a run has saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from engine.metrics import BINARY_METRIC_NAMES
from engine.predictions import predictions_path, read_predictions

PRECISION = 1e-6


def sklearns_figures(
    truth: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], loss: float | None = None
) -> dict[str, Any]:
    """What ``classification_metrics`` gives; where scikit-learn has nothing of it, or refuses, by the formula.

    Args:
        truth: (n,) labels; probabilities: (n, classes).
        loss: the mean of -log(probability of the truth) where scikit-learn, which counts what is below 1e-15 as that,
            cannot know it.
    """
    prediction, (samples, classes) = probabilities.argmax(axis=1), probabilities.shape
    macro, weighted = ({"average": average, "zero_division": 0} for average in ("macro", "weighted"))
    columns = sk.precision_recall_fscore_support(truth, prediction, labels=range(classes), zero_division=0)
    per_class: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(class_names):
        is_it, scores = truth == label, probabilities[:, label]
        both = 0 < is_it.sum() < samples
        per_class[name] = {
            **dict(zip(("precision", "recall", "f1", "support"), (column[label] for column in columns), strict=True)),
            "auroc": sk.roc_auc_score(is_it, scores) if both else None,
            "average_precision": sk.average_precision_score(is_it, scores) if is_it.any() else None,
            # the recall of what is not of the class
            "specificity": sk.recall_score(~is_it, prediction != label, zero_division=0),
        }

    def mean_of(name: str) -> float | None:
        defined = [row[name] for row in per_class.values() if row[name] is not None]
        return float(np.mean(defined)) if defined else None

    kappa = sk.cohen_kappa_score(truth, prediction)
    figures = {
        "accuracy": sk.accuracy_score(truth, prediction),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, prediction),
        "macro_f1": sk.f1_score(truth, prediction, **macro),
        "macro_precision": sk.precision_score(truth, prediction, **macro),
        "macro_recall": sk.recall_score(truth, prediction, **macro),
        "auroc_macro_ovr": mean_of("auroc"),
        "ece": _expected_calibration_error(probabilities.max(axis=1), prediction == truth),
        "loss": sk.log_loss(truth, probabilities, labels=range(classes)) if loss is None else loss,
        "brier": 0.0,
        "weighted_f1": sk.f1_score(truth, prediction, **weighted),
        "average_precision_macro": mean_of("average_precision"),
        "cohen_kappa": None if np.isnan(kappa) else kappa,
        "mcc": sk.matthews_corrcoef(truth, prediction),
        "confusion_matrix": sk.confusion_matrix(truth, prediction, labels=range(classes)).tolist(),
        "per_class": per_class,
    }
    if classes == 2:
        figures["brier"] = sk.brier_score_loss(truth, probabilities[:, 1], pos_label=1)
        positive = class_names[1]
        figures |= {"positive_class": positive} | {name: per_class[positive][name] for name in BINARY_METRIC_NAMES}
    elif classes > 2:  # of one class scikit-learn has none
        figures["brier"] = sk.brier_score_loss(truth, probabilities, labels=list(range(classes)))
    return figures


def require_equal(metrics: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """To 1e-6; ``metrics`` may hold more."""
    for name, value in expected.items():
        assert name in metrics
        if isinstance(value, dict):
            assert metrics[name].keys() == value.keys()
            require_equal(metrics[name], value)
        else:
            exact = value is None or isinstance(value, list | str)
            assert metrics[name] == (value if exact else pytest.approx(value, rel=0, abs=PRECISION)), name


def compare_with_sklearn(metrics: Mapping[str, Any], predictions: Path) -> None:
    """Every figure, as scikit-learn has it of the saved predictions."""
    told = read_predictions(predictions)
    probabilities = told.probabilities.numpy()
    assert told.predictions.tolist() == probabilities.argmax(axis=1).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without images
        require_equal(metrics, sklearns_figures(told.labels.numpy(), probabilities, told.class_names))


def require_sklearns_figures(run_dir: Path) -> dict[str, Any]:
    """Compares all of metrics.json, that of each head too, with the saved predictions; what metrics.json holds."""
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    for head, own in {None: metrics, **metrics.get("heads", {})}.items():
        compare_with_sklearn(own, predictions_path(run_dir / "predictions.csv", head))
    return metrics


def _expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    error = 0.0
    for k in range(15):
        own = (k / 15 <= confidence) & ((confidence < (k + 1) / 15) | (k == 14))
        if own.any():
            error += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return error
