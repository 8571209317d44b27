"""The input pipeline on torchvision and torch.utils.data.DataLoader: the reference, and what runs without DALI.

Worker processes decode, crop, resize, augment and normalise, a batch each at a time, by
`engine.data.torchvision_steps`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.decode import decode_image
from engine.data.failure import Failure
from engine.data.loader import Batch, Loader, Planned
from engine.data.torchvision_steps import prepare


class TorchvisionLoader(Loader):
    """`Loader` by torchvision, in ``workers`` processes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # without a cycle, the DataLoader ends its workers as soon as nobody holds this loader
        self._queue = _Queue(weakref.proxy(self))
        on_gpu = self.device.type == "cuda"
        self._loader = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=self._queue,
            num_workers=self.workers,
            multiprocessing_context=_processes(),
            worker_init_fn=_end_with_parent,
            pin_memory=on_gpu,
            persistent_workers=True,
        )
        self._run = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._run += 1
        return self._batches(self._begin(epoch, start), epoch, start, self._run)

    def _begin(self, epoch: int, start: int) -> Iterator[Any]:
        self._queue.epoch, self._queue.start = epoch, start
        with _main_out_of_sight():
            return iter(self._loader)

    def _batches(self, batches: Iterator[Any], epoch: int, start: int, run: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if run != self._run:
                raise RuntimeError("this epoch ended when another one was begun on the same loader")
            while isinstance(found := next(batches), Failure):
                self.lose([found])
                batches = self._begin(epoch, batch)
            images, labels = found
            if len(labels):
                yield (
                    images.to(self.device, non_blocking=True).permute(0, 3, 1, 2),
                    labels.to(self.device, non_blocking=True),
                )


def _processes() -> Any:
    """How workers are started: by a server that has no threads, since a fork of this process would take along what
    DALI's threads have locked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _main_out_of_sight() -> Iterator[None]:
    """Processes that are started in here do not run the program's main module first.

    They need nothing of it, wait for all that it imports, and a script that is not guarded by ``__name__`` would do
    its work again in each.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent(worker: int) -> None:
    """In a worker: ends it when the process that it works for is killed.

    A DataLoader's workers look whether the process that forked them is there, and that is the server, which stays for
    as long as they do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has been started by another process"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name=f"parent of worker {worker}", daemon=True).start()


class _Queue:
    """The batches of the epoch that comes next: what a sampler is to a DataLoader."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self._loader) - self.start

    def __iter__(self) -> Iterator[Planned]:
        order = self._loader.order(self.epoch)
        for batch in range(self.start, len(self._loader)):
            yield self._loader.planned(order, self.epoch, batch)


class _Shared:
    """Arrays (n, H, W, 3) uint8 in memory that is handed to each worker and copied for none."""

    def __init__(self, pixels: np.ndarray) -> None:
        stored = pixels[..., :1] if pixels.strides[3] == 0 else pixels  # grey is one channel, shown three times
        self._shape = stored.shape
        self._memory = multiprocessing.RawArray("B", stored.size)
        self._stored()[...] = stored

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3)"""
        image = self._stored()[index]
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def _stored(self) -> np.ndarray:
        return np.frombuffer(self._memory, dtype=np.uint8).reshape(self._shape)


class _Batches(Dataset[Any]):
    """A planned batch -> images (B, S, S, 3) and labels (B,), in a worker process."""

    def __init__(self, loader: Loader) -> None:
        self.files = loader.data.files
        self.pixels = None if loader.data.pixels is None else _Shared(loader.data.pixels)
        self.targets, self.dtype = loader.targets, loader.dtype
        self.mean, self.std = loader.mean, loader.std

    def __getitem__(self, planned: Planned) -> tuple[Tensor, Tensor] | Failure:
        side = planned.img_size
        images = torch.empty((len(planned.indices), side, side, 3), dtype=self.dtype)
        for i, index in enumerate(planned.indices):
            try:
                array = decode_image(self.files[index]) if self.pixels is None else self.pixels[index]
                pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
                # handed over in place of the batch: as an exception it would arrive with the worker's whole traceback
                return Failure(int(index), str(error) or type(error).__name__)
            box = None if planned.boxes is None else planned.boxes[i]
            images[i] = prepare(pixels, side, box, planned.drawn, i, mean=self.mean, std=self.std).permute(1, 2, 0)
        return images, torch.from_numpy(np.asarray(self.targets[planned.indices]))
