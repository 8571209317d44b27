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

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.data import dali_steps
from engine.data.loader import Batch, Loader
from engine.data.probe import pillow_failure
from engine.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

PREFETCH = 2


class DaliLoader(Loader):
    """`Loader` by DALI, in ``workers`` threads. Its batches share DALI's memory with no copy."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        import_dali()
        self._feed = _Feed()
        self._pipeline: Pipeline | None = None
        self._run = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self.order(epoch)
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

    def _batch_inputs(self, epoch: int, order: np.ndarray, start: int) -> Iterator[tuple[Any, ...]]:
        for batch in range(start, len(self)):
            planned = self.planned(order, epoch, batch)
            paths = [encode_path(self.data.files[i]) for i in planned.indices]
            yield paths, self.data.labels[planned.indices], *dali_steps.values(planned, self.img_size).values()

    def _inputs(self) -> dict[str, tuple[str, int]]:
        """What the pipeline is fed beside paths and labels; see `dali_steps`."""
        boxes = dali_steps.BOX_INPUTS if self.crops else {}
        return boxes | (dali_steps.DRAWN_INPUTS if self.augmentation is not None else {})

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
        for file in (self.data.files[i] for i in self.planned(order, 0, batch).indices):
            reason = pillow_failure(file) or decoder.failure(file)
            if reason is not None:
                raise UserError(f"cannot decode {file} ({reason}): remove or replace it, then start again") from error

    def _build(self) -> Pipeline:
        dali, fn, types = import_dali()
        on_gpu = self.device.type == "cuda"
        dtype = types.FLOAT if self.dtype == torch.float32 else types.FLOAT16
        inputs = self._inputs()
        kinds = [(types.UINT8, 1), (types.INT64, 0), *((getattr(types, name), ndim) for name, ndim in inputs.values())]

        @dali.pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=_device_id(self.device),
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            path, label, *given = fn.external_source(
                source=self._feed,
                num_outputs=len(kinds),
                dtype=[dtype for dtype, _ in kinds],
                ndim=[ndim for _, ndim in kinds],
            )
            image = decode(fn, types, path, on_gpu)
            # zip has no `strict` in what DALI makes of a pipeline definition
            named = {name: given[i] for i, name in enumerate(inputs)}
            image = dali_steps.prepare(
                dali,
                image,
                named,
                img_size=self.img_size,
                mean=self.mean,
                std=self.std,
                dtype=dtype,
                device="gpu" if on_gpu else "cpu",
            )
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
