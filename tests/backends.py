"""The fused backends that tests run, the device each runs on, and how a test sees which of them did the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import (
    available_backends,
    norm_pool_cpu,
    norm_pool_triton,
    se_cpu,
    se_cuda,
    se_triton,
    tail_cpu,
    tail_triton,
)

MODULES = {"cpu": se_cpu, "triton": se_triton, "cuda": se_cuda}
TAIL_MODULES = {"cpu": tail_cpu, "triton": tail_triton}
POOL_MODULES = {"cpu": norm_pool_cpu, "triton": norm_pool_triton}
# Triton's kernels run on the GPU where there is one, else in the interpreter on the CPU
DEVICES = {"cpu": "cpu", "triton": "cpu" if se_triton.INTERPRETED else "cuda", "cuda": "cuda"}


def _on_gpu(backend: str) -> object:
    why_not = available_backends()[backend] if torch.cuda.is_available() else "needs an NVIDIA GPU"
    return pytest.param(backend, marks=(pytest.mark.gpu, pytest.mark.skipif(why_not != "ok", reason=why_not)))


ON_GPU = (_on_gpu("triton"), _on_gpu("cuda"))
FUSED = ("cpu", *(ON_GPU if torch.cuda.is_available() else ("triton",)))
TAILED = FUSED[:2] if torch.cuda.is_available() else FUSED  # the "cuda" backend has no tail


def param(backend: Any, *others: object) -> object:
    """(backend, *others) as one set of parameters, skipped where the backend's own would be."""
    return pytest.param(*getattr(backend, "values", (backend,)), *others, marks=getattr(backend, "marks", ()))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gains "se_fwd:cpu", "tail_bwd:triton" and so on, whenever a backend does work."""
    seen: list[str] = []

    def spy(call, entry: str):
        return lambda *args: seen.append(entry) or call(*args)

    for modules, stem in ((MODULES, "se"), (TAIL_MODULES, "tail"), (POOL_MODULES, "pool")):
        for backend, module in modules.items():
            for name in (f"{stem}_fwd", f"{stem}_bwd"):
                monkeypatch.setattr(module, name, spy(getattr(module, name), f"{name}:{backend}"))
    return seen
