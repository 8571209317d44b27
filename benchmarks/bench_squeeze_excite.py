"""Squeeze-and-Excitation at SE-ResNet50's four stages: this project's kernels against eager and torch.compile.

Forward as in training (it saves what the backward needs); backward alone, every gradient; and both, as a training step
has them. On a GPU every fused backend races, and calls take turns at enough copies of the input that none finds its own
in L2. On a CPU caches are as the entrant before has left them.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.race import Entrant, race
from kernels import FusedSEBlock, SEBlock, available_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, CALLS = (256, 6) if DEVICE == "cuda" else (8, 1)
STAGES = {"stage 1": (256, 56), "stage 2": (512, 28), "stage 3": (1024, 14), "stage 4": (2048, 7)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
CASES = [(stage, "NHWC", dtype) for stage in STAGES for dtype in DTYPES]
CASES += [("stage 1", "NCHW", "bfloat16"), ("stage 3", "NCHW", "float32")]

# Activation tensors that a call moves, by backend: read x twice, write out; read dout twice, read x, write dx. The
# one-read kernels of `cuda` keep a sample on the chip: read x, write out; read dout, read x, write dx.
FORWARD = {"cpu": 3, "triton": 3, "cuda": 2}
BACKWARD = {"cpu": 4, "triton": 4, "cuda": 3}


class Inputs(NamedTuple):
    x: Tensor
    dout: Tensor
    target: Tensor  # of the copy


class Case(NamedTuple):
    label: dict[str, str]
    inputs: list[Inputs]
    fused: dict[str, nn.Module]
    peers: dict[str, nn.Module]


def fused_backends() -> list[str]:
    status = available_backends()
    return [name for name in (("triton", "cuda") if DEVICE == "cuda" else ("cpu",)) if status.get(name) == "ok"]


def copies(bytes_of_x: int) -> int:
    if DEVICE == "cpu":
        return 1
    return min(CALLS, 1 + -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_of_x))


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest) -> Case:
    """Inputs, and the ways to compute a block of the same weights."""
    stage, layout, dtype = request.param
    channels, side = STAGES[stage]
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = SEBlock(channels).to(DEVICE, DTYPES[dtype])
    fused: dict[str, nn.Module] = {}
    for backend in fused_backends():
        fused[backend] = FusedSEBlock(channels, backend=backend).to(DEVICE, DTYPES[dtype])
        fused[backend].load_state_dict(eager.state_dict())
    if not fused:
        pytest.skip(f"no fused backend serves {DEVICE} here: {available_backends()}")

    def activation() -> Tensor:
        values = torch.randn(BATCH, channels, side, side, device=DEVICE, dtype=DTYPES[dtype])
        return values.to(memory_format=LAYOUTS[layout])

    inputs = [Inputs(activation().requires_grad_(), activation(), activation())]
    inputs += [Inputs(activation().requires_grad_(), *inputs[0][1:]) for _ in range(copies(inputs[0].x.nbytes) - 1)]
    label = {"stage": stage, "shape": f"({BATCH}, {channels}, {side}, {side})", "layout": layout, "dtype": dtype}
    return Case(label, inputs, fused, {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)})


def forward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    return Entrant(prepare=lambda i: inputs[i % len(inputs)].x, run=way)


def backward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    def graph(i: int) -> tuple[Tensor, Inputs]:
        return way(inputs[i % len(inputs)].x), inputs[i % len(inputs)]

    def run(state: tuple[Tensor, Inputs]) -> object:
        out, given = state
        return torch.autograd.grad(out, [given.x, *way.parameters()], given.dout)

    return Entrant(prepare=graph, run=run)


def forward_backward(way: nn.Module, inputs: list[Inputs]) -> Entrant:
    def run(given: Inputs) -> object:
        return torch.autograd.grad(way(given.x), [given.x, *way.parameters()], given.dout)

    return Entrant(prepare=lambda i: inputs[i % len(inputs)], run=run)


def copy(inputs: list[Inputs]) -> Entrant:
    def run(given: Inputs) -> object:
        return given.target.copy_(given.x.detach())

    return Entrant(prepare=lambda i: inputs[i % len(inputs)], run=run)


@pytest.mark.parametrize(
    ("direction", "units"),
    (
        pytest.param(forward, FORWARD, id="forward"),
        pytest.param(backward, BACKWARD, id="backward"),
        pytest.param(forward_backward, {name: FORWARD[name] + BACKWARD[name] for name in FORWARD}, id="both"),
    ),
)
def test_squeeze_excite(benchmark, case, direction, units):
    ours = {name: direction(way, case.inputs) for name, way in case.fused.items()}
    # The copy goes first in each round: the caches that it leaves behind are eager's, and not ours
    peers = {"copy": copy(case.inputs)} | {name: direction(way, case.inputs) for name, way in case.peers.items()}
    nbytes = case.inputs[0].x.nbytes
    for name, entrant in (ours | peers).items():
        entrant.calls = CALLS
        entrant.bytes_moved = nbytes * (2 if name == "copy" else units.get(name, 0))
    race(benchmark, ours, peers, label={**case.label, "pass": direction.__name__.replace("_", " + ")})
