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
from engine.data.dali_decoder import Decoder, decode, device_id, import_dali
from engine.data.feed import ImageFeed, cannot_decode
from engine.data.loader import Batch, Loader, Planned
from engine.data.probe import pillow_failure
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.data.dali_decoder import Pipeline

PREFETCH = 2


class DaliLoader(Loader):
    """`Loader` by DALI, in ``workers`` threads. Its batches share DALI's memory with no copy."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        import_dali()
        self._images = ImageFeed(self.data, self.workers)
        self._feed = _Feed()
        self._unreadable: dict[int, UserError] = {}
        self._pipeline: Pipeline | None = None
        self._run = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self.order(epoch)
        pipeline = self._idle_pipeline()
        self._unreadable = {}
        self._feed.batches = self._batch_inputs(epoch, order, start)
        self._run += 1
        pipeline.schedule_run()
        return self._batches(pipeline, order, start, self._run)

    def _batches(self, pipeline: Pipeline, order: np.ndarray, start: int, run: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if run != self._run:
                raise RuntimeError("this epoch ended when another one was begun on the same loader")
            if batch in self._unreadable:
                self._pipeline = None
                raise self._unreadable[batch]
            try:
                images, labels = pipeline.outputs(cuda_stream=self._stream())
                pipeline.schedule_run()
            except RuntimeError as error:
                self._pipeline = None  # a DALI pipeline does not survive an error
                self._blame_a_file(order, batch, error)
                raise
            yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _batch_inputs(self, epoch: int, order: np.ndarray, start: int) -> Iterator[tuple[Any, ...]]:
        """What DALI asks for, batch by batch; images that it does not decode are begun ``PREFETCH`` batches ahead."""
        ahead = deque[tuple[int, Planned, Any]]()
        for batch in range(start, len(self)):
            planned = self.planned(order, epoch, batch)
            ahead.append((batch, planned, self._images.begin(planned.indices)))
            if len(ahead) > PREFETCH:
                yield self._fed(*ahead.popleft())
        while ahead:
            yield self._fed(*ahead.popleft())

    def _fed(self, batch: int, planned: Planned, begun: Any) -> tuple[Any, ...]:
        images, error = self._images.finish(planned.indices, begun)
        if error is not None:
            self._unreadable[batch] = error
        return *images, self.data.labels[planned.indices], *dali_steps.values(planned, self.img_size).values()

    def _inputs(self) -> dict[str, tuple[str, int]]:
        """What the pipeline is fed beside images and labels; see `dali_steps`."""
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
        if self.data.pixels is not None:
            return
        decoder = Decoder(self.device)
        for file in (self.data.files[i] for i in self.planned(order, 0, batch).indices):
            reason = pillow_failure(file) or decoder.failure(file)
            if reason is not None:
                raise cannot_decode(file, reason) from error

    def _build(self) -> Pipeline:
        dali, fn, types = import_dali()
        on_gpu = self.device.type == "cuda"
        dtype = types.FLOAT if self.dtype == torch.float32 else types.FLOAT16
        inputs = self._inputs()
        from_files = self.data.pixels is None
        kinds = [(types.UINT8, 3), *([(types.UINT8, 1), (types.BOOL, 0)] if from_files else []), (types.INT64, 0)]
        kinds += [(getattr(types, name), ndim) for name, ndim in inputs.values()]

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
            image = pixels.gpu() if on_gpu else pixels
            if from_files:
                path, left_to_dali, *given = given
                if left_to_dali:
                    image = decode(fn, types, path, on_gpu)
            label, *given = given
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
