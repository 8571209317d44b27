"""``python -m engine.evaluate``: scores a run or a checkpoint on its own test images, or on others."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from engine import fingerprint
from engine.build import data_folder, make_eval_loader, make_selection, open_data, scored_folder, selected_on
from engine.checkpoint import write_atomically
from engine.cli import ArgumentParser, run
from engine.config import Config
from engine.data import Samples, Splits, drop_bad_samples, open_samples
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.metric_report import format_reports
from engine.output import free_file
from engine.predictions import predictions_path, write_predictions
from engine.scoring import TTA, Scored, final_metrics, score_images
from engine.trained import add_model_flags, open_trained, restore


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    metrics = evaluate(args)
    print(f"{metrics['split']} images, weights of epoch {metrics['epoch']}:\n\n{format_reports(metrics)}")
    if args.output:
        write_atomically(Path(args.output), lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n"))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What metrics.json holds, for the checkpoint and the images that the command line names."""
    for flag, given in (("--data-dir", args.data_dir), ("--csv", args.csv)):
        if given == "":
            raise UserError(f"{flag} is empty: name a file or folder")
    device = pick_device(args.device)
    checkpoint, config = open_trained(args)
    config = dataclasses.replace(config, sensitivity=tuple(args.sensitivity))
    if args.max_bad_fraction is not None:
        config = dataclasses.replace(config, max_bad_fraction=args.max_bad_fraction)
    class_names = tuple(checkpoint["class_names"])
    if config.heads and args.tta != "none":
        raise UserError(f"--tta {args.tta} does not go with a model with heads; leave it out")
    split, samples = _images(args, config, checkpoint)
    _require_free(args, config)
    samples = _readable(split, samples, config)
    model, heads = restore(checkpoint, config, device)
    precision = Precision(device, config.amp, config.amp_dtype)

    def scored_images(samples: Samples) -> Scored:
        loader = make_eval_loader(samples, config, device, precision)
        return score_images(model, loader, class_names, precision, heads=heads, tta=args.tta)

    scored = scored_images(samples)
    validation = scored if split == "validation" else None
    if config.sensitivity and validation is None:
        held_out = _run_splits(config, checkpoint).val
        assert held_out is not None, "open_data refuses --sensitivity without"
        validation = scored_images(_readable("validation", held_out, config))
    if args.predictions:
        own = args.data_dir is None and args.csv is None
        folder = scored_folder(config) if own else data_folder(args.data_dir, args.csv)
        path = Path(args.predictions)
        write_predictions(path, scored.predictions(folder))
        for head, of_head in scored.heads.items():
            write_predictions(predictions_path(path, head), of_head.predictions(folder))
    # a temperature is that of the probabilities that it was fitted on, not of their means
    temperature = checkpoint.get("temperature") if args.tta == "none" else None
    metrics = final_metrics(
        scored,
        validation,
        split=split,
        temperature=temperature,
        sensitivities=config.sensitivity,
        head_temperatures=checkpoint.get("head_temperatures"),
    )
    # an epoch that the command line names, by --epoch or as a file, was not chosen by the run
    names_best = args.epoch is None and (Path(args.checkpoint).is_dir() or Path(args.checkpoint).name == "best.pt")
    chosen_on = config.select_on if names_best else None
    return {"split": split, "epoch": checkpoint["epoch"], "selected_on": chosen_on, "tta": args.tta, **metrics}


def _require_free(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError where one of the files to write exists."""
    if args.output:
        free_file(args.output, flag="--output")
    if args.predictions:
        for head in (None, *config.heads):
            free_file(str(predictions_path(Path(args.predictions), head)), flag="--predictions")


def _images(args: argparse.Namespace, config: Config, checkpoint: dict[str, Any]) -> tuple[str, Samples]:
    """What to score and its name: the images that were named, else the run's test split, else its validation split."""
    if args.data_dir or args.csv:
        name = str(Path(args.csv or args.data_dir).absolute())  # which is no "test" and no "validation"
        samples = open_samples(
            checkpoint["class_names"],
            data_dir=args.data_dir,
            csv=args.csv,
            allow_links=config.allow_links,
            selection=make_selection(config),
        )
    else:
        splits = _run_splits(config, checkpoint)
        if splits.test is not None:
            name, samples = "test", splits.test
        else:
            name, samples = "validation", selected_on(splits, config)
    return name, samples


def _run_splits(config: Config, checkpoint: dict[str, Any]) -> Splits:
    """The run's own sets. Raises UserError where they are divided otherwise than when it began."""
    splits = open_data(config)
    if list(splits.train.class_names) != checkpoint["class_names"]:
        raise UserError(f"{splits.description}: its classes are not the model's; name images with --data-dir or --csv")
    # checkpoints of before this was kept have none
    if checkpoint.get("division", division := fingerprint.of_division(splits)) != division:
        raise UserError(
            f"{splits.description}: not the images that the run was divided from, so that some of its training images "
            "may be among those to score; put them back, or name images with --data-dir or --csv"
        )
    return splits


def _readable(name: str, samples: Samples, config: Config) -> Samples:
    kept, bad = drop_bad_samples({name: samples}, max_bad_fraction=config.max_bad_fraction, workers=config.workers)
    for file in bad:
        print(f"left out: {file.path}: {file.reason}", file=sys.stderr)
    return kept[name]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.evaluate", description="Score a trained classifier.", allow_abbrev=False
    )
    add_model_flags(parser)
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
    parser.add_argument("--output", metavar="FILE", help="also write the metrics there, as JSON")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write there, as CSV, what is predicted of each image; of heads also beside it, to *_HEAD.csv",
    )
    parser.add_argument(
        "--sensitivity",
        metavar="FLOAT",
        type=float,
        nargs="+",
        default=(),
        help="report the specificity at these sensitivities; the thresholds are chosen on the run's validation images",
    )
    parser.add_argument(
        "--tta",
        choices=TTA,
        default="none",
        help="hflip: take the mean of the probabilities of each image and its mirror image (default: none)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
