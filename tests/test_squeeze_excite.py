"""`squeeze_excite` in every backend against the eager `SEBlock`: values, every gradient, registration, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import BackendUnavailable, SEBlock, se_cpu, se_triton, squeeze_excite
from tests.accuracy import assert_as_accurate_as_eager
from tests.backends import DEVICES, FUSED

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# (N, C, H, W, R): the four stages of SE-ResNet50 cut down in N and HW, and odd ones
STAGES = {
    "stage1": (2, 256, 14, 14, 16),
    "stage2": (2, 512, 7, 7, 32),
    "stage3": (2, 1024, 4, 4, 64),
    "stage4": (2, 2048, 2, 2, 128),
}
ODD = {
    "odd": (3, 33, 5, 9, 3),
    "one_of_each": (1, 1, 1, 1, 1),
    "one_pixel": (5, 63, 1, 1, 7),
    "one_channel": (2, 1, 6, 5, 1),
    "one_column": (2, 12, 8, 1, 5),
    "no_power_of_two": (2, 130, 11, 3, 17),
    "many_samples": (19, 20, 3, 3, 17),
}
NAMES = ("out", "dx", "dw1", "dw2", "db1", "db2")


def _spy(call, entry: str, seen: list[str]):
    def spy(*args):
        seen.append(entry)
        return call(*args)

    return spy


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that did work, in order, as "se_fwd:cpu" and "se_bwd:cpu"."""
    seen: list[str] = []
    for backend, module in (("cpu", se_cpu), ("triton", se_triton)):
        for stem in ("se_fwd", "se_bwd"):
            monkeypatch.setattr(module, stem, _spy(getattr(module, stem), f"{stem}:{backend}", seen))
    return seen


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
    *,
    layout: str = "channels_last",
    bias: bool = True,
):
    """[x, w1, w2, b1, b2] and dout: drawn in float64 and rounded to dtype, so that every precision sees one set."""
    N, C, H, W, R = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICES[backend], dtype)

    x = (draw(N, C, H, W) + 0.5).to(memory_format=LAYOUTS[layout])
    dout = draw(N, C, H, W).to(memory_format=LAYOUTS[layout])
    w1, w2 = draw(R, C) / C**0.5, draw(C, R) / R**0.5
    return [x, w1, w2, draw(R) if bias else None, draw(C) if bias else None], dout


