"""The images of a batch in Triton: one launch, a program for each image, which makes it step by step.

Between its steps a picture lies in scratch of the program's own, (2, 3, S, S) float32 for the image and what a step
makes of it, and a table of 256 values a channel for the tones: a batch of 256 at 224 pixels takes 295 MiB. What a
program's threads wrote they read after a barrier. The counts of a tone are of whole numbers, so that every result is
bitwise reproducible.

Nothing here waits for the device. An image that does not exist, or not as its edit has it, reads nothing and is NaN.

Names, and the finite number of kernels: `kernels.triton_tiles`. Formulas: `kernels.images`.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from kernels.triton_tiles import OPTIONS, _jit

PIXELS = 512  # that a program takes at a time
WARPS = 16  # a batch has few programs for a GPU: each of many threads, of one pixel


def prepare_images(
    pixels: Tensor, starts: Tensor, sizes: Tensor, index: Tensor, edits: Tensor, mean: list[float], std: list[float],
    out: Tensor,
) -> None:  # fmt: skip
    """Fills ``out``, (B, 3, S, S) channels-last."""
    B, _, S, _ = out.shape
    scratch = edits.new_empty((B, 2, 3, S * S))
    tables = edits.new_empty((B, 3, 256))
    with torch.cuda.device_of(out):
        _images_kernel[(B,)](
            pixels, starts, sizes, index, edits, scratch, tables, out,
            pixels.numel(), len(starts), S, *mean, *(1 / v for v in std), PIXELS, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip


@_jit
def _three(p_x, o_p, m_p, area):
    """The channels of the pixels o_p of a picture (3, S S), 0 where there is none."""
    red = tl.load(p_x + o_p, mask=m_p, other=0.0)
    green = tl.load(p_x + area + o_p, mask=m_p, other=0.0)
    blue = tl.load(p_x + 2 * area + o_p, mask=m_p, other=0.0)
    return red, green, blue


@_jit
def _store_three(p_x, o_p, m_p, area, red, green, blue):
    tl.store(p_x + o_p, red, mask=m_p)
    tl.store(p_x + area + o_p, green, mask=m_p)
    tl.store(p_x + 2 * area + o_p, blue, mask=m_p)


@_jit
def _triangle(o_tap, centre, reach, size):
    """The weight of the pixels o_tap of a box, 0 outside it."""
    weight = 1.0 - tl.abs(o_tap.to(tl.float32) + 0.5 - centre) / reach
    return tl.where(o_tap < size, tl.maximum(weight, 0.0), 0.0)


@_jit
def _resize(p_box, s_row, h, w, p_to, S, B_P: tl.constexpr):
    """The box (h, w, 3) uint8, rows s_row bytes apart, as a square in [0, 1]."""
    area = S * S
    scale_y, scale_x = tl.div_rn(h.to(tl.float32), S.to(tl.float32)), tl.div_rn(w.to(tl.float32), S.to(tl.float32))
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    taps_y = tl.minimum((2 * reach_y).to(tl.int32) + 2, h)
    taps_x = tl.minimum((2 * reach_x).to(tl.int32) + 2, w)
    for start in range(0, area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < area
        y = ((o_p // S).to(tl.float32) + 0.5) * scale_y
        x = ((o_p % S).to(tl.float32) + 0.5) * scale_x
        # rounds towards 0, as what is below it
        first_y = tl.maximum(y - reach_y + 0.5, 0.0).to(tl.int32)
        first_x = tl.maximum(x - reach_x + 0.5, 0.0).to(tl.int32)
        red = tl.zeros((B_P,), dtype=tl.float32)
        green = tl.zeros((B_P,), dtype=tl.float32)
        blue = tl.zeros((B_P,), dtype=tl.float32)
        total_y = tl.zeros((B_P,), dtype=tl.float32)
        total_x = tl.zeros((B_P,), dtype=tl.float32)
        for k in range(taps_x):
            total_x += _triangle(first_x + k, x, reach_x, w)
        for j in range(taps_y):
            weight_y = _triangle(first_y + j, y, reach_y, h)
            total_y += weight_y
            m_row = m_p & (weight_y > 0)
            p_tap = p_box + (first_y + j).to(tl.int64) * s_row + first_x.to(tl.int64) * 3
            # a sum of each row's own, or the thousands of pixels of a large box would lose digits
            row_red = tl.zeros((B_P,), dtype=tl.float32)
            row_green = tl.zeros((B_P,), dtype=tl.float32)
            row_blue = tl.zeros((B_P,), dtype=tl.float32)
            for k in range(taps_x):
                # as `_triangle`, whose call would take the interpreter longer than all else
                weight = 1.0 - tl.abs((first_x + k).to(tl.float32) + 0.5 - x) / reach_x
                weight = tl.where(first_x + k < w, tl.maximum(weight, 0.0), 0.0)
                mask = m_row & (weight > 0)
                row_red += weight * tl.load(p_tap, mask=mask, other=0).to(tl.float32)
                row_green += weight * tl.load(p_tap + 1, mask=mask, other=0).to(tl.float32)
                row_blue += weight * tl.load(p_tap + 2, mask=mask, other=0).to(tl.float32)
                p_tap += 3
            red += weight_y * row_red
            green += weight_y * row_green
            blue += weight_y * row_blue
        share = 1.0 / tl.where(m_p, 255.0 * total_y * total_x, 1.0)
        _store_three(p_to, o_p, m_p, area, red * share, green * share, blue * share)


@_jit
def _axis(a, b, c, x, y, S):
    """What a warp makes of pixels x, y along one axis: the first of two pixels, and the share of the second.

    What is outside, or not a number, is brought to where both are.
    """
    side = S.to(tl.float32)
    at = a * (x.to(tl.float32) + 0.5) + b * (y.to(tl.float32) + 0.5) + (c * side - 0.5)
    at = tl.where(at > -1.0, at, -1.0)
    at = tl.where(at < side, at, side)
    low = tl.floor(at)
    return low.to(tl.int32), at - low


@_jit
def _warp(p_from, p_edit, p_to, S, B_P: tl.constexpr):
    area = S * S
    a, b, c = tl.load(p_edit + 4), tl.load(p_edit + 5), tl.load(p_edit + 6)
    d, e, f = tl.load(p_edit + 7), tl.load(p_edit + 8), tl.load(p_edit + 9)
    for start in range(0, area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < area
        left, share_x = _axis(a, b, c, o_p % S, o_p // S, S)
        top, share_y = _axis(d, e, f, o_p % S, o_p // S, S)
        red = tl.zeros((B_P,), dtype=tl.float32)
        green = tl.zeros((B_P,), dtype=tl.float32)
        blue = tl.zeros((B_P,), dtype=tl.float32)
        for k in tl.static_range(4):
            o_y, o_x = top + k // 2, left + k % 2
            weight_y = share_y if k // 2 else 1 - share_y
            weight_x = share_x if k % 2 else 1 - share_x
            inside = m_p & (o_y >= 0) & (o_y < S) & (o_x >= 0) & (o_x < S)
            of_red, of_green, of_blue = _three(p_from, o_y * S + o_x, inside, area)
            weight = weight_y * weight_x
            red += weight * of_red
            green += weight * of_green
            blue += weight * of_blue
        _store_three(p_to, o_p, m_p, area, red, green, blue)


@_jit
def _row_of_color(p_edit, i, red, green, blue, mean_red, mean_green, mean_blue):
    p_color = p_edit + 10 + 3 * i
    p_pivot = p_edit + 19 + 3 * i
    shift = tl.load(p_pivot) * mean_red + tl.load(p_pivot + 1) * mean_green + tl.load(p_pivot + 2) * mean_blue
    y = tl.load(p_color) * red + tl.load(p_color + 1) * green + tl.load(p_color + 2) * blue + shift
    return tl.minimum(tl.maximum(y, 0.0), 1.0)


@_jit
def _color(p_x, p_edit, S, B_P: tl.constexpr):
    """In place."""
    area = S * S
    sum_red = tl.zeros((B_P,), dtype=tl.float32)
    sum_green = tl.zeros((B_P,), dtype=tl.float32)
    sum_blue = tl.zeros((B_P,), dtype=tl.float32)
    for start in range(0, area, B_P):
        o_p = start + tl.arange(0, B_P)
        red, green, blue = _three(p_x, o_p, o_p < area, area)
        sum_red += red
        sum_green += green
        sum_blue += blue
    pixels = area.to(tl.float32)
    mean_red, mean_green, mean_blue = tl.sum(sum_red) / pixels, tl.sum(sum_green) / pixels, tl.sum(sum_blue) / pixels
    tl.debug_barrier()
    for start in range(0, area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < area
        red, green, blue = _three(p_x, o_p, m_p, area)
        new_red = _row_of_color(p_edit, 0, red, green, blue, mean_red, mean_green, mean_blue)
        new_green = _row_of_color(p_edit, 1, red, green, blue, mean_red, mean_green, mean_blue)
        new_blue = _row_of_color(p_edit, 2, red, green, blue, mean_red, mean_green, mean_blue)
        _store_three(p_x, o_p, m_p, area, new_red, new_green, new_blue)


@_jit
def _eight_bits(x):
    """round(255 x), half to even: a sum with 1.5 * 2^23 has no bits for a fraction."""
    scaled = tl.minimum(tl.maximum(255.0 * x, 0.0), 255.0)
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int32)


@_jit
def _toned(tone, level, counts, area):
    """What a tone makes of each of the 256 values of a channel; counts (256,) int32."""
    o_q = tl.arange(0, 256)
    low = tl.min(tl.where(counts > 0, o_q, 255))
    high = tl.max(tl.where(counts > 0, o_q, 0))
    kept = tl.minimum(tl.maximum(level, 0.0), 8.0).to(tl.int32)
    posterized = o_q & (0xFF00 >> kept)
    solarized = tl.where(o_q.to(tl.float32) >= level, 255 - o_q, o_q)
    # rounded as torchvision's is; of one value alone nothing is stretched
    span = tl.where(high > low, (high - low).to(tl.float32) * (1 / 255), 1.0)
    stretched = tl.div_rn(tl.maximum(o_q - low, 0).to(tl.float32), span).to(tl.int32)
    stretched = tl.where(high > low, tl.minimum(stretched, 255), o_q)
    step = (area - tl.sum(tl.where(o_q == high, counts, 0))) // 255
    below = tl.cumsum(counts, 0) - counts
    equalized = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
    equalized = tl.where(step > 0, equalized, o_q)
    value = tl.where(tone == 1, posterized, tl.where(tone == 2, solarized, tl.where(tone == 3, stretched, equalized)))
    return tl.div_rn(value.to(tl.float32), 255.0)


@_jit
def _tone(p_x, p_edit, p_table, S, B_P: tl.constexpr):
    """In place; p_table (3, 256)."""
    area = S * S
    tone, level = tl.load(p_edit + 28), tl.load(p_edit + 29)
    o_q = tl.arange(0, 256)
    for c in range(3):
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, area, B_P):
            o_p = start + tl.arange(0, B_P)
            x = tl.load(p_x + c * area + o_p, mask=o_p < area, other=0.0)
            counts += tl.histogram(_eight_bits(x), 256).to(tl.int32)
        beyond = (area + B_P - 1) // B_P * B_P - area  # that were counted as zeros
        counts -= tl.where(o_q == 0, beyond, 0)
        tl.store(p_table + c * 256 + o_q, _toned(tone, level, counts, area))
    tl.debug_barrier()
    for start in range(0, 3 * area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < 3 * area
        q = _eight_bits(tl.load(p_x + o_p, mask=m_p, other=0.0))
        tl.store(p_x + o_p, tl.load(p_table + o_p // area * 256 + q, mask=m_p, other=0.0), mask=m_p)


@_jit
def _sharpen(p_from, factor, p_to, S, B_P: tl.constexpr):
    area = S * S
    for start in range(0, 3 * area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < 3 * area
        y, x = o_p // S % S, o_p % S
        inside = m_p & (y > 0) & (y < S - 1) & (x > 0) & (x < S - 1)
        here = tl.load(p_from + o_p, mask=m_p, other=0.0)
        around = 4 * here
        for k in tl.static_range(9):
            o_near = o_p + (k // 3 - 1) * S + (k % 3 - 1)
            around += tl.load(p_from + o_near, mask=inside, other=0.0)
        new = here + (1 - factor) * (around * (1 / 13) - here)
        new = tl.where(inside, new, here)
        tl.store(p_to + o_p, tl.minimum(tl.maximum(new, 0.0), 1.0), mask=m_p)


@_jit
def _blur(p_from, sigma, p_to, S, s_axis, B_P: tl.constexpr):
    """Along one axis, whose pixels are s_axis apart."""
    area = S * S
    radius = tl.ceil(tl.minimum(3 * sigma, (S - 1).to(tl.float32))).to(tl.int32)
    for start in range(0, 3 * area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < 3 * area
        at = o_p // s_axis % S
        acc = tl.zeros((B_P,), dtype=tl.float32)
        total = tl.zeros((B_P,), dtype=tl.float32)
        for k in range(-radius, radius + 1):
            near = at + k
            distance = tl.div_rn((near - at).to(tl.float32), sigma)
            weight = tl.exp(-0.5 * distance * distance)
            near = tl.abs(near)
            near = tl.where(near < S, near, 2 * (S - 1) - near)
            acc += weight * tl.load(p_from + o_p + (near - at) * s_axis, mask=m_p, other=0.0)
            total += weight
        tl.store(p_to + o_p, acc / total, mask=m_p)


@_jit
def _finish(p_x, p_edit, p_out, valid, S, mean_r, mean_g, mean_b, inv_r, inv_g, inv_b, B_P: tl.constexpr):
    """Normalised, erased, cast: (S, S, 3)."""
    area = S * S
    top, left, h, w = tl.load(p_edit + 32), tl.load(p_edit + 33), tl.load(p_edit + 34), tl.load(p_edit + 35)
    for start in range(0, area, B_P):
        o_p = start + tl.arange(0, B_P)
        m_p = o_p < area
        red, green, blue = _three(p_x, o_p, m_p, area)
        y, x = (o_p // S).to(tl.float32), (o_p % S).to(tl.float32)
        shown = ~((y >= top) & (y < top + h) & (x >= left) & (x < left + w))
        red = tl.where(shown, (red - mean_r) * inv_r, 0.0)
        green = tl.where(shown, (green - mean_g) * inv_g, 0.0)
        blue = tl.where(shown, (blue - mean_b) * inv_b, 0.0)
        p_pixel = p_out + o_p * 3
        tl.store(p_pixel, tl.where(valid, red, float("nan")).to(p_out.dtype.element_ty), mask=m_p)
        tl.store(p_pixel + 1, tl.where(valid, green, float("nan")).to(p_out.dtype.element_ty), mask=m_p)
        tl.store(p_pixel + 2, tl.where(valid, blue, float("nan")).to(p_out.dtype.element_ty), mask=m_p)


@_jit
def _changes(p_matrix, DIAGONAL: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Whether SIZE numbers differ from DIAGONAL at every STEP-th place and zeros."""
    o_m = tl.arange(0, 16)
    m_m = o_m < SIZE
    neutral = tl.where(o_m % STEP == 0, DIAGONAL, 0.0)
    return tl.sum((m_m & (tl.load(p_matrix + o_m, mask=m_m, other=0.0) != neutral)).to(tl.int32)) > 0


