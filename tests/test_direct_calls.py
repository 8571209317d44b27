"""An operator is called without PyTorch's dispatcher where nobody would notice, and through it where somebody would."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import squeeze_excite
from kernels.residual_tail import residual_tail
from tests import se_cases, tail_cases

SHAPE = (3, 16, 4, 5, 2)


def run_se() -> dict[str, torch.Tensor]:
    inputs, dout = se_cases.make_inputs(SHAPE, torch.float32, "cpu")
    return se_cases.value_and_gradients(inputs, dout, backend="cpu")


def run_tail() -> dict[str, torch.Tensor]:
    return tail_cases.value_and_gradients(tail_cases.make_tail(SHAPE, torch.float32, "cpu"), "cpu")


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("run", "stem"), ((run_se, "se"), (run_tail, "tail")), ids=("se", "tail"))
def test_modes_and_the_profiler_see_the_operator_and_change_nothing(run, stem):
    direct = run()
    operators = {f"kernels::{stem}_fwd", f"kernels::{stem}_bwd"}
    with Recorded() as recorded:
        dispatched = run()
    assert operators <= recorded.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = run()
    assert operators <= {event.name for event in profile.events()}
    assert direct
    for name, value in direct.items():
        assert torch.equal(value, dispatched[name]), name
        assert torch.equal(value, profiled[name]), name


class Watched(torch.Tensor):
    """A subclass that looks at every operator it meets."""

    seen: set[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_operator():
    Watched.seen = set()
    inputs, _ = se_cases.make_inputs(SHAPE, torch.float32, "cpu")
    tail = tail_cases.make_tail(SHAPE, torch.float32, "cpu", se=False, residual=None)
    with torch.no_grad():
        out = squeeze_excite(inputs[0].as_subclass(Watched), *inputs[1:], backend="cpu")
        assert torch.equal(out, squeeze_excite(*inputs, backend="cpu"))
        residual_tail(tail.y.as_subclass(Watched), tail.norm, backend="cpu")
    assert {"kernels.se_fwd", "kernels.tail_fwd"} <= Watched.seen


def test_an_unwatched_call_reaches_the_kernel_at_once(monkeypatch):
    """What the dispatcher is left out for: the operator's Python is run once, and not once more for autograd."""
    inputs, dout = se_cases.make_inputs(SHAPE, torch.float32, "cpu")

    def refuse(*args):
        raise AssertionError("the dispatcher was asked")

    monkeypatch.setattr(torch._C, "_AutoDispatchBelowAutograd", refuse)
    assert se_cases.value_and_gradients(inputs, dout, backend="cpu")
