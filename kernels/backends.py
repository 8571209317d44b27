"""Which implementation can run here, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from pathlib import Path

import torch

BACKENDS = ("eager", "cpu", "triton", "cuda")
# What "auto" takes for the tensors of a device: the first that can run. On the CPU that is what measured faster than
# eager and torch.compile (README). On a GPU nothing has been timed yet: "triton" is first because it needs no nvcc;
# "cuda" moves fewer bytes, and its figures from benchmarks/gpu_suite.sh are what should decide.
NATIVE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
# A tail's statistics are taken over the batch, which no chip holds between the two passes: nothing for "cuda" to gain
OPERATORS = {
    "squeeze_excite": BACKENDS,
    "residual_tail": ("eager", "cpu", "triton"),
    "norm_relu_pool": ("eager", "cpu", "triton"),
    "prepare_images": ("eager", "cpu", "triton"),
}


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot serve on this machine, or not for this tensor."""


def available_backends() -> dict[str, str]:
    """Maps each backend to ``"ok"``, or to the reason why it cannot run on this machine."""
    return dict(_status())


@functools.cache
def _status() -> dict[str, str]:
    return {"eager": "ok", "cpu": _built("cpu"), "triton": _triton_status(), "cuda": _cuda_status()}


def _built(part: str) -> str:
    """Whether the extension of csrc/ is there, with its "cpu" or its "cuda" operators."""
    build_file = Path(__file__).with_name("_build.json")
    build = json.loads(build_file.read_text()) if build_file.exists() else {}
    if build.get(part, "ok") != "ok":
        return f"not built: {build[part]}"
    # A library built against another torch may load and then crash: refuse it before it is loaded.
    if "torch" in build and build["torch"] != torch.__version__:
        return (
            f"built against torch {build['torch']}, but torch {torch.__version__} is running; "
            "reinstall with: pip install --no-build-isolation -e ."
        )
    try:
        importlib.import_module(f"kernels.se_{part}")
    except ImportError as error:
        return f"csrc is not built ({error}); install with: pip install --no-build-isolation -e ."
    return "ok"


def _cuda_status() -> str:
    built = _built("cuda")
    return built if built != "ok" else _gpu_status("no CUDA device")


def _gpu_status(without: str) -> str:
    if not torch.cuda.is_available():
        return without
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer; this one has {major}.{minor}"
    return "ok"


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1`` when they were first imported)."""
    from kernels.se_triton import INTERPRETED

    return INTERPRETED


def _triton_status() -> str:
    try:
        interpreted = triton_interpreted()
    except ImportError as error:
        return f"triton cannot be imported ({error}); install with: pip install triton"
    if interpreted:
        return "ok"
    return _gpu_status("no CUDA device (for tests, TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")


# A constant of the machine: torch.compile asks once, while it traces
@torch.compiler.assume_constant_result
def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, operator: str = "squeeze_excite") -> str:
    """The backend whose ``operator``, of `OPERATORS`, serves a tensor of this device and dtype.

    ``"auto"`` takes the first of `NATIVE` that can run, else ``eager``, and says so once by a warning.

    Raises:
        ValueError: unknown backend name.
        BackendUnavailable: the named backend cannot serve this tensor here.
    """
    if backend == "auto":
        reasons = []
        for native in NATIVE.get(device.type, ()):
            reason = _refusal(native, device, dtype, operator)
            if reason is None:
                return native
            reasons.append(f"{native}: {reason}")
        _warn_eager(operator, device.type, "; ".join(reasons) or f"no fused kernel for {device.type} tensors")
        return "eager"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {('auto', *BACKENDS)}")
    reason = _refusal(backend, device, dtype, operator)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot serve: {reason}")
    return backend


def _refusal(backend: str, device: torch.device, dtype: torch.dtype, operator: str) -> str | None:
    if backend not in OPERATORS[operator]:
        return f"it has no {operator}; use 'auto', or one of {OPERATORS[operator]}"
    status = _status()[backend]
    if status != "ok":
        return status
    if backend == "cpu" and device.type != "cpu":
        return f"it takes CPU tensors, and x is on {device}"
    if backend in ("triton", "cuda"):
        if dtype == torch.float64:
            return "it computes in float32, and x is float64; use backend='eager', or 'cpu' on the CPU"
        wanted = "cpu" if backend == "triton" and triton_interpreted() else "cuda"
        if device.type != wanted:
            return f"it takes {wanted.upper()} tensors here, and x is on {device}"
    return None


@functools.cache
def _warn_eager(operator: str, device_type: str, reason: str) -> None:
    warnings.warn(f"{operator} runs eagerly on {device_type}: {reason}", RuntimeWarning, stacklevel=4)
