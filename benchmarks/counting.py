"""Counts bytes without timing anything: Triton kernels in the interpreter, ATen operators, graphs that Inductor makes.

A tensor of activations is told from the others by its address, or by its size: the batches of `benchmarks.traffic` are
large enough for every weight to be smaller than a quarter of an activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder


@dataclass(frozen=True)
class Traffic:
    """One direction's: ``activation`` in units of an activation tensor, ``small`` in bytes."""

    activation: float
    small: int


class Access(NamedTuple):
    """What an operator reads or writes of one tensor; ``operator`` is "" for code that Inductor made itself."""

    operator: str
    size: int  # in bytes


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


def by_address(noted: Sequence[tuple[int, int]], activations: Sequence[Tensor]) -> Traffic:
    """Which of the accesses went to an activation, whose unit is the size of the first."""
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in activations]
    of_activations = sum(size for start, size in noted if any(low <= start < high for low, high in spans))
    return Traffic(of_activations / activations[0].nbytes, sum(size for _, size in noted) - of_activations)


def by_size(accesses: Sequence[Access], unit: int) -> Traffic:
    """Which of the accesses went to an activation; a bool beside float32 has a quarter of the unit."""
    large = sum(access.size for access in accesses if access.size >= unit / 4)
    return Traffic(large / unit, sum(access.size for access in accesses) - large)


class CountedOperators(TorchDispatchMode):
    """Notes the inputs and outputs of each ATen operator once, views free, a broadcast tensor as large as in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.accesses: list[Access] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "prim":
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.accesses += self.accesses_of(func, args, tensors)
        return result

    def accesses_of(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Access]:
        return [Access(str(func), min(t.nbytes, t.untyped_storage().nbytes())) for t in tensors]


class _Counted(Exception):
    """Everything is known that was to be counted."""


def inductor_accesses(
    function: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor | None = None
) -> tuple[list[Access], list[Access]]:
    """The accesses of the forward and of the backward graph of ``function``, as Inductor's `count_bytes` adds them up.

    The graphs are lowered, fused and scheduled; their C++ is not compiled, and what the function returns is garbage.
    """
    torch.compiler.reset()
    noted: list[list[Access]] = []
    compile_to_module = GraphLowering.compile_to_module

    def counting(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        accesses = [access for node in graph.scheduler.nodes for access in _of_node(node)]
        assert sum(access.size for access in accesses) == graph.count_bytes()[0]
        noted.append(accesses)
        if len(noted) == 2:
            raise _Counted  # before garbage is taken for an index
        return module

    with (
        mock.patch.object(GraphLowering, "compile_to_module", counting),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: lambda *of_kernel: None),
        # a graph out of a cache would not be lowered, nor counted
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        try:
            torch.autograd.grad(torch.compile(function, fullgraph=True)(), leaves, dout)
        except Exception:  # of ours, or what torch.compile made of it
            if len(noted) < 2:
                raise
    forward, backward = noted
    return forward, backward


def _of_node(node: Any) -> Iterator[Access]:
    extern = isinstance(node, ExternKernelSchedulerNode)
    name = str(getattr(node.node, "op_overload", None) or type(node.node).__name__) if extern else ""
    for size in node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).values():
        yield Access(name, size)
