"""The CUDA kernels of csrc/, run on the CPU: a stand-in for CUDA's built-ins makes every thread a fibre.

So every index, mask and barrier is executed without a GPU, for GPUs of several kinds, and under the sanitizers.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from kernels import backends, se_cuda, squeeze_excite
from tests.se_cases import (
    DTYPES_AND_LAYOUTS,
    LAYOUTS,
    SOME_DTYPES_AND_LAYOUTS,
    check_parity,
    far_apart,
    make_inputs,
    value_and_gradients,
)

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "cuda_on_cpu"
# what a sanitizer's report needs of -g, and no more: the rest would double the time to compile
FLAGS = ["-Og", "-g1", "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{ROOT / 'csrc'}"]

# (multiprocessors, shared memory of a block and of a multiprocessor, L2, blocks of the largest cluster): a Hopper in
# small, with clusters, and an Ampere in small, whose blocks must be content with L2
PLAYED = {
    "clusters": (2, 60 << 10, 122 << 10, 1 << 20, 16),
    "no clusters": (3, 48 << 10, 98 << 10, 1 << 12, 1),
}
# (N, C, H, W, R)
SHAPES = {
    "stage1": (1, 256, 14, 14, 16),
    "stage2": (1, 512, 7, 7, 32),
    "C 1": (2, 1, 6, 5, 1),
    "C 3": (2, 3, 5, 4, 1),
    "C 63": (3, 63, 3, 3, 7),
    "C 64": (3, 64, 9, 8, 4),
    "one of each": (1, 1, 1, 1, 1),
    "one pixel": (5, 64, 1, 1, 7),
    "one column": (2, 16, 8, 1, 5),
}
# Those that take long, as every thread is a fibre
LARGE = {
    "stage3": (1, 1024, 4, 4, 64),
    "stage4": (1, 2048, 2, 2, 128),
    "C 4096": (1, 4096, 1, 2, 5),
    "many samples": (35, 20, 3, 3, 17),
}
CASES = [
    pytest.param(shape, dtype, layout, id=f"{name}-{dtype}-{layout}")
    for shapes, kinds in ((SHAPES, DTYPES_AND_LAYOUTS), (LARGE, SOME_DTYPES_AND_LAYOUTS))
    for name, shape in shapes.items()
    for dtype, layout in kinds
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory):
    """torch.ops.kernels_cuda_on_cpu, built."""
    cpp_extension.load(
        "cuda_on_cpu",
        [str(SOURCES / "torch_se.cpp")],
        extra_cflags=FLAGS,
        build_directory=str(tmp_path_factory.mktemp("cuda_on_cpu")),
        is_python_module=False,
    )
    return torch.ops.kernels_cuda_on_cpu


@pytest.fixture
def cuda(library, monkeypatch: pytest.MonkeyPatch):
    """backend="cuda" takes CPU tensors, on the GPU that the test plays."""
    monkeypatch.setattr(se_cuda, "_OPS", library)
    monkeypatch.setattr(backends, "_refusal", lambda *args: None)
    library.set_limits(*PLAYED["clusters"])
    return library


@contextlib.contextmanager
def launches(library, expected: int):
    before = library.launches()
    yield
    assert library.launches() - before == expected


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
@pytest.mark.parametrize("played", PLAYED)
def test_values_and_every_gradient(cuda, played, shape, dtype, layout):
    cuda.set_limits(*PLAYED[played])
    inputs, dout = make_inputs(shape, dtype, "cpu", layout=layout)
    with launches(cuda, 4):  # forward; backward, and a product for each layer's gradients
        check_parity(inputs, dout, "cuda")


@pytest.mark.parametrize(("act", "gate"), (("relu", "hardsigmoid"), ("silu", "sigmoid"), ("gelu", "hardsigmoid")))
@pytest.mark.parametrize("bias", (False, True), ids=("no bias", "bias"))
def test_activations_and_gates(cuda, bias, act, gate):
    inputs, dout = make_inputs((3, 40, 5, 5, 20), torch.float32, "cpu", bias=bias)
    inputs[2] = inputs[2] * 4  # some gates saturate, so that both ends of hardsigmoid are met
    check_parity(inputs, dout, "cuda", act=act, gate=gate)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_views_and_expanded_gradients_are_read_in_place(cuda, dtype):
    inputs, _ = make_inputs((2, 40, 9, 8, 20), dtype, "cpu")
    whole = inputs[0]
    for x in (
        whole[:, :, 1:, 2:7],
        whole.repeat(2, 1, 1, 1)[1::2],
        whole[:, :, ::2],
        whole[:, 1:39].contiguous(memory_format=torch.channels_last)[:, 8:24],
        whole.contiguous()[:, :, 2:, 1:-1],
        whole.contiguous().transpose(2, 3),
    ):
        weights = [inputs[1][:, : x.shape[1]], inputs[2][: x.shape[1]], inputs[3], inputs[4][: x.shape[1]]]
        for dout in (torch.randn_like(x), torch.ones((), dtype=dtype).expand(x.shape)):
            check_parity([x, *weights], dout, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("played", "forward", "backward"), (("clusters", 1, 2), ("no clusters", 2, 3)))
def test_traffic(cuda, played, forward, backward, dtype, layout):
    """On the chip every tensor is read once; in the grid x is read twice forward, and dout backward."""
    cuda.set_limits(*PLAYED[played])
    (x, *weights), dout = make_inputs((2, 64, 24, 20, 5), dtype, "cpu", layout=layout)
    unit = x.numel() * x.element_size()
    x.requires_grad_()
    cuda.traffic()
    out = squeeze_excite(x, *weights, backend="cuda")
    assert cuda.traffic() == (forward * unit, unit)
    torch.autograd.grad(out, x, dout)
    assert cuda.traffic() == (backward * unit, unit)


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
def test_nan_and_inf_are_carried_as_eager_carries_them(cuda, value):
    inputs, dout = make_inputs((3, 24, 4, 4, 4), torch.float32, "cpu")
    inputs[0][1, 5, 2, 2] = value
    got = value_and_gradients(inputs, dout, backend="cuda")
    eager = value_and_gradients(inputs, dout, backend="eager")
    for name in got:
        torch.testing.assert_close(got[name], eager[name], equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("played", PLAYED)
def test_strides_of_more_than_2_to_the_31_elements(cuda, played, layout):
    cuda.set_limits(*PLAYED[played])
    (x, *weights), dout = make_inputs((2, 64, 24, 20, 2), torch.bfloat16, "cpu", layout=layout)
    near = value_and_gradients([x, *weights], dout, backend="cuda")
    far = value_and_gradients([far_apart(x), *weights], far_apart(dout), backend="cuda")
    for name, expected in near.items():
        torch.testing.assert_close(far[name], expected, rtol=0, atol=0)


def test_a_sample_that_spans_2_to_the_31_elements(cuda):
    x = torch.empty(2**31 + 1, dtype=torch.bfloat16).as_strided((1, 2, 1, 1), (1, 2**31, 1, 1)).fill_(2)
    out = squeeze_excite(x, x.new_zeros(1, 2), x.new_zeros(2, 1), backend="cuda")
    assert out.eq(1).all()


def test_empty_batch(cuda):
    inputs, dout = make_inputs((0, 24, 6, 5, 4), torch.float32, "cpu")
    with launches(cuda, 0):
        got = value_and_gradients(inputs, dout, backend="cuda")
    assert got["dx"].shape == (0, 24, 6, 5)
    assert not any(got[name].any() for name in ("dw1", "db1", "dw2", "db2"))


@pytest.mark.parametrize("played", PLAYED)
def test_bitwise_the_same_whichever_thread_is_first(cuda, played):
    cuda.set_limits(*PLAYED[played])
    inputs, dout = make_inputs((3, 40, 21, 20, 5), torch.float32, "cpu")
    results = []
    for order in range(3):
        cuda.set_order(order)
        results.append(value_and_gradients(inputs, dout, backend="cuda"))
    cuda.set_order(0)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_only_the_gradients_asked_for(cuda):
    inputs, dout = make_inputs((2, 32, 4, 4, 4), torch.float32, "cpu")
    full = value_and_gradients(inputs, dout, backend="cuda")
    for position, expected in enumerate((2, 3, 3, 3, 3)):
        leaves = [t.detach().requires_grad_(i == position) for i, t in enumerate(inputs)]
        with launches(cuda, expected):
            out = squeeze_excite(*leaves, backend="cuda")
            (gradient,) = torch.autograd.grad(out, leaves[position], dout)
        name = ("dx", "dw1", "dw2", "db1", "db2")[position]
        assert torch.equal(gradient, full[name]), name


def test_channels_beyond_shared_memory_are_refused_with_a_way_out(cuda):
    cuda.set_limits(2, 8 << 10, 8 << 10, 1 << 20, 1)
    inputs, _ = make_inputs((1, 4096, 1, 1, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"4096 channels .* backend='triton'"):
        squeeze_excite(*inputs, backend="cuda")


def compile_program(source: Path, program: Path, *flags: str) -> None:
    command = [shutil.which("c++") or "c++", "-std=c++17", *FLAGS, *flags, "-x", "c++", str(source), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def build(folder: Path, *sanitizer: str) -> Path:
    """The driver under a sanitizer, where the compiler has one that this system's memory layout suits."""
    trial = folder / "trial.cpp"
    trial.write_text("int main() { return 0; }")
    try:
        compile_program(trial, folder / "trial", *sanitizer)
        subprocess.run([folder / "trial"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{' '.join(sanitizer)} does not work here: {getattr(error, 'stderr', error)}")
    compile_program(SOURCES / "drive_se.cpp", folder / "drive_se", *sanitizer)
    return folder / "drive_se"


def run(program: Path, *args: str, **options: int) -> str:
    """What it printed; ``options`` are ThreadSanitizer's."""
    environment = {"TSAN_OPTIONS": ":".join(f"{k}={v}" for k, v in ({"halt_on_error": 1} | options).items())}
    done = subprocess.run([program, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000]
    return done.stdout


@pytest.mark.slow
def test_clean_under_address_sanitizer_and_as_documented(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert run(program).endswith("ok\n")
    assert run(program, "plans") in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("thread"), "-fsanitize=thread")


@pytest.mark.slow
def test_clean_under_thread_sanitizer(watched):
    assert run(watched, "small").endswith("ok\n")


@pytest.mark.slow
def test_no_barrier_can_be_left_out(watched):
    # each report ends a process of its own, and nobody reads it
    noticed = run(watched, "barriers", symbolize=0).count(": noticed")
    assert noticed > 50
