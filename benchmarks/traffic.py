"""Bytes that an SE block, a residual tail and a whole network move, counted and not timed, in eager PyTorch, by
torch.compile and by this project's Triton kernels.

    python -m benchmarks.traffic [--part block tail stem network memory] [--stage 1 2 3 4] [--dtype bfloat16 float32]
                                 [--output FILE.md]

In units of one activation tensor, which is what a read or a write of the whole activation costs (design section 5); the
small tensors, (N, C), (N, R) and the weights, are counted apart. No GPU is needed:

    Triton          every access of the kernels, in Triton's interpreter: the lanes inside the mask, times their size
    eager           ATen's operators as they are dispatched: the inputs and outputs of each once, views free, a
                    broadcast tensor as large as it is in memory
    torch.compile   Inductor's own count for its graphs, each buffer of a fused kernel once
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

import torch
import triton
from torch import Tensor

from benchmarks import network_traffic, pool_traffic, saved_memory, tail_traffic
from benchmarks.counting import CountedOperators, Traffic, by_address, by_size, counted_accesses, inductor_accesses
from kernels import FusedSEBlock, SEBlock, se_triton

STAGES = {1: (256, 56), 2: (512, 28), 3: (1024, 14), 4: (2048, 7)}  # channels and side of SE-ResNet50 at 224 px
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
TAIL_STAGE = 4  # the others have the same figures, and take longer
BATCH = 16  # of eager and torch.compile: every weight is then smaller than a quarter of an activation, as by_size wants
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def activation(stage: int, layout: str, dtype: torch.dtype, batch: int = BATCH) -> Tensor:
    """A stage's."""
    channels, side = STAGES[stage]
    return torch.randn(batch, channels, side, side).to(dtype).to(memory_format=LAYOUTS[layout])


def eager_traffic(x: Tensor) -> tuple[Traffic, Traffic]:
    """Forward and backward of `SEBlock`, every gradient."""
    block, dout = SEBlock(x.shape[1]).to(x.dtype), torch.randn_like(x)
    with CountedOperators() as forward:
        out = block(x.requires_grad_())
    with CountedOperators() as backward:
        torch.autograd.grad(out, [x, *block.parameters()], dout)
    return by_size(forward.accesses, x.nbytes), by_size(backward.accesses, x.nbytes)


def compiled_traffic(x: Tensor) -> tuple[Traffic, Traffic]:
    """Forward and backward of `SEBlock` as Inductor compiles it for the CPU."""
    block = SEBlock(x.shape[1]).to(x.dtype)
    x.requires_grad_()
    forward, backward = inductor_accesses(lambda: block(x), [x, *block.parameters()], torch.randn_like(x))
    return by_size(forward, x.nbytes), by_size(backward, x.nbytes)


def triton_traffic(x: Tensor) -> tuple[Traffic, Traffic]:
    """Forward and backward of the Triton kernels, every gradient, at a batch of one."""
    if not se_triton.INTERPRETED:
        raise RuntimeError("Triton's kernels were imported to run on the GPU; start Python with TRITON_INTERPRET=1")
    x = x[:1]
    dout = torch.randn_like(x)
    block = FusedSEBlock(x.shape[1], bias=True).to(x.dtype)
    w1, b1, w2, b2 = (p.detach() for p in block.parameters())
    with counted_accesses() as forward:
        out, pooled, hidden, gate = se_triton.se_fwd(x, w1, b1, w2, b2, "relu", "sigmoid")
    with counted_accesses() as backward:
        dx, *_ = se_triton.se_bwd(dout, x, w1, w2, pooled, hidden, gate, "relu", "sigmoid", [True] * 5)
    large = [x, out, dout, dx]
    return by_address(forward, large), by_address(backward, large)


COUNTERS: dict[str, Callable[[Tensor], tuple[Traffic, Traffic]]] = {
    "eager": eager_traffic,
    "torch.compile": compiled_traffic,
    "Triton kernels": triton_traffic,
}
TAIL_COUNTERS: dict[str, Callable[[tail_traffic.Kind, Tensor], tuple[Traffic, Traffic]]] = {
    "eager": tail_traffic.eager_traffic,
    "torch.compile": tail_traffic.compiled_traffic,
    "Triton kernels": tail_traffic.triton_traffic,
}


