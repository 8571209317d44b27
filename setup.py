"""Builds kernels._C from csrc/; metadata is in pyproject.toml.

The install never fails for want of a compiler: what could not be built is written, with the reason, to
kernels/_build.json: {"torch": version built against or null, "cpu": "ok" or reason, "cuda": "ok" or reason}.

CXX, CUDA_HOME, MAX_JOBS and TORCH_CUDA_ARCH_LIST are honoured.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "kernels._C"
SOURCES = [
    "csrc/se_ops.cpp",
    "csrc/se_cpu.cpp",
    "csrc/se_baseline.cpp",
    "csrc/se_avx2.cpp",
    "csrc/se_avx512.cpp",
    "csrc/tail_ops.cpp",
    "csrc/tail_forward.cpp",
    "csrc/tail_backward.cpp",
    "csrc/tail_baseline.cpp",
    "csrc/tail_avx2.cpp",
    "csrc/tail_avx512.cpp",
    "csrc/pool_ops.cpp",
    "csrc/pool_baseline.cpp",
    "csrc/pool_avx2.cpp",
    "csrc/pool_avx512.cpp",
    "csrc/images_ops.cpp",
    "csrc/images_baseline.cpp",
    "csrc/images_avx2.cpp",
    "csrc/images_avx512.cpp",
]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.*h"))
CUDA_SOURCES = ["csrc/se_cuda.cu", "csrc/se_cuda_ops.cpp"]
# Ampere to Blackwell (what is built for 8.0 runs on 8.6 and 8.9), and PTX of the last for what follows; never the GPU
# that happens to be visible.
CUDA_ARCHITECTURES = [(8, 0), (9, 0), (10, 0), (12, 0)]
# ATen's parallel_for is a header: without -fopenmp it would be compiled for one thread.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []
# Contracting a * b + c in one copy of a loop and not in another would make results depend on how a batch was divided.
# Python's own flags often ask for debugging information: of so many inlined functions it is nine tenths of the library.
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-ffp-contract=off", *OPENMP]
NVCC_FLAGS = ["-O3", f"--threads={min(4, os.cpu_count() or 1)}"]  # several architectures at a time


class BuildKernels(build_ext):
    """build_ext that tries C++ with CUDA, then C++ alone, and reports instead of failing."""

    def run(self) -> None:
        report = {"torch": None, "cpu": "", "cuda": ""}
        for place in (Path(self.get_ext_fullpath(NAME)), Path(self.build_lib, self.get_ext_filename(NAME))):
            place.unlink(missing_ok=True)  # a library left by an earlier build would not be what the report says
        self.extensions = []
        set_cuda_home()
        try:
            import torch
            from torch.utils import cpp_extension
        except Exception as error:
            report["cpu"] = report["cuda"] = f"PyTorch could not be imported at build time: {summary(error)}"
        else:
            report["torch"] = torch.__version__
            report["cuda"] = cuda_obstacle(torch, cpp_extension) or self.attempt(cpp_extension, with_cuda=True)
            report["cpu"] = "ok" if report["cuda"] == "ok" else self.attempt(cpp_extension, with_cuda=False)
        package = Path("kernels") if self.inplace else Path(self.build_lib, "kernels")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def attempt(self, cpp_extension, *, with_cuda: bool) -> str:
        """Build the extension; "ok" or the reason why not."""
        obstacle = compiler_obstacle()
        if obstacle:
            return obstacle
        make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
        extension = make(
            NAME,
            SOURCES + (CUDA_SOURCES if with_cuda else []),
            depends=HEADERS,
            define_macros=[("WITH_CUDA", None)] if with_cuda else [],
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            extra_link_args=OPENMP,
        )
        self.distribution.ext_modules = [extension]
        command = cpp_extension.BuildExtension(self.distribution)
        command.inplace, command.editable_mode, command.force = self.inplace, self.editable_mode, self.force
        try:
            command.ensure_finalized()
            command.run()
        except (Exception, SystemExit) as error:
            return f"the build failed: {summary(error)} (pip install -v shows the compiler's output)"
        self.extensions = [extension]
        return "ok"


def compiler_obstacle() -> str:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        subprocess.run([*compiler, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return f"no working C++ compiler: '{shlex.join(compiler)} --version' failed"
    return ""


def set_cuda_home() -> None:
    """torch takes the folder above the nvcc on PATH for CUDA's, which misses where that nvcc is a link or a script."""
    nvcc = shutil.which("nvcc")
    guesses = [*(Path(nvcc).resolve().parents[1:2] if nvcc else []), Path("/usr/local/cuda")]
    for guess in guesses:
        if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and (guess / "include" / "cuda_runtime.h").is_file():
            os.environ["CUDA_HOME"] = str(guess)


def cuda_obstacle(torch, cpp_extension) -> str:
    """Why the CUDA sources cannot be compiled here, or "" with TORCH_CUDA_ARCH_LIST set."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if not nvcc.is_file():
        return "nvcc was not found (set CUDA_HOME)"
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=False, capture_output=True, text=True).stdout.split()
        known = [f"{major}.{minor}" for major, minor in CUDA_ARCHITECTURES if f"compute_{major}{minor}" in listed]
        if not known:
            return f"{nvcc} compiles for none of the architectures of CUDA_ARCHITECTURES"
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"
    return ""


def summary(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 200)}" if lines else type(error).__name__


setup(
    # Replaced when it is built; until then it says what belongs into a source distribution.
    ext_modules=[Extension(NAME, SOURCES, depends=HEADERS + CUDA_SOURCES, optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
