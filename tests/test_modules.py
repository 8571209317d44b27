"""`FusedSEBlock`, `fuse_se`, `unfuse_se`: the same function, parameters and state dict, before and after."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

from kernels import FusedSE, FusedSEBlock, SEBlock, fuse_se, unfuse_se
from tests.backends import DEVICES, FUSED


def timm_se(channels: int = 32, **options) -> nn.Module:
    from timm.layers import SEModule

    return SEModule(channels, **options)


ORIGINALS = {
    "seblock": lambda: SEBlock(32, reduction=8),
    "torchvision": lambda: SqueezeExcitation(32, 8),
    "torchvision silu hardsigmoid": lambda: SqueezeExcitation(
        32, 8, activation=nn.SiLU, scale_activation=nn.Hardsigmoid
    ),
    "timm": timm_se,
}


class Net(nn.Module):
    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.se = se
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.se(self.conv(x)).mean((2, 3)))


@pytest.fixture(params=ORIGINALS.values(), ids=ORIGINALS.keys())
def net(request) -> Net:
    torch.manual_seed(0)
    return Net(request.param())


def outputs_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_swap_keeps_function_parameters_and_keys(net):
    before = outputs_and_gradients(net)
    parameters, keys = [id(p) for p in net.parameters()], list(net.state_dict())
    original = net.se
    assert fuse_se(net, backend="cpu") == 1
    assert isinstance(net.se, FusedSE)
    assert [id(p) for p in net.parameters()] == parameters
    assert list(net.state_dict()) == keys
    after = outputs_and_gradients(net)
    for name in before:
        torch.testing.assert_close(after[name], before[name], msg=lambda m, name=name: f"{name}: {m}")
    assert fuse_se(net) == 0
    assert unfuse_se(net) == 1
    assert net.se is original
    assert [id(p) for p in net.parameters()] == parameters
    assert unfuse_se(net) == 0


def test_optimizer_made_before_the_swap_goes_on(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    twin = copy.deepcopy(net)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    fuse_se(net, backend="cpu")
    for model, opt in ((net, optimizer), (twin, twin_optimizer)):
        for _step in range(3):
            outputs_and_gradients(model)
            opt.step()
    for (name, fused), eager in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(fused, eager, msg=lambda m, name=name: f"{name}: {m}")


def test_deepcopy_pickle_and_state_dict(net):
    fuse_se(net, backend="cpu")
    expected = outputs_and_gradients(net)["out"]
    twin = copy.deepcopy(net)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (twin, loaded):
        assert torch.equal(outputs_and_gradients(model)["out"], expected)
        with torch.no_grad():
            for p in model.se.parameters():
                p.mul_(2)
        changed = outputs_and_gradients(model)["out"]
        assert not torch.equal(changed, expected)
        unfuse_se(model)
        torch.testing.assert_close(outputs_and_gradients(model)["out"], changed)


def with_hook() -> nn.Module:
    module = SEBlock(32)
    module.register_forward_hook(lambda *args: None)
    return module


def with_norm() -> nn.Module:
    from timm.layers import SEModule

    return SEModule(32, norm_layer=nn.BatchNorm2d)


@pytest.mark.parametrize(
    "make",
    (
        with_hook,
        with_norm,
        lambda: timm_se(add_maxpool=True),
        lambda: SqueezeExcitation(32, 8, activation=nn.Tanh),
        lambda: SqueezeExcitation(32, 8, scale_activation=nn.Softplus),
        lambda: SqueezeExcitation(32, 8, activation=lambda: nn.GELU(approximate="tanh")),
        lambda: SqueezeExcitation(32, 8, activation=lambda: nn.PReLU(init=0.0)),
        nn.Identity,
    ),
    ids=(
        "hook",
        "norm inside",
        "max pool",
        "unknown activation",
        "unknown gate",
        "gelu by tanh",
        "learnt slope",
        "no SE at all",
    ),
)
def test_what_the_operator_cannot_express_is_left_alone(make):
    net = Net(make())
    before = net.se
    assert fuse_se(net) == 0
    assert net.se is before


@pytest.mark.parametrize("backend", FUSED)
def test_fused_seblock_is_the_seblock(backend):
    device = DEVICES[backend]
    eager, fused = SEBlock(48, reduction=4).to(device), FusedSEBlock(48, reduction=4, backend=backend).to(device)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 48, 5, 7, device=device).to(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), eager(x))
    assert fused(x).is_contiguous(memory_format=torch.channels_last)


def test_fused_seblock_with_biases_and_other_functions():
    block = FusedSEBlock(32, reduction=4, bias=True, act="gelu", gate="hardsigmoid", backend="cpu")
    assert list(block.state_dict()) == ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    net = Net(block)
    fused = outputs_and_gradients(net)
    assert unfuse_se(net) == 1
    assert type(net.se) is SEBlock
    for name, eager in outputs_and_gradients(net).items():
        torch.testing.assert_close(fused[name], eager)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"channel": 8, "reduction": 16}, "channel=8 with reduction=16"),
        ({"channel": 64, "act": "tanh"}, "act='tanh'"),
        ({"channel": 64, "gate": "softmax"}, "gate='softmax'"),
        ({"channel": 64, "backend": "gpu"}, "backend='gpu'"),
    ),
)
def test_fused_seblock_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        FusedSEBlock(**options)
