"""What a whole training step of SE-ResNet50 moves for one image of 224 px, and what it keeps for the backward pass.

Forward and backward in bfloat16 with channels-last activations; the optimizer, which moves weights alone, is left out.
Bytes are a line in the batch size: the slope between two batches is what an image costs, and what is left are weights
and their gradients. Nothing is computed: the tensors are fake.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import pool_traffic, tail_traffic
from benchmarks.counting import Access, CountedOperators, inductor_accesses
from engine.models import create_model
from kernels import fuse_tails

MODEL, SIDE, CLASSES = "seresnet50", 224, 1000
BATCHES = (2, 4)
COMPILED_BATCH = 4  # weights reach the code that Inductor makes only as (C,) vectors: one batch is enough
PRODUCTS = ("aten.mm.", "aten.addmm.")  # the classifier's: almost all weights, and left out


class _CountedTails(CountedOperators):
    """A tail's operators move what the Triton kernels were counted to move for a tail of that kind."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.pool_units = tail_units(), pool_units()

    def accesses_of(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Access]:
        if func.namespace != "kernels":
            return super().accesses_of(func, args, tensors)
        if func is torch.ops.kernels.tail_fwd.default:
            y, kind, direction = args[0], tail_traffic.Kind(args[4] is not None, args[1] is not None, args[16]), 0
        elif func is torch.ops.kernels.pool_fwd.default:
            return [Access(str(func), round(self.pool_units[0] * args[0].nbytes))]
        elif func is torch.ops.kernels.pool_bwd.default:
            return [Access(str(func), round(self.pool_units[1] * args[1].nbytes))]
        else:
            assert func is torch.ops.kernels.tail_bwd.default, func
            y, kind, direction = args[1], tail_traffic.Kind(args[3] is not None, args[12], args[7].numel() > 0), 1
        return [Access(str(func), round(self.units[kind][direction] * y.nbytes))]


@functools.cache
def tail_units() -> dict[tail_traffic.Kind, tuple[float, float]]:
    """Activations that the Triton kernels move of each kind, channels-last bfloat16: the same at every such shape."""
    like = torch.zeros(1, 64, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    counted = {kind: tail_traffic.triton_traffic(kind, like) for kind in tail_traffic.KINDS}
    return {kind: (forward.activation, backward.activation) for kind, (forward, backward) in counted.items()}


@functools.cache
def pool_units() -> tuple[float, float]:
    """The same of the stem's BatchNorm, ReLU and pool."""
    forward, backward = pool_traffic.triton_traffic(pool_traffic.activation(torch.bfloat16))
    return forward.activation, backward.activation


def make_network(name: str = MODEL, *, fused: bool = False) -> nn.Module:
    model = create_model(name, num_classes=CLASSES).bfloat16().to(memory_format=torch.channels_last).train()
    if fused:
        fuse_tails(model, backend="cpu")
    return model


def make_batch(size: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, side, side).bfloat16().to(memory_format=torch.channels_last)
    return images, torch.zeros(size, dtype=torch.long)


def dispatched(model: nn.Module, batch: int) -> Counter[str]:
    """Bytes by operator of a step, forward and backward."""
    mode, counted = FakeTensorMode(), _CountedTails()
    state = {name: mode.from_tensor(t) for name, t in model.state_dict(keep_vars=True).items()}
    with mode:
        images, labels = make_batch(batch)
        with counted:
            loss = F.cross_entropy(torch.func.functional_call(model, state, (images,)), labels)
            torch.autograd.grad(loss, [t for t in state.values() if t.requires_grad])
    total: Counter[str] = Counter()
    for access in counted.accesses:
        total[access.operator] += access.size
    return total


def per_image(model: nn.Module) -> Counter[str]:
    """Bytes of an image by operator; the convolutions under one name."""
    fewer, more = (dispatched(model, batch) for batch in BATCHES)
    return _named({name: (more[name] - fewer[name]) / (BATCHES[1] - BATCHES[0]) for name in more})


def compiled_per_image(model: nn.Module) -> Counter[str]:
    """The same of Inductor's graphs."""
    images, labels = make_batch(COMPILED_BATCH)
    graphs = inductor_accesses(lambda: F.cross_entropy(model(images), labels), list(model.parameters()))
    total: Counter[str] = Counter()
    for access in (access for graph in graphs for access in graph):
        total[access.operator] += access.size
    return _named({name: size / COMPILED_BATCH for name, size in total.items()})


def _named(sizes: dict[str, float]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(PRODUCTS):
            continue
        total["convolutions" if "convolution" in name else name] += size
    return total


def network_table() -> str:
    eager = per_image(make_network())
    compiled = compiled_per_image(make_network())
    compiled["convolutions"] = eager["convolutions"]
    fused = per_image(make_network(fused=True))
    lines = ["| | convolutions, MB | the rest, MB | in all, MB | of eager |", "|---|---|---|---|---|"]
    for way, counts in (("eager", eager), ("torch.compile", compiled), ("fused tails", fused)):
        total, of_convolutions = sum(counts.values()) / 1e6, counts["convolutions"] / 1e6
        share = total * 1e6 / sum(eager.values())
        lines.append(f"| {way} | {of_convolutions:.1f} | {total - of_convolutions:.1f} | {total:.1f} | {share:.2f} |")
    return "\n".join(lines)


def report() -> str:
    return NETWORK.format(table=network_table())


NETWORK = """
## A training step of SE-ResNet50

One image of 224 px, bfloat16, channels-last: forward and backward, weights, their gradients and the optimizer left out.
Eager and fused are counted as ATen's operators are dispatched, a tail as its Triton kernels in the table above;
torch.compile as Inductor counts its graphs. A convolution is counted alike in all three: forward its input and output,
backward dout, input and dinput, once each. A gradient that reaches a tensor from two sides is added by autograd in
eager and fused, and that is in the sum.

{table}
"""
