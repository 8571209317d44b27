"""The images of a batch on the CPU: the C++ operator of csrc/, under the signature that every backend has."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels._C  # noqa: F401  registers torch.ops.kernels_C


def prepare_images(
    pixels: Tensor, starts: Tensor, sizes: Tensor, index: Tensor, edits: Tensor, mean: list[float], std: list[float],
    out: Tensor,
) -> None:  # fmt: skip
    """Fills ``out``, (B, 3, S, S) channels-last; raises ValueError of what it cannot find in ``pixels``."""
    torch.ops.kernels_C.prepare_images(pixels, starts, sizes, index, edits, mean, std, out)
