"""One step of training, as a run takes it and as ``engine.profile`` times it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.device import Precision
from engine.ema import ModelEma
from engine.losses import sum_of_squares
from engine.mixing import MixedIndices
from engine.optim import make_optimizer, make_schedule
from engine.stages import Freezing, make_freezing


@dataclasses.dataclass
class Training:
    """Everything that one optimizer step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler
    ema: ModelEma | None = None
    freezing: Freezing = dataclasses.field(default_factory=Freezing)

    @property
    def scored(self) -> nn.Module:
        """The model that is scored and kept: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def update(self, clip_grad: float | None) -> None:
        """Takes the step that the gradients ask for, which are of a norm of at most ``clip_grad`` then."""
        if clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.ema is not None:
            self.ema.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Under "model" stands the scored one, which is what all who read a checkpoint are after."""
        state = {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "scaler")}
        state["model"] = self.scored.state_dict()
        if self.ema is not None:
            state |= {"raw_model": self.model.state_dict(), "ema_updates": self.ema.updates}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.scored.load_state_dict(state["model"])
        if self.ema is not None:
            self.model.load_state_dict(state["raw_model"])
            self.ema.updates = state["ema_updates"]


def make_training(model: nn.Module, config: Config, precision: Precision, steps_per_epoch: int) -> Training:
    """From a model's first epoch on."""
    freezing = make_freezing(model, config)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps_per_epoch)
    ema = ModelEma(model, config.model_ema_decay, warmup=config.model_ema_warmup) if config.model_ema else None
    return Training(model, optimizer, schedule, precision.scaler(), ema, freezing)


def batch_loss(
    model: nn.Module,
    criterion: nn.Module,
    images: Tensor,
    targets: Tensor | MixedIndices,
    config: Config,
    precision: Precision,
) -> Tensor:
    """The scalar that a step of one batch lowers."""
    with precision.autocast():
        loss: Tensor = criterion(model(images), targets)
    if config.l2_loss:
        loss = loss + 0.5 * config.l2_loss * sum_of_squares(model.parameters())
    return loss
