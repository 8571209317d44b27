"""``python -m engine.predict``: what a trained classifier says of images, as a table (CSV) with a row for each."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine.build import make_eval_loader
from engine.cli import run
from engine.config import ArgumentParser, Config
from engine.data import Samples
from engine.data.check import probe_files
from engine.data.listing import printable, write_all
from engine.data.unlabelled import Unlabelled, find_images
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.tables import format_table
from engine.trained import add_model_flags, open_trained, restore_model


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a classifier says of n images.

    Attributes:
        names: n paths, as the images were named.
        class_names: the columns of ``probabilities``.
        probabilities: (n, num_classes) float32, rows that sum to 1; NaN for an image that cannot be read.
        reasons: why it cannot, by the index of the image.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: np.ndarray
    reasons: dict[int, str]

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64: the likeliest class of each image, an index into ``class_names``; -1 where it cannot be read."""
        labels = self.probabilities.argmax(axis=1)
        labels[list(self.reasons)] = -1
        return labels

    @property
    def predictions(self) -> tuple[str | None, ...]:
        """n names of the likeliest classes; None where the image cannot be read."""
        return tuple(None if label < 0 else self.class_names[label] for label in self.labels)


def main(argv: list[str] | None) -> int:
    """Returns 1 where an image cannot be read, else 0."""
    args = _parser().parse_args(argv)
    device = pick_device(args.device)
    checkpoint, config = open_trained(args)
    images = find_images(args.images, allow_links=args.allow_links)
    output = _free_output(Path(args.output), force=args.force)
    model = restore_model(checkpoint, config, device)
    found = predict(model, tuple(checkpoint["class_names"]), images, config, device)
    for i, reason in sorted(found.reasons.items()):
        print(f"not predicted: {printable(found.names[i])}: {reason}", file=sys.stderr)
    write_all(output.parent, {output.name: format_csv(found).encode()})
    print(f"{_format_counts(found)}\n\nwritten to {output}")
    return int(bool(found.reasons))


def predict(
    model: nn.Module, class_names: tuple[str, ...], images: Unlabelled, config: Config, device: torch.device
) -> Predicted:
    """Shows ``model`` every image as scoring does, in ``config``'s size and precision, with progress bars on stderr.

    Raises UserError where a probability is not a number.
    """
    files = list(images.names)
    reasons = {file.path: printable(file.reason) for file in images.bad}
    opened = [file for file in files if file not in reasons]
    probes = zip(opened, probe_files(opened, workers=config.workers), strict=True)
    reasons |= {file: printable(found.reason) for file, found in probes if found.reason is not None}

    readable = [i for i, file in enumerate(files) if file not in reasons]
    probabilities = np.full((len(files), len(class_names)), np.nan, dtype=np.float32)
    if readable:
        # with a class for each file, the labels of a batch tell which files it holds
        looked_at = tuple(files[i] for i in readable)
        samples = Samples(looked_at, np.arange(len(looked_at)), looked_at)
        probabilities[readable], lost = look_at(samples, model, len(class_names), config, device)
        reasons |= {looked_at[i]: reason for i, reason in lost.items()}
    return Predicted(
        tuple(images.names.values()),
        class_names,
        probabilities,
        {i: reasons[file] for i, file in enumerate(files) if file in reasons},
    )


def format_csv(found: Predicted) -> str:
    """A row for each image: filename, prediction (the likeliest class), prob_CLASS for each class, error.

    Where an image cannot be read, prediction and probabilities are empty and the error says why; else that is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "prediction", *(f"prob_{name}" for name in found.class_names), "error"])
    for i, (name, prediction, row) in enumerate(zip(found.names, found.predictions, found.probabilities, strict=True)):
        figures = [""] * len(row) if prediction is None else map(str, row)
        writer.writerow([printable(name), prediction or "", *figures, found.reasons.get(i, "")])
    return text.getvalue()


@torch.inference_mode()
def look_at(
    samples: Samples, model: nn.Module, num_classes: int, config: Config, device: torch.device
) -> tuple[np.ndarray, dict[int, str]]:
    """What ``model`` says of n images whose labels are 0 to n - 1, shown as ``config`` says.

    Returns (n, num_classes) float32 probabilities, and why images cannot be read after all, by index.

    Raises UserError where a probability is not a number.
    """
    precision = Precision(device, config.amp, config.amp_dtype)
    loader = make_eval_loader(samples, dataclasses.replace(config, max_bad_fraction=1.0), device, precision)
    probabilities = np.full((len(samples), num_classes), np.nan, dtype=np.float32)
    with tqdm(total=len(samples), desc="predicting", unit="img", leave=False, disable=None) as bar:
        for images, labels in loader.epoch(0):
            with precision.autocast():
                logits = model(images)
            shown = labels.cpu().numpy()
            probabilities[shown] = logits.float().softmax(dim=1).cpu().numpy()
            bad = shown[np.isnan(probabilities[shown]).any(axis=1)]
            if len(bad):
                raise UserError(
                    f"the model's output for {printable(samples.files[bad[0]])} is not a number: train with a lower "
                    "--lr or --amp-dtype bfloat16"
                )
            bar.update(len(shown))
    return probabilities, {i: printable(reason) for i, reason in loader.reasons_lost.items()}


def _free_output(output: Path, *, force: bool) -> Path:
    try:
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder; name a file in it, such as {output / 'predictions.csv'}")
        if output.exists() and not force:
            raise UserError(f"--output {output}: exists; name another file, or add --force")
        output.parent.mkdir(parents=True, exist_ok=True)  # while nothing has been computed yet
    except OSError as error:
        raise UserError(f"--output {output}: cannot make its folder ({error.strerror}); name another") from error
    return output


def _format_counts(found: Predicted) -> str:
    labels = found.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(found.class_names))
    lines: list[list[Any]] = [["class", "images"]]
    lines += [[name, str(count)] for name, count in zip(found.class_names, counts, strict=True)]
    if found.reasons:
        lines.append(["(not predicted)", str(len(found.reasons))])
    return format_table(lines, range(1, 2))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m engine.predict",
        description="Classify images. Exit status: 0 all were read, 1 some were not (the last column says why), "
        "2 something is wrong with the command.",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    parser.add_argument("images", metavar="IMAGE|DIR", nargs="+", help="images, and folders of images at any depth")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="table to write: filename,prediction,prob_CLASS,...,error"
    )
    parser.add_argument("--force", action="store_true", help="replace --output where it exists")
    parser.add_argument("--allow-links", action="store_true", help="follow links that lead out of a folder")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
