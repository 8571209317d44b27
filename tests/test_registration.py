"""The registered operators in PyTorch: autograd, autocast, compile, export, torch.func, threads, streams, devices."""

from __future__ import annotations

import io
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import FusedSEBlock, squeeze_excite
from tests.backends import DEVICES, FUSED, ON_GPU, watch
from tests.se_cases import LAYOUTS, NAMES, as_leaves, make_inputs, value_and_gradients

SHAPE = (3, 16, 4, 5, 2)


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_changes_nothing(backend):
    inputs, dout = make_inputs((2, 32, 7, 7, 4), torch.float32, backend)
    plain = value_and_gradients(inputs, dout, backend=backend)
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        cast = value_and_gradients(inputs, dout, backend=backend)
    for name in plain:
        assert torch.equal(plain[name], cast[name]), name


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


@pytest.mark.parametrize("backend", FUSED)
def test_one_compilation_serves_every_batch_size(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(squeeze_excite, fullgraph=True, backend=counter, dynamic=True)
    for N, H in ((2, 4), (3, 7), (5, 4)):
        inputs, dout = make_inputs((N, 16, H, 5, 2), torch.float32, backend)
        leaves = as_leaves(inputs)
        gradients = torch.autograd.grad(compiled(*leaves, backend=backend), leaves, dout)
        expected = value_and_gradients(inputs, dout, backend=backend)
        for name, gradient in zip(NAMES[1:], gradients, strict=True):
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert counter.frame_count <= 2  # the sizes of the first call, and all others


class TwoBlocks(nn.Module):
    """Two calls in one graph, the second on the first one's output, with weights in common."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.se = FusedSEBlock(16, 8, bias=True, act="silu", backend=backend)
        self.last = nn.Sequential(nn.Conv2d(16, 16, 1), FusedSEBlock(16, 4, gate="hardsigmoid", backend=backend))

    def forward(self, x):
        return self.last(self.se(self.se(x)))


@pytest.mark.parametrize("backend", FUSED)
def test_several_calls_in_one_graph(backend):
    torch.manual_seed(0)
    model = TwoBlocks(backend).to(DEVICES[backend])
    x = torch.randn(3, 16, 4, 5, device=DEVICES[backend])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results = [out.detach(), *(p.grad for p in model.parameters())]
        if run is model:
            expected = results
    torch.testing.assert_close(results, expected)


def test_export_keeps_the_operator_and_its_dynamic_sizes():
    model = TwoBlocks("cpu").eval()
    n, h, w = (torch.export.Dim(name) for name in "nhw")
    program = torch.export.export(model, (torch.randn(2, 16, 6, 7),), dynamic_shapes={"x": {0: n, 2: h, 3: w}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert [str(node.target) for node in loaded.graph.nodes].count("kernels.se_fwd.default") == 3
    x = torch.randn(5, 16, 3, 9)
    with torch.no_grad():
        assert torch.equal(loaded.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_trace_of_a_fused_model_is_saved_and_loaded():
    model = TwoBlocks("cpu").eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 16, 6, 7))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        x = torch.randn(5, 16, 3, 9)
        assert torch.equal(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("use_reentrant", (False, True), ids=("not_reentrant", "reentrant"))
@pytest.mark.parametrize("backend", FUSED)
def test_checkpointing_runs_it_again_to_the_same_bits(backend, use_reentrant, monkeypatch):
    inputs, dout = make_inputs(SHAPE, torch.float32, backend)
    expected = value_and_gradients(inputs, dout, backend=backend)
    ran = watch(monkeypatch)
    leaves = as_leaves(inputs)
    out = checkpoint(lambda *args: squeeze_excite(*args, backend=backend), *leaves, use_reentrant=use_reentrant)
    out.backward(dout)
    assert ran == [f"se_fwd:{backend}", f"se_fwd:{backend}", f"se_bwd:{backend}"]
    for name, leaf in zip(NAMES[1:], leaves, strict=True):
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_saved_for_the_backward_pass(backend):
    """x, the weights, pooled, hidden and gate: nothing else of x's size; and nothing at all without a gradient."""
    inputs, dout = make_inputs(SHAPE, torch.bfloat16, backend)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append((tuple(t.shape), t.dtype)) or t, lambda t: t):
        with torch.no_grad():
            assert not squeeze_excite(*as_leaves(inputs), backend=backend).requires_grad
        assert saved == []
        squeeze_excite(*as_leaves(inputs), backend=backend)
    N, C, H, W, R = SHAPE
    half, wide = torch.bfloat16, torch.float32
    assert sorted(saved, key=str) == sorted(
        [((N, C, H, W), half), ((R, C), half), ((C, R), half), ((N, C), wide), ((N, R), wide), ((N, C), wide)], key=str
    )
    expected = value_and_gradients(inputs, dout, backend=backend)
    with save_on_cpu():
        got = value_and_gradients(inputs, dout, backend=backend)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", FUSED)
def test_inference_mode(backend):
    inputs, dout = make_inputs(SHAPE, torch.float32, backend)
    expected = value_and_gradients(inputs, dout, backend=backend)["out"]
    with torch.inference_mode():
        out = squeeze_excite(*inputs, backend=backend)
    assert out.is_inference()
    assert torch.equal(out, expected)


