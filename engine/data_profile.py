"""What the input pipeline of a training run delivers, without a model: as a whole, and its parts by themselves.

In a pipeline the parts work at the same time, so that their times do not add up to its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from engine.build import make_augmentation, make_sampler, make_train_loader
from engine.config import Config
from engine.data import Augmentation, Loader, Samples
from engine.data.decode import BadImage, decode_image
from engine.device import Precision
from engine.model_profile import Quantiles

_WARM_UP_BATCHES, _FEWEST_BATCHES = 8, 5

Batches = Generator[int, None, None]
"""The number of images of each."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the pipeline by itself, or all of it.

    Attributes:
        name: what it does.
        images_per_second: over all of the time that was measured.
        batch: milliseconds from one batch to the next.
        cores: CPU time of this process and its workers over time passed; None where the system does not say.
    """

    name: str
    images_per_second: float
    batch: Quantiles
    cores: float | None


def profile_parts(
    config: Config, samples: Samples, device: torch.device, precision: Precision, *, seconds: float
) -> Iterator[Stage]:
    """What every backend has to do, each part for about ``seconds`` after a warm-up.

    Reading comes from the system's cache where that holds the files.
    """
    loader = _loader(config, samples, device, precision, make_augmentation(config))
    yield _measure("draws, in Python", _planned(loader), seconds)
    if samples.pixels is None:
        with ThreadPoolExecutor(config.workers) as pool:
            yield _measure("reading", _of_files(loader, pool, _read), seconds)
            yield _measure("reading and decoding, by Pillow", _of_files(loader, pool, _decode), seconds)


def profile_pipeline(
    config: Config, samples: Samples, device: torch.device, precision: Precision, *, seconds: float
) -> tuple[Stage, Stage]:
    """The pipeline of ``config.data_backend`` without augmentation and with it, each for about ``seconds``."""
    name = config.data_backend
    plain, whole = (
        _measure(title, _delivered(_loader(config, samples, device, precision, augmentation)), seconds)
        for title, augmentation in ((f"{name}, without augmentation", None), (name, make_augmentation(config)))
    )
    return plain, whole


def _loader(
    config: Config, samples: Samples, device: torch.device, precision: Precision, augmentation: Augmentation | None
) -> Loader:
    sampler = make_sampler(samples, config)
    return make_train_loader(samples, config, device, precision, sampler=sampler, augmentation=augmentation)


def _measure(name: str, batches: Batches, seconds: float) -> Stage:
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    images = 0
    milliseconds: list[float] = []
    cpu = _CpuTime()
    began = before = time.perf_counter()
    while len(milliseconds) < _FEWEST_BATCHES or before - began < seconds:
        images += next(batches)
        now = time.perf_counter()
        milliseconds.append(1000 * (now - before))
        before = now
    passed, used = before - began, cpu.used()
    batches.close()  # and with it the loader and its workers
    return Stage(name, images / passed, Quantiles.of(milliseconds), None if used is None else used / passed)


def _planned(loader: Loader) -> Batches:
    for epoch in count():
        order = loader.order(epoch)
        for batch in range(len(loader)):
            yield len(loader.planned(order, epoch, batch).indices)


def _of_files(loader: Loader, pool: ThreadPoolExecutor, work: Callable[[str], None]) -> Batches:
    """``work`` done on the files of every batch."""
    for epoch in count():
        order = loader.order(epoch)
        for batch in range(len(loader)):
            files = [loader.data.files[i] for i in loader.indices(order, batch)]
            yield len(list(pool.map(work, files)))


def _delivered(loader: Loader) -> Batches:
    on_gpu = loader.device.type == "cuda"
    for epoch in count():
        for images, _labels in loader.epoch(epoch):
            if on_gpu:
                torch.cuda.current_stream(loader.device).synchronize()
            yield len(images)


def _read(file: str) -> None:
    Path(file).read_bytes()


def _decode(file: str) -> None:
    with contextlib.suppress(BadImage):  # the pipeline names it and leaves it out
        decode_image(file)


class _CpuTime:
    """Of this process and the processes that it has started, from now on, in seconds."""

    def __init__(self) -> None:
        self._own = time.process_time()
        self._workers = _worker_seconds()

    def used(self) -> float | None:
        workers = _worker_seconds()
        if workers is None or self._workers is None:
            return None
        return time.process_time() - self._own + workers - self._workers


def _worker_seconds() -> float | None:
    workers = multiprocessing.active_children()
    try:
        return sum(_cpu_ticks(worker.pid) for worker in workers) / os.sysconf("SC_CLK_TCK") if workers else 0.0
    except (OSError, AttributeError, ValueError):  # no /proc
        return None


def _cpu_ticks(pid: int | None) -> int:
    # the name, in parentheses, may hold anything
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
