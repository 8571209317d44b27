"""A trained model as the commands that use one take it: a run, by default its best epoch, or a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.build import build_model
from engine.checkpoint import load_checkpoint
from engine.command_line import require_fused
from engine.config import Config
from engine.data import DATA_BACKENDS
from engine.errors import UserError
from engine.heads import Heads, restore_heads
from engine.run import RunDirectory


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="a run (its best epoch) or one checkpoint")
    parser.add_argument("--epoch", type=int, help="the weights of that epoch, where the run kept it (--keep-epochs)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs."""
    add_checkpoint_flags(parser)
    parser.add_argument("-b", "--batch-size", type=int, help="images a step")
    parser.add_argument("--data-backend", choices=DATA_BACKENDS, help="what reads images; as in the run without it")
    parser.add_argument("-j", "--workers", type=int, help="threads that read and decode images")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; cuda where there is one")
    parser.add_argument("--fused-se", action="store_true", help="use the fused operators; as the run did without it")
    parser.add_argument("--fused-scope", choices=("block", "tail"), help="what is fused; as in the run without it")


def open_trained(args: argparse.Namespace) -> tuple[dict[str, Any], Config]:
    """The checkpoint that the flags of `add_model_flags` name, and how it was trained, with what the flags change.

    Raises UserError: there is no such checkpoint, or it is none.
    """
    checkpoint, config = read_trained(args.checkpoint, args.epoch)
    names = ("batch_size", "data_backend", "workers", "fused_scope")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = dataclasses.replace(config, fused_se=args.fused_se or config.fused_se, **changes)
    require_fused(config, args.fused_scope)
    return checkpoint, config


def read_trained(name: str, epoch: int | None = None) -> tuple[dict[str, Any], Config]:
    """A checkpoint, or of a run its best epoch's or that of ``epoch``, and how it was trained.

    Raises UserError: there is no such checkpoint, or it is none.
    """
    path = _checkpoint_path(name, epoch)
    checkpoint = load_checkpoint(path)
    return checkpoint, Config.from_mapping(checkpoint["args"], str(path))


def heads_of(checkpoint: dict[str, Any], config: Config) -> Heads | None:
    """The heads of the checkpoint's model; None: it has one classifier."""
    return restore_heads(config, checkpoint.get("heads", {}))


def restore(checkpoint: dict[str, Any], config: Config, device: torch.device) -> tuple[nn.Module, Heads | None]:
    """The checkpoint's model on ``device``, fused where ``config`` says so, in evaluation mode; and its heads."""
    classes, heads = len(checkpoint["class_names"]), heads_of(checkpoint, config)
    model = build_model(config, classes, device, starts_fresh=False, heads=heads)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), heads


def _checkpoint_path(name: str, epoch: int | None) -> Path:
    path = Path(name)
    if not path.is_dir():
        if epoch is not None:
            raise UserError(f"--epoch {epoch} goes with a run directory, and {name} is a file")
        return path
    run_dir = RunDirectory(path)
    if epoch is None:
        if not run_dir.best.exists():
            raise UserError(f"{name}: holds no best.pt; name a run directory of engine.train, or a checkpoint")
        return run_dir.best
    if not run_dir.epoch_checkpoint(epoch).exists():
        raise UserError(
            f"--epoch {epoch}: {name} does not keep that epoch; epochs are kept by engine.train --keep-epochs"
        )
    return run_dir.epoch_checkpoint(epoch)
