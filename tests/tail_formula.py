"""The formulas of `kernels.residual_tail` in ATen: a backend for tests, slow and plain, on any device.

What it saves and returns is what a backend has to save and return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.norms import FixedNorm
from kernels.reference import ACTIVATIONS, GATES
from kernels.residual_tail import SE, How, Saved, mask_shape, memory_format
from kernels.statistics import (
    INVSTD,
    MEAN,
    SCALE,
    SHIFT,
    batch_statistics,
    merge_over_ranks,
    running_statistics,
    sum_over_ranks,
)


def tail_fwd(
    y: Tensor, norm: FixedNorm, se: SE | None, residual: Tensor | None, residual_norm: FixedNorm | None, act: str
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(y.dtype, torch.float32)
    stats = _statistics(y.to(wide), norm)
    out = _affine(y.to(wide), stats)
    deviation, pooled, hidden, gate, stats2 = (y.new_empty(0, dtype=wide) for _ in range(5))
    if se is not None:
        deviation = (y.to(wide) - _channel(stats[MEAN])).mean((2, 3))
        pooled = stats[SCALE] * deviation + stats[SHIFT]
        hidden = pooled @ se.w1.to(wide).T + (0 if se.b1 is None else se.b1.to(wide))
        z = ACTIVATIONS[se.act](hidden) @ se.w2.to(wide).T + (0 if se.b2 is None else se.b2.to(wide))
        gate = GATES[se.gate](z)
        out = out * gate[:, :, None, None]
    if residual is not None:
        shortcut = residual.to(wide)
        if residual_norm is not None:
            stats2 = _statistics(shortcut, residual_norm)
            shortcut = _affine(shortcut, stats2)
        out = out + shortcut
    mask = y.new_empty(0, dtype=torch.uint8)
    if act == "relu":
        if residual is not None:
            mask = pack(~(out.to(y.dtype) <= 0), y)  # a NaN passes the gradient, as in torch's relu
        out = torch.where(out < 0, 0, out)
    elif act == "silu":
        out = torch.nn.functional.silu(out)
    out = out.to(y.dtype).contiguous(memory_format=memory_format(y))
    return out, mask, stats, stats2, deviation, pooled, hidden, gate


def tail_bwd(dout: Tensor, saved: Saved, how: How, output_mask: list[bool]) -> tuple[Tensor, ...]:
    y, residual, w1, w2, mask, stats, stats2, deviation, pooled, hidden, gate = saved
    wide = stats.dtype
    N, C, H, W = y.shape
    empty = y.new_empty(0, dtype=wide)
    d, centred = dout.to(wide), y.to(wide) - _channel(stats[MEAN])
    s = gate if gate.numel() else torch.ones(N, C, dtype=wide, device=y.device)
    before = (centred * _channel(stats[SCALE]) + _channel(stats[SHIFT])) * s[:, :, None, None]
    if how.act == "relu":
        passed = unpack(mask, y) if how.with_residual else ~(before.to(y.dtype) <= 0)
        d = torch.where(passed, d, 0)
    elif how.act == "silu":
        if residual is not None:
            before = before + (_affine(residual.to(wide), stats2) if stats2.numel() else residual.to(wide))
        d = _through(d, before, "silu")

    T, U = d.sum((2, 3)), (d * centred).sum((2, 3))
    dw1, db1, dw2, db2 = [empty] * 4
    q = torch.zeros_like(T)
    if w1 is not None and w2 is not None:
        ds = stats[SCALE] * U + stats[SHIFT] * T
        dz = _through_gate(ds, gate, how.gate_fn)
        da, active = dz @ w2.to(wide), ACTIVATIONS[how.se_act](hidden)
        dhidden = _through(da, hidden, how.se_act)
        dw2, db2, dw1, db1 = dz.T @ active, dz.sum(0), dhidden.T @ pooled, dhidden.sum(0)
        q = dhidden @ w1.to(wide) / (H * W)
    x_sum = deviation * (H * W) if deviation.numel() else 0.0
    dbias = (s * T + H * W * q).sum(0)
    dweight = (s * U + q * x_sum).sum(0) * stats[INVSTD]
    dy = _channel(stats[SCALE]) * (s[:, :, None, None] * d + q[:, :, None, None])
    if how.training:
        dy = dy - _through_statistics(centred, stats, dweight, dbias, how.group)
    dresidual, dweight2, dbias2 = d, empty, empty
    if stats2.numel():
        assert residual is not None
        centred = residual.to(wide) - _channel(stats2[MEAN])
        dbias2, dweight2 = T.sum(0), (d * centred).sum((0, 2, 3)) * stats2[INVSTD]
        dresidual = _channel(stats2[SCALE]) * d
        if how.training2:
            dresidual = dresidual - _through_statistics(centred, stats2, dweight2, dbias2, how.group2)
    weights = [t if w is None else t.to(w.dtype) for t, w in zip((dw1, db1, dw2, db2), (w1, w1, w2, w2), strict=True)]
    activations = [t.to(y.dtype).contiguous(memory_format=memory_format(y)) for t in (dy, dresidual)]
    gradients = (*activations, dweight, dbias, *weights, dweight2, dbias2)
    return tuple(t if wanted else t.new_empty(0) for t, wanted in zip(gradients, output_mask, strict=True))


def pack(passed: Tensor, y: Tensor) -> Tensor:
    """bool (N, C, H, W) -> the bits of `mask_shape`."""
    shape = mask_shape(y)
    lines = passed.flatten(2)
    lines = lines.transpose(1, 2) if memory_format(y) == torch.channels_last else lines
    padded = torch.nn.functional.pad(lines, (0, 8 * shape[2] - lines.shape[2]))
    return (padded.unflatten(2, (-1, 8)).to(torch.uint8) << torch.arange(8, device=y.device)).sum(3).to(torch.uint8)


def unpack(mask: Tensor, y: Tensor) -> Tensor:
    bits = (mask[..., None] >> torch.arange(8, device=y.device) & 1).flatten(2).bool()
    last = memory_format(y) == torch.channels_last
    lines = bits[:, :, : y.shape[1] if last else y.shape[2] * y.shape[3]]
    return (lines.transpose(1, 2) if last else lines).reshape(y.shape)


def _statistics(x: Tensor, norm: FixedNorm) -> Tensor:
    if norm.mean is not None and norm.var is not None:
        return running_statistics(norm.mean, norm.var, norm.weight, norm.bias, norm.eps).to(x.dtype)
    values = x.transpose(0, 1).flatten(1)
    mean = values.mean(1)
    m2, count = (values - mean[:, None]).square().sum(1), values.shape[1]
    if norm.group:
        mean, m2, count = merge_over_ranks(mean, m2, count, norm.group)
    return batch_statistics(mean, m2, count, norm.weight, norm.bias, norm.eps)


def _through_statistics(centred: Tensor, stats: Tensor, dweight: Tensor, dbias: Tensor, group: str) -> Tensor:
    sums, count = torch.stack((dweight, dbias)), centred.numel() // centred.shape[1]
    if group:
        sums, count = sum_over_ranks(sums, count, group)
    dweight, dbias = sums / count
    return _channel(stats[SCALE]) * (_channel(stats[INVSTD] * dweight) * centred + _channel(dbias))


def _through_gate(ds: Tensor, gate: Tensor, gate_fn: str) -> Tensor:
    if gate_fn == "sigmoid":
        return ds * gate * (1 - gate)
    return torch.where((gate > 0) & (gate < 1), ds / 6, 0)


def _through(da: Tensor, x: Tensor, act: str) -> Tensor:
    """da * act'(x); chosen and not multiplied where the slope is 0, so that 0 * inf is 0 as in eager."""
    if act == "relu":
        return torch.where(x <= 0, 0, da)
    if act == "silu":
        sigma = torch.sigmoid(x)
        return da * sigma * (1 + x * (1 - sigma))
    return da * (0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5)


def _affine(x: Tensor, stats: Tensor) -> Tensor:
    return (x - _channel(stats[MEAN])) * _channel(stats[SCALE]) + _channel(stats[SHIFT])


def _channel(t: Tensor) -> Tensor:
    return t[:, None, None]
