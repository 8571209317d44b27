"""Triton kernels of the residual tail that sweep over activations; `kernels.tail_triton` launches them."""

from __future__ import annotations

import triton.language as tl

from kernels.triton_products import MEAN_ROW, SCALE_ROW, SHIFT_ROW, _act, _act_bwd, _row
from kernels.triton_tiles import _inside, _jit, _pointers, _stretch_of_program, _tile_of_program

INFINITY = tl.constexpr(float("inf"))
# The largest float32 that rounds to 0 in the other types: half their smallest number
ROUNDS_TO_0_FP16, ROUNDS_TO_0_BF16 = tl.constexpr(2.0**-25), tl.constexpr(2.0**-134)


@_jit
def _dense(p, i_n, o_c, o_p, C, HW, ORDER: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers (channels, pixels) into sample i_n of a tensor that fills its memory in that order."""
    return _pointers(p, i_n.to(tl.int64) * HW, o_c, o_p, 1, C, HW, 0, C, ORDER, VECTOR)


@_jit
def _finite(pivot):
    """Any number near the values serves as their pivot, and 0 where an infinite one would turn their sum into NaN."""
    return tl.where(tl.abs(pivot) < INFINITY, pivot, 0.0)


@_jit
def _moments_kernel(
    p_x, p_pivot, p_shift, p_m2, C: tl.int32, HW: tl.int32, W: tl.int32, parts: tl.int32, stretch: tl.int32,
    s_xn: tl.int64, s_xc: tl.int32, s_xh: tl.int32, s_xw: tl.int32,
    ORDER: tl.constexpr, VECTOR: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """(N, parts, C) float32 of the k-th stretch of HW: pivot + shift is its mean, m2 the squared distances from it.

    The mean is in two parts so that its rounding does not count where it is much larger than the standard deviation.
    """
    i_n, i_k, i_c = _stretch_of_program(C, parts, B_C)
    o_c = i_c + tl.arange(0, B_C)
    m_c = o_c < C
    first = i_k * stretch
    count = tl.minimum(stretch, HW - first)

    o_p = first + tl.arange(0, B_P)
    mask = _inside(m_c, o_p < HW, ORDER, VECTOR)
    p_tile = _pointers(p_x, i_n, o_c, o_p, W, s_xn, s_xc, s_xh, s_xw, ORDER, VECTOR)
    value = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
    pivot = _finite(tl.sum(value, 1) / tl.minimum(count, B_P).to(tl.float32))
    centred = tl.where(mask, value - pivot[:, None], 0.0)
    acc = centred
    acc_squared = centred * centred
    for _ in range(first + B_P, first + count, B_P):
        o_p += B_P
        mask = _inside(m_c, o_p < HW, ORDER, VECTOR)
        p_tile = _pointers(p_x, i_n, o_c, o_p, W, s_xn, s_xc, s_xh, s_xw, ORDER, VECTOR)
        value = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, value - pivot[:, None], 0.0)
        acc += centred
        acc_squared += centred * centred

    total = tl.sum(acc, 1)
    shift = total / count.to(tl.float32)
    o_part = (i_n * parts + i_k) * C + o_c
    tl.store(p_pivot + o_part, pivot, mask=m_c)
    tl.store(p_shift + o_part, shift, mask=m_c)
    tl.store(p_m2 + o_part, tl.sum(acc_squared, 1) - total * shift, mask=m_c)


@_jit
def _norm(p_stats, p_gate, i_n, o_c, m_c, C, GATED: tl.constexpr):
    """mean, scale, shift (channels,): (y - mean) * scale + shift is y behind the norm, and the gate where GATED."""
    mean = _row(p_stats + MEAN_ROW * C, o_c, m_c)
    scale = _row(p_stats + SCALE_ROW * C, o_c, m_c)
    shift = _row(p_stats + SHIFT_ROW * C, o_c, m_c)
    if GATED:
        gate = _row(p_gate + i_n * C, o_c, m_c)
        scale *= gate
        shift *= gate
    return mean, scale, shift


@_jit
def _added(value, residual, p_stats2, o_c, m_c, C, RESIDUAL: tl.constexpr):
    """value, and what the residual adds to it."""
    if RESIDUAL == "norm":
        mean, scale, shift = _norm(p_stats2, p_stats2, 0, o_c, m_c, C, False)
        return value + tl.fma(residual - mean[:, None], scale[:, None], shift[:, None])
    elif RESIDUAL == "plain":
        return value + residual
    else:
        return value


@_jit
def _passes(before, dtype: tl.constexpr):
    """Where a ReLU passes the gradient, told as eager does: not where the value, rounded to its dtype, is <= 0."""
    if dtype == tl.float16:
        return ~(before <= ROUNDS_TO_0_FP16)
    elif dtype == tl.bfloat16:
        return ~(before <= ROUNDS_TO_0_BF16)
    else:
        return ~(before <= 0.0)


@_jit
def _bytes(p_mask, i_n, i_c, i_p, C, HW, ORDER: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr):
    """Pointers to the bytes of a tile that starts at channel i_c and pixel i_p, and which of them there are."""
    if ORDER == "channels":
        o_line, o_byte = i_p + tl.arange(0, B_P), i_c // 8 + tl.arange(0, B_C // 8)
        bytes_of_line = tl.cdiv(C, 8)
        p_tile = p_mask + i_n * HW * bytes_of_line + (o_byte[:, None] + (o_line * bytes_of_line)[None, :])
        return p_tile, (o_byte < bytes_of_line)[:, None] & (o_line < HW)[None, :]
    else:
        o_line, o_byte = i_c + tl.arange(0, B_C), i_p // 8 + tl.arange(0, B_P // 8)
        bytes_of_line = tl.cdiv(HW, 8)
        p_tile = p_mask + i_n * C * bytes_of_line + ((o_line * bytes_of_line)[:, None] + o_byte[None, :])
        return p_tile, (o_line < C)[:, None] & (o_byte < bytes_of_line)[None, :]


@_jit
def _packed(passed, ORDER: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr):
    """bool (channels, pixels) -> bytes, eight neighbours along the contiguous dimension in each, the first lowest."""
    if ORDER == "channels":
        bits = tl.reshape(passed.to(tl.int32), (B_C // 8, 8, B_P)) << tl.arange(0, 8)[None, :, None]
        return tl.sum(bits, 1).to(tl.uint8)
    else:
        bits = tl.reshape(passed.to(tl.int32), (B_C, B_P // 8, 8)) << tl.arange(0, 8)[None, None, :]
        return tl.sum(bits, 2).to(tl.uint8)


@_jit
def _unpacked(eights, ORDER: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr):
    """The way back, to bool (channels, pixels)."""
    if ORDER == "channels":
        bits = (eights.to(tl.int32)[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
    else:
        bits = (eights.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (B_C, B_P)) != 0


@_jit
def _apply_kernel(
    p_y, p_residual, p_stats, p_stats2, p_gate, p_out, p_mask, C: tl.int32, HW: tl.int32, W: tl.int32,
    s_yn: tl.int64, s_yc: tl.int32, s_yh: tl.int32, s_yw: tl.int32,
    s_rn: tl.int64, s_rc: tl.int32, s_rh: tl.int32, s_rw: tl.int32,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ORDER: tl.constexpr, I_ORDER: tl.constexpr, VECTOR: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """out = act((y - mean) * scale + shift + residual); mask where a ReLU follows a residual. stats are (ROWS, C).

    RESIDUAL is "none", "plain", or "norm" for one with statistics of its own; GATED where scale and shift have a gate.
    """
    i_n, i_c, i_p = _tile_of_program(C, HW, B_P, B_C)
    o_c, o_p = i_c + tl.arange(0, B_C), i_p + tl.arange(0, B_P)
    m_c = o_c < C
    mask = _inside(m_c, o_p < HW, ORDER, VECTOR)

    p_tile = _pointers(p_y, i_n, o_c, o_p, W, s_yn, s_yc, s_yh, s_yw, I_ORDER, VECTOR)
    y = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    residual = 0.0
    if RESIDUAL != "none":
        p_tile = _pointers(p_residual, i_n, o_c, o_p, W, s_rn, s_rc, s_rh, s_rw, I_ORDER, VECTOR)
        residual = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    mean, scale, shift = _norm(p_stats, p_gate, i_n, o_c, m_c, C, GATED)
    value = tl.fma(y - mean[:, None], scale[:, None], shift[:, None])
    value = _added(value, residual, p_stats2, o_c, m_c, C, RESIDUAL)
    if ACT == "relu" and RESIDUAL != "none":
        passed = _passes(value, p_out.dtype.element_ty) & mask
        p_tile, m_bytes = _bytes(p_mask, i_n, i_c, i_p, C, HW, ORDER, B_P, B_C)
        tl.store(p_tile, _packed(passed, ORDER, B_P, B_C), mask=m_bytes)
    if ACT != "identity":
        value = _act(value, ACT)
    p_tile = _dense(p_out, i_n, o_c, o_p, C, HW, ORDER, VECTOR)
    tl.store(p_tile, value.to(p_out.dtype.element_ty), mask=mask)


@_jit
def _through_act(
    dout, centred, residual, p_mask, p_stats2, scale, shift, i_n, i_c, i_p, o_c, m_c, C, HW,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ORDER: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """d = dout * act'(value), with the value that the forward pass computed, or the bits that it left."""
    if BITS:
        p_tile, m_bytes = _bytes(p_mask, i_n, i_c, i_p, C, HW, ORDER, B_P, B_C)
        return tl.where(_unpacked(tl.load(p_tile, mask=m_bytes, other=0), ORDER, B_P, B_C), dout, 0.0)
    elif ACT == "relu":
        return tl.where(_passes(tl.fma(centred, scale[:, None], shift[:, None]), DTYPE), dout, 0.0)
    elif ACT == "silu":
        value = tl.fma(centred, scale[:, None], shift[:, None])
        return _act_bwd(dout, _added(value, residual, p_stats2, o_c, m_c, C, RESIDUAL), "silu")
    else:
        return dout


@_jit
def _sums_kernel(
    p_dout, p_y, p_residual, p_mask, p_stats, p_stats2, p_gate, p_t, p_u, p_u2,
    C: tl.int32, HW: tl.int32, W: tl.int32, parts: tl.int32, stretch: tl.int32,
    s_dn: tl.int64, s_dc: tl.int32, s_dh: tl.int32, s_dw: tl.int32,
    s_yn: tl.int64, s_yc: tl.int32, s_yh: tl.int32, s_yw: tl.int32,
    s_rn: tl.int64, s_rc: tl.int32, s_rh: tl.int32, s_rw: tl.int32,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr,
    ORDER: tl.constexpr, I_ORDER: tl.constexpr, VECTOR: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """t, u, u2 (N, parts, C): over the k-th stretch of HW the sums of d, d * (y - mean), d * (residual - mean2).

    RESIDUAL is "norm" where u2 is taken, "plain" where only act' needs the residual.
    """
    i_n, i_k, i_c = _stretch_of_program(C, parts, B_C)
    o_c = i_c + tl.arange(0, B_C)
    m_c = o_c < C
    mean, scale, shift = _norm(p_stats, p_gate, i_n, o_c, m_c, C, GATED)
    t = tl.zeros((B_C, B_P), dtype=tl.float32)
    u = tl.zeros((B_C, B_P), dtype=tl.float32)
    if RESIDUAL == "norm":
        mean2 = _row(p_stats2 + MEAN_ROW * C, o_c, m_c)
        u2 = tl.zeros((B_C, B_P), dtype=tl.float32)
    for start in range(i_k * stretch, tl.minimum((i_k + 1) * stretch, HW), B_P):
        o_p = start + tl.arange(0, B_P)
        mask = _inside(m_c, o_p < HW, ORDER, VECTOR)
        p_tile = _pointers(p_dout, i_n, o_c, o_p, W, s_dn, s_dc, s_dh, s_dw, I_ORDER, VECTOR)
        dout = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        p_tile = _pointers(p_y, i_n, o_c, o_p, W, s_yn, s_yc, s_yh, s_yw, I_ORDER, VECTOR)
        centred = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        residual = 0.0
        if RESIDUAL != "none":
            p_tile = _pointers(p_residual, i_n, o_c, o_p, W, s_rn, s_rc, s_rh, s_rw, I_ORDER, VECTOR)
            residual = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        d = _through_act(
            dout, centred, residual, p_mask, p_stats2, scale, shift, i_n, i_c, start, o_c, m_c, C, HW,
            ACT, RESIDUAL, BITS, p_y.dtype.element_ty, ORDER, B_P, B_C,
        )  # fmt: skip
        t += d
        u += d * centred
        if RESIDUAL == "norm":
            u2 += d * (residual - mean2[:, None])
    o_part = (i_n * parts + i_k) * C + o_c
    tl.store(p_t + o_part, tl.sum(t, 1), mask=m_c)
    tl.store(p_u + o_part, tl.sum(u, 1), mask=m_c)
    if RESIDUAL == "norm":
        tl.store(p_u2 + o_part, tl.sum(u2, 1), mask=m_c)


@_jit
def _apply_bwd_kernel(
    p_dout, p_y, p_residual, p_mask, p_stats, p_stats2, p_gate, p_q, p_coefficients, p_coefficients2, p_dy, p_dresidual,
    C: tl.int32, HW: tl.int32, W: tl.int32,
    s_dn: tl.int64, s_dc: tl.int32, s_dh: tl.int32, s_dw: tl.int32,
    s_yn: tl.int64, s_yc: tl.int32, s_yh: tl.int32, s_yw: tl.int32,
    s_rn: tl.int64, s_rc: tl.int32, s_rh: tl.int32, s_rw: tl.int32,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr,
    DY: tl.constexpr, DRESIDUAL: tl.constexpr,
    ORDER: tl.constexpr, I_ORDER: tl.constexpr, VECTOR: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """dy = scale * d + shift, dresidual = d; DY and DRESIDUAL say what they are of.

    "none": not wanted. "plain", of dresidual: d itself. "fixed": behind a norm with given statistics. "batch": and
    behind one with those of the batch, which add coefficient[0] * (y - mean) + coefficient[1].
    """
    i_n, i_c, i_p = _tile_of_program(C, HW, B_P, B_C)
    o_c, o_p = i_c + tl.arange(0, B_C), i_p + tl.arange(0, B_P)
    m_c = o_c < C
    mask = _inside(m_c, o_p < HW, ORDER, VECTOR)

    p_tile = _pointers(p_dout, i_n, o_c, o_p, W, s_dn, s_dc, s_dh, s_dw, I_ORDER, VECTOR)
    dout = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    mean, scale, shift = _norm(p_stats, p_gate, i_n, o_c, m_c, C, GATED)
    centred, residual = 0.0, 0.0
    if DY == "batch" or (ACT != "identity" and not BITS):
        p_tile = _pointers(p_y, i_n, o_c, o_p, W, s_yn, s_yc, s_yh, s_yw, I_ORDER, VECTOR)
        centred = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) - mean[:, None]
    if DRESIDUAL == "batch" or (ACT == "silu" and RESIDUAL != "none"):
        p_tile = _pointers(p_residual, i_n, o_c, o_p, W, s_rn, s_rc, s_rh, s_rw, I_ORDER, VECTOR)
        residual = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    d = _through_act(
        dout, centred, residual, p_mask, p_stats2, scale, shift, i_n, i_c, i_p, o_c, m_c, C, HW,
        ACT, RESIDUAL, BITS, p_y.dtype.element_ty, ORDER, B_P, B_C,
    )  # fmt: skip
    if DY != "none":
        dy = d * scale[:, None]
        if DY == "batch":
            dy += centred * _row(p_coefficients, o_c, m_c)[:, None]
            constant = _row(p_coefficients + C, o_c, m_c)
        else:
            constant = tl.zeros((B_C,), dtype=tl.float32)
        if GATED:
            constant += _row(p_stats + SCALE_ROW * C, o_c, m_c) * _row(p_q + i_n * C, o_c, m_c)
        if DY == "batch" or GATED:
            dy += constant[:, None]
        p_tile = _dense(p_dy, i_n, o_c, o_p, C, HW, ORDER, VECTOR)
        tl.store(p_tile, dy.to(p_dy.dtype.element_ty), mask=mask)
    if DRESIDUAL != "none":
        if DRESIDUAL != "plain":
            d *= _row(p_stats2 + SCALE_ROW * C, o_c, m_c)[:, None]
        if DRESIDUAL == "batch":
            mean2 = _row(p_stats2 + MEAN_ROW * C, o_c, m_c)
            d += (residual - mean2[:, None]) * _row(p_coefficients2, o_c, m_c)[:, None]
            d += _row(p_coefficients2 + C, o_c, m_c)[:, None]
        p_tile = _dense(p_dresidual, i_n, o_c, o_p, C, HW, ORDER, VECTOR)
        tl.store(p_tile, d.to(p_dresidual.dtype.element_ty), mask=mask, eviction_policy="evict_first")
