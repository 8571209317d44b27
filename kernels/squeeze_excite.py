"""`squeeze_excite`: one operator, registered once with torch.library, whose work a backend does.

Saved for the backward pass: x, the weights, and pooled (N, C), hidden (N, R) and gate (N, C) in float32 (float64 for a
float64 x). The backward formula, with s the gate, g its function, a = act(hidden) and p the pooled input:

    ds = sum_hw dout * x        dz = ds * g'(s)              dw2 = dz^T a         db2 = sum_n dz
    dhidden = (dz W2) * act'    dw1 = dhidden^T p            db1 = sum_n dhidden
    dx = dout * s + (dhidden W1) / HW
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backends import resolve_backend
from kernels.reference import ACTIVATIONS, GATES, squeeze_excite_reference
from kernels.registration import refuse_forward_mode, register


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: str = "relu",
    gate: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """Squeeze-and-Excitation: ``x * gate(W2 act(W1 mean_hw(x) + b1) + b2)`` (arXiv:1709.01507).

    Args:
        x: (N, C, H, W), channels-last or contiguous or any view; float32, bfloat16 or float16, and float64 on the CPU.
        w1: (R, C) or (R, C, 1, 1). Weights may be of another floating dtype than x (float32 weights under autocast).
        w2: (C, R) or (C, R, 1, 1).
        b1: (R,) or None.
        b2: (C,) or None.
        act: "relu", "silu" or "gelu" (the exact one).
        gate: "sigmoid" or "hardsigmoid".
        backend: "auto", or one of `available_backends`.

    Returns:
        (N, C, H, W) in x's dtype and memory format. The arithmetic is in float32 (float64 for a float64 x), and the
        gate is not rounded to a half type on its way. Differentiable once in x and every weight; ``backend="eager"``
        is plain PyTorch and has no such limit.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit; the message says which.
        BackendUnavailable: the named backend cannot serve here.
    """
    w1, w2 = as_matrix("w1", w1), as_matrix("w2", w2)
    check_activation("x", x)
    check_squeeze(x, w1, w2, b1, b2, act, gate)
    chosen = resolve_backend(backend, x.device, x.dtype)
    if chosen == "eager":
        return squeeze_excite_reference(x, w1, w2, b1, b2, act, gate)
    refuse_forward_mode("squeeze_excite", (x, w1, w2, b1, b2))
    return _call_fwd(x, w1, b1, w2, b2, act, gate, chosen)[0]


def as_matrix(name: str, w: Tensor) -> Tensor:
    """A 1x1 convolution's weight (O, I, 1, 1) as (O, I)."""
    if w.dim() == 4 and w.shape[2:] == (1, 1):
        return w.flatten(1)
    if w.dim() != 2:
        raise ValueError(f"{name} must be a matrix or a 1x1 convolution's weight, but has shape {tuple(w.shape)}")
    return w


def check_activation(name: str, x: Tensor) -> None:
    """Raises a ValueError where x, called ``name``, is no (N, C, H, W) of floating point with channels and pixels."""
    if x.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W), but has shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must hold at least one channel and one pixel, but has shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, but is {x.dtype}")


def check_squeeze(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, act: str, gate: str, *, name: str = "x"
) -> None:
    """Raises a ValueError where the two layers and their names do not fit x (N, C, H, W), called ``name``."""
    C, R = x.shape[1], w1.shape[0]
    if w1.shape[1] != C or tuple(w2.shape) != (C, R) or R == 0:
        raise ValueError(
            f"w1 must be (R, {C}) and w2 ({C}, R) for {'an' if name == 'x' else 'a'} {name} of {C} channels, "
            f"but they are {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    for weight, bias, size in (("b1", b1, R), ("b2", b2, C)):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{weight} must be ({size},), but has shape {tuple(bias.shape)}")
    for weight, t in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"{weight} must be floating point, but is {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{weight} is on {t.device} and {name} on {x.device}; move them to one device")
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not one of {tuple(ACTIVATIONS)}")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is not one of {tuple(GATES)}")


