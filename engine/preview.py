"""``python -m engine.preview``: what a training run would see, as a picture: its images as they are and as they are
drawn, class by class, and the balance of the classes before and after sampling.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.build import make_augmentation, make_eval_loader, make_sampler, make_train_loader, open_data, shown_once
from engine.cli import run
from engine.command_line import add_run_flags, make_parser, resolve
from engine.config import Config
from engine.data import Augmentation, Loader, Samples, WeightedSampler, check_images
from engine.data.array_sources import holds_arrays
from engine.data.augment import Drawn, class_rarity
from engine.data.listing import printable, write_all
from engine.device import Precision, pick_device
from engine.errors import UserError
from engine.output import free_file
from engine.preview_picture import PAIRS, PICTURE_FORMATS, Balance, Row, draw_preview
from engine.tables import format_table

MOST_ROWS = 10
"""Classes of which images are shown."""
LEAST_LINES = 4
"""Of images, which few classes share."""


def main(argv: list[str] | None) -> None:
    args = _parser().parse_args(argv)
    config = resolve(_with_source(args))
    splits = open_data(config)
    output = _free_output(args)
    samples, sampler = splits.train, make_sampler(splits.train, config)
    balance = Balance(
        names=tuple(map(printable, samples.class_names)),
        images=samples.class_counts(),
        expected=sampler.expected(),
        drawn=sampler.histogram(args.shown_epoch),
    )
    print(f"{splits.description}\n\n{format_balance(balance)}")

    rows = preview_rows(config, samples, sampler, args.shown_epoch)
    picture = io.BytesIO()
    draw_preview(balance, rows, _caption(config, len(samples), len(sampler), args.shown_epoch)).savefig(
        picture, format=output.suffix[1:].lower()
    )
    write_all(output.parent, {output.name: picture.getvalue()})
    print(f"\nwritten to {output}")


def format_balance(balance: Balance) -> str:
    """A line for each class: its images, the draws of an epoch expected and made, and how often that shows an image."""
    lines = [["class", "images", "expected", "drawn", "draws an image"]]
    columns = (balance.images, balance.expected, balance.drawn)
    for name, images, expected, drawn in zip(balance.names, *(c.tolist() for c in columns), strict=True):
        each = f"{drawn / images:.2f}" if images else "-"
        lines.append([name, str(images), f"{expected:.1f}", str(drawn), each])
    images, expected, drawn = (column.sum() for column in columns)
    return format_table([*lines, ["total", str(images), f"{expected:.1f}", str(drawn), ""]], range(1, 5))


def preview_rows(config: Config, samples: Samples, sampler: WeightedSampler, epoch: int) -> list[Row]:
    """Of up to ``MOST_ROWS`` classes, from the largest to the smallest, the epoch's first draws.

    What is shown of a draw is, pixel by pixel, what the run trains on at that place of the epoch. Nothing else is
    decoded; a file that cannot be is named on stderr, and the next draw of its class shown.
    """
    order = sampler.draw(epoch)
    if len(order) > config.batch_size:  # the last batch of an epoch is left out if it is not full
        order = order[: len(order) // config.batch_size * config.batch_size]
    classes = _shown_classes(samples.class_counts())
    each = PAIRS * max(1, LEAST_LINES // len(classes))
    places = _choose(samples, order, classes, each, config.workers)
    plain, augmented = _images(config, samples, order[places], places, epoch)
    labels = samples.labels[order[places]]
    return [Row(int(label), plain[labels == label], augmented[labels == label]) for label in classes]


def _shown_classes(counts: np.ndarray) -> np.ndarray:
    """All that have images, the largest first; of many, evenly many from the largest to the smallest."""
    by_size = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if len(by_size) <= MOST_ROWS:
        return by_size
    return by_size[np.rint(np.linspace(0, len(by_size) - 1, MOST_ROWS)).astype(np.int64)]


def _choose(samples: Samples, order: np.ndarray, classes: np.ndarray, each: int, workers: int) -> np.ndarray:
    """The places in ``order`` of the first ``each`` draws of each class whose files can be decoded: (n,) int64."""
    labels = samples.labels[order]
    good = np.ones(len(samples), dtype=bool)
    while True:
        places = np.concatenate([np.flatnonzero((labels == label) & good[order])[:each] for label in classes])
        if len(places) == 0:
            raise UserError("no image that an epoch draws can be read; python -m engine.verify says why")
        shown = np.unique(order[places])
        bad = {file.path: file.reason for file in check_images(samples.subset(shown), workers=workers)}
        if not bad:
            return places
        for file, reason in bad.items():
            print(f"left out: {printable(file)}: {reason}", file=sys.stderr)
        good[shown] = [samples.files[i] not in bad for i in shown]


def _images(
    config: Config, samples: Samples, indices: np.ndarray, places: np.ndarray, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images ``indices`` as they are scored and as they are trained on at ``places`` of the epoch.

    Both (n, S, S, 3) float32 in [0, 1], of the sizes that each has.
    """
    device = pick_device(config.device)
    precision = Precision(device, config.amp, config.amp_dtype)
    shown = samples.subset(indices)
    # one batch of them all; a file that can no longer be decoded ends the command, since the two would not match
    config = dataclasses.replace(config, batch_size=len(indices), max_bad_fraction=0.0)
    augmentation = AugmentationAt(
        **vars(make_augmentation(config)),
        places=places,
        rarities=class_rarity(samples.class_counts())[shown.labels],
    )
    with shown_once(shown, config, device):
        scoring = make_eval_loader(shown, config, device, precision)
        training = make_train_loader(
            shown, config, device, precision, sampler=OneByOne.of(shown), augmentation=augmentation
        )
        return _only_batch(scoring, epoch), _only_batch(training, epoch)


