"""Bytes that an SE block moves, counted and not timed: this project's Triton kernels, eager PyTorch, torch.compile.

    python -m benchmarks.traffic [--stage 1 2 3 4] [--dtype bfloat16 float32] [--output FILE.md]

In units of one activation tensor, which is what a read or a write of the whole activation costs (design section 5); the
small tensors, (N, C), (N, R) and the weights, are counted apart. No GPU is needed:

    Triton          every access of the kernels, in Triton's interpreter: the lanes inside the mask, times their size
    eager           ATen's operators as they are dispatched: the inputs and outputs of each once, views free, a
                    broadcast tensor as large as it is in memory
    torch.compile   Inductor's own count for its graphs, each buffer of a fused kernel once
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import triton
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder

from kernels import FusedSEBlock, SEBlock, se_triton

STAGES = {1: (256, 56), 2: (512, 28), 3: (1024, 14), 4: (2048, 7)}  # channels and side of SE-ResNet50 at 224 px
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
BATCH = (
    8  # of eager and torch.compile: enough for every weight to be smaller than an activation, which tells them apart
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Traffic:
    """One direction's: ``activation`` in units of an activation tensor, ``small`` in bytes."""

    activation: float
    small: int


Counter = Callable[[int, str, torch.dtype], tuple[Traffic, Traffic]]


def make_case(stage: int, layout: str, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    """x and dout of a stage."""
    channels, side = STAGES[stage]
    x, dout = (torch.randn(batch, channels, side, side).to(dtype).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    return x.requires_grad_(), dout


def triton_traffic(stage: int, layout: str, dtype: torch.dtype) -> tuple[Traffic, Traffic]:
    """Forward and backward of the Triton kernels, every gradient, at a batch of one."""
    if not se_triton.INTERPRETED:
        raise RuntimeError("Triton's kernels were imported to run on the GPU; start Python with TRITON_INTERPRET=1")
    x, dout = make_case(stage, layout, dtype, batch=1)
    block = FusedSEBlock(x.shape[1], bias=True).to(dtype)
    w1, b1, w2, b2 = (p.detach() for p in block.parameters())
    x = x.detach()
    with counted_accesses() as forward:
        out, pooled, hidden, gate = se_triton.se_fwd(x, w1, b1, w2, b2, "relu", "sigmoid")
    with counted_accesses() as backward:
        dx, *_ = se_triton.se_bwd(dout, x, w1, w2, pooled, hidden, gate, "relu", "sigmoid", [True] * 5)
    activations = [x, out, dout, dx]
    return _split(forward, activations), _split(backward, activations)


@contextlib.contextmanager
def counted_accesses() -> Iterator[list[tuple[int, int]]]:
    """Notes (lowest address, bytes) of each load and store in Triton's interpreter; its unmasked ones come here too."""
    noted: list[tuple[int, int]] = []

    def counting(access: Callable[..., Any], position_of_mask: int) -> Callable[..., Any]:
        def counted(builder: Any, pointers: Any, *args: Any) -> Any:
            inside = args[position_of_mask].data
            if inside.any():
                size = pointers.get_element_ty().primitive_bitwidth // 8
                noted.append((int(pointers.data[inside].min()), int(inside.sum()) * size))
            return access(builder, pointers, *args)

        return counted

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting(load, 0)),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting(store, 1)),
    ):
        yield noted


def _split(noted: list[tuple[int, int]], activations: list[Tensor]) -> Traffic:
    """Which of the accesses went to an activation, told by their addresses."""
    unit = activations[0].nbytes
    of_activations = sum(
        size for start, size in noted if any(0 <= start - tensor.data_ptr() < unit for tensor in activations)
    )
    return Traffic(of_activations / unit, sum(size for _, size in noted) - of_activations)


