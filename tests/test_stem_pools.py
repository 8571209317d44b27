"""Which max pools `fuse_tails` takes in with the BatchNorm and the ReLU in front of them, and what stays as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import BlurPool2d
from torch import Tensor, nn

from engine.models import create_model
from kernels import fuse_tails, tail_modules, unfuse_tails
from kernels.tails import FusedNormAct, FusedNormActPool
from tests.backends import watch
from tests.tail_models import assert_alike, drawn, images, logits_gradients_and_buffers, saved_and_loaded

MODELS = {
    "this project's": lambda: create_model("seresnet18", num_classes=8),
    "timm's": lambda: timm.create_model("resnet18", num_classes=8),
    "timm's with a deep stem": lambda: timm.create_model("resnet10t", num_classes=8),
    "torchvision's": lambda: torchvision.models.resnet18(num_classes=8),
}
FUSED = ["pool_fwd:cpu", "pool_bwd:cpu"]


def stem(pool: nn.Module | None = None, act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act or nn.ReLU(inplace=True), pool or nn.MaxPool2d(3, 2, 1)
    return drawn(nn.Sequential(*layers)).double()


def assert_steps_agree(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    assert_alike(logits_gradients_and_buffers(model, x), logits_gradients_and_buffers(twin, x))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_stem_of_a_resnet_in_training_and_evaluation_and_back(make, monkeypatch):
    torch.manual_seed(0)
    model = drawn(make()).double()
    twin, modules, pool = copy.deepcopy(model), list(model.modules()), model.maxpool
    fuse_tails(model, backend="cpu")
    fused = [module for module in model.modules() if isinstance(module, FusedNormActPool)]
    assert [module.pool for module in fused] == [pool]
    assert model.bn1 is fused[0]
    assert tail_modules(model)["bn1"] == "fused"
    ran = watch(monkeypatch)
    x = images(2, 3, 50, 47)
    for change in (nn.Module.train, nn.Module.eval):
        assert_steps_agree(change(model), change(twin), x)
    assert [name for name in ran if name.startswith("pool")] == 2 * FUSED
    unfuse_tails(model)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert not model.maxpool.training


def test_what_an_operator_has_no_kernel_for_goes_through_the_modules(monkeypatch):
    model = stem()
    twin = copy.deepcopy(model)
    assert fuse_tails(model, backend="cpu") == 1
    ran = watch(monkeypatch)
    assert_steps_agree(model, twin, images(2, 3, 9, 8).contiguous())
    assert ran == ["tail_fwd:cpu", "tail_bwd:cpu"]
    assert_steps_agree(model, twin, images(2, 3, 9, 8))
    assert ran[2:] == FUSED


def test_batchnorms_without_momentum_statistics_or_parameters():
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        model = stem()
        model[1] = nn.BatchNorm2d(8, dtype=torch.float64, **options)
        twin = copy.deepcopy(model)
        assert fuse_tails(model, backend="cpu") == 1
        for _ in range(2):
            assert_steps_agree(model, twin, images(2, 3, 9, 8))


@pytest.mark.parametrize("copied", (copy.deepcopy, saved_and_loaded))
@pytest.mark.parametrize("make", (stem, MODELS["timm's"]), ids=("a Sequential", "timm's"))
def test_a_copy_stands_alone(make, copied):
    model = make().double()
    twin = copy.deepcopy(model)
    fuse_tails(model, backend="cpu")
    other = copied(model)
    x = images(2, 3, 33, 34)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert_steps_agree(other, twin, x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    unfuse_tails(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in twin.modules()]
    assert_steps_agree(other, twin, x)


def test_what_timm_returns_from_between_the_activation_and_the_pool():
    model = drawn(MODELS["timm's"]()).double().eval()
    twin = copy.deepcopy(model)
    fuse_tails(model, backend="cpu")
    x = images(2, 3, 40, 40)
    for m in (model, copy.deepcopy(model), saved_and_loaded(model)):
        torch.testing.assert_close(m.forward_intermediates(x), twin.forward_intermediates(x))
        torch.testing.assert_close(m(x), twin(x))
    unfuse_tails(model)
    assert "forward_intermediates" not in vars(model)


def hooked() -> nn.Module:
    pool = nn.MaxPool2d(3, 2, 1)
    pool.register_forward_hook(lambda *args: None)
    return pool


class Subclass(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "pool",
    (
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d((3, 5), 2, 1),
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.AvgPool2d(3, 2, 1),
        Subclass(3, 2, 1),
        hooked(),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), BlurPool2d(8).double()),
    ),
    ids=lambda pool: type(pool).__name__,
)
def test_other_pools_stay(pool):
    model = stem(pool)
    twin = copy.deepcopy(model)
    assert fuse_tails(model, backend="cpu") == 1
    assert type(model[1]) is FusedNormAct
    assert model[3] is pool
    assert_steps_agree(model, twin, images(2, 3, 9, 8))
    assert unfuse_tails(model) == 1


def test_a_pool_that_returns_indices_stays():
    model = stem(nn.MaxPool2d(3, 2, 1, return_indices=True))
    fuse_tails(model)
    assert type(model[1]) is FusedNormAct


def test_a_pool_after_another_activation_stays():
    model = stem(act=nn.SiLU())
    fuse_tails(model)
    assert type(model[1]) is FusedNormAct
    assert type(model[3]) is nn.MaxPool2d


@pytest.mark.parametrize("pool", (nn.MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1)), nn.MaxPool2d(3, stride=2, padding=1)))
def test_the_numbers_of_a_pool_may_be_pairs(pool):
    model = stem(pool)
    fuse_tails(model)
    assert isinstance(model[1], FusedNormActPool)


@pytest.mark.parametrize("first", ("converted", "fused"))
def test_conversion_to_synchronised_norms(first):
    model = stem()
    twin = copy.deepcopy(model)
    if first == "fused":
        fuse_tails(model, backend="cpu")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if first == "converted":
        fuse_tails(model, backend="cpu")
    assert type(model[1].norm) is nn.SyncBatchNorm
    assert_steps_agree(model, twin, images(2, 3, 9, 8))
    unfuse_tails(model)
    assert [type(module) for module in model[1:]] == [nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d]


def test_the_identities_must_be_there_on_the_way_back():
    for place, what in ((2, "activation"), (3, "pool")):
        model = stem()
        fuse_tails(model)
        model[place] = nn.Dropout()
        with pytest.raises(ValueError, match=rf"activation and pool, and the nn\.Identity after it, at the {what}'s"):
            unfuse_tails(model)
        assert isinstance(model[1], FusedNormActPool)


def test_compiled_and_exported():
    model = stem().eval()
    twin = copy.deepcopy(model)
    fuse_tails(model, backend="cpu")
    x = images(2, 3, 9, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), twin(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), twin(x))
    torch.compiler.reset()
