"""``python -m engine.predict``: what a trained classifier says of images, as a table (CSV) with a row for each."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.build import make_eval_loader, shown_once
from engine.cli import ArgumentParser, run
from engine.config import Config
from engine.data import Samples
from engine.data.check import probe_files
from engine.data.listing import printable, write_all
from engine.data.unlabelled import Unlabelled, find_images
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.heads import Heads
from engine.output import free_file
from engine.tables import format_table
from engine.trained import add_model_flags, open_trained, restore


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a classifier says of n images.

    Attributes:
        names: n paths, as the images were named.
        class_names: the columns of ``probabilities``.
        probabilities: (n, num_classes) float32, rows that sum to 1; NaN for an image that cannot be read.
        reasons: why it cannot, by the index of the image.
        heads: of a model with heads the same two of each; those above are then what they say together, end to end.
    """

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: np.ndarray
    reasons: dict[int, str]
    heads: Mapping[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)

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
    output = free_file(args.output, force=args.force)
    model, heads = restore(checkpoint, config, device)
    found = predict(model, tuple(checkpoint["class_names"]), images, config, device, heads)
    for i, reason in sorted(found.reasons.items()):
        print(f"not predicted: {printable(found.names[i])}: {reason}", file=sys.stderr)
    write_all(output.parent, {output.name: format_csv(found).encode()})
    print(f"{_format_counts(found)}\n\nwritten to {output}")
    return int(bool(found.reasons))


def predict(
    model: nn.Module,
    class_names: tuple[str, ...],
    images: Unlabelled,
    config: Config,
    device: torch.device,
    heads: Heads | None = None,
) -> Predicted:
    """Shows ``model`` every image as scoring does, in ``config``'s size and precision, with progress bars on stderr.

    Raises UserError where a probability is not a number.
    """
    probabilities, reasons = look_at_files(images, model, class_names, config, device, heads)
    return as_predicted(tuple(images.names.values()), probabilities, reasons, class_names, heads)


def as_predicted(
    names: tuple[str, ...],
    probabilities: np.ndarray,
    reasons: dict[int, str],
    class_names: tuple[str, ...],
    heads: Heads | None,
) -> Predicted:
    """Of probabilities side by side as in `columns_of`."""
    columns = columns_of(class_names, heads)
    whole, *parts = np.split(probabilities, np.cumsum([len(own) for own in columns[:-1]]), axis=1)
    own = {} if heads is None else dict(zip(heads.tasks, zip(columns[1:], parts, strict=True), strict=True))
    return Predicted(names, columns[0], whole, reasons, own)


def columns_of(class_names: tuple[str, ...], heads: Heads | None) -> list[tuple[str, ...]]:
    """What stands side by side in a row of probabilities: all classes, of heads end to end, then those of each head."""
    if heads is None:
        return [class_names]
    return [tuple(heads.ends()), *(task.class_names for task in heads.tasks.values())]


def nothing_seen(images: int, class_names: tuple[str, ...], heads: Heads | None) -> np.ndarray:
    """(images, width) float32 NaN, to be filled with the probabilities of `columns_of`."""
    return np.full((images, sum(map(len, columns_of(class_names, heads)))), np.nan, dtype=np.float32)


def look_at_files(
    images: Unlabelled,
    model: nn.Module,
    class_names: tuple[str, ...],
    config: Config,
    device: torch.device,
    heads: Heads | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """`look_at` for files, of which those that cannot be read are among the reasons."""
    files = list(images.names)
    reasons = {file.path: printable(file.reason) for file in images.bad}
    opened = [file for file in files if file not in reasons]
    probes = zip(opened, probe_files(opened, workers=config.workers), strict=True)
    reasons |= {file: printable(found.reason) for file, found in probes if found.reason is not None}

    readable = [i for i, file in enumerate(files) if file not in reasons]
    probabilities = nothing_seen(len(files), class_names, heads)
    if readable:
        # with a class for each file, the labels of a batch tell which files it holds
        looked_at = tuple(files[i] for i in readable)
        samples = Samples(looked_at, np.arange(len(looked_at)), looked_at)
        probabilities[readable], lost = look_at(samples, model, class_names, config, device, heads)
        reasons |= {looked_at[i]: reason for i, reason in lost.items()}
    return probabilities, {i: reasons[file] for i, file in enumerate(files) if file in reasons}


def format_csv(found: Predicted) -> str:
    """A row for each image: filename, prediction (the likeliest class), prob_CLASS for each class, error.

    Of a model with heads, before the error, the same of each: prediction_HEAD, prob_HEAD_CLASS.
    Where an image cannot be read, prediction and probabilities are empty and the error says why; else that is empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = {"": (found.class_names, found.probabilities)}
    parts |= {f"_{head}": part for head, part in found.heads.items()}
    header = ["filename"]
    for suffix, (class_names, _) in parts.items():
        header += [f"prediction{suffix}", *(f"prob{suffix}_{name}" for name in class_names)]
    writer.writerow([*header, "error"])
    for i, name in enumerate(found.names):
        fields = [""] * (len(header) - 1)
        if i not in found.reasons:
            rows = [(class_names, probabilities[i]) for class_names, probabilities in parts.values()]
            fields = [field for class_names, row in rows for field in (class_names[row.argmax()], *map(str, row))]
        writer.writerow([printable(name), *fields, found.reasons.get(i, "")])
    return text.getvalue()


@torch.inference_mode()
def look_at(
    samples: Samples,
    model: nn.Module,
    class_names: tuple[str, ...],
    config: Config,
    device: torch.device,
    heads: Heads | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """What ``model`` says of n images whose labels are 0 to n - 1, shown as ``config`` says.

    Returns (n, width) float32 probabilities, those of `columns_of` side by side, and why images cannot be read after
    all, by index.

    Raises UserError where a probability is not a number.
    """
    precision = Precision(device, config.amp, config.amp_dtype)
    with shown_once(samples, config, device):
        loader = make_eval_loader(samples, dataclasses.replace(config, max_bad_fraction=1.0), device, precision)
    probabilities = nothing_seen(len(samples), class_names, heads)
    with tqdm(total=len(samples), desc="predicting", unit="img", leave=False, disable=None) as bar:
        for images, labels in loader.epoch(0):
            with precision.autocast():
                logits = model(images)
            shown = labels.cpu().numpy()
            probabilities[shown] = _probabilities(logits, heads).cpu().numpy()
            bad = shown[np.isnan(probabilities[shown]).any(axis=1)]
            if len(bad):
                raise UserError(
                    f"the model's output for {printable(samples.files[bad[0]])} is not a number: train with a lower "
                    "--lr or --amp-dtype bfloat16"
                )
            bar.update(len(shown))
    return probabilities, {i: printable(reason) for i, reason in loader.reasons_lost.items()}


def _probabilities(logits: Any, heads: Heads | None) -> Tensor:
    """(B, width), from what the model gives."""
    if heads is None:
        return cast(Tensor, logits.float().softmax(dim=1))
    wide = {name: logits[name].float() for name in heads.tasks}
    return torch.cat([heads.together(wide).exp(), *(own.softmax(dim=1) for own in wide.values())], dim=1)


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
