"""The launches of the Triton kernels: each configuration that there is, once, and how it is compiled without a GPU.

A configuration is what Triton compiles a kernel for: the dtypes of its tensors and the values of its constants. Nothing
else may count, which `triton_launches` checks; so the list is finite, and it is made by the launch code itself: the
operators are called with tensors that lead them through every branch, and the launches are noted instead of run.

The SE block's are all there. The residual tail has too many switches for that: every combination of them is there with
aligned tensors, and every alignment and mixture of layouts for the widest combinations; a backward pass that is not
asked for every gradient runs a part of one that is, and is left out.
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

from kernels import images_triton, norm_pool_triton, se_triton, tail_triton, triton_tiles
from kernels.images import COLUMNS
from kernels.norms import FixedNorm
from kernels.reference import ACTIVATIONS, GATES
from kernels.residual_tail import SE, TAIL_ACTIVATIONS, How, Saved
from kernels.triton_tiles import OPTIONS

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
SWEEPS = ("_pool_kernel", "_scale_kernel")
# The sweeps over activations, and the tensor that tells the width of an access
TILES = {
    "_pool_kernel": "p_x",
    "_scale_kernel": "p_out",
    "_moments_kernel": "p_x",
    "_apply_kernel": "p_out",
    "_sums_kernel": "p_y",
    "_apply_bwd_kernel": "p_y",
    "_norm_pool_kernel": "p_y",
    "_norm_pool_sums_kernel": "p_y",
    "_norm_pool_bwd_kernel": "p_y",
}
STORING = ("_scale_kernel", "_apply_kernel", "_apply_bwd_kernel", "_norm_pool_kernel", "_norm_pool_bwd_kernel")


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with the arguments it was launched with; ``everywhere`` where it is one to be compiled for every GPU."""

    kernel: JITFunction
    arguments: dict[str, Any]
    num_warps: int
    everywhere: bool = True

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
        if self.kernel.__module__ in TAIL_MODULES or self.constants.get("NORMED"):
            name = f"tail {name}"
        if "norm_pool" in name:
            name = name.replace("norm_pool", "BN+ReLU+pool").replace("_", " ")
        order = next((self.constants[key] for key in ("X_ORDER", "O_ORDER", "ORDER") if key in self.constants), None)
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
        if self.kernel.__name__ not in TILES:
            return 0
        return 8 * self.tensors[TILES[self.kernel.__name__]].element_size() * self.constants["VECTOR"]

    @property
    def store_bits(self) -> int:
        return self.load_bits if self.kernel.__name__ in STORING else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _launch_of_key, (self.key,)


# Of one dtype whatever the activations' and the weights' are
FLOAT32_ALWAYS = {
    *(
        "p_part",
        "p_slice",
        "p_pooled",
        "p_hidden",
        "p_gate",
        "p_dz",
        "p_dhidden",
        "p_q",
        "p_a",
        "p_b",
        "p_pivot",
        "p_t",
    ),
    *("p_shift", "p_m2", "p_stats", "p_stats2", "p_u", "p_u2", "p_coefficients", "p_coefficients2", "p_deviation"),
    *("p_weight", "p_bias", "p_dweight", "p_dbias", "p_mask", "p_code"),
    *("p_pixels", "p_starts", "p_sizes", "p_index", "p_edits", "p_scratch", "p_tables"),
}
TAIL_MODULES = ("kernels.tail_triton_small", "kernels.tail_triton_sweeps")


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
        _launch_blocks()
    noted = {_sweep_key(launch) for launch in launches.values() if launch.kernel.__name__ in SWEEPS}
    assert noted == _every_sweep(), sorted(map(str, noted ^ _every_sweep()))
    for dtype in triton_tiles.DTYPES:
        with _noted(launches):
            _launch_widest_tails(dtype)
            _launch_pool(64, dtype, training=True)
            _launch_images(dtype)
        with _noted(launches, everywhere=False):
            _launch_tails(dtype)
            for missing, training in itertools.product((0, 4, 1), (False, True)):
                _launch_pool(64 - missing, dtype, training=training)
    for launch in launches.values():
        for p in launch.kernel.params:
            assert p.is_constexpr or p.do_not_specialize, f"{launch.kernel.__name__} is specialised on {p.name}"
    return launches


def _launch_blocks() -> None:
    for dtype in triton_tiles.DTYPES:
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


LAYOUTS = (torch.channels_last, torch.contiguous_format)


