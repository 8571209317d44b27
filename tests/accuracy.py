"""The accuracy that every backend is held to (design section 6), and the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

# Of fewer elements eager's largest error is a matter of chance: torch.testing.assert_close decides, at its defaults.
FEW = 64


def assert_as_accurate_as_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """|actual - exact| is at most twice eager's largest error, plus one rounding of the largest value.

    In float32 torch.testing.assert_close holds as well. ``exact`` is the float64 result; ``actual`` and ``eager`` are
    of one dtype and shape.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.shape == eager.shape == exact.shape, f"{name}: shape {actual.shape}, eager has {eager.shape}"
    if exact.numel() == 0:
        return
    if actual.dtype in (torch.float32, torch.float64) or actual.numel() < FEW:
        torch.testing.assert_close(actual, exact.to(actual.dtype), msg=lambda m: f"{name}: {m}")
    if actual.numel() >= FEW and actual.dtype != torch.float64:
        rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
        allowed = 2 * (eager.double() - exact).abs().max() + rounding
        error = (actual.double() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