STEM_COUNTERS: dict[str, Callable[[Tensor], tuple[Traffic, Traffic]]] = {
    "eager": pool_traffic.eager_traffic,
    "torch.compile": pool_traffic.compiled_traffic,
    "Triton kernels": pool_traffic.triton_traffic,
}


def block_table(stages: Sequence[int], dtypes: Sequence[str]) -> str:
    return BLOCK.format(table=_table("stage", stages, dtypes, [("", COUNTERS)]))


def tail_table(dtypes: Sequence[str]) -> str:
    kinds = [
        (f"{kind}, ", {name: lambda x, c=counter, k=kind: c(k, x) for name, counter in TAIL_COUNTERS.items()})
        for kind in tail_traffic.KINDS
    ]
    return TAIL.format(table=_table("tail, stage", [TAIL_STAGE], dtypes, kinds))


def stem_table(dtypes: Sequence[str]) -> str:
    lines = [f"| dtype | {' | '.join(f'{way} fwd / bwd' for way in STEM_COUNTERS)} |", "|---" * 4 + "|"]
    for name in dtypes:
        counts = [counter(pool_traffic.activation(DTYPES[name])) for counter in STEM_COUNTERS.values()]
        units = [f"{forward.activation:.2f} / {backward.activation:.2f}" for forward, backward in counts]
        lines.append(f"| {name} | {' | '.join(units)} |")
    return STEM.format(table="\n".join(lines))


def _table(title: str, stages: Sequence[int], dtypes: Sequence[str], counted: Sequence[tuple[str, dict]]) -> str:
    ways = list(counted[0][1])
    lines = [
        f"| {title} | layout | dtype | {' | '.join(f'{way} fwd / bwd' for way in ways)} | small, Triton |",
        "|---" * (len(ways) + 4) + "|",
    ]
    for prefix, counters in counted:
        for stage in stages:
            for layout in LAYOUTS:
                for name in dtypes:
                    x = activation(stage, layout, DTYPES[name])
                    counts = [counter(x.clone()) for counter in counters.values()]
                    units = [f"{forward.activation:.2f} / {backward.activation:.2f}" for forward, backward in counts]
                    small = "{:.0f} / {:.0f} KiB".format(*(t.small / 1024 for t in counts[-1]))
                    lines.append(f"| {prefix}{stage} | {layout} | {name} | {' | '.join(units)} | {small} |")
                    print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


HEAD = """# Traffic

By `python -m benchmarks.traffic`, {date}; torch {torch}, triton {triton}; forward / backward, every gradient.
"""
BLOCK = """
## The SE block

In units of one activation tensor. Design section 5 has 3 / 10 for eager, 3 / 4 for Inductor, and 3 / 4 as the limit of
a kernel that keeps nothing on the chip between its two sweeps. The `cuda` backend's one-read path moves 2 / 3 by
construction (x in, out out; x and dout in, dx out): the tests count it where they run its kernels on the CPU.
The last column is what the Triton kernels move besides, at a batch of one: partial sums, pooled, hidden, gate, weights
and their gradients.

{table}
"""
TAIL = """
## The residual tail

In the same units, in training. BatchNorm counts each of its operands once in eager, as ATen's operator has them; its
second reads, one forward and two backward, come on top. The ReLU's bits are a sixteenth of a unit in half precision.

{table}
"""
STEM = """
## The stem: BatchNorm, ReLU, max pool

In units of y, 64 channels, channels-last, in training. What a window has in common with the one on its left the Triton
kernels read twice, the second time from L1, and both are counted: half a unit of y forward; backward a quarter of dout
and of the codes, a byte for every output.

{table}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic")
    parts = ("block", "tail", "stem", "network", "memory")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    text = HEAD.format(date=datetime.date.today(), torch=torch.__version__, triton=triton.__version__)
    if "block" in args.part:
        text += block_table(args.stage, args.dtype)
    if "tail" in args.part:
        text += tail_table(args.dtype)
    if "stem" in args.part:
        text += stem_table(args.dtype)
    if "network" in args.part:
        text += network_traffic.report()
    if "memory" in args.part:
        text += saved_memory.report()
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
