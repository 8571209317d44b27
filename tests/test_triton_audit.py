"""What the Triton kernels move, and what becomes of them on a GPU: the two audits of benchmarks/, on a part of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import traffic
from kernels import se_triton

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not se_triton.INTERPRETED, reason="bytes are counted in Triton's interpreter")
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
@pytest.mark.parametrize("stage", traffic.STAGES)
def test_the_kernels_move_three_and_four_activations(stage, layout):
    forward, backward = traffic.triton_traffic(stage, layout, torch.bfloat16)
    assert (forward.activation, backward.activation) == (3.0, 4.0)
    channels, _ = traffic.STAGES[stage]
    weights = 2 * 2 * channels * (channels // 16)
    # besides, at a batch of one: each weight once and its gradient once, and (N, C) tensors, of which there are few
    assert forward.small < weights + 200 * 4 * channels
    assert backward.small < 2 * weights + 400 * 4 * channels


def test_eager_moves_what_the_design_says():
    forward, backward = traffic.eager_traffic(4, "channels_last", torch.bfloat16)
    assert (forward.activation, backward.activation) == (3.0, 10.0)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The widest configuration of each kernel, compiled in a process of their own: here the kernels are interpreted."""
    folder = tmp_path_factory.mktemp("audit")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "benchmarks.compile_audit", "--arch", "90", "--widest", "--cu", str(folder)]
    done = subprocess.run(
        [*command, "--json", str(folder / "rows.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())


def test_nothing_spills_and_aligned_sweeps_move_16_bytes_at_once(audited):
    assert not any(row["local"] or row["local_accesses"] for row in audited)
    aligned = [row for row in audited if row["load_bits"] == 128]
    assert {order for row in aligned for order in ("channels", "pixels") if row["kernel"].endswith(order)} == {
        "channels",
        "pixels",
    }
    assert all(128 in row["loads"] for row in aligned)
    assert all(128 in row["stores"] for row in aligned if "scale" in row["kernel"])
