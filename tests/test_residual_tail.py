"""`residual_tail` in every backend against BatchNorm, SE, addition and activation one after another."""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any

import pytest
import torch

from kernels import BackendUnavailable
from kernels.norms import Norm
from kernels.residual_tail import SE, residual_tail
from tests import tail_formula
from tests.backends import DEVICES, TAIL_MODULES, TAILED, param, watch
from tests.se_cases import LAYOUTS, in_dtypes_and_layouts
from tests.tail_cases import Tail, check_parity, make_tail, value_and_gradients

TAILS: dict[str, dict[str, Any]] = {
    "norm": {"se": False, "residual": None, "act": "identity"},
    "norm_relu": {"se": False, "residual": None},
    "norm_add_relu": {"se": False},
    "norm_se_relu": {"residual": None},
    "norm_se_add_relu": {},
    "norm_se_add_norm_relu": {"residual": "norm"},
    "norm_add_norm_relu": {"se": False, "residual": "norm"},
    "norm_se_add_silu": {"act": "silu", "se_act": "silu"},
    "norm_silu": {"se": False, "residual": None, "act": "silu"},
    "norm_se_add_norm_silu": {"residual": "norm", "act": "silu", "gate": "hardsigmoid"},
    "norm_se_add_identity": {"act": "identity", "se_act": "gelu", "biases": False},
}
SHAPES = {  # (N, C, H, W, R)
    "odd": (3, 67, 5, 9, 9),
    "one_pixel": (7, 70, 1, 1, 11),
    "one_sample": (1, 88, 7, 5, 11),
    "one_channel": (4, 1, 9, 8, 1),
    "one_column": (3, 57, 23, 1, 13),
    "many_samples": (37, 12, 2, 2, 17),
    "several_blocks": (2, 258, 7, 11, 40),
}
PLAIN = (3, 64, 5, 6, 8)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch(monkeypatch)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize(("backend", "dtype", "layout"), in_dtypes_and_layouts(TAILED), ids=str)
def test_values_gradients_and_running_statistics(backend, tail, training, dtype, layout, ran):
    actual = check_parity(make_tail(PLAIN, dtype, backend, layout=layout, training=training, **tail), backend)
    assert ran == [f"tail_fwd:{backend}", f"tail_bwd:{backend}"]
    for name in ("out", "dy"):
        assert actual[name].is_contiguous(memory_format=LAYOUTS[layout])


def taken_by(backend: Any, shape: str, tail: str, layout: str) -> bool:
    """Every one, but of those that take the interpreter longest the ones that launch the most kernels."""
    if backend != "triton":
        return True
    seldom = shape in ("one_pixel", "many_samples", "several_blocks") and tail == "norm_relu"
    return not seldom and (tail == "norm_se_add_relu") == (layout == "contiguous")


