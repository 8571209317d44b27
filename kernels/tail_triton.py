"""The residual tail in Triton: three launches each way without SE, five forward and seven backward with it; no atomics.

    forward    moments       mean (in two parts), m2 [n,k,c] of the k-th stretch of HW         reads y
               statistics    the rows of `kernels.statistics`, merged from all stretches
               fc1, fc2      deviation, pooled, hidden, gate: `kernels.triton_products`       with SE
               apply         out = act((y - mu) * A + B + residual)                        reads y, residual, writes out
    backward   sums          T, U [n,k,c] = sum of d, of d * (y - mu)                       reads dout, bits, y
               fc2_bwd, weights, fc1_bwd, weights     the weights' gradients, and q            with SE
               coefficients  dweight, dbias, and what the statistics pass on to each dy
               apply_bwd     dy = A * d + Q * (y - mu) + E;  dresidual      reads dout, bits, y, writes dy, dresidual

A residual with a BatchNorm of its own adds its moments and statistics, and in the backward pass its coefficients.
Both sweeps form d from dout and the bits: that costs an eighth of a byte an element more than a d that the first sweep
writes, and leaves the first sweep with nothing but reads, of what the second one begins with while it is in L2.

Sums are taken about a mean close by, of a stretch's first tile and of the first stretches, so that nothing cancels. The
large kernels read parameters only as rows of float32 statistics. The sign of a tail without residual is computed again
from y, by the same instructions as in the forward pass. Tiles lie as `out` does, in `memory_format(y)`, so that eight
neighbours along its contiguous dimension make a byte of the mask; tensors that lie otherwise are read by their strides.

Names, tiles and the finite number of kernels: `kernels.triton_tiles`. Formulas: `kernels.residual_tail`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.norms import FixedNorm
from kernels.residual_tail import SE, How, Saved, mask_shape, memory_format
from kernels.statistics import (
    INVSTD,
    MEAN,
    SCALE,
    UNBIASED_VAR,
    batch_statistics,
    merge_over_ranks,
    running_statistics,
    sum_over_ranks,
)
from kernels.statistics import ROWS as STATISTICS
from kernels.tail_triton_small import _coefficients_kernel, _statistics_kernel
from kernels.tail_triton_sweeps import _apply_bwd_kernel, _apply_kernel, _moments_kernel, _sums_kernel
from kernels.triton_products import Normed, excite, excite_bwd
from kernels.triton_tiles import OPTIONS, Plan, _order, _stretches, _strides, _vector, _warps

SIDE = 64  # of a tile along the contiguous dimension: a whole line of the cache in half precision
# Bytes of a tile, two and four accesses a thread; sums hold a register for every element of theirs
SUMMED_TILE, APPLIED_TILE = 4096, 8192
# A summing sweep is cut along HW until it has about this many programs, but never into more than MERGED stretches of
# the whole batch, which the channels' kernels read one after another; fixed, so that results do not depend on the GPU
PROGRAMS, MERGED = 4096, 2048
STRETCHES, CHANNELS = 512, 8  # of a block of the kernels over channels: 32 bytes, a sector, of each row


def tail_fwd(
    y: Tensor, norm: FixedNorm, se: SE | None, residual: Tensor | None, residual_norm: FixedNorm | None, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, mask, stats, stats2, deviation, pooled, hidden, gate, as `kernels.residual_tail` describes them."""
    C = y.shape[1]
    out = torch.empty_like(y, memory_format=memory_format(y))
    masked = act == "relu" and residual is not None
    mask = y.new_empty(mask_shape(y) if masked else (0,), dtype=torch.uint8)
    # one each: an operator's outputs share no memory
    stats2, deviation, pooled, hidden, gate = (y.new_empty(0, dtype=torch.float32) for _ in range(5))
    with torch.cuda.device_of(y):
        moments = _moments(y) if se is not None or norm.mean is None else None
        stats = _statistics(moments, norm, C)
        if se is not None and moments is not None:
            normed = Normed(moments.shift, stats, moments.stretch)
            deviation, pooled, hidden, gate = excite(
                moments.pivot, moments.HW, se.w1, se.b1, se.w2, se.b2, se.act, se.gate, normed
            )
        if residual is not None and residual_norm is not None:
            stats2 = _statistics(_moments(residual) if residual_norm.mean is None else None, residual_norm, C)
        _apply(y, residual, stats, stats2, gate, out, mask, act)
    return out, mask, stats, stats2, deviation, pooled, hidden, gate


