"""The input pipeline on NVIDIA DALI, on a GPU or on the CPU: the one place that imports it, and only when it is used.

Evaluation: decode, resize to a square without keeping the aspect ratio (antialiased, as Pillow's BILINEAR), normalise.
Training does the same with ``engine.data.augment`` between resizing and normalising. Pixels are float32 from the resize
on and rounded to the output type once. Against Pillow, which rounds to 8 bits twice, that makes at most one level; only
in the outermost row and column of a reduced image do the two differ by more, because Pillow cuts the filter off at the
edge and DALI repeats the edge pixel.

Images are turned as their EXIF orientation says. Palettes, grey, CMYK and 16 bits (by their full range) become 8-bit
RGB; alpha is dropped.

DALI has no random state here. Which files make a batch and what happens to them is computed in Python from (seed,
epoch, batch number) and handed over, so that an epoch can be begun at any batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.data.augment import Augmentation
from engine.data.probe import pillow_failure
from engine.data.sampler import WeightedSampler
from engine.data.samples import Samples
from engine.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREFETCH = 2

Batch = tuple[torch.Tensor, torch.Tensor]


class DaliLoader:
    """Batches of images and labels, epoch by epoch.

    Images are (B, 3, img_size, img_size) of ``dtype`` in ``torch.channels_last`` strides, normalised by ``mean`` and
    ``std`` (of RGB in [0, 1]); labels are (B,) int64. Both stand on ``device`` and share DALI's memory with no copy; a
    batch stays valid for as long as it is held. On a GPU they are ready on the stream that was current when they were
    asked for.

    Training draws an epoch from ``sampler``, augments and drops the last batch if it is partial and not the only one.
    Evaluation gives every image once, in order.

    Args:
        samples: the images, at least one.
        device: a CPU or CUDA device.
        dtype: ``torch.float32`` or ``torch.float16``.
        training: see above. ``sampler``, ``augmentation`` and ``seed`` concern training alone.
        sampler: by default every image once, in random order.
        augmentation: by default none.
        workers: DALI's threads.

    Raises:
        UserError: DALI is not installed; while iterating, an image cannot be decoded.
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
        import_dali()
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
        self.seed = seed
        self.workers = workers
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._feed = _Feed()
        self._pipeline: Pipeline | None = None
        self._run = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        if self.sampler is not None:
            return max(1, len(self.sampler) // self.batch_size)
        return math.ceil(len(self.data) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number ``start`` on, the same ones whether or not those before were asked for.

        DALI begins to work on them at once. Beginning an epoch ends the one before: its iterator raises RuntimeError.
        """
        order = self.sampler.draw(epoch) if self.sampler is not None else np.arange(len(self.data))
        pipeline = self._idle_pipeline()
        self._feed.batches = self._batch_inputs(epoch, order, start)
        self._run += 1
        pipeline.schedule_run()
        return self._batches(pipeline, order, start, self._run)

    def _batches(self, pipeline: Pipeline, order: np.ndarray, start: int, run: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if run != self._run:
                raise RuntimeError("this epoch ended when another one was begun on the same loader")
            try:
                images, labels = pipeline.outputs(cuda_stream=self._stream())
                pipeline.schedule_run()
            except RuntimeError as error:
                self._pipeline = None  # a DALI pipeline does not survive an error
                self._blame_a_file(order, batch, error)
                raise
            yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _batch_indices(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _batch_inputs(self, epoch: int, order: np.ndarray, start: int) -> Iterator[tuple[Any, ...]]:
        for batch in range(start, len(self)):
            indices = self._batch_indices(order, batch)
            paths = [encode_path(self.data.files[i]) for i in indices]
            labels = self.data.labels[indices]
            if self.augmentation is None:
                yield paths, labels
            else:
                positions = batch * self.batch_size + np.arange(len(indices))
                drawn = self.augmentation.draw(self.seed, epoch, positions)
                warp = drawn.warp * np.array([1, 1, self.img_size], dtype=np.float32)  # the shift, in pixels
                yield paths, labels, drawn.warped, warp, drawn.jitter, drawn.color, drawn.pivot

    def _idle_pipeline(self) -> Pipeline:
        """The pipeline with nothing in flight. What an abandoned epoch has left in it is run and thrown away."""
        if self._pipeline is None:
            self._pipeline = self._build()
            return self._pipeline
        self._feed.batches = iter(())
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:
            self._pipeline = self._build()
        return self._pipeline

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _blame_a_file(self, order: np.ndarray, batch: int, error: RuntimeError) -> None:
        """Raises UserError if a file of the batch that failed cannot be decoded."""
        decoder = Decoder(self.device)
        for file in (self.data.files[i] for i in self._batch_indices(order, batch)):
            reason = pillow_failure(file) or decoder.failure(file)
            if reason is not None:
                raise UserError(f"cannot decode {file} ({reason}): remove or replace it, then start again") from error

    def _build(self) -> Pipeline:
        dali, fn, types = import_dali()
        on_gpu = self.device.type == "cuda"
        augmented = self.augmentation is not None
        img_size = self.img_size
        mean = [255 * value for value in self.mean]
        std = [255 * value for value in self.std]
        dtype = types.FLOAT if self.dtype == torch.float32 else types.FLOAT16
        input_types = [types.UINT8, types.INT64, types.BOOL, types.FLOAT, types.BOOL, types.FLOAT, types.FLOAT]
        input_ndims = [1, 0, 0, 2, 0, 2, 2]
        inputs = len(input_types) if augmented else 2

        @dali.pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=_device_id(self.device),
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            path, label, *drawn = fn.external_source(
                source=self._feed, num_outputs=inputs, dtype=input_types[:inputs], ndim=input_ndims[:inputs]
            )
            image = decode(fn, types, path, on_gpu)
            image = fn.resize(image, size=[img_size, img_size], mode="stretch", antialias=True, dtype=types.FLOAT)
            if augmented:
                warped, warp, jitter, color, pivot = drawn
                if warped:
                    image = fn.warp_affine(image, matrix=warp, fill_value=0, inverse_map=True)
                if jitter:
                    mean_pixel = fn.reductions.mean(image, axes=[0, 1], keep_dims=True)
                    shift = fn.coord_transform(mean_pixel, M=pivot)
                    image = dali.math.clamp(fn.coord_transform(image, M=color) + shift, 0, 255)
            image = fn.crop_mirror_normalize(image, mean=mean, std=std, dtype=dtype, output_layout="HWC")
            if on_gpu:
                label = label.gpu()
            return image, label

        built = pipeline()
        built.build()
        return built


class _Feed:
    """What DALI asks for its next batch of inputs; the StopIteration at the end of ``batches`` ends an epoch."""

    def __init__(self) -> None:
        self.batches: Iterator[tuple[Any, ...]] = iter(())

    def __call__(self) -> tuple[Any, ...]:
        return next(self.batches)


class Decoder:
    """Finds out whether DALI can decode a file, as the loader on the same device would.

    It decodes one file at a time on one thread: where DALI 2.4 meets a header that it does not understand while other
    threads work on the same batch, the process ends in a segmentation fault.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pipeline: Pipeline | None = None

    def failure(self, file: str) -> str | None:
        """Why it cannot be decoded; None: it can."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            self._pipeline.run(path=[encode_path(file)])
        except RuntimeError as error:
            self._pipeline = None  # a DALI pipeline does not survive an error
            return _reason(error)
        return None

    def _build(self) -> Pipeline:
        dali, fn, types = import_dali()

        @dali.pipeline_def(batch_size=1, num_threads=1, device_id=_device_id(self._device), prefetch_queue_depth=1)
        def pipeline() -> Any:
            path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
            return decode(fn, types, path, on_gpu=self._device.type == "cuda")

        return pipeline()


def import_dali() -> tuple[Any, Any, Any]:
    """The modules ``nvidia.dali``, its ``fn`` and its ``types``; raises UserError where they cannot be imported."""
    try:
        from nvidia import dali
        from nvidia.dali import fn, types
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI cannot be imported ({error}): pip install nvidia-dali-cuda130 (Linux, with or without a GPU)"
        ) from error
    return dali, fn, types


def decode(fn: Any, types: Any, path: Any, on_gpu: bool) -> Any:
    """The file at ``path`` as (H, W, 3) uint8 RGB, read by DALI's own threads."""
    # A file that is mapped into memory and truncated meanwhile would end the process with a bus error.
    encoded = fn.io.file.read(path, dont_use_mmap=True)
    device = "mixed" if on_gpu else "cpu"
    # Otherwise nvJPEG interpolates chroma in its own way, and a model would see other pixels on a GPU than on the CPU.
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)


def encode_path(file: str) -> np.ndarray:
    return np.frombuffer(os.fsencode(file), dtype=np.uint8)


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that says what went wrong."""
    _, _, told = str(error).partition("encountered:")
    lines = [line.strip() for line in (told or str(error)).splitlines() if line.strip()]
    return f"DALI: {lines[0].rstrip(' :')}" if lines else "DALI gave no reason"
