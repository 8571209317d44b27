"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from engine.config import Config
from engine.errors import UserError
from engine.stages import stages


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW; biases and norms are not decayed, unless ``config.decay_all``.

    What is frozen is left out, but where it is let go later: until then it has no gradient, and is not stepped.

    ``sgd`` has Nesterov's momentum and ``momentum`` the plain one; ``adam`` adds the decay to the gradient and
    ``adamw`` takes it off the weights. These are torch's fused implementations; ``fusedsgd`` (Nesterov's) and
    ``fusedadamw`` are NVIDIA Apex's.
    """
    groups = _groups(model, config)
    nesterov = config.opt != "momentum" and config.momentum > 0
    sgd: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": nesterov}
    if config.opt in ("sgd", "momentum"):
        return torch.optim.SGD(groups, fused=True, **sgd)
    if config.opt in ("adam", "adamw"):
        kind = torch.optim.Adam if config.opt == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.lr, fused=True)
    try:
        from apex.optimizers import FusedAdam, FusedSGD
    except ImportError as error:
        # The package `apex` on PyPI is something else and has no `optimizers`.
        raise UserError(
            f"--opt {config.opt} needs NVIDIA Apex, which is not installed ({error}); "
            "build it from NVIDIA's repository, or use --opt sgd or adamw"
        ) from error
    optimizer: torch.optim.Optimizer
    optimizer = (
        FusedSGD(groups, **sgd) if config.opt == "fusedsgd" else FusedAdam(groups, lr=config.lr, adam_w_mode=True)
    )
    return optimizer


def _groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Of each stage its own where its learning rate is one, or its first step (fused SGD begins a group at once)."""
    parameters = dict(model.named_parameters())
    by_stage = config.layer_decay < 1 or config.unfreeze_epochs is not None
    parts = stages(model) if by_stage else [list(parameters)]
    groups = []
    for above, names in enumerate(reversed(parts)):
        part = [parameters[name] for name in names]
        trained = [p for p in part if p.requires_grad]
        later = [p for p in part if not p.requires_grad] if config.unfreeze_epochs is not None else []
        for members in (trained, later):
            decayed = [p for p in members if p.dim() > 1]
            others = [p for p in members if p.dim() <= 1]
            lr = config.lr * config.layer_decay**above
            decay = config.weight_decay
            groups.append({"params": decayed, "lr": lr, "weight_decay": decay})
            groups.append({"params": others, "lr": lr, "weight_decay": decay if config.decay_all else 0.0})
    return [group for group in groups if group["params"]]


def make_schedule(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to ``min_lr`` or a constant; one tick an optimizer step."""
    warmup = config.warmup_epochs * steps_per_epoch
    total = config.epochs * steps_per_epoch
    floor = min(config.min_lr / config.lr, 1.0)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.sched == "constant":
            return 1.0
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
