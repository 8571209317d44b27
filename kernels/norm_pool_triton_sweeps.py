"""Triton kernels of the stem's pool, which sweep over activations; `kernels.norm_pool_triton` launches them."""

from __future__ import annotations

import triton.language as tl

from kernels.tail_triton_small import MEAN_ROW, SCALE_ROW, SHIFT_ROW, _row
from kernels.triton_tiles import _jit


@_jit
def _tile(pid, C, Ho, Wo, B_H: tl.constexpr, B_W: tl.constexpr, B_C: tl.constexpr):
    """Of a program: the sample, the first row of outputs, the columns, the channels."""
    blocks_c, blocks_w, blocks_h = tl.cdiv(C, B_C), tl.cdiv(Wo, B_W), tl.cdiv(Ho, B_H)
    o_c = (pid % blocks_c) * B_C + tl.arange(0, B_C)
    o_w = ((pid // blocks_c) % blocks_w) * B_W + tl.arange(0, B_W)
    i_h = ((pid // blocks_c // blocks_w) % blocks_h) * B_H
    return (pid // blocks_c // blocks_w // blocks_h).to(tl.int64), i_h, o_w, o_c


@_jit
def _at(p, o_c, i_h, o_w, s_h, s_w, VECTOR: tl.constexpr):
    """Pointers (channels, columns) into row i_h of a sample."""
    B_VECTOR: tl.constexpr = VECTOR * (p.dtype.element_ty.primitive_bitwidth // 8)
    return tl.multiple_of(p + (o_c[:, None] + (i_h * s_h + o_w * s_w)[None, :]), (B_VECTOR, 1))


@_jit
def _mask(m_c, m_w, VECTOR: tl.constexpr):
    return tl.max_constancy(m_c[:, None] & m_w[None, :], (VECTOR, 1))


@_jit
def _width(i_h, H, W):
    """W where there is a row i_h of the H, and 0 where there is none."""
    return tl.where((i_h >= 0) & (i_h < H), W, 0)


@_jit
def _take(best, code, value, position):
    """Goes on to a value that follows: a larger one replaces the maximum, and NaN does, as in PyTorch."""
    above = (value > best) | (value != value)
    return tl.where(above, value, best), tl.where(above, position, code)


@_jit
def _row_maximum(
    p_y, i_h, o_w, o_c, m_c, mean, scale, shift, H, W, s_h, s_w,
    VECTOR: tl.constexpr, B_W: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """The largest of the three values that each window has in row i_h, or 0; and which, or 9. p_y is of the sample."""
    best = tl.zeros((B_C, B_W), dtype=tl.float32)
    code = tl.full((B_C, B_W), 9, dtype=tl.int32)
    for k in tl.static_range(3):
        o_x = 2 * o_w - 1 + k
        mask = _mask(m_c, (o_x >= 0) & (o_x < _width(i_h, H, W)), VECTOR)
        y = tl.load(_at(p_y, o_c, i_h, o_x, s_h, s_w, VECTOR), mask=mask, other=0.0).to(tl.float32)
        value = tl.fma(y - mean[:, None], scale[:, None], shift[:, None]).to(p_y.dtype.element_ty).to(tl.float32)
        best, code = _take(best, code, tl.where(mask, value, 0.0), k)
    return best, code


@_jit
def _norm_pool_kernel(
    p_y, p_stats, p_out, p_code, C: tl.int32, H: tl.int32, W: tl.int32, Ho: tl.int32, Wo: tl.int32,
    s_yn: tl.int64, s_yh: tl.int32, s_yw: tl.int32,
    VECTOR: tl.constexpr, B_H: tl.constexpr, B_W: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """out, and code (N, Ho, Wo, C) uint8, of y and stats (ROWS, C)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first sweep read last comes first
    i_n, i_h, o_w, o_c = _tile(pid, C, Ho, Wo, B_H, B_W, B_C)
    m_c = o_c < C
    p_y += i_n * s_yn
    p_out += i_n * Ho * Wo * C
    p_code += i_n * Ho * Wo * C
    mean, scale, shift = (
        _row(p_stats + MEAN_ROW * C, o_c, m_c),
        _row(p_stats + SCALE_ROW * C, o_c, m_c),
        _row(p_stats + SHIFT_ROW * C, o_c, m_c),
    )
    mask = _mask(m_c, o_w < Wo, VECTOR)
    best, code = _row_maximum(p_y, 2 * i_h - 1, o_w, o_c, m_c, mean, scale, shift, H, W, s_yh, s_yw, VECTOR, B_W, B_C)
    for i_o in range(i_h, tl.minimum(i_h + B_H, Ho)):
        value, position = _row_maximum(
            p_y, 2 * i_o, o_w, o_c, m_c, mean, scale, shift, H, W, s_yh, s_yw, VECTOR, B_W, B_C
        )
        best, code = _take(best, code, value, position + 3)
        # the last row of a window is the first of the one below it
        value, position = _row_maximum(
            p_y, 2 * i_o + 1, o_w, o_c, m_c, mean, scale, shift, H, W, s_yh, s_yw, VECTOR, B_W, B_C
        )
        best, code = _take(best, code, value, position + 6)
        tl.store(_at(p_out, o_c, i_o, o_w, Wo * C, C, VECTOR), best.to(p_out.dtype.element_ty), mask=mask)
        tl.store(_at(p_code, o_c, i_o, o_w, Wo * C, C, VECTOR), code.to(tl.uint8), mask=mask)
        best, code = value, position


@_jit
def _norm_pool_sums_kernel(
    p_dout, p_y, p_code, p_stats, p_t, p_u,
    C: tl.int32, outputs: tl.int32, Wo: tl.int32, parts: tl.int32, stretch: tl.int32,
    s_dn: tl.int64, s_dh: tl.int32, s_dw: tl.int32, s_yn: tl.int64, s_yh: tl.int32, s_yw: tl.int32,
    VECTOR: tl.constexpr, B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """t, u (N, parts, C): over the k-th stretch of outputs the sums of d, d * (y - mean)."""
    blocks_c = tl.cdiv(C, B_C)
    pid = tl.program_id(0)
    i_k = (pid // blocks_c) % parts
    i_n = (pid // blocks_c // parts).to(tl.int64)
    o_c = (pid % blocks_c) * B_C + tl.arange(0, B_C)
    m_c = o_c < C
    p_dout += i_n * s_dn
    p_y += i_n * s_yn
    p_code += i_n * outputs * C
    mean = _row(p_stats + MEAN_ROW * C, o_c, m_c)
    t = tl.zeros((B_C, B_P), dtype=tl.float32)
    u = tl.zeros((B_C, B_P), dtype=tl.float32)
    for start in range(i_k * stretch, tl.minimum((i_k + 1) * stretch, outputs), B_P):
        o_p = start + tl.arange(0, B_P)
        o_h, o_w = o_p // Wo, o_p % Wo
        mask = _mask(m_c, o_p < outputs, VECTOR)
        code = tl.load(_at(p_code, o_c, 0, o_p, 0, C, VECTOR), mask=mask, other=9).to(tl.int32)
        B_VECTOR: tl.constexpr = VECTOR * (p_dout.dtype.element_ty.primitive_bitwidth // 8)
        p_tile = tl.multiple_of(p_dout + (o_c[:, None] + (o_h * s_dh + o_w * s_dw)[None, :]), (B_VECTOR, 1))
        dout = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        m_found = code < 9
        o_y = (2 * o_h - 1)[None, :] + code // 3
        o_x = (2 * o_w - 1)[None, :] + code % 3
        y = tl.load(p_y + (o_c[:, None] + o_y * s_yh + o_x * s_yw), mask=m_found, other=0.0).to(tl.float32)
        d = tl.where(m_found, dout, 0.0)
        t += d
        u += d * (y - mean[:, None])
    o_part = (i_n * parts + i_k) * C + o_c
    tl.store(p_t + o_part, tl.sum(t, 1), mask=m_c)
    tl.store(p_u + o_part, tl.sum(u, 1), mask=m_c)


@_jit
def _windows(p_dout, p_code, i_h, o_w, o_c, m_c, C, Ho, Wo, s_dh, s_dw, VECTOR: tl.constexpr):
    """dout and code of a row of outputs; the code is 9 where there is none."""
    mask = _mask(m_c, o_w < _width(i_h, Ho, Wo), VECTOR)
    dout = tl.load(_at(p_dout, o_c, i_h, o_w, s_dh, s_dw, VECTOR), mask=mask, other=0.0).to(tl.float32)
    return dout, tl.load(_at(p_code, o_c, i_h, o_w, Wo * C, C, VECTOR), mask=mask, other=9).to(tl.int32)


@_jit
def _store_gradient(
    p_dy, p_y, d, mean, scale, slope, drift, i_h, o_x, o_c, m_c, C, H, W, s_yh, s_yw,
    THROUGH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dy of the pixels of row i_h and columns o_x."""
    mask = _mask(m_c, o_x < _width(i_h, H, W), VECTOR)
    dy = d * scale[:, None]
    if THROUGH:
        y = tl.load(_at(p_y, o_c, i_h, o_x, s_yh, s_yw, VECTOR), mask=mask, other=0.0).to(tl.float32)
        dy += tl.fma(y - mean[:, None], slope[:, None], drift[:, None])
    tl.store(_at(p_dy, o_c, i_h, o_x, W * C, C, VECTOR), dy.to(p_dy.dtype.element_ty), mask=mask)


@_jit
def _norm_pool_bwd_kernel(
    p_dout, p_y, p_code, p_stats, p_coefficients, p_dy,
    C: tl.int32, H: tl.int32, W: tl.int32, Ho: tl.int32, Wo: tl.int32,
    s_dn: tl.int64, s_dh: tl.int32, s_dw: tl.int32, s_yn: tl.int64, s_yh: tl.int32, s_yw: tl.int32,
    THROUGH: tl.constexpr, VECTOR: tl.constexpr, B_H: tl.constexpr, B_W: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """dy = scale * d, and where THROUGH the statistics what these pass on: coefficients (2, C), of y - mean and of 1.

    A window's middle and last row and column are pixels that no other program writes.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what the first sweep read last comes first
    i_n, i_h, o_w, o_c = _tile(pid, C, Ho, Wo, B_H, B_W, B_C)
    m_c = o_c < C
    p_dout += i_n * s_dn
    p_y += i_n * s_yn
    p_code += i_n * Ho * Wo * C
    p_dy += i_n * H * W * C
    scale = _row(p_stats + SCALE_ROW * C, o_c, m_c)
    mean, slope, drift = scale, scale, scale
    if THROUGH:
        mean = _row(p_stats + MEAN_ROW * C, o_c, m_c)
        slope, drift = _row(p_coefficients, o_c, m_c), _row(p_coefficients + C, o_c, m_c)
    here, k_here = _windows(p_dout, p_code, i_h, o_w, o_c, m_c, C, Ho, Wo, s_dh, s_dw, VECTOR)
    right, k_right = _windows(p_dout, p_code, i_h, o_w + 1, o_c, m_c, C, Ho, Wo, s_dh, s_dw, VECTOR)
    for i_o in range(i_h, tl.minimum(i_h + B_H, Ho)):
        below, k_below = _windows(p_dout, p_code, i_o + 1, o_w, o_c, m_c, C, Ho, Wo, s_dh, s_dw, VECTOR)
        across, k_across = _windows(p_dout, p_code, i_o + 1, o_w + 1, o_c, m_c, C, Ho, Wo, s_dh, s_dw, VECTOR)
        d = tl.where(k_here == 4, here, 0.0)
        _store_gradient(
            p_dy, p_y, d, mean, scale, slope, drift, 2 * i_o, 2 * o_w, o_c, m_c, C, H, W, s_yh, s_yw, THROUGH, VECTOR
        )
        d = tl.where(k_here == 5, here, 0.0) + tl.where(k_right == 3, right, 0.0)
        _store_gradient(
            p_dy, p_y, d, mean, scale, slope, drift, 2 * i_o, 2 * o_w + 1, o_c, m_c, C, H, W, s_yh, s_yw,
            THROUGH, VECTOR,
        )  # fmt: skip
        d = tl.where(k_here == 7, here, 0.0) + tl.where(k_below == 1, below, 0.0)
        _store_gradient(
            p_dy, p_y, d, mean, scale, slope, drift, 2 * i_o + 1, 2 * o_w, o_c, m_c, C, H, W, s_yh, s_yw,
            THROUGH, VECTOR,
        )  # fmt: skip
        d = tl.where(k_here == 8, here, 0.0) + tl.where(k_right == 6, right, 0.0)
        d += tl.where(k_below == 2, below, 0.0) + tl.where(k_across == 0, across, 0.0)
        _store_gradient(
            p_dy, p_y, d, mean, scale, slope, drift, 2 * i_o + 1, 2 * o_w + 1, o_c, m_c, C, H, W, s_yh, s_yw,
            THROUGH, VECTOR,
        )  # fmt: skip
        here, k_here, right, k_right = below, k_below, across, k_across
