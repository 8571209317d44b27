"""Triton kernels of the residual tail over channels; `kernels.tail_triton` launches them."""

from __future__ import annotations

import triton.language as tl

from kernels.statistics import INVSTD, UNBIASED_VAR
from kernels.triton_products import MEAN_ROW, SCALE_ROW, SHIFT_ROW, _row
from kernels.triton_tiles import _jit

INVSTD_ROW, UNBIASED_VAR_ROW = tl.constexpr(INVSTD), tl.constexpr(UNBIASED_VAR)


@_jit
def _statistics_kernel(
    p_pivot, p_shift, p_m2, p_weight, p_bias, p_stats,
    C: tl.int32, HW: tl.int32, rows: tl.int32, parts: tl.int32, stretch: tl.int32,
    count: tl.float32, divisor: tl.float32, eps: tl.float32,
    AFFINE: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """The statistics of `kernels.statistics` from those of the stretches, by Chan's rule; the last row is m2 / divisor.

    pivot, shift and m2 are (rows, C), count is the number of values behind all rows; weight and bias (C,) float32.
    """
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_c = o_c < C
    o_rows = tl.arange(0, B_ROWS).to(tl.int64)
    m_rows = o_rows < rows
    first = tl.load(p_pivot + o_rows[:, None] * C + o_c[None, :], mask=m_rows[:, None] & m_c[None, :], other=0.0)
    pivot = tl.sum(first, 0) / tl.minimum(rows, B_ROWS).to(tl.float32)
    acc = tl.zeros((B_ROWS, B_C), dtype=tl.float32)
    acc_m2 = tl.zeros((B_ROWS, B_C), dtype=tl.float32)
    for start in range(0, rows, B_ROWS):
        o_rows = start + tl.arange(0, B_ROWS).to(tl.int64)
        m_rows = o_rows < rows
        mask = m_rows[:, None] & m_c[None, :]
        values = tl.minimum(stretch, HW - (o_rows % parts) * stretch).to(tl.float32)[:, None]
        shift = tl.load(p_pivot + o_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0) - pivot[None, :]
        shift += tl.load(p_shift + o_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0)
        shift = tl.where(mask, shift, 0.0)
        acc += values * shift
        acc_m2 += tl.load(p_m2 + o_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0) + values * shift * shift

    total = tl.sum(acc, 0)
    shift = total / count
    mean = pivot + shift
    # never below 0: where all values are near the pivot these differences are exact, and elsewhere m2 is far above them
    m2 = tl.sum(acc_m2, 0) - total * shift
    invstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
    if AFFINE:
        scale, bias = invstd * _row(p_weight, o_c, m_c), _row(p_bias, o_c, m_c)
    else:
        scale, bias = invstd, tl.zeros((B_C,), dtype=tl.float32)
    tl.store(p_stats + MEAN_ROW * C + o_c, mean, mask=m_c)
    tl.store(p_stats + INVSTD_ROW * C + o_c, invstd, mask=m_c)
    tl.store(p_stats + SCALE_ROW * C + o_c, scale, mask=m_c)
    tl.store(p_stats + SHIFT_ROW * C + o_c, bias, mask=m_c)
    tl.store(p_stats + UNBIASED_VAR_ROW * C + o_c, m2 / divisor, mask=m_c)


@_jit
def _coefficients_kernel(
    p_t, p_u, p_gate, p_q, p_deviation, p_stats, p_dweight, p_dbias, p_coefficients,
    C: tl.int32, HW: tl.int32, rows: tl.int32, parts: tl.int32, inv_count: tl.float32,
    GATED: tl.constexpr, B_ROWS: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """dweight, dbias (C,) from t, u (rows, C); coefficients (2, C): of y - mean, and of 1, in dy. q is (N, C)."""
    o_c = tl.program_id(0) * B_C + tl.arange(0, B_C)
    m_c = o_c < C
    acc_t = tl.zeros((B_ROWS, B_C), dtype=tl.float32)
    acc_u = tl.zeros((B_ROWS, B_C), dtype=tl.float32)
    for start in range(0, rows, B_ROWS):
        o_rows = start + tl.arange(0, B_ROWS).to(tl.int64)
        mask = (o_rows < rows)[:, None] & m_c[None, :]
        t = tl.load(p_t + o_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0)
        u = tl.load(p_u + o_rows[:, None] * C + o_c[None, :], mask=mask, other=0.0)
        if GATED:
            o_nc = (o_rows // parts)[:, None] * C + o_c[None, :]
            gate = tl.load(p_gate + o_nc, mask=mask, other=0.0)
            once = mask & (o_rows % parts == 0)[:, None]
            q = tl.load(p_q + o_nc, mask=once, other=0.0) * HW.to(tl.float32)
            t = t * gate + q
            u = u * gate + q * tl.load(p_deviation + o_nc, mask=once, other=0.0)
        acc_t += t
        acc_u += u
    dbias = tl.sum(acc_t, 0)
    invstd = _row(p_stats + INVSTD_ROW * C, o_c, m_c)
    dweight = tl.sum(acc_u, 0) * invstd
    share = -inv_count * _row(p_stats + SCALE_ROW * C, o_c, m_c)
    tl.store(p_dweight + o_c, dweight, mask=m_c)
    tl.store(p_dbias + o_c, dbias, mask=m_c)
    tl.store(p_coefficients + o_c, share * invstd * dweight, mask=m_c)
    tl.store(p_coefficients + C + o_c, share * dbias, mask=m_c)
