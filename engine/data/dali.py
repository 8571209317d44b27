"""The input pipeline on NVIDIA DALI, on a GPU or on the CPU.

Evaluation: decode, resize to a square without keeping the aspect ratio (antialiased, as Pillow's BILINEAR), normalise.
Training does the same with ``engine.data.augment`` between resizing and normalising. Pixels are float32 from the resize
on and rounded to the output type once. Against Pillow, which rounds to 8 bits twice, that makes at most one level; only
in the outermost row and column of a reduced image do the two differ by more, because Pillow cuts the filter off at the
edge and DALI repeats the edge pixel.

Pixels are those of ``engine.data.decode``, whatever the kind of file: what DALI would decode otherwise or not at all
is decoded there, on threads, and handed over; so are arrays.

DALI has no random state here. Which files make a batch and what happens to them is computed in Python from (seed,
epoch, batch number) and handed over, so that an epoch can be begun at any batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.data import dali_steps
from engine.data.dali_decoder import HW_DECODER_LOAD, Decoder, decode, device_id, import_dali
from engine.data.failure import Failure
from engine.data.feed import ImageFeed
from engine.data.loader import Batch, Loader, Planned
from engine.data.probe import pillow_failure

if TYPE_CHECKING:
    from engine.data.dali_decoder import Pipeline

PREFETCH = 2


class DaliLoader(Loader):
    """`Loader` by DALI, in ``workers`` threads. Its batches share DALI's memory with no copy.

    Args:
        hw_decoder_load: on a GPU that decodes JPEG in hardware beside its cores (A100, H100), the share of the files
            that goes there, between 0 and 1; the cores take the rest at the same time. The best one depends on
            ``workers``, which help the cores; DALI advises to try.
    """

    def __init__(self, *args: Any, hw_decoder_load: float = HW_DECODER_LOAD, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 <= hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load {hw_decoder_load} must lie between 0 and 1")
        import_dali()
        self._hw_decoder_load = hw_decoder_load
        self._images = ImageFeed(self.data, self.workers)
        self._feed = _Feed()
        self._unreadable: dict[int, list[Failure]] = {}
        self._pipeline: Pipeline | None = None
        self._built_for = 0
        self._run = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self.order(epoch)
        self._run += 1
        return self._batches(self._begin(epoch, order, start), epoch, order, start, self._run)

    def _begin(self, epoch: int, order: np.ndarray, start: int) -> Pipeline:
        pipeline = self._idle_pipeline(self.img_size(epoch))
        self._unreadable = {}
        self._feed.batches = self._batch_inputs(epoch, order, start)
        pipeline.schedule_run()
        return pipeline

    def _batches(self, pipeline: Pipeline, epoch: int, order: np.ndarray, start: int, run: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if run != self._run:
                raise RuntimeError("this epoch ended when another one was begun on the same loader")
            outputs: tuple[Any, Any] | None = None
            while outputs is None and len(self.indices(order, batch)):
                found = self._outputs(pipeline, order, batch)
                if isinstance(found, tuple):
                    outputs = found
                else:
                    self._pipeline = None  # a DALI pipeline does not survive an error
                    self.lose(found)
                    pipeline = self._begin(epoch, order, batch)
            if outputs is not None:
                images, labels = outputs
                yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _outputs(self, pipeline: Pipeline, order: np.ndarray, batch: int) -> tuple[Any, Any] | list[Failure]:
        """Images and labels of a batch, or the images in it that cannot be decoded."""
        if batch in self._unreadable:
            return self._unreadable[batch]
        try:
            images, labels = pipeline.outputs(cuda_stream=self._stream())
            pipeline.schedule_run()
        except RuntimeError:
            self._pipeline = None
            failures = self._failures(order, batch)
            if not failures:
                raise
            return failures
        return images, labels

    def _batch_inputs(self, epoch: int, order: np.ndarray, start: int) -> Iterator[tuple[Any, ...]]:
        """What DALI asks for, batch by batch; images that it does not decode are begun ``PREFETCH`` batches ahead."""
        ahead = deque[tuple[int, Planned, Any]]()
        for batch in range(start, len(self)):
            planned = self.planned(order, epoch, batch)
            if len(planned.indices) == 0:
                continue
            ahead.append((batch, planned, self._images.begin(planned.indices)))
            if len(ahead) > PREFETCH:
                yield self._fed(*ahead.popleft())
        while ahead:
            yield self._fed(*ahead.popleft())

    def _fed(self, batch: int, planned: Planned, begun: Any) -> tuple[Any, ...]:
        images, failures = self._images.finish(planned.indices, begun)
        if failures:
            self._unreadable[batch] = failures
        values = dali_steps.values(planned)
        return *images, self.targets[planned.indices], *(values[name] for name in self._inputs())

    def _inputs(self) -> dict[str, tuple[str, int]]:
        """What the pipeline is fed beside images and labels; see `dali_steps`."""
        boxes = dali_steps.BOX_INPUTS if self.crops else {}
        if self.augmentation is None:
            return boxes
        return boxes | dali_steps.DRAWN_INPUTS | (dali_steps.TONE_INPUTS if self.augmentation.tones else {})

    def _idle_pipeline(self, img_size: int) -> Pipeline:
        """The pipeline for this size with nothing in flight.

        What an abandoned epoch has left in it is run and thrown away. Where the size is another one it is built anew,
        since DALI's constants hold it.
        """
        if self._pipeline is None or self._built_for != img_size:
            self._pipeline, self._built_for = self._build(img_size), img_size
            return self._pipeline
        self._feed.batches = iter(())
        try:
            self._pipeline.schedule_run()  # which finds the feed at its end
            while not self._pipeline.empty():
                self._pipeline.outputs()
            self._pipeline.reset()
        except RuntimeError:
            self._pipeline = self._build(img_size)
        return self._pipeline

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _failures(self, order: np.ndarray, batch: int) -> list[Failure]:
        """The files of a batch that failed which cannot be decoded."""
        if self.data.pixels is not None:
            return []
        decoder = Decoder(self.device)
        found = []
        for index in np.unique(self.indices(order, batch)):
            reason = pillow_failure(self.data.files[index]) or decoder.failure(self.data.files[index])
            if reason is not None:
                found.append(Failure(int(index), reason))
        return found

    def _build(self, img_size: int) -> Pipeline:
        dali, fn, types = import_dali()
        on_gpu = self.device.type == "cuda"
        dtype = types.FLOAT if self.dtype == torch.float32 else types.FLOAT16
        inputs = self._inputs()
        from_files = self.data.pixels is None
        kinds = [(types.UINT8, 3), *([(types.UINT8, 1), (types.BOOL, 0)] if from_files else []), (types.INT64, 0)]
        kinds += [(getattr(types, name), ndim) for name, ndim in inputs.values()]

        def fed(pixels: Any, named: dict[str, Any]) -> Any:
            shown = dali_steps.cut(fn, pixels, named)
            return shown.gpu() if on_gpu else shown

        @dali.pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=device_id(self.device),
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            pixels, *given = fn.external_source(
                source=self._feed,
                num_outputs=len(kinds),
                dtype=[dtype for dtype, _ in kinds],
                ndim=[ndim for _, ndim in kinds],
                layout=["HWC"] + [""] * (len(kinds) - 1),
            )
            if from_files:
                path, left_to_dali, *given = given
            label, *given = given
            # zip has no `strict` in what DALI makes of a pipeline definition
            named = {name: given[i] for i, name in enumerate(inputs)}
            if from_files:
                if left_to_dali:
                    image = decode(fn, types, path, on_gpu, dali_steps.box(named), self._hw_decoder_load)
                else:
                    image = fed(pixels, named)
            else:
                image = fed(pixels, named)
            image = dali_steps.prepare(
                dali,
                image,
                named,
                img_size=img_size,
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
