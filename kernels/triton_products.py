"""The excitation in Triton: two small products forward, four backward, each sum over C cut into slices; no atomics.

    forward    fc1        pooled (N, C) from partial sums;  slice[n,j,r] = W1 pooled over the j-th slice of C
               fc2        hidden = sum_j slice + b1;  gate = g(W2 act(hidden) + b2)
    backward   fc2_bwd    ds (N, C) from partial sums;  dz = ds * g'(gate);  slice[n,j,r] = dz W2 over the j-th slice
               fc1_bwd    dhidden = (sum_j slice) * act'(hidden);  q = (dhidden W1) / HW
               weights    dw2 = dz^T act(hidden), db2 = sum_n dz;  dw1 = dhidden^T pooled, db1 = sum_n dhidden

The SE block and the residual tail differ in what a sweep left for it: sums of x, and of dout * x; or, `Normed`, what a
BatchNorm makes pooled and ds of. Everything between is float32; weights are read, and their gradients written, in their
own dtypes. Names in the kernels: `kernels.triton_tiles`.
"""

# (kernels are traced by Triton, not called)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.statistics import MEAN, SCALE, SHIFT
from kernels.triton_tiles import DTYPES, OPTIONS, _jit

ROWS = 16  # samples a product takes at once
ROWS_SUMMED = 32  # samples a weight's gradient adds at once
BLOCK_C, BLOCK_R = 64, 32  # channels, and squeezed channels, of a product's block
SLICE = 256  # channels that one program of a product over C sums; the next kernel adds the slices up

MEAN_ROW, SCALE_ROW, SHIFT_ROW = (tl.constexpr(row) for row in (MEAN, SCALE, SHIFT))


@_jit
def _act(h, ACT: tl.constexpr):
    if ACT == "relu":
        # maximum() drops a NaN unless told otherwise; eager carries it
        return tl.where(h < 0, 0.0, h)
    elif ACT == "silu":
        return h / (1.0 + tl.exp(-h))
    else:
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@_jit
def _act_bwd(da, h, ACT: tl.constexpr):
    """da * act'(h). Chosen and not multiplied where the slope is 0, so that 0 * inf is 0 as in eager."""
    if ACT == "relu":
        return tl.where(h <= 0, 0.0, da)
    elif ACT == "silu":
        sigma = 1.0 / (1.0 + tl.exp(-h))
        return da * sigma * (1.0 + h * (1.0 - sigma))
    else:
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return da * (cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h))


