"""Squeeze-and-Excitation in plain PyTorch: the definition every other backend is measured against.

Squeeze-and-Excitation Networks, Hu, Shen and Sun, CVPR 2018 (arXiv:1709.01507).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


class SEBlock(nn.Module):
    """The eager SE block: pool -> Linear -> ReLU -> Linear -> sigmoid -> scale.

    Args:
        channel: C, the channels of the input.
        reduction: C / R, how much narrower the hidden layer is.

    Shape: x (N, C, H, W) -> (N, C, H, W), any floating dtype.
    State dict: ``fc.0.weight`` (R, C) and ``fc.2.weight`` (C, R); no biases.
    """

    def __init__(self, channel: int, reduction: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, squeezed_channels(channel, reduction), bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(squeezed_channels(channel, reduction), channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        N, C = x.shape[:2]
        gate = self.fc(self.avg_pool(x).view(N, C))
        return x * gate.view(N, C, 1, 1)


def squeezed_channels(channel: int, reduction: int) -> int:
    """R = channel // reduction; ``ValueError`` where that leaves no channel."""
    if channel < 1 or reduction < 1 or channel // reduction < 1:
        raise ValueError(
            f"channel={channel} with reduction={reduction} leaves no squeezed channel; "
            f"use a reduction of at most {channel}"
        )
    return channel // reduction


def squeeze_excite_reference(
    x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, act: str, gate: str
) -> Tensor:
    """What `SEBlock` computes, as a function of its weights; differentiable by autograd to any order.

    x (N, C, H, W); w1 (R, C); w2 (C, R); b1 (R,) and b2 (C,) or None. The arithmetic is in x's dtype, as eager PyTorch
    has it: weights of another dtype are cast to x's, which is also what autocast does.
    """

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    hidden = ACTIVATIONS[act](F.linear(pooled, w1.to(x.dtype), cast(b1)))
    s = GATES[gate](F.linear(hidden, w2.to(x.dtype), cast(b2)))
    return x * s[:, :, None, None]
