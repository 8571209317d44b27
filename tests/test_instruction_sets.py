"""The C++ kernels for instruction sets that this processor would not choose by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kernels._C", reason="csrc is not built", exc_type=ImportError)

CHOSEN = (
    "(test_values_and_gradients and not 2048) or rounds_to_nearest or 6016"  # of the SE block
    " or (every_switch and plain) or 130x17 or (mask_says and plain) or sign_is"  # of the tail
    " or carried"
    " or every_step_on_the_cpu or sides_around"  # of the images
)
NOT_HERE = 77
# One process for the question and the tests: to start takes longer than they do
CODE = f"""
import sys, pytest, torch
from kernels import _C
if torch.ops.kernels_C.instruction_set() != sys.argv[1]:
    sys.exit({NOT_HERE})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", {CHOSEN!r}, *sys.argv[2:]]))
"""


@pytest.mark.parametrize(("capability", "name"), [("default", "baseline"), ("avx2", "AVX2")])
def test_other_instruction_sets(capability: str, name: str) -> None:
    tests = [str(Path(__file__).with_name(f"test_{of}.py")) for of in ("csrc_se", "csrc_tail", "images")]
    run = subprocess.run(
        [sys.executable, "-c", CODE, name, *tests],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == NOT_HERE:
        pytest.skip(f"this processor does not run {name}")
    assert run.returncode == 0, run.stdout + run.stderr
