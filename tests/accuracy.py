"""The accuracy that every backend is held to (design section 6), and the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative size of one rounding to the dtype: half of its epsilon.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_as_accurate_as_eager(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """|actual - exact| is at most twice eager's largest error, plus one rounding of the largest value.

    ``exact`` is the float64 result; ``actual`` and ``eager`` are of one dtype and shape.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.shape == eager.shape == exact.shape, f"{name}: shape {actual.shape}, eager has {eager.shape}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    allowed = 2 * (eager.double() - exact).abs().max() + ROUNDING[actual.dtype] * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    assert not actual.isnan().any(), f"{name} holds NaN"
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, exact.float(), msg=lambda m: f"{name}: {m}")
