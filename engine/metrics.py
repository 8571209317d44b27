"""The figures of ``metrics.json``, with scikit-learn's definitions, gathered without waiting for the device.

Sources: Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution" (2010); Cohen, "A Coefficient of
Agreement for Nominal Scales" (1960); Gorodkin, "Comparing Two K-Category Assignments by a K-Category Correlation
Coefficient" (2004) for MCC; Brier, "Verification of Forecasts Expressed in Terms of Probability" (1950); Guo et al.,
"On Calibration of Modern Neural Networks" (2017) for the expected calibration error; section 3.2 of the design.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from engine.errors import UserError

ECE_BINS = 15

_OF_ALL_CLASSES = {
    "precision": "macro_precision",
    "recall": "macro_recall",
    "f1": "macro_f1",
    "specificity": "balanced_accuracy",
    "auroc": "auroc_macro_ovr",
    "average_precision": "average_precision_macro",
}
BINARY_METRIC_NAMES = tuple(_OF_ALL_CLASSES)
_HIGHER_IS_BETTER = {
    "macro_f1": True,
    "accuracy": True,
    "balanced_accuracy": True,
    "macro_precision": True,
    "macro_recall": True,
    "auroc_macro_ovr": True,
    "ece": False,
    "loss": False,
    "weighted_f1": True,
    "average_precision_macro": True,
    "cohen_kappa": True,
    "mcc": True,
    "brier": False,
    **dict.fromkeys(BINARY_METRIC_NAMES, True),
}
METRIC_NAMES = tuple(_HIGHER_IS_BETTER)


class ClassificationMetrics(Metric):
    """Gathers logits and labels on `device` and scores them all at once.

    ``update`` never waits for the device. ``compute`` copies everything to the CPU and works in float64 there, so that
    the same logits give the same figures wherever they came from. Under torch.distributed, ``compute`` gathers the
    samples of all ranks first.

    Args:
        class_names: the names of labels 0, 1, ...
        device: where updates come from, and where they are kept: 4 * (classes + 2) bytes a sample.
        positive_class: for two classes, the one that precision, recall, AUROC and so on speak of; the second
            unless named.

    Raises:
        UserError: `positive_class` is no class, or there are not two classes.
    """

    full_state_update = False
    is_differentiable = False

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self, class_names: Sequence[str], device: torch.device | str = "cpu", *, positive_class: str | None = None
    ) -> None:
        super().__init__()
        self.class_names = tuple(class_names)
        self.positive_class = _positive_class(self.class_names, positive_class)
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")
        self.to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits (N, classes), any floating dtype; labels (N,), any integer dtype. Both are copied.

        Raises:
            ValueError: the shapes are others.
        """
        if logits.dim() != 2 or logits.shape[1] != len(self.class_names) or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"expected logits (N, {len(self.class_names)}) and labels (N,), "
                f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
            )
        # Copied, because an input pipeline or a CUDA graph may write the next batch into the same memory.
        self.logits.append(logits.detach().to(self.device, torch.float32, copy=True))
        self.labels.append(labels.detach().to(self.device, torch.int64, copy=True))

    def compute(self) -> dict[str, Any]:
        """See ``classification_metrics``, which this calls."""
        if not len(self.logits):
            raise ValueError("no samples to score: the data set is empty")
        return classification_metrics(
            dim_zero_cat(self.logits), dim_zero_cat(self.labels), self.class_names, self.positive_class
        )