def tail_bwd(dout: Tensor, saved: Saved, how: How, output_mask: list[bool]) -> tuple[Tensor, ...]:
    """(dy, dresidual, dweight, dbias, dw1, db1, dw2, db2, dweight2, dbias2), empty where not asked for."""
    y, stats, stats2 = saved.y, saved.stats, saved.stats2
    with_dy, with_dresidual, with_dweight, with_dbias, *_, with_dweight2, with_dbias2 = output_mask
    with_sums2 = with_dweight2 or with_dbias2 or (with_dresidual and how.training2)
    se = saved.w1 is not None
    with_sums = any(output_mask[2:8]) or (with_dy and (se or how.training))
    like_y = memory_format(y)
    dy, dresidual = (
        torch.empty_like(y, memory_format=like_y) if wanted else y.new_empty(0) for wanted in output_mask[:2]
    )
    q, dweight, dbias, dweight2, dbias2 = [stats.new_empty(0)] * 5
    weights = [q] * 4
    coefficients = coefficients2 = None
    with torch.cuda.device_of(y):
        if with_sums or with_sums2:
            sums = _sums(dout, saved, how, with_sums2)
            if saved.w1 is not None and saved.w2 is not None and with_sums:
                with_q = with_dy or with_dweight or with_dbias
                excitation = saved.w1, saved.w2, saved.pooled, saved.hidden, saved.gate, how.se_act, how.gate_fn
                HW, normed = y.shape[2] * y.shape[3], Normed(sums.t, stats)
                *weights, q = excite_bwd(sums.u, HW, *excitation, output_mask[4:8], with_q, normed)
            if with_dweight or with_dbias or (with_dy and how.training):
                per_sample = (saved.gate, q, saved.deviation) if se else None
                group = how.group if how.training and with_dy else ""
                dweight, dbias, coefficients = _coefficients(sums, sums.u, stats, per_sample, y, group)
            if with_sums2:
                group = how.group2 if how.training2 and with_dresidual else ""
                dweight2, dbias2, coefficients2 = _coefficients(sums, sums.u2, stats2, None, y, group)
        if with_dy or with_dresidual:
            _apply_bwd(dout, saved, how, q, coefficients, coefficients2, dy, dresidual)
    norms = (dweight, dbias, *weights, dweight2, dbias2)
    rest = (t if wanted else t.new_empty(0) for t, wanted in zip(norms, output_mask[2:], strict=True))
    return dy, dresidual, *rest


class Moments(NamedTuple):
    """What `_moments_kernel` makes of stretches of ``stretch`` pixels, each (N, parts, C)."""

    pivot: Tensor
    shift: Tensor
    m2: Tensor
    stretch: int
    HW: int


class Sums(NamedTuple):
    """Each (N, parts, C); u2 is empty where it was not taken."""

    t: Tensor
    u: Tensor
    u2: Tensor


