"""Inputs of `squeeze_excite` and what a backend makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import squeeze_excite
from tests.accuracy import assert_as_accurate_as_eager
from tests.backends import DEVICES, param

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
HALF_TYPES = (torch.bfloat16, torch.float16)
# (dtype, layout): each with each, and where that is slow, as in Triton's interpreter, each at least once
DTYPES_AND_LAYOUTS = list(itertools.product((torch.float32, *HALF_TYPES), LAYOUTS))
SOME_DTYPES_AND_LAYOUTS = [
    (d, layout) for d, layout in DTYPES_AND_LAYOUTS if (d == torch.float16) == (layout == "contiguous")
]
NAMES = ("out", "dx", "dw1", "dw2", "db1", "db2")


def ids(values: object) -> str:
    """Of a dtype or a shape, short."""
    if isinstance(values, torch.dtype):
        return str(values).removeprefix("torch.")
    return "x".join(map(str, values)) if isinstance(values, tuple) else str(values)


def in_dtypes_and_layouts(backends: Iterable[object]) -> list[object]:
    """Parameters (backend, dtype, layout)."""
    return [
        param(backend, dtype, layout)
        for backend in backends
        for dtype, layout in (SOME_DTYPES_AND_LAYOUTS if backend == "triton" else DTYPES_AND_LAYOUTS)
    ]


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    *,
    layout: str = "channels_last",
    bias: bool = True,
) -> tuple[list[Tensor | None], Tensor]:
    """[x, w1, w2, b1, b2] and dout: drawn in float64 and rounded to dtype, so that every precision sees one set."""
    N, C, H, W, R = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICES[backend], dtype)

    x = (draw(N, C, H, W) + 0.5).to(memory_format=LAYOUTS[layout])
    dout = draw(N, C, H, W).to(memory_format=LAYOUTS[layout])
    w1, w2 = draw(R, C) / C**0.5, draw(C, R) / R**0.5
    return [x, w1, w2, draw(R) if bias else None, draw(C) if bias else None], dout


def as_leaves(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


def value_and_gradients(inputs: list[Tensor | None], dout: Tensor, **options: str) -> dict[str, Tensor]:
    leaves = as_leaves(inputs)
    out = squeeze_excite(*leaves, **options)
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(out, wanted, dout)
    names = [name for name, t in zip(NAMES[1:], leaves, strict=True) if t is not None]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def check_parity(inputs: list[Tensor | None], dout: Tensor, backend: str, **options: str) -> dict[str, Tensor]:
    """Holds the backend to the accuracy rule and returns its results."""
    wide = [None if t is None else t.double() for t in inputs]
    actual = value_and_gradients(inputs, dout, backend=backend, **options)
    eager = value_and_gradients(inputs, dout, backend="eager", **options)
    exact = value_and_gradients(wide, dout.double(), backend="eager", **options)
    for name in actual:
        assert_as_accurate_as_eager(f"{backend} {name}", actual[name], eager[name], exact[name])
    return actual


def far_apart(x: Tensor) -> Tensor:
    """x with 2**31 elements and more from one sample to the next; only the pages that x touches are ever there."""
    N, C, H, W = x.shape
    assert N == 2
    step = 2**31 + 64
    return x.new_empty(step + C * H * W).as_strided(x.shape, (step, *x.stride()[1:])).copy_(x)
