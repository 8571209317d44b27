"""`fuse_se` on timm's and torchvision's SE models: the function, the gradients and the training are what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from kernels import FusedSE, fuse_se, unfuse_se
from tests.accuracy import assert_network_as_accurate_as_eager
from tests.backends import watch

CLASSES = 8


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    se_modules: int
    # In float64, relative. torch's own hardsigmoid has a gradient of float32's 1/6 there
    agreement: float = 1e-9


def of_timm(name: str) -> Callable[..., nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES)


def of_torchvision(name: str, **options: float) -> Callable[..., nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=CLASSES, **options)


CASES = {
    "timm seresnet50": Case(of_timm("seresnet50"), 16),
    "timm seresnext50_32x4d": Case(of_timm("seresnext50_32x4d"), 16),
    "timm efficientnet_b0": Case(of_timm("efficientnet_b0"), 16),
    "timm mobilenetv3_large_100": Case(of_timm("mobilenetv3_large_100"), 8, agreement=1e-6),
    "timm regnety_008": Case(of_timm("regnety_008"), 14),
    "torchvision efficientnet_b0": Case(of_torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0), 16),
    "torchvision mobilenet_v3_large": Case(of_torchvision("mobilenet_v3_large", dropout=0.0), 8, agreement=1e-6),
    "torchvision regnet_y_800mf": Case(of_torchvision("regnet_y_800mf"), 14),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make()


@pytest.fixture
def images() -> Tensor:
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


def loss_of(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % CLASSES)


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """In training mode, of a copy: BatchNorm's running statistics move as it runs."""
    model = copy.deepcopy(model).train()
    logits = model(images)
    loss_of(logits).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_logits_and_gradients_are_the_untouched_models(case, model, images, monkeypatch):
    truth = copy.deepcopy(model).double()
    exact, exact_gradients = logits_and_gradients(truth, images.double())
    eager, eager_gradients = logits_and_gradients(model, images)
    model.eval()
    with torch.no_grad():
        evaluated = model(images)

    assert fuse_se(model, backend="cpu") == fuse_se(truth, backend="cpu") == case.se_modules
    ran = watch(monkeypatch)
    logits, gradients = logits_and_gradients(model, images)
    assert ran == ["se_fwd:cpu"] * case.se_modules + ["se_bwd:cpu"] * case.se_modules
    assert_network_as_accurate_as_eager({"logits": logits}, {"logits": eager}, {"logits": exact})
    assert_network_as_accurate_as_eager(gradients, eager_gradients, exact_gradients)
    with torch.no_grad():
        torch.testing.assert_close(model(images), evaluated)

    wide, wide_gradients = logits_and_gradients(truth, images.double())
    for name, got, expected in (
        ("logits", wide, exact),
        *((name, wide_gradients[name], gradient) for name, gradient in exact_gradients.items()),
    ):
        # a bias before a BatchNorm has a gradient of 0 and the rounding of others
        allowed = case.agreement * expected.abs().max() + 1e-12
        assert (got - expected).abs().max() <= allowed, name


def tensors(model: nn.Module) -> Iterator[tuple[str, int]]:
    yield from ((name, id(p)) for name, p in model.named_parameters())
    yield from ((name, id(b)) for name, b in model.named_buffers())


# The larger ones have the SE modules of regnety_008
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if "timm seresne" not in name], indirect=True
)
def test_training_goes_on_through_the_swap_and_back(case, model, images):
    twin = copy.deepcopy(model)
    modules, parameters, keys = list(model.modules()), list(tensors(model)), list(model.state_dict())
    optimizer, twins_optimizer = (torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, twin))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # in evaluation mode: a BatchNorm over the few samples of the last stages would magnify every rounding
        optimizer.zero_grad()
        loss_of(model.eval()(images)).backward()
        optimizer.step()

    assert fuse_se(model, backend="cpu") == case.se_modules
    assert list(tensors(model)) == parameters
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, FusedSE) for m in model.modules()) == case.se_modules
    for _ in range(2):
        step(model, optimizer)
        step(twin, twins_optimizer)
    assert unfuse_se(model) == case.se_modules
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert list(tensors(model)) == parameters
    with torch.no_grad():
        torch.testing.assert_close(model(images), twin(images), rtol=1e-4, atol=1e-5)
    for name, parameter in model.state_dict().items():
        expected = twin.state_dict()[name]
        torch.testing.assert_close(parameter, expected, msg=lambda m, name=name: f"{name}: {m}")
