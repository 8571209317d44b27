"""The figures of metrics.json against scikit-learn's of the saved predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk

from engine.predictions import Predictions


def assert_figures_follow(metrics: Mapping[str, Any], told: Predictions) -> None:
    """Of predictions among which every class has an image, and not every image."""
    classes = range(len(told.class_names))
    truth, predicted, p = told.labels.numpy(), told.predictions.numpy(), told.probabilities.numpy()
    assert predicted.tolist() == p.argmax(axis=1).tolist()
    of_class = sk.precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    auroc = [sk.roc_auc_score(truth == k, p[:, k]) for k in classes]
    ap = [sk.average_precision_score(truth == k, p[:, k]) for k in classes]
    assert metrics["confusion_matrix"] == sk.confusion_matrix(truth, predicted, labels=classes).tolist()
    columns = dict(zip(("precision", "recall", "f1", "support"), of_class, strict=True))
    columns |= {"auroc": np.array(auroc), "average_precision": np.array(ap)}
    columns["specificity"] = np.array([sk.recall_score(truth != k, predicted != k, zero_division=0) for k in classes])
    for k, name in enumerate(told.class_names):
        assert metrics["per_class"][name] == pytest.approx({key: row[k] for key, row in columns.items()}, abs=1e-6)
    averages = {"macro_precision": 0, "macro_recall": 1, "macro_f1": 2}
    expected = {name: of_class[i].mean() for name, i in averages.items()} | {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "weighted_f1": sk.f1_score(truth, predicted, average="weighted", zero_division=0),
        "auroc_macro_ovr": np.mean(auroc),
        "average_precision_macro": np.mean(ap),
        "cohen_kappa": sk.cohen_kappa_score(truth, predicted),
        "mcc": sk.matthews_corrcoef(truth, predicted),
        "loss": sk.log_loss(truth, p, labels=classes),
        "brier": sk.brier_score_loss(truth, p, labels=classes),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
