"""`residual_tail`'s operators in PyTorch: opcheck, compile, export, autocast, checkpoints, torch.func, CUDA graphs."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.norms import Norm
from kernels.residual_tail import SE, residual_tail
from tests.backends import DEVICES, TAILED, param, watch
from tests.tail_cases import Tail, make_tail, value_and_gradients

SHAPE = (3, 16, 4, 5, 2)
TAILS = {
    "norm_relu": {"se": False, "residual": None},
    "norm_se_add_relu": {},
    "norm_se_add_norm_silu": {"residual": "norm", "act": "silu"},
}


def operator_arguments(tail: Tail, backend: str) -> tuple:
    """Those of torch.ops.kernels.tail_fwd."""
    norm, second, se = tail.norm, tail.residual_norm or Norm(None, None), tail.se
    w1, w2, b1, b2, *names = se or SE(None, None)
    given = [None if n.training else t for n in (norm, second) for t in (n.running_mean, n.running_var)]
    parameters = (norm.weight, norm.bias, w1, b1, w2, b2, second.weight, second.bias)
    options = (norm.eps, second.eps, tail.residual_norm is not None, "", "", tail.act, *names, backend)
    return tail.y, tail.residual, *parameters, *given, *options


@pytest.mark.parametrize(
    ("backend", "options", "training"),
    # Triton's interpreter is slow, and what opcheck looks at is the same for every backend
    [
        *itertools.product(("cpu",), TAILS, (True, False)),
        *(param(b, "norm_se_add_norm_silu", True) for b in TAILED if b != "cpu"),
    ],
)
def test_opcheck(backend, options, training):
    tail = make_tail(SHAPE, torch.float32, backend, training=training, **TAILS[options]).leaves()
    arguments = operator_arguments(tail, backend)
    torch.library.opcheck(torch.ops.kernels.tail_fwd, arguments)
    with torch.no_grad():
        _, *saved = torch.ops.kernels.tail_fwd(*arguments)
    norms = (tail.residual is not None, training, training and tail.residual_norm is not None, "", "", tail.act)
    kept = tail.residual if tail.act == "silu" else None
    w1, w2 = (None, None) if tail.se is None else tail.se[:2]
    inputs = [None if t is None else t.detach() for t in (tail.dout, tail.y, kept, w1, w2)]
    names = ("relu", "sigmoid") if tail.se is None else tail.se[4:]
    there = set(tail.differentiable())
    every = [n in there for n in ("y", "residual", "weight", "bias", "w1", "b1", "w2", "b2", "weight2", "bias2")]
    for mask in (every, [False, False, True] + [False] * 7):
        torch.library.opcheck(torch.ops.kernels.tail_bwd, (*inputs, *saved, *norms, *names, backend, mask))


class TwoTails(nn.Module):
    """Two tails in one graph, the second one's residual the first one's input, in training."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backend = backend
        self.conv = nn.Conv2d(16, 16, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)

    def norm(self, bn: nn.BatchNorm2d) -> Norm:
        return Norm(bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, bn.eps)

    def forward(self, x: Tensor) -> Tensor:
        se = SE(self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias)
        y = residual_tail(x, self.norm(self.bn1), backend=self.backend)
        return residual_tail(self.conv(y), self.norm(self.bn2), se=se, residual=x, backend=self.backend) * 2


