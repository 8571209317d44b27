"""How the tiles of the Triton kernels lie over activations, and what every one of these kernels is written with.

A sweep over an activation handles any strides, so channels-last, NCHW, sliced and expanded tensors are all read in
place; neighbouring threads touch neighbouring memory, 16 bytes each where the shape is aligned. Which kernels exist is
finite: runtime arguments are never specialised (`_jit`), so that one is compiled for each combination of dtypes and
constants, and `benchmarks/compile_audit.py` compiles them all.

Names in the kernels: ``p_`` pointer, ``s_`` stride in elements, ``i_`` index, ``o_`` offsets, ``m_`` mask,
``B_`` block.
"""

# (kernels are traced by Triton, not called)

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTORS = (8, 4, 1)  # elements that a thread may take in one access, where 16 bytes hold them
# Of every launch. Triton 3.10 fuses no product with a sum unless asked to, which would take two instructions for one
OPTIONS = {"enable_fp_fusion": True}


def _jit(fn: Any) -> Any:
    """triton.jit with no runtime argument specialised: neither on its value nor on its divisibility by 16."""
    parameters = inspect.signature(fn).parameters.values()
    return triton.jit(fn, do_not_specialize=[p.name for p in parameters if p.annotation != "tl.constexpr"])


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
def _stretch_of_program(C, parts, B_C: tl.constexpr):
    """(i_n, i_k, i_c): the sample, the stretch of HW and the first channel that a summing sweep's program takes."""
    blocks_c = tl.cdiv(C, B_C)
    pid = tl.program_id(0)
    return (pid // blocks_c // parts).to(tl.int64), (pid // blocks_c) % parts, (pid % blocks_c) * B_C


@_jit
def _tile_of_program(C, HW, B_P: tl.constexpr, B_C: tl.constexpr):
    """(i_n, i_c, i_p): where a second sweep's program has its tile; what the first sweep read last comes first."""
    blocks_c, blocks_p = tl.cdiv(C, B_C), tl.cdiv(HW, B_P)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    return (pid // blocks_c // blocks_p).to(tl.int64), (pid % blocks_c) * B_C, ((pid // blocks_c) % blocks_p) * B_P


class Plan(NamedTuple):
    """How a sweep's tile lies: over one tensor in ``order``, over those read or written with it in ``other_order``."""

    order: str
    other_order: str
    vector: int
    b_p: int
    b_c: int
    warps: int

    @property
    def constants(self) -> tuple[int, int, int]:
        """VECTOR, B_P and B_C."""
        return self.vector, self.b_p, self.b_c


def _warps(order: str, vector: int, itemsize: int) -> int:
    """An address for every few elements takes registers: without 16-byte accesses more threads share a tile."""
    if order == "any" or vector * itemsize == 2:
        return 16
    return 4 if vector * itemsize == 16 else 8


def _stretches(x: Tensor, plan: Plan, programs: int) -> tuple[int, int]:
    """Into how many parts HW is cut for a sum, at most ``programs``, and of how many pixels each is."""
    HW = x.shape[2] * x.shape[3]
    parts = max(1, min(programs, triton.cdiv(HW, 4 * plan.b_p)))
    # whole tiles, so that a stretch starts where a vector may
    stretch = triton.cdiv(triton.cdiv(HW, parts), plan.b_p) * plan.b_p
    return triton.cdiv(HW, stretch), stretch


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


def _strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """The strides (n, c, h, w) in elements, w's also where W is 1 and h alone moves; zeros of no tensor.

    Within a sample the kernels count in 32 bits; across samples in 64.
    """
    if x is None:
        return 0, 0, 0, 0
    _, C, H, W = x.shape
    s_n, s_c, s_h, s_w = x.stride()
    if (C - 1) * s_c + (H - 1) * s_h + (W - 1) * s_w >= 2**31:
        raise ValueError(
            f"x: one sample of shape {(C, H, W)} spans 2**31 elements or more; cut it, or use backend='eager'"
        )
    return s_n, s_c, s_h, s_h if W == 1 else s_w
