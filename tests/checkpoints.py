"""Checkpoints of networks that were not trained, but whose BatchNorms let the images through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import save_checkpoint
from engine.config import Config
from engine.heads import restore_heads
from engine.models import create_model
from engine.timm_models import classifier_names

NAMES = ("blue", "green, light", "red")


def write_checkpoint(
    path: Path,
    *,
    temperature: float | None = None,
    head_classes: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> Path:
    """``options`` are fields of `Config`; by default a seresnet18 in float32, with heads of these classes.

    The first head has twice the temperature, the second four times, and so on.
    """
    config = Config(**{"model": "seresnet18", "amp": False, "workers": 2, **options})
    torch.manual_seed(0)
    heads = restore_heads(config, head_classes or {})
    shapes = None if heads is None else heads.shapes()
    model = create_model(config.model, num_classes=len(NAMES), heads=shapes, **config.model_options())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            around = 0.3 if name.endswith(("bn2", "bn3")) else 1.0
            nn.init.uniform_(module.weight, 0.8 * around, 1.2 * around)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
    for linear in (
        [model.get_submodule(*classifier_names(model))]
        if heads is None
        else [head[-1] for head in model.heads.values()]
    ):
        nn.init.normal_(linear.weight, std=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"args": config.as_mapping(), "class_names": NAMES, "epoch": 7, "temperature": temperature}
    if heads is not None:
        temperatures = {name: temperature and temperature * 2**k for k, name in enumerate(heads.tasks, start=1)}
        about |= {"heads": heads.class_names(), "head_temperatures": temperatures}
    save_checkpoint(path, {"model": model.state_dict(), **about})
    return path
