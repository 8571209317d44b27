"""Squeeze-and-Excitation in Triton: four launches forward, six backward, no atomics.

Each sweep over the activation handles any strides, so channels-last, NCHW, sliced and expanded tensors are all read in
place; neighbouring threads touch neighbouring memory, 16 bytes each where the shape is aligned (`_plan`). Sums are
float32.

    forward    pool    part[n,k,c] = sum of x over the k-th stretch of HW           reads x
               fc1     pooled = sum_k part / HW;  slice[n,j,r] = W1 pooled over the j-th slice of C
               fc2     hidden = sum_j slice + b1;  gate = g(W2 act(hidden) + b2)
               scale   out = x * gate                                               reads x, writes out
    backward   pool    part[n,k,c] = sum of dout * x                                reads dout, x
               fc2     dz = (sum_k part) * g'(gate);  slice[n,j,r] = dz W2 over the j-th slice of C
               fc1     dhidden = (sum_j slice) * act'(hidden);  q = (dhidden W1) / HW
               weights dw2 = dz^T act(hidden), db2 = sum_n dz;  dw1 = dhidden^T pooled, db1 = sum_n dhidden
               scale   dx = dout * gate + q                                         reads dout, writes dx

The second sweep walks the tiles backwards: those that the first one read last are still in L2, and it meets them first.
Cutting the batch into chunks that fit L2 would keep all of it there, but at four launches a chunk: with some 20 samples
of stage 1 to a chunk a launch lasts a few microseconds, as long as it takes to start and to drain. And what fits would
depend on the GPU. A kernel that reads x once is the better answer, and the `cuda` backend has it.

Which kernels exist is finite: runtime arguments are never specialised (`_jit`), so that one is compiled for each
combination of dtypes and constants, and `benchmarks/compile_audit.py` compiles them all.

Names in the kernels: ``p_`` pointer, ``s_`` stride in elements, ``i_`` index, ``o_`` offsets, ``m_`` mask,
``B_`` block.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # elements of a sweep's tile: 32 float32 accumulators a thread in four warps
# The side of a tile along the dimension that is contiguous in memory; the other side is what is left of TILE
SIDES = {"channels": (128, 64, 32), "pixels": (64,), "any": (64,)}
VECTORS = (8, 4, 1)  # elements that a thread may take in one access, where 16 bytes hold them
# A sweep is cut along HW until it has about this many programs; fixed, so that results do not depend on the GPU
PROGRAMS = 1024
ROWS = 16  # samples a small product takes at once
ROWS_SUMMED = 32  # samples a weight's gradient adds at once
BLOCK_C, BLOCK_R = 64, 32  # channels, and squeezed channels, of a small product's block
SLICE = 256  # channels that one program of a product over C sums; the next kernel adds the slices up


def _jit(fn: Any) -> Any:
    """triton.jit with no runtime argument specialised: neither on its value nor on its divisibility by 16."""
    parameters = inspect.signature(fn).parameters.values()
    return triton.jit(fn, do_not_specialize=[p.name for p in parameters if p.annotation != "tl.constexpr"])


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
def _pointers(p, i_n, o_c, o_p, W, s_n, s_c, s_h, s_w, ORDER: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers (channels, pixels) into sample i_n, of whose memory only what `_order` found is assumed.

    VECTOR elements that follow one another lie in one aligned piece of memory.
    """
    B_VECTOR: tl.constexpr = VECTOR * (p.dtype.element_ty.primitive_bitwidth // 8)
    if ORDER == "channels":
        return tl.multiple_of(p + i_n * s_n + (o_c[:, None] + (o_p * s_w)[None, :]), (B_VECTOR, 1))
    elif ORDER == "pixels":
        return tl.multiple_of(p + i_n * s_n + ((o_c * s_c)[:, None] + o_p[None, :]), (1, B_VECTOR))
    else:
        return p + i_n * s_n + ((o_c * s_c)[:, None] + ((o_p // W) * s_h + (o_p % W) * s_w)[None, :])


@_jit
def _inside(m_c, m_p, ORDER: tl.constexpr, VECTOR: tl.constexpr):
    """The mask of a tile; a vector lies in it as a whole or not at all."""
    if ORDER == "channels":
        return tl.max_constancy(m_c[:, None] & m_p[None, :], (VECTOR, 1))
    else:
        return tl.max_constancy(m_c[:, None] & m_p[None, :], (1, VECTOR))


@_jit
def _pool_kernel(
    p_x, p_dout, p_part, C: tl.int32, HW: tl.int32, W: tl.int32, parts: tl.int32, stretch: tl.int32,
    s_xn: tl.int64, s_xc: tl.int32, s_xh: tl.int32, s_xw: tl.int32,
    s_dn: tl.int64, s_dc: tl.int32, s_dh: tl.int32, s_dw: tl.int32,
    WITH_DOUT: tl.constexpr, X_ORDER: tl.constexpr, D_ORDER: tl.constexpr, VECTOR: tl.constexpr,
    B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """part[n, k, c] = sum over the k-th stretch of HW of x, or of dout * x; part is (N, parts, C) float32."""
    blocks_c = tl.cdiv(C, B_C)
    pid = tl.program_id(0)
    i_k = (pid // blocks_c) % parts
    i_n = (pid // blocks_c // parts).to(tl.int64)
    o_c = (pid % blocks_c) * B_C + tl.arange(0, B_C)
    m_c = o_c < C
    acc = tl.zeros((B_C, B_P), dtype=tl.float32)
    for start in range(i_k * stretch, tl.minimum((i_k + 1) * stretch, HW), B_P):
        o_p = start + tl.arange(0, B_P)
        mask = _inside(m_c, o_p < HW, X_ORDER, VECTOR)
        p_tile = _pointers(p_x, i_n, o_c, o_p, W, s_xn, s_xc, s_xh, s_xw, X_ORDER, VECTOR)
        if WITH_DOUT:
            # x is not read again, and dout is
            value = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            p_tile = _pointers(p_dout, i_n, o_c, o_p, W, s_dn, s_dc, s_dh, s_dw, D_ORDER, VECTOR)
            acc += value * tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        else:
            acc += tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_part + (i_n * parts + i_k) * C + o_c, tl.sum(acc, 1), mask=m_c)


@_jit
def _scale_kernel(
    p_in, p_gate, p_q, p_out, C: tl.int32, HW: tl.int32, W: tl.int32,
    s_in: tl.int64, s_ic: tl.int32, s_ih: tl.int32, s_iw: tl.int32,
    s_on: tl.int64, s_oc: tl.int32, s_oh: tl.int32, s_ow: tl.int32,
    WITH_Q: tl.constexpr, I_ORDER: tl.constexpr, O_ORDER: tl.constexpr, VECTOR: tl.constexpr,
    B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """out = in * gate, plus q where WITH_Q; gate and q are (N, C) float32."""
    blocks_c = tl.cdiv(C, B_C)
    blocks_p = tl.cdiv(HW, B_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what the pooling read last comes first
    i_n = (pid // blocks_c // blocks_p).to(tl.int64)
    o_c = (pid % blocks_c) * B_C + tl.arange(0, B_C)
    o_p = ((pid // blocks_c) % blocks_p) * B_P + tl.arange(0, B_P)
    m_c = o_c < C
    mask = _inside(m_c, o_p < HW, O_ORDER, VECTOR)

    p_tile = _pointers(p_in, i_n, o_c, o_p, W, s_in, s_ic, s_ih, s_iw, I_ORDER, VECTOR)
    value = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    value *= tl.load(p_gate + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    if WITH_Q:
        value += tl.load(p_q + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    p_tile = _pointers(p_out, i_n, o_c, o_p, W, s_on, s_oc, s_oh, s_ow, O_ORDER, VECTOR)
    tl.store(p_tile, value.to(p_out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@_jit
def _sum_parts(p_part, o_n, o_k, parts, K, m_n, m_k, B_N: tl.constexpr, B_K: tl.constexpr):
    """(B_N, B_K): the sum over the middle dimension of part (N, parts, K) float32."""
    total = tl.zeros((B_N, B_K), dtype=tl.float32)
    for i in range(parts):
        o_part = (o_n * parts + i)[:, None] * K + o_k[None, :]
        total += tl.load(p_part + o_part, mask=m_n[:, None] & m_k[None, :], other=0.0)
    return total


@_jit
def _fc1_kernel(
    p_part, p_w1, p_pooled, p_slice, N: tl.int32, C: tl.int32, R: tl.int32, parts: tl.int32, inv_hw: tl.float32,
    B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr, B_SLICE: tl.constexpr,
):  # fmt: skip
    """pooled (N, C) = sum_k part / HW; slice (N, slices, R), whose sum is pooled W1^T. w1 is (R, C)."""
    i_slice = tl.program_id(2)
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_n, m_r = o_n < N, o_r < R
    acc = tl.zeros((B_N, B_R), dtype=tl.float32)
    for start in range(i_slice * B_SLICE, tl.minimum((i_slice + 1) * B_SLICE, C), B_C):
        o_c = start + tl.arange(0, B_C)
        m_c = o_c < C
        pooled = _sum_parts(p_part, o_n, o_c, parts, C, m_n, m_c, B_N, B_C) * inv_hw
        if tl.program_id(0) == 0:
            tl.store(p_pooled + o_n[:, None] * C + o_c[None, :], pooled, mask=m_n[:, None] & m_c[None, :])
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
    p_part, p_gate, p_w2, p_dz, p_slice, N: tl.int32, C: tl.int32, R: tl.int32, parts: tl.int32,
    GATE: tl.constexpr, B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr, B_SLICE: tl.constexpr,
):  # fmt: skip
    """dz (N, C) = (sum_k part) * g'(gate); slice (N, slices, R), whose sum is dz W2."""
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


INTERPRETED = isinstance(_pool_kernel, InterpretedFunction)


def se_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C, H, W), w1 (R, C), w2 (C, R) -> out like x; pooled (N, C), hidden (N, R), gate (N, C) in float32."""
    N, C, H, W = x.shape
    R = w1.shape[0]
    slices, rows = triton.cdiv(C, SLICE), triton.cdiv(N, ROWS)
    pooled, hidden, gate = (x.new_empty(shape, dtype=torch.float32) for shape in ((N, C), (N, R), (N, C)))
    part_r = x.new_empty((N, slices, R), dtype=torch.float32)
    out = torch.empty_like(x)
    w1 = _readable(w1)
    w2, b1, b2 = _with_biases(w2, b1, b2)
    with torch.cuda.device_of(x):
        part = _pool(x, None)
        _fc1_kernel[(triton.cdiv(R, BLOCK_R), rows, slices)](
            part, w1, pooled, part_r, N, C, R, part.shape[1], 1.0 / (H * W), ROWS, BLOCK_C, BLOCK_R, SLICE, num_warps=8
        )
        _fc2_kernel[(triton.cdiv(C, BLOCK_C), rows)](
            part_r,
            b1,
            w2,
            b2,
            hidden,
            gate,
            N,
            C,
            R,
            slices,
            b1 is not None,
            act,
            gate_fn,
            ROWS,
            BLOCK_C,
            BLOCK_R,
            num_warps=8,
        )
        _scale(x, gate, None, out)
    return out, pooled, hidden, gate


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
    N, C, H, W = x.shape
    R = w1.shape[0]
    slices, rows = triton.cdiv(C, SLICE), triton.cdiv(N, ROWS)
    with_dx, with_dw1, with_db1, with_dw2, with_db2 = output_mask
    wanted = (w1.dtype, w2.dtype)
    w1, w2 = _readable(w1), _readable(w2)
    dx = torch.empty_like(x) if with_dx else x.new_empty(0)
    dw1, db1 = w1.new_empty((R, C) if with_dw1 else 0), w1.new_empty(R if with_db1 else 0)
    dw2, db2 = w2.new_empty((C, R) if with_dw2 else 0), w2.new_empty(C if with_db2 else 0)
    dz, dhidden, q = torch.empty_like(gate), torch.empty_like(hidden), torch.empty_like(gate)
    part_r = x.new_empty((N, slices, R), dtype=torch.float32)
    with torch.cuda.device_of(x):
        part = _pool(x, dout)
        _fc2_bwd_kernel[(triton.cdiv(R, BLOCK_R), rows, slices)](
            part, gate, w2, dz, part_r, N, C, R, part.shape[1], gate_fn, ROWS, BLOCK_C, BLOCK_R, SLICE, num_warps=8
        )
        if with_dw2 or with_db2:
            _weight_grad(dz, hidden, dw2, db2, act, with_dw2, with_db2)
        if with_dx or with_dw1 or with_db1:
            _fc1_bwd_kernel[(triton.cdiv(C, BLOCK_C), rows)](
                part_r, hidden, w1, dhidden, q, N, C, R, slices, 1.0 / (H * W), act, ROWS, BLOCK_C, BLOCK_R, num_warps=8
            )
        if with_dw1 or with_db1:
            _weight_grad(dhidden, pooled, dw1, db1, "none", with_dw1, with_db1)
        if with_dx:
            _scale(dout, gate, q, dx)
    return dx, dw1.to(wanted[0]), db1.to(wanted[0]), dw2.to(wanted[1]), db2.to(wanted[1])


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
        a, b, dw, db, N, A, B, act_b, with_dw, with_db, ROWS_SUMMED, b_a, b_b, num_warps=8
    )


def _pool(x: Tensor, dout: Tensor | None) -> Tensor:
    """The partial sums (N, parts, C) of x, or of dout * x, over HW."""
    N, C, H, W = x.shape
    plan = _plan(x, dout)
    blocks_c = triton.cdiv(C, plan.b_c)
    parts = max(1, min(PROGRAMS // (N * blocks_c), triton.cdiv(H * W, 4 * plan.b_p)))
    # whole tiles, so that a stretch starts where a vector may
    stretch = triton.cdiv(triton.cdiv(H * W, parts), plan.b_p) * plan.b_p
    parts = triton.cdiv(H * W, stretch)
    part = x.new_empty((N, parts, C), dtype=torch.float32)
    d_strides = (0, 0, 0, 0) if dout is None else _strides(dout)
    _pool_kernel[(N * parts * blocks_c,)](
        x,
        dout,
        part,
        C,
        H * W,
        W,
        parts,
        stretch,
        *_strides(x),
        *d_strides,
        dout is not None,
        *plan,
        num_warps=_warps(plan, x.element_size()),
    )
    return part


def _scale(source: Tensor, gate: Tensor, q: Tensor | None, out: Tensor) -> None:
    """out = source * gate, plus q where it is given."""
    N, C, H, W = out.shape
    plan = _plan(out, source)
    _scale_kernel[(N * triton.cdiv(C, plan.b_c) * triton.cdiv(H * W, plan.b_p),)](
        source, gate, q, out, C, H * W, W, *_strides(source), *_strides(out),
        q is not None, plan.other_order, plan.order, *plan[2:],
        num_warps=_warps(plan, out.element_size()),
    )  # fmt: skip


class Plan(NamedTuple):
    """How a sweep's tile lies over a tensor, and over another one that it is read or written with."""

    order: str
    other_order: str
    vector: int
    b_p: int
    b_c: int


def _warps(plan: Plan, itemsize: int) -> int:
    """An address for every few elements takes registers: without 16-byte accesses more threads share a tile."""
    if plan.order == "any":
        return 16
    return 4 if plan.vector * itemsize == 16 else 8


def _plan(x: Tensor, other: Tensor | None) -> Plan:
    """The tile follows x; ``other``, where it lies otherwise in memory, is met through its strides alone."""
    C, HW = x.shape[1], x.shape[2] * x.shape[3]
    order = _order(x)
    if other is None or _order(other) == order:
        tensors, other_order = [x, *([] if other is None else [other])], order
    else:
        tensors, other_order = [], "any"
    extent = C if order == "channels" else HW
    # the side that leaves the fewest lanes outside; the longest of those
    side = min(SIDES[order], key=lambda side: (triton.cdiv(extent, side) * side, -side))
    b_p, b_c = (TILE // side, side) if order == "channels" else (side, TILE // side)
    return Plan(order, other_order, _vector(order, tensors), b_p, b_c)


def _order(x: Tensor) -> str:
    """Which dimension is contiguous in memory, "channels" or "pixels", where (H, W) is one dimension; else "any"."""
    _, C, H, W = x.shape
    _, s_c, s_h, s_w = _strides(x)
    if H > 1 and s_h != W * s_w:
        return "any"
    if s_c == 1 and C > 1:
        return "channels"
    return "pixels" if s_w == 1 else "any"


def _vector(order: str, tensors: list[Tensor]) -> int:
    """The most elements, of `VECTORS`, that start at a multiple of their size wherever a row of the tensors starts."""
    if order == "any" or not tensors:
        return 1
    itemsize = tensors[0].element_size()
    _, C, H, W = tensors[0].shape
    starts = [C if order == "channels" else H * W]
    for x in tensors:
        s_n, s_c, _, s_w = _strides(x)
        starts += [x.data_ptr() // itemsize, s_n, s_w if order == "channels" else s_c]
    return next(v for v in VECTORS if v * itemsize <= 16 and all(start % v == 0 for start in starts))


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """The strides (n, c, h, w) in elements, w's also where W is 1 and h alone moves.

    Within a sample the kernels count in 32 bits; across samples in 64.
    """
    _, C, H, W = x.shape
    s_n, s_c, s_h, s_w = x.stride()
    if (C - 1) * s_c + (H - 1) * s_h + (W - 1) * s_w >= 2**31:
        raise ValueError(
            f"x: one sample of shape {(C, H, W)} spans 2**31 elements or more; cut it, or use backend='eager'"
        )
    return s_n, s_c, s_h, s_h if W == 1 else s_w