@pytest.mark.parametrize(
    ("backend", "shape", "tail", "layout"),
    [
        param(backend, shape, tail, layout)
        for backend, shape, tail, layout in itertools.product(
            TAILED, SHAPES, ("norm_relu", "norm_se_add_relu", "norm_se_add_norm_relu"), LAYOUTS
        )
        if taken_by(backend, shape, tail, layout)
    ],
)
def test_shapes(backend, shape, tail, layout):
    check_parity(make_tail(SHAPES[shape], torch.float32, backend, layout=layout, **TAILS[tail]), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("implementation", ("cpu", "formula"))
def test_gradcheck(implementation, training, tail, layout, monkeypatch):
    if implementation == "formula":
        module = importlib.import_module("kernels.residual_tail")  # as an attribute of kernels it is the function
        monkeypatch.setattr(module, "backend_module", lambda backend: tail_formula)
    case = make_tail((2, 3, 3, 2, 2), torch.float64, layout=layout, training=training, **tail).leaves()
    fixed = {name: t.detach() for name, t in case.running().items()}

    def run(*_: torch.Tensor) -> torch.Tensor:
        for name, t in case.running().items():  # each run finds what the first one found
            t.copy_(fixed[name])
        return residual_tail(case.y, case.norm, **case.options(), backend="cpu")

    assert torch.autograd.gradcheck(run, tuple(case.differentiable().values()), nondet_tol=0)


@pytest.mark.parametrize("backend", TAILED)
def test_parameters_wider_than_the_activations(backend):
    """As under autocast: the parameters keep their dtype, and so do their gradients and the running statistics."""
    tail = make_tail(PLAIN, torch.bfloat16, backend, residual="norm", parameters=torch.float32)
    got = value_and_gradients(tail, backend)
    exact = value_and_gradients(tail.to(torch.float64), "eager")
    for name, t in got.items():
        if name in ("out", "dy", "dresidual"):
            assert t.dtype == torch.bfloat16, name
        else:
            torch.testing.assert_close(t, exact[name].float(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def textbook_variance(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean((0, 2, 3)) - y.mean((0, 2, 3)).square()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", TAILED)
def test_a_mean_of_1e4_standard_deviations(backend, layout):
    """In float32, where E[y^2] - E[y]^2 has no correct digit left; and no worse than eager anywhere."""
    tail = make_tail((4, 24, 10, 10, 8), torch.float32, backend, layout=layout, shift=1e4)
    exact = tail.y.double().var((0, 2, 3), correction=0).float()
    assert (textbook_variance(tail.y) - exact).abs().max() > 0.5
    tail.norm = tail.norm._replace(momentum=1.0)
    actual, eager = value_and_gradients(tail, backend), value_and_gradients(tail, "eager")
    for name, correct in value_and_gradients(tail.to(torch.float64), "eager").items():
        error, eagers = ((got[name] - correct).abs().max() for got in (actual, eager))
        assert error <= 2 * eagers + 6e-8 * correct.abs().max(), f"{name}: {error}, eager {eagers}"
    torch.testing.assert_close(actual["running_var"], exact * (400 / 399), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tail", ("norm_relu", "norm_se_add_relu"))
@pytest.mark.parametrize("backend", TAILED)
def test_a_constant_channel(backend, tail):
    case = make_tail(PLAIN, torch.float32, backend, **TAILS[tail])
    case.y[:, 5] = 3.0
    case.dout[:, 5] *= 1e-3  # its gradient is magnified by 1 / sqrt(eps)
    got = check_parity(case, backend)
    assert got["running_var"][5] == 0.9 * case.norm.running_var[5]


@pytest.mark.parametrize("tail", ("norm_relu", "norm_se_add_norm_relu"))
@pytest.mark.parametrize("backend", TAILED)
@pytest.mark.parametrize("options", ({"affine": False}, {"tracked": False}), ids=("not_affine", "not_tracked"))
def test_without_parameters_or_running_statistics(backend, options, tail):
    check_parity(make_tail(PLAIN, torch.float32, backend, **TAILS[tail], **options), backend)


@pytest.mark.parametrize("backend", TAILED)
def test_momentum_may_be_a_tensor(backend):
    tail = make_tail(PLAIN, torch.float32, backend)
    number = value_and_gradients(tail, backend)
    tail.norm = tail.norm._replace(momentum=torch.tensor(0.1, device=tail.y.device))
    tensor = value_and_gradients(tail, backend)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(tensor[name], number[name])


@pytest.mark.parametrize("backend", TAILED)
def test_evaluation_leaves_the_running_statistics(backend):
    tail = make_tail(PLAIN, torch.float32, backend, training=False)
    got = value_and_gradients(tail, backend)
    assert torch.equal(got["running_mean"], tail.norm.running_mean)
    assert torch.equal(got["running_var"], tail.norm.running_var)


@pytest.mark.parametrize("frozen", ("norm", "residual_norm"))
@pytest.mark.parametrize("backend", TAILED)
def test_one_norm_in_training_and_the_other_not(backend, frozen):
    tail = make_tail(PLAIN, torch.float32, backend, residual="norm")
    setattr(tail, frozen, getattr(tail, frozen)._replace(training=False))
    check_parity(tail, backend)


VIEWS = {
    "rows and columns": lambda x: x[:, :, 1:, 2:7],
    "every other channel": lambda x: x[:, ::2],
    "contiguous, cut": lambda x: x.contiguous()[:, :, 2:, 1:-1],
    "transposed": lambda x: x.contiguous().transpose(2, 3),
    "one element into its storage": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


def cut_to(tail: Tail, y: torch.Tensor) -> Tail:
    C = y.shape[1]
    norm = Norm(*(t[:C] if isinstance(t, torch.Tensor) else t for t in tail.norm))
    w1, w2, b1, b2, *names = tail.se
    return Tail(y, norm, SE(w1[:, :C], w2[:C], b1, b2[:C], *names), y.roll(1, 1), None, "silu", y.roll(2, 1) / 4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("backend", TAILED)
def test_views_are_read_in_place(backend, view, dtype):
    tail = make_tail((2, 28, 9, 8, 6), dtype, backend)
    case = cut_to(tail, view(tail.y))
    before = case.y.clone()
    leaves = case.leaves()
    leaves.y = case.y.detach().requires_grad_()  # leaves() copies, and this is about y's own memory
    out = residual_tail(leaves.y, leaves.norm, **leaves.options(), backend=backend)
    (dy,) = torch.autograd.grad(out, leaves.y, case.dout)
    assert torch.equal(case.y, before)
    expected = check_parity(case, backend)
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(dy, expected["dy"])


@pytest.mark.parametrize("backend", TAILED)
@pytest.mark.parametrize("strides", ((70, 1, 1, 1), (70, 1, 70, 70), (70, 1, 3, 5)), ids=str)
def test_a_single_pixel_is_channels_last_whatever_its_strides_say(backend, strides):
    tail = make_tail((7, 70, 1, 1, 11), torch.float32, backend)
    tail.y = torch.as_strided(tail.y.contiguous(), tail.y.shape, strides)
    actual = check_parity(tail, backend)
    assert actual["out"].stride() == actual["dy"].stride() == (70, 1, 70, 70)


@pytest.mark.parametrize("backend", TAILED)
def test_expanded_and_foreign_gradients_and_residuals(backend):
    tail = make_tail((2, 40, 6, 5, 20), torch.float32, backend, act="silu")
    for dout in (
        torch.ones_like(tail.dout[:1, :1, :1, :1]).expand(tail.dout.shape),
        tail.dout[:, :, :1, :1].expand(tail.dout.shape),
        tail.dout.contiguous(),
        tail.dout.repeat(1, 2, 1, 2)[:, 1::2, :, 1:6],
    ):
        leaves = tail.leaves()
        out = residual_tail(leaves.y, leaves.norm, **leaves.options(), backend=backend)
        expected = torch.autograd.grad(out, leaves.y, dout.clone(), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(out, leaves.y, dout), expected)
    for layout in LAYOUTS.values():
        tail.residual = tail.residual.contiguous(memory_format=layout)
        check_parity(tail, backend)


@functools.cache
def small_tail(backend: str) -> tuple[Tail, dict[str, torch.Tensor]]:
    """A tail, and all its gradients."""
    tail = make_tail((2, 32, 4, 4, 4), torch.float32, backend, residual="norm")
    return tail, value_and_gradients(tail, backend)


@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("backend", TAILED)
def test_only_the_gradients_asked_for(backend, position, monkeypatch):
    tail, full = small_tail(backend)
    name = ("y", "residual", "weight", "bias", "w1", "b1", "w2", "b2", "weight2", "bias2")[position]
    masks = []
    call = TAIL_MODULES[backend].tail_bwd
    monkeypatch.setattr(TAIL_MODULES[backend], "tail_bwd", lambda *args: masks.append(args[-1]) or call(*args))
    leaves = tail.leaves()
    for other, t in leaves.differentiable().items():
        t.requires_grad_(other == name)
    out = residual_tail(leaves.y, leaves.norm, **leaves.options(), backend=backend)
    (gradient,) = torch.autograd.grad(out, leaves.differentiable()[name], tail.dout)
    assert torch.equal(gradient, full[f"d{name}"])
    assert masks == [[i == position for i in range(10)]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", TAILED)
def test_repeats_are_bitwise_equal(backend, layout):
    tail = make_tail((3, 40, 9, 7, 5), torch.bfloat16, backend, layout=layout, residual="norm")
    first = value_and_gradients(tail, backend)
    for _ in range(2 if backend == "triton" else 30):
        again = value_and_gradients(tail, backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("tail", ("norm_relu", "norm_se_add_relu", "norm_se_add_norm_silu"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")), ids=str)
@pytest.mark.parametrize("backend", TAILED)
def test_nan_and_inf_are_carried_as_eager_carries_them(backend, value, tail, training):
    case = make_tail((3, 24, 4, 4, 4), torch.float32, backend, training=training, **TAILS[tail])
    case.y[1, 5, 2, 2] = value
    got, eager = value_and_gradients(case, backend), value_and_gradients(case, "eager")
    for name in got:
        assert torch.equal(got[name].isfinite(), eager[name].isfinite()), name
        torch.testing.assert_close(got[name], eager[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.fixture
def poisoned():
    """Memory fresh from the allocator holds NaN, in Python and in C++."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # eager's products on a GPU are not
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", ("norm_relu", "norm_se_add_norm_relu", "norm_se_add_silu"))
@pytest.mark.parametrize(
    ("backend", "shape"),
    [*(param(b, "odd") for b in TAILED), param("cpu", "one_pixel"), param("cpu", "one_column")],
)
def test_no_memory_is_read_that_was_not_written(backend, shape, tail, layout, poisoned):
    check_parity(make_tail(SHAPES[shape], torch.float32, backend, layout=layout, **TAILS[tail]), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tail", "activations"), (("norm_relu", 1), ("norm_se_add_relu", 1 + 1 / 16)))
@pytest.mark.parametrize("backend", TAILED)
def test_what_is_saved_for_the_backward_pass(backend, tail, activations, layout):
    """y and, where a residual was added, one bit an element; besides these only what has C or R columns."""
    case = make_tail((4, 64, 16, 16, 4), torch.bfloat16, backend, layout=layout, **TAILS[tail]).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        residual_tail(case.y, case.norm, **case.options(), backend=backend)
    large = [t for t in saved if t.numel() > 5 * 64]
    assert sum(t.nbytes for t in large) == activations * case.y.nbytes
    assert all(t.numel() <= 5 * 64 for t in saved if not any(t is other for other in large))


@pytest.mark.parametrize("backend", (*TAILED, "eager"))
def test_one_value_per_channel_raises_what_pytorch_raises(backend):
    tail = make_tail((1, 8, 1, 1, 2), torch.float32, "cpu" if backend == "eager" else backend, act="identity")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size") as e:
        residual_tail(tail.y, tail.norm, se=tail.se, backend=backend)
    with pytest.raises(ValueError) as theirs:
        torch.nn.BatchNorm2d(8).to(tail.y.device)(tail.y)
    assert str(e.value) == str(theirs.value)
    evaluated = residual_tail(tail.y, tail.norm._replace(training=False), se=tail.se, backend=backend)
    assert evaluated.isfinite().all()


@pytest.mark.parametrize("backend", TAILED)
def test_empty_batch(backend):
    case = make_tail((0, 24, 6, 5, 4), torch.float32, backend, training=False, act="silu").leaves()
    out = residual_tail(case.y, case.norm, **case.options(), backend=backend)
    gradients = torch.autograd.grad(out.sum(), list(case.differentiable().values()))
    assert out.shape == (0, 24, 6, 5)
    assert not any(g.any() for g in gradients)


def bad_calls():
    good = make_tail((2, 8, 3, 3, 2))
    y, norm, se, residual = good.y, good.norm, good.se, good.residual
    yield "y of three dimensions", (y[0], norm), {}, r"y must be \(N, C, H, W\)"
    yield "no pixel", (y[:, :, :0], norm), {}, "at least one channel and one pixel"
    yield "integers", (y.long(), norm), {}, "y must be floating point"
    yield "weight of other channels", (y, norm._replace(weight=torch.ones(4))), {}, r"norm.weight must be \(8,\)"
    yield "running_var of other channels", (y, norm._replace(running_var=torch.ones(9))), {}, "norm.running_var must be"
    yield "bias elsewhere", (y, norm._replace(bias=torch.ones(8, device="meta"))), {}, "norm.bias is on meta"
    no_statistics = norm._replace(running_mean=None, running_var=None, training=False)
    yield "no statistics in evaluation", (y, no_statistics), {}, "needs training=True"
    yield "residual of another shape", (y, norm), {"residual": residual[:1]}, r"residual must be \(2, 8, 3, 3\)"
    yield "residual of another dtype", (y, norm), {"residual": residual.bfloat16()}, "residual is torch.bfloat16"
    yield "norm of no residual", (y, norm), {"residual_norm": norm}, "residual is not"
    yield "unknown act", (y, norm), {"act": "tanh"}, "act='tanh'"
    yield "unknown gate", (y, norm), {"se": se._replace(gate="softmax")}, "gate='softmax'"
    yield "w1 of other channels", (y, norm), {"se": se._replace(w1=se.w1[:, :4])}, "for a y of 8 channels"
    yield "unknown backend", (y, norm), {"backend": "cudnn"}, "backend='cudnn'"


@pytest.mark.parametrize(("args", "options", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        residual_tail(*args, **options)


def test_the_cuda_backend_has_no_tail():
    tail = make_tail((2, 8, 3, 3, 2))
    with pytest.raises(BackendUnavailable, match="residual_tail"):
        residual_tail(tail.y, tail.norm, backend="cuda")


@pytest.mark.parametrize("parameters", (None, torch.float32), ids=("half_parameters", "float32_parameters"))
@pytest.mark.parametrize(
    ("backend", "dtype"), [*(param(b, torch.bfloat16) for b in TAILED), param("cpu", torch.float16)]
)
def test_se_resnet_stage(backend, dtype, parameters):
    """Stage 4 cut down in samples and in R, both ways that a model holds its parameters."""
    tail = make_tail((2, 512, 7, 7, 8), dtype, backend, parameters=parameters)
    assert tail.y.device.type == DEVICES[backend].split(":")[0]
    if parameters is None:
        check_parity(tail, backend)
    else:
        got, exact = value_and_gradients(tail, backend), value_and_gradients(tail.to(torch.float64), "eager")
        torch.testing.assert_close(got["out"].double(), exact["out"], rtol=1e-2, atol=2e-3)