@_jit
def _gate(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        ramp = z * 0.16666666666666666 + 0.5
        # written so that NaN fails both comparisons and passes through
        return tl.where(ramp < 0.0, 0.0, tl.where(ramp > 1.0, 1.0, ramp))


@_jit
def _gate_bwd(ds, s, GATE: tl.constexpr):
    """ds * g'(z), told from s = g(z)."""
    if GATE == "sigmoid":
        return ds * s * (1.0 - s)
    else:
        return tl.where((s > 0.0) & (s < 1.0), ds * 0.16666666666666666, 0.0)


@_jit
def _row(p, o_c, m_c):
    return tl.load(p + o_c, mask=m_c, other=0.0)


@_jit
def _sum_parts(p_part, o_n, o_k, parts, K, m_n, m_k, B_N: tl.constexpr, B_K: tl.constexpr):
    """(B_N, B_K): the sum over the middle dimension of part (N, parts, K) float32."""
    total = tl.zeros((B_N, B_K), dtype=tl.float32)
    for i in range(parts):
        o_part = (o_n * parts + i)[:, None] * K + o_k[None, :]
        total += tl.load(p_part + o_part, mask=m_n[:, None] & m_k[None, :], other=0.0)
    return total


@_jit
def _deviation(
    p_pivot, p_shift, p_stats, o_n, o_c, C, HW, parts, stretch, inv_hw, m_n, m_c,
    B_N: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """(B_N, B_C): how far the mean of all stretches, pivot + shift of each, lies from the mean of the statistics."""
    m_nc = m_n[:, None] & m_c[None, :]
    mean = _row(p_stats + MEAN_ROW * C, o_c, m_c)[None, :]
    deviation = tl.zeros((B_N, B_C), dtype=tl.float32)
    for i in range(parts):
        share = tl.minimum(stretch, HW - i * stretch).to(tl.float32) * inv_hw
        o_part = (o_n * parts + i)[:, None] * C + o_c[None, :]
        part = tl.load(p_pivot + o_part, mask=m_nc, other=0.0) - mean
        deviation += (part + tl.load(p_shift + o_part, mask=m_nc, other=0.0)) * share
    return deviation


@_jit
def _fc1_kernel(
    p_part, p_shift, p_stats, p_w1, p_deviation, p_pooled, p_slice,
    N: tl.int32, C: tl.int32, R: tl.int32, HW: tl.int32, parts: tl.int32, stretch: tl.int32, inv_hw: tl.float32,
    NORMED: tl.constexpr, B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr, B_SLICE: tl.constexpr,
):  # fmt: skip
    """pooled (N, C) of part (N, parts, C); slice (N, slices, R), whose sum is pooled W1^T. w1 is (R, C).

    pooled = sum_k part / HW. NORMED: part is the pivot of `_deviation`, pooled = deviation * scale + shift.
    """
    i_slice = tl.program_id(2)
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_n, m_r = o_n < N, o_r < R
    acc = tl.zeros((B_N, B_R), dtype=tl.float32)
    for start in range(i_slice * B_SLICE, tl.minimum((i_slice + 1) * B_SLICE, C), B_C):
        o_c = start + tl.arange(0, B_C)
        m_c = o_c < C
        o_nc, m_nc = o_n[:, None] * C + o_c[None, :], m_n[:, None] & m_c[None, :]
        if NORMED:
            deviation = _deviation(
                p_part, p_shift, p_stats, o_n, o_c, C, HW, parts, stretch, inv_hw, m_n, m_c, B_N, B_C
            )
            if tl.program_id(0) == 0:
                tl.store(p_deviation + o_nc, deviation, mask=m_nc)
            pooled = deviation * _row(p_stats + SCALE_ROW * C, o_c, m_c)[None, :]
            pooled += _row(p_stats + SHIFT_ROW * C, o_c, m_c)[None, :]
        else:
            pooled = _sum_parts(p_part, o_n, o_c, parts, C, m_n, m_c, B_N, B_C) * inv_hw
        if tl.program_id(0) == 0:
            tl.store(p_pooled + o_nc, pooled, mask=m_nc)
        w1 = tl.load(p_w1 + o_r[None, :] * C + o_c[:, None], mask=m_c[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(pooled, w1, input_precision="ieee")
    o_slice = (o_n * tl.num_programs(2) + i_slice)[:, None] * R + o_r[None, :]
    tl.store(p_slice + o_slice, acc, mask=m_n[:, None] & m_r[None, :])


@_jit
def _fc2_kernel(
    p_slice, p_b1, p_w2, p_b2, p_hidden, p_gate, N: tl.int32, C: tl.int32, R: tl.int32, slices: tl.int32,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr,
):  # fmt: skip
    """hidden (N, R) = sum of slices + b1; gate (N, C) = g(act(hidden) W2^T + b2). b1 is (R,), w2 (C, R), b2 (C,)."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_n, m_c = o_n < N, o_c < C
    acc = tl.zeros((B_N, B_C), dtype=tl.float32)
    for start in range(0, R, B_R):
        o_r = start + tl.arange(0, B_R)
        m_r = o_r < R
        hidden = _sum_parts(p_slice, o_n, o_r, slices, R, m_n, m_r, B_N, B_R)
        if BIAS:
            hidden += tl.load(p_b1 + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
        if tl.program_id(0) == 0:
            tl.store(p_hidden + o_n[:, None] * R + o_r[None, :], hidden, mask=m_n[:, None] & m_r[None, :])
        w2 = tl.load(p_w2 + o_c[None, :] * R + o_r[:, None], mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(_act(hidden, ACT), w2, input_precision="ieee")
    if BIAS:
        acc += tl.load(p_b2 + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(p_gate + o_n[:, None] * C + o_c[None, :], _gate(acc, GATE), mask=m_n[:, None] & m_c[None, :])


@_jit
def _fc2_bwd_kernel(
    p_part, p_t, p_stats, p_gate, p_w2, p_dz, p_slice, N: tl.int32, C: tl.int32, R: tl.int32, parts: tl.int32,
    GATE: tl.constexpr, NORMED: tl.constexpr,
    B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr, B_SLICE: tl.constexpr,
):  # fmt: skip
    """dz (N, C) = ds * g'(gate) of part (N, parts, C); slice (N, slices, R), whose sum is dz W2.

    ds = sum_k part. NORMED: t is (N, parts, C) too, and ds = scale * sum_k part + shift * sum_k t.
    """
    i_slice = tl.program_id(2)
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_n, m_r = o_n < N, o_r < R
    acc = tl.zeros((B_N, B_R), dtype=tl.float32)
    for start in range(i_slice * B_SLICE, tl.minimum((i_slice + 1) * B_SLICE, C), B_C):
        o_c = start + tl.arange(0, B_C)
        m_c = o_c < C
        m_nc = m_n[:, None] & m_c[None, :]
        ds = _sum_parts(p_part, o_n, o_c, parts, C, m_n, m_c, B_N, B_C)
        if NORMED:
            t = _sum_parts(p_t, o_n, o_c, parts, C, m_n, m_c, B_N, B_C)
            ds *= _row(p_stats + SCALE_ROW * C, o_c, m_c)[None, :]
            ds += t * _row(p_stats + SHIFT_ROW * C, o_c, m_c)[None, :]
        dz = _gate_bwd(ds, tl.load(p_gate + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0), GATE)
        if tl.program_id(0) == 0:
            tl.store(p_dz + o_n[:, None] * C + o_c[None, :], dz, mask=m_nc)
        w2 = tl.load(p_w2 + o_c[:, None] * R + o_r[None, :], mask=m_c[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(dz, w2, input_precision="ieee")
    o_slice = (o_n * tl.num_programs(2) + i_slice)[:, None] * R + o_r[None, :]
    tl.store(p_slice + o_slice, acc, mask=m_n[:, None] & m_r[None, :])


@_jit
def _fc1_bwd_kernel(
    p_slice, p_hidden, p_w1, p_dhidden, p_q, N: tl.int32, C: tl.int32, R: tl.int32, slices: tl.int32,
    inv_hw: tl.float32, ACT: tl.constexpr, B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr,
):  # fmt: skip
    """dhidden (N, R) = (sum of slices) * act'(hidden); q (N, C) = (dhidden W1) / HW, through the pool to each pixel."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_n, m_c = o_n < N, o_c < C
    acc = tl.zeros((B_N, B_C), dtype=tl.float32)
    for start in range(0, R, B_R):
        o_r = start + tl.arange(0, B_R)
        m_r = o_r < R
        m_nr = m_n[:, None] & m_r[None, :]
        da = _sum_parts(p_slice, o_n, o_r, slices, R, m_n, m_r, B_N, B_R)
        dhidden = _act_bwd(da, tl.load(p_hidden + o_n[:, None] * R + o_r[None, :], mask=m_nr, other=0.0), ACT)
        if tl.program_id(0) == 0:
            tl.store(p_dhidden + o_n[:, None] * R + o_r[None, :], dhidden, mask=m_nr)
        w1 = tl.load(p_w1 + o_r[:, None] * C + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(dhidden, w1, input_precision="ieee")
    tl.store(p_q + o_n[:, None] * C + o_c[None, :], acc * inv_hw, mask=m_n[:, None] & m_c[None, :])


@_jit
def _weight_grad_kernel(
    p_a, p_b, p_dw, p_db, N: tl.int32, A: tl.int32, B: tl.int32,
    ACT_B: tl.constexpr, WITH_DW: tl.constexpr, WITH_DB: tl.constexpr,
    B_N: tl.constexpr, B_A: tl.constexpr, B_B: tl.constexpr,
):  # fmt: skip
    """dw (A, B) = a^T act(b), db (A,) = sum_n a, for a (N, A) and b (N, B); ACT_B is "none" or the activation."""
    o_a = tl.program_id(0) * B_A + tl.arange(0, B_A)
    o_b = tl.program_id(1) * B_B + tl.arange(0, B_B)
    m_a, m_b = o_a < A, o_b < B
    dw = tl.zeros((B_A, B_B), dtype=tl.float32)
    db = tl.zeros((B_A,), dtype=tl.float32)
    for start in range(0, N, B_N):
        o_n = (start + tl.arange(0, B_N)).to(tl.int64)
        m_n = o_n < N
        a = tl.load(p_a + o_n[None, :] * A + o_a[:, None], mask=m_a[:, None] & m_n[None, :], other=0.0)
        if WITH_DW:
            b = tl.load(p_b + o_n[:, None] * B + o_b[None, :], mask=m_n[:, None] & m_b[None, :], other=0.0)
            if ACT_B != "none":
                b = _act(b, ACT_B)
            dw += tl.dot(a, b, input_precision="ieee")
        if WITH_DB:
            db += tl.sum(a, 1)
    if WITH_DW:
        o_dw = o_a.to(tl.int64)[:, None] * B + o_b[None, :]
        tl.store(p_dw + o_dw, dw.to(p_dw.dtype.element_ty), mask=m_a[:, None] & m_b[None, :])
    if WITH_DB and tl.program_id(1) == 0:
        tl.store(p_db + o_a, db.to(p_db.dtype.element_ty), mask=m_a)


class Normed(NamedTuple):
    """What stands for sums of x, or of dout * x, where a BatchNorm precedes the squeeze; all float32.

    stats are those of `kernels.statistics`, (ROWS, C). Forward: ``part`` is the pivot, ``other`` the shift, of means of
    stretches of ``stretch`` pixels. Backward: ``part`` is the sum of d * (y - mean), ``other`` of d.
    """

    other: Tensor  # (N, parts, C)
    stats: Tensor
    stretch: int = 0


def excite(
    part: Tensor, HW: int, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str,
    normed: Normed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """deviation (empty unless normed), pooled (N, C), hidden (N, R) and gate (N, C) of part (N, parts, C), float32."""
    (N, parts, C), R = part.shape, w1.shape[0]
    slices, rows = triton.cdiv(C, SLICE), triton.cdiv(N, ROWS)
    pooled, gate, hidden = part.new_empty((N, C)), part.new_empty((N, C)), part.new_empty((N, R))
    deviation = part.new_empty((0,) if normed is None else (N, C))
    slice_r = part.new_empty((N, slices, R))
    shift, stats, stretch = normed or (None, None, HW)
    w2, b1, b2 = _with_biases(w2, b1, b2)
    _fc1_kernel[(triton.cdiv(R, BLOCK_R), rows, slices)](
        part, shift, stats, _readable(w1), deviation, pooled, slice_r, N, C, R, HW, parts, stretch, 1.0 / HW,
        normed is not None, ROWS, BLOCK_C, BLOCK_R, SLICE, num_warps=8, **OPTIONS,
    )  # fmt: skip
    _fc2_kernel[(triton.cdiv(C, BLOCK_C), rows)](
        slice_r, b1, w2, b2, hidden, gate, N, C, R, slices,
        b1 is not None, act, gate_fn, ROWS, BLOCK_C, BLOCK_R, num_warps=8, **OPTIONS,
    )  # fmt: skip
    return deviation, pooled, hidden, gate


def excite_bwd(
    part: Tensor, HW: int, w1: Tensor, w2: Tensor, pooled: Tensor, hidden: Tensor, gate: Tensor, act: str, gate_fn: str,
    wanted: list[bool], with_q: bool, normed: Normed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dw1, db1, dw2, db2 in the weights' dtypes, empty where not ``wanted``; q (N, C) float32, unset but ``with_q``."""
    (N, parts, C), R = part.shape, w1.shape[0]
    slices, rows = triton.cdiv(C, SLICE), triton.cdiv(N, ROWS)
    with_dw1, with_db1, with_dw2, with_db2 = wanted
    of_w1, of_w2 = w1.dtype, w2.dtype
    w1, w2 = _readable(w1), _readable(w2)
    dw1, db1 = w1.new_empty((R, C) if with_dw1 else 0), w1.new_empty(R if with_db1 else 0)
    dw2, db2 = w2.new_empty((C, R) if with_dw2 else 0), w2.new_empty(C if with_db2 else 0)
    dz, dhidden, q = torch.empty_like(gate), torch.empty_like(hidden), torch.empty_like(gate)
    slice_r = part.new_empty((N, slices, R))
    t, stats, _ = normed or (None, None, 0)
    _fc2_bwd_kernel[(triton.cdiv(R, BLOCK_R), rows, slices)](
        part, t, stats, gate, w2, dz, slice_r, N, C, R, parts,
        gate_fn, normed is not None, ROWS, BLOCK_C, BLOCK_R, SLICE, num_warps=8, **OPTIONS,
    )  # fmt: skip
    if with_dw2 or with_db2:
        _weight_grad(dz, hidden, dw2, db2, act, with_dw2, with_db2)
    if with_q or with_dw1 or with_db1:
        _fc1_bwd_kernel[(triton.cdiv(C, BLOCK_C), rows)](
            slice_r, hidden, w1, dhidden, q, N, C, R, slices, 1.0 / HW, act, ROWS, BLOCK_C, BLOCK_R,
            num_warps=8, **OPTIONS,
        )  # fmt: skip
    if with_dw1 or with_db1:
        _weight_grad(dhidden, pooled, dw1, db1, "none", with_dw1, with_db1)
    return dw1.to(of_w1), db1.to(of_w1), dw2.to(of_w2), db2.to(of_w2), q


def _readable(w: Tensor) -> Tensor:
    """w as the kernels take a weight: contiguous, in one of `DTYPES`."""
    return (w if w.dtype in DTYPES else w.float()).contiguous()


def _with_biases(w2: Tensor, b1: Tensor | None, b2: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """w2, b1 and b2 in one dtype, and both biases or none: the odd cases become the plain ones."""
    if b1 is None and b2 is None:
        return _readable(w2), None, None
    b1 = w2.new_zeros(w2.shape[1]) if b1 is None else b1
    b2 = w2.new_zeros(w2.shape[0]) if b2 is None else b2
    if not b1.dtype == b2.dtype == w2.dtype:
        w2, b1, b2 = w2.float(), b1.float(), b2.float()
    return _readable(w2), _readable(b1), _readable(b2)


def _weight_grad(a: Tensor, b: Tensor, dw: Tensor, db: Tensor, act_b: str, with_dw: bool, with_db: bool) -> None:
    """dw = a^T act_b(b) and db = sum_n a, those of them that are asked for."""
    (N, A), B = a.shape, b.shape[1]
    b_a, b_b = (BLOCK_R, BLOCK_C) if act_b == "none" else (BLOCK_C, BLOCK_R)
    _weight_grad_kernel[(triton.cdiv(A, b_a), triton.cdiv(B, b_b) if with_dw else 1)](
        a, b, dw, db, N, A, B, act_b, with_dw, with_db, ROWS_SUMMED, b_a, b_b, num_warps=8, **OPTIONS
    )
