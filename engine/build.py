"""What a configuration asks for: its images, the loaders that give them, and its model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.cli import warn
from engine.config import Config, spelled
from engine.data import Augmentation, Loader, Samples, Splits, WeightedSampler, make_loader, open_splits, write_digits
from engine.data.resident import decoded_for_now
from engine.data.samples import shorten
from engine.data.selection import Selection
from engine.device import Precision
from engine.errors import UserError
from engine.fusion import fuse
from engine.head_specs import read_head_specs
from engine.heads import Heads
from engine.models import create_model, load_pretrained


def open_data(config: Config) -> Splits:
    """The splits that a run trains, validates and tests on; images are looked at for ``config.group_duplicates`` alone.

    Prints what may not have been meant. Raises UserError where --num-classes is not theirs, or there are no images of
    the set that the best epoch is to be chosen on.
    """
    if not (config.data_dir or config.csv):
        _require_digits(config)
    splits = open_splits(
        data_dir=config.data_dir,
        csv=config.csv,
        val_csv=config.val_csv,
        test_csv=config.test_csv,
        val_fraction=None if config.select_on == "test" else config.val_fraction,
        folds=config.folds,
        fold=config.fold or 0,
        seed=config.seed,
        allow_links=config.allow_links,
        selection=make_selection(config),
        test_fraction=config.test_fraction,
        test_method=config.test_method,
        duplicates=config.group_duplicates,
        workers=config.workers,
        imbalance_ratio=config.imbalance_ratio,
    )
    warn(splits.warnings)
    if config.select_on == "test" and splits.test is None:
        raise UserError("--select-on test: the data has no test images; add --test-fraction 0.2, or leave it out")
    if config.select_on == "test" and splits.val is None and config.sensitivity:
        raise UserError(
            "--sensitivity chooses thresholds on validation images, and --select-on test takes none; leave one out"
        )
    classes = len(splits.train.class_names)
    if config.num_classes not in (None, classes):
        raise UserError(
            f"--num-classes {config.num_classes}, but the data has {classes} classes "
            f"({', '.join(splits.train.class_names[:10])}{', ...' if classes > 10 else ''}); leave the flag out"
        )
    return splits


def _require_digits(config: Config) -> None:
    """Raises UserError where what is asked for, as by a recipe, is nothing of the embedded digits."""
    of_heads = {
        name
        for spec in read_head_specs(config.heads).values()
        for merged in (spec.classes or {}).values()
        for name in merged
    }
    unknown = [name for name in (*config.classes, *sorted(of_heads)) if not name.isdecimal()]
    if unknown:
        raise UserError(f"there are no classes {shorten(unknown)} in the embedded digits: name --data-dir or --csv")
    for name in ("label_regex", "group_regex", "exclude"):
        if getattr(config, name):
            raise UserError(f"{spelled(name)} does not go with the embedded digits: name --data-dir or --csv")


def make_selection(config: Config) -> Selection:
    """What of a source counts for a run, fresh for one reading."""
    return Selection(config.classes, config.exclude, config.label_regex, config.group_regex)


def selected_on(splits: Splits, config: Config) -> Samples:
    """The images that the best epoch is chosen on, of ``open_data``."""
    chosen = splits.test if config.select_on == "test" else splits.val
    assert chosen is not None, "open_data sees to it"
    return chosen


def scored_folder(config: Config) -> Path:
    """What the names of a run's own test or validation images are relative to in predictions.csv."""
    return data_folder(config.data_dir, config.csv if config.folds is not None else config.test_csv or config.csv)


def data_folder(data_dir: str | None, csv: str | None) -> Path:
    """What the names in predictions.csv are relative to."""
    if data_dir is not None:
        return Path(data_dir)
    return Path(csv).parent if csv is not None else write_digits()


def make_sampler(samples: Samples, config: Config) -> WeightedSampler:
    return WeightedSampler(
        samples.labels,
        len(samples.class_names),
        sampling=config.sampling,
        seed=config.seed,
        alpha=config.sampling_alpha,
        beta=config.sampling_beta,
        weights=samples.weights,
        epoch_size=config.epoch_size,
        replacement=config.replacement,
    )


def make_augmentation(config: Config) -> Augmentation:
    brightness, contrast, saturation, hue = config.color_jitter
    jitter = config.aug_prob if config.color_jitter_prob is None else config.color_jitter_prob
    return Augmentation(
        crop_scale=config.scale,
        crop_ratio=config.ratio,
        rotation=config.aug_prob,
        affine=config.aug_prob,
        jitter=jitter,
        hflip=config.hflip,
        vflip=config.vflip,
        sharpness=config.sharpness_prob,
        blur=config.gaussian_blur_prob,
        erasing=config.reprob,
        degrees=config.degrees,
        translate=config.translate,
        scale=config.zoom,
        shear=config.shear,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        sharpness_factor=config.sharpness,
        minority=config.minority_aug,
        auto_augment=config.aa,
    )


def make_train_loader(
    samples: Samples,
    config: Config,
    device: torch.device,
    precision: Precision,
    *,
    sampler: WeightedSampler,
    augmentation: Augmentation | None,
) -> Loader:
    """What a run trains on; a run's sampler and augmentation are ``make_sampler`` and ``make_augmentation``."""
    sizes = tuple(config.train_img_size(epoch) for epoch in range(config.epochs))
    drawn = {"sampler": sampler, "augmentation": augmentation, "seed": config.seed}
    return _make_loader(samples, config, device, precision, training=True, img_size=sizes, **drawn)


def make_eval_loader(samples: Samples, config: Config, device: torch.device, precision: Precision) -> Loader:
    """Every image once, in order, resized and normalised, nothing else."""
    shown = {"img_size": config.img_size, "crop_pct": config.crop_pct}
    return _make_loader(samples, config, device, precision, training=False, **shown)


def shown_once(samples: Samples, config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Within it loaders of ``samples``, which no run reads again, leave nothing in the cache of decoded images.

    A new set there would take the place of one that a run trains on.
    """
    is_resident = config.data_backend == "resident"
    return decoded_for_now(samples, device, config.workers) if is_resident else nullcontext()


def _make_loader(
    samples: Samples, config: Config, device: torch.device, precision: Precision, **options: Any
) -> Loader:
    return make_loader(
        config.data_backend,
        samples,
        batch_size=config.batch_size,
        device=device,
        dtype=precision.input_dtype,
        max_bad_fraction=config.max_bad_fraction,
        workers=config.workers,
        by_index=bool(config.heads),
        **options,
    )


def build_model(
    config: Config, num_classes: int, device: torch.device, *, starts_fresh: bool, heads: Heads | None = None
) -> nn.Module:
    """On its device, fused as ``config`` says; where it ``starts_fresh``, with the weights that ``config`` names."""
    shapes = None if heads is None else heads.shapes()
    model = create_model(config.model, num_classes=num_classes, heads=shapes, **config.model_options())
    if starts_fresh and (config.pretrained or config.pretrained_path):
        print(load_pretrained(model, config.model, config.pretrained_path))
    if config.fused_se:
        print(fuse(model, config))
    return model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
