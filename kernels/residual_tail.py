"""`residual_tail`: BatchNorm -> SE -> + residual -> activation as one operator, in two passes each way.

With y (N, C, H, W) the last convolution's output, M = N * HW values a channel, and s = 1 where there is no SE:

    z = gamma * (y - mu) * inv + beta      BatchNorm over (N, H, W), inv = 1 / sqrt(var + eps)
    p = mean_hw z                          s = g(W2 act(W1 p + b1) + b2)
    out = act(z * s + r)                   r = residual, or gamma2 * (residual - mu2) * inv2 + beta2

Forward: one read of y gives mu, var and the squeeze, which is affine in the sample's mean,

    p = gamma * inv * deviation + beta,    deviation[n, c] = mean_hw y - mu

and a second one, with the residual, gives out. Backward, with d = dout * act'(...), one sweep gives every reduction:

    T = sum_hw d      U = sum_hw d * (y - mu)
    ds = gamma * inv * U + beta * T        dW2, db2, dW1, db1 and q = dL/dp / HW as in `squeeze_excite`
    dbeta  = sum_n (s * T + HW * q)
    dgamma = sum_n (s * U + HW * q * deviation) * inv

and a second one the gradients of the activations, with k = gamma * inv:

    dy = k * s * d  -  k * inv * dgamma / M * (y - mu)  +  k * (q - dbeta / M)
    dresidual = d, or what BatchNorm's own backward makes of it: the line above with s = 1, q = 0

In evaluation mode mu and var are given, and the terms in dgamma / M and dbeta / M are not there. Between ranks
(synchronised BatchNorm) only sums by channel travel. y - mu is formed before anything is summed: a mean of 1e4 standard
deviations costs no accuracy.

Saved for the backward pass: y; one bit an element, whether a ReLU passed, where a residual was added (without one the
sign is recomputed from y, and is not saved); (N, C), (N, R) and (C,) tensors; and the residual where it has a
BatchNorm of its own or the activation is SiLU, whose slope needs the value.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backends import resolve_backend
from kernels.norms import (
    FixedNorm,
    Norm,
    batch_norm,
    check_norm,
    exchange_nothing,
    fill_statistics,
    given_statistics,
    update_running,
)
from kernels.reference import squeeze_excite_reference
from kernels.registration import refuse_forward_mode, register
from kernels.squeeze_excite import as_matrix, check_activation, check_squeeze
from kernels.statistics import ROWS

TAIL_ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "identity": lambda x: x}


class SE(NamedTuple):
    """What `squeeze_excite` takes besides x."""

    w1: Tensor
    w2: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None
    act: str = "relu"
    gate: str = "sigmoid"


class Saved(NamedTuple):
    """What the backward pass has of the forward pass. A tensor that there is none of is None or has no elements."""

    y: Tensor
    residual: Tensor | None  # where it has a norm, or act is "silu"
    w1: Tensor | None  # (R, C)
    w2: Tensor | None  # (C, R)
    mask: Tensor  # `mask_shape`
    stats: Tensor  # `kernels.statistics`, (ROWS, C)
    stats2: Tensor  # the residual's, (ROWS, C) or empty
    deviation: Tensor  # mean_hw y - mu, (N, C) with SE
    pooled: Tensor  # (N, C) with SE
    hidden: Tensor  # (N, R) with SE
    gate: Tensor  # (N, C) with SE


class How(NamedTuple):
    """The switches of the operator; ``training`` where the statistics were the batch's own."""

    with_residual: bool
    training: bool
    training2: bool
    group: str
    group2: str
    act: str
    se_act: str
    gate_fn: str


