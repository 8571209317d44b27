"""The torchvision pipeline: begun anywhere it gives the same batches, names files in errors, keeps the contract."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from engine.cli import run
from engine.data import Augmentation, ResidentLoader, Samples, TorchvisionLoader, WeightedSampler
from engine.data.torchvision_loader import _processes
from engine.errors import UserError
from tests.data_helpers import make_loader, make_samples, picture


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return make_samples(tmp_path_factory.mktemp("pictures"), (9, 4, 2))


def training_loader(samples, **options):
    sampler = WeightedSampler(samples.labels, 3, sampling="inverse", seed=5)
    augmentation = Augmentation(crop_scale=(0.3, 1.0), blur=0.3, erasing=0.3)
    defaults = {"training": True, "sampler": sampler, "augmentation": augmentation, "seed": 5}
    return make_loader(samples, pipeline=TorchvisionLoader, **(defaults | options))


def test_an_epoch_can_be_begun_at_any_batch(samples):
    whole = list(training_loader(samples).epoch(3))
    loader = training_loader(samples, workers=1)
    next(loader.epoch(0))  # and abandoned
    for start in (2, 0, 1):
        rest = list(loader.epoch(3, start))
        assert len(rest) == len(whole) - start
        for (images, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_batches_are_channels_last_in_the_dtype_asked_for(samples):
    for dtype in (torch.float32, torch.float16):
        images, labels = next(training_loader(samples, dtype=dtype).epoch(0))
        assert images.dtype == dtype
        assert images.shape == (4, 3, 16, 16)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_evaluation_gives_every_image_once_in_order(samples):
    loader = make_loader(samples, pipeline=TorchvisionLoader)
    labels = torch.cat([labels for _, labels in loader.epoch(0)])
    assert labels.tolist() == samples.labels.tolist()
    assert len(loader) == 4


def test_beginning_an_epoch_ends_the_one_before(samples):
    loader = training_loader(samples)
    old = loader.epoch(0)
    next(old)
    next(loader.epoch(1))
    with pytest.raises(RuntimeError, match="this epoch ended"):
        next(old)


def test_a_crop_of_a_file_that_is_no_image_is_refused_by_its_name(tmp_path):
    samples = make_samples(tmp_path, (3, 3))
    Path(samples.files[4]).write_bytes(b"no image")
    with pytest.raises(UserError, match=samples.files[4]):
        training_loader(samples, sampler=None)


def test_workers_do_not_run_the_script_that_started_them(samples, tmp_path, monkeypatch):
    """It need not be guarded by ``__name__``, as in a notebook's cell it is not."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('run in a worker')")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert len(list(make_loader(samples, pipeline=TorchvisionLoader, workers=1).epoch(0))) == 4
    assert sys.modules["__main__"] is main


def processes_of(loader: TorchvisionLoader) -> list[int]:
    return [worker.pid for worker in loader._loader._iterator._workers]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_worker_outlives_an_error(tmp_path):
    samples = make_samples(tmp_path, (9, 4, 2))
    Path(samples.files[3]).write_bytes(b"no image")
    workers: list[int] = []

    def command(argv):
        loader = make_loader(samples, pipeline=TorchvisionLoader)
        batches = loader.epoch(0)
        workers.extend(processes_of(loader))
        list(batches)

    assert run(command) == 2
    assert len(workers) == 2
    assert not any(map(is_running, workers))


def wait_in_an_epoch(samples: Samples, alive: Connection) -> None:
    loader = training_loader(samples)
    loader._loader.dataset.alive = alive  # so that each worker holds it too
    batches = loader.epoch(0)
    next(batches)
    alive.send(processes_of(loader))
    time.sleep(600)


def test_no_worker_outlives_a_killed_run(samples):
    """A pipe says when it has no writer any more: when both the process and its workers are gone."""
    context = _processes()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=wait_in_an_epoch, args=(samples, writer))
    process.start()
    writer.close()
    workers = reader.recv()
    process.kill()
    process.join()
    assert len(workers) == 2
    if not reader.poll(60):
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        pytest.fail("they wait for work that nobody sends")
    with pytest.raises(EOFError):
        reader.recv()


@pytest.mark.parametrize("grey", (False, True))
def test_workers_share_the_pixels_of_arrays(samples, grey):
    pixels = np.stack([picture(9, 7, seed=i) for i in range(15)])
    pixels = np.broadcast_to(pixels[..., :1], pixels.shape) if grey else pixels
    arrays = Samples(samples.files, samples.labels, samples.class_names, pixels=pixels)
    loader = make_loader(arrays, pipeline=TorchvisionLoader, workers=1)
    reference = make_loader(arrays, pipeline=ResidentLoader)
    for (images, _), (expected, _) in zip(loader.epoch(0), reference.epoch(0), strict=True):
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    shared = loader._loader.dataset.pixels
    assert len(shared._memory) == 15 * 9 * 7 * (1 if grey else 3)
    shared._stored()[:] = 255  # of which the worker has no copy
    images, _ = next(loader.epoch(1))
    assert images.min() == 1