@_jit
def _images_kernel(
    p_pixels, p_starts, p_sizes, p_index, p_edits, p_scratch, p_tables, p_out,
    pixels: tl.int64, images: tl.int64, S: tl.int32, mean_r: tl.float32, mean_g: tl.float32, mean_b: tl.float32,
    inv_r: tl.float32, inv_g: tl.float32, inv_b: tl.float32, B_P: tl.constexpr,
):  # fmt: skip
    """pixels (bytes), starts (images), sizes (images, 2), index (B), edits (B, 36), scratch (B, 2, 3, S S), tables
    (B, 3, 256), out (B, S, S, 3)."""
    i_b = tl.program_id(0).to(tl.int64)
    area = S * S
    p_edit = p_edits + i_b * 36
    p_table = p_tables + i_b * 768
    p_scratch += i_b * 6 * area
    p_out += i_b * 3 * area
    here, there = 0 * area, 3 * area  # where in the scratch the picture is, and where it is not

    which = tl.load(p_index + i_b)
    valid = (which >= 0) & (which < images)
    start = tl.load(p_starts + which, mask=valid, other=0)
    H = tl.load(p_sizes + 2 * which, mask=valid, other=0).to(tl.int64)
    W = tl.load(p_sizes + 2 * which + 1, mask=valid, other=0).to(tl.int64)
    # H W fits 64 bits, and three times as much may not
    valid &= (H > 0) & (W > 0) & (start >= 0) & (start <= pixels) & ((pixels - start) // 3 >= H * W)
    top, left, h, w = tl.load(p_edit), tl.load(p_edit + 1), tl.load(p_edit + 2), tl.load(p_edit + 3)
    tone = tl.load(p_edit + 28)
    most = 1073741824.0  # what a float32 may be to become a whole number
    valid &= (top >= 0) & (left >= 0) & (h >= 1) & (w >= 1) & (top < most) & (left < most) & (h < most) & (w < most)
    valid &= (tl.floor(top) == top) & (tl.floor(left) == left) & (tl.floor(h) == h) & (tl.floor(w) == w)
    valid &= (tone >= 0) & (tone <= 4) & (tl.floor(tone) == tone)
    i_top, i_left = tl.where(valid, top, 0.0).to(tl.int64), tl.where(valid, left, 0.0).to(tl.int64)
    i_h, i_w = tl.where(valid, h, 0.0).to(tl.int64), tl.where(valid, w, 0.0).to(tl.int64)
    valid &= (i_top + i_h <= H) & (i_left + i_w <= W)

    if valid:
        p_box = p_pixels + start + 3 * (i_top * W + i_left)
        _resize(p_box, 3 * W, i_h.to(tl.int32), i_w.to(tl.int32), p_scratch, S, B_P)
        tl.debug_barrier()
        if _changes(p_edit + 4, 1.0, 6, 4):
            _warp(p_scratch + here, p_edit, p_scratch + there, S, B_P)
            tl.debug_barrier()
            here, there = there, here
        if _changes(p_edit + 10, 1.0, 9, 4) | _changes(p_edit + 19, 0.0, 9, 4):
            _color(p_scratch + here, p_edit, S, B_P)
            tl.debug_barrier()
        if tone > 0:
            _tone(p_scratch + here, p_edit, p_table, S, B_P)
            tl.debug_barrier()
        factor = tl.load(p_edit + 30)
        if (factor != 1.0) & (S > 2):
            _sharpen(p_scratch + here, factor, p_scratch + there, S, B_P)
            tl.debug_barrier()
            here, there = there, here
        sigma = tl.load(p_edit + 31)
        if sigma > 0:
            _blur(p_scratch + here, sigma, p_scratch + there, S, S, B_P)
            tl.debug_barrier()
            _blur(p_scratch + there, sigma, p_scratch + here, S, 1, B_P)
            tl.debug_barrier()
    _finish(p_scratch + here, p_edit, p_out, valid, S, mean_r, mean_g, mean_b, inv_r, inv_g, inv_b, B_P)
