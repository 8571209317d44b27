"""Which residual blocks and which pairs of a BatchNorm and an activation `fuse_tails` takes, and why not the others."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, BlurPool2d, DropBlock2d, DropPath
from timm.layers import SEModule as TimmSE
from timm.models.dla import DlaBasic
from timm.models.resnet import BasicBlock as TimmBlock
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d

from engine.models import SEBasicBlock
from kernels import fuse_tails, tail_modules, unfuse_tails
from kernels.tails import FusedBlock
from tests.tail_models import assert_training_agrees, drawn, images


class WithFunctions(nn.Module):
    """A residual block whose activations are functions, with names and a shortcut of its own."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.act_fn = act

    def forward(self, x):
        out = self.norm2(self.conv2(self.act_fn(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def with_downsample(*downsample: nn.Module, hook: bool = False) -> nn.Module:
    block = SEBasicBlock(3, 8, 1, nn.Sequential(*downsample))
    if hook:
        block.downsample.register_forward_hook(lambda module, args, out: 2 * out)
    return block


SERVED = {
    "functions": WithFunctions,
    "silu and identity": lambda: TimmBlock(3, 3, act_layer=nn.SiLU, attn_layer="se", drop_block=nn.Identity),
    "norm last": lambda: with_downsample(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
    "norm alone": lambda: with_downsample(nn.Conv2d(3, 8, 1, bias=False)),
    "hook on the branch": lambda: with_downsample(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), hook=True),
    "empty branch": lambda: TimmBlock(3, 3, downsample=nn.Sequential()),
    "groups and dilation": lambda: TimmBottleneck(3, 8, cardinality=4, base_width=32, dilation=2, downsample=conv(32)),
    "se without biases": lambda: TimmBlock(
        3, 8, downsample=conv(8), attn_layer=partial(TimmSE, bias=False, rd_ratio=0.5, act_layer=nn.SiLU)
    ),
}


def conv(channels: int) -> nn.Module:
    return nn.Conv2d(3, channels, 1)


@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED.keys())
def test_a_residual_block_of_whatever_make_is_fused(make):
    torch.manual_seed(0)
    block = make().double()
    model = drawn(nn.Sequential(block))
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_tails(model, backend="cpu") == 1
    assert isinstance(model[0], FusedBlock)
    assert_training_agrees(model, twin)
    assert unfuse_tails(model) == 1
    assert model[0] is block


def changed(change: Callable[[nn.Module], object], block: nn.Module | None = None) -> nn.Module:
    block = BasicBlock(8, 8) if block is None else block
    change(block)
    return block


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *args: None)


def parametrize(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())


def replace_forward(module: nn.Module) -> None:
    module.forward = lambda x: 2 * x


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        return changed(lambda b: setattr(b, "conv1", torch.ao.nn.quantized.Conv2d(8, 8, 3)))


class Twice(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class StopsTheGradient(BasicBlock):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + x.detach())


class DropsInTraining(BasicBlock):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class OwnNorm(nn.BatchNorm2d):
    pass


UNSERVED = {
    "drop path": (lambda: TimmBlock(8, 8, drop_path=DropPath(0.1)), "drop_path: no Squeeze-and-.*DropPath"),
    "drop block": (lambda: TimmBlock(8, 8, drop_block=DropBlock2d), "drop_block: no Squeeze-and-.*DropBlock2d"),
    "anti-aliasing": (lambda: TimmBlock(8, 8, stride=2, aa_layer=BlurPool2d), "aa: no Squeeze-and-.*BlurPool2d"),
    "eca": (lambda: TimmBlock(8, 8, attn_layer="eca"), "se: no Squeeze-and-Excitation, but a EcaModule"),
    "gate": (lambda: TimmBlock(8, 8, attn_layer=partial(TimmSE, gate_layer=nn.Softplus)), "se: gate is a Softplus"),
    "hook in se": (lambda: changed(lambda b: hook(b.se.fc1), SEBasicBlock(8, 8)), "se: hooks on fc1"),
    "second se": (
        lambda: changed(lambda b: b.add_module("more", copy.deepcopy(b.se)), SEBasicBlock(8, 8)),
        "more: a second module after",
    ),
    "gelu": (lambda: TimmBlock(8, 8, act_layer=lambda inplace: nn.GELU()), "act1: it is a GELU"),
    "frozen norm": (lambda: BasicBlock(8, 8, norm_layer=FrozenBatchNorm2d), "bn1: it is a FrozenBatchNorm2d"),
    "group norm": (lambda: BasicBlock(8, 8, norm_layer=partial(nn.GroupNorm, 2)), "bn1: it is a GroupNorm"),
    "norm of its own": (lambda: BasicBlock(8, 8, norm_layer=OwnNorm), "bn1: it is a OwnNorm"),
    "hook on a norm": (lambda: changed(lambda b: hook(b.bn2)), "bn2: hooks on it"),
    "hook on an act": (lambda: changed(lambda b: hook(b.relu)), "relu: hooks on it"),
    "hook on an identity": (lambda: changed(lambda b: hook(b.aa), TimmBlock(8, 8)), "aa: hooks on it"),
    "parametrized": (lambda: changed(lambda b: parametrize(b.bn1)), "bn1: it is a ParametrizedBatchNorm2d"),
    "replaced norm": (lambda: changed(lambda b: replace_forward(b.bn1)), "bn1: the forward of the module is replaced"),
    "replaced forward": (lambda: changed(replace_forward), "its forward is replaced"),
    "compiled": (lambda: changed(lambda b: b.compile()), "compiled on its own"),
    "own buffer": (lambda: changed(lambda b: b.register_buffer("gain", torch.ones(1))), "buffers of its own"),
    "residual from outside": (lambda: DlaBasic(8, 8), "more than x"),
    "twice": (lambda: Twice(8, 8), "something else"),
    "detached": (lambda: StopsTheGradient(8, 8), "something else"),
    "functional dropout": (lambda: DropsInTraining(8, 8), "something else"),
    "another function": (lambda: WithFunctions(F.gelu), "something else"),
    "quantized": (quantized, "does not run on a small input"),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED.values(), ids=UNSERVED.keys())
def test_a_block_that_the_operator_cannot_express_is_left_alone_and_reported(make, reason):
    block = make()
    model = nn.Sequential(block)
    with pytest.warns(UserWarning, match=f"left 1 of 1 places as they are(.|\n)*  0: .*{reason}"):
        assert fuse_tails(model) == 0
    assert model[0] is block
    assert re.search(reason, tail_modules(model)["0"])


def test_one_block_is_not_taken_for_another_that_differs_in_a_setting():
    class Scaled(BasicBlock):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    model = nn.Sequential(*(Scaled(8, 8) for _ in range(3)))
    model[1].scale = 0.5
    with pytest.warns(UserWarning, match="left 1 of 3(.|\n)*  1: it computes something else"):
        assert fuse_tails(model) == 2


@pytest.mark.parametrize(
    "make",
    (
        lambda: timm.models.resnetv2.PreActBasic(8, 8, norm_layer=BatchNormAct2d),
        lambda: timm.models.densenet.DenseLayer(8, 8, 4),
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU()),
        lambda: nn.ModuleList([nn.BatchNorm2d(8), nn.ReLU()]),
        lambda: SequentialInReverse(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()),
    ),
    ids=("pre-activation", "dense layer", "no act", "1d", "list", "forward of its own"),
)
def test_nothing_is_said_of_what_is_no_tail(make):
    model = nn.Sequential(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_tails(model) == 0
    assert tail_modules(model) == {}


class SequentialInReverse(nn.Sequential):
    def forward(self, x):
        for module in reversed(self):
            x = module(x)
        return x


def pair(act: nn.Module | None = None, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm or nn.BatchNorm2d(8), act or nn.ReLU())


@pytest.mark.parametrize(
    "make",
    (
        pair,
        lambda: pair(nn.SiLU(inplace=True)),
        lambda: Conv2dNormActivation(3, 8),
        lambda: nn.Sequential(pair(), nn.Conv2d(8, 8, 1)),
        lambda: nn.Sequential(relu := nn.ReLU(), *pair(relu), relu),
    ),
    ids=("relu", "silu", "torchvision", "nested", "one relu at several places"),
)
def test_a_batchnorm_and_its_activation_are_fused(make):
    torch.manual_seed(0)
    model = drawn(make().double())
    twin, modules, parameters = copy.deepcopy(model), list(model.modules()), dict(model.named_parameters())
    assert fuse_tails(model, backend="cpu") == 1
    assert list(tail_modules(model).values()) == ["fused"]
    for duplicates in (False, True):
        assert dict(model.named_parameters(remove_duplicate=not duplicates)) == parameters
    assert_training_agrees(model, twin)
    assert unfuse_tails(model) == 1
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    (
        (pair(nn.Hardswish()), "1", "a Hardswish follows"),
        (pair(norm=OwnNorm(8)), "1", "it is a OwnNorm"),
        (changed(lambda m: hook(m[1]), pair()), "1", "hooks on it"),
        (changed(lambda m: hook(m[2]), pair()), "1", "2: hooks on it"),
        (changed(lambda m: m.append(m[1]), pair()), "1", "it stands at several places"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pair_that_the_operator_cannot_express_is_left_alone_and_reported(model, name, reason):
    with pytest.warns(UserWarning, match=f"left 1 of 1 places as they are(.|\n)*  {name}: {reason}"):
        assert fuse_tails(model) == 0
    assert tail_modules(model)[name].startswith(reason)


class OtherForward(timm.models.resnet.ResNet):
    def forward_features(self, x):
        x = self.bn1(self.conv1(x))
        return self.layer1(self.maxpool(self.act1(x) + x))


def test_the_stem_of_a_resnet_with_another_forward_is_left_alone():
    model = OtherForward(TimmBlock, (1, 1, 1, 1))
    assert fuse_tails(model) == 4
    assert type(model.bn1) is nn.BatchNorm2d


def test_one_warning_groups_the_reasons_and_counts_the_whole():
    model = timm.create_model("resnet50", drop_path_rate=0.1, act_layer=nn.ReLU)
    model.layer1[0].bn1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="left 16 of 17 places") as record:
        assert fuse_tails(model) == 1
    assert len(record) == 1
    text = str(record[0].message)
    assert "layer1.0: bn1: hooks on it" in text
    assert "layer1.1, layer1.2, layer2.0, layer2.1 and 11 more: drop_path: no Squeeze-and-Excitation, but a" in text
    assert record[0].filename == __file__
    report = tail_modules(model)
    assert len(report) == 17
    assert [name for name, state in report.items() if state == "fused"] == ["bn1"]


def test_a_shared_batchnorm_inside_a_block_goes_on_being_shared():
    block = SEBasicBlock(8, 8)
    block.bn2 = block.bn1
    model = nn.Sequential(block.double())
    twin = copy.deepcopy(model)
    assert fuse_tails(model, backend="cpu") == 1
    x = images(3, 8, 5, 5)
    torch.testing.assert_close(model(x), twin(x))
    assert model[0].bn1.num_batches_tracked == twin[0].bn1.num_batches_tracked == 2
