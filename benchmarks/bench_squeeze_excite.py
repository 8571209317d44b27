"""Squeeze-and-Excitation at SE-ResNet50's four stages: this project's operator against eager and torch.compile.

Forward as in training (it saves what the backward needs); backward alone, every gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.race import Entrant, race
from kernels import FusedSEBlock, SEBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 256 if DEVICE == "cuda" else 8
STAGES = {"stage 1": (256, 56), "stage 2": (512, 28), "stage 3": (1024, 14), "stage 4": (2048, 7)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module", params=[(s, d) for s in STAGES for d in DTYPES], ids=lambda p: f"{p[0]} {p[1]}")
def case(request):
    """The label, x, dout, and the three ways to compute a block with the same weights."""
    stage, dtype = request.param
    channels, side = STAGES[stage]
    torch.manual_seed(0)
    torch.compiler.reset()
    fused = FusedSEBlock(channels).to(DEVICE, DTYPES[dtype])
    eager = SEBlock(channels).to(DEVICE, DTYPES[dtype])
    eager.load_state_dict(fused.state_dict())
    x, dout = (
        torch.randn(BATCH, channels, side, side, device=DEVICE, dtype=DTYPES[dtype]).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    ways = {"ours": fused, "eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
    shape = f"({BATCH}, {channels}, {side}, {side})"
    return {"stage": stage, "shape": shape, "dtype": dtype}, x.requires_grad_(), dout, ways


def forward(way: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor) -> Entrant:
    return Entrant(run=lambda _: way(x))


def backward(way: torch.nn.Module, x: Tensor, dout: Tensor) -> Entrant:
    leaves = [x, *way.parameters()]
    return Entrant(prepare=lambda: way(x), run=lambda out: torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize("direction", (forward, backward), ids=("forward", "backward"))
def test_squeeze_excite(benchmark, case, direction):
    label, x, dout, ways = case
    entrants = {name: direction(way, x, dout) for name, way in ways.items()}
    race(benchmark, entrants.pop("ours"), entrants, label={**label, "pass": direction.__name__})
