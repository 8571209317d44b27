"""What every input pipeline shares: which images make a batch, and what happens to them on the way."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.data.augment import Augmentation, Drawn, class_rarity
from engine.data.failure import Failure, cannot_decode
from engine.data.sampler import WeightedSampler
from engine.data.samples import Samples
from engine.data.sizes import image_sizes
from engine.data.transforms import centre_boxes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Batch = tuple[torch.Tensor, torch.Tensor]


class Planned(NamedTuple):
    """A batch before any image is read."""

    indices: np.ndarray  # (B,) int64, into the samples; fewer where evaluation has lost an image
    boxes: np.ndarray | None  # (B, 4) int32, the part of each image that is shown; None: all of each
    drawn: Drawn | None
    img_size: int


class Loader(ABC):
    """Batches of images and labels, epoch by epoch.

    Images are (B, 3, S, S) of ``dtype`` in ``torch.channels_last`` strides, normalised by ``mean`` and ``std`` (of RGB
    in [0, 1]); labels are (B,) int64, and with ``by_index`` the images' indices into ``samples`` are in their place.
    Both stand on ``device``; a batch stays valid for as long as it is held. On a GPU they are ready on the stream that
    was current when they were asked for.

    Training draws an epoch from ``sampler``, augments and drops the last batch if it is partial and not the only one.
    Evaluation gives every image once, in order.

    A file that can no longer be decoded is named on stderr and left out from then on: in training the next image of its
    class takes its place, so that batches keep their numbers and sizes; evaluation does without it. Why stands in
    ``reasons_lost``, by the image's index.

    Args:
        samples: the images, at least one.
        img_size: S, in pixels; or one for each epoch, of which the last holds for all that follow.
        device: a CPU or CUDA device.
        dtype: ``torch.float32`` or ``torch.float16``.
        training: see above. ``sampler``, ``augmentation`` and ``seed`` concern training alone.
        sampler: by default every image once, in random order.
        augmentation: by default none.
        crop_pct: of evaluation: the central square of this share of the shorter side is shown; None: the whole image,
            stretched to a square.
        max_bad_fraction: the largest share of the images that may be left out while iterating.
        workers: threads or processes that read and decode.
        by_index: see above, for who has other labels than those of ``samples``.

    Raises:
        UserError: what the pipeline stands on is not installed; while iterating, too many images cannot be decoded, or
            the last one of a class that training draws.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        img_size: int | Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        training: bool,
        sampler: WeightedSampler | None = None,
        augmentation: Augmentation | None = None,
        crop_pct: float | None = None,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        workers: int = 4,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        by_index: bool = False,
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be torch.float32 or torch.float16, not {dtype}")
        if len(samples) == 0:
            raise ValueError("samples hold no image")
        self.img_sizes = (img_size,) if isinstance(img_size, int) else tuple(img_size)
        if batch_size < 1 or min(self.img_sizes, default=0) < 1 or workers < 1:
            raise ValueError(f"batch_size {batch_size}, img_size {img_size} and workers {workers} must be at least 1")
        self.data = samples
        self.targets = np.arange(len(samples)) if by_index else samples.labels
        self.batch_size = batch_size
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
        self.max_bad_fraction = max_bad_fraction
        self._lost = np.zeros(len(samples), dtype=bool)
        self.reasons_lost: dict[int, str] = {}
        self._rarity = class_rarity(samples.class_counts())[samples.labels]
        self._sizes = self._image_sizes() if self.crops else None

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.sampler is not None:
            return max(1, len(self.sampler) // self.batch_size)
        return math.ceil(len(self.data) / self.batch_size)

    @property
    def crops(self) -> bool:
        """Whether parts of images are shown, for which their sizes have to be known."""
        return self.crop_pct is not None or (self.augmentation is not None and self.augmentation.crops)

    def img_size(self, epoch: int) -> int:
        """Height and width of the epoch's images, in pixels."""
        return self.img_sizes[min(epoch, len(self.img_sizes) - 1)]

    def _image_sizes(self) -> np.ndarray:
        """(n, 2) int32 heights and widths."""
        return image_sizes(self.data, workers=self.workers)

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
        first, img_size = batch * self.batch_size, self.img_size(epoch)
        indices = self.indices(order, batch)
        sizes = None if self._sizes is None else self._sizes[indices]
        if self.augmentation is None:
            boxes = None if sizes is None or self.crop_pct is None else centre_boxes(sizes, self.crop_pct)
            return Planned(indices, boxes, None, img_size)
        drawn = self.augmentation.draw(
            self.seed,
            epoch,
            first + np.arange(len(indices)),
            img_size=img_size,
            sizes=sizes,
            rarity=self._rarity[indices],
        )
        return Planned(indices, drawn.boxes, drawn, img_size)

    def lose(self, failures: Sequence[Failure]) -> None:
        """Leaves images out from now on. Raises UserError, naming the file, where that goes too far."""
        for failure in failures:
            if self._lost[failure.index]:  # drawn more than once in its batch
                continue
            file, label = self.data.files[failure.index], self.data.labels[failure.index]
            lost = self._lost.copy()
            lost[failure.index] = True
            if lost.sum() > self.max_bad_fraction * len(lost):
                way_out = f"remove or replace it, or raise --max-bad-fraction (now {self.max_bad_fraction:g})"
                raise cannot_decode(file, failure.reason, way_out)
            if self.training and not (self.data.labels[~lost] == label).any():
                name = self.data.class_names[label]
                raise cannot_decode(file, failure.reason, f"it is the last image of class {name!r}, replace it")
            self._lost = lost
            self.reasons_lost[failure.index] = failure.reason
            tqdm.write(f"left out from now on: {file}: {failure.reason}", file=sys.stderr)

    def kept(self) -> np.ndarray:
        """The images that have not been lost so far, in order: indices into the samples, (n,) int64."""
        return np.flatnonzero(~self._lost)

    def indices(self, order: np.ndarray, batch: int) -> np.ndarray:
        """The images of a batch, (B,) int64, without those that were lost."""
        indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        if not self.training:
            return indices[~self._lost[indices]]
        for place in np.flatnonzero(self._lost[indices]):
            alike = np.flatnonzero((self.data.labels == self.data.labels[indices[place]]) & ~self._lost)
            following = alike[np.searchsorted(alike, indices[place]) % len(alike)]
            indices = indices.copy()
            indices[place] = following
        return indices
