"""Squeeze-and-Excitation in Triton: four launches forward, six backward, no atomics.

Each sweep over the activation handles any strides, so channels-last, NCHW, sliced and expanded tensors are all read in
place; the tile takes the shape that makes neighbouring threads touch neighbouring memory (`_tile`). Sums are float32.

    forward    pool    part[n,k,c] = sum of x over the k-th stretch of HW           reads x
               fc1     pooled = sum_k part / HW;  hidden = W1 pooled + b1
               fc2     gate = g(W2 act(hidden) + b2)
               scale   out = x * gate                                               reads x, writes out
    backward   pool    part[n,k,c] = sum of dout * x                                reads dout, x
               fc2     dz = (sum_k part) * g'(gate);  dhidden = (dz W2) * act'(hidden)
               weights dw2 = dz^T act(hidden), db2 = sum_n dz;  dw1 = dhidden^T pooled, db1 = sum_n dhidden
               fc1     q = (dhidden W1) / HW
               scale   dx = dout * gate + q                                         reads dout, writes dx

Names in the kernels: ``p_`` pointer, ``s_`` stride in elements, ``i_`` index, ``o_`` offsets, ``m_`` mask,
``B_`` block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

TILE = 4096  # elements of a sweep's tile: 32 float32 accumulators a thread in four warps
# A sweep is cut along HW until it has about this many programs; fixed, so that results do not depend on the GPU
PROGRAMS = 1024
ROWS = 16  # samples a small product takes at once


@triton.jit
def _act(h, ACT: tl.constexpr):
    if ACT == "relu":
        # maximum() drops a NaN unless told otherwise; eager carries it
        return tl.where(h < 0, 0.0, h)
    elif ACT == "silu":
        return h / (1.0 + tl.exp(-h))
    else:
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
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


@triton.jit
def _gate(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        ramp = z * 0.16666666666666666 + 0.5
        # written so that NaN fails both comparisons and passes through
        return tl.where(ramp < 0.0, 0.0, tl.where(ramp > 1.0, 1.0, ramp))


@triton.jit
def _gate_bwd(ds, s, GATE: tl.constexpr):
    """ds * g'(z), told from s = g(z)."""
    if GATE == "sigmoid":
        return ds * s * (1.0 - s)
    else:
        return tl.where((s > 0.0) & (s < 1.0), ds * 0.16666666666666666, 0.0)


