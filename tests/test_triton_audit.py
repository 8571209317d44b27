"""What the Triton kernels move, and what becomes of them on a GPU: the two audits of benchmarks/, on a part of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import pool_traffic, tail_traffic, traffic
from kernels import se_triton

ROOT = Path(__file__).parent.parent


interpreted = pytest.mark.skipif(not se_triton.INTERPRETED, reason="bytes are counted in Triton's interpreter")


def small_activation(layout: str, dtype: torch.dtype, size: tuple[int, ...] = (16, 64, 8, 8)) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype).to(memory_format=traffic.LAYOUTS[layout])


@interpreted
@pytest.mark.parametrize(
    ("channels", "side", "layout"),
    # of both layouts, with many tiles to a sample and with few, aligned and not
    [(64, 28, "channels_last"), (128, 28, "contiguous"), (512, 7, "channels_last"), (320, 7, "contiguous")],
)
def test_the_kernels_move_three_and_four_activations(channels, side, layout):
    x = small_activation(layout, torch.bfloat16, (1, channels, side, side))
    forward, backward = traffic.triton_traffic(x)
    assert (forward.activation, backward.activation) == (3.0, 4.0)
    weights = 2 * 2 * channels * (channels // 16)
    # besides, at a batch of one: each weight once and its gradient once, and (N, C) tensors, of which there are few
    assert forward.small < weights + 30 * 4 * channels
    assert backward.small < 2 * weights + 50 * 4 * channels


def test_eager_moves_what_the_design_says():
    forward, backward = traffic.eager_traffic(traffic.activation(4, "channels_last", torch.bfloat16))
    assert (forward.activation, backward.activation) == (3.0, 10.0)


@interpreted
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
@pytest.mark.parametrize("kind", tail_traffic.KINDS, ids=str)
def test_a_tail_moves_what_two_sweeps_each_way_need(kind, layout):
    """Each sweep reads what it needs once, and the ReLU's bits, where there are any, are a sixteenth of a unit."""
    forward, backward = tail_traffic.triton_traffic(kind, small_activation(layout, torch.bfloat16))
    bits = 1 / 16 if kind.residual else 0
    assert forward.activation == 3 + kind.residual + kind.residual_norm + bits
    assert backward.activation == 5 + kind.residual + 2 * kind.residual_norm + 2 * bits
    if not kind.residual_norm:
        assert forward.activation <= 4.1
        assert backward.activation <= 6.2


@interpreted
def test_a_stem_moves_its_input_twice_and_a_half_forward():
    """Behind the statistics it reads each pixel once, and the last column of a window once more, for the next one."""
    forward, backward = pool_traffic.triton_traffic(pool_traffic.activation(torch.bfloat16, side=16))
    assert forward.activation == 1 + 1 + 1 / 2 + 1 / 4 + 1 / 8
    shared = 7 / 8  # of eight columns of windows, all but the first are read for the one before
    sums, grads = 1 / 4 + 1 / 8, 2 + (1 + shared) * (1 / 4 + 1 / 8)
    assert sums + grads < backward.activation <= sums + grads + 1 / 4  # and y where a code points


def test_an_eager_tail_moves_what_the_design_says():
    kind = tail_traffic.Kind(se=True, residual=True)
    forward, backward = tail_traffic.eager_traffic(kind, small_activation("channels_last", torch.bfloat16))
    assert (forward.activation, backward.activation) == (10.0, 16.0)


def test_the_committed_table_has_the_tail_within_its_budget():
    """4.1 and 6.2 units in every layout and dtype, where the residual has no BatchNorm of its own."""
    table = (ROOT / "benchmarks" / "results" / "traffic.md").read_text()
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| BN")]
    units = {
        (row[0].strip(), row[1].strip(), row[2].strip()): [float(part) for part in row[5].split("/")]
        for row in rows
        if "add(BN)" not in row[0]
    }
    assert {key[1:] for key in units} == {(layout, dtype) for layout in traffic.LAYOUTS for dtype in traffic.DTYPES}
    assert any("SE" in key[0] for key in units)
    assert any("SE" not in key[0] for key in units)
    assert all(forward <= 4.1 and backward <= 6.2 for forward, backward in units.values())


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


@pytest.mark.slow
def test_nothing_spills_and_aligned_sweeps_move_16_bytes_at_once(audited):
    assert not any(row["local"] or row["local_accesses"] for row in audited)
    aligned = [row for row in audited if row["load_bits"] == 128]
    sweeps = ("pool", "scale", "tail moments", "tail apply", "tail sums", "tail apply_bwd")
    for sweep in sweeps:
        orders = {row["kernel"].rpartition(", ")[2] for row in aligned if row["kernel"].startswith(sweep)}
        assert orders >= {"channels", "pixels"}, sweep
    assert all(128 in row["loads"] for row in aligned)
    storing = [row for row in audited if row["store_bits"] == 128]
    assert {row["kernel"].split(",")[0] for row in storing} >= {"tail apply", "tail apply_bwd"}
    assert all(128 in row["stores"] for row in storing)
