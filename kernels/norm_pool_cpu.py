"""BatchNorm, ReLU and max pool on the CPU: the C++ operators of csrc/, under the signatures that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels._C  # noqa: F401  registers torch.ops.kernels_C
from kernels.norms import FixedNorm
from kernels.statistics import INVSTD, SCALE, batch_statistics, merge_over_ranks, running_statistics, sum_over_ranks

_OPS = torch.ops.kernels_C


def pool_fwd(y: Tensor, norm: FixedNorm) -> tuple[Tensor, Tensor, Tensor]:
    """out; code (N, H/2, W/2, C); stats (ROWS, C)."""
    stats = _statistics(y, norm)
    out, code = _OPS.pool_fwd(y, stats)
    return out, code, stats


def _statistics(y: Tensor, norm: FixedNorm) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    if norm.mean is not None and norm.var is not None:
        return running_statistics(norm.mean.to(wide), norm.var.to(wide), norm.weight, norm.bias, norm.eps).to(wide)
    mean, m2, _ = _OPS.tail_moments(y, False)
    count: int | Tensor = y.numel() // y.shape[1]
    if norm.group:
        mean, m2, count = merge_over_ranks(mean, m2, int(count), norm.group)
    return batch_statistics(mean, m2, count, norm.weight, norm.bias, norm.eps).to(wide)


def pool_bwd(
    dout: Tensor, y: Tensor, code: Tensor, stats: Tensor, training: bool, group: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dweight, dbias), empty where not asked for."""
    with_dy, with_dweight, with_dbias = output_mask
    dy, dweight, dbias = y.new_empty(0), stats.new_empty(0), stats.new_empty(0)
    coefficients = None
    if with_dweight or with_dbias or (with_dy and training):
        sums = _OPS.pool_bwd_sums(dout, y, code, stats)
        sums[0] *= stats[INVSTD]
        if with_dy and training:
            count: int | Tensor = y.numel() // y.shape[1]
            total, count = sum_over_ranks(sums, int(count), group) if group else (sums, count)
            shares = total / count * -stats[SCALE].double()
            coefficients = torch.stack((shares[0] * stats[INVSTD], shares[1])).to(stats.dtype)
        dweight, dbias = (
            row.to(stats.dtype) if wanted else empty
            for row, wanted, empty in zip(sums, (with_dweight, with_dbias), (dweight, dbias), strict=True)
        )
    if with_dy:
        dy = _OPS.pool_bwd_grads(dout, y, code, stats, coefficients)
    return dy, dweight, dbias