@triton.jit
def _hw_offsets(o_p, W, s_h, s_w, FLAT: tl.constexpr):
    if FLAT:  # the rows follow one another, so that h * s_h + w * s_w = p * s_w
        return o_p * s_w
    else:
        return (o_p // W) * s_h + (o_p % W) * s_w


@triton.jit
def _pool_kernel(
    p_x,
    p_dout,
    p_part,
    C,
    HW,
    W,
    stretch,
    s_xn,
    s_xc,
    s_xh,
    s_xw,
    s_dn,
    s_dc,
    s_dh,
    s_dw,
    PARTS: tl.constexpr,
    X_FLAT: tl.constexpr,
    D_FLAT: tl.constexpr,
    WITH_DOUT: tl.constexpr,
    B_P: tl.constexpr,
    B_C: tl.constexpr,
):
    """part[n, k, c] = sum over the k-th stretch of HW of x, or of dout * x; part is (N, PARTS, C) float32."""
    blocks_c = tl.cdiv(C, B_C)
    pid = tl.program_id(0)
    i_c = pid % blocks_c
    i_k = (pid // blocks_c) % PARTS
    i_n = (pid // blocks_c // PARTS).to(tl.int64)

    o_c = i_c * B_C + tl.arange(0, B_C)
    m_c = o_c < C
    first = i_k * stretch
    last = tl.minimum(first + stretch, HW)
    acc = tl.zeros((B_C, B_P), dtype=tl.float32)
    for start in range(first, last, B_P):
        o_p = start + tl.arange(0, B_P)
        mask = m_c[:, None] & (o_p < last)[None, :]
        o_x = (o_c * s_xc)[:, None] + _hw_offsets(o_p, W, s_xh, s_xw, X_FLAT)[None, :]
        value = tl.load(p_x + i_n * s_xn + o_x, mask=mask, other=0.0).to(tl.float32)
        if WITH_DOUT:
            o_d = (o_c * s_dc)[:, None] + _hw_offsets(o_p, W, s_dh, s_dw, D_FLAT)[None, :]
            value *= tl.load(p_dout + i_n * s_dn + o_d, mask=mask, other=0.0).to(tl.float32)
        acc += value
    tl.store(p_part + (i_n * PARTS + i_k) * C + o_c, tl.sum(acc, 1), mask=m_c)


@triton.jit
def _scale_kernel(
    p_in,
    p_gate,
    p_q,
    p_out,
    C,
    HW,
    W,
    s_in,
    s_ic,
    s_ih,
    s_iw,
    s_on,
    s_oc,
    s_oh,
    s_ow,
    I_FLAT: tl.constexpr,
    O_FLAT: tl.constexpr,
    WITH_Q: tl.constexpr,
    B_P: tl.constexpr,
    B_C: tl.constexpr,
):
    """out = in * gate, plus q where WITH_Q; gate and q are (N, C) float32."""
    blocks_c = tl.cdiv(C, B_C)
    blocks_p = tl.cdiv(HW, B_P)
    pid = tl.program_id(0)
    o_c = (pid % blocks_c) * B_C + tl.arange(0, B_C)
    o_p = ((pid // blocks_c) % blocks_p) * B_P + tl.arange(0, B_P)
    i_n = (pid // blocks_c // blocks_p).to(tl.int64)
    m_c = o_c < C
    mask = m_c[:, None] & (o_p < HW)[None, :]

    o_in = (o_c * s_ic)[:, None] + _hw_offsets(o_p, W, s_ih, s_iw, I_FLAT)[None, :]
    value = tl.load(p_in + i_n * s_in + o_in, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(p_gate + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    if WITH_Q:
        value += tl.load(p_q + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    o_out = (o_c * s_oc)[:, None] + _hw_offsets(o_p, W, s_oh, s_ow, O_FLAT)[None, :]
    tl.store(p_out + i_n * s_on + o_out, value.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _fc1_kernel(
    p_part, p_w1, p_b1, p_pooled, p_hidden, N, C, R, inv_hw, PARTS: tl.constexpr, BIAS: tl.constexpr,
    B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr,
):  # fmt: skip
    """pooled (N, C) = sum_k part / HW; hidden (N, R) = pooled W1^T + b1. w1 is (R, C), b1 (R,)."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_n, m_r = o_n < N, o_r < R
    acc = tl.zeros((B_N, B_R), dtype=tl.float32)
    for start in range(0, C, B_C):
        o_c = start + tl.arange(0, B_C)
        m_c = o_c < C
        m_nc = m_n[:, None] & m_c[None, :]
        pooled = tl.zeros((B_N, B_C), dtype=tl.float32)
        for k in range(PARTS):
            pooled += tl.load(p_part + (o_n * PARTS + k)[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
        pooled *= inv_hw
        if tl.program_id(0) == 0:
            tl.store(p_pooled + o_n[:, None] * C + o_c[None, :], pooled, mask=m_nc)
        m_cr = m_c[:, None] & m_r[None, :]
        w1 = tl.load(p_w1 + o_r[None, :] * C + o_c[:, None], mask=m_cr, other=0.0).to(tl.float32)
        acc += tl.dot(pooled, w1, input_precision="ieee")
    if BIAS:
        acc += tl.load(p_b1 + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    tl.store(p_hidden + o_n[:, None] * R + o_r[None, :], acc, mask=m_n[:, None] & m_r[None, :])


@triton.jit
def _fc2_kernel(
    p_hidden, p_w2, p_b2, p_gate, N, C, R, BIAS: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr,
):  # fmt: skip
    """gate (N, C) = g(act(hidden) W2^T + b2). w2 is (C, R), b2 (C,)."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_n, m_c = o_n < N, o_c < C
    acc = tl.zeros((B_N, B_C), dtype=tl.float32)
    for start in range(0, R, B_R):
        o_r = start + tl.arange(0, B_R)
        m_r = o_r < R
        hidden = tl.load(p_hidden + o_n[:, None] * R + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
        w2 = tl.load(p_w2 + o_c[None, :] * R + o_r[:, None], mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(_act(hidden, ACT), w2, input_precision="ieee")
    if BIAS:
        acc += tl.load(p_b2 + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(p_gate + o_n[:, None] * C + o_c[None, :], _gate(acc, GATE), mask=m_n[:, None] & m_c[None, :])


@triton.jit
def _fc2_bwd_kernel(
    p_part, p_gate, p_hidden, p_w2, p_dz, p_dhidden, N, C, R, PARTS: tl.constexpr, ACT: tl.constexpr,
    GATE: tl.constexpr, B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr,
):  # fmt: skip
    """dz (N, C) = (sum_k part) * g'(gate); dhidden (N, R) = (dz W2) * act'(hidden)."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_n, m_r = o_n < N, o_r < R
    acc = tl.zeros((B_N, B_R), dtype=tl.float32)
    for start in range(0, C, B_C):
        o_c = start + tl.arange(0, B_C)
        m_c = o_c < C
        m_nc = m_n[:, None] & m_c[None, :]
        dz = tl.zeros((B_N, B_C), dtype=tl.float32)
        for k in range(PARTS):
            dz += tl.load(p_part + (o_n * PARTS + k)[:, None] * C + o_c[None, :], mask=m_nc, other=0.0)
        dz = _gate_bwd(dz, tl.load(p_gate + o_n[:, None] * C + o_c[None, :], mask=m_nc, other=0.0), GATE)
        if tl.program_id(0) == 0:
            tl.store(p_dz + o_n[:, None] * C + o_c[None, :], dz, mask=m_nc)
        w2 = tl.load(p_w2 + o_c[:, None] * R + o_r[None, :], mask=m_c[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(dz, w2, input_precision="ieee")
    m_nr = m_n[:, None] & m_r[None, :]
    o_nr = o_n[:, None] * R + o_r[None, :]
    dhidden = _act_bwd(acc, tl.load(p_hidden + o_nr, mask=m_nr, other=0.0), ACT)
    tl.store(p_dhidden + o_nr, dhidden, mask=m_nr)


@triton.jit
def _fc1_bwd_kernel(
    p_dhidden, p_w1, p_q, N, C, R, inv_hw, B_N: tl.constexpr, B_C: tl.constexpr, B_R: tl.constexpr
):  # fmt: skip
    """q (N, C) = (dhidden W1) / HW, the gradient of every pixel through the pooling."""
    o_n = tl.program_id(1).to(tl.int64) * B_N + tl.arange(0, B_N)
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_n, m_c = o_n < N, o_c < C
    acc = tl.zeros((B_N, B_C), dtype=tl.float32)
    for start in range(0, R, B_R):
        o_r = start + tl.arange(0, B_R)
        m_r = o_r < R
        dhidden = tl.load(p_dhidden + o_n[:, None] * R + o_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
        w1 = tl.load(p_w1 + o_r[:, None] * C + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        acc += tl.dot(dhidden, w1, input_precision="ieee")
    tl.store(p_q + o_n[:, None] * C + o_c[None, :], acc * inv_hw, mask=m_n[:, None] & m_c[None, :])


@triton.jit
def _weight_grad_kernel(
    p_a, p_b, p_dw, p_db, N, A, B, ACT_B: tl.constexpr, WITH_DW: tl.constexpr, WITH_DB: tl.constexpr,
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
    pooled, hidden, gate = (x.new_empty(shape, dtype=torch.float32) for shape in ((N, C), (N, R), (N, C)))
    out = torch.empty_like(x)
    w1, w2 = w1.contiguous(), w2.contiguous()
    with torch.cuda.device_of(x):
        part = _pool(x, None)
        parts, (b_c, b_r) = part.shape[1], _product_blocks(C, R)
        _fc1_kernel[(triton.cdiv(R, b_r), triton.cdiv(N, ROWS))](
            part, w1, b1, pooled, hidden, N, C, R, 1.0 / (H * W), parts, b1 is not None, ROWS, b_c, b_r
        )
        _fc2_kernel[(triton.cdiv(C, b_c), triton.cdiv(N, ROWS))](
            hidden, w2, b2, gate, N, C, R, b2 is not None, act, gate_fn, ROWS, b_c, b_r
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
    with_dx, with_dw1, with_db1, with_dw2, with_db2 = output_mask
    dx = torch.empty_like(x) if with_dx else x.new_empty(0)
    dw1, db1 = w1.new_empty((R, C) if with_dw1 else 0), w1.new_empty(R if with_db1 else 0)
    dw2, db2 = w2.new_empty((C, R) if with_dw2 else 0), w2.new_empty(C if with_db2 else 0)
    w1, w2 = w1.contiguous(), w2.contiguous()
    dz, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
    with torch.cuda.device_of(x):
        part = _pool(x, dout)
        parts, (b_c, b_r) = part.shape[1], _product_blocks(C, R)
        _fc2_bwd_kernel[(triton.cdiv(R, b_r), triton.cdiv(N, ROWS))](
            part, gate, hidden, w2, dz, dhidden, N, C, R, parts, act, gate_fn, ROWS, b_c, b_r
        )
        if with_dw2 or with_db2:
            _weight_grad_kernel[(triton.cdiv(C, b_c), triton.cdiv(R, b_r) if with_dw2 else 1)](
                dz, hidden, dw2, db2, N, C, R, act, with_dw2, with_db2, ROWS, b_c, b_r
            )
        if with_dw1 or with_db1:
            _weight_grad_kernel[(triton.cdiv(R, b_r), triton.cdiv(C, b_c) if with_dw1 else 1)](
                dhidden, pooled, dw1, db1, N, R, C, "none", with_dw1, with_db1, ROWS, b_r, b_c
            )
        if with_dx:
            q = torch.empty_like(gate)
            _fc1_bwd_kernel[(triton.cdiv(C, b_c), triton.cdiv(N, ROWS))](
                dhidden, w1, q, N, C, R, 1.0 / (H * W), ROWS, b_c, b_r
            )
            _scale(dout, gate, q, dx)
    return dx, dw1, db1, dw2, db2


def _pool(x: Tensor, dout: Tensor | None) -> Tensor:
    """The partial sums (N, parts, C) of x, or of dout * x, over HW."""
    N, C, H, W = x.shape
    b_p, b_c = _tile(x)
    blocks_c = triton.cdiv(C, b_c)
    parts = max(1, min(PROGRAMS // (N * blocks_c), triton.cdiv(H * W, 4 * b_p)))
    part = x.new_empty((N, parts, C), dtype=torch.float32)
    x_flat, x_strides = _flatten(x)
    d_flat, d_strides = (True, (0, 0, 0, 0)) if dout is None else _flatten(dout)
    stretch = triton.cdiv(H * W, parts)
    _pool_kernel[(N * parts * blocks_c,)](
        x, dout, part, C, H * W, W, stretch, *x_strides, *d_strides, parts, x_flat, d_flat, dout is not None, b_p, b_c
    )
    return part


def _scale(source: Tensor, gate: Tensor, q: Tensor | None, out: Tensor) -> None:
    """out = source * gate, plus q where it is given."""
    N, C, H, W = out.shape
    b_p, b_c = _tile(out)
    source_flat, source_strides = _flatten(source)
    out_flat, out_strides = _flatten(out)
    _scale_kernel[(N * triton.cdiv(C, b_c) * triton.cdiv(H * W, b_p),)](
        source, gate, q, out, C, H * W, W, *source_strides, *out_strides, source_flat, out_flat, q is not None, b_p, b_c
    )


def _tile(x: Tensor) -> tuple[int, int]:
    """(pixels, channels) of a tile: the dimension that is contiguous in memory gets the longer side."""
    C, HW = x.shape[1], x.shape[2] * x.shape[3]
    if x.stride(1) == 1 and C > 1:
        b_c = min(128, triton.next_power_of_2(C))
        return min(TILE // b_c, triton.next_power_of_2(HW)), b_c
    b_p = min(1024, triton.next_power_of_2(HW))
    return b_p, min(TILE // b_p, triton.next_power_of_2(C))


def _product_blocks(C: int, R: int) -> tuple[int, int]:
    """(channels, squeezed channels) of a small product's block; tl.dot wants at least 16 of each."""
    return max(16, min(64, triton.next_power_of_2(C))), max(16, min(32, triton.next_power_of_2(R)))


def _flatten(x: Tensor) -> tuple[bool, tuple[int, int, int, int]]:
    """Whether (H, W) is one dimension in memory, and the strides (n, c, h, w) in elements.

    Within a sample the kernels count in 32 bits; across samples in 64.
    """
    _, C, H, W = x.shape
    s_n, s_c, s_h, s_w = x.stride()
    if (C - 1) * abs(s_c) + (H - 1) * abs(s_h) + (W - 1) * abs(s_w) >= 2**31:
        raise ValueError(
            f"x: one sample of shape {(C, H, W)} spans 2**31 elements or more; cut it, or use backend='eager'"
        )
    if W == 1:
        s_w = s_h
    flat = H == 1 or W == 1 or s_h == W * s_w
    return flat, (s_n, s_c, s_h, s_w)
