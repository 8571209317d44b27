"""What a run minimises: a loss, the weights of its classes, and the sum of squares of the parameters.

Class counts are those of the training images, whatever the sampler draws. Every loss works in float32 or wider and
takes labels (N,) int64 or, but for LDAM, class probabilities (N, classes) as MixUp and CutMix make them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.classifier import COSINE_SCALE
from engine.config import Config
from engine.data.sampler import effective_weights, sampling_weights
from engine.errors import UserError

LARGEST_MARGIN = 0.5
MOST_CORRECTION = 1.25
"""What `_correction` may be before it is told."""


def make_criterion(
    config: Config, counts: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[int], nn.Module]:
    """The criterion of each epoch: ``make_criterion(...)(epoch)(logits, targets)`` is the mean loss of a batch.

    Before ``config.drw_epoch`` the class weights do not count (deferred re-weighting; Cao et al. 2019).

    Args:
        config: its loss, class weights and smoothing.
        counts: (classes,) training images of each class; none counts as one.
        dtype: of the class weights, margins and priors.

    Raises:
        UserError: there are not as many class weights as classes.
    """
    counts = np.maximum(counts, 1).astype(np.float64)
    weights = class_weights(config, counts)
    before, after = (_criterion(config, counts, w).to(device, dtype) for w in (None, weights))
    return lambda epoch: before if epoch < config.drw_epoch else after


def _criterion(config: Config, counts: np.ndarray, weights: np.ndarray | None) -> nn.Module:
    weight = None if weights is None else torch.from_numpy(weights)
    if config.loss == "ldam":
        return LDAMLoss(torch.from_numpy(COSINE_SCALE * ldam_margins(counts)), weight)
    smoothing = config.smoothing
    if smoothing is None:
        smoothing = 0.1 if config.loss == "cross-entropy" else 0.0
    options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing}
    if config.loss == "focal":
        return FocalLoss(config.focal_gamma, **options)
    if config.loss == "logit-adjustment":
        return LogitAdjustedLoss(torch.from_numpy(config.tau * np.log(counts / counts.sum())), **options)
    return CrossEntropyLoss(**options)


def class_weights(config: Config, counts: np.ndarray) -> np.ndarray | None:
    """(classes,) float64 of ``config.class_weights``, or None for "none".

    "balanced" is n / (classes * count), scikit-learn's. The others sum to the number of classes: "sqrt" is in
    proportion to 1 / sqrt(count), "effective" to (1 - beta) / (1 - beta^count) (Cui et al., "Class-Balanced Loss Based
    on Effective Number of Samples", CVPR 2019).
    """
    wanted, classes = config.class_weights, len(counts)
    if wanted == "none":
        return None
    if wanted == "balanced":
        return counts.sum() / (classes * counts)
    if wanted in ("sqrt", "effective"):
        weights = counts**-0.5 if wanted == "sqrt" else effective_weights(counts, config.class_weights_beta)
        return weights * (classes / weights.sum())
    if len(wanted) != classes:
        raise UserError(
            f"--class-weights {' '.join(f'{weight:g}' for weight in wanted)}: {len(wanted)} of them, but the data has "
            f"{classes} classes; give one a class in sorted order, or balanced or effective"
        )
    return np.array(wanted, dtype=np.float64)


def twice_corrected(config: Config, counts: np.ndarray) -> str | None:
    """One line that says so where the sampler and the loss together more than make up for the imbalance.

    Args:
        counts: (classes,) training images of each class.
    """
    if config.sampling in ("none", "column"):
        return None
    if config.loss == "logit-adjustment":
        flag = "--loss logit-adjustment"
    elif config.class_weights in ("balanced", "sqrt", "effective"):
        flag = f"--class-weights {config.class_weights}"
        if _correction(config, counts[counts > 0]) <= MOST_CORRECTION:
            return None
    else:
        return None
    return (
        f"--sampling {config.sampling} and {flag} both make up for rare classes, which then count for more than common "
        "ones; --sampling none leaves it to the loss"
    )


def _correction(config: Config, counts: np.ndarray) -> float:
    """How much more the rarest class counts for than the most common one, by the sampler and the loss together."""
    drawn = sampling_weights(counts, config.sampling, config.sampling_alpha, config.sampling_beta)
    weights = class_weights(config, counts.astype(np.float64))
    together = counts * drawn * (1.0 if weights is None else weights)
    return float(together[counts.argmin()] / together[counts.argmax()])


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch's, in float32 or wider."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(_widened(logits), targets)


class FocalLoss(nn.Module):
    """-w_k (1 - p_k)^gamma log p_k of the true class k, p = softmax(logits); averaged as by ``nn.CrossEntropyLoss``.

    The softmax form, for classes that exclude each other, of Lin et al., "Focal Loss for Dense Object Detection", ICCV
    2017, whose own is that of a sigmoid; for two classes they are the same. ``weight`` is its alpha. Targets of several
    classes, by MixUp or smoothing, weigh the losses of these classes.

    Shape: logits (N, classes) of any floating dtype; targets (N,) int64 or (N, classes) floating; to a scalar.
    """

    def __init__(self, gamma: float, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.weight: Tensor | None
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = _widened(logits).log_softmax(dim=1)
        # At p = 1 the slope of the power may be infinite, and that of the loss is 0
        rest = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
        losses = -(rest**self.gamma) * log_p
        if self.weight is not None:
            losses = losses * self.weight
        total: Tensor | int = len(targets)
        if not targets.is_floating_point():
            if self.weight is not None:
                total = self.weight[targets].sum()
            targets = torch.zeros_like(losses).scatter_(1, targets[:, None], 1)
        targets = (1 - self.label_smoothing) * targets + self.label_smoothing / losses.shape[1]
        return (targets * losses).sum() / total


class LDAMLoss(CrossEntropyLoss):
    """Cross-entropy with the true class's logit lowered by its margin.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019. ``margins``
    (classes,) are on the scale of the logits: those of `ldam_margins`, which are of cosines, times the scale.

    Shape: logits (N, classes) of any floating dtype; labels (N,) int64; to a scalar.
    """

    margins: Tensor

    def __init__(self, margins: Tensor, weight: Tensor | None = None) -> None:
        super().__init__(weight)
        self.register_buffer("margins", margins)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None]
        return super().forward(_widened(logits).scatter_add(1, own, -self.margins[own]), labels)


def ldam_margins(counts: np.ndarray) -> np.ndarray:
    """(classes,) margins of cosines, in proportion to count^(-1/4), the largest 0.5."""
    margins = counts**-0.25
    return margins * (LARGEST_MARGIN / margins.max())


class LogitAdjustedLoss(CrossEntropyLoss):
    """Cross-entropy of logits plus ``adjustment`` (classes,): tau * log of each class's share of the training images.

    Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021. With tau = 1 it is the balanced softmax of Ren
    et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020. The logits as they are then
    predict as if every class were equally common.

    Shape: logits (N, classes) of any floating dtype; targets (N,) int64 or (N, classes) floating; to a scalar.
    """

    adjustment: Tensor

    def __init__(self, adjustment: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(weight, label_smoothing=label_smoothing)
        self.register_buffer("adjustment", adjustment)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(_widened(logits) + self.adjustment, targets)


def sum_of_squares(parameters: Iterable[Tensor]) -> Tensor:
    """The scalar sum of the squares of all elements, whose gradient is twice each parameter."""
    total: Tensor = _SumOfSquares.apply(*parameters)
    return total


class _SumOfSquares(torch.autograd.Function):
    """A few kernels for all parameters together, where autograd's own would take several for each of them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.stack(torch._foreach_norm(parameters)).square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul(ctx.saved_tensors, 2 * grad))


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
