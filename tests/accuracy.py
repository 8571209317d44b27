"""The accuracy that every backend is held to (design section 6), and the one table of tolerances."""

from __future__ import annotations

from collections.abc import Iterable

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


def assert_network_as_accurate_as_eager(
    actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The rule for what a long chain of steps made, taken as one vector: its error's norm is at most twice eager's.

    For one small gradient among many the ratio of the two errors is chance: both are the rounding of every step behind
    it, magnified by each BatchNorm.
    """
    assert actual.keys() == eager.keys() == exact.keys()

    def norm(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()

    dtypes = {t.dtype for t in eager.values()}
    assert {t.dtype for t in actual.values()} == dtypes
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) / 2 * norm(exact.values())
    error, eagers_error = (norm(got[name].double() - exact[name] for name in exact) for got in (actual, eager))
    assert error <= 2 * eagers_error + rounding, f"{list(exact)[:3]}: error {error:.3e}, eager's {eagers_error:.3e}"