def value_and_gradients(inputs: list[Tensor | None], dout: Tensor, **options: str) -> dict[str, Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = squeeze_excite(*leaves, **options)
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(out, wanted, dout)
    names = [name for name, t in zip(NAMES[1:], leaves, strict=True) if t is not None]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def check_parity(inputs: list[Tensor | None], dout: Tensor, backend: str, **options: str) -> dict[str, Tensor]:
    """Holds the backend to the accuracy rule and returns its results."""
    wide = [None if t is None else t.double() for t in inputs]
    actual = value_and_gradients(inputs, dout, backend=backend, **options)
    eager = value_and_gradients(inputs, dout, backend="eager", **options)
    exact = value_and_gradients(wide, dout.double(), backend="eager", **options)
    for name in actual:
        assert_as_accurate_as_eager(f"{backend} {name}", actual[name], eager[name], exact[name])
    return actual


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", (STAGES | ODD).values(), ids=(STAGES | ODD).keys())
@pytest.mark.parametrize("backend", FUSED)
def test_values_and_every_gradient(backend, shape, dtype, layout, ran):
    inputs, dout = make_inputs(shape, dtype, backend, layout=layout)
    actual = check_parity(inputs, dout, backend)
    assert ran == [f"se_fwd:{backend}", f"se_bwd:{backend}"]
    if 1 not in shape[1:]:  # a dimension of size 1 makes the two formats one
        assert actual["out"].is_contiguous(memory_format=LAYOUTS[layout])
        assert actual["dx"].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize(("act", "gate"), list(itertools.product(("relu", "silu", "gelu"), ("sigmoid", "hardsigmoid"))))
@pytest.mark.parametrize("bias", (False, True), ids=("no_bias", "bias"))
@pytest.mark.parametrize("backend", FUSED)
def test_activations_and_gates(backend, bias, act, gate):
    inputs, dout = make_inputs((3, 40, 5, 5, 20), torch.float32, backend, bias=bias)
    inputs[2] = inputs[2] * 4  # some gates saturate, so that both ends of hardsigmoid are met
    check_parity(inputs, dout, backend, act=act, gate=gate)


@pytest.mark.parametrize("backend", FUSED)
def test_is_the_function_of_the_seblock(backend):
    block = SEBlock(64, reduction=16).to(DEVICES[backend])
    x = torch.randn(2, 64, 7, 7, device=DEVICES[backend])
    out = squeeze_excite(x, block.fc[0].weight, block.fc[2].weight, backend=backend)
    torch.testing.assert_close(out, block(x))


@pytest.mark.parametrize("backend", FUSED)
def test_sliced_and_offset_views_are_read_in_place(backend):
    inputs, _ = make_inputs((2, 40, 9, 8, 20), torch.float32, backend)
    whole = inputs[0]
    views = {
        "rows and columns": whole[:, :, 1:, 2:7],
        "every other sample": whole.repeat(2, 1, 1, 1)[1::2],
        "every other row": whole[:, :, ::2],
        "contiguous, cut": whole.contiguous()[:, :, 2:, 1:-1],
        "transposed": whole.contiguous().transpose(2, 3),
    }
    for name, x in views.items():
        before = x.clone()
        check_parity([x, *inputs[1:]], torch.randn_like(x), backend)
        assert torch.equal(x, before), name


@pytest.mark.parametrize("backend", FUSED)
def test_expanded_and_foreign_gradients(backend):
    inputs, dout = make_inputs((2, 40, 6, 5, 20), torch.float32, backend)
    per_channel = dout[:, :, :1, :1]
    for gradient in (
        torch.ones_like(dout[:1, :1, :1, :1]).expand(dout.shape),
        per_channel.expand(dout.shape),
        dout.contiguous(),
    ):
        check_parity(inputs, gradient, backend)


@pytest.mark.parametrize("backend", FUSED)
def test_empty_batch(backend):
    inputs, dout = make_inputs((0, 24, 6, 5, 4), torch.float32, backend)
    got = value_and_gradients(inputs, dout, backend=backend)
    assert got["out"].shape == got["dx"].shape == (0, 24, 6, 5)
    assert all(not got[name].any() for name in ("dw1", "db1", "dw2", "db2"))


@pytest.mark.parametrize("backend", FUSED)
def test_float32_weights_with_half_activations(backend):
    """As under autocast: the weights keep their dtype and so do their gradients."""
    inputs, dout = make_inputs((2, 32, 7, 7, 4), torch.float32, backend)
    mixed = [inputs[0].bfloat16(), *inputs[1:]]
    got = value_and_gradients(mixed, dout.bfloat16(), backend=backend)
    assert got["out"].dtype == got["dx"].dtype == torch.bfloat16
    assert {got[name].dtype for name in ("dw1", "dw2", "db1", "db2")} == {torch.float32}
    exact = value_and_gradients([t.double() for t in mixed], dout.bfloat16().double(), backend="eager")
    for name in ("dw1", "dw2", "db1", "db2"):
        torch.testing.assert_close(got[name], exact[name].float(), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_changes_nothing(backend):
    inputs, dout = make_inputs((2, 32, 7, 7, 4), torch.float32, backend)
    plain = value_and_gradients(inputs, dout, backend=backend)
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        cast = value_and_gradients(inputs, dout, backend=backend)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("backend", FUSED)
def test_only_the_gradients_asked_for(backend, position, monkeypatch):
    inputs, dout = make_inputs((2, 32, 4, 4, 4), torch.float32, backend)
    full = value_and_gradients(inputs, dout, backend=backend)
    masks = []
    module = {"cpu": se_cpu, "triton": se_triton}[backend]
    call = module.se_bwd
    monkeypatch.setattr(module, "se_bwd", lambda *args: masks.append(list(args[-1])) or call(*args))
    leaves = [t.detach().requires_grad_(i == position) for i, t in enumerate(inputs)]
    out = squeeze_excite(*leaves, backend=backend)
    (gradient,) = torch.autograd.grad(out, leaves[position], dout)
    assert torch.equal(gradient, full[NAMES[1 + position]])
    # the operator takes x, w1, b1, w2, b2; the public function x, w1, w2, b1, b2
    assert masks == [[i == (0, 1, 3, 2, 4)[position] for i in range(5)]]


@pytest.mark.parametrize("backend", FUSED)
def test_repeats_are_bitwise_equal(backend):
    inputs, dout = make_inputs((3, 40, 9, 7, 5), torch.bfloat16, backend)
    first = value_and_gradients(inputs, dout, backend=backend)
    for _ in range(5):
        again = value_and_gradients(inputs, dout, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("gate", ("sigmoid", "hardsigmoid"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_nan_and_inf_are_carried_as_eager_carries_them(backend, value, gate):
    inputs, dout = make_inputs((3, 24, 4, 4, 4), torch.float32, backend)
    inputs[0][1, 5, 2, 2] = value
    got = value_and_gradients(inputs, dout, backend=backend, gate=gate)
    eager = value_and_gradients(inputs, dout, backend="eager", gate=gate)
    for name in got:
        assert torch.equal(got[name].isnan(), eager[name].isnan()), name
        torch.testing.assert_close(got[name], eager[name], equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "gate"), (("relu", "sigmoid"), ("silu", "hardsigmoid"), ("gelu", "sigmoid")))
def test_gradcheck_of_the_cpu_kernel(act, gate, layout):
    inputs, _ = make_inputs((2, 6, 3, 2, 3), torch.float64, "cpu", layout=layout)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *args: squeeze_excite(*args, act=act, gate=gate, backend="cpu"), leaves, nondet_tol=0
    )


@pytest.mark.parametrize("shape", ((2, 6, 3, 4, 2), (0, 6, 3, 4, 2)), ids=("batch", "empty"))
@pytest.mark.parametrize("bias", (False, True), ids=("no_bias", "bias"))
@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend, bias, shape):
    (x, w1, w2, b1, b2), dout = make_inputs(shape, torch.float32, backend, bias=bias)
    names = ("relu", "sigmoid", backend)
    leaves = [None if t is None else t.requires_grad_() for t in (x, w1, b1, w2, b2)]
    torch.library.opcheck(torch.ops.kernels.se_fwd, (*leaves, *names))
    with torch.no_grad():
        _, pooled, hidden, gate = torch.ops.kernels.se_fwd(*leaves, *names)
    saved = [t.detach() for t in (x, w1, w2)]
    for mask in (
        [True, True, bias, True, bias],
        [False, True, False, False, False],
        [True, False, False, False, False],
    ):
        torch.library.opcheck(torch.ops.kernels.se_bwd, (dout, *saved, pooled, hidden, gate, *names, mask))


@pytest.mark.parametrize("backend", FUSED)
def test_compiles_without_a_graph_break(backend):
    inputs, dout = make_inputs((2, 16, 4, 4, 2), torch.float32, backend)
    leaves = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(lambda *args: squeeze_excite(*args, backend=backend) * 2, fullgraph=True)
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout)
    plain = value_and_gradients(inputs, 2 * dout, backend=backend)
    torch.testing.assert_close(out, 2 * plain["out"])
    for name, gradient in zip(NAMES[1:], gradients, strict=True):
        torch.testing.assert_close(gradient, plain[name])


def test_counts_the_flops_that_eager_counts():
    inputs, dout = make_inputs((2, 64, 7, 7, 8), torch.float32, "cpu", bias=False)

    def total(backend: str) -> int:
        with FlopCounterMode(display=False) as counter:
            value_and_gradients(inputs, dout, backend=backend)
        return counter.get_total_flops()

    assert total("cpu") == total("eager") == 12 * 2 * 64 * 8


def test_no_second_derivative_is_claimed():
    inputs, _ = make_inputs((1, 4, 2, 2, 2), torch.float64, "cpu")
    x = inputs[0].requires_grad_()
    out = squeeze_excite(x, *inputs[1:], backend="cpu")
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def bad_calls():
    x, w1, w2 = torch.zeros(2, 8, 3, 3), torch.zeros(2, 8), torch.zeros(8, 2)
    yield "x of three dimensions", (x[0], w1, w2), {}, r"x must be \(N, C, H, W\)"
    yield "no pixel", (x[:, :, :0], w1, w2), {}, "at least one channel and one pixel"
    yield "w1 of other channels", (x, w1[:, :4], w2), {}, r"w1 must be \(R, 8\)"
    yield "w2 not transposed", (x, w1, w1), {}, r"w2 \(8, R\)"
    yield "3x3 convolution", (x, torch.zeros(2, 8, 3, 3), w2), {}, "w1 must be a matrix or a 1x1 convolution"
    yield "b1 of C", (x, w1, w2, torch.zeros(8)), {}, r"b1 must be \(2,\)"
    yield "b2 of R", (x, w1, w2, None, torch.zeros(2)), {}, r"b2 must be \(8,\)"
    yield "integers", (x.long(), w1, w2), {}, "x must be floating point"
    yield "unknown act", (x, w1, w2), {"act": "tanh"}, "act='tanh'"
    yield "unknown gate", (x, w1, w2), {"gate": "softmax"}, "gate='softmax'"
    yield "unknown backend", (x, w1, w2), {"backend": "cudnn"}, "backend='cudnn'"
    yield "two devices", (x, w1.to("meta"), w2), {}, "w1 is on meta"


@pytest.mark.parametrize(("args", "options", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        squeeze_excite(*args, **options)


def test_triton_refuses_float64():
    (x, w1, w2, *_), _ = make_inputs((1, 4, 2, 2, 2), torch.float64, "cpu")
    with pytest.raises(BackendUnavailable, match="float64"):
        squeeze_excite(x, w1, w2, backend="triton")


def test_auto_takes_the_compiled_kernel_on_the_cpu(ran):
    inputs, dout = make_inputs((1, 8, 2, 2, 2), torch.float32, "cpu")
    value_and_gradients(inputs, dout)
    assert ran == ["se_fwd:cpu", "se_bwd:cpu"]


def test_auto_falls_back_to_eager_and_says_so_once(monkeypatch, ran):
    import kernels.backends as backends

    monkeypatch.setattr(backends, "_status", lambda: {"eager": "ok", "cpu": "no compiler", "triton": "no GPU"})
    backends._warn_eager.cache_clear()
    inputs, dout = make_inputs((1, 8, 2, 2, 2), torch.float32, "cpu")
    with pytest.warns(RuntimeWarning, match="no compiler") as record:
        value_and_gradients(inputs, dout)
        value_and_gradients(inputs, dout)
    assert len(record) == 1
    assert ran == []
    with pytest.raises(BackendUnavailable, match="no compiler"):
        squeeze_excite(*inputs, backend="cpu")


def test_available_backends_on_this_machine():
    assert kernels.available_backends() == {"eager": "ok", "cpu": "ok", "triton": "ok"}
