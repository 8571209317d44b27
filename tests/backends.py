"""The fused backends that tests run, and the device each runs on."""

import pytest

from kernels import se_triton

# Triton's kernels run on the GPU where there is one, else in the interpreter on the CPU
DEVICES = {"cpu": "cpu", "triton": "cpu" if se_triton.INTERPRETED else "cuda"}
FUSED = ("cpu", pytest.param("triton", marks=() if se_triton.INTERPRETED else pytest.mark.gpu))
