"""An exponential moving average of a model's weights and buffers, by timm's rules.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992), with the decay and its
warm-up as in timm's ``ModelEmaV3``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEma:
    """Follows a model: ``module`` is of the same kind, fused or not, in evaluation mode, and holds the average.

    ``torch.optim.swa_utils.AveragedModel`` reads its count of updates back in each of them, and so waits for the GPU;
    here the count is a Python number.

    Args:
        model: what to follow, on its device already.
        decay: share of the average that an update keeps.
        warmup: keep no more than 1 - (1 + n)^(-2/3) after n updates. The first update takes the model as it is,
            with and without.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self.module = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in what one optimizer step has made of ``model``; integer buffers are copied."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        get_ema_multi_avg_fn(self._decay())(averages, values, None)
        self.updates += 1

    def _decay(self) -> float:
        if self.updates == 0:
            return 0.0
        return min(self.decay, 1 - (1 + self.updates) ** (-2 / 3)) if self.warmup else self.decay


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