def residual_tail(
    y: Tensor,
    norm: Norm,
    *,
    se: SE | None = None,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    act: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """``act(SE(BatchNorm(y)) + residual)``, where SE, the residual and a BatchNorm of the residual's are optional.

    Args:
        y: (N, C, H, W), channels-last or contiguous or any view; float32, bfloat16 or float16, and float64 on the CPU.
        norm: the BatchNorm of y. In training its running statistics are updated in place, as PyTorch does.
        se: the squeeze-and-excitation of the normalised y.
        residual: (N, C, H, W) in y's dtype.
        residual_norm: a BatchNorm of the residual (a downsample branch's).
        act: "relu", "silu" or "identity".
        backend: "auto", or one of `available_backends` but "cuda", which has no tail.

    Returns:
        (N, C, H, W) in y's dtype, channels-last where y is, else contiguous. The arithmetic is in float32 (float64 for
        a float64 y). Differentiable once in y, the residual and every parameter; ``backend="eager"`` is plain PyTorch
        and has no such limit.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit, or one value a channel in training.
        BackendUnavailable: the named backend cannot serve here.
    """
    if se is not None:
        se = se._replace(w1=as_matrix("w1", se.w1), w2=as_matrix("w2", se.w2))
    _check(y, norm, se, residual, residual_norm, act)
    chosen = resolve_backend(backend, y.device, y.dtype, operator="residual_tail")
    second = Norm(None, None) if residual_norm is None else residual_norm
    # A rank with an empty batch takes part in what the ranks exchange, as the others do
    if chosen == "eager" or (y.shape[0] == 0 and not norm.group and not second.group):
        return residual_tail_reference(y, norm, se, residual, residual_norm, act)
    w1, w2, b1, b2, se_act, gate_fn = se or (None, None, None, None, "relu", "sigmoid")
    tensors = (y, residual, norm.weight, norm.bias, w1, b1, w2, b2, second.weight, second.bias)
    refuse_forward_mode("residual_tail", tensors)
    given = (*given_statistics(norm), *(given_statistics(second) if residual_norm else (None, None)))
    options = (norm.eps, second.eps, residual_norm is not None, norm.group, second.group, act, se_act, gate_fn, chosen)
    out, _, stats, stats2, *_ = _call_fwd(*tensors, *given, *options)
    update_running(norm, stats)
    if residual_norm is not None:
        update_running(residual_norm, stats2)
    return out


def _check(y: Tensor, norm: Norm, se: SE | None, residual: Tensor | None, residual_norm: Norm | None, act: str) -> None:
    check_activation("y", y)
    if act not in TAIL_ACTIVATIONS:
        raise ValueError(f"act={act!r} is not one of {tuple(TAIL_ACTIVATIONS)}")
    if residual is not None:
        if residual.shape != y.shape:
            raise ValueError(f"residual must be {tuple(y.shape)} as y is, but has shape {tuple(residual.shape)}")
        if residual.dtype != y.dtype or residual.device != y.device:
            raise ValueError(
                f"residual is {residual.dtype} on {residual.device} and y {y.dtype} on {y.device}; make them alike"
            )
    elif residual_norm is not None:
        raise ValueError("residual_norm is given and residual is not")
    if se is not None:
        check_squeeze(y, se.w1, se.w2, se.b1, se.b2, se.act, se.gate, name="y")
    for name, given in (("norm", norm), ("residual_norm", residual_norm)):
        if given is not None:
            check_norm(name, given, y)


def residual_tail_reference(
    y: Tensor, norm: Norm, se: SE | None, residual: Tensor | None, residual_norm: Norm | None, act: str
) -> Tensor:
    """What the modules of a block compute one after another, in plain PyTorch; arguments of `residual_tail`."""
    out = batch_norm(y, norm)
    if se is not None:
        out = squeeze_excite_reference(out, *se)
    if residual is not None:
        out = out + (residual if residual_norm is None else batch_norm(residual, residual_norm))
    return TAIL_ACTIVATIONS[act](out)


def backend_module(backend: str) -> ModuleType:
    """kernels.tail_cpu or kernels.tail_triton, imported when it is first used."""
    return importlib.import_module(f"kernels.tail_{backend}")


def memory_format(y: Tensor) -> torch.memory_format:
    """Of what the operator writes: channels-last where a pixel's channels are neighbours in y, else contiguous."""
    C, H, W = y.shape[1:]
    last = C > 1 and y.stride(1) == 1 and (H * W == 1 or not y.is_contiguous())
    return torch.channels_last if last else torch.contiguous_format


def mask_shape(y: Tensor) -> tuple[int, ...]:
    """Of the ReLU's bits, uint8, lowest first: eight channels of a pixel, or eight pixels of a channel, to a byte."""
    N, C, H, W = y.shape
    return (N, H * W, -(-C // 8)) if memory_format(y) == torch.channels_last else (N, C, -(-H * W // 8))


def _needs_mask(act: str, residual: Tensor | None) -> bool:
    return act == "relu" and residual is not None


def _needs_residual(act: str, residual_norm: bool) -> bool:
    return residual_norm or act == "silu"


def _fwd(
    y: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps: float,
    eps2: float,
    residual_norm: bool,
    group: str,
    group2: str,
    act: str,
    se_act: str,
    gate_fn: str,
    backend: str,
) -> tuple[Tensor, ...]:
    norm = FixedNorm(weight, bias, mean, var, eps, group)
    second = FixedNorm(weight2, bias2, mean2, var2, eps2, group2) if residual_norm else None
    se = None if w1 is None or w2 is None else SE(w1, w2, b1, b2, se_act, gate_fn)
    if y.shape[0] == 0:
        return _empty_fwd(y, norm, se, residual, second, act)
    outputs: tuple[Tensor, ...] = backend_module(backend).tail_fwd(y, norm, se, residual, second, act)
    return outputs


def _empty_fwd(
    y: Tensor, norm: FixedNorm, se: SE | None, residual: Tensor | None, second: FixedNorm | None, act: str
) -> tuple[Tensor, ...]:
    """What a backend returns, of an empty batch: the statistics are the other ranks'."""
    out, mask, stats, stats2, *rest = _outputs(y, residual, None if se is None else se.w1, second is not None, act)
    for rows, given in ((stats, norm), (stats2, second)):
        if given is not None:
            fill_statistics(rows, given)
    return out, mask, stats, stats2, *rest


def _fwd_fake(y: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _outputs(y, residual, args[2], args[14], args[17])


def _outputs(
    y: Tensor, residual: Tensor | None, w1: Tensor | None, residual_norm: bool, act: str
) -> tuple[Tensor, ...]:
    (N, C), R = y.shape[:2], 0 if w1 is None else w1.shape[0]
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    out = torch.empty_like(y, memory_format=memory_format(y))
    mask = y.new_empty(mask_shape(y) if _needs_mask(act, residual) else (0,), dtype=torch.uint8)
    shapes = [(ROWS, C), (ROWS, C) if residual_norm else (0,)]
    shapes += [(N, C), (N, C), (N, R), (N, C)] if R else [(0,)] * 4
    return out, mask, *(y.new_empty(shape, dtype=wide) for shape in shapes)


def _bwd(
    dout: Tensor,
    y: Tensor,
    residual: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    mask: Tensor,
    stats: Tensor,
    stats2: Tensor,
    deviation: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    with_residual: bool,
    training: bool,
    training2: bool,
    group: str,
    group2: str,
    act: str,
    se_act: str,
    gate_fn: str,
    backend: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    if y.shape[0] == 0:
        exchange_nothing(stats, (training, group, output_mask[0]), (training2, group2, output_mask[1]))
        return tuple(map(torch.zeros_like, _bwd_fake(dout, y, residual, w1, w2, mask, stats, output_mask)))
    saved = Saved(y, residual, w1, w2, mask, stats, stats2, deviation, pooled, hidden, gate)
    how = How(with_residual, training, training2, group, group2, act, se_act, gate_fn)
    gradients: tuple[Tensor, ...] = backend_module(backend).tail_bwd(dout, saved, how, list(output_mask))
    return gradients


def _bwd_fake(
    dout: Tensor,
    y: Tensor,
    residual: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    stats, output_mask = args[1], args[-1]
    C, R = y.shape[1], 0 if w1 is None else w1.shape[0]
    # the weights' gradients in the weights' dtypes; those of the two norms wide
    shapes: list[tuple[Tensor, tuple[int, ...]]] = [(stats, (C,)), (stats, (C,))]
    shapes += [(stats, ())] * 4 if w1 is None or w2 is None else [(w1, (R, C)), (w1, (R,)), (w2, (C, R)), (w2, (C,))]
    shapes += [(stats, (C,)), (stats, (C,))]
    activations = (
        torch.empty_like(y, memory_format=memory_format(y)) if wanted else y.new_empty(0) for wanted in output_mask[:2]
    )
    rest = zip(shapes, output_mask[2:], strict=True)
    return *activations, *(like.new_empty(shape if wanted else (0,)) for (like, shape), wanted in rest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, residual, _, _, w1, _, w2, *_ = inputs
    mean, mean2 = inputs[10], inputs[12]
    _, _, residual_norm, group, group2, act, se_act, gate_fn, backend = inputs[14:]
    _, mask, stats, stats2, *per_sample = output
    kept = residual if residual is not None and _needs_residual(act, residual_norm) else None
    ctx.save_for_backward(y, kept, w1, w2, mask, stats, stats2, *per_sample)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:10]]
    training2 = residual_norm and mean2 is None
    ctx.how = (residual is not None, mean is None, training2, group, group2, act, se_act, gate_fn, backend)
    ctx.mark_non_differentiable(mask, stats, stats2, *per_sample)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 23
    needs = ctx.needs_input_grad[:10]
    gradients = _call_bwd(dout, *ctx.saved_tensors, *ctx.how, list(needs))
    cast = (g.to(d) if need else None for g, d, need in zip(gradients, ctx.dtypes, needs, strict=True))
    return *cast, *(None,) * 13


_call_fwd = register(
    "tail_fwd(Tensor y, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2,"
    " Tensor? weight2, Tensor? bias2, Tensor? mean, Tensor? var, Tensor? mean2, Tensor? var2, float eps, float eps2,"
    " bool residual_norm, str group, str group2, str act, str se_act, str gate_fn, str backend)"
    " -> (Tensor out, Tensor mask, Tensor stats, Tensor stats2, Tensor deviation, Tensor pooled, Tensor hidden,"
    " Tensor gate)",
    _fwd,
    _fwd_fake,
    _setup_context,
    _backward,
)
_call_bwd = register(
    "tail_bwd(Tensor dout, Tensor y, Tensor? residual, Tensor? w1, Tensor? w2, Tensor mask, Tensor stats,"
    " Tensor stats2, Tensor deviation, Tensor pooled, Tensor hidden, Tensor gate, bool with_residual, bool training,"
    " bool training2, str group, str group2, str act, str se_act, str gate_fn, str backend, bool[10] output_mask)"
    " -> (Tensor dy, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2,"
    " Tensor dweight2, Tensor dbias2)",
    _bwd,
    _bwd_fake,
)


# As `squeeze_excite`'s: the two small products, as torch counts a Linear's; normalising counts nothing there.
@register_flop_formula(torch.ops.kernels.tail_fwd)
def _fwd_flops(y_shape: Sequence[int], *args: Any, **_: Any) -> int:
    w1_shape = args[3]
    return 0 if w1_shape is None else 4 * y_shape[0] * w1_shape[0] * w1_shape[1]


@register_flop_formula(torch.ops.kernels.tail_bwd)
def _bwd_flops(dout_shape: Sequence[int], *args: Any, **_: Any) -> int:
    w1_shape, output_mask = args[2], args[-1]
    if w1_shape is None:
        return 0
    with_dy, _dresidual, with_dweight, with_dbias, with_dw1, with_db1, with_dw2, _db2, *_second = output_mask
    with_q = with_dy or with_dweight or with_dbias
    products = (with_q or with_dw1 or with_db1) + with_q + with_dw1 + with_dw2
    return 2 * products * dout_shape[0] * w1_shape[0] * w1_shape[1]
