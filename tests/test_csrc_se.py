"""The C++ operators by themselves: kernels_C::se_fwd and kernels_C::se_bwd against autograd in float64."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import assert_as_accurate_as_eager
from tests.se_cases import LAYOUTS, ids

pytest.importorskip("kernels._C", reason="csrc is not built", exc_type=ImportError)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTS = [F.relu, F.silu, F.gelu]
# torch's own hardsigmoid has a gradient of float32's 1/6 also in float64
GATES = [torch.sigmoid, lambda z: (z + 3).clamp(0, 6) / 6]
RELU, SILU, GELU, SIGMOID, HARDSIGMOID = 0, 1, 2, 0, 1

#         N, C, H, W, R
SHAPES = [
    (2, 64, 14, 14, 4),
    (8, 256, 3, 3, 16),
    (3, 17, 5, 7, 3),
    (1, 72, 9, 4, 24),
    (5, 2048, 2, 2, 128),
    (2, 5, 1, 1, 2),
    (4, 1, 6, 5, 1),
    (2, 3, 40, 33, 1),
    (1, 1, 1, 1, 1),
]


class Weights(NamedTuple):
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(*(None if t is None else t.to(dtype) for t in self))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_weights(C: int, R: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Weights:
    w1, w2 = torch.randn(R, C) / C**0.5, torch.randn(C, R) / R**0.5
    return Weights(w1, torch.randn(R) if bias else None, w2, torch.randn(C) if bias else None).to(dtype)


def make_x(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=LAYOUTS[layout])


def fused(x: Tensor, weights: Weights, dout: Tensor, act: int, gate_fn: int) -> dict[str, Tensor]:
    out, *saved = torch.ops.kernels_C.se_fwd(x, *weights, act, gate_fn)
    mask = [True, True, weights.b1 is not None, True, weights.b2 is not None]
    grads = torch.ops.kernels_C.se_bwd(dout, x, weights.w1, weights.w2, *saved, act, gate_fn, mask)
    names = ("dx", "dw1", "db1", "dw2", "db2")
    return {"out": out} | {name: grad for name, grad, wanted in zip(names, grads, mask, strict=True) if wanted}


def by_autograd(x: Tensor, weights: Weights, dout: Tensor, act: int, gate_fn: int) -> dict[str, Tensor]:
    leaves = {"dx": x} | {f"d{name}": t for name, t in weights._asdict().items() if t is not None}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    w1, b1, w2, b2 = (leaves.get(f"d{name}") for name in Weights._fields)
    hidden = F.linear(leaves["dx"].mean((2, 3)), w1, b1)
    gate = GATES[gate_fn](F.linear(ACTS[act](hidden), w2, b2))
    out = leaves["dx"] * gate[:, :, None, None]
    return {"out": out.detach()} | dict(zip(leaves, torch.autograd.grad(out, leaves.values(), dout), strict=True))


def assert_accurate(x: Tensor, weights: Weights, dout: Tensor, act: int = RELU, gate_fn: int = SIGMOID) -> None:
    results = fused(x, weights, dout, act, gate_fn)
    truth = by_autograd(x.double(), weights.to(torch.float64), dout.double(), act, gate_fn)
    eager = by_autograd(x, weights.to(x.dtype), dout, act, gate_fn)
    assert results.keys() == truth.keys()
    assert results["out"].stride() == results["dx"].stride() == torch.empty_like(x).stride()
    for name, result in results.items():
        expected = truth[name]
        assert result.shape == expected.shape, name
        assert result.dtype == (x.dtype if name in ("out", "dx") else weights.w1.dtype), name
        # float64 weights do not make the arithmetic for a narrower x any wider
        narrow = torch.float32 if result.dtype == torch.float64 != x.dtype else result.dtype
        assert_as_accurate_as_eager(name, result.to(narrow), eager[name].to(narrow), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_values_and_gradients(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    *x_shape, R = shape
    x = make_x(tuple(x_shape), dtype, layout)
    assert_accurate(x, make_weights(x.shape[1], R, dtype=dtype), torch.randn_like(x))


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("gate_fn", [SIGMOID, HARDSIGMOID], ids=["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("act", [RELU, SILU, GELU], ids=["relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_every_activation_gate_and_bias(dtype: torch.dtype, act: int, gate_fn: int, bias: bool) -> None:
    x = make_x((4, 40, 6, 6), dtype, "channels_last")
    weights = make_weights(40, 10, bias=bias, dtype=dtype)
    if gate_fn == HARDSIGMOID:  # on both sides of its bends
        weights = weights._replace(w2=weights.w2 * 4)
    assert_accurate(x, weights, torch.randn_like(x), act, gate_fn)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_weights_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = make_x((3, 32, 4, 4), dtype, "channels_last")
    weights = make_weights(32, 8, dtype=weight_dtype)
    if dtype == torch.float64 and weight_dtype != torch.float64:
        results = fused(x, weights, x, RELU, SIGMOID)
        truth = by_autograd(x, weights.to(torch.float64), x, RELU, SIGMOID)
        torch.testing.assert_close(results, {name: t.to(results[name].dtype) for name, t in truth.items()})
    else:
        assert_accurate(x, weights, torch.randn_like(x))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every_second_sample": lambda t: t[::2],
    "samples_from_one": lambda t: t[1:],
    "channels_within": lambda t: t[:, 3:20],
    "every_second_channel": lambda t: t[:, ::2],
    "rows_within": lambda t: t[:, :, 1:5],
    "columns_within": lambda t: t[..., 2:7],
    "every_second_column": lambda t: t[..., ::2],
    "one_column": lambda t: t[..., 3:4],
    "one_pixel": lambda t: t[:, :, 2:3, 3:4],
    "rows_and_columns_swapped": lambda t: t.transpose(2, 3),
    "samples_and_channels_swapped": lambda t: t.transpose(0, 1),
    "one_sample_expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "one_row_expanded": lambda t: t[:, :, :1].expand(-1, -1, 6, -1),
    "one_channel_expanded": lambda t: t[:, :1].expand(-1, 9, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_views(dtype: torch.dtype, layout: str, view: str) -> None:
    x = VIEWS[view](make_x((4, 24, 8, 9), dtype, layout))
    assert_accurate(x, make_weights(x.shape[1], 6, dtype=dtype), torch.randn(x.shape).to(dtype))


def test_a_view_is_not_copied() -> None:
    x = torch.randn(4, 64, 16, 32).to(memory_format=torch.channels_last)[1:, :, 2:14, 3:25]
    weights = make_weights(64, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x, weights, x, RELU, SIGMOID)
    copies = {"aten::copy_", "aten::clone", "aten::contiguous"}
    assert not copies & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
def test_dout_expanded_sliced_or_in_the_other_layout(dtype: torch.dtype, layout: str) -> None:
    x = make_x((3, 20, 6, 7), dtype, layout)
    weights = make_weights(20, 5, dtype=dtype)
    other = "contiguous" if layout == "channels_last" else "channels_last"
    for dout in (
        torch.randn(()).to(dtype).expand_as(x),
        torch.randn(3, 20, 1, 1).to(dtype).expand_as(x),
        torch.randn(1, 20, 6, 7).to(dtype).expand_as(x),
        make_x((3, 20, 6, 9), dtype, layout)[..., 1:8],
        make_x((3, 20, 6, 7), dtype, other),
    ):
        assert_accurate(x, weights, dout)


@pytest.mark.parametrize("wanted", range(5), ids=["dx", "dw1", "db1", "dw2", "db2"])
def test_output_mask_gives_that_gradient_alone(wanted: int) -> None:
    x = make_x((3, 20, 6, 7), torch.float32, "channels_last")
    dout, (w1, b1, w2, b2) = torch.randn_like(x), make_weights(20, 5)
    _, *saved = torch.ops.kernels_C.se_fwd(x, w1, b1, w2, b2, GELU, SIGMOID)
    every = torch.ops.kernels_C.se_bwd(dout, x, w1, w2, *saved, GELU, SIGMOID, [True] * 5)
    alone = torch.ops.kernels_C.se_bwd(dout, x, w1, w2, *saved, GELU, SIGMOID, [i == wanted for i in range(5)])
    for i, grad in enumerate(alone):
        assert torch.equal(grad, every[i]) if i == wanted else grad.numel() == 0


@pytest.mark.parametrize(
    "shape",
    [(8, 64, 24, 24, 4), (3, 2048, 7, 7, 128), (1, 512, 9, 9, 32), (7, 40, 33, 5, 10), (1, 3, 301, 299, 2)],
    ids=ids,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_equal_for_any_number_of_threads(
    layout: str, shape: tuple[int, ...], set_threads: Callable[[int], None]
) -> None:
    *x_shape, R = shape
    x = make_x(tuple(x_shape), torch.float32, layout)
    weights, dout = make_weights(x.shape[1], R), torch.randn_like(x)
    set_threads(1)
    first = fused(x, weights, dout, SILU, SIGMOID)
    for threads in (1, 2, 2, 5):
        set_threads(threads)
        again = fused(x, weights, dout, SILU, SIGMOID)
        for name, result in first.items():
            assert torch.equal(result, again[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_sums_stay_accurate(layout: str) -> None:
    x = (torch.rand(1, 16, 600, 700) + 10).to(memory_format=LAYOUTS[layout])
    pooled = torch.ops.kernels_C.se_fwd(x, *make_weights(16, 4), RELU, SIGMOID)[1]
    torch.testing.assert_close(pooled, x.double().mean((2, 3)).float(), rtol=2e-7, atol=0)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("shape", [(2, 256, 56, 56), (3, 250, 49, 49), (4, 6016, 7, 7)], ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_large_results(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], set_threads: Callable[[int], None]
) -> None:
    """More than 4 MiB for each thread are written past the caches where the memory is not new, at any alignment."""
    set_threads(1)
    x = make_x(shape, dtype, layout)
    x = torch.cat([x, x]) if dtype == torch.bfloat16 else x
    assert x.nbytes > 4 * 2**20
    dout = torch.randn_like(x) / x.shape[2]  # its sums over (h, w) are of order 1
    weights = make_weights(x.shape[1], 2, dtype=dtype)
    assert_accurate(x, weights, dout)
    into_new_memory = fused(x, weights, dout, RELU, SIGMOID)
    for _ in range(8):
        before = page_faults()
        results = fused(x, weights, dout, RELU, SIGMOID)
        in_old_memory = page_faults() - before < 16
        for name, result in results.items():
            assert torch.equal(result, into_new_memory[name]), name
        del results, result
        if in_old_memory:
            return
    pytest.skip("the allocator hands out new memory every time")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_nan_and_infinity_are_carried_as_in_eager(dtype: torch.dtype, layout: str) -> None:
    x, dout = make_x((4, 20, 3, 5), dtype, layout), make_x((4, 20, 3, 5), dtype, layout)
    x[0, 3, 1, 2], x[1, 4, 0, 0], x[2, 19, 2, 4] = float("nan"), float("inf"), -float("inf")
    dout[3, 17, 0, 1] = float("nan")
    weights = make_weights(20, 5, dtype=dtype)
    results = fused(x, weights, dout, RELU, SIGMOID)
    for name, expected in by_autograd(x, weights, dout, RELU, SIGMOID).items():
        assert torch.equal(results[name].isnan(), expected.isnan()), name
        assert torch.equal(results[name].isinf(), expected.isinf()), name


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(1, 2**10, 8, 8)
    gate_zero = Weights(torch.zeros(1, 2**10), None, torch.zeros(2**10, 1), torch.rand(2**10))
    finite = torch.where(x.abs() < 1e30, x, 0)  # larger ones have no finite mean
    out, _, _, gate = torch.ops.kernels_C.se_fwd(finite, *gate_zero, RELU, SIGMOID)
    assert torch.equal(out, (finite.float() * gate[:, :, None, None]).bfloat16())
    out = torch.ops.kernels_C.se_fwd(x, *gate_zero, RELU, SIGMOID)[0]
    assert out[x.isnan()].isnan().all()


def test_sigmoid_from_tail_to_tail() -> None:
    z = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    w1, w2 = torch.zeros(1, len(z)), torch.zeros(len(z), 1)
    gate = torch.ops.kernels_C.se_fwd(torch.zeros(1, len(z), 1, 1), w1, None, w2, z, RELU, SIGMOID)[3]
    torch.testing.assert_close(gate[0], z.double().sigmoid().float(), rtol=5e-7, atol=1e-37, equal_nan=True)


def test_empty_batch() -> None:
    x = torch.randn(0, 8, 3, 3)
    results = fused(x, make_weights(8, 2), x, RELU, SIGMOID)
    assert results["out"].shape == results["dx"].shape == (0, 8, 3, 3)
    for name in ("dw1", "db1", "dw2", "db2"):
        assert results[name].count_nonzero() == 0


X, W1, W2 = torch.zeros(2, 8, 3, 3), torch.zeros(4, 8), torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], W1, None, W2, None, 0, 0), r"x must have shape \(N, C, H, W\), got \[8, 3, 3\]"),
        ((X.int(), W1, None, W2, None, 0, 0), r"x must be float32.* got Int"),
        ((X[:, :, :0], W1, None, W2, None, 0, 0), r"x must have C, H and W of at least 1, got shape \[2, 8, 0, 3\]"),
        ((X, W1[:, :7], None, W2, None, 0, 0), r"w1 must have shape \(R, C\) = \[4, 8\], got \[4, 7\]"),
        ((X, W1[:0], None, W2, None, 0, 0), r"w1 must have shape \(R, C\) with R of at least 1, got \[0, 8\]"),
        ((X, W1, None, W2.T, None, 0, 0), r"w2 must have shape \(C, R\) = \[8, 4\], got \[4, 8\]"),
        ((X, W1, torch.zeros(5), W2, None, 0, 0), r"b1 must have shape \(R,\) = \[4\], got \[5\]"),
        ((X, W1, None, W2, torch.zeros(4), 0, 0), r"b2 must have shape \(C,\) = \[8\], got \[4\]"),
        ((X, W1.int(), None, W2, None, 0, 0), r"w1 must be float32.* got Int"),
        ((X, W1, None, W2, None, 3, 0), r"act must be 0 \(relu\), 1 \(silu\) or 2 \(gelu\), got 3"),
        ((X, W1, None, W2, None, 0, -1), r"gate_fn must be 0 \(sigmoid\) or 1 \(hardsigmoid\), got -1"),
    ],
)
def test_bad_input_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.kernels_C.se_fwd(*arguments)


def test_bad_input_of_the_backward_pass_is_named() -> None:
    _, pooled, hidden, gate = torch.ops.kernels_C.se_fwd(X, W1, None, W2, None, 0, 0)

    def backward(dout: Tensor, gate: Tensor) -> None:
        torch.ops.kernels_C.se_bwd(dout, X, W1, W2, pooled, hidden, gate, 0, 0, [True] * 5)

    with pytest.raises(ValueError, match=r"dout must have shape \(N, C, H, W\) = \[2, 8, 3, 3\], got \[2, 8, 3, 4\]"):
        backward(torch.zeros(2, 8, 3, 4), gate)
    with pytest.raises(ValueError, match=r"dout must be Float, got Double"):
        backward(X.double(), gate)
    with pytest.raises(ValueError, match=r"gate must have shape \(N, C\) = \[2, 8\], got \[2, 7\]"):
        backward(X, gate[:, :7])
