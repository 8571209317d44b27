"""Each loss for imbalanced classes against its paper's formula, in float64, with its gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from engine.classifier import CosineLinear
from engine.config import Config
from engine.errors import UserError
from engine.losses import FocalLoss, class_weights, make_criterion, sum_of_squares, twice_corrected

CPU = torch.device("cpu")
COUNTS = np.array([500, 3, 60, 21])
N, K = 7, len(COUNTS)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and class probabilities as MixUp makes them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, K, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1, 0, 0])
    onehot = F.one_hot(labels, K).double()
    return logits.requires_grad_(), labels, onehot.lerp(onehot.roll(1, 0), 0.3)


def criterion(counts: np.ndarray = COUNTS, epoch: int = 0, **options) -> torch.nn.Module:
    return make_criterion(Config(**options), counts, CPU, torch.float64)(epoch)


def assert_same(loss: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (wanted,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-12)


# Lin et al. 2017, equation 4, with the probability of a softmax
def focal(z: Tensor, y: int) -> Tensor:
    p = z[y].exp() / z.exp().sum()
    return -((1 - p) ** 1.5) * p.log()


# Cao et al. 2019, equations 11 and 13: the largest margin is 0.5, and cosines are scaled by 30
def ldam(z: Tensor, y: int) -> Tensor:
    scale = 0.5 / max(1 / n ** (1 / 4) for n in COUNTS)
    own = (z[y] - 30 * scale / COUNTS[y] ** (1 / 4)).exp()
    others = sum(z[j].exp() for j in range(K) if j != y)
    return -(own / (own + others)).log()


# Menon et al. 2021, equation 10
def logit_adjustment(z: Tensor, y: int) -> Tensor:
    share = COUNTS / COUNTS.sum()
    return (1 + sum((share[j] / share[y]) ** 0.7 * (z[j] - z[y]).exp() for j in range(K) if j != y)).log()


# Ren et al. 2020, equation 4
def balanced_softmax(z: Tensor, y: int) -> Tensor:
    return -(COUNTS[y] * z[y].exp() / sum(COUNTS[j] * z[j].exp() for j in range(K))).log()


FORMULAS = (
    (focal, {"loss": "focal", "focal_gamma": 1.5}),
    (logit_adjustment, {"loss": "logit-adjustment", "tau": 0.7}),
    (balanced_softmax, {"loss": "logit-adjustment"}),
    (ldam, {"loss": "ldam"}),
)


@pytest.mark.parametrize(("formula", "options"), FORMULAS)
def test_labels_give_the_papers_loss(formula: Callable[[Tensor, int], Tensor], options):
    """Without smoothing, unless it is asked for; class weights average as in nn.CrossEntropyLoss."""
    logits, labels, _ = batch()
    losses = torch.stack([formula(z, int(y)) for z, y in zip(logits, labels, strict=True)])
    assert_same(criterion(**options)(logits, labels), losses.mean(), logits)
    given = torch.tensor([1.0, 8.0, 0.5, 3.0]).double()
    loss = criterion(**options, class_weights=tuple(given.tolist()))(logits, labels)
    assert_same(loss, (given[labels] * losses).sum() / given[labels].sum(), logits)


@pytest.mark.parametrize(("formula", "options"), FORMULAS[:3])
def test_mixed_and_smoothed_targets_weigh_the_papers_losses(formula: Callable[[Tensor, int], Tensor], options):
    logits, labels, targets = batch()
    losses = torch.stack([torch.stack([formula(z, k) for k in range(K)]) for z in logits])
    assert_same(criterion(**options)(logits, targets), (targets * losses).sum() / N, logits)
    smoothed = 0.8 * F.one_hot(labels, K).double() + 0.2 / K
    assert_same(criterion(**options, smoothing=0.2)(logits, labels), (smoothed * losses).sum() / N, logits)


@pytest.mark.parametrize("weight", (None, torch.tensor([1.0, 8.0, 0.5, 3.0]).double()), ids=("plain", "weighted"))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_focal_loss_of_gamma_0_is_cross_entropy(weight, smoothing):
    logits, *targets = batch()
    loss = FocalLoss(0.0, weight, smoothing)
    for target in targets:
        assert_same(loss(logits, target), F.cross_entropy(logits, target, weight, label_smoothing=smoothing), logits)


def test_focal_loss_of_two_classes_is_torchvisions_of_one_logit():
    logits = torch.linspace(-6, 6, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % 2
    both = torch.stack((torch.zeros_like(logits), logits), 1)
    expected = sigmoid_focal_loss(logits, labels.double(), alpha=-1, gamma=2, reduction="mean")
    assert_same(FocalLoss(2.0)(both, labels), expected, logits)


@pytest.mark.parametrize("gamma", (0.5, 2.0))
def test_focal_loss_of_certain_predictions_has_a_gradient(gamma):
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]], requires_grad=True)
    FocalLoss(gamma)(logits, torch.tensor([0, 1])).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [0.5, -0.5]]))


def test_equally_common_classes_need_no_adjustment_and_get_one_margin():
    logits, labels, _ = batch()
    even = np.full(K, 9)
    assert_same(criterion(even, loss="logit-adjustment")(logits, labels), F.cross_entropy(logits, labels), logits)
    assert_same(criterion(loss="logit-adjustment", tau=0.0)(logits, labels), F.cross_entropy(logits, labels), logits)
    lowered = logits - 30 * 0.5 * F.one_hot(labels, K)
    assert_same(criterion(even, loss="ldam")(logits, labels), F.cross_entropy(lowered, labels), logits)


def test_cross_entropy_is_the_default_and_smoothed():
    logits, *targets = batch()
    for target in targets:
        assert_same(criterion()(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1), logits)
    assert_same(criterion(smoothing=0.0)(logits, targets[0]), F.cross_entropy(logits, targets[0]), logits)


def test_balanced_weights_are_scikit_learns():
    labels = np.repeat(np.arange(K), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    assert np.allclose(class_weights(Config(class_weights="balanced"), COUNTS), expected, rtol=1e-14)


def test_effective_weights_are_the_papers():
    """Cui et al. 2019: one over the effective number (1 - beta^n) / (1 - beta); together the number of classes."""
    beta = 0.99
    numbers = np.array([sum(beta**i for i in range(n)) for n in COUNTS])
    expected = K / numbers / (1 / numbers).sum()
    config = Config(class_weights="effective", class_weights_beta=beta)
    assert np.allclose(class_weights(config, COUNTS.astype(float)), expected, rtol=1e-12)
    config = Config(class_weights="effective", class_weights_beta=0.0)
    assert np.array_equal(class_weights(config, COUNTS.astype(float)), np.ones(K))


def test_root_weights_are_one_over_the_root_and_together_the_number_of_classes():
    weights = class_weights(Config(class_weights="sqrt"), COUNTS.astype(float))
    expected = 1 / np.sqrt(COUNTS)
    assert np.allclose(weights, K * expected / expected.sum(), rtol=1e-14)


def test_deferred_weights_count_from_their_epoch_on():
    logits, labels, _ = batch()
    options = {"class_weights": "balanced", "drw_epoch": 5, "smoothing": 0.0}
    weight = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(K), y=np.repeat(range(K), COUNTS)))
    assert_same(criterion(epoch=4, **options)(logits, labels), F.cross_entropy(logits, labels), logits)
    assert_same(criterion(epoch=5, **options)(logits, labels), F.cross_entropy(logits, labels, weight), logits)


def test_another_number_of_weights_than_classes_is_refused():
    with pytest.raises(UserError, match=r"--class-weights 1 0.5: 2 of them, but the data has 4 classes; give one"):
        criterion(class_weights=(1.0, 0.5))


@pytest.mark.parametrize("loss", ("cross-entropy", "focal", "ldam", "logit-adjustment"))
def test_half_precision_logits_are_widened(loss):
    """And a class that has no training image is as one that has one."""
    logits, labels, _ = batch()
    half = logits.detach().bfloat16()
    wide = make_criterion(Config(loss=loss, class_weights="balanced"), np.array([50, 0, 6, 2]), CPU)(0)
    assert wide(half, labels).dtype == torch.float32
    torch.testing.assert_close(wide(half, labels), wide(half.float(), labels), rtol=1e-6, atol=0)
    assert wide(half, labels).isfinite()


def test_sum_of_squares_and_its_gradient():
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 5, 5), (7,), (1, 4))]
    tensors.append(torch.zeros(3, dtype=torch.float64, requires_grad=True))  # as a norm's weight may begin
    total = sum_of_squares(tensors)
    torch.testing.assert_close(total, sum((t**2).sum() for t in tensors))
    for tensor, gradient in zip(tensors, torch.autograd.grad(0.5 * 0.3 * total, tensors), strict=True):
        torch.testing.assert_close(gradient, 0.3 * tensor.detach(), rtol=1e-15, atol=0)


def test_cosine_classifier_scales_cosines_by_30():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, K)
    classifier = CosineLinear(linear, drop=0.0)
    features = 5 * torch.randn(N, 64)
    expected = 30 * F.cosine_similarity(features[:, None], linear.weight[None], dim=2)
    torch.testing.assert_close(classifier(features), expected)
    torch.testing.assert_close(classifier(1e-3 * features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(features.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, classifier(features.bfloat16().float()))


@pytest.mark.parametrize(
    ("options", "flag"),
    (
        ({"class_weights": "balanced"}, "--class-weights balanced"),
        ({"class_weights": "effective", "sampling": "sqrt"}, "--class-weights effective"),
        ({"loss": "logit-adjustment"}, "--loss logit-adjustment"),
        ({"class_weights": "balanced", "sampling": "none"}, None),
        ({"loss": "logit-adjustment", "sampling": "none"}, None),
        ({"class_weights": (1.0, 3.0)}, None),
        ({"class_weights": "sqrt"}, "--class-weights sqrt"),
        ({"class_weights": "sqrt", "sampling": "sqrt"}, None),
        ({}, None),
    ),
)
def test_a_sampler_and_a_loss_that_make_up_for_the_same_are_told(options, flag):
    line = twice_corrected(Config(**options), np.array([90, 0, 30]))
    assert (line is None) == (flag is None)
    assert line is None or f"--sampling {Config(**options).sampling} and {flag} both" in line
