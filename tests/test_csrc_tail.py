"""What is special to the residual tail in C++: layouts, views, threads, instruction sets, the mask, rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.norms import FixedNorm
from kernels.norms import Norm as GivenNorm
from kernels.residual_tail import SE, How, Saved, residual_tail_reference
from kernels.statistics import MEAN, UNBIASED_VAR
from tests import tail_formula
from tests.se_cases import LAYOUTS, ids

pytest.importorskip("kernels._C", reason="csrc is not built", exc_type=ImportError)

from kernels import tail_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAVED = ("out", "mask", "stats", "stats2", "deviation", "pooled", "hidden", "gate")
GRADIENTS = ("dy", "dresidual", "dweight", "dbias", "dw1", "db1", "dw2", "db2", "dweight2", "dbias2")
#         N, C, H, W
SHAPES = [(2, 1, 3, 3), (3, 9, 1, 1), (5, 64, 4, 4), (2, 130, 17, 13), (1, 3, 100, 90), (6, 2100, 3, 3), (7, 33, 2, 1)]


class Case(NamedTuple):
    y: Tensor
    norm: FixedNorm
    se: SE | None
    residual: Tensor | None
    residual_norm: FixedNorm | None
    act: str
    dout: Tensor

    def forward(self, backend=tail_cpu) -> tuple[Tensor, ...]:
        return backend.tail_fwd(*self[:6])

    def saved(self, outputs: tuple[Tensor, ...]) -> Saved:
        kept = self.residual if self.residual_norm is not None or self.act == "silu" else None
        weights = (None, None) if self.se is None else self.se[:2]
        return Saved(self.y, kept, *weights, *outputs[1:])

    def how(self) -> How:
        second = self.residual_norm
        functions = ("relu", "sigmoid") if self.se is None else self.se[4:]
        trained = (self.norm.mean is None, second is not None and second.mean is None)
        return How(self.residual is not None, *trained, "", "", self.act, *functions)

    def wanted(self) -> list[bool]:
        with_se, with_second = self.se is not None, self.residual_norm is not None
        return [True, self.residual is not None, True, True, *[with_se] * 4, *[with_second] * 2]

    def backward(self, outputs: tuple[Tensor, ...], backend=tail_cpu) -> tuple[Tensor, ...]:
        return backend.tail_bwd(self.dout, self.saved(outputs), self.how(), self.wanted())

    def results(self, backend=tail_cpu) -> dict[str, Tensor]:
        outputs = self.forward(backend)
        return dict(zip((*SAVED, *GRADIENTS), (*outputs, *self.backward(outputs, backend)), strict=True))


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "channels_last",
    *,
    residual: str | None = "plain",
    se: bool = True,
    act: str = "relu",
    training: bool = True,
    shift: float = 0.0,
    parameters: torch.dtype | None = None,
) -> Case:
    C, R, wide = shape[1], 5, parameters or (torch.float64 if dtype == torch.float64 else torch.float32)

    def activation() -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).to(memory_format=LAYOUTS[layout])

    def norm() -> FixedNorm:
        given = (None, None) if training else (torch.randn(C, dtype=wide), 0.5 + torch.rand(C, dtype=wide))
        return FixedNorm(torch.randn(C, dtype=wide), torch.randn(C, dtype=wide), *given, 1e-5, "")

    sizes = ((R, C), (C, R), (R,), (C,))
    layers = [torch.randn(size, dtype=torch.float64).to(parameters or dtype) / size[-1] ** 0.5 for size in sizes]
    return Case(
        (activation() + shift).to(memory_format=LAYOUTS[layout]),
        norm(),
        SE(*layers, "silu", "sigmoid") if se else None,
        None if residual is None else activation(),
        norm() if residual == "norm" else None,
        act,
        activation(),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_as_formula(case: Case, tolerance: float = 1e-12) -> None:
    expected = case.results(tail_formula)
    for name, actual in case.results().items():
        assert actual.dtype == expected[name].dtype, name
        assert actual.shape == expected[name].shape, name
        # sums over many values that cancel are as exact as their largest term
        scale = max(1.0, expected[name].abs().max().item()) if expected[name].numel() else 1.0
        torch.testing.assert_close(
            actual, expected[name], rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("se", (True, False), ids=("se", "no_se"))
@pytest.mark.parametrize("residual", (None, "plain", "norm"))
@pytest.mark.parametrize("act", ("relu", "silu", "identity"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_switch(layout: str, act: str, residual: str | None, se: bool, training: bool) -> None:
    shape = (4, 20, 5, 7)
    assert_as_formula(make_case(shape, torch.float64, layout, residual=residual, se=se, act=act, training=training))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("residual", (None, "plain", "norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_shapes(layout: str, residual: str | None, shape: tuple[int, ...]) -> None:
    assert_as_formula(make_case(shape, torch.float64, layout, residual=residual), tolerance=1e-11)


@pytest.mark.parametrize("act", ("relu", "silu", "identity"))
@pytest.mark.parametrize("residual", (None, "plain", "norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(layout: str, residual: str | None, act: str) -> None:
    case = make_case((3, 37, 9, 5), torch.float32, layout, residual=residual, act=act)
    # the ReLU's sign of a value near 0 is a matter of rounding
    assert_as_formula(case, tolerance=2e-5)


@pytest.mark.parametrize("shape", [(3, 37, 9, 5), (2, 256, 4, 4), (2, 100, 7, 7), (1, 5, 1, 1)], ids=ids)
@pytest.mark.parametrize("residual", ("plain", "norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_mask_says_what_the_rounded_result_passes(
    dtype: torch.dtype, layout: str, residual: str, shape: tuple[int, ...]
) -> None:
    case = make_case(shape, dtype, layout, residual=residual, training=shape[0] > 1)
    case.residual[:, ::3] = 0
    tiny = {torch.float16: 1e-8, torch.bfloat16: 1e-40}.get(dtype, 1.0)  # some round to 0
    case = case._replace(norm=case.norm._replace(weight=case.norm.weight * tiny, bias=case.norm.bias * tiny))
    if residual == "plain":
        case.residual.mul_(tiny)
    out, mask, *_ = case.forward()
    assert torch.equal(mask, tail_formula.pack(out > 0, case.y))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_sign_is_recomputed_as_the_forward_pass_rounded_it(dtype: torch.dtype, layout: str) -> None:
    case = make_case((3, 40, 9, 5), dtype, layout, residual=None, training=False)
    tiny = {torch.float16: 1e-8, torch.bfloat16: 1e-40}.get(dtype, 1.0)
    case = case._replace(norm=case.norm._replace(bias=case.norm.bias * tiny), dout=torch.ones_like(case.dout))
    case = case._replace(se=None, norm=case.norm._replace(weight=case.norm.weight * tiny))
    outputs = case.forward()
    # where the scale is too small to be seen in dy, dbias counts what passed
    dbias = case.backward(outputs)[3]
    assert torch.equal(dbias, (outputs[0] > 0).sum((0, 2, 3)).to(dbias.dtype))


@pytest.mark.parametrize("residual", (None, "plain", "norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_nan_and_infinity_are_carried_as_in_eager(dtype: torch.dtype, layout: str, residual: str | None) -> None:
    case = make_case((4, 20, 3, 5), dtype, layout, residual=residual, se=False, training=False)
    case.y[0, 3, 1, 2], case.y[1, 4, 0, 0], case.y[2, 19, 2, 4] = float("nan"), float("inf"), -float("inf")
    case.dout[3, 17, 0, 1], case.dout[0, 3, 1, 2] = float("nan"), 2.0
    leaves = [t.detach().clone().requires_grad_() for t in (case.y, case.residual) if t is not None]

    def norm(given: FixedNorm) -> GivenNorm:
        return GivenNorm(given.mean, given.var, given.weight, given.bias, eps=given.eps)

    second = None if case.residual_norm is None else norm(case.residual_norm)
    right = leaves[1] if residual else None
    out = residual_tail_reference(leaves[0], norm(case.norm), None, right, second, "relu")
    expected = (out.detach(), *torch.autograd.grad(out, leaves, case.dout))
    results = case.results()
    for name, t in zip(("out", "dy", "dresidual"), expected, strict=False):
        assert torch.equal(results[name].isnan(), t.isnan()), name
        assert torch.equal(results[name].isinf(), t.isinf()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_infinity_are_those_of_eager(layout: str) -> None:
    case = make_case((4, 20, 3, 5), torch.float32, layout, se=False)
    case.y[0, 0, 0, 0], case.y[1, 4, 0, 0], case.y[2, 19, 2, 4] = float("nan"), float("inf"), -float("inf")
    stats = case.forward()[2]
    mean, var = torch.zeros(20), torch.zeros(20)
    torch.nn.functional.batch_norm(case.y, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(stats[MEAN], mean, equal_nan=True)
    torch.testing.assert_close(stats[UNBIASED_VAR], var, equal_nan=True)


@pytest.mark.parametrize("shape", [(8, 64, 24, 24), (2, 33, 50, 51), (16, 256, 2, 2)], ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=ids)
def test_a_mean_of_10000_deviations_costs_the_variance_nothing(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...]
) -> None:
    y = (torch.randn(shape, dtype=torch.float64) + 1e4).to(dtype).to(memory_format=LAYOUTS[layout])
    norm = FixedNorm(None, None, None, None, 1e-5, "")
    stats = tail_cpu.tail_fwd(y, norm, None, None, None, "identity")[2]
    exact = y.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(stats[MEAN].double(), exact.mean(1), rtol=6e-8, atol=0)
    torch.testing.assert_close(stats[UNBIASED_VAR].double(), exact.var(1), rtol=1e-6, atol=0)


def test_a_constant_channel_has_no_variance() -> None:
    for layout, value in itertools.product(LAYOUTS.values(), (0.1, 12345.678)):
        y = torch.full((3, 5, 7, 3), value).to(memory_format=layout)
        stats = tail_cpu.tail_fwd(y, FixedNorm(None, None, None, None, 1e-5, ""), None, None, None, "relu")[2]
        assert stats[UNBIASED_VAR].abs().max() <= 1e-12 * value**2
        assert torch.equal(stats[MEAN], y[0, :, 0, 0])


@pytest.mark.parametrize(
    "shape", [(8, 64, 24, 24), (3, 2048, 7, 7), (1, 512, 9, 9), (7, 40, 33, 5), (40, 320, 2, 2)], ids=ids
)
@pytest.mark.parametrize("residual", (None, "norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bitwise_equal_for_any_number_of_threads(
    layout: str, residual: str | None, shape: tuple[int, ...], set_threads: Callable[[int], None]
) -> None:
    case = make_case(shape, torch.float32, layout, residual=residual, se=residual is None)
    set_threads(1)
    first = case.results()
    for threads in (1, 2, 3):
        set_threads(threads)
        for name, again in case.results().items():
            assert torch.equal(again, first[name]), f"{name} with {threads} threads"


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every_second_sample": lambda t: t[::2],
    "channels_within": lambda t: t[:, 3:20],
    "every_second_channel": lambda t: t[:, ::2],
    "rows_within": lambda t: t[:, :, 1:5],
    "columns_within": lambda t: t[..., 2:7],
    "every_second_column": lambda t: t[..., ::2],
    "one_column": lambda t: t[..., 3:4],
    "one_pixel": lambda t: t[:, :, 2:3, 3:4],
    "rows_and_columns_swapped": lambda t: t.transpose(2, 3),
    "one_sample_expanded": lambda t: t[:1].expand(3, -1, -1, -1),
    "one_row_expanded": lambda t: t[:, :, :1].expand(-1, -1, 6, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str, view: str) -> None:
    def seen(t: Tensor) -> Tensor:
        return VIEWS[view](t)

    whole = make_case((4, 24, 8, 9), torch.float64, layout, residual="norm")
    shape = seen(whole.y).shape
    case = make_case(tuple(shape), torch.float64, layout, residual="norm")
    assert_as_formula(case._replace(y=seen(whole.y), residual=seen(whole.residual), dout=seen(whole.dout)), 1e-10)


def test_a_view_is_not_copied() -> None:
    whole = make_case((4, 64, 16, 32))

    def seen(t: Tensor) -> Tensor:
        return t[1:, :, 2:14, 3:25]

    case = whole._replace(y=seen(whole.y), residual=seen(whole.residual), dout=seen(whole.dout))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.results()
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_and_dout_of_other_strides(layout: str) -> None:
    case = make_case((3, 20, 6, 7), torch.float64, layout, act="silu")
    other = LAYOUTS["contiguous" if layout == "channels_last" else "channels_last"]
    dout, residual = case.dout, case.residual
    for given, shortcut in (
        (torch.randn((), dtype=torch.float64).expand_as(dout), residual.contiguous(memory_format=other)),
        (torch.randn(3, 20, 1, 1, dtype=torch.float64).expand_as(dout), residual[:1].expand_as(dout)),
        (dout.contiguous(memory_format=other), torch.cat((residual, residual), 3)[..., 3:10]),
    ):
        assert_as_formula(case._replace(dout=given, residual=shortcut))


@pytest.mark.parametrize("parameters", DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_parameters_of_another_dtype(dtype: torch.dtype, parameters: torch.dtype) -> None:
    case = make_case((3, 32, 4, 4), dtype, residual="norm", act="identity", parameters=parameters)
    expected = case.results(tail_formula)
    eps = max(torch.finfo(dtype).eps, torch.finfo(parameters).eps if dtype != torch.float64 else 0)
    for name, actual in case.results().items():
        assert actual.dtype == expected[name].dtype, name
        tolerance = max(4 * max(eps, torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0), 1e-12)
        scale = expected[name].abs().max().item() if expected[name].numel() else 0.0
        torch.testing.assert_close(actual, expected[name], rtol=tolerance, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("wanted", range(10), ids=GRADIENTS)
def test_output_mask_gives_that_gradient_alone(wanted: int, training: bool) -> None:
    case = make_case((3, 20, 6, 7), residual="norm", training=training)
    outputs = case.forward()
    every = case.backward(outputs)
    alone = tail_cpu.tail_bwd(case.dout, case.saved(outputs), case.how(), [i == wanted for i in range(10)])
    for i, gradient in enumerate(alone):
        assert torch.equal(gradient, every[i]) if i == wanted else gradient.numel() == 0


@pytest.mark.parametrize("se", (True, False), ids=("se", "no_se"))
def test_in_two_halves_for_ranks_as_in_one(se: bool) -> None:
    case = make_case((3, 20, 6, 7), residual="norm", se=se)
    outputs = case.forward()
    whole = case.backward(outputs)
    arguments = (case.dout, *case.saved(outputs), True, True, True, 0, 1, 0, case.wanted())
    q, _, *parameters = torch.ops.kernels_C.tail_bwd_sums(*arguments)
    shares = torch.stack((*parameters[:2], *parameters[6:])).double() / (3 * 6 * 7)
    halves = (*torch.ops.kernels_C.tail_bwd_grads(*arguments, q, shares.float()), *parameters)
    for name, half, one in zip(GRADIENTS, halves, whole, strict=True):
        torch.testing.assert_close(half, one, msg=lambda m, name=name: f"{name}: {m}")

    mean, m2, sample_mean = torch.ops.kernels_C.tail_moments(case.y, True)
    exact = case.y.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(m2, exact.var((0, 2, 3), correction=0) * (3 * 6 * 7), rtol=1e-6, atol=0)
    torch.testing.assert_close(sample_mean, exact.mean((2, 3)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=ids)
def test_large_results_are_the_same_in_new_and_in_old_memory(
    dtype: torch.dtype, layout: str, set_threads: Callable[[int], None]
) -> None:
    """More than 4 MiB for each thread are written past the caches, where the memory is not new."""
    set_threads(1)
    case = make_case((4 if dtype == torch.bfloat16 else 2, 256, 56, 56), dtype, layout)
    assert case.y.nbytes > 4 * 2**20
    first = case.results()
    small = case._replace(y=case.y[:1], residual=case.residual[:1], dout=case.dout[:1])
    for _ in range(3):
        for name, again in case.results().items():
            assert torch.equal(again, first[name]), name
    given = first["stats"]
    fixed = case.norm._replace(mean=given[MEAN], var=torch.ones_like(given[MEAN]))
    of_all, of_one = (c._replace(norm=fixed).forward()[0] for c in (case, small))
    assert torch.equal(of_all[:1], of_one)


CASE = make_case((2, 8, 3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(0, 8, 3, 3)}, r"y must have shape \(N, C, H, W\) and elements, got \[0, 8, 3, 3\]"),
        ({"residual": torch.zeros(2, 8, 3, 4)}, r"residual must have shape \(N, C, H, W\) = \[2, 8, 3, 3\]"),
        ({"residual": torch.zeros(2, 8, 3, 3).double()}, r"residual must be Float, got Double"),
        ({"se": CASE.se._replace(w1=torch.zeros(5, 7))}, r"w1 must have shape \(R, C\) = \[5, 8\], got \[5, 7\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASE._replace(**change).forward()


def test_bad_input_of_the_backward_pass_is_named() -> None:
    saved = CASE.saved(CASE.forward())
    with pytest.raises(ValueError, match=r"dout must have shape \(N, C, H, W\) = \[2, 8, 3, 3\], got \[2, 8, 3, 4\]"):
        tail_cpu.tail_bwd(torch.zeros(2, 8, 3, 4), saved, CASE.how(), CASE.wanted())
    with pytest.raises(ValueError, match=r"mask must have shape .* = \[2, 9, 1\], got \[2, 9\]"):
        tail_cpu.tail_bwd(CASE.dout, saved._replace(mask=saved.mask[..., 0]), CASE.how(), CASE.wanted())