def eager_traffic(stage: int, layout: str, dtype: torch.dtype) -> tuple[Traffic, Traffic]:
    """Forward and backward of `SEBlock`, every gradient."""
    x, dout = make_case(stage, layout, dtype, batch=BATCH)
    block = SEBlock(x.shape[1]).to(dtype)
    with _CountedOperators(x.nbytes) as forward:
        out = block(x)
    with _CountedOperators(x.nbytes) as backward:
        torch.autograd.grad(out, [x, *block.parameters()], dout)
    return forward.traffic(), backward.traffic()


class _CountedOperators(TorchDispatchMode):
    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.sizes += [min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors]
        return result

    def traffic(self) -> Traffic:
        return _by_size(self.sizes, self.unit)


def _by_size(sizes: Sequence[int], unit: int) -> Traffic:
    large = sum(size for size in sizes if size >= unit)
    return Traffic(large / unit, sum(sizes) - large)


def compiled_traffic(stage: int, layout: str, dtype: torch.dtype) -> tuple[Traffic, Traffic]:
    """Forward and backward of `SEBlock` as Inductor compiles it for the CPU; compiles, so it takes a while."""
    x, dout = make_case(stage, layout, dtype, batch=BATCH)
    block = SEBlock(x.shape[1]).to(dtype)
    torch.compiler.reset()
    with counted_graphs() as graphs:
        out = torch.compile(block, fullgraph=True)(x)
        torch.autograd.grad(out, [x, *block.parameters()], dout)
    forward, backward = graphs
    return _by_size(forward, x.nbytes), _by_size(backward, x.nbytes)


@contextlib.contextmanager
def counted_graphs() -> Iterator[list[list[int]]]:
    """Notes, for each graph that Inductor compiles, the bytes of each access to a buffer as `count_bytes` adds them."""
    noted: list[list[int]] = []
    compile_to_module = GraphLowering.compile_to_module

    def counting(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        nodes = graph.scheduler.nodes
        accesses = [node.get_read_write_buffer_accesses(include_reads=True, include_writes=True) for node in nodes]
        sizes = [size for of_node in accesses for size in of_node.values()]
        assert sum(sizes) == graph.count_bytes()[0]
        noted.append(sizes)
        return module

    with (
        mock.patch.object(GraphLowering, "compile_to_module", counting),
        # a graph out of a cache would not be lowered, nor counted
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield noted


COUNTERS: dict[str, Counter] = {
    "eager": eager_traffic,
    "torch.compile": compiled_traffic,
    "Triton kernels": triton_traffic,
}


def report(stages: Sequence[int], dtypes: Sequence[str]) -> str:
    lines = [
        "| stage | layout | dtype | " + " | ".join(f"{name} fwd / bwd" for name in COUNTERS) + " | small, Triton |",
        "|---" * (len(COUNTERS) + 4) + "|",
    ]
    for stage in stages:
        for layout in LAYOUTS:
            for name in dtypes:
                counts = {way: counter(stage, layout, DTYPES[name]) for way, counter in COUNTERS.items()}
                units = [f"{f.activation:.2f} / {b.activation:.2f}" for f, b in counts.values()]
                small = "{:.0f} / {:.0f} KiB".format(*(t.small / 1024 for t in counts["Triton kernels"]))
                lines.append(f"| {stage} | {layout} | {name} | {' | '.join(units)} | {small} |")
                print(lines[-1], file=sys.stderr)
    return HEAD.format(
        date=datetime.date.today(), torch=torch.__version__, triton=triton.__version__, table="\n".join(lines)
    )


HEAD = """# Traffic of the SE block

By `python -m benchmarks.traffic`, {date}; torch {torch}, triton {triton}; forward / backward, every gradient.
In units of one activation tensor. Design section 5 has 3 / 10 for eager, 3 / 4 for Inductor, and 3 / 4 as the limit of
a kernel that keeps nothing on the chip between its two sweeps. The `cuda` backend's one-read path moves 2 / 3 by
construction (x in, out out; x and dout in, dx out): the tests count it where they run its kernels on the CPU.
The last column is what the Triton kernels move besides, at a batch of one: partial sums, pooled, hidden, gate, weights
and their gradients.

{table}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic")
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    args = parser.parse_args(argv)
    text = report(args.stage, args.dtype)
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
