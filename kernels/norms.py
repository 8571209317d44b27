"""A BatchNorm as the fused operators take it, beside their kernels: operands, checks, statistics, the plain form.

Between ranks (torch.nn.SyncBatchNorm) only sums by channel travel, and every rank of a group has to take part in each
exchange, one with an empty batch too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.statistics import (
    MEAN,
    UNBIASED_VAR,
    batch_statistics,
    merge_over_ranks,
    running_statistics,
    sum_over_ranks,
)


class Norm(NamedTuple):
    """A BatchNorm, as `torch.nn.functional.batch_norm` takes it; every tensor (C,).

    ``group`` names the process group over which the batch statistics are taken, "" is this process alone.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    group: str = ""


class FixedNorm(NamedTuple):
    """A BatchNorm as backends see it; ``mean`` and ``var`` are None where they are to be the batch's own."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: str


def check_norm(name: str, norm: Norm, y: Tensor) -> None:
    """Raises a ValueError where a norm, called ``name``, does not fit y (N, C, H, W)."""
    for field in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(norm, field)
        if t is None:
            continue
        if tuple(t.shape) != (y.shape[1],):
            raise ValueError(f"{name}.{field} must be ({y.shape[1]},), but has shape {tuple(t.shape)}")
        if t.device != y.device:
            raise ValueError(f"{name}.{field} is on {t.device} and y on {y.device}; move them to one device")
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(f"{name} has no running statistics: it needs training=True")
    if norm.training and not norm.group and y.numel() == y.shape[1]:
        # PyTorch's own words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")


def given_statistics(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """mean and var of a `FixedNorm`."""
    return (None, None) if norm.training else (norm.running_mean, norm.running_var)


def update_running(norm: Norm, stats: Tensor) -> None:
    """The running statistics after a batch of statistics (ROWS, C), in place, as PyTorch moves them."""
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        running = [norm.running_mean, norm.running_var]
        rows = (stats[MEAN], stats[UNBIASED_VAR])
        batch = [row.to(own.dtype) for row, own in zip(rows, running, strict=True)]
        if isinstance(norm.momentum, Tensor):
            torch._foreach_lerp_(running, batch, [norm.momentum, norm.momentum])
        else:
            torch._foreach_lerp_(running, batch, norm.momentum)


def batch_norm(x: Tensor, norm: Norm) -> Tensor:
    """In plain PyTorch."""
    if norm.training and norm.group:
        return _sync_batch_norm(x, norm)
    momentum = float(norm.momentum)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, momentum, norm.eps
    )


def _sync_batch_norm(x: Tensor, norm: Norm) -> Tensor:
    """torch.nn.SyncBatchNorm, also on the CPU, for which PyTorch has none; the gradient crosses the ranks as well."""
    values = x.double().transpose(0, 1).flatten(1)
    own_mean = values.sum(1) / max(values.shape[1], 1)  # a rank may have an empty batch
    own_m2 = (values - own_mean[:, None]).square().sum(1)
    mean, m2, count = merge_over_ranks(own_mean, own_m2, values.shape[1], norm.group)
    update_running(norm, torch.stack((mean, mean, mean, mean, m2 / (count - 1))).detach())
    # not F.batch_norm, which has no derivative in the statistics that it is given
    out = (x.double() - mean[:, None, None]) * (m2 / count + norm.eps).rsqrt()[:, None, None]
    for parameter, apply in ((norm.weight, torch.mul), (norm.bias, torch.add)):
        if parameter is not None:
            out = apply(out, parameter.double()[:, None, None])
    return out.to(x.dtype)


def fill_statistics(rows: Tensor, norm: FixedNorm) -> None:
    """Of an empty batch, into rows (ROWS, C): the given ones, or those of the other ranks, or none."""
    if norm.mean is not None and norm.var is not None:
        rows.copy_(running_statistics(norm.mean, norm.var, norm.weight, norm.bias, norm.eps))
    elif norm.group:
        zeros = torch.zeros_like(rows[0])
        mean, m2, count = merge_over_ranks(zeros, zeros, 0, norm.group)
        rows.copy_(batch_statistics(mean, m2, count, norm.weight, norm.bias, norm.eps))


def exchange_nothing(stats: Tensor, *norms: tuple[bool, str, bool]) -> None:
    """The part of a rank with an empty batch in the sums of `kernels.statistics.sum_over_ranks`."""
    for training, group, wanted in norms:
        if training and group and wanted:
            sum_over_ranks(stats.new_zeros((2, stats.shape[1])), 0, group)