def classification_metrics(
    logits: Tensor, labels: Tensor, class_names: Sequence[str], positive_class: str | None = None
) -> dict[str, Any]:
    """Scores logits (N, classes) against labels (N,): plain Python numbers, None where a figure is undefined.

    - ``accuracy``; ``balanced_accuracy``: the mean recall of the classes that have samples.
    - ``macro_f1``, ``macro_precision``, ``macro_recall``: the mean over the classes that occur in truth or prediction;
      a ratio of nothing to nothing is 0.
    - ``auroc_macro_ovr``: the mean of each class's exact area under the ROC curve against the rest, over the classes
      that have one: a sample of their own, and one outside.
    - ``average_precision_macro``: the mean of each class's average precision against the rest, over those with samples.
    - ``weighted_f1``: the mean over the samples of the F1 of their class.
    - ``cohen_kappa``: agreement beyond chance; None where truth and prediction are one and the same single class.
    - ``mcc``: the K-category correlation; 0 where truth or prediction is a single class.
    - ``brier``: the mean over the samples of the sum over the classes of (probability - truth)^2, 0 to 2; for two
      classes half of that, which is the positive class's own.
    - ``ece``: expected calibration error of the largest probability: 15 bins of equal width, lower edges included.
    - ``loss``: mean cross-entropy in nats, without class weights or smoothing.
    - ``confusion_matrix``: rows are truth, columns prediction.
    - ``per_class``: ``{name: {precision, recall, f1, support, auroc, average_precision, specificity}}``, the last
      three of the class against the rest.
    - For two classes ``positive_class`` (the second unless named) and its ``precision``, ``recall``, ``f1``,
      ``specificity``, ``auroc``, ``average_precision``.

    Raises:
        ValueError: there are no samples, a logit is not finite, or a label is out of range.
        UserError: `positive_class` is no class, or there are not two classes.
    """
    positive_class = _positive_class(class_names, positive_class)
    logits, labels = checked_samples(logits, labels, len(class_names))
    probabilities, predictions = logits.softmax(dim=1), logits.argmax(dim=1)
    confusion = multiclass_confusion_matrix(predictions, labels, num_classes=len(class_names), validate_args=False)
    support = confusion.sum(dim=1)
    figures, of_class = count_figures(confusion.diag(), confusion.sum(dim=0), support)
    against_rest = [(probabilities[:, label], labels == label) for label in range(len(class_names))]
    auroc = [_auroc(scores, positive) for scores, positive in against_rest]
    average_precision = [_average_precision(scores, positive) for scores, positive in against_rest]
    kappa = figures["cohen_kappa"].item()

    metrics: dict[str, Any] = {
        "accuracy": figures["accuracy"].item(),
        "balanced_accuracy": figures["balanced_accuracy"].item(),
        "macro_f1": figures["macro_f1"].item(),
        "macro_precision": figures["macro_precision"].item(),
        "macro_recall": figures["macro_recall"].item(),
        "auroc_macro_ovr": _mean_of_defined(auroc),
        **probability_figures(logits, labels),
        "weighted_f1": figures["weighted_f1"].item(),
        "average_precision_macro": _mean_of_defined(average_precision),
        "cohen_kappa": None if math.isnan(kappa) else kappa,
        "mcc": figures["mcc"].item(),
        "confusion_matrix": confusion.tolist(),
        "per_class": {
            name: {
                "precision": of_class["precision"][label].item(),
                "recall": of_class["recall"][label].item(),
                "f1": of_class["f1"][label].item(),
                "support": int(support[label]),
                "auroc": auroc[label],
                "average_precision": average_precision[label],
                "specificity": of_class["specificity"][label].item(),
            }
            for label, name in enumerate(class_names)
        },
    }
    if positive_class is not None:
        metrics["positive_class"] = positive_class
        metrics |= {name: metrics["per_class"][positive_class][name] for name in BINARY_METRIC_NAMES}
    return metrics