def _only_batch(loader: Loader, epoch: int) -> np.ndarray:
    """Its images as they are seen, (n, img_size, img_size, 3) float32 in [0, 1]."""
    ((images, _labels),) = loader.epoch(epoch)
    mean, std = (torch.tensor(values)[:, None, None] for values in (loader.mean, loader.std))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


class OneByOne(WeightedSampler):
    """Every image once, in order."""

    @classmethod
    def of(cls, samples: Samples) -> OneByOne:
        return cls(samples.labels, len(samples.class_names), sampling="none", seed=0)

    def draw(self, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        return np.arange(rank, len(self) - len(self) % world_size, world_size)


@dataclass(frozen=True)
class AugmentationAt(Augmentation):
    """What happens to n images at other ``places`` of an epoch than 0 to n - 1, where each comes from a class of other
    rarity than among those n."""

    places: np.ndarray = field(kw_only=True)
    rarities: np.ndarray = field(kw_only=True)

    def draw(self, seed: int, epoch: int, positions: np.ndarray, **about: Any) -> Drawn:
        about["rarity"] = self.rarities[positions]
        return super().draw(seed, epoch, self.places[positions], **about)


def _caption(config: Config, images: int, draws: int, epoch: int) -> str:
    of_sampling = {"power": f" (alpha {config.sampling_alpha:g})", "effective": f" (beta {config.sampling_beta:g})"}
    sampling = f"{config.sampling}{of_sampling.get(config.sampling, '')}"
    mixed = ", before MixUp and CutMix" if config.mixup > 0 or config.cutmix > 0 else ""
    return (
        f"epoch {epoch}: {draws:,} draws from {images:,} training images, sampling {sampling}; "
        f"seed {config.seed}, {config.train_img_size(epoch)} px, {config.data_backend}{mixed}"
    )


def _free_output(args: argparse.Namespace) -> Path:
    path = Path(args.picture)
    if path.suffix[1:].lower() not in PICTURE_FORMATS and not path.is_dir():
        known = ", ".join(f".{name}" for name in PICTURE_FORMATS)
        raise UserError(f"--output {path}: a picture's name ends in one of {known}")
    return free_file(args.picture, force=args.force)


def _with_source(args: argparse.Namespace) -> argparse.Namespace:
    """With the positional argument as the --data-dir or --csv that it stands for."""
    if args.source is None:
        return args
    source = Path(args.source)
    if not source.exists():
        raise UserError(f"{source} does not exist: name a folder with a folder for each class, or a manifest")
    name = "csv" if source.is_file() and not holds_arrays(source) else "data_dir"
    flag = "--" + name.replace("_", "-")
    if hasattr(args, name):
        raise UserError(f"{source} and {flag} {getattr(args, name)} are two sources: name one of them")
    if name == "data_dir" and hasattr(args, "csv"):
        raise UserError(
            f"{source} and --csv {args.csv}: name the folder that the manifest's names start from by {flag}"
        )
    return argparse.Namespace(**vars(args), **{name: args.source})


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "python -m engine.preview",
        "Draw what a training run would see: images of each class as they are and as they are drawn, and the balance "
        "of the classes before and after sampling. Without data the embedded digits.",
    )
    parser.add_argument(
        "source", metavar="DIR|CSV", nargs="?", default=None, help="the same as --data-dir DIR or --csv CSV"
    )
    parser.add_argument(
        "--output", dest="picture", metavar="FILE", default="preview.png", help="the picture (default: preview.png)"
    )
    parser.add_argument("--force", action="store_true", default=False, help="replace an older picture")
    parser.add_argument(
        "--epoch", dest="shown_epoch", metavar="K", type=_epoch, default=0, help="whose draws are shown (default: 0)"
    )
    run_flags = parser.add_argument_group(
        "flags of a training run", "as engine.train's; those of the model and the optimizer make no difference here"
    )
    add_run_flags(run_flags, without=("output",))
    return parser


def _epoch(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(run(main))
