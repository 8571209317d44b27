"""`norm_relu_pool` in every backend against BatchNorm, ReLU and max pool one after another."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import BackendUnavailable
from kernels.norm_pool import norm_relu_pool
from kernels.norms import Norm
from tests.backends import POOL_MODULES, TAILED, param, watch
from tests.stem_cases import Stem, check_parity, make_stem, results_of

SHAPES = {  # (N, C, H, W)
    "even": (2, 24, 8, 6),
    "odd": (3, 67, 7, 9),
    "small": (2, 7, 3, 5),
    "one_pixel": (12, 20, 1, 1),
    "one_row": (3, 40, 1, 5),
    "one_column": (3, 33, 8, 1),
    "one_channel": (4, 1, 7, 8),
    "one_sample": (1, 9, 5, 4),
}
# The interpreter is slow: Triton's kernels go through every kind of input, and not through each with each
IN_TRITON = [backend for backend in TAILED if backend != "cpu"]
# Of more rows, columns and channels than a part, a tile or a chunk has
LARGE = {"many_channels": (1, 1100, 5, 4), "wide": (1, 8, 3, 300), "high": (2, 64, 70, 33)}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch(monkeypatch)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("backend", "dtype", "training"),
    [
        *itertools.product(("cpu",), (*DTYPES, torch.float64), (True, False)),
        *(param(b, d, d != torch.float16) for b in IN_TRITON for d in DTYPES),
    ],
    ids=str,
)
def test_values_gradients_and_running_statistics(backend, dtype, training, ran):
    stem = make_stem(SHAPES["even"], dtype, backend, training=training)
    actual = check_parity(stem, backend)
    assert ran == [f"pool_fwd:{backend}", f"pool_bwd:{backend}"]
    for name in ("out", "dy"):
        assert actual[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("backend", "shape", "training"),
    [
        *itertools.product(("cpu",), (SHAPES | LARGE).values(), (True, False)),
        *(param(b, (1, 67, 3, 5), True) for b in IN_TRITON),
        *(param(b, (3, 5, 1, 1), True) for b in IN_TRITON),
        *(param(b, (1, 3, 18, 35), False) for b in IN_TRITON),
    ],
    ids=str,
)
def test_shapes(backend, shape, training):
    check_parity(make_stem(shape, torch.float32, backend, training=training), backend)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("shape", ("even", "odd", "one_pixel"))
def test_float64_equals_eager(shape, training):
    stem = make_stem(SHAPES[shape], torch.float64, training=training)
    for actual, expected in zip(results_of(stem, "cpu").values(), results_of(stem, "eager").values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_gradcheck(training):
    stem = make_stem((2, 3, 5, 4), torch.float64, training=training)
    norm = stem.norm._replace(running_mean=None, running_var=None) if training else stem.norm

    def run(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_relu_pool(y, norm._replace(weight=weight, bias=bias), backend="cpu")

    inputs = [t.clone().requires_grad_() for t in (stem.y, norm.weight, norm.bias)]
    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0)


def of_few_values(y: Tensor) -> Tensor:
    return y.round()


def constant(y: Tensor) -> Tensor:
    return torch.full_like(y, 2.0)


def below_zero(y: Tensor) -> Tensor:
    return -y.abs() - 1


@pytest.mark.parametrize(
    ("backend", "dtype", "change"),
    [
        *itertools.product(("cpu",), (*DTYPES, torch.float64), (of_few_values, constant, below_zero)),
        *(param(b, torch.bfloat16, change) for b in IN_TRITON for change in (of_few_values, constant)),
    ],
)
def test_ties_are_resolved_as_eager_resolves_them(backend, dtype, change):
    stem = make_stem((2, 9, 7, 6), dtype, backend, training=False)
    stem.y = change(stem.y)
    # numbers that every dtype holds, so that nothing is rounded
    scale = torch.where(torch.arange(9) % 3 == 2, -0.5, 1.0).to(stem.y)
    shift = scale * 0 + 0.25
    stem.norm = Norm(scale * 0, scale * 0 + 1, scale, shift, training=False, eps=0.0)
    stem.dout = (8 * stem.dout).round()
    actual, expected = results_of(stem, backend), results_of(stem, "eager")
    assert torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["dy"], expected["dy"])
    assert expected["dy"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's
@pytest.mark.parametrize(
    ("backend", "value", "training"),
    [
        *itertools.product(("cpu",), map(float, ("nan", "inf", "-inf")), (True, False)),
        *(param(b, float(value), False) for b in IN_TRITON for value in ("nan", "inf")),
    ],
)
def test_nan_and_inf_are_carried_as_eager_carries_them(backend, value, training):
    """But for the weight's gradient where no window chooses an infinite number: eager multiplies it by 0."""
    stem = make_stem((2, 9, 6, 5), torch.float32, backend, training=training)
    stem.y[1, 5, 2, 2] = stem.y[1, 5, 3, 1] = stem.y[0, 2, 0, 0] = value
    got, eager = results_of(stem, backend), results_of(stem, "eager")
    for name in got:
        wanted = eager[name]
        if name == "dweight" and not training and value != float("nan"):
            assert torch.equal(got[name][[0, 1, 3]].isfinite(), wanted[[0, 1, 3]].isfinite())
        else:
            torch.testing.assert_close(got[name], wanted, equal_nan=True, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("negative", (False, True))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_sign_of_a_nan_does_not_matter(dtype, negative):
    stem = make_stem((1, 40, 4, 4), dtype, training=False)
    stem.y[:, ::3, 1, 1] = torch.copysign(torch.tensor(float("nan")), torch.tensor(-1.0 if negative else 1.0)).to(dtype)
    assert torch.equal(results_of(stem, "cpu")["out"].isnan(), results_of(stem, "eager")["out"].isnan())


def test_a_mean_of_1e4_standard_deviations():
    stem = make_stem((4, 16, 8, 8), shift=1e4)
    stem.norm = stem.norm._replace(momentum=1.0)
    exact = stem.y.double().var((0, 2, 3)).float()
    torch.testing.assert_close(results_of(stem, "cpu")["running_var"], exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", TAILED)
@pytest.mark.parametrize("options", ({"affine": False}, {"tracked": False}), ids=("not_affine", "not_tracked"))
def test_without_parameters_or_running_statistics(backend, options):
    check_parity(make_stem(SHAPES["small"], torch.float32, backend, **options), backend)


def test_parameters_wider_than_the_activations():
    stem = make_stem(SHAPES["odd"], torch.bfloat16, parameters=torch.float32)
    got, exact = results_of(stem, "cpu"), results_of(stem.to(torch.float64), "eager")
    for name in ("dweight", "dbias", "running_mean", "running_var"):
        assert got[name].dtype == torch.float32
    torch.testing.assert_close(got["running_var"], exact["running_var"].float())


def test_momentum_may_be_a_tensor():
    stem = make_stem(SHAPES["even"])
    number = results_of(stem, "cpu")
    stem.norm = stem.norm._replace(momentum=torch.tensor(0.1))
    tensor = results_of(stem, "cpu")
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(tensor[name], number[name])


def in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


VIEWS = {
    "rows and columns": lambda x: in_channels_last(x)[:, :, 1:, 2:7],
    "every other pixel": lambda x: in_channels_last(x)[:, :, ::2, ::2],
    "some channels": lambda x: in_channels_last(x)[:, 3:14],
    "rows and columns exchanged": lambda x: in_channels_last(x).transpose(2, 3),
    "samples of one": lambda x: in_channels_last(x)[:1].expand(3, -1, -1, -1),
    "one element into its storage": lambda x: (
        torch.cat((x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()))[1:]
        .view(x.shape[0], x.shape[2], x.shape[3], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize(
    ("backend", "view"),
    [
        *(param("cpu", view) for view in VIEWS),
        *(param(b, view) for b in IN_TRITON for view in ("every other pixel", "some channels")),
    ],
)
def test_views_are_read_in_place(backend, view):
    drawn = make_stem((3, 24, 7, 8), torch.float32, backend, training=False)
    y = VIEWS[view](drawn.y)
    assert y.stride(1) == 1
    C, H, W = y.shape[1:]
    norm = Norm(*(t[:C] if isinstance(t, Tensor) else t for t in drawn.norm))
    dout = drawn.y.flip(0)[:, :C, : -(-H // 2), : -(-W // 2)]
    before, leaf = y.clone(), y.detach().requires_grad_()
    out = norm_relu_pool(leaf, norm, backend=backend)
    (dy,) = torch.autograd.grad(out, leaf, dout)
    expected = results_of(Stem(y.contiguous(memory_format=torch.channels_last), norm, dout), "eager")
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(dy, expected["dy"])
    assert torch.equal(y, before)


@pytest.mark.parametrize("backend", TAILED)
def test_expanded_and_foreign_gradients(backend):
    stem = make_stem((2, 4, 3, 6), torch.float32, backend, training=backend == "cpu")
    for dout in (
        torch.ones_like(stem.dout[:1, :1, :1, :1]).expand(stem.dout.shape),
        stem.dout[:, :, :1, :1].expand(stem.dout.shape),
        stem.dout.contiguous(),
        stem.dout.repeat(1, 2, 1, 2)[:, 1::2, :, 1:4],
    ):
        stem.dout = dout
        torch.testing.assert_close(results_of(stem, backend), results_of(stem, "eager"))


WANTED = [wanted for wanted in itertools.product((False, True), repeat=3) if any(wanted)]


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [*itertools.product(("cpu",), WANTED), *(param(b, wanted) for b in IN_TRITON for wanted in WANTED[:4])],
    ids=str,
)
def test_only_the_gradients_asked_for(backend, wanted, monkeypatch):
    stem = make_stem((2, 5, 2, 4), torch.float32, backend)
    full = results_of(stem, backend)
    masks = []
    call = POOL_MODULES[backend].pool_bwd
    monkeypatch.setattr(POOL_MODULES[backend], "pool_bwd", lambda *args: masks.append(args[-1]) or call(*args))
    leaves = {"y": stem.y, "weight": stem.norm.weight, "bias": stem.norm.bias}
    for t, want in zip(leaves.values(), wanted, strict=True):
        t.requires_grad_(want)
    out = norm_relu_pool(stem.y, stem.norm, backend=backend)
    chosen = {name: t for name, t in leaves.items() if t.requires_grad}
    for name, gradient in zip(chosen, torch.autograd.grad(out, list(chosen.values()), stem.dout), strict=True):
        assert torch.equal(gradient, full[f"d{name}"])
    assert masks == [list(wanted)]


def test_repeats_are_bitwise_equal_whatever_the_number_of_threads():
    stem = make_stem((3, 40, 30, 70), torch.bfloat16)
    threads = torch.get_num_threads()
    first = results_of(stem, "cpu")
    try:
        for count in (1, 2, 3) * 4:
            torch.set_num_threads(count)
            again = results_of(stem, "cpu")
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def poisoned():
    """Memory fresh from the allocator holds NaN, in Python and in C++."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(
    ("backend", "shape"),
    [*(param(b, "small") for b in TAILED), *(param("cpu", shape) for shape in ("odd", "one_pixel", "one_row"))],
)
def test_no_memory_is_read_that_was_not_written(backend, shape, poisoned):
    check_parity(make_stem(SHAPES[shape], torch.float32, backend), backend)


@pytest.mark.parametrize("backend", TAILED)
def test_what_is_saved_for_the_backward_pass(backend):
    """y, a byte for every output, and the statistics."""
    stem = make_stem((2, 32, 6, 6), torch.bfloat16, backend)
    stem.y.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = norm_relu_pool(stem.y, stem.norm, backend=backend)
    assert sorted(t.nbytes for t in saved) == sorted((stem.y.nbytes, out.numel(), 5 * 32 * 4))


@pytest.mark.parametrize("backend", (*TAILED, "eager"))
def test_one_value_per_channel_raises_what_pytorch_raises(backend):
    stem = make_stem((1, 8, 1, 1), torch.float32, "cpu" if backend == "eager" else backend)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
        norm_relu_pool(stem.y, stem.norm, backend=backend)


@pytest.mark.parametrize("backend", TAILED)
def test_empty_batch(backend):
    stem = make_stem((0, 24, 6, 5), torch.float32, backend, training=False)
    leaf = stem.y.requires_grad_()
    out = norm_relu_pool(leaf, stem.norm, backend=backend)
    assert out.shape == (0, 24, 3, 3)
    (dy,) = torch.autograd.grad(out.sum(), leaf)
    assert dy.shape == leaf.shape


def bad_calls():
    stem = make_stem((2, 8, 6, 6))
    y, norm = stem.y, stem.norm
    yield "contiguous", (y.contiguous(), norm), {}, "y must be channels-last"
    yield "no image", (y[0], norm), {}, r"y must be \(N, C, H, W\)"
    yield "another dtype", (y.to(torch.int32), norm), {}, "floating point"
    yield "weight of other channels", (y, norm._replace(weight=norm.weight[:4])), {}, r"norm.weight must be \(8,\)"
    yield "unknown backend", (y, norm), {"backend": "cudnn"}, "backend='cudnn'"


@pytest.mark.parametrize(("args", "options", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        norm_relu_pool(*args, **options)


def test_the_cuda_backend_has_no_such_operator():
    stem = make_stem((2, 8, 6, 6))
    with pytest.raises(BackendUnavailable, match="norm_relu_pool"):
        norm_relu_pool(stem.y, stem.norm, backend="cuda")


def test_the_operators_of_csrc_refuse_what_would_not_be_memory_of_theirs():
    stem = make_stem((2, 8, 6, 6))
    stats, code = torch.zeros(5, 8), torch.zeros(2, 3, 3, 8, dtype=torch.uint8)
    ops = torch.ops.kernels_C
    with pytest.raises(ValueError, match="channels-last"):
        ops.pool_fwd(stem.y.contiguous(), stats)
    with pytest.raises(ValueError, match="stats must have shape"):
        ops.pool_fwd(stem.y, stats[:, :4])
    with pytest.raises(ValueError, match="code must have shape"):
        ops.pool_bwd_sums(stem.dout, stem.y, code[:, :2], stats)
    with pytest.raises(ValueError, match="dout must have shape"):
        ops.pool_bwd_grads(stem.y, stem.y, code, stats, None)
    with pytest.raises(ValueError, match="coefficients must have shape"):
        ops.pool_bwd_grads(stem.dout, stem.y, code, stats, torch.zeros(3, 8))


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_opcheck(training):
    stem = make_stem((2, 6, 5, 4), training=training)
    norm, y = stem.norm, stem.y.requires_grad_()
    parameters = [t.requires_grad_() for t in (norm.weight, norm.bias)]
    given = (None, None) if training else (norm.running_mean, norm.running_var)
    torch.library.opcheck(torch.ops.kernels.pool_fwd, (y, *parameters, *given, 1e-5, "", "cpu"))
    with torch.no_grad():
        _, code, stats = torch.ops.kernels.pool_fwd(y, *parameters, *given, 1e-5, "", "cpu")
    for wanted in ([True] * 3, [False, True, False]):
        arguments = (stem.dout, y.detach(), code, stats, training, "", "cpu", wanted)
        torch.library.opcheck(torch.ops.kernels.pool_bwd, arguments)


def test_compiles_without_a_graph_break():
    stem = make_stem((2, 6, 5, 4))

    def step(y: Tensor) -> Tensor:
        return F.silu(norm_relu_pool(y * 2, stem.norm, backend="cpu"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (2, 1):
        results = []
        for way in (compiled, step):
            leaf = stem.y[:samples].detach().requires_grad_()
            out = way(leaf)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
        torch.testing.assert_close(*results)
    torch.compiler.reset()