def count_figures(correct: Tensor, predicted: Tensor, support: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The figures that follow from counts: those of all classes together, and those of each class.

    Args:
        correct, predicted, support: (..., classes) integers: of each class, the samples that are of it and predicted
            so, that are predicted so, and that are of it.

    Returns:
        Float64: {name: (...)} and {name: (..., classes)}. ``cohen_kappa`` is NaN where it is undefined.
    """
    correct, predicted, support = correct.double(), predicted.double(), support.double()
    samples = support.sum(dim=-1)
    precision, recall = _ratio(correct, predicted), _ratio(correct, support)
    f1 = _ratio(2 * correct, predicted + support)
    others = samples[..., None] - support
    specificity = _ratio(others - predicted + correct, others)

    occurs = predicted + support > 0
    by_chance = (predicted * support).sum(dim=-1)
    beyond_chance = samples * correct.sum(dim=-1) - by_chance
    spread = (samples**2 - predicted.square().sum(dim=-1)).sqrt() * (samples**2 - support.square().sum(dim=-1)).sqrt()
    figures = {
        "accuracy": correct.sum(dim=-1) / samples,
        "balanced_accuracy": _mean_where(support > 0, recall),
        "macro_f1": _mean_where(occurs, f1),
        "macro_precision": _mean_where(occurs, precision),
        "macro_recall": _mean_where(occurs, recall),
        "weighted_f1": (f1 * support).sum(dim=-1) / samples,
        "cohen_kappa": beyond_chance / (samples**2 - by_chance),
        "mcc": torch.where(spread > 0, beyond_chance / spread, 0.0),
    }
    return figures, {"precision": precision, "recall": recall, "f1": f1, "specificity": specificity}


def probability_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``ece``, ``loss`` and ``brier`` of logits (N, classes) float64 and labels (N,); see `classification_metrics`."""
    probabilities = logits.softmax(dim=1)
    truth = F.one_hot(labels, logits.shape[1])
    brier = (probabilities - truth).square().sum(dim=1).mean().item()
    return {
        "ece": _expected_calibration_error(probabilities, logits.argmax(dim=1) == labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "brier": brier / 2 if logits.shape[1] == 2 else brier,
    }


def checked_samples(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Both on the CPU, float64 and int64. Raises ValueError as `classification_metrics` does."""
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    if len(labels) == 0:
        raise ValueError("no samples to score: the data set is empty")
    broken = int((~logits.isfinite().all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"logits hold NaN or infinity in {broken} of {len(labels)} samples: training has diverged, "
            "or the weights are damaged"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, there are {num_classes} classes")
    return logits, labels


def check_metric_name(name: str, num_classes: int) -> None:
    """Raises UserError unless `name` is a single figure that ``metrics.json`` has for that number of classes."""
    if name not in METRIC_NAMES:
        raise UserError(f"--eval-metric {name}: unknown; choose one of {', '.join(METRIC_NAMES)}")
    if name in BINARY_METRIC_NAMES and num_classes != 2:
        raise UserError(
            f"--eval-metric {name}: only for two classes, here are {num_classes}; use {_OF_ALL_CLASSES[name]}"
        )


def higher_is_better(name: str) -> bool:
    """False for ``loss``, ``ece`` and ``brier``. Raises UserError for a name that is not in METRIC_NAMES."""
    if name not in _HIGHER_IS_BETTER:
        raise UserError(f"--eval-metric {name}: unknown; choose one of {', '.join(METRIC_NAMES)}")
    return _HIGHER_IS_BETTER[name]


def metric_is_better(name: str, value: float | None, best: float | None) -> bool:
    """Whether `value` beats `best` in metric `name`: any number beats None, None beats nothing, a tie is no better."""
    sign = 1 if higher_is_better(name) else -1
    return value is not None and (best is None or sign * value > sign * best)


def _positive_class(class_names: Sequence[str], positive_class: str | None) -> str | None:
    if len(class_names) == 2:
        positive_class = class_names[1] if positive_class is None else positive_class
        if positive_class not in class_names:
            raise UserError(f"positive class {positive_class!r}: the classes are {', '.join(class_names)}")
    elif positive_class is not None:
        raise UserError(f"positive class {positive_class!r}: only for two classes, here are {len(class_names)}")
    return positive_class


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Where the denominator is 0 the numerator is too, and 0 / 1 is scikit-learn's zero_division=0.
    return numerator / denominator.clamp(min=1)


def _mean_where(mask: Tensor, values: Tensor) -> Tensor:
    return (values * mask).sum(dim=-1) / mask.sum(dim=-1)


def _mean_of_defined(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _auroc(scores: Tensor, positive: Tensor) -> float | None:
    if positive.all() or not positive.any():
        return None
    # torchmetrics adds the areas up in float32, which can end just above 1.
    return min(1.0, binary_auroc(scores, positive.long(), validate_args=False).item())


def _average_precision(scores: Tensor, positive: Tensor) -> float | None:
    """The mean over the positive samples of the precision at their score: ties share a threshold."""
    if not positive.any():
        return None
    # Not torchmetrics', for the same reason as below.
    descending, order = scores.sort(descending=True)
    found = positive[order].double().cumsum(dim=0)
    precision = found / torch.arange(1, len(scores) + 1)
    last_of_a_tie = torch.ones_like(positive)
    last_of_a_tie[:-1] = descending.diff() != 0
    gained = found[last_of_a_tie].diff(prepend=found.new_zeros(1))
    return ((gained * precision[last_of_a_tie]).sum() / found[-1]).item()


def _expected_calibration_error(probabilities: Tensor, correct: Tensor) -> float:
    # Not torchmetrics': it sums in float32, which at 100,000 samples is off by 2e-5.
    confidence = probabilities.amax(dim=1)
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence)
    return gaps.abs().sum().item() / len(correct)