def run(model: nn.Module, way, x: Tensor) -> list[Tensor]:
    """Loss, gradients and buffers of one step from the same state."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = way(x)
    out.square().sum().backward()
    results = [out.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]
    model.load_state_dict(state)
    return results


@pytest.mark.parametrize("compiler", ("inductor", "aot_eager"))
@pytest.mark.parametrize("backend", TAILED)
def test_compiles_without_a_graph_break(backend, compiler):
    model = TwoTails(backend).to(DEVICES[backend])
    x = torch.randn(3, 16, 4, 5, device=DEVICES[backend]).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    torch.testing.assert_close(run(model, compiled, x), run(model, model, x))


def test_one_compilation_serves_every_batch_size():
    model = TwoTails("cpu")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for N, H in ((2, 4), (3, 7), (5, 4)):
        x = torch.randn(N, 16, H, 5)
        torch.testing.assert_close(run(model, compiled, x), run(model, model, x))
    assert counter.frame_count <= 2  # the sizes of the first call, and all others


def test_export_keeps_the_operator_and_its_dynamic_sizes():
    model = TwoTails("cpu").eval()
    n, h, w = (torch.export.Dim(name) for name in "nhw")
    program = torch.export.export(model, (torch.randn(2, 16, 6, 7),), dynamic_shapes={"x": {0: n, 2: h, 3: w}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert [str(node.target) for node in loaded.graph.nodes].count("kernels.tail_fwd.default") == 2
    x = torch.randn(5, 16, 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(x), model(x))


@pytest.mark.parametrize("backend", TAILED)
def test_autocast_changes_nothing(backend):
    tail = make_tail((2, 32, 7, 7, 4), torch.float32, backend, residual="norm")
    plain = value_and_gradients(tail, backend)
    with torch.autocast(DEVICES[backend], torch.bfloat16):
        cast = value_and_gradients(tail, backend)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_counts_the_flops_that_eager_counts():
    tail = make_tail((2, 64, 7, 7, 8), biases=False)

    def total(backend: str) -> int:
        with FlopCounterMode(display=False) as counter:
            value_and_gradients(tail, backend)
        return counter.get_total_flops()

    assert total("cpu") == total("eager") == 12 * 2 * 64 * 8


@pytest.mark.parametrize("use_reentrant", (False, True), ids=("not_reentrant", "reentrant"))
@pytest.mark.parametrize("backend", TAILED)
def test_checkpointing_runs_it_again_to_the_same_bits(backend, use_reentrant, monkeypatch):
    tail = make_tail(SHAPE, torch.float32, backend)
    expected = value_and_gradients(tail, backend)
    ran = watch(monkeypatch)
    leaves = tail.leaves()

    def call(y: Tensor, residual: Tensor) -> Tensor:
        return residual_tail(y, leaves.norm, se=leaves.se, residual=residual, backend=backend)

    checkpoint(call, leaves.y, leaves.residual, use_reentrant=use_reentrant).backward(tail.dout)
    assert ran == [f"tail_fwd:{backend}", f"tail_fwd:{backend}", f"tail_bwd:{backend}"]
    for name, leaf in leaves.differentiable().items():
        assert torch.equal(leaf.grad, expected[f"d{name}"]), name


def test_no_second_derivative_is_claimed():
    tail = make_tail((2, 4, 2, 2, 2), torch.float64).leaves()
    out = residual_tail(tail.y, tail.norm, **tail.options(), backend="cpu")
    (dy,) = torch.autograd.grad(out.square().sum(), tail.y, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dy.sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_is_refused_by_name():
    tail = make_tail((2, 4, 2, 2, 2), training=False)
    with pytest.raises(RuntimeError, match="residual_tail has no forward-mode"):
        torch.func.jvp(lambda y: residual_tail(y, tail.norm, backend="cpu"), (tail.y,), (tail.dout,))


@pytest.mark.parametrize("backend", TAILED)
def test_func_grad(backend):
    tail = make_tail(SHAPE, torch.float32, backend, training=False)

    def loss(which: str):
        return lambda y, r: residual_tail(y, tail.norm, se=tail.se, residual=r, backend=which).square().sum()

    got = torch.func.grad(loss(backend), argnums=(0, 1))(tail.y, tail.residual)
    torch.testing.assert_close(got, torch.func.grad(loss("eager"), argnums=(0, 1))(tail.y, tail.residual))


@pytest.mark.parametrize("backend", TAILED)
def test_inference_mode(backend):
    tail = make_tail(SHAPE, torch.float32, backend, training=False)
    expected = value_and_gradients(tail, backend)["out"]
    with torch.inference_mode():
        out = residual_tail(tail.y, tail.norm, **tail.options(), backend=backend)
    assert torch.equal(out, expected)


def test_a_change_in_place_after_the_call_is_noticed():
    tail = make_tail(SHAPE).leaves()
    y = tail.y * 1
    out = residual_tail(y, tail.norm, **tail.options(), backend="cpu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(tail.dout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_replayed_in_a_cuda_graph():
    """Forward and backward in training are captured once; the replay reads new values from the same memory."""
    model = TwoTails("triton").cuda()
    x, fresh = (torch.randn(8, 16, 14, 14, device="cuda") for _ in range(2))

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        out = model(x)
        out.square().sum().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x.copy_(fresh)
    graph.replay()
    replayed = [out.clone(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
    model.load_state_dict(state)
    expected = step()
    expected = [expected, *(p.grad for p in model.parameters()), *model.buffers()]
    torch.testing.assert_close(replayed, expected)
