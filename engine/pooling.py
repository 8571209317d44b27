"""The figures of a cross-validation, by fold and of all images together, each scored by the model that has not seen it.

Accuracy, F1 and whatever else follows from counts is best taken of all images together. AUROC and average precision of
all together also compare the scores of one model with those of another, which need not be on one scale; their mean over
the folds does not. The standard deviation over folds says how much folds differ. It is no error of the mean, since any
two trainings share images; and an interval is that of these models, with other images.

Sources: Forman and Scholz, "Apples-to-Apples in Cross-Validation Studies: Pitfalls in Classifier Performance
Measurement" (2010); Bengio and Grandvalet, "No Unbiased Estimator of the Variance of K-Fold Cross-Validation" (2004).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import UserError
from engine.metrics import METRIC_NAMES, probability_figures
from engine.operating_points import tried
from engine.predictions import Predictions, read_predictions
from engine.scoring import Scored, final_metrics

SPLIT = "out of fold"
_SMALLEST = 2.0**-1074  # of float64 above 0


@dataclass(frozen=True, eq=False)
class Fold:
    """What a fold's run says of its test images, and with heads what each of them says.

    Attributes:
        metrics: what its metrics.json holds, or of a head the entry there.
    """

    number: int
    predictions: Predictions
    metrics: Mapping[str, Any]
    heads: Mapping[str, Fold] = field(default_factory=dict)


def read_fold(run_dir: Path, number: int) -> Fold:
    """Of a finished run. Raises UserError where its files cannot be read."""
    path = run_dir / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error}); remove it, and go on with --resume {run_dir}") from error
    if not _has_figures(metrics) or not all(map(_has_figures, metrics.get("heads", {}).values())):
        raise UserError(f"{path}: not the figures of a run; remove it, and go on with --resume {run_dir}")
    heads = {
        name: Fold(number, read_predictions(run_dir / f"predictions_{name}.csv"), of_head)
        for name, of_head in metrics.get("heads", {}).items()
    }
    return Fold(number, read_predictions(run_dir / "predictions.csv"), metrics, heads)


def _has_figures(metrics: Any) -> bool:
    return isinstance(metrics, dict) and "temperature" in metrics


def pooled_predictions(folds: Sequence[Fold]) -> Predictions:
    """Those of all folds, one after the other. Raises UserError where classes differ, or only some have groups."""
    parts = [fold.predictions for fold in folds]
    for part, fold in zip(parts, folds, strict=True):
        if part.class_names != parts[0].class_names or (part.groups is None) != (parts[0].groups is None):
            raise UserError(
                f"fold {fold.number} has other classes or columns than fold {folds[0].number}: they are of other data; "
                "train one of them again"
            )
    return Predictions(
        tuple(file for part in parts for file in part.files),
        parts[0].class_names,
        torch.cat([part.labels for part in parts]),
        torch.cat([part.predictions for part in parts]),
        torch.cat([part.probabilities for part in parts]),
        None if parts[0].groups is None else tuple(group for part in parts for group in part.groups or ()),
        tuple(fold.number for fold in folds for _ in fold.predictions.files),
    )


def pooled_metrics(folds: Sequence[Fold]) -> dict[str, Any]:
    """What metrics.json of a cross-validation holds.

    - The figures of `final_metrics`, of the images of all folds together. ``temperature`` is None, and ``calibrated``
      is at the temperature of each image's fold, where all have one. An operating point has the ``thresholds`` of the
      folds, each tried on the fold's own images.
    - ``folds``: of each its number as ``fold``, ``images``, ``epoch``, ``temperature`` and all single figures.
    - ``over_folds``: ``{figure: {mean, sd, folds}}`` over the folds where it is defined, ``folds`` in number; the
      standard deviation with one less in the denominator, None of a single fold.
    - ``heads``: of a model with heads the same of each one.
    """
    predictions = pooled_predictions(folds)
    scored = Scored(
        predictions.files,
        predictions.class_names,
        _logits(predictions.probabilities),
        predictions.labels,
        groups=predictions.groups,
    )
    metrics = {
        "split": SPLIT,
        **final_metrics(scored, None, split=SPLIT, temperature=None, sensitivities=()),
    }
    temperatures = [fold.metrics["temperature"] for fold in folds]
    if None not in temperatures:
        parts = [
            _logits(fold.predictions.probabilities) / value for fold, value in zip(folds, temperatures, strict=True)
        ]
        metrics["calibrated"] = probability_figures(torch.cat(parts), predictions.labels)
    if all("operating_points" in fold.metrics for fold in folds):
        metrics["operating_points"] = _operating_points(folds, predictions)
    metrics["folds"] = [
        {
            "fold": fold.number,
            "images": len(fold.predictions.files),
            **{name: fold.metrics[name] for name in ("epoch", "temperature", *METRIC_NAMES) if name in fold.metrics},
        }
        for fold in folds
    ]
    metrics["over_folds"] = {
        name: _spread([fold.metrics[name] for fold in folds])
        for name in METRIC_NAMES
        if all(name in fold.metrics for fold in folds)
    }
    heads = dict.fromkeys(name for fold in folds for name in fold.heads)
    if heads:
        of_head = {name: [fold.heads[name] for fold in folds if name in fold.heads] for name in heads}
        metrics["heads"] = {name: pooled_metrics(own) for name, own in of_head.items()}
    return metrics


def _logits(probabilities: Tensor) -> Tensor:
    """Of which they are the softmax; a probability that was rounded to 0 counts as the smallest number above it."""
    return probabilities.clamp(min=_SMALLEST).log()


def _operating_points(folds: Sequence[Fold], pooled: Predictions) -> list[dict[str, Any]]:
    points = []
    for of_folds in zip(*(fold.metrics["operating_points"] for fold in folds), strict=True):
        label = pooled.class_names.index(of_folds[0]["class"])
        thresholds = [point["threshold"] for point in of_folds]
        called = None
        if None not in thresholds:
            scores = [fold.predictions.probabilities[:, label] for fold in folds]
            called = torch.cat([own >= threshold for own, threshold in zip(scores, thresholds, strict=True)])
        points.append(
            {
                "class": of_folds[0]["class"],
                "wanted_sensitivity": of_folds[0]["wanted_sensitivity"],
                "threshold": None,
                "thresholds": thresholds,
                "chosen_on": sum(point["chosen_on"] for point in of_folds),
                **tried(called, pooled.labels == label, pooled.groups),
            }
        )
    return points


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    defined = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(defined) if defined else None,
        "sd": statistics.stdev(defined) if len(defined) > 1 else None,
        "folds": len(defined),
    }
