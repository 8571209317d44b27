"""Bytes of a ResNet's stem, BatchNorm + ReLU + max pool, in training, three ways: for `benchmarks.traffic`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.counting import CountedOperators, Traffic, by_address, by_size, counted_accesses, inductor_accesses
from kernels import se_triton
from kernels.norm_pool import backend_module, pooled
from kernels.norms import FixedNorm


def activation(dtype: torch.dtype, *, batch: int = 1, side: int = 32) -> Tensor:
    """y: the figures are the same at every side that fills the kernels' tiles."""
    return torch.randn(batch, 64, side, side).to(dtype).to(memory_format=torch.channels_last)


def _stem(y: Tensor) -> tuple[nn.Module, list[Tensor], Tensor]:
    """The modules, what has a gradient, and dout."""
    stem = nn.Sequential(nn.BatchNorm2d(y.shape[1]), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)).to(y.dtype)
    return stem, [y.requires_grad_(), *stem.parameters()], _dout(y)


def _dout(y: Tensor) -> Tensor:
    N, C, H, W = y.shape
    dout = torch.randn(N, C, pooled(H), pooled(W)).to(y.dtype)
    return dout.to(memory_format=torch.channels_last)


def eager_traffic(y: Tensor) -> tuple[Traffic, Traffic]:
    stem, leaves, dout = _stem(y)
    with CountedOperators() as forward:
        out = stem(y)
    with CountedOperators() as backward:
        torch.autograd.grad(out, leaves, dout)
    return by_size(forward.accesses, y.nbytes), by_size(backward.accesses, y.nbytes)


def compiled_traffic(y: Tensor) -> tuple[Traffic, Traffic]:
    """As Inductor compiles it for the CPU."""
    stem, leaves, dout = _stem(y)
    forward, backward = inductor_accesses(lambda: stem(y), leaves, dout)
    return by_size(forward, y.nbytes), by_size(backward, y.nbytes)


def triton_traffic(y: Tensor) -> tuple[Traffic, Traffic]:
    """Of the Triton kernels: every access, also those that a window shares with its neighbour and that meet L1."""
    if not se_triton.INTERPRETED:
        raise RuntimeError("Triton's kernels were imported to run on the GPU; start Python with TRITON_INTERPRET=1")
    backend, C = backend_module("triton"), y.shape[1]
    dout = _dout(y)
    with counted_accesses() as forward:
        out, code, stats = backend.pool_fwd(y, FixedNorm(torch.ones(C), torch.zeros(C), None, None, 1e-5, ""))
    with counted_accesses() as backward:
        dy, *_ = backend.pool_bwd(dout, y, code, stats, True, "", [True] * 3)
    large = [y, out, code, dout, dy]
    return by_address(forward, large), by_address(backward, large)
