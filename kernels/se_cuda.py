"""Squeeze-and-Excitation on NVIDIA GPUs: the CUDA operators of csrc/, under the signatures that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels._C  # noqa: F401  registers torch.ops.kernels_C
from kernels.reference import ACTIVATIONS, GATES

_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_GATE_CODES = {name: code for code, name in enumerate(GATES)}
_OPS = torch.ops.kernels_C


def se_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C, H, W), w1 (R, C), w2 (C, R) -> out like x; pooled (N, C), hidden (N, R), gate (N, C) in float32."""
    return _OPS.se_cuda_fwd(x, w1, b1, w2, b2, _ACT_CODES[act], _GATE_CODES[gate_fn])


def se_bwd(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    act: str,
    gate_fn: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dw1, db1, dw2, db2), dx like x, the others in the weights' dtypes; empty where not asked for."""
    return _OPS.se_cuda_bwd(dout, x, w1, w2, pooled, hidden, gate, _ACT_CODES[act], _GATE_CODES[gate_fn], output_mask)
