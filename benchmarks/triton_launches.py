"""The launches of `kernels.se_triton`: each configuration that there is, once, and how it is compiled without a GPU.

A configuration is what Triton compiles a kernel for: the dtypes of its tensors and the values of its constants. Nothing
else may count, which `triton_launches` checks; so the list is finite, and it is made by the launch code itself: the
operator is called with tensors that lead it through every branch, and the launches are noted instead of run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import se_triton
from kernels.reference import ACTIVATIONS, GATES

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
SWEEPS = ("_pool_kernel", "_scale_kernel")


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with the arguments it was launched with."""

    kernel: JITFunction
    arguments: dict[str, Any]
    num_warps: int

    @property
    def constants(self) -> dict[str, Any]:
        names = {p.name for p in self.kernel.params if p.is_constexpr}
        return {name: value for name, value in self.arguments.items() if name in names}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def key(self) -> tuple[Any, ...]:
        """Two launches of one key run the same machine code."""
        dtypes = tuple((name, t.dtype) for name, t in self.tensors.items())
        return self.kernel.__name__, dtypes, tuple(self.constants.items()), self.num_warps

    @property
    def variant(self) -> str:
        """The kernel's name, with what it computes where it computes more than one thing."""
        name = self.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        if name == "pool":
            name = "pool dout*x" if self.constants["WITH_DOUT"] else "pool x"
        elif name == "scale":
            name = "scale out = in*gate" + (" + q" if self.constants["WITH_Q"] else "")
        order = self.constants.get("X_ORDER") or self.constants.get("O_ORDER")
        return f"{name}, {order}" if order else name

    @property
    def configuration(self) -> str:
        dtypes = dict.fromkeys(DTYPE_NAMES[t.dtype] for name, t in self.tensors.items() if name not in FLOAT32_ALWAYS)
        return " ".join(
            [*dtypes, *(f"{name}={value}" for name, value in self.constants.items()), f"warps={self.num_warps}"]
        )

    @property
    def load_bits(self) -> int:
        """The width of access that a sweep's configuration promises, and 0 of the other kernels."""
        if self.kernel.__name__ not in SWEEPS:
            return 0
        tile = self.tensors["p_x" if self.kernel.__name__ == "_pool_kernel" else "p_out"]
        return 8 * tile.element_size() * self.constants["VECTOR"]

    @property
    def store_bits(self) -> int:
        return self.load_bits if self.kernel.__name__ == "_scale_kernel" else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _launch_of_key, (self.key,)


FLOAT32_ALWAYS = {"p_part", "p_slice", "p_pooled", "p_hidden", "p_gate", "p_dz", "p_dhidden", "p_q", "p_a", "p_b"}


def _launch_of_key(key: tuple[Any, ...]) -> Launch:
    return _launches()[key]


def triton_launches() -> list[Launch]:
    """One launch for each configuration.

    Raises:
        AssertionError: a kernel is specialised on more than dtypes and constants, or a combination of the launch code's
            own tables was not met, or was met without standing in them.
    """
    return list(_launches().values())


@functools.cache
def _launches() -> dict[tuple[Any, ...], Launch]:
    launches: dict[tuple[Any, ...], Launch] = {}
    with _noted(launches):
        for dtype in se_triton.DTYPES:
            for x, other in _layouts(dtype):
                weights = torch.empty(16, x.shape[1]), None, torch.empty(x.shape[1], 16), None
                _, pooled, hidden, gate = se_triton.se_fwd(x, *weights, "relu", "sigmoid")
                se_triton._pool(x, other)
                se_triton._scale(other, gate, None, x)
                se_triton._scale(other, gate, gate, x)
            for act, gate_fn, bias in itertools.product(ACTIVATIONS, GATES, (False, True)):
                x = torch.empty(1, 32, 8, 8)
                w1, w2, b1, b2 = (torch.empty(size, dtype=dtype) for size in ((16, 32), (32, 16), (16,), (32,)))
                biases = (b1, b2) if bias else (None, None)
                _, pooled, hidden, gate = se_triton.se_fwd(x, w1, biases[0], w2, biases[1], act, gate_fn)
                for wanted in itertools.product((False, True), repeat=2):
                    se_triton.se_bwd(x, x, w1, w2, pooled, hidden, gate, act, gate_fn, [True, *wanted, *wanted])
    for launch in launches.values():
        for p in launch.kernel.params:
            assert p.is_constexpr or p.do_not_specialize, f"{launch.kernel.__name__} is specialised on {p.name}"
    noted = {_sweep_key(launch) for launch in launches.values() if launch.kernel.__name__ in SWEEPS}
    assert noted == _every_sweep(), sorted(map(str, noted ^ _every_sweep()))
    return launches


@contextlib.contextmanager
def _noted(launches: dict[tuple[Any, ...], Launch]) -> Iterator[None]:
    def note(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int) -> None:
            noted = Launch(kernel, dict(zip((p.name for p in kernel.params), args, strict=True)), num_warps)
            launches.setdefault(noted.key, noted)

        return launch

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = note
    try:
        yield
    finally:
        JITFunction.__getitem__ = original


def _layouts(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """x and another tensor of its shape, for every order, tile and alignment."""

    for order, missing in itertools.product(("channels", "pixels"), (0, 4, 1)):
        for side in se_triton.SIDES[order]:
            C, W = (side - missing, 8) if order == "channels" else (8, side - missing)
            memory_format = torch.channels_last if order == "channels" else torch.contiguous_format
            x = torch.empty(1, C, 1, W, dtype=dtype).to(memory_format=memory_format)
            yield x, torch.empty_like(x)
            yield x, torch.empty(1, 1, 1, 1, dtype=dtype).expand(x.shape)
    cropped = torch.empty(1, 8, 9, 9, dtype=dtype)[:, :, 1:, 1:]
    yield cropped, cropped


def _sweep_key(launch: Launch) -> tuple[Any, ...]:
    c = launch.constants
    dtype = next(iter(launch.tensors.values())).dtype
    orders = (c["X_ORDER"], c["D_ORDER"]) if "X_ORDER" in c else (c["O_ORDER"], c["I_ORDER"])
    flag = c["WITH_DOUT"] if "WITH_DOUT" in c else c["WITH_Q"]
    return launch.kernel.__name__, dtype, flag, *orders, c["VECTOR"], c["B_P"], c["B_C"]


def _every_sweep() -> set[tuple[Any, ...]]:
    """What the tables of the launch code allow."""
    every = set()
    for kernel, dtype, flag in itertools.product(SWEEPS, se_triton.DTYPES, (False, True)):
        for order, sides in se_triton.SIDES.items():
            for side, other, vector in itertools.product(sides, (order, "any"), se_triton.VECTORS):
                fits = vector * dtype.itemsize <= 16 and (vector == 1 or order == other != "any")
                alone = kernel == "_pool_kernel" and not flag
                if fits and not (alone and other != order):
                    tile = (se_triton.TILE // side, side) if order == "channels" else (side, se_triton.TILE // side)
                    every.add((kernel, dtype, flag, order, other, vector, *tile))
    return every


class _Driver:
    """A driver that claims an architecture; it compiles and cannot run."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel, with ``asm["cubin"]`` and ``metadata``, for an architecture such as 90."""
    driver.set_active(_Driver(arch))
    launch.kernel.device_caches.clear()  # it is kept by device, and the device is another now
    return launch.kernel.run(*launch.arguments.values(), grid=(1,), warmup=True, num_warps=launch.num_warps)
