"""The figures of ``metrics.json``, with scikit-learn's definitions, gathered without waiting for the device.

Sources: Brodersen et al., "The Balanced Accuracy and Its Posterior Distribution" (2010); Guo et al., "On Calibration of
Modern Neural Networks" (2017) for the expected calibration error; section 3.2 of the design.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from engine.errors import UserError

ECE_BINS = 15

BINARY_METRIC_NAMES = ("precision", "recall", "f1")
_HIGHER_IS_BETTER = {
    "macro_f1": True,
    "accuracy": True,
    "balanced_accuracy": True,
    "macro_precision": True,
    "macro_recall": True,
    "auroc_macro_ovr": True,
    "ece": False,
    "loss": False,
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
        positive_class: for two classes, the one that precision, recall and f1 speak of; the second unless named.

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
        """The contents of ``metrics.json``; see ``classification_metrics``."""
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
    - ``ece``: expected calibration error of the largest probability: 15 bins of equal width, lower edges included.
    - ``loss``: mean cross-entropy in nats, without class weights or smoothing.
    - ``confusion_matrix``: rows are truth, columns prediction.
    - ``per_class``: ``{name: {precision, recall, f1, support, auroc}}``.
    - For two classes ``positive_class`` (the second unless named) and its ``precision``, ``recall``, ``f1``.

    Raises:
        ValueError: there are no samples, a logit is not finite, or a label is out of range.
        UserError: `positive_class` is no class, or there are not two classes.
    """
    positive_class = _positive_class(class_names, positive_class)
    logits, labels = logits.detach().cpu().double(), labels.detach().cpu().long()
    _check_samples(logits, labels, len(class_names))
    probabilities = logits.softmax(dim=1)
    predictions = logits.argmax(dim=1)

    confusion = multiclass_confusion_matrix(predictions, labels, num_classes=len(class_names), validate_args=False)
    correct, predicted, support = confusion.diag(), confusion.sum(dim=0), confusion.sum(dim=1)
    precision, recall = _ratio(correct, predicted), _ratio(correct, support)
    f1 = _ratio(2 * correct, predicted + support)
    auroc = [_auroc_against_rest(probabilities[:, label], labels == label) for label in range(len(class_names))]
    defined_auroc = [area for area in auroc if area is not None]
    occurs = predicted + support > 0

    metrics: dict[str, Any] = {
        "accuracy": int(correct.sum()) / len(labels),
        "balanced_accuracy": recall[support > 0].mean().item(),
        "macro_f1": f1[occurs].mean().item(),
        "macro_precision": precision[occurs].mean().item(),
        "macro_recall": recall[occurs].mean().item(),
        "auroc_macro_ovr": sum(defined_auroc) / len(defined_auroc) if defined_auroc else None,
        "ece": _expected_calibration_error(probabilities, predictions == labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "confusion_matrix": confusion.tolist(),
        "per_class": {
            name: {
                "precision": precision[label].item(),
                "recall": recall[label].item(),
                "f1": f1[label].item(),
                "support": int(support[label]),
                "auroc": auroc[label],
            }
            for label, name in enumerate(class_names)
        },
    }
    if positive_class is not None:
        metrics["positive_class"] = positive_class
        metrics |= {name: metrics["per_class"][positive_class][name] for name in BINARY_METRIC_NAMES}
    return metrics


def format_report(metrics: Mapping[str, Any], width: int = 120) -> str:
    """The figures of ``classification_metrics`` for a terminal of `width` columns.

    A line of totals, a table with a row for each class, and the confusion matrix; where that is wider than the terminal
    even with numbers for names, its largest off-diagonal cells instead.
    """
    totals = {
        "accuracy": metrics["accuracy"],
        "balanced accuracy": metrics["balanced_accuracy"],
        f"ECE ({ECE_BINS} bins)": metrics["ece"],
        "loss": metrics["loss"],
    }
    lines = ["   ".join(f"{name} {_figure(value)}" for name, value in totals.items())]
    if "positive_class" in metrics:
        figures = "   ".join(f"{name} {_figure(metrics[name])}" for name in BINARY_METRIC_NAMES)
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
    return "\n".join([*lines, "", *_class_table(names, metrics), "", title, "", *confusion_table])


def check_metric_name(name: str, num_classes: int) -> None:
    """Raises UserError unless `name` is a single figure that ``metrics.json`` has for that number of classes."""
    if name not in METRIC_NAMES:
        raise UserError(f"--eval-metric {name}: unknown; choose one of {', '.join(METRIC_NAMES)}")
    if name in BINARY_METRIC_NAMES and num_classes != 2:
        raise UserError(f"--eval-metric {name}: only for two classes, here are {num_classes}; use macro_{name}")


def higher_is_better(name: str) -> bool:
    """False for ``loss`` and ``ece``. Raises UserError for a name that is not in METRIC_NAMES."""
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


def _check_samples(logits: Tensor, labels: Tensor, num_classes: int) -> None:
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


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Where the denominator is 0 the numerator is too, and 0 / 1 is scikit-learn's zero_division=0.
    return numerator.double() / denominator.clamp(min=1)


def _auroc_against_rest(scores: Tensor, positive: Tensor) -> float | None:
    if positive.all() or not positive.any():
        return None
    # torchmetrics adds the areas up in float32, which can end just above 1.
    return min(1.0, binary_auroc(scores, positive.long(), validate_args=False).item())


def _expected_calibration_error(probabilities: Tensor, correct: Tensor) -> float:
    # Not torchmetrics': it sums in float32, which at 100,000 samples is off by 2e-5.
    confidence = probabilities.amax(dim=1)
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence)
    return gaps.abs().sum().item() / len(correct)


def _class_table(names: Sequence[str], metrics: Mapping[str, Any]) -> list[str]:
    rows = [["class", "precision", "recall", "f1", "support", "auroc"]]
    for name, row in zip(names, metrics["per_class"].values(), strict=True):
        ratios = (_figure(row[key]) for key in ("precision", "recall", "f1"))
        rows.append([name, *ratios, str(row["support"]), _figure(row["auroc"])])
    means = (_figure(metrics[key]) for key in ("macro_precision", "macro_recall", "macro_f1"))
    support = sum(row["support"] for row in metrics["per_class"].values())
    return _aligned([*rows, ["macro", *means, str(support), _figure(metrics["auroc_macro_ovr"])]])


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
    return "-" if value is None else f"{value:.4f}"


def _shortened(name: str, longest: int = 28) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _columns(text: str) -> int:
    """Terminal columns: a Chinese, Japanese or Korean character takes two, a combining mark none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
