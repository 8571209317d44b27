"""Bytes of a residual tail in training, forward and backward, every gradient, three ways: for `benchmarks.traffic`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.counting import CountedOperators, Traffic, by_address, by_size, counted_accesses, inductor_accesses
from kernels import SEBlock, se_triton
from kernels.norms import FixedNorm
from kernels.residual_tail import SE, How, Saved, backend_module


class Kind(NamedTuple):
    """What stands in a tail besides its BatchNorm and its ReLU."""

    se: bool
    residual: bool
    residual_norm: bool = False

    def __str__(self) -> str:
        added = ["add(BN)" if self.residual_norm else "add"] if self.residual else []
        return "+".join(["BN", *(["SE"] if self.se else []), *added, "ReLU"])


KINDS = (Kind(se=True, residual=True), Kind(se=True, residual=True, residual_norm=True), Kind(se=False, residual=False))


class Tail(nn.Module):
    """The tail of PyTorch's own modules."""

    def __init__(self, channels: int, kind: Kind) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.se = SEBlock(channels) if kind.se else nn.Identity()
        self.residual_norm = nn.BatchNorm2d(channels) if kind.residual_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, y: Tensor, residual: Tensor | None) -> Tensor:
        out = self.se(self.norm(y))
        if residual is not None:
            out += self.residual_norm(residual)
        return self.relu(out)


def _activations(kind: Kind, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, residual and dout, in ``like``'s shape, dtype and layout."""
    y, residual, dout = (torch.randn_like(like) for _ in range(3))
    return y, residual if kind.residual else None, dout


def eager_traffic(kind: Kind, like: Tensor) -> tuple[Traffic, Traffic]:
    y, residual, dout = _activations(kind, like)
    tail = Tail(y.shape[1], kind).to(y.dtype)
    leaves = [t.requires_grad_() for t in (y, residual) if t is not None]
    with CountedOperators() as forward:
        out = tail(y, residual)
    with CountedOperators() as backward:
        torch.autograd.grad(out, [*leaves, *tail.parameters()], dout)
    return by_size(forward.accesses, like.nbytes), by_size(backward.accesses, like.nbytes)


def compiled_traffic(kind: Kind, like: Tensor) -> tuple[Traffic, Traffic]:
    """As Inductor compiles it for the CPU."""
    y, residual, dout = _activations(kind, like)
    tail = Tail(y.shape[1], kind).to(y.dtype)
    leaves = [t.requires_grad_() for t in (y, residual) if t is not None]
    forward, backward = inductor_accesses(lambda: tail(y, residual), [*leaves, *tail.parameters()], dout)
    return by_size(forward, like.nbytes), by_size(backward, like.nbytes)


def triton_traffic(kind: Kind, like: Tensor) -> tuple[Traffic, Traffic]:
    """Of the Triton kernels, whose accesses do not depend on the batch but for the small tensors."""
    if not se_triton.INTERPRETED:
        raise RuntimeError("Triton's kernels were imported to run on the GPU; start Python with TRITON_INTERPRET=1")
    backend = backend_module("triton")
    y, residual, dout = _activations(kind, like[:1])
    C = y.shape[1]
    R = max(1, C // 16)
    norm, norm2 = (FixedNorm(torch.ones(C), torch.zeros(C), None, None, 1e-5, "") for _ in range(2))
    w1, b1, w2, b2 = (torch.randn(size, dtype=y.dtype) for size in ((R, C), (R,), (C, R), (C,)))
    se = SE(w1, w2, b1, b2) if kind.se else None
    with counted_accesses() as forward:
        out, mask, *rest = backend.tail_fwd(y, norm, se, residual, norm2 if kind.residual_norm else None, "relu")
    kept = residual if kind.residual_norm else None
    saved = Saved(y, kept, *((w1, w2) if kind.se else (None, None)), mask, *rest)
    how = How(kind.residual, True, kind.residual_norm, "", "", "relu", "relu", "sigmoid")
    wanted = [True, kind.residual, True, True, *[kind.se] * 4, *[kind.residual_norm] * 2]
    with counted_accesses() as backward:
        dy, dresidual, *_ = backend.tail_bwd(dout, saved, how, wanted)
    large = [t for t in (y, residual, out, mask, dout, dy, dresidual) if t is not None and t.numel()]
    return by_address(forward, large), by_address(backward, large)
