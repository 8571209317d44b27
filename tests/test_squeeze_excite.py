"""`squeeze_excite` in every backend against the eager `SEBlock`: values, every gradient, bad input."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
import torch

import kernels
from kernels import BackendUnavailable, SEBlock, se_triton, squeeze_excite
from tests.backends import DEVICES, FUSED, MODULES, ON_GPU, param, watch
from tests.se_cases import (
    HALF_TYPES,
    LAYOUTS,
    NAMES,
    SOME_DTYPES_AND_LAYOUTS,
    check_parity,
    far_apart,
    in_dtypes_and_layouts,
    make_inputs,
    value_and_gradients,
)

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
    "three_channels": (2, 3, 7, 5, 1),
    "63_channels": (3, 63, 4, 5, 1),
    "64_channels": (2, 64, 5, 3, 8),
}
ARGUMENTS = ("x", "w1", "w2", "b1", "b2")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch(monkeypatch)


def cases() -> Iterator[object]:
    """(backend, dtype, layout, shape's name)."""
    stages = dict(zip(STAGES, itertools.cycle(SOME_DTYPES_AND_LAYOUTS)))
    for case, name in itertools.product(in_dtypes_and_layouts(FUSED), STAGES | ODD):
        backend, *of = case.values
        # over many channels the interpreter takes long, and how they are cut is the same for every dtype
        if backend != "triton" or name in ODD or tuple(of) == stages[name]:
            yield param(case, name)


@pytest.mark.parametrize(("backend", "dtype", "layout", "name"), list(cases()), ids=str)
def test_values_and_every_gradient(backend, dtype, layout, name, ran):
    shape = (STAGES | ODD)[name]
    inputs, dout = make_inputs(shape, dtype, backend, layout=layout)
    actual = check_parity(inputs, dout, backend)
    assert ran == [f"se_fwd:{backend}", f"se_bwd:{backend}"]
    if 1 not in shape[1:]:  # a dimension of size 1 makes the two formats one
        assert actual["out"].is_contiguous(memory_format=LAYOUTS[layout])
        assert actual["dx"].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("backend", FUSED)
def test_4096_channels(backend):
    inputs, dout = make_inputs((2, 4096, 3, 1, 16), torch.float32, backend)
    check_parity(inputs, dout, backend)


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


VIEWS = {
    "rows and columns": lambda x: x[:, :, 1:, 2:7],
    "channels": lambda x: x[:, 3:38],
    "every other channel": lambda x: x[:, ::2],
    "every other sample": lambda x: x.repeat(2, 1, 1, 1)[1::2],
    "every other row": lambda x: x[:, :, ::2],
    "contiguous, cut": lambda x: x.contiguous()[:, :, 2:, 1:-1],
    "transposed": lambda x: x.contiguous().transpose(2, 3),
    "one element into its storage": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one row for all": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("dtype", (torch.float32, *HALF_TYPES), ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("backend", FUSED)
def test_views_are_read_in_place(backend, view, dtype):
    inputs, _ = make_inputs((2, 40, 9, 8, 20), dtype, backend)
    x = view(inputs[0])
    before, C = x.clone(), x.shape[1]
    w1, w2, b1, b2 = inputs[1:]
    check_parity([x, w1[:, :C], w2[:C], b1, b2[:C]], torch.randn_like(before), backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF_TYPES), ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_expanded_and_foreign_gradients(backend, dtype):
    inputs, dout = make_inputs((2, 40, 6, 5, 20), dtype, backend)
    per_channel = dout[:, :, :1, :1]
    for gradient in (
        torch.ones_like(dout[:1, :1, :1, :1]).expand(dout.shape),
        per_channel.expand(dout.shape),
        dout[:, :, :, :1].expand(dout.shape),
        dout.contiguous(),
        dout.repeat(1, 2, 1, 2)[:, 1::2, :, 1:6],
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


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("backend", FUSED)
def test_only_the_gradients_asked_for(backend, position, monkeypatch):
    inputs, dout = make_inputs((2, 32, 4, 4, 4), torch.float32, backend)
    full = value_and_gradients(inputs, dout, backend=backend)
    masks = []
    module = MODULES[backend]
    call = module.se_bwd
    monkeypatch.setattr(module, "se_bwd", lambda *args: masks.append(list(args[-1])) or call(*args))
    leaves = [t.detach().requires_grad_(i == position) for i, t in enumerate(inputs)]
    out = squeeze_excite(*leaves, backend=backend)
    (gradient,) = torch.autograd.grad(out, leaves[position], dout)
    assert torch.equal(gradient, full[NAMES[1 + position]])
    # the operator takes x, w1, b1, w2, b2; the public function x, w1, w2, b1, b2
    assert masks == [[i == (0, 1, 3, 2, 4)[position] for i in range(5)]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_repeats_are_bitwise_equal(backend, layout):
    inputs, dout = make_inputs((3, 40, 9, 7, 5), torch.bfloat16, backend, layout=layout)
    first = value_and_gradients(inputs, dout, backend=backend)
    interpreted = backend == "triton" and se_triton.INTERPRETED  # one program after another, and slowly
    for _ in range(3 if interpreted else 50):
        again = value_and_gradients(inputs, dout, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("act", "gate"), list(itertools.product(("relu", "silu", "gelu"), ("sigmoid", "hardsigmoid"))))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")), ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_nan_and_inf_are_carried_as_eager_carries_them(backend, value, act, gate):
    inputs, dout = make_inputs((3, 24, 4, 4, 4), torch.float32, backend)
    inputs[0][1, 5, 2, 2] = value
    got = value_and_gradients(inputs, dout, backend=backend, act=act, gate=gate)
    eager = value_and_gradients(inputs, dout, backend="eager", act=act, gate=gate)
    for name in got:
        assert torch.equal(got[name].isnan(), eager[name].isnan()), name
        torch.testing.assert_close(got[name], eager[name], equal_nan=True)


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
@pytest.mark.parametrize("shape", ("odd", "one_pixel", "one_column", "no_power_of_two", "many_samples"))
@pytest.mark.parametrize("backend", FUSED)
def test_no_memory_is_read_that_was_not_written(backend, shape, layout, poisoned):
    inputs, dout = make_inputs(ODD[shape], torch.float32, backend, layout=layout)
    check_parity(inputs, dout, backend)
    leaves = [t.detach().requires_grad_(name in ("w1", "b2")) for t, name in zip(inputs, ARGUMENTS, strict=True)]
    out = squeeze_excite(*leaves, backend=backend)
    assert not any(g.isnan().any() for g in torch.autograd.grad(out, (leaves[1], leaves[4]), dout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", FUSED)
def test_samples_more_than_2_to_the_31_elements_apart(backend, layout):
    (x, *weights), dout = make_inputs((2, 16, 3, 5, 2), torch.bfloat16, backend, layout=layout)
    near = value_and_gradients([x, *weights], dout, backend=backend)
    far = value_and_gradients([far_apart(x), *weights], far_apart(dout), backend=backend)
    for name, expected in near.items():
        torch.testing.assert_close(far[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FUSED[1:2])  # Triton's kernels, which count in 32 bits within a sample
def test_a_sample_that_spans_2_to_the_31_elements_is_refused_by_name(backend):
    storage = torch.empty(2**31 + 1, dtype=torch.bfloat16, device=DEVICES[backend])
    x = storage.as_strided((1, 2, 1, 1), (1, 2**31, 1, 1))
    with pytest.raises(ValueError, match=r"x: one sample of shape \(2, 1, 1\) spans 2\*\*31"):
        squeeze_excite(x, x.new_ones(1, 2), x.new_ones(2, 1), backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("cpu", *ON_GPU))
def test_an_output_of_more_than_2_to_the_31_elements(backend):
    """Its rows are all alike: x is one row, expanded."""
    N, C, H, W, R = 2, 32, 4096, 8200, 4
    if backend == "cpu" and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 2**33:
        pytest.skip("the output alone is 4 GiB")
    (row, *weights), _ = make_inputs((N, C, 1, W, R), torch.bfloat16, backend, layout="contiguous")
    x = row.expand(N, C, H, W)
    assert x.numel() > 2**31
    out, expected = (squeeze_excite(t, *weights, backend=backend) for t in (x, row))
    for h in (0, 1, H // 2, H - 1):
        torch.testing.assert_close(out[:, :, h : h + 1], expected)
    # and nothing was left out between them
    assert out[1, -1].eq(out[1, -1, :1]).all()


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

    monkeypatch.setattr(backends, "_status", lambda: dict.fromkeys(MODULES, "no compiler") | {"eager": "ok"})
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
    status = kernels.available_backends()
    assert list(status) == ["eager", "cpu", "triton", "cuda"]
    assert status["eager"] == status["cpu"] == status["triton"] == "ok"
    if not torch.cuda.is_available():
        assert status["cuda"] != "ok"
