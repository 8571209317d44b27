"""How this project's operators enter PyTorch: one library, and for each operator what every one of them needs.

An operator has one implementation for all devices (a backend is chosen by name before the call), a fake one for shapes,
and a first derivative. Autograd goes through an autograd.Function at the Autograd key: what
torch.library.register_autograd does, without its machinery, which takes longer than a small block does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("kernels", "DEF")
Operator = Callable[..., tuple[Tensor, ...]]
# What the arguments of an operator are, unless a subclass of Tensor watches what is done to it
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list))


def register(
    schema: str,
    implementation: Operator,
    fake: Operator,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Operator:
    """Defines ``kernels::name`` by its schema and returns what to call it through.

    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are those of torch.autograd.Function; without
    them the operator is itself a derivative, and says so when it is differentiated.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    op = getattr(torch.ops.kernels, name)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernels::{name}", fake, lib=LIBRARY)
    setup, derivative = setup_context or _nothing_saved, backward or _no_second_derivative

    def below_autograd(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def below_autocast(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._DisableAutocast():
            return implementation(*args)

    with_autograd = _differentiable(name, below_autograd, setup, derivative)
    at_once = _differentiable(name, below_autocast, setup, derivative)
    transformed = _transformable(name, op, setup, derivative)

    def call(*args: Any) -> tuple[Tensor, ...]:
        if _unobserved(args):
            return at_once(*args)
        # torch.func's transforms do not see a registered formula, and take an autograd.Function
        outputs: tuple[Tensor, ...] = (transformed.apply if torch._C._are_functorch_transforms_active() else op)(*args)
        return outputs

    LIBRARY.impl(name, with_autograd, "Autograd")
    LIBRARY.impl(name, _without_autocast(op, "cpu"), "AutocastCPU")
    LIBRARY.impl(name, _without_autocast(op, "cuda"), "AutocastCUDA")
    return call


def refuse_forward_mode(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises where a tensor has a tangent, which a registered operator would drop without a word."""
    if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors):
        raise RuntimeError(f"{name} has no forward-mode derivative: use backend='eager'")


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _unobserved(args: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd and autocast would see a call of the operator.

    PyTorch's dispatcher would then go through Python twice with two dozen arguments, which takes longer than the work
    on a small activation, and arrive at the same implementation.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, args))
    )


def _differentiable(name: str, run: Operator, setup: Callable[..., None], derivative: Callable[..., Any]) -> Operator:
    """``run`` with its derivative, where one is asked for."""

    class Function(torch.autograd.Function):
        backward = staticmethod(derivative)

        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            outputs = run(*args)
            setup(ctx, args, outputs)
            return outputs

    Function.__name__ = Function.__qualname__ = name  # what a printed grad_fn says

    def call(*args: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = (Function.apply if torch.is_grad_enabled() else run)(*args)
        return outputs

    return call


def _transformable(
    name: str, op: Operator, setup: Callable[..., None], derivative: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The form that torch.func's transforms take; vmap runs it one by one."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(setup)
        backward = staticmethod(derivative)

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return op(*args)

    Function.__name__ = Function.__qualname__ = name
    return Function


def _nothing_saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("a fused backward pass is not differentiable: for second derivatives use backend='eager'")


def _without_autocast(op: Operator, device_type: str) -> Operator:
    """Tensors enter as they are and the arithmetic stays in float32, whatever autocast would cast."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return call
