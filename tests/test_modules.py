"""`FusedSEBlock`, `fuse_se`, `unfuse_se`: the same function, parameters and state dict, before and after."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import SqueezeExcitation

from kernels import FusedSE, FusedSEBlock, SEBlock, fuse_se, se_modules, unfuse_se
from tests.backends import DEVICES, FUSED


def timm_layer(name: str, **options) -> nn.Module:
    return getattr(timm.layers, name)(32, **options)


def timm_se(**options) -> nn.Module:
    return timm_layer("SEModule", **options)


class ByFunctions(nn.Module):
    """SE whose pool, activation and gate are functions, and whose layers have names and an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(32, 8, 1)

    def forward(self, x):
        return torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True))))) * x


class InASequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.GELU(), nn.Conv2d(32, 32, 1), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.excite(x)


ORIGINALS = {
    "seblock": lambda: SEBlock(32, reduction=8),
    "torchvision": lambda: SqueezeExcitation(32, 8),
    "torchvision silu hardsigmoid": lambda: SqueezeExcitation(
        32, 8, activation=nn.SiLU, scale_activation=nn.Hardsigmoid
    ),
    "timm": timm_se,
    "timm silu": lambda: timm_se(act_layer=nn.SiLU, bias=False),
    "timm efficientnet": lambda: timm.models._efficientnet_blocks.SqueezeExcite(32, act_layer=nn.SiLU),
    "timm mobilenetv3": lambda: timm.models._efficientnet_blocks.SqueezeExcite(32, gate_layer=nn.Hardsigmoid),
    "functions": ByFunctions,
    "one sequential, C to C": InASequential,
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


def with_hook_on_a_layer() -> nn.Module:
    module = timm_se()
    module.fc2.register_full_backward_hook(lambda *args: None)
    return module


def with_state_dict_hook() -> nn.Module:
    module = SEBlock(32)
    module.register_state_dict_post_hook(lambda *args: None)
    return module


def with_a_layer_replaced(replace) -> nn.Module:
    module = SqueezeExcitation(32, 8)
    module.fc1 = replace(module.fc1)
    return module


def with_replaced_forward() -> nn.Module:
    module = SEBlock(32)
    module.forward = lambda x: 2 * x
    return module


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecation
        return torch.ao.quantization.quantize_dynamic(SEBlock(32), {nn.Linear})


class WithDropout(SqueezeExcitation):
    def __init__(self) -> None:
        super().__init__(32, 8)
        self.fc2 = nn.Sequential(nn.Dropout(0.5), self.fc2)


class WithFunctionalDropout(SqueezeExcitation):
    def forward(self, x):
        return x * F.dropout(self._scale(x), 0.5, self.training)


class WithResidual(SEBlock):
    def forward(self, x):
        return x + super().forward(x)


class WithOwnParameter(SEBlock):
    def __init__(self) -> None:
        super().__init__(32)
        self.temperature = nn.Parameter(torch.ones(()))


class WithMask(SEBlock):
    def forward(self, x, mask=None):
        return super().forward(x) if mask is None else super().forward(x * mask)


class GateAlone(SqueezeExcitation):
    def forward(self, x):
        return self._scale(x)


class Mlp(nn.Module):
    """A transformer's: C -> R -> C, and no SE."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


class ChannelsLastSE(SEBlock):
    """On (N, H, W, C): another function of a tensor of four dimensions."""

    def forward(self, x):
        return x * self.fc(x.mean((1, 2), keepdim=True))


UNSERVED = {
    "hook": (with_hook, "hooks on it"),
    "hook on a layer": (with_hook_on_a_layer, "hooks on fc2"),
    "state dict hook": (with_state_dict_hook, "hooks on it"),
    "norm inside": (lambda: timm_se(norm_layer=nn.BatchNorm2d), "bn is a BatchNorm2d"),
    "dropout": (WithDropout, "fc2.0 is a Dropout"),
    "functional dropout": (lambda: WithFunctionalDropout(32, 8), "something else"),
    "max pool": (lambda: timm_se(add_maxpool=True), "something else"),
    "residual in a subclass": (lambda: WithResidual(32), "something else"),
    "replaced forward": (with_replaced_forward, "forward of the module is replaced"),
    "mask": (lambda: WithMask(32), "more than x"),
    "parameter of its own": (WithOwnParameter, "of its own"),
    "unknown activation": (lambda: SqueezeExcitation(32, 8, activation=nn.Tanh), "activation is a Tanh"),
    "unknown gate": (lambda: SqueezeExcitation(32, 8, scale_activation=nn.Softplus), "scale_activation is a Softplus"),
    "gelu by tanh": (lambda: timm_se(act_layer="gelu_tanh"), "act is a GELUTanh"),
    "learnt slope": (lambda: SqueezeExcitation(32, 8, activation=lambda: nn.PReLU(init=0.0)), "activation is a PReLU"),
    "groups": (lambda: with_a_layer_replaced(lambda fc: nn.Conv2d(32, 8, 1, groups=4)), "fc1 is no plain .*groups=4"),
    "parametrized": (lambda: with_a_layer_replaced(nn.utils.parametrizations.weight_norm), "fc1 is parametrized"),
    "spectral norm": (lambda: with_a_layer_replaced(nn.utils.parametrizations.spectral_norm), "fc1 is parametrized"),
    "weight norm by hook": (lambda: with_a_layer_replaced(nn.utils.spectral_norm), "hooks on fc1"),
    "quantized": (quantized, "fc.0 is no plain"),
    "one layer": (lambda: timm_layer("EffectiveSEModule"), "one layer"),
    "gate alone": (lambda: GateAlone(32, 8), "returns the gate"),
}


@pytest.mark.parametrize(("make", "reason"), UNSERVED.values(), ids=UNSERVED.keys())
def test_what_the_operator_cannot_express_is_left_alone_and_reported(make, reason):
    net = Net(make())
    before = net.se
    with pytest.warns(UserWarning, match=f"left 1 of 1 SE modules as they are(.|\n)*  se: .*{reason}"):
        assert fuse_se(net) == 0
    assert net.se is before
    assert re.search(reason, se_modules(net)["se"])


@pytest.mark.parametrize(
    "make",
    (
        nn.Identity,
        Mlp,
        lambda: ChannelsLastSE(32),
        lambda: nn.Sequential(nn.Conv2d(32, 32, 1), nn.Sigmoid()),
        lambda: nn.Sequential(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 1)),
        lambda: timm.layers.GlobalResponseNormMlp(32, use_conv=True),
        lambda: timm_layer("EcaModule"),
        lambda: resnet18().layer1[0],
        lambda: nn.TransformerEncoderLayer(32, 4),
    ),
    ids=(
        "identity",
        "mlp",
        "channels last se",
        "one convolution",
        "bottleneck",
        "response norm",
        "eca",
        "resnet",
        "transformer",
    ),
)
def test_nothing_is_said_of_what_is_no_se(make):
    net = Net(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse_se(net) == 0
    assert se_modules(net) == {}


def test_one_warning_groups_the_reasons_and_counts_the_whole():
    model = nn.Sequential(
        *(Net(timm_se(add_maxpool=True)) for _ in range(6)), Net(timm_layer("EffectiveSEModule")), Net(SEBlock(32))
    )
    with pytest.warns(UserWarning, match="left 7 of 8 SE modules") as record:
        assert fuse_se(model) == 1
    assert len(record) == 1
    text = str(record[0].message)
    assert "0.se, 1.se, 2.se, 3.se and 2 more: it computes something else" in text
    assert "6.se: it has one layer" in text
    assert record[0].filename == __file__
    report = se_modules(model)
    assert list(report) == [*(f"{i}.se" for i in (7, 0, 1, 2, 3, 4, 5, 6))]
    assert report["7.se"] == "fused"


def test_a_shared_module_stays_shared_and_counts_once():
    se = SEBlock(32)
    net = Net(se)
    net.again, net.blocks = se, nn.ModuleList([se, SEBlock(32)])
    assert fuse_se(net, backend="cpu") == 2
    assert net.se is net.again is net.blocks[0]
    assert isinstance(net.se, FusedSE)
    assert unfuse_se(net) == 2
    assert net.se is net.again is net.blocks[0] is se


def test_the_root_has_no_place_to_be_swapped_at():
    with pytest.raises(ValueError, match=r"nn\.Sequential\(model\)"):
        fuse_se(SEBlock(32))
    wrapped = nn.Sequential(SEBlock(32))
    assert fuse_se(wrapped) == 1
    assert fuse_se(wrapped[0]) == 0
    with pytest.raises(ValueError, match=r"model\.unfused\(\)"):
        unfuse_se(wrapped[0])


def test_the_model_is_not_touched_while_it_is_examined(net):
    net.se.register_forward_pre_hook(lambda *args: pytest.fail("a hook of the model ran"))
    net.train()
    net.se.eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    random_state = torch.get_rng_state()
    se_modules(net)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.training
    assert not net.se.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_model_on_the_meta_device_is_fused(net):
    assert fuse_se(net.to("meta")) == 1


def test_modes_dtypes_and_frozen_parameters_pass_through(net):
    net.se.requires_grad_(False)
    net.eval()
    names = [name for name, _ in net.named_modules()]
    fuse_se(net, backend="cpu")
    assert [name for name, _ in net.named_modules()] == names
    assert not any(module.training for module in net.modules())
    assert "se" not in {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    net.train()
    assert all(module.training for module in net.modules())
    net.to(torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net.se(torch.ones(1, 32, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    net.load_state_dict({name: torch.zeros_like(t) for name, t in net.state_dict().items()})
    unfuse_se(net)
    assert all(module.training for module in net.modules())
    assert not any(p.any() for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


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