def _plan(order: str, tensors: list[Tensor], tile_bytes: int) -> Plan:
    """The tile lies in ``order``; tensors that do not all lie so are met through their strides alone."""
    in_order = order if all(_order(t) == order for t in tensors) else "any"
    vector = _vector(in_order, tensors)
    itemsize = tensors[0].element_size()
    tile = tile_bytes // itemsize
    b_p, b_c = (tile // SIDE, SIDE) if order == "channels" else (SIDE, tile // SIDE)
    return Plan(order, in_order, vector, b_p, b_c, _warps(in_order, vector, itemsize))


def _order_of_out(y: Tensor) -> str:
    return "channels" if memory_format(y) == torch.channels_last else "pixels"


def _programs(N: int, C: int, plan: Plan) -> int:
    """How many parts of HW a summing sweep may be cut into."""
    return min(PROGRAMS // (N * triton.cdiv(C, plan.b_c)), MERGED // N)


def _moments(x: Tensor) -> Moments:
    N, C, H, W = x.shape
    order = _order(x)
    plan = _plan(order, [x], SUMMED_TILE)
    parts, stretch = _stretches(x, plan, _programs(N, C, plan))
    pivot, shift, m2 = x.new_empty((3, N, parts, C), dtype=torch.float32)
    _moments_kernel[(N * parts * triton.cdiv(C, plan.b_c),)](
        x, pivot, shift, m2, C, H * W, W, parts, stretch, *_strides(x),
        order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip
    return Moments(pivot, shift, m2, stretch, H * W)


def _statistics(moments: Moments | None, norm: FixedNorm, C: int) -> Tensor:
    """The statistics (ROWS, C) of a norm: those it was given, or of the batch, over its group."""
    if norm.mean is not None and norm.var is not None:
        return running_statistics(norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
    assert moments is not None
    pivot, shift, m2, stretch, HW = moments
    N, parts, _ = m2.shape
    stats = m2.new_empty((STATISTICS, C))
    weight, bias = (None, None) if norm.group else _affine(norm, m2)
    count = N * HW
    # for a group the last row is to be m2 itself
    divisor = 1.0 if norm.group else float(count - 1)
    _statistics_kernel[(triton.cdiv(C, CHANNELS),)](
        pivot, shift, m2, weight, bias, stats, C, HW, N * parts, parts, stretch, float(count), divisor, norm.eps,
        weight is not None, STRETCHES, CHANNELS, num_warps=8, **OPTIONS,
    )  # fmt: skip
    if not norm.group:
        return stats
    merged = merge_over_ranks(stats[MEAN], stats[UNBIASED_VAR], count, norm.group)
    return batch_statistics(*merged, norm.weight, norm.bias, norm.eps).float()


def _affine(norm: FixedNorm, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """weight and bias in float32 and contiguous, both or none."""
    if norm.weight is None and norm.bias is None:
        return None, None
    weight = like.new_ones(like.shape[2]) if norm.weight is None else norm.weight
    bias = like.new_zeros(like.shape[2]) if norm.bias is None else norm.bias
    return weight.float().contiguous(), bias.float().contiguous()


def _kind(residual: Tensor | None, stats2: Tensor) -> str:
    return "none" if residual is None else "norm" if stats2.numel() else "plain"


def _apply(
    y: Tensor, residual: Tensor | None, stats: Tensor, stats2: Tensor, gate: Tensor, out: Tensor, mask: Tensor, act: str
) -> None:
    N, C, H, W = y.shape
    plan = _plan(_order_of_out(y), [t for t in (y, residual) if t is not None], APPLIED_TILE)
    _apply_kernel[(N * triton.cdiv(C, plan.b_c) * triton.cdiv(H * W, plan.b_p),)](
        y, residual, stats, stats2, gate, out, mask, C, H * W, W, *_strides(y), *_strides(residual),
        act, _kind(residual, stats2), gate.numel() > 0,
        plan.order, plan.other_order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip


def _read_again(saved: Saved, how: How, norm2: bool) -> tuple[str, Tensor | None]:
    """RESIDUAL of a backward sweep, and the residual that it reads; ``norm2`` where its own gradient needs it."""
    if norm2:
        return "norm", saved.residual
    if how.act == "silu" and how.with_residual:
        return _kind(saved.residual, saved.stats2), saved.residual
    return "none", None


def _sums(dout: Tensor, saved: Saved, how: How, norm2: bool) -> Sums:
    """The backward pass's first sweep."""
    y = saved.y
    N, C, H, W = y.shape
    kind, residual = _read_again(saved, how, norm2)
    tensors = [t for t in (dout, y, residual) if t is not None]
    plan = _plan(_order_of_out(y), tensors, SUMMED_TILE)
    parts, stretch = _stretches(y, plan, _programs(N, C, plan))
    t, u, *u2 = saved.stats.new_empty((3 if kind == "norm" else 2, N, parts, C))
    sums = Sums(t, u, u2[0] if u2 else t.new_empty(0))
    bits = _takes_bits(how)
    computed_again = how.act == "silu" or (how.act == "relu" and not bits)
    _sums_kernel[(N * parts * triton.cdiv(C, plan.b_c),)](
        dout, y, residual, saved.mask, saved.stats, saved.stats2, saved.gate, *sums, C, H * W, W, parts, stretch,
        *_strides(dout), *_strides(y), *_strides(residual),
        how.act, kind, bits, computed_again and saved.gate.numel() > 0,
        plan.order, plan.other_order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip
    return sums


def _takes_bits(how: How) -> bool:
    return how.act == "relu" and how.with_residual


def _coefficients(
    sums: Sums, u: Tensor, stats: Tensor, per_sample: tuple[Tensor, Tensor, Tensor] | None, y: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dweight, dbias (C,) of this rank, and the coefficients (2, C) of what the statistics of all ranks pass on."""
    N, parts, C = u.shape
    HW = y.shape[2] * y.shape[3]
    dweight, dbias, coefficients = stats.new_empty(C), stats.new_empty(C), stats.new_empty((2, C))
    gate, q, deviation = per_sample or (stats, stats, stats)
    _coefficients_kernel[(triton.cdiv(C, CHANNELS),)](
        sums.t, u, gate, q, deviation, stats, dweight, dbias, coefficients,
        C, HW, N * parts, parts, 1.0 / (N * HW), per_sample is not None, STRETCHES, CHANNELS, num_warps=8, **OPTIONS,
    )  # fmt: skip
    if group:
        total, count = sum_over_ranks(torch.stack((dweight, dbias)), N * HW, group)
        coefficients = torch.stack((stats[INVSTD] * total[0], total[1])) * (-stats[SCALE] / count)
    return dweight, dbias, coefficients


def _apply_bwd(
    dout: Tensor, saved: Saved, how: How, q: Tensor, coefficients: Tensor | None, coefficients2: Tensor | None,
    dy: Tensor, dresidual: Tensor,
) -> None:  # fmt: skip
    """The backward pass's second sweep, into those of dy and dresidual that have elements."""
    y = saved.y
    N, C, H, W = y.shape
    of_y = "none" if dy.numel() == 0 else "batch" if how.training else "fixed"
    of_residual = "none" if dresidual.numel() == 0 else _passed_on(saved, how)
    kind, residual = _read_again(saved, how, of_residual == "batch")
    tensors: list[Any] = [t for t in (dout, y, residual) if t is not None]
    plan = _plan(_order_of_out(y), tensors, APPLIED_TILE)
    _apply_bwd_kernel[(N * triton.cdiv(C, plan.b_c) * triton.cdiv(H * W, plan.b_p),)](
        dout, y, residual, saved.mask, saved.stats, saved.stats2, saved.gate, q,
        coefficients if of_y == "batch" else None, coefficients2 if of_residual == "batch" else None,
        dy, dresidual, C, H * W, W, *_strides(dout), *_strides(y), *_strides(residual),
        how.act, kind, _takes_bits(how), saved.gate.numel() > 0, of_y, of_residual,
        plan.order, plan.other_order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip


def _passed_on(saved: Saved, how: How) -> str:
    """What a gradient of the residual is of."""
    return "plain" if saved.stats2.numel() == 0 else "batch" if how.training2 else "fixed"
