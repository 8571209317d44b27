"""BatchNorm, ReLU and max pool in Triton: three launches each way; no atomics.

    forward    moments, statistics       as in `kernels.tail_triton`                              reads y
               norm_pool     out and code                                       reads y, writes out, code
    backward   sums          T, U [n,k,c] of the k-th stretch of outputs      reads dout, code, y where code points
               coefficients  as in `kernels.tail_triton`
               bwd           dy                                               reads dout, code, y, writes dy

A tile is some columns of outputs by some channels, and a program walks down some rows of them: what a window has in
common with the one above it stays in registers, and what it has in common with the one on its left is read once more by
the same program, at once, while it is in L1.

Names, vectors and the finite number of kernels: `kernels.triton_tiles`. Formulas: `kernels.norm_pool`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.norm_pool import pooled
from kernels.norm_pool_triton_sweeps import _norm_pool_bwd_kernel, _norm_pool_kernel, _norm_pool_sums_kernel
from kernels.norms import FixedNorm
from kernels.tail_triton import MERGED, PROGRAMS, Sums, _coefficients, _moments, _statistics
from kernels.triton_tiles import OPTIONS, VECTORS, _strides

SIDE = 64  # channels of a tile
COLUMNS, ROWS = 16, 8  # of outputs: of a tile, and that a program walks down
SUMMED = 32  # outputs of a tile of the sums


def pool_fwd(y: Tensor, norm: FixedNorm) -> tuple[Tensor, Tensor, Tensor]:
    """out; code (N, H/2, W/2, C); stats (ROWS, C)."""
    N, C, H, W = y.shape
    Ho, Wo = pooled(H), pooled(W)
    out = torch.empty((N, C, Ho, Wo), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    code = y.new_empty((N, Ho, Wo, C), dtype=torch.uint8)
    with torch.cuda.device_of(y):
        stats = _statistics(_moments(y) if norm.mean is None else None, norm, C)
        _norm_pool_kernel[_grid(y)](
            y, stats, out, code, C, H, W, Ho, Wo, *_strides_nhw(y),
            _vector([y]), ROWS, COLUMNS, SIDE, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out, code, stats


def pool_bwd(
    dout: Tensor, y: Tensor, code: Tensor, stats: Tensor, training: bool, group: str, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dweight, dbias), empty where not asked for."""
    with_dy, with_dweight, with_dbias = output_mask
    _, C, H, W = y.shape
    Ho, Wo = pooled(H), pooled(W)
    if C > 1 and dout.stride(1) != 1:
        dout = dout.contiguous(memory_format=torch.channels_last)
    dy = torch.empty_like(y, memory_format=torch.channels_last) if with_dy else y.new_empty(0)
    dweight, dbias = stats.new_empty(0), stats.new_empty(0)
    coefficients = None
    with torch.cuda.device_of(y):
        if with_dweight or with_dbias or (with_dy and training):
            sums = _sums(dout, y, code, stats)
            dweight, dbias, coefficients = _coefficients(
                sums, sums.u, stats, None, y, group if training and with_dy else ""
            )
        if with_dy:
            _norm_pool_bwd_kernel[_grid(y)](
                dout, y, code, stats, coefficients if training else None, dy, C, H, W, Ho, Wo,
                *_strides_nhw(dout), *_strides_nhw(y), training, _vector([y, dout]), ROWS, COLUMNS, SIDE,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
    return dy, dweight if with_dweight else dweight.new_empty(0), dbias if with_dbias else dbias.new_empty(0)


def _sums(dout: Tensor, y: Tensor, code: Tensor, stats: Tensor) -> Sums:
    N, C, H, W = y.shape
    Ho, Wo = pooled(H), pooled(W)
    programs = min(PROGRAMS // (N * triton.cdiv(C, SIDE)), MERGED // N)
    parts = max(1, min(programs, triton.cdiv(Ho * Wo, 4 * SUMMED)))
    stretch = triton.cdiv(triton.cdiv(Ho * Wo, parts), SUMMED) * SUMMED
    parts = triton.cdiv(Ho * Wo, stretch)
    t, u = stats.new_empty((2, N, parts, C))
    _norm_pool_sums_kernel[(N * parts * triton.cdiv(C, SIDE),)](
        dout, y, code, stats, t, u, C, Ho * Wo, Wo, parts, stretch, *_strides_nhw(dout), *_strides_nhw(y),
        _vector([y, dout]), SUMMED, SIDE, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return Sums(t, u, t.new_empty(0))


def _grid(y: Tensor) -> tuple[int]:
    N, C, H, W = y.shape
    return (N * triton.cdiv(pooled(H), ROWS) * triton.cdiv(pooled(W), COLUMNS) * triton.cdiv(C, SIDE),)


def _strides_nhw(x: Tensor) -> tuple[int, int, int]:
    s_n, _, s_h, s_w = _strides(x)
    return s_n, s_h, s_w


def _vector(tensors: list[Tensor]) -> int:
    """The most channels, of `VECTORS`, that start at a multiple of their size at every pixel of the tensors."""
    itemsize = tensors[0].element_size()
    starts = [tensors[0].shape[1]]
    for x in tensors:
        starts += [x.data_ptr() // itemsize, *_strides_nhw(x)]
    return next(v for v in VECTORS if v * itemsize <= 16 and all(start % v == 0 for start in starts))
