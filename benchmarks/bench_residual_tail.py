"""The tail of SE-ResNet50's blocks, their inner BatchNorm + ReLU, and the stem's with its max pool, against eager and
torch.compile.

Training: forward (which saves what the backward needs and updates the running statistics); backward alone, every
gradient; and both. Eager is the modules one after another. On a GPU every fused backend that has a tail races, and
calls take turns at enough copies of the inputs that none finds its own in L2. On a CPU caches are as the entrant before
has left them.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.race import Entrant, race
from kernels import SEBlock, available_backends, norm_relu_pool
from kernels.backends import OPERATORS
from kernels.norms import Norm
from kernels.residual_tail import SE, residual_tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, CALLS = (256, 6) if DEVICE == "cuda" else (8, 1)
TAILS = {"stage 1": (256, 56), "stage 2": (512, 28), "stage 3": (1024, 14), "stage 4": (2048, 7)}
PAIRS = {"stage 1": (64, 56), "stage 2": (128, 28), "stage 3": (256, 14), "stage 4": (512, 7)}
STEM = {"stem": (64, 112)}
KINDS = {"tail": TAILS, "BN+ReLU": PAIRS, "BN+ReLU+pool": STEM}
DTYPES = {"bfloat16": torch.bfloat16} if DEVICE == "cuda" else {"bfloat16": torch.bfloat16, "float32": torch.float32}
CASES = [(kind, stage, dtype) for kind in KINDS for stage in KINDS[kind] for dtype in DTYPES]

# Activation tensors that a call moves (design section 5), the mask's bit an element as in a half type. The tail reads y
# twice and the residual, and writes out and the bits; then it reads dout, the bits and y twice each, and writes dy and
# dresidual. The pair has neither residual nor bits.
UNITS = {
    "tail": {"forward": 4 + 1 / 16, "backward": 6 + 2 / 16},
    "BN+ReLU": {"forward": 3, "backward": 5},
    # out, dout and the codes, a byte each, have a quarter as many elements
    "BN+ReLU+pool": {"forward": 2 + 1 / 4 + 1 / 8, "backward": 3 + 2 / 4 + 2 / 8},
}


class Modules(nn.Module):
    """What a block has at its end, as modules."""

    def __init__(self, channels: int, with_se: bool, with_pool: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.se = SEBlock(channels) if with_se else None
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1) if with_pool else nn.Identity()

    def forward(self, y: Tensor, residual: Tensor | None) -> Tensor:
        z = self.norm(y)
        if self.se is not None:
            z = self.se(z)
        return self.pool(self.act(z if residual is None else z + residual))


class Fused(Modules):
    """The same as one operator."""

    backend = "auto"

    def forward(self, y: Tensor, residual: Tensor | None) -> Tensor:
        bn = self.norm
        norm = Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)
        if isinstance(self.pool, nn.MaxPool2d):
            return norm_relu_pool(y, norm, backend=self.backend)
        se = None if self.se is None else SE(self.se.fc[0].weight, self.se.fc[2].weight)
        return residual_tail(y, norm, se=se, residual=residual, backend=self.backend)


class Inputs(NamedTuple):
    y: Tensor
    residual: Tensor | None
    dout: Tensor
    target: Tensor  # of the copy

    def differentiable(self) -> list[Tensor]:
        return [self.y, *([] if self.residual is None else [self.residual])]


class Case(NamedTuple):
    label: dict[str, str]
    inputs: list[Inputs]
    fused: dict[str, nn.Module]
    peers: dict[str, nn.Module]


def fused_backends() -> list[str]:
    status = available_backends()
    candidates = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
    return [name for name in candidates if name in OPERATORS["residual_tail"] and status[name] == "ok"]


def copies(bytes_of_y: int) -> int:
    if DEVICE == "cpu":
        return 1
    return min(CALLS, 1 + -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_of_y))


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Inputs, and the ways to compute a tail of the same weights."""
    kind, stage, dtype = request.param
    channels, side = KINDS[kind][stage]
    with_se, with_pool = kind == "tail", kind == "BN+ReLU+pool"
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = Modules(channels, with_se, with_pool).to(DEVICE)
    if eager.se is not None:
        eager.se.to(DTYPES[dtype])
    fused: dict[str, nn.Module] = {}
    for backend in fused_backends():
        fused[backend] = Fused(channels, with_se, with_pool).to(DEVICE)
        fused[backend].backend = backend
        if eager.se is not None:
            fused[backend].se.to(DTYPES[dtype])
        fused[backend].load_state_dict(eager.state_dict())
    if not fused:
        pytest.skip(f"no fused backend serves {DEVICE} here: {available_backends()}")

    def activation(side: int = side) -> Tensor:
        values = torch.randn(BATCH, channels, side, side, device=DEVICE, dtype=DTYPES[dtype])
        return values.to(memory_format=torch.channels_last)

    def leaf() -> Tensor:
        return activation().requires_grad_()

    inputs = [Inputs(leaf(), leaf() if with_se else None, activation(side // 2 if with_pool else side), activation())]
    for _ in range(copies(inputs[0].y.nbytes) - 1):
        inputs.append(Inputs(leaf(), leaf() if with_se else None, *inputs[0][2:]))
    label = {"kind": kind, "stage": stage, "shape": f"({BATCH}, {channels}, {side}, {side})", "dtype": dtype}
    return Case(label, inputs, fused, {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)})


def forward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    return Entrant(prepare=lambda i: inputs[i % len(inputs)][:2], run=lambda given: way(*given))


def backward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    def graph(i: int) -> tuple[Tensor, Inputs]:
        given = inputs[i % len(inputs)]
        return way(*given[:2]), given

    def run(state: tuple[Tensor, Inputs]) -> object:
        out, given = state
        return torch.autograd.grad(out, [*given.differentiable(), *way.parameters()], given.dout)

    return Entrant(prepare=graph, run=run)


def forward_backward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    def run(given: Inputs) -> object:
        return torch.autograd.grad(way(*given[:2]), [*given.differentiable(), *way.parameters()], given.dout)

    return Entrant(prepare=lambda i: inputs[i % len(inputs)], run=run)


def copy(inputs: list[Inputs]) -> Entrant:
    def run(given: Inputs) -> object:
        return given.target.copy_(given.y.detach())

    return Entrant(prepare=lambda i: inputs[i % len(inputs)], run=run)


@pytest.mark.parametrize("direction", (forward, backward, forward_backward), ids=("forward", "backward", "both"))
def test_residual_tail(benchmark, case, direction):
    name = direction.__name__.replace("_", " + ")
    units = sum(UNITS[case.label["kind"]][part] for part in name.split(" + "))
    ours = {backend: direction(way, case.inputs) for backend, way in case.fused.items()}
    # The copy goes first in each round: the caches that it leaves behind are eager's, and not ours
    peers = {"copy": copy(case.inputs)} | {peer: direction(way, case.inputs) for peer, way in case.peers.items()}
    nbytes = case.inputs[0].y.nbytes
    for entrant_name, entrant in (ours | peers).items():
        entrant.calls = CALLS
        entrant.bytes_moved = int(nbytes * (2 if entrant_name == "copy" else units))
    race(benchmark, ours, peers, label={**case.label, "pass": name})
