"""The input pipeline that keeps the whole set decoded in memory, where each batch is the work of one operator.

On a GPU the pixels are copied to it when the loader is made; on the CPU they stay where they are mapped
(`engine.data.decoded`) or where the arrays are. Of a batch one row of numbers an image crosses to the GPU, and
`kernels.prepare_images` reads the pixels where they lie and writes what the model takes.

Every file has been read before the first batch, so that none goes bad later.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from engine.data.decoded import mebibytes, open_decoded
from engine.data.failure import Failure
from engine.data.loader import Batch, Loader, Planned
from engine.data.samples import Samples
from engine.errors import UserError
from kernels import pack_edits, prepare_images

SHARE = 0.75
"""Of the memory that is free, how much the images may take: the model needs the rest."""
AHEAD = 2
"""Batches that are prepared, or on a GPU planned, before they are asked for."""
_COPIED_AT_ONCE = 1 << 26


@dataclass(frozen=True, eq=False)
class Resident:
    """The images of ``samples`` on a device.

    ``pixels`` (bytes,) uint8, ``starts`` (n,) int64 and ``sizes`` (n, 2) int32 are those of `Decoded` as tensors,
    ``host_sizes`` the sizes in NumPy; ``taken`` is the memory in bytes that they were admitted with.
    """

    samples: Samples
    pixels: Tensor
    starts: Tensor
    sizes: Tensor
    host_sizes: np.ndarray
    failures: tuple[Failure, ...]
    taken: int


_in_use: WeakValueDictionary[tuple[int, torch.device], Resident] = WeakValueDictionary()
"""By the identity of the samples, which each holds on to."""


class ResidentLoader(Loader):
    """`Loader` of images that stay decoded in the memory of ``device``; loaders of the same samples share them.

    ``workers`` threads decode and check them when the loader is made. On the CPU, torch's own threads prepare the next
    batches while the model is at work.

    Raises:
        UserError: the images would take more than ``SHARE`` of the memory that is free; or see `open_decoded`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lose(self._images.failures)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="resident")
        self._begun: deque[Future[Any]] = deque()
        self._run = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._run += 1
        for abandoned in self._begun:
            abandoned.cancel()
        self._begun = deque()
        order = self.order(epoch)
        for batch in range(start, min(start + AHEAD, len(self))):
            self._begin(order, epoch, batch)
        return self._batches(order, epoch, start, self._run)

    def _batches(self, order: np.ndarray, epoch: int, start: int, run: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if run != self._run:
                raise RuntimeError("this epoch ended when another one was begun on the same loader")
            found = self._begun.popleft().result()
            if batch + AHEAD < len(self):
                self._begin(order, epoch, batch + AHEAD)
            if found is not None:
                # work on a GPU belongs on the stream of whoever asks
                yield self._prepare(found, self.img_size(epoch)) if self.device.type == "cuda" else found

    def _begin(self, order: np.ndarray, epoch: int, batch: int) -> None:
        self._begun.append(self._thread.submit(self._ahead, order, epoch, batch))

    def _ahead(self, order: np.ndarray, epoch: int, batch: int) -> list[Tensor] | Batch | None:
        planned = self.planned(order, epoch, batch)
        if len(planned.indices) == 0:
            return None
        numbers = self._numbers(planned)
        return numbers if self.device.type == "cuda" else self._prepare(numbers, planned.img_size)

    def _numbers(self, planned: Planned) -> list[Tensor]:
        """Indices (B,) int64, labels (B,) int64 and edits (B, 36) float32 of a batch, on the host."""
        n = len(planned.indices)
        boxes = planned.boxes
        if boxes is None:
            boxes = np.concatenate([np.zeros((n, 2), np.int32), self._images.host_sizes[planned.indices]], axis=1)
        drawn = {} if planned.drawn is None else vars(planned.drawn)
        # what is not drawn is neutral, so that these say nothing new
        changes = {name: value for name, value in drawn.items() if name not in ("boxes", "warped", "jittered")}
        labels = np.asarray(self.targets[planned.indices], dtype=np.int64)
        return [torch.from_numpy(planned.indices), torch.from_numpy(labels), pack_edits(n, boxes=boxes, **changes)]

    def _prepare(self, numbers: list[Tensor], img_size: int) -> Batch:
        if self.device.type == "cuda":
            numbers = _copy_at_once(numbers, self.device)
        index, labels, edits = numbers
        held = self._images
        images = prepare_images(
            held.pixels,
            held.starts,
            held.sizes,
            index,
            edits,
            img_size=img_size,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )
        return images, labels

    def _image_sizes(self) -> np.ndarray:
        return self._images.host_sizes

    @cached_property
    def _images(self) -> Resident:
        device = torch.empty(0, device=self.device).device  # with its number
        key = id(self.data), device
        found = _in_use.get(key)
        if found is None:
            found = _in_use[key] = _load(self.data, device, self.workers)
        return found


def _load(samples: Samples, device: torch.device, workers: int) -> Resident:
    taken = 0

    def admit(count: int, in_memory: bool) -> None:
        nonlocal taken
        taken = 0 if in_memory and device.type == "cpu" else count
        # what another loader has mapped counts as free
        mapped = sum(other.taken for other in _in_use.values()) if device.type == "cpu" else 0
        free = max(0, free_memory(device) - mapped)
        if taken > SHARE * free:
            raise UserError(
                f"--data-backend resident keeps all images in memory: these take {mebibytes(taken)}, and of the "
                f"{mebibytes(free)} that are free on {device} they may take {SHARE:.0%}; use --data-backend dali"
            )

    decoded = open_decoded(samples, workers=workers, admit=admit)
    with warnings.catch_warnings():  # torch warns that it could be written to, which nobody does
        warnings.simplefilter("ignore")
        pixels = torch.from_numpy(decoded.pixels)
    return Resident(
        samples,
        _moved(pixels, device),
        torch.from_numpy(decoded.starts).to(device),
        torch.from_numpy(decoded.sizes).to(device),
        decoded.sizes,
        decoded.failures,
        taken,
    )


def free_memory(device: torch.device) -> int:
    """Bytes; on the CPU with what the system would give up for it, such as cached files."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    return int(told[1]) * 1024 if told else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _moved(pixels: Tensor, device: torch.device) -> Tensor:
    """To a GPU through pinned memory, so that reading one part goes on while another crosses."""
    if device.type == "cpu":
        return pixels
    there = torch.empty(len(pixels), dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        ways = [
            (torch.empty(_COPIED_AT_ONCE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        ]
        for i, (source, target) in enumerate(
            zip(pixels.split(_COPIED_AT_ONCE), there.split(_COPIED_AT_ONCE), strict=True)
        ):
            pinned, is_free = ways[i % 2]
            is_free.synchronize()
            target.copy_(pinned[: len(source)].copy_(source), non_blocking=True)
            is_free.record()
        torch.cuda.synchronize()
    return there


def _copy_at_once(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same on a GPU by one copy that nobody waits for."""
    bytes_of = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    there = torch.cat(bytes_of).pin_memory().to(device, non_blocking=True).split([len(part) for part in bytes_of])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(there, tensors, strict=True)]
