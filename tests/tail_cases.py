"""Inputs of `residual_tail` and what a backend makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.norms import Norm
from kernels.residual_tail import SE, residual_tail, residual_tail_reference
from tests.accuracy import FEW, assert_network_as_accurate_as_eager
from tests.backends import DEVICES
from tests.se_cases import LAYOUTS

ACTIVATIONS = ("out", "dy", "dresidual")
NEAR = 0.05  # above the rounding of a half type, for values of about 1


@dataclass
class Tail:
    """Arguments of `residual_tail`, and the gradient of its result."""

    y: Tensor
    norm: Norm
    se: SE | None
    residual: Tensor | None
    residual_norm: Norm | None
    act: str
    dout: Tensor = field(repr=False)

    def to(self, dtype: torch.dtype) -> Tail:
        """Every tensor in another dtype."""
        return self._map(lambda t: t.to(dtype))

    def leaves(self) -> Tail:
        """The same values in tensors of their own, with a gradient where there is one."""
        copy = self._map(lambda t: t.detach().clone())
        for t in copy.differentiable().values():
            t.requires_grad_()
        return copy

    def differentiable(self) -> dict[str, Tensor]:
        second = self.residual_norm
        named = {"y": self.y, "residual": self.residual, "weight": self.norm.weight, "bias": self.norm.bias}
        named |= {} if self.se is None else dict(zip(("w1", "w2", "b1", "b2"), self.se[:4], strict=True))
        named |= {} if second is None else {"weight2": second.weight, "bias2": second.bias}
        return {name: t for name, t in named.items() if t is not None}

    def running(self) -> dict[str, Tensor]:
        norms = {"": self.norm, "2": self.residual_norm}
        return {
            f"{name}{suffix}": getattr(norm, name)
            for suffix, norm in norms.items()
            for name in ("running_mean", "running_var")
            if norm is not None and getattr(norm, name) is not None
        }

    def options(self) -> dict[str, object]:
        return {"se": self.se, "residual": self.residual, "residual_norm": self.residual_norm, "act": self.act}

    def _map(self, change) -> Tail:
        def tensors(args):
            return None if args is None else type(args)(*(change(t) if isinstance(t, Tensor) else t for t in args))

        return replace(
            self,
            y=change(self.y),
            norm=tensors(self.norm),
            se=tensors(self.se),
            residual=None if self.residual is None else change(self.residual),
            residual_norm=tensors(self.residual_norm),
            dout=change(self.dout),
        )


def make_tail(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    *,
    layout: str = "channels_last",
    se: bool = True,
    residual: str | None = "plain",
    act: str = "relu",
    training: bool = True,
    affine: bool = True,
    tracked: bool = True,
    biases: bool = True,
    se_act: str = "relu",
    gate: str = "sigmoid",
    parameters: torch.dtype | None = None,
    shift: float = 0.5,
    seed: int = 0,
) -> Tail:
    """(N, C, H, W, R) -> a tail, drawn in float64 and rounded to dtype, so that every precision sees one set.

    ``residual`` is None, "plain" or "norm"; ``parameters`` the dtype of everything but the activations, ``dtype``'s
    unless given; ``shift`` is the mean of y in standard deviations.
    """
    N, C, H, W, R = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def activation() -> Tensor:
        return draw(N, C, H, W).to(memory_format=LAYOUTS[layout])

    def make_norm() -> Norm:
        running = (shift + 0.3 * draw(C), 0.8 + 0.3 * draw(C).abs()) if tracked else (None, None)
        return Norm(*running, *((1 + 0.3 * draw(C), 0.5 * draw(C)) if affine else (None, None)), training)

    layers = (draw(R, C) / C**0.5, draw(C, R) / R**0.5, *((draw(R), draw(C)) if biases else (None, None)))
    tail = Tail(
        y=activation() + shift,
        norm=make_norm(),
        se=SE(*layers, se_act, gate) if se else None,
        residual=None if residual is None else activation(),
        residual_norm=make_norm() if residual == "norm" else None,
        act=act,
        dout=activation() / 4,  # sums over the pixels are then of about 1 as well
    )
    if act == "relu":
        tail.dout = _without_gradient_near_zero(tail)
    rounded = tail.to(parameters or dtype)
    rounded.y, rounded.dout = tail.y.to(dtype), tail.dout.to(dtype)
    rounded.residual = None if tail.residual is None else tail.residual.to(dtype)
    return rounded._map(lambda t: t.to(DEVICES[backend]))


def _without_gradient_near_zero(tail: Tail) -> Tensor:
    """dout, 0 where the ReLU's input is so near to 0 that rounding decides on which side of it it is."""
    se = None if tail.residual is None else tail.se  # a gate changes no sign
    copy = tail.leaves()
    before = residual_tail_reference(copy.y, copy.norm, se, copy.residual, copy.residual_norm, "identity")
    return torch.where(before.detach().abs() < NEAR, 0.0, tail.dout).contiguous(memory_format=_format(tail.dout))


def _format(t: Tensor) -> torch.memory_format:
    return torch.contiguous_format if t.is_contiguous() else torch.channels_last


def value_and_gradients(tail: Tail, backend: str) -> dict[str, Tensor]:
    """Everything that the operator makes: out, the gradients, the running statistics as it leaves them."""
    tail = tail.leaves()
    out = residual_tail(tail.y, tail.norm, **tail.options(), backend=backend)
    named = tail.differentiable()
    gradients = torch.autograd.grad(out, list(named.values()), tail.dout)
    results = {"out": out.detach(), **{f"d{name}": g for name, g in zip(named, gradients, strict=True)}}
    return results | tail.running()


def check_parity(tail: Tail, backend: str) -> dict[str, Tensor]:
    """Holds the backend to the accuracy rule and returns its results."""
    actual = value_and_gradients(tail, backend)
    assert_tail_as_accurate_as_eager(actual, tail)
    return actual


def assert_tail_as_accurate_as_eager(actual: dict[str, Tensor], tail: Tail) -> None:
    """Each activation, and all that has C or R columns as one vector, by the rule for a chain of steps.

    What is float32, or too small for a norm to tell anything, also passes torch.testing.assert_close at its defaults.
    """
    eager = value_and_gradients(tail, "eager")
    exact = value_and_gradients(tail.to(torch.float64), "eager")
    assert actual.keys() == eager.keys() == exact.keys()
    for name, t in actual.items():
        assert t.dtype == eager[name].dtype, f"{name}: dtype {t.dtype}, eager has {eager[name].dtype}"
        assert t.shape == eager[name].shape, f"{name}: shape {t.shape}, eager has {eager[name].shape}"
    for names in ([name] for name in ACTIVATIONS if name in actual):
        _assert_group_as_accurate_as_eager(names, actual, eager, exact)
    _assert_group_as_accurate_as_eager([n for n in actual if n not in ACTIVATIONS], actual, eager, exact)


def _assert_group_as_accurate_as_eager(
    names: list[str], actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    chosen = [{name: results[name] for name in names} for results in (actual, eager, exact)]
    few = sum(actual[name].numel() for name in names) < FEW
    for name in names:
        if few or actual[name].dtype in (torch.float32, torch.float64):
            expected = exact[name].to(actual[name].dtype)
            torch.testing.assert_close(actual[name], expected, msg=lambda m, name=name: f"{name}: {m}")
    if not few and actual[names[0]].dtype != torch.float64:
        assert_network_as_accurate_as_eager(*chosen)
