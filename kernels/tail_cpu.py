"""The residual tail on the CPU: the C++ operators of csrc/, under the signatures that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels._C  # noqa: F401  registers torch.ops.kernels_C
from kernels.norms import FixedNorm
from kernels.reference import ACTIVATIONS, GATES
from kernels.residual_tail import SE, TAIL_ACTIVATIONS, How, Saved
from kernels.statistics import batch_statistics, merge_over_ranks, sum_over_ranks

_TAIL_ACT_CODES = {name: code for code, name in enumerate(TAIL_ACTIVATIONS)}
_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_GATE_CODES = {name: code for code, name in enumerate(GATES)}
_NO_NORM = FixedNorm(None, None, None, None, 0.0, "")
_NO_SE = (None, None, None, None, "relu", "sigmoid")
_OPS = torch.ops.kernels_C


def tail_fwd(
    y: Tensor, norm: FixedNorm, se: SE | None, residual: Tensor | None, residual_norm: FixedNorm | None, act: str
) -> tuple[Tensor, ...]:
    """out like y; the ReLU's mask; stats and stats2 (ROWS, C); deviation, pooled (N, C), hidden (N, R), gate (N, C)."""
    w1, w2, b1, b2, se_act, gate_fn = se or _NO_SE
    second = residual_norm or _NO_NORM
    stats = stats2 = sample_mean = None
    if norm.group and norm.mean is None:
        stats, means = _synchronised(y, norm, by_sample=se is not None)
        sample_mean = means if se is not None else None
    if residual is not None and second.group and second.mean is None:
        stats2, _ = _synchronised(residual, second, by_sample=False)
    outputs: tuple[Tensor, ...] = _OPS.tail_fwd(
        *(y, residual, norm.weight, norm.bias, w1, b1, w2, b2, second.weight, second.bias),
        *(norm.mean, norm.var, second.mean, second.var, stats, stats2, sample_mean),
        *(norm.eps, second.eps, residual_norm is not None),
        *(_TAIL_ACT_CODES[act], _ACT_CODES[se_act], _GATE_CODES[gate_fn]),
    )
    return outputs


def tail_bwd(dout: Tensor, saved: Saved, how: How, output_mask: list[bool]) -> tuple[Tensor, ...]:
    """The ten gradients of `kernels.residual_tail`; empty where not asked for."""
    arguments = (dout, *saved, how.with_residual, how.training, how.training2)
    codes = (_TAIL_ACT_CODES[how.act], _ACT_CODES[how.se_act], _GATE_CODES[how.gate_fn])
    shared = how.training and how.group and output_mask[0]
    shared2 = how.training2 and how.group2 and output_mask[1]
    if not shared and not shared2:
        gradients: tuple[Tensor, ...] = _OPS.tail_bwd(*arguments, *codes, output_mask)
        return gradients

    # What goes through the statistics needs the gradients of the norms' weights and biases, wanted or not
    needed = list(output_mask)
    for first, through in ((2, how.training and output_mask[0]), (8, how.training2 and output_mask[1])):
        needed[first : first + 2] = [through or wanted for wanted in needed[first : first + 2]]
    q, _, *parameters = _OPS.tail_bwd_sums(*arguments, *codes, needed)
    dweight, dbias, *_, dweight2, dbias2 = parameters
    shares = dout.new_zeros((4, dout.shape[1]), dtype=saved.stats.dtype)
    count = dout.numel() // dout.shape[1]
    for rows, gradient, group in (
        (shares[:2], (dweight, dbias), how.group if how.training and output_mask[0] else None),
        (shares[2:], (dweight2, dbias2), how.group2 if how.training2 and output_mask[1] else None),
    ):
        if group is not None:
            sums: Tensor = torch.stack(gradient)
            total, values = sum_over_ranks(sums, count, group) if group else (sums, count)
            torch.div(total, values, out=rows)
    dy, dresidual = _OPS.tail_bwd_grads(*arguments, *codes, output_mask, q, shares)
    wanted = zip(parameters, output_mask[2:], strict=True)
    return dy, dresidual, *(t if asked else t.new_empty(0) for t, asked in wanted)


def _synchronised(x: Tensor, norm: FixedNorm, *, by_sample: bool) -> tuple[Tensor, Tensor]:
    """Statistics (ROWS, C) over the ranks of the norm's group, and this rank's sample means (N, C) in float64."""
    mean, m2, sample_mean = _OPS.tail_moments(x, by_sample)
    mean, m2, count = merge_over_ranks(mean, m2, x.numel() // x.shape[1], norm.group)
    stats = batch_statistics(mean, m2, count, norm.weight, norm.bias, norm.eps)
    return stats.to(torch.promote_types(x.dtype, torch.float32)), sample_mean
