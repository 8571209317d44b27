"""What every input pipeline shares: which images make a batch, and what happens to them on the way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.data.augment import Augmentation, Drawn, class_rarity
from engine.data.sampler import WeightedSampler
from engine.data.samples import Samples
from engine.data.sizes import image_sizes
from engine.data.transforms import centre_boxes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Batch = tuple[torch.Tensor, torch.Tensor]


class Planned(NamedTuple):
    """A batch before any image is read."""

    indices: np.ndarray  # (B,) int64, into the samples
    boxes: np.ndarray | None  # (B, 4) int32, the part of each image that is shown; None: all of each
    drawn: Drawn | None


class Loader(ABC):
    """Batches of images and labels, epoch by epoch.

    Images are (B, 3, img_size, img_size) of ``dtype`` in ``torch.channels_last`` strides, normalised by ``mean`` and
    ``std`` (of RGB in [0, 1]); labels are (B,) int64. Both stand on ``device``; a batch stays valid for as long as it
    is held. On a GPU they are ready on the stream that was current when they were asked for.

    Training draws an epoch from ``sampler``, augments and drops the last batch if it is partial and not the only one.
    Evaluation gives every image once, in order.

    Args:
        samples: the images, at least one.
        device: a CPU or CUDA device.
        dtype: ``torch.float32`` or ``torch.float16``.
        training: see above. ``sampler``, ``augmentation`` and ``seed`` concern training alone.
        sampler: by default every image once, in random order.
        augmentation: by default none.
        crop_pct: of evaluation: the central square of this share of the shorter side is shown; None: the whole image,
            stretched to a square.
        workers: threads or processes that read and decode.

    Raises:
        UserError: what the pipeline stands on is not installed; while iterating, an image cannot be decoded.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        img_size: int,
        device: torch.device,
        dtype: torch.dtype,
        training: bool,
        sampler: WeightedSampler | None = None,
        augmentation: Augmentation | None = None,
        crop_pct: float | None = None,
        seed: int = 0,
        workers: int = 4,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be torch.float32 or torch.float16, not {dtype}")
        if len(samples) == 0:
            raise ValueError("samples hold no image")
        if batch_size < 1 or img_size < 1 or workers < 1:
            raise ValueError(f"batch_size {batch_size}, img_size {img_size} and workers {workers} must be at least 1")
        self.data = samples
        self.batch_size = batch_size
        self.img_size = img_size
        self.device = device
        self.dtype = dtype
        self.training = training
        if training and sampler is None:
            sampler = WeightedSampler(samples.labels, len(samples.class_names), sampling="none", seed=seed)
        self.sampler = sampler if training else None
        self.augmentation = augmentation if training else None
        self.crop_pct = None if training else crop_pct
        self.seed = seed
        self.workers = workers
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._rarity = class_rarity(samples.class_counts())[samples.labels]
        self._sizes = image_sizes(samples, workers=workers) if self.crops else None

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.sampler is not None:
            return max(1, len(self.sampler) // self.batch_size)
        return math.ceil(len(self.data) / self.batch_size)

    @property
    def crops(self) -> bool:
        """Whether parts of images are shown, for which their sizes have to be known."""
        return self.crop_pct is not None or (self.augmentation is not None and self.augmentation.crops)

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number ``start`` on, the same ones whether or not those before were asked for.

        Work on them begins at once. Beginning an epoch ends the one before: its iterator raises RuntimeError.
        """

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's images: indices into the samples, (n,) int64."""
        return self.sampler.draw(epoch) if self.sampler is not None else np.arange(len(self.data))

    def planned(self, order: np.ndarray, epoch: int, batch: int) -> Planned:
        """Batch number ``batch`` of the epoch whose ``order`` is given."""
        first = batch * self.batch_size
        indices = order[first : first + self.batch_size]
        sizes = None if self._sizes is None else self._sizes[indices]
        if self.augmentation is None:
            boxes = None if sizes is None or self.crop_pct is None else centre_boxes(sizes, self.crop_pct)
            return Planned(indices, boxes, None)
        drawn = self.augmentation.draw(
            self.seed,
            epoch,
            first + np.arange(len(indices)),
            img_size=self.img_size,
            sizes=sizes,
            rarity=self._rarity[indices],
        )
        return Planned(indices, drawn.boxes, drawn)
