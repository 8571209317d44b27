"""Squeeze-and-Excitation in Triton: four launches forward, six backward, no atomics.

    forward    pool    part[n,k,c] = sum of x over the k-th stretch of HW           reads x
               fc1, fc2     pooled, hidden, gate: `kernels.triton_products`
               scale   out = x * gate                                               reads x, writes out
    backward   pool    part[n,k,c] = sum of dout * x                                reads dout, x
               fc2_bwd, weights, fc1_bwd, weights     the weights' gradients, and q: `kernels.triton_products`
               scale   dx = dout * gate + q                                         reads dout, writes dx

Sums are float32. How tiles lie over activations, and how kernels are named: `kernels.triton_tiles`.

The second sweep walks the tiles backwards: those that the first one read last are still in L2, and it meets them first.
Cutting the batch into chunks that fit L2 would keep all of it there, but at four launches a chunk: with some 20 samples
of stage 1 to a chunk a launch lasts a few microseconds, as long as it takes to start and to drain. And what fits would
depend on the GPU. A kernel that reads x once is the better answer, and the `cuda` backend has it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kernels.triton_products import excite, excite_bwd
from kernels.triton_tiles import (
    OPTIONS,
    Plan,
    _inside,
    _jit,
    _order,
    _pointers,
    _stretch_of_program,
    _stretches,
    _strides,
    _tile_of_program,
    _vector,
    _warps,
)

TILE = 4096  # elements of a sweep's tile: 32 float32 accumulators a thread in four warps
# The side of a tile along the dimension that is contiguous in memory; the other side is what is left of TILE
SIDES = {"channels": (128, 64, 32), "pixels": (64,), "any": (64,)}
# A sweep is cut along HW until it has about this many programs; fixed, so that results do not depend on the GPU
PROGRAMS = 1024


@_jit
def _pool_kernel(
    p_x, p_dout, p_part, C: tl.int32, HW: tl.int32, W: tl.int32, parts: tl.int32, stretch: tl.int32,
    s_xn: tl.int64, s_xc: tl.int32, s_xh: tl.int32, s_xw: tl.int32,
    s_dn: tl.int64, s_dc: tl.int32, s_dh: tl.int32, s_dw: tl.int32,
    WITH_DOUT: tl.constexpr, X_ORDER: tl.constexpr, D_ORDER: tl.constexpr, VECTOR: tl.constexpr,
    B_P: tl.constexpr, B_C: tl.constexpr,
):  # fmt: skip
    """part[n, k, c] = sum over the k-th stretch of HW of x, or of dout * x; part is (N, parts, C) float32."""
    i_n, i_k, i_c = _stretch_of_program(C, parts, B_C)
    o_c = i_c + tl.arange(0, B_C)
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
    i_n, i_c, i_p = _tile_of_program(C, HW, B_P, B_C)
    o_c, o_p = i_c + tl.arange(0, B_C), i_p + tl.arange(0, B_P)
    m_c = o_c < C
    mask = _inside(m_c, o_p < HW, O_ORDER, VECTOR)

    p_tile = _pointers(p_in, i_n, o_c, o_p, W, s_in, s_ic, s_ih, s_iw, I_ORDER, VECTOR)
    value = tl.load(p_tile, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    value *= tl.load(p_gate + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    if WITH_Q:
        value += tl.load(p_q + i_n * C + o_c, mask=m_c, other=0.0)[:, None]
    p_tile = _pointers(p_out, i_n, o_c, o_p, W, s_on, s_oc, s_oh, s_ow, O_ORDER, VECTOR)
    tl.store(p_tile, value.to(p_out.dtype.element_ty), mask=mask, eviction_policy="evict_first")


INTERPRETED = isinstance(_pool_kernel, InterpretedFunction)


def se_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C, H, W), w1 (R, C), w2 (C, R) -> out like x; pooled (N, C), hidden (N, R), gate (N, C) in float32."""
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _, pooled, hidden, gate = excite(_pool(x, None), x.shape[2] * x.shape[3], w1, b1, w2, b2, act, gate_fn)
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
    with_dx, *wanted = output_mask
    dx = torch.empty_like(x) if with_dx else x.new_empty(0)
    saved = w1, w2, pooled, hidden, gate
    with torch.cuda.device_of(x):
        dw1, db1, dw2, db2, q = excite_bwd(
            _pool(x, dout), x.shape[2] * x.shape[3], *saved, act, gate_fn, wanted, with_dx
        )
        if with_dx:
            _scale(dout, gate, q, dx)
    return dx, dw1, db1, dw2, db2


def _pool(x: Tensor, dout: Tensor | None) -> Tensor:
    """The partial sums (N, parts, C) of x, or of dout * x, over HW."""
    N, C, H, W = x.shape
    plan = _plan(x, dout)
    blocks_c = triton.cdiv(C, plan.b_c)
    parts, stretch = _stretches(x, plan, PROGRAMS // (N * blocks_c))
    part = x.new_empty((N, parts, C), dtype=torch.float32)
    _pool_kernel[(N * parts * blocks_c,)](
        x, dout, part, C, H * W, W, parts, stretch, *_strides(x), *_strides(dout),
        dout is not None, plan.order, plan.other_order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip
    return part


def _scale(source: Tensor, gate: Tensor, q: Tensor | None, out: Tensor) -> None:
    """out = source * gate, plus q where it is given."""
    N, C, H, W = out.shape
    plan = _plan(out, source)
    _scale_kernel[(N * triton.cdiv(C, plan.b_c) * triton.cdiv(H * W, plan.b_p),)](
        source, gate, q, out, C, H * W, W, *_strides(source), *_strides(out),
        q is not None, plan.other_order, plan.order, *plan.constants, num_warps=plan.warps, **OPTIONS,
    )  # fmt: skip


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
    vector = _vector(order, tensors)
    return Plan(order, other_order, vector, b_p, b_c, _warps(order, vector, x.element_size()))
