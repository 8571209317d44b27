"""``python -m engine.evaluate``: scores a run or a checkpoint on its own test images, or on others."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import load_checkpoint, write_atomically
from engine.cli import run
from engine.config import ArgumentParser, Config, require_fused
from engine.data import DATA_BACKENDS, Loader, Samples, Splits, drop_bad_samples, make_loader, open_samples, open_splits
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.fusion import fuse
from engine.metrics import ClassificationMetrics, format_report
from engine.models import create_model
from engine.run import RunDirectory


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    metrics = evaluate(args)
    print(f"{metrics['split']} images, weights of epoch {metrics['epoch']}:\n\n{format_report(metrics)}")
    if args.output:
        write_atomically(Path(args.output), lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What metrics.json holds, for the checkpoint and the images that the command line names."""
    if args.output and Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists; name another file")
    device = pick_device(args.device)
    path = _checkpoint_path(args.checkpoint, args.epoch)
    checkpoint = load_checkpoint(path)
    config = Config.from_mapping(checkpoint["args"], str(path))
    changes = {
        name: getattr(args, name)
        for name in ("batch_size", "data_backend", "workers", "max_bad_fraction", "fused_scope")
        if getattr(args, name) is not None
    }
    config = dataclasses.replace(config, fused_se=args.fused_se or config.fused_se, **changes)
    require_fused(config, args.fused_scope)
    class_names = tuple(checkpoint["class_names"])
    split, samples = _images(args, config, class_names)

    model = create_model(config.model, num_classes=len(class_names))
    model.load_state_dict(checkpoint["model"])
    if config.fused_se:
        print(fuse(model, config))
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    precision = Precision(device, config.amp, config.amp_dtype)
    loader = make_eval_loader(samples, config, device, precision)
    return {"split": split, "epoch": checkpoint["epoch"], **score(model, loader, class_names, precision)}


def open_data(config: Config) -> Splits:
    """The splits that a run trains, validates and tests on."""
    return open_splits(
        data_dir=config.data_dir,
        csv=config.csv,
        val_csv=config.val_csv,
        test_csv=config.test_csv,
        val_fraction=config.val_fraction,
        seed=config.seed,
        allow_links=config.allow_links,
    )


def make_eval_loader(samples: Samples, config: Config, device: torch.device, precision: Precision) -> Loader:
    """Every image once, in order, resized and normalised, nothing else."""
    return make_loader(
        config.data_backend,
        samples,
        batch_size=config.batch_size,
        img_size=config.img_size,
        device=device,
        dtype=precision.input_dtype,
        training=False,
        crop_pct=config.crop_pct,
        max_bad_fraction=config.max_bad_fraction,
        workers=config.workers,
    )


@torch.inference_mode()
def score(model: nn.Module, loader: Loader, class_names: tuple[str, ...], precision: Precision) -> dict[str, Any]:
    """The metrics of `engine.metrics` over one pass of the loader."""
    model.eval()
    metrics: ClassificationMetrics | None = None
    for images, labels in loader.epoch(0):
        with precision.autocast():
            logits = model(images)
        metrics = metrics or ClassificationMetrics(class_names, logits.device)
        metrics.update(logits.float(), labels)
    assert metrics is not None, "a loader holds at least one image"
    try:
        return metrics.compute()
    except ValueError as error:
        raise UserError(f"cannot score: {error}; train with a lower --lr or --amp-dtype bfloat16") from error


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


def _images(args: argparse.Namespace, config: Config, class_names: tuple[str, ...]) -> tuple[str, Samples]:
    """What to score and its name: the images that were named, else the run's test split, else its validation split."""
    if args.data_dir or args.csv:
        name = str(args.csv or args.data_dir)
        samples = open_samples(class_names, data_dir=args.data_dir, csv=args.csv, allow_links=config.allow_links)
    else:
        splits = open_data(config)
        if splits.train.class_names != class_names:
            raise UserError(
                f"{splits.description}: its classes are not the model's; name images with --data-dir or --csv"
            )
        name, samples = ("test", splits.test) if splits.test is not None else ("validation", splits.val)
    kept, bad = drop_bad_samples({name: samples}, max_bad_fraction=config.max_bad_fraction, workers=config.workers)
    for file in bad:
        print(f"left out: {file.path}: {file.reason}", file=sys.stderr)
    return name, kept[name]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.evaluate", description="Score a trained classifier.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="RUN_DIR|CHECKPOINT", help="a run (its best epoch) or one checkpoint")
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with test/CLASS/* or CLASS/*, CIFAR's files or an NPZ file; the run's own test images without it",
    )
    images.add_argument(
        "--csv", metavar="FILE", help="manifest with the columns filename,label; with split, its rows of test"
    )
    parser.add_argument("--max-bad-fraction", type=float, help="largest share of unreadable images that is accepted")
    parser.add_argument("--epoch", type=int, help="score that epoch, where the run kept it (--keep-epochs)")
    parser.add_argument("--output", metavar="FILE", help="also write the metrics there, as JSON")
    parser.add_argument("-b", "--batch-size", type=int, help="images a step")
    parser.add_argument("--data-backend", choices=DATA_BACKENDS, help="what reads images; as in the run without it")
    parser.add_argument("-j", "--workers", type=int, help="threads that read and decode images")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; cuda where there is one")
    parser.add_argument("--fused-se", action="store_true", help="use the fused operators; as the run did without it")
    parser.add_argument("--fused-scope", choices=("block", "tail"), help="what is fused; as in the run without it")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
