"""Every mask, term, factor and sum of the Triton kernels is needed: without any one of them a launch does otherwise.

`tests.mutation` says how mutants are made and told from the original. The operators run here with small blocks, on
shapes that fill none of them, and what they make of it is held against float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from kernels import (
    norm_pool_triton,
    norm_pool_triton_sweeps,
    se_triton,
    tail_triton,
    tail_triton_small,
    tail_triton_sweeps,
    triton_products,
    triton_tiles,
)
from kernels.norms import FixedNorm
from kernels.reference import ACTIVATIONS, GATES
from tests.mutation import Launch, kernels_of, mutants, recorded, survivors, uses
from tests.stem_cases import check_parity as check_stem_parity
from tests.stem_cases import make_stem, results_of
from tests.tail_cases import check_parity, make_tail

pytestmark = [
    pytest.mark.skipif(not se_triton.INTERPRETED, reason="mutants run in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning"),  # of what mutants compute
]

N, C, H, W, R = 3, 11, 3, 9, 5  # with the blocks below: two or more of each, the last one never full
Blocks = dict[ModuleType, dict[str, Any]]
SMALL_PRODUCTS = {"BLOCK_C": 4, "BLOCK_R": 4, "SLICE": 8}
SE_BLOCKS: Blocks = {
    triton_products: {**SMALL_PRODUCTS, "ROWS": 2, "ROWS_SUMMED": 2},
    se_triton: {"TILE": 64, "SIDES": {"channels": (8,), "pixels": (8,), "any": (8,)}, "PROGRAMS": 12},
}
TAIL_BLOCKS: Blocks = {
    triton_products: {**SMALL_PRODUCTS, "ROWS": 4, "ROWS_SUMMED": 4},
    tail_triton: {
        "SIDE": 16,  # two bytes of the mask
        "SUMMED_TILE": 512,
        "APPLIED_TILE": 1024,
        "STRETCHES": 4,
        "CHANNELS": 4,
    },
}
STEM_BLOCKS: Blocks = {
    tail_triton: TAIL_BLOCKS[tail_triton],
    norm_pool_triton: {"SIDE": 4, "COLUMNS": 2, "ROWS": 2, "SUMMED": 2},
}
MODULES = (
    triton_tiles,
    triton_products,
    se_triton,
    tail_triton_small,
    tail_triton_sweeps,
    norm_pool_triton_sweeps,
)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": lambda t: t.contiguous(memory_format=torch.channels_last),
    "pixels": torch.Tensor.contiguous,
    "any": lambda t: t.new_empty(N, C, 2 * H, 2 * W)[:, :, ::2, ::2].copy_(t),
}


@contextlib.contextmanager
def small(every: Blocks) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, blocks in every.items():
            for name, value in blocks.items():
                stack.enter_context(mock.patch.object(module, name, value))
        yield


def draw(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float32) for size in sizes]


def run_se(act: str, gate: str, bias: bool, order: str) -> None:
    lay, wide = LAYOUTS[order], torch.float64
    x, w1, w2, b1, b2, dout = draw((N, C, H, W), (R, C), (C, R), (R,), (C,), (N, C, H, W))
    values = [x + 0.5, w1, 4 * w2, b1, b2]  # gates of 0 and of 1 among them
    x, w1, w2, b1, b2 = leaves = [t.to(wide).requires_grad_() for t in values]
    pooled = x.mean((2, 3))
    hidden = pooled @ w1.T + (b1 if bias else 0)
    s = GATES[gate](ACTIVATIONS[act](hidden) @ w2.T + (b2 if bias else 0))
    out = x * s[:, :, None, None]
    gradients = torch.autograd.grad(out, leaves, dout.to(wide), allow_unused=not bias)

    x, w1, w2, b1, b2 = values
    x, dout, b1, b2 = lay(x), lay(dout), *((b1, b2) if bias else (None, None))
    actual = se_triton.se_fwd(x, w1, b1, w2, b2, act, gate)
    compare(actual, (out, pooled, hidden, s))
    wanted = [True, True, bias, True, bias]
    dx, dw1, db1, dw2, db2 = se_triton.se_bwd(dout, x, w1, w2, *actual[1:], act, gate, wanted)
    compare((dx, dw1, dw2, db1, db2), gradients)


def compare(actual: tuple[Tensor, ...], exact: tuple[Tensor | None, ...]) -> None:
    for got, wanted in zip(actual, exact, strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-4, atol=1e-5)


SE_CASES = [
    ("relu", "sigmoid", True, "channels"),
    ("silu", "hardsigmoid", True, "pixels"),
    ("gelu", "sigmoid", False, "any"),
]


TAIL_CASES: list[dict[str, Any]] = [
    {"layout": "channels_last", "shift": 100.0},
    {"layout": "contiguous", "residual": "norm", "act": "silu", "gate": "hardsigmoid", "se_act": "silu"},
    {"layout": "channels_last", "se": False, "residual": None, "samples": 3},
    {"layout": "contiguous", "se": False, "residual": None, "dtype": torch.bfloat16},
    {"layout": "contiguous", "residual": None, "dtype": torch.float16, "affine": False, "width": 1},
    {"layout": "channels_last", "residual": "norm", "training": False, "se_act": "gelu", "width": 1},
    {"layout": "channels_last", "se": False, "residual": None, "training": False, "width": 1},
    {"layout": "contiguous", "residual": "norm", "mixed": True},
    {"layout": "channels_last", "se": False, "act": "identity", "mixed": True},
]


def run_tail(*, samples: int = 2, width: int = 13, mixed: bool = False, **options: Any) -> None:
    """``mixed``: y and the residual lie in memory in different orders."""
    tail = make_tail((samples, 19, H, width, R), backend="triton", **options)
    tail.norm = tail.norm._replace(eps=0.1)  # so that it counts
    if mixed:
        other = torch.contiguous_format if options["layout"] == "channels_last" else torch.channels_last
        tail.residual = tail.residual.contiguous(memory_format=other)
    check_parity(tail, "triton")


def run_extremes() -> None:
    """Channels that are constant, some of whose squares come out below 0 by rounding; and one with an infinite value.

    Seven of a kind, whose mean is rounded; so large that its rounding counts.
    """
    constants = 3e18 * torch.rand(40, generator=torch.Generator().manual_seed(0))
    y = constants[:, None, None].expand(7, 40, 1, 7).contiguous(memory_format=torch.channels_last)
    y[1, 3, 0, 5] = float("inf")
    tail_triton.tail_fwd(y, FixedNorm(None, None, None, None, 0.1, ""), None, None, None, "relu")


def run_stem(shape: tuple[int, ...], *, nan: bool = False, **options: Any) -> None:
    stem = make_stem(shape, backend="triton", **options)
    if nan:
        stem.y[0, 0, 1, 1] = stem.y[0, 0, 2, 2] = float("nan")
        results_of(stem, "triton")
    else:
        check_stem_parity(stem, "triton")


STEM_CASES: list[dict[str, Any]] = [
    {"shape": (2, 5, 5, 5), "shift": -5.0},  # what is read outside must not be a maximum
    {"shape": (1, 5, 4, 5), "dtype": torch.bfloat16, "training": False},
    {"shape": (1, 3, 3, 4), "training": False, "nan": True},
]


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    noted: list[Launch] = []
    with small(SE_BLOCKS), recorded(noted):
        for case in SE_CASES:
            run_se(*case)
    with small(TAIL_BLOCKS), recorded(noted):
        for options in TAIL_CASES:
            run_tail(**options)
        run_extremes()
    with small(STEM_BLOCKS), recorded(noted):
        for options in STEM_CASES:
            run_stem(**options)
    return noted


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_mutant_survives(module, launches):
    kernels = kernels_of(module)
    assert len(kernels) > 1
    unmet = [k.__name__ for k in kernels if not any(uses(launch.kernel, k) for launch in launches)]
    assert not unmet, f"never launched: {unmet}"
    alive = survivors(kernels, launches)
    assert not alive, "\n".join(map(str, alive))


def test_mutants_are_made_of_every_kernel():
    assert all(any(mutants(kernel)) for module in MODULES for kernel in kernels_of(module))