def test_a_change_in_place_after_the_call_is_noticed():
    inputs, dout = make_inputs(SHAPE, torch.float32, "cpu")
    x = inputs[0].requires_grad_() * 1
    out = squeeze_excite(x, *inputs[1:], backend="cpu")
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_two_threads_at_once():
    """As DataParallel runs them: forward and backward in threads, each with its own leaves."""
    inputs, dout = make_inputs((8, 64, 14, 14, 4), torch.float32, "cpu")
    expected = value_and_gradients(inputs, dout, backend="cpu")
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        for _ in range(20):
            got = value_and_gradients(inputs, dout, backend="cpu")
            wrong.extend(name for name in expected if not torch.equal(got[name], expected[name]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def sum_of_squares(backend: str, b1: torch.Tensor, b2: torch.Tensor):
    return lambda x, w1, w2: squeeze_excite(x, w1, w2, b1, b2, backend=backend).square().sum()


# torch.func does not see a formula that torch.library registered


@pytest.mark.parametrize("backend", FUSED)
def test_func_grad_and_vjp(backend):
    (x, w1, w2, b1, b2), dout = make_inputs(SHAPE, torch.float32, backend)
    got = torch.func.grad(sum_of_squares(backend, b1, b2), argnums=(0, 1, 2))(x, w1, w2)
    expected = torch.func.grad(sum_of_squares("eager", b1, b2), argnums=(0, 1, 2))(x, w1, w2)
    torch.testing.assert_close(got, expected)
    out, vjp = torch.func.vjp(lambda *args: squeeze_excite(*args, backend=backend), x, w1, w2, b1, b2)
    full = value_and_gradients([x, w1, w2, b1, b2], dout, backend=backend)
    assert torch.equal(out, full["out"])
    for name, gradient in zip(NAMES[1:], vjp(dout), strict=True):
        assert torch.equal(gradient, full[name]), name


def test_func_grad_through_functional_call():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), FusedSEBlock(16, 8, backend="cpu"))
    x = torch.randn(2, 3, 4, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_by_vmap():
    (x, w1, w2, b1, b2), _ = make_inputs(SHAPE, torch.float32, "cpu")
    gradient = torch.func.grad(lambda w1, x: sum_of_squares("cpu", b1, b2)(x[None], w1, w2))
    got = torch.func.vmap(gradient, in_dims=(None, 0))(w1, x)
    for one, sample in zip(got, x, strict=True):
        torch.testing.assert_close(one, gradient(w1, sample))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_another_batch_dimension():
    (x, *weights), _ = make_inputs((6, 16, 4, 5, 2), torch.float32, "cpu")
    got = torch.func.vmap(lambda x: squeeze_excite(x, *weights, backend="cpu"))(x.unflatten(0, (2, 3)))
    torch.testing.assert_close(got.flatten(0, 1), squeeze_excite(x, *weights, backend="cpu"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ("jvp", "dual level"))
def test_forward_mode_is_refused_by_name(way):
    (x, *weights), dout = make_inputs(SHAPE, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="forward-mode"):
        if way == "jvp":
            torch.func.jvp(lambda x: squeeze_excite(x, *weights, backend="cpu"), (x,), (dout,))
        else:
            with forward_ad.dual_level():
                squeeze_excite(forward_ad.make_dual(x, dout), *weights, backend="cpu")


@pytest.mark.parametrize("backend", ON_GPU)
def test_replayed_in_a_cuda_graph(backend):
    """Forward and backward are captured once; the replay reads new values from the same memory."""
    inputs, dout = make_inputs((8, 64, 14, 14, 4), torch.bfloat16, backend)
    leaves = as_leaves(inputs)

    def step() -> tuple[torch.Tensor, ...]:
        out = squeeze_excite(*leaves, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    # compiled and warm before the capture, on a stream of their own as torch.cuda.graph wants it
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            leaves[0].copy_(torch.randn_like(leaves[0]))
            dout.copy_(torch.randn_like(dout))
        graph.replay()
        torch.cuda.synchronize()
        for name, got, expected in zip(NAMES, captured, step(), strict=True):
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("backend", ON_GPU)
def test_on_a_stream_that_is_not_the_default(backend):
    """x is written on the side stream after a long wait: work launched on any other stream would read it too early."""
    inputs, dout = make_inputs((8, 64, 14, 14, 4), torch.float32, backend)
    expected = value_and_gradients(inputs, dout, backend=backend)
    late = [torch.full_like(t, torch.nan) for t in (inputs[0], dout)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late[0].copy_(inputs[0])
        late[1].copy_(dout)
        got = value_and_gradients([late[0], *inputs[1:]], late[1], backend=backend)
    side.synchronize()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("backend", ON_GPU)
def test_on_a_device_that_is_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, dout = make_inputs((8, 64, 14, 14, 4), torch.float32, backend)
    expected = value_and_gradients(inputs, dout, backend=backend)
    assert torch.cuda.current_device() == 0
    got = value_and_gradients([t.to("cuda:1") for t in inputs], dout.to("cuda:1"), backend=backend)
    assert {t.device for t in got.values()} == {torch.device("cuda:1")}
    for name in expected:
        torch.testing.assert_close(got[name].to("cuda:0"), expected[name])
    assert torch.cuda.current_device() == 0
