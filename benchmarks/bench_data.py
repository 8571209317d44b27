"""Input pipelines over whole epochs: ours against what one writes with a DataLoader and torchvision's v2 transforms.

JPEG files of about 500 x 400 pixels and of 12 megapixels, weighted sampling, to batches of 224 px on the device that
trains; as many threads or processes as there are cores. The augmentation is "light", a random resized crop and a flip,
or "default", that of the trainer with such a crop. The peer draws its own, of the same kinds, probabilities and
strengths: decoded by torchvision.io, uint8 until the end, as torchvision's documentation advises.

An epoch's time runs from nothing in flight to the last batch. On a machine without DALI its rows are left out, with a
warning that says why. With REHEARSAL set in the environment it is a few small pictures.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.photographs import Photographs
from benchmarks.race import Entrant, race
from engine.data import (
    DATA_BACKENDS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Samples,
    WeightedSampler,
    make_loader,
)
from engine.data.augment import PROBABILITIES
from engine.data.dali_decoder import import_dali
from engine.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
REHEARSAL = "REHEARSAL" in os.environ
CORES = os.cpu_count() or 1
SIDE, ROUNDS = (32, 3) if REHEARSAL else (224, 7)


class Pictures(NamedTuple):
    height: int
    width: int
    files: int
    batch_size: int
    batches: int  # an epoch; many for each core, since a worker process of a DataLoader makes a batch alone


SMALL, LARGE = ("50 x 40", "80 x 60") if REHEARSAL else ("500 x 400", "4000 x 3000")
if REHEARSAL:
    PICTURES = {SMALL: Pictures(40, 50, 8, 4, 3), LARGE: Pictures(60, 80, 4, 2, 2)}
elif ON_GPU:
    PICTURES = {SMALL: Pictures(400, 500, 1024, 64, 64), LARGE: Pictures(3000, 4000, 32, 32, 32)}
else:
    PICTURES = {SMALL: Pictures(400, 500, 512, 32, 16), LARGE: Pictures(3000, 4000, 24, 8, 6)}
CROP = (0.08, 1.0)
AUGMENTATIONS = {
    "light": Augmentation(**dict.fromkeys(PROBABILITIES, 0.0) | {"hflip": 0.5}, crop_scale=CROP),
    "default": Augmentation(crop_scale=CROP),
}
CASES = ((SMALL, "light"), (SMALL, "default"), (LARGE, "light"))
KEPT_DECODED = (SMALL,)  # a set of photographs is not, at 36 MB each


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Samples]:
    source, folder = Photographs(), tmp_path_factory.mktemp("photographs")
    found = {}
    for name, pictures in PICTURES.items():
        files = source.write(folder / name, pictures.files, pictures.height, pictures.width)
        files = tuple(itertools.islice(itertools.cycle(files), pictures.batch_size * pictures.batches))
        labels = (np.arange(len(files)) % 4 == 0).astype(np.int64)  # three of one class for each of the other
        found[name] = Samples(files, labels, ("a", "b"))
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "augmentation"), CASES, ids=lambda part: part.replace(" ", ""))
def test_data(benchmark, photographs, tmp_path, monkeypatch, name, augmentation):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where decoded sets are kept
    samples, pictures, asked = photographs[name], PICTURES[name], AUGMENTATIONS[augmentation]
    ours = {}
    for backend in DATA_BACKENDS:
        if backend == "resident" and name not in KEPT_DECODED:
            continue
        try:
            ours[backend] = epochs_of(backend, samples, pictures, asked)
        except UserError as reason:
            warnings.warn(f"no rows for {backend}: {reason}", stacklevel=1)
    peers = {"DataLoader": epochs_of_a_data_loader(samples, pictures, asked)}
    mean_size = sum(Path(file).stat().st_size for file in samples.files) / len(samples)
    label = {
        "pictures": f"{name}, {mean_size / 1e3:.0f} KB",
        "augmentation": augmentation,
        "shape": f"{pictures.batches} x ({pictures.batch_size}, 3, {SIDE}, {SIDE})",
        "device": DEVICE.type,
        "pass": "epoch",
    }
    race(benchmark, ours, peers, label=label, rounds=ROUNDS)
    rows = benchmark.extra_info["rows"]
    rows += [{**label, "backend": peer, "ms": entrant.milliseconds()} for peer, entrant in peers.items()]
    for row in rows:
        row["img/s"] = f"{1e3 * len(samples) / row['ms'][1]:.1f}"
        row["by"] = version_behind(row["backend"])


def version_behind(backend: str) -> str:
    if backend == "dali":
        return f"DALI {import_dali()[0].__version__}"
    module = torch if backend == "resident" else torchvision
    return f"{module.__name__} {module.__version__}"


def epochs_of(backend: str, samples: Samples, pictures: Pictures, augmentation: Augmentation) -> Entrant:
    """One of our pipelines as a training run has it; raises UserError where it cannot serve."""
    loader = make_loader(
        backend,
        samples,
        batch_size=pictures.batch_size,
        img_size=SIDE,
        device=DEVICE,
        dtype=torch.float16 if ON_GPU else torch.float32,
        training=True,
        sampler=WeightedSampler(samples.labels, len(samples.class_names), sampling="inverse", seed=0),
        augmentation=augmentation,
        workers=CORES,
    )
    numbers = itertools.count()
    return Entrant(run=lambda _: exhaust(loader.epoch(next(numbers)), pictures))


def epochs_of_a_data_loader(samples: Samples, pictures: Pictures, augmentation: Augmentation) -> Entrant:
    weights = 1 / samples.class_counts()[samples.labels]
    loader = DataLoader(
        Decoded(samples, transforms_of(augmentation)),
        batch_size=pictures.batch_size,
        sampler=WeightedRandomSampler(weights.tolist(), len(samples)),
        num_workers=CORES,
        pin_memory=ON_GPU,
        persistent_workers=True,
        drop_last=True,
        multiprocessing_context=multiprocessing.get_context("forkserver"),  # a fork takes along what DALI has locked
    )

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield (
                images.to(DEVICE, memory_format=torch.channels_last, non_blocking=True),
                labels.to(DEVICE, non_blocking=True),
            )

    return Entrant(run=lambda _: exhaust(batches(), pictures))


class Decoded(Dataset[tuple[Tensor, int]]):
    def __init__(self, samples: Samples, transform: v2.Transform) -> None:
        self.files, self.labels, self.transform = samples.files, samples.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = decode_image(self.files[i], ImageReadMode.RGB, apply_exif_orientation=True)
        return self.transform(image), self.labels[i]


def transforms_of(augmentation: Augmentation) -> v2.Transform:
    """What has the same name in torchvision; of the rest, which is off by default, nothing."""
    a, bilinear = augmentation, v2.InterpolationMode.BILINEAR
    shift = (a.translate, a.translate)
    wanted: list[tuple[float, v2.Transform]] = [
        (a.rotation, v2.RandomRotation(a.degrees, interpolation=bilinear)),
        (a.affine, v2.RandomAffine(0, translate=shift, scale=a.scale, shear=a.shear, interpolation=bilinear)),
        (a.jitter, v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)),
    ]
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=a.crop_scale, ratio=a.crop_ratio, antialias=True),
            v2.RandomHorizontalFlip(a.hflip),
            *(v2.RandomApply([transform], p=p) for p, transform in wanted if p),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def exhaust(epoch: Iterable[tuple[Tensor, Tensor]], pictures: Pictures) -> None:
    count = 0
    for images, labels in epoch:
        assert images.shape == (pictures.batch_size, 3, SIDE, SIDE)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.device.type == labels.device.type == DEVICE.type
        count += 1
    assert count == pictures.batches
