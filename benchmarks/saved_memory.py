"""What a step keeps from its forward pass for the backward pass, counted by hooks on autograd's saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.network_traffic import SIDE, make_batch, make_network
from engine.model_profile import saved_storages, storage_key

BATCH = 4


@dataclass(frozen=True)
class SavedBytes:
    """Each storage once, parameters left out; ``convolutions`` are what convolutions keep, their inputs and weights."""

    total: int
    convolutions: int

    @property
    def others(self) -> int:
        return self.total - self.convolutions


class _TakenByConvolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.mkldnn_convolution):
            self.storages |= {storage_key(t) for t in tree_leaves(args) if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> SavedBytes:
    """Of what ``forward`` keeps for its gradient."""
    with _TakenByConvolutions() as taken:
        storages = saved_storages(forward, parameters)
    return SavedBytes(sum(storages.values()), sum(n for key, n in storages.items() if key in taken.storages))


def per_image(model: nn.Module, *, blocks_alone: bool = False) -> SavedBytes:
    """A training step at 224 px, or its residual blocks without stem and head, with tensors that hold nothing."""
    mode = FakeTensorMode()
    if blocks_alone:
        model = nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4)
    state = {name: mode.from_tensor(t) for name, t in model.state_dict(keep_vars=True).items()}
    with mode:
        images, labels = make_batch(BATCH)
        if blocks_alone:
            images = torch.empty(BATCH, 64, SIDE // 4, SIDE // 4, dtype=torch.bfloat16)
            images = images.to(memory_format=torch.channels_last).requires_grad_()

        def forward() -> Tensor:
            out = torch.func.functional_call(model, state, (images,))
            return out.mean() if blocks_alone else F.cross_entropy(out, labels)

        counted = saved_bytes(forward, state.values())
    return SavedBytes(counted.total // BATCH, counted.convolutions // BATCH)


def report() -> str:
    lines = [
        "| | | convolutions' inputs, MB | the rest, MB | of eager's rest | in all, MB |",
        "|---|---|---|---|---|---|",
    ]
    for part, blocks_alone in (("the network", False), ("its residual blocks", True)):
        eager, fused = (per_image(make_network(fused=fused), blocks_alone=blocks_alone) for fused in (False, True))
        for way, kept in (("eager", eager), ("fused tails", fused)):
            mb = [size / 1e6 for size in (kept.convolutions, kept.others, kept.total)]
            share = kept.others / eager.others
            lines.append(f"| {part} | {way} | {mb[0]:.1f} | {mb[1]:.1f} | {share:.2f} | {mb[2]:.1f} |")
    return MEMORY.format(table="\n".join(lines))


MEMORY = """
## What is kept for the backward pass

The same step: the tensors that autograd keeps from the forward pass, each storage once, parameters left out.
A convolution keeps its input in both. By count a tail keeps 1.56 units where eager keeps 2.5: its input, the bits, and
the inputs of the two inner BatchNorms, a quarter each, but not what SE scales. What both keep alike, the inputs of the
downsample branches' BatchNorms, brings the blocks' ratio above that of a tail. The stem keeps its BatchNorm's input and
a byte for every output of the pool, where eager also keeps the pool's input, and eight bytes for every output.

{table}
"""