def _backend_module(backend: str) -> ModuleType:
    """kernels.se_cpu or kernels.se_triton, imported when it is first used."""
    return importlib.import_module(f"kernels.se_{backend}")


def _se_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str, backend: str
) -> tuple[Tensor, ...]:
    if x.shape[0] == 0:
        return _se_fwd_fake(x, w1, b1, w2, b2, act, gate_fn, backend)
    return _backend_module(backend).se_fwd(x, w1, b1, w2, b2, act, gate_fn)


def _se_bwd(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    act: str,
    gate_fn: str,
    backend: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    args = (dout, x, w1, w2, pooled, hidden, gate, act, gate_fn)
    if x.shape[0] == 0:
        return tuple(torch.zeros_like(t) for t in _se_bwd_fake(*args, backend, output_mask))
    return _backend_module(backend).se_bwd(*args, output_mask)


def _se_fwd_fake(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, gate_fn: str, backend: str
) -> tuple[Tensor, ...]:
    (N, C), R = x.shape[:2], w1.shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled, hidden, gate = (x.new_empty(shape, dtype=wide) for shape in ((N, C), (N, R), (N, C)))
    return torch.empty_like(x), pooled, hidden, gate


def _se_bwd_fake(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    act: str,
    gate_fn: str,
    backend: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    C, R = x.shape[1], w1.shape[0]
    with_dx, *with_weights = output_mask
    dx = torch.empty_like(x) if with_dx else x.new_empty(0)
    shapes = ((w1, (R, C)), (w1, (R,)), (w2, (C, R)), (w2, (C,)))
    weights = (w.new_empty(shape if wanted else (0,)) for (w, shape), wanted in zip(shapes, with_weights, strict=True))
    return dx, *weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, b2, ctx.act, ctx.gate_fn, ctx.backend = inputs
    _, pooled, hidden, gate = output
    ctx.save_for_backward(x, w1, w2, pooled, hidden, gate)
    ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (b1, b2))
    # out is the only output with a gradient: the others are kept for the backward pass alone
    ctx.mark_non_differentiable(pooled, hidden, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    needs = ctx.needs_input_grad
    output_mask = [needs[0], needs[1], needs[2], needs[3], needs[4]]
    dx, dw1, db1, dw2, db2 = _call_bwd(dout, *ctx.saved_tensors, ctx.act, ctx.gate_fn, ctx.backend, output_mask)
    if needs[2]:
        db1 = db1.to(ctx.bias_dtypes[0])
    if needs[4]:
        db2 = db2.to(ctx.bias_dtypes[1])
    grads = (dx, dw1, db1, dw2, db2)
    return *(grad if needed else None for grad, needed in zip(grads, output_mask, strict=True)), None, None, None


_call_fwd = register(
    "se_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str act, str gate_fn, str backend)"
    " -> (Tensor out, Tensor pooled, Tensor hidden, Tensor gate)",
    _se_fwd,
    _se_fwd_fake,
    _setup_context,
    _backward,
)
_call_bwd = register(
    "se_bwd(Tensor dout, Tensor x, Tensor w1, Tensor w2, Tensor pooled, Tensor hidden, Tensor gate,"
    " str act, str gate_fn, str backend, bool[5] output_mask)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    _se_bwd,
    _se_bwd_fake,
)


# The two small products count as torch counts a Linear's; its counter takes no notice of sums and scalings.
@register_flop_formula(torch.ops.kernels.se_fwd)
def _se_fwd_flops(x_shape: Sequence[int], w1_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 4 * x_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.kernels.se_bwd)
def _se_bwd_flops(
    dout_shape: Sequence[int], x_shape: Sequence[int], w1_shape: Sequence[int], *args: Any, **_: Any
) -> int:
    with_dx, with_dw1, with_db1, with_dw2, _with_db2 = args[-1]
    products = (with_dx or with_dw1 or with_db1) + with_dx + with_dw1 + with_dw2
    return 2 * products * x_shape[0] * w1_shape[0] * w1_shape[1]
