"""`norm_relu_pool`: BatchNorm -> ReLU -> max pool of 3x3, stride 2, padding 1, as one operator: the stem of a ResNet.

With y (N, C, H, W) and M = N * HW values a channel,

    v = scale * (y - mu) + beta        BatchNorm over (N, H, W): scale = gamma * inv, inv = 1 / sqrt(var + eps)
    out[i, j] = max(0, v[h, w])        over the pixels that there are of 2i - 1 <= h <= 2i + 1, 2j - 1 <= w <= 2j + 1

and code[i, j] = 3 (h - 2i + 1) + (w - 2j + 1) of the maximum, the first one as PyTorch counts them, or 9 where none is
above 0: there the ReLU passes no gradient. v is compared as it is rounded to y's dtype, which is what eager compares,
so that what is a tie there is one here.

Forward: one read of y gives mu and var, and a second one out and code. Backward, with d[h, w] the sum of dout over the
at most four windows whose code points at (h, w), one sweep over the windows, which reads y where code points,

    T = sum d      U = sum d * (y - mu)      dbeta = T      dgamma = U * inv

and one over the pixels, each of which looks at its windows, so that nothing is added up by atomics:

    dy = scale * d  -  scale * inv * dgamma / M * (y - mu)  -  scale * dbeta / M

In evaluation mode mu and var are given, and the terms in 1 / M are not there. Between ranks (synchronised BatchNorm)
only sums by channel travel.

Saved for the backward pass: y, code, a byte for every output, and the statistics (ROWS, C). Eager also keeps what the
ReLU returned, and the pool's indices in eight bytes for every output.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import resolve_backend
from kernels.norms import (
    FixedNorm,
    Norm,
    check_norm,
    exchange_nothing,
    fill_statistics,
    given_statistics,
    update_running,
)
from kernels.registration import refuse_forward_mode, register
from kernels.residual_tail import residual_tail_reference
from kernels.squeeze_excite import check_activation
from kernels.statistics import ROWS

NO_MAXIMUM = 9  # the code of an output that is 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def norm_relu_pool(y: Tensor, norm: Norm, *, backend: str = "auto") -> Tensor:
    """``max_pool2d(relu(BatchNorm(y)), kernel_size=3, stride=2, padding=1)``.

    Args:
        y: (N, C, H, W), its channels neighbours in memory (channels-last or a view of such); float32, bfloat16 or
            float16, and float64 on the CPU.
        norm: the BatchNorm. In training its running statistics are updated in place, as PyTorch does.
        backend: "auto", or one of `available_backends` but "cuda", which has no such operator.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)) in y's dtype, channels-last. The arithmetic is in float32 (float64 for a
        float64 y). Differentiable once in y and the norm's weight and bias; ``backend="eager"`` is plain PyTorch and
        has no such limit.

    Raises:
        ValueError: a shape, dtype, layout, device or name that does not fit, or one value a channel in training.
        BackendUnavailable: the named backend cannot serve here.
    """
    check_activation("y", y)
    check_norm("norm", norm, y)
    if not serves(y):
        raise ValueError(
            f"y must be channels-last and of one of {DTYPES}, but has strides {y.stride()} and is {y.dtype}; "
            "take residual_tail and torch.nn.functional.max_pool2d"
        )
    chosen = resolve_backend(backend, y.device, y.dtype, operator="norm_relu_pool")
    # A rank with an empty batch takes part in what the ranks exchange, as the others do
    if chosen == "eager" or (y.shape[0] == 0 and not norm.group):
        return norm_relu_pool_reference(y, norm)
    tensors = (y, norm.weight, norm.bias)
    refuse_forward_mode("norm_relu_pool", tensors)
    out, _, stats = _call_fwd(*tensors, *given_statistics(norm), norm.eps, norm.group, chosen)
    update_running(norm, stats)
    return out


def serves(y: Tensor) -> bool:
    """Whether the operator has kernels for a tensor of this shape, layout and dtype."""
    return y.dim() == 4 and 0 not in y.shape[1:] and y.dtype in DTYPES and (y.shape[1] == 1 or y.stride(1) == 1)


def norm_relu_pool_reference(y: Tensor, norm: Norm) -> Tensor:
    """What the three modules compute one after another, in plain PyTorch; arguments of `norm_relu_pool`."""
    return F.max_pool2d(residual_tail_reference(y, norm, None, None, None, "relu"), 3, 2, 1)


def backend_module(backend: str) -> ModuleType:
    """kernels.norm_pool_cpu or kernels.norm_pool_triton, imported when it is first used."""
    return importlib.import_module(f"kernels.norm_pool_{backend}")


def pooled(size: int) -> int:
    """The height or width of out for one of y."""
    return -(-size // 2)


def _fwd(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    group: str,
    backend: str,
) -> tuple[Tensor, ...]:
    norm = FixedNorm(weight, bias, mean, var, eps, group)
    if y.shape[0] == 0:  # the statistics are the other ranks'
        out, code, stats = _outputs(y)
        fill_statistics(stats, norm)
        return out, code, stats
    outputs: tuple[Tensor, ...] = backend_module(backend).pool_fwd(y, norm)
    return outputs


def _fwd_fake(y: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _outputs(y)


def _outputs(y: Tensor) -> tuple[Tensor, ...]:
    N, C, H, W = y.shape
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    out = torch.empty((N, C, pooled(H), pooled(W)), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    code = y.new_empty((N, pooled(H), pooled(W), C), dtype=torch.uint8)
    return out, code, y.new_empty((ROWS, C), dtype=wide)


def _bwd(
    dout: Tensor,
    y: Tensor,
    code: Tensor,
    stats: Tensor,
    training: bool,
    group: str,
    backend: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    if y.shape[0] == 0:
        exchange_nothing(stats, (training, group, output_mask[0]))
        return tuple(map(torch.zeros_like, _bwd_fake(dout, y, code, stats, training, group, backend, output_mask)))
    gradients: tuple[Tensor, ...] = backend_module(backend).pool_bwd(
        dout, y, code, stats, training, group, list(output_mask)
    )
    return gradients


def _bwd_fake(dout: Tensor, y: Tensor, code: Tensor, stats: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with_dy, with_dweight, with_dbias = args[-1]
    dy = torch.empty_like(y, memory_format=torch.channels_last) if with_dy else y.new_empty(0)
    return dy, *(stats.new_empty(y.shape[1] if wanted else 0) for wanted in (with_dweight, with_dbias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, mean, _, _, group, backend = inputs
    _, code, stats = output
    ctx.save_for_backward(y, code, stats)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.how = (mean is None, group, backend)
    ctx.mark_non_differentiable(code, stats)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:3]
    gradients = _call_bwd(dout, *ctx.saved_tensors, *ctx.how, list(needs))
    cast = (g.to(d) if need else None for g, d, need in zip(gradients, ctx.dtypes, needs, strict=True))
    return *cast, *(None,) * 5


_call_fwd = register(
    "pool_fwd(Tensor y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, str group, str backend)"
    " -> (Tensor out, Tensor code, Tensor stats)",
    _fwd,
    _fwd_fake,
    _setup_context,
    _backward,
)
_call_bwd = register(
    "pool_bwd(Tensor dout, Tensor y, Tensor code, Tensor stats, bool training, str group, str backend,"
    " bool[3] output_mask) -> (Tensor dy, Tensor dweight, Tensor dbias)",
    _bwd,
    _bwd_fake,
)