def _launch_widest_tails(dtype: torch.dtype) -> None:
    """relu(SE(BatchNorm(y)) + residual) in training, with and without a BatchNorm of the residual, in both layouts."""
    for layout, residual in itertools.product(LAYOUTS, ("plain", "norm")):
        y = torch.empty(1, 64, 8, 8, dtype=dtype).to(memory_format=layout)
        _launch_tail(y, y, y, act="relu", residual=residual)


def _launch_tails(dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        y = torch.empty(1, 64, 8, 8, dtype=dtype).to(memory_format=layout)
        switches = itertools.product(TAIL_ACTIVATIONS, ("none", "plain", "norm"), (False, True), (False, True))
        for act, residual, se, training in switches:
            _launch_tail(y, y, y, act=act, residual=residual, se=se, training=training)
        _launch_tail(y, y, y, act="relu", residual="plain", gate="hardsigmoid", affine=False)
        other = next(torch.empty_like(y).contiguous(memory_format=other) for other in LAYOUTS if other != layout)
        for missing in (4, 1):  # what is left then is 4 or 1 elements in an access
            shape = (1, 64 - missing, 8, 8) if layout == torch.channels_last else (1, 64, 1, 64 - missing)
            narrow = torch.empty(shape, dtype=dtype).to(memory_format=layout)
            for residual in ("plain", "norm"):
                _launch_tail(narrow, narrow, narrow, act="relu", residual=residual)
        for residual in ("plain", "norm"):
            _launch_tail(y, other, other, act="relu", residual=residual)


def _launch_tail(
    y: Tensor,
    shortcut: Tensor,
    dout: Tensor,
    *,
    act: str,
    residual: str,
    se: bool = True,
    training: bool = True,
    gate: str = "sigmoid",
    affine: bool = True,
) -> None:
    """Forward and backward, every gradient; ``residual`` is "none", "plain" or "norm"."""
    C, R = y.shape[1], 16
    given = (None, None) if training else (torch.empty(C), torch.empty(C))
    norm = FixedNorm(*((torch.empty(C), torch.empty(C)) if affine else (None, None)), *given, 1e-5, "")
    w1, w2 = torch.empty(R, C, dtype=y.dtype), torch.empty(C, R, dtype=y.dtype)
    added, second = (None if residual == "none" else shortcut), (norm if residual == "norm" else None)
    squeeze = SE(w1, w2, torch.empty(R, dtype=y.dtype), torch.empty(C, dtype=y.dtype), "relu", gate) if se else None
    _, mask, *rest = tail_triton.tail_fwd(y, norm, squeeze, added, second, act)
    kept = added if residual == "norm" or act == "silu" else None
    saved = Saved(y, kept, *((w1, w2) if se else (None, None)), mask, *rest)
    how = How(added is not None, training, training and second is not None, "", "", act, "relu", gate)
    wanted = [True, added is not None, True, True, *[se] * 4, *[second is not None] * 2]
    tail_triton.tail_bwd(dout, saved, how, wanted)


def _launch_pool(C: int, dtype: torch.dtype, *, training: bool) -> None:
    """The stem's BatchNorm, ReLU and pool, forward and backward, every gradient."""
    y = torch.empty(1, C, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    given = (None, None) if training else (torch.empty(C), torch.empty(C))
    norm = FixedNorm(torch.empty(C), torch.empty(C), *given, 1e-5, "")
    out, code, stats = norm_pool_triton.pool_fwd(y, norm)
    norm_pool_triton.pool_bwd(out, y, code, stats, training, "", [True] * 3)


def _launch_images(dtype: torch.dtype) -> None:
    images = (
        torch.empty(12, dtype=torch.uint8),
        torch.empty(1, dtype=torch.int64),
        torch.empty((1, 2), dtype=torch.int32),
    )
    edits, out = torch.empty(1, COLUMNS), torch.empty(1, 3, 2, 2, dtype=dtype)
    images_triton.prepare_images(*images, torch.empty(1, dtype=torch.int64), edits, [0.0] * 3, [1.0] * 3, out)


@contextlib.contextmanager
def _noted(launches: dict[tuple[Any, ...], Launch], *, everywhere: bool = True) -> Iterator[None]:
    def note(kernel: JITFunction, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool) -> None:
            noted = Launch(kernel, dict(zip((p.name for p in kernel.params), args, strict=True)), num_warps, everywhere)
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
    for kernel, dtype, flag in itertools.product(SWEEPS, triton_tiles.DTYPES, (False, True)):
        for order, sides in se_triton.SIDES.items():
            for side, other, vector in itertools.product(sides, (order, "any"), triton_tiles.VECTORS):
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
    return launch.kernel.run(*launch.arguments.values(), grid=(1,), warmup=True, num_warps=launch.num_warps, **OPTIONS)
