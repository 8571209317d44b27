"""Inputs of `norm_relu_pool` and what a backend makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.norm_pool import norm_relu_pool
from kernels.norms import Norm
from tests.accuracy import FEW, assert_network_as_accurate_as_eager
from tests.tail_cases import make_tail


@dataclass
class Stem:
    """Arguments of `norm_relu_pool`, and the gradient of its result."""

    y: Tensor
    norm: Norm
    dout: Tensor

    def to(self, dtype: torch.dtype) -> Stem:
        norm = (t.to(dtype) if isinstance(t, Tensor) else t for t in self.norm)
        return Stem(self.y.to(dtype), Norm(*norm), self.dout.to(dtype))


def make_stem(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, backend: str = "cpu", **options: Any) -> Stem:
    """Of the values that `make_tail` draws."""
    tail = make_tail((*shape, 1), dtype, backend, se=False, residual=None, act="identity", **options)
    dout = tail.dout[:, :, : -(-shape[2] // 2), : -(-shape[3] // 2)]
    return Stem(tail.y, tail.norm, dout.contiguous(memory_format=torch.channels_last))


def results_of(stem: Stem, backend: str) -> dict[str, Tensor]:
    """Everything that the operator makes: out, the gradients, the running statistics as it leaves them."""
    norm = Norm(*(t.detach().clone() if isinstance(t, Tensor) else t for t in stem.norm))
    leaves = {"y": stem.y.detach().clone(), "weight": norm.weight, "bias": norm.bias}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    out = norm_relu_pool(leaves["y"], norm, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), stem.dout)
    results = {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return results | {name: t for name, t in running.items() if t is not None}


def check_parity(stem: Stem, backend: str) -> dict[str, Tensor]:
    """Holds each of the two activations, and all that has C columns as one vector, to the accuracy rule."""
    actual, eager, exact = (
        results_of(stem, backend),
        results_of(stem, "eager"),
        results_of(stem.to(torch.float64), "eager"),
    )
    assert actual.keys() == eager.keys() == exact.keys()
    for name, t in actual.items():
        assert (t.dtype, t.shape) == (eager[name].dtype, eager[name].shape), name
    for names in (["out"], ["dy"], [name for name in actual if name not in ("out", "dy")]):
        few = sum(actual[name].numel() for name in names) < FEW
        for name in names:
            if few or actual[name].dtype in (torch.float32, torch.float64):
                expected = exact[name].to(actual[name].dtype)
                torch.testing.assert_close(actual[name], expected, msg=lambda m, name=name: f"{name}: {m}")
        if names and not few and actual[names[0]].dtype != torch.float64:
            assert_network_as_accurate_as_eager(*({n: got[n] for n in names} for got in (actual, eager, exact)))
    return actual
