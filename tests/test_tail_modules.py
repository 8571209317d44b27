"""`FusedTail` and the modules that `fuse_tails` puts in: every kind of BatchNorm, its mode, and its process group."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from engine.models import SEBasicBlock
from kernels import FusedTail, fuse_se, fuse_tails
from tests.backends import watch
from tests.tail_models import (
    NORMS,
    PLACES,
    SMALL,
    assert_alike,
    assert_training_agrees,
    drawn,
    images,
    logits_gradients_and_buffers,
    norms,
    stem_and_blocks,
)


@pytest.fixture
def model() -> nn.Module:
    return stem_and_blocks().double()


@pytest.fixture
def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


@pytest.mark.parametrize("frozen", range(NORMS))
@pytest.mark.parametrize("when", ("before", "after"))
def test_a_batchnorm_in_evaluation_uses_its_running_statistics(model, twin, frozen, when):
    """By the idiom of going through the modules, also through the one whose place a pair has taken."""
    if when == "after":
        assert fuse_tails(model, backend="cpu") == PLACES
    for m in (model, twin):
        assert len(norms(m)) == NORMS
        norms(m)[frozen].eval()
    if when == "before":
        assert fuse_tails(model, backend="cpu") == PLACES
    kept = norms(model)[frozen].running_mean.clone()
    assert_training_agrees(model, twin, steps=1)
    assert torch.equal(norms(model)[frozen].running_mean, kept)
    assert not torch.equal(norms(model)[frozen - 1].running_mean, norms(stem_and_blocks())[frozen - 1].running_mean)


def with_cumulative_average(norm: nn.BatchNorm2d) -> None:
    norm.momentum = None


def without_tracking(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def no_longer_tracking(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False


def without_parameters(norm: nn.BatchNorm2d) -> None:
    norm.affine = False
    norm.weight = norm.bias = None


def without_bias(norm: nn.BatchNorm2d) -> None:
    norm.bias = None


def with_its_own_eps(norm: nn.BatchNorm2d) -> None:
    norm.eps, norm.momentum = 0.5, 0.7


CHANGES = (
    with_cumulative_average,
    without_tracking,
    no_longer_tracking,
    without_parameters,
    without_bias,
    with_its_own_eps,
)


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("change", CHANGES)
def test_batchnorms_of_every_kind(model, twin, change, when):
    if when == "after":
        assert fuse_tails(model, backend="cpu") == PLACES
    for m in (model, twin):
        for norm in norms(m):
            change(norm)
    if when == "before":
        assert fuse_tails(model, backend="cpu") == PLACES
    assert_training_agrees(model, twin)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images(*SMALL)), twin.eval()(images(*SMALL)))


def test_a_residual_of_another_dtype_is_left_to_the_eager_modules(monkeypatch):
    """The operator takes one dtype; a block adds in place, in the dtype of its branch."""
    block = drawn(SEBasicBlock(8, 8))
    model, twin = nn.Sequential(block), nn.Sequential(copy.deepcopy(block))
    assert fuse_tails(model, backend="cpu") == 1
    ran = watch(monkeypatch)
    x = images(4, 8, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = (logits_gradients_and_buffers(m, x) for m in (model, twin))
    assert ran == ["tail_fwd:cpu", "tail_bwd:cpu"]
    assert actual["logits"].dtype == torch.bfloat16
    assert_alike(actual, expected, tolerance=0.05)


def test_a_child_replaced_by_no_batchnorm_is_refused(model):
    fuse_tails(model, backend="cpu")
    with pytest.raises(ValueError, match=r"unfuse_tails\(model\) before"):
        model[1].norm = nn.GroupNorm(2, 8)
    model[3][0].bn2 = nn.GroupNorm(2, 8).double()
    with pytest.raises(ValueError, match=r"found a GroupNorm .*unfuse_tails\(model\) before"):
        model(images(*SMALL))


@pytest.mark.parametrize("se", (None, "eager", "fused"))
@pytest.mark.parametrize("with_residual_norm", (False, True))
def test_fused_tail_of_ones_own(se, with_residual_norm, monkeypatch):
    torch.manual_seed(0)
    se_module = None if se is None else torchvision.ops.SqueezeExcitation(16, 4).double()
    norm, residual_norm = (drawn(nn.BatchNorm2d(16).double()) for _ in range(2))
    if se == "fused":
        fuse_se(holder := nn.Sequential(se_module), backend="cpu")
        se_module = holder[0]
    tail = FusedTail(
        norm, se=se_module, residual_norm=residual_norm if with_residual_norm else None, act="silu", backend="cpu"
    )
    twin = copy.deepcopy(tail)
    y, residual = images(3, 16, 5, 4), images(3, 16, 5, 4).flip(0)
    ran = watch(monkeypatch)
    got = tail(y, residual)
    assert ran == ["tail_fwd:cpu"]
    z = twin.norm(y) if twin.se is None else twin.se(twin.norm(y))
    expected = F.silu(z + (twin.residual_norm(residual) if with_residual_norm else residual))
    torch.testing.assert_close(got, expected)
    assert_alike(tail.state_dict(), twin.state_dict())
    assert [name for name, _ in tail.named_children()] == [
        "norm",
        *["se"] * (se is not None),
        *["residual_norm"] * with_residual_norm,
    ]
    assert fuse_tails(nn.Sequential(tail)) == 0
    if with_residual_norm:
        with pytest.raises(ValueError, match="residual_norm is given and residual is not"):
            tail(y)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: FusedTail(nn.GroupNorm(2, 8)), "norm: it is a GroupNorm, and no plain BatchNorm2d"),
        (lambda: FusedTail(hooked(nn.BatchNorm2d(8))), "norm: hooks on it"),
        (lambda: FusedTail(nn.BatchNorm2d(8), act="gelu"), "act='gelu'"),
        (lambda: FusedTail(nn.BatchNorm2d(8), backend="gpu"), "backend='gpu'"),
        (lambda: FusedTail(nn.BatchNorm2d(8), residual_norm=nn.BatchNorm2d(4)), "residual_norm has 4 channels"),
        (lambda: FusedTail(nn.BatchNorm2d(8), residual_norm=nn.Identity()), "residual_norm: it is a Identity"),
        (lambda: FusedTail(nn.BatchNorm2d(8), se=nn.Conv2d(8, 8, 3)), "se: no Squeeze-and-Excitation, but a Conv2d"),
        (
            lambda: FusedTail(nn.BatchNorm2d(8), se=torchvision.ops.SqueezeExcitation(8, 2, activation=nn.Tanh)),
            "se: activation is a Tanh",
        ),
        (lambda: FusedTail(nn.BatchNorm2d(8), se=torchvision.ops.SqueezeExcitation(4, 2)), "se is made for 4 channels"),
    ),
)
def test_fused_tail_names_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()
