"""Per-channel statistics of a BatchNorm: merged over ranks, and made ready for the kernels.

The (count, mean, M2) of parts are merged by Chan's rule, which loses nothing where |mean| is much larger than the
standard deviation (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives  # noqa: F401  registers _c10d_functional
from torch.distributed.distributed_c10d import _resolve_process_group

# The rows of the statistics that kernels read: scale is weight / sqrt(var + eps), shift the bias
ROWS = 5
MEAN, INVSTD, SCALE, SHIFT, UNBIASED_VAR = range(ROWS)


def batch_statistics(
    mean: Tensor, m2: Tensor, count: float | Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """mean (C,) and m2 (C,), the sum of squared distances from it, over ``count`` values -> statistics (ROWS, C)."""
    return _rows(mean, m2 / count, weight, bias, eps, m2 / (count - 1))


def running_statistics(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The statistics (ROWS, C) of evaluation mode, float32 or wider."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    mean, var = mean.to(wide), var.to(wide)
    return _rows(mean, var, weight, bias, eps, var)


def _rows(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, unbiased_var: Tensor
) -> Tensor:
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return torch.stack((mean, invstd, scale, shift, unbiased_var))


def merge_over_ranks(mean: Tensor, m2: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's mean (C,), m2 (C,) and count -> those of all ranks' values together, in float64; count is then 0-d.

    ``group`` is a process group's name. Ranks may hold different numbers of values, also none. Differentiable.
    """
    C = mean.shape[0]
    mine = torch.cat((mean.double(), m2.double(), mean.new_tensor([count], dtype=torch.float64)))
    world_size = _resolve_process_group(group).size()  # type: ignore[arg-type]  # any str, before torch 2.12
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(mine, world_size, group)
    ranks = torch.ops._c10d_functional.wait_tensor(gathered).view(-1, 2 * C + 1)
    means, m2s, counts = ranks[:, :C], ranks[:, C : 2 * C], ranks[:, 2 * C :]
    total = counts.sum()
    # about the first rank's mean, so that a large mean does not round the sum away
    merged = means[0] + (counts * (means - means[0])).sum(0) / total
    return merged, (m2s + counts * (means - merged).square()).sum(0), total


def sum_over_ranks(sums: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """sums of any shape, in their dtype, and the count, added over the ranks of the group in float64."""
    mine = torch.cat((sums.flatten().double(), sums.new_tensor([count], dtype=torch.float64)))
    reduced = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(mine, "sum", group))
    return reduced[:-1].view_as(sums).to(sums.dtype), reduced[-1]
