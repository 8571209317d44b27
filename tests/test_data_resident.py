"""The resident pipeline: the reference's pixels, epochs begun anywhere, and the memory it asks for."""

from __future__ import annotations

import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import evaluate, train
from engine.cli import run
from engine.data import Augmentation, Loader, ResidentLoader, Samples, WeightedSampler, resident
from engine.data.augment import PROBABILITIES
from engine.data.decode import decode_image
from engine.data.torchvision_steps import prepare
from engine.errors import UserError
from tests.data_helpers import make_folder, make_loader, picture, save

EVERYTHING = Augmentation(**dict.fromkeys(PROBABILITIES, 0.5), crop_scale=(0.3, 1.0), auto_augment="trivial")
SIZES = ((40, 30), (16, 16), (9, 50), (25, 25))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    """14 pictures in three classes, of four sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [save(folder / f"{i:02d}.png", picture(*SIZES[i % 4], seed=i)) for i in range(14)]
    return Samples(tuple(files), np.repeat([0, 1, 2], (8, 4, 2)), ("a", "b", "c"))


def loader_of(samples: Samples, **options) -> Loader:
    return make_loader(samples, pipeline=ResidentLoader, **options)


def training_loader(samples: Samples, **options) -> Loader:
    sampler = WeightedSampler(samples.labels, 3, sampling="inverse", seed=5)
    defaults = {"training": True, "sampler": sampler, "augmentation": EVERYTHING, "seed": 5}
    return loader_of(samples, **(defaults | options))


def expected(loader: Loader, epoch: int, batch: int) -> torch.Tensor:
    """The batch by torchvision's functions."""
    planned = loader.planned(loader.order(epoch), epoch, batch)
    images = []
    for i, index in enumerate(planned.indices):
        image = torch.from_numpy(decode_image(loader.data.files[index]).copy()).permute(2, 0, 1)
        box = None if planned.boxes is None else planned.boxes[i]
        images.append(prepare(image, planned.img_size, box, planned.drawn, i, mean=loader.mean, std=loader.std))
    return torch.stack(images)


@pytest.mark.parametrize("crops", (True, False))
def test_training_gives_what_torchvision_makes_of_the_drawn_images(samples, crops):
    augmentation = EVERYTHING if crops else Augmentation(**dict.fromkeys(PROBABILITIES, 0.5))
    loader = training_loader(samples, augmentation=augmentation, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    for batch, (images, labels) in enumerate(loader.epoch(2)):
        assert labels.tolist() == samples.labels[loader.order(2)[batch * 4 :][:4]].tolist()
        torch.testing.assert_close(images, expected(loader, 2, batch), atol=1e-3, rtol=0)
    assert batch == len(loader) - 1 == 2


@pytest.mark.parametrize("crop_pct", (None, 0.8))
def test_evaluation_gives_every_image_once_in_order(samples, crop_pct):
    loader = loader_of(samples, crop_pct=crop_pct)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == samples.labels.tolist()
    for batch, (images, _) in enumerate(batches):
        torch.testing.assert_close(images, expected(loader, 0, batch), atol=1e-3, rtol=0)


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_an_epoch_can_be_begun_at_any_batch_bit_for_bit(samples):
    whole = list(training_loader(samples).epoch(3))
    held = [(images.clone(), labels.clone()) for images, labels in whole]
    loader = training_loader(samples, workers=1)
    for start in (2, 0, 1, 3):
        next(loader.epoch(1))  # and abandoned
        assert equal(list(loader.epoch(3, start)), whole[start:])
    assert not equal(list(loader.epoch(2)), whole)
    assert equal(whole, held)  # nothing was written into what is held


def test_an_ended_epoch_says_so(samples):
    loader = training_loader(samples)
    old = loader.epoch(0)
    next(old)
    new = loader.epoch(1)
    with pytest.raises(RuntimeError, match="another one was begun"):
        next(old)
    assert len(list(new)) == 3


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_batches_are_channels_last_in_the_dtype_asked_for(samples, dtype):
    images, labels = next(training_loader(samples, dtype=dtype).epoch(0))
    assert (images.dtype, images.shape) == (dtype, (4, 3, 16, 16))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.dtype, labels.shape) == (torch.int64, (4,))


def test_what_goes_wrong_on_the_thread_is_raised_where_the_batch_is_asked_for(samples, monkeypatch):
    loader = training_loader(samples)
    monkeypatch.setattr(loader, "planned", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.epoch(0))


# Memory


def files_of(folder: Path) -> Samples:
    """2 images of 4 x 5 pixels: 120 bytes."""
    files = [save(folder / f"{i}.png", picture(4, 5, seed=i)) for i in range(2)]
    return Samples(tuple(files), np.arange(2), ("a", "b"))


def test_images_that_do_not_fit_are_refused_with_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 159)  # of which 119 may be taken
    monkeypatch.setattr("engine.data.decoded.decode_image", lambda file: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"0\.0 MiB, .* 0\.0 MiB .* on cpu .* 75%; use --data-backend dali") as raised:
        loader_of(files_of(tmp_path))
    assert "\n" not in str(raised.value)


def test_images_that_just_fit_are_taken_and_count_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 160)
    monkeypatch.setattr(resident, "_in_use", weakref.WeakValueDictionary())
    first = loader_of(files_of(tmp_path / "a"))
    with pytest.raises(UserError, match="--data-backend dali"):
        loader_of(files_of(tmp_path / "b"))
    del first
    loader_of(files_of(tmp_path / "b"))


@pytest.mark.filterwarnings("error:.*not writable")
def test_arrays_in_memory_take_no_more(monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 0)
    pixels = np.stack([picture(16, 16, seed=i) for i in range(3)])
    pixels.flags.writeable = False
    samples = Samples(("x", "y", "z"), np.arange(3), ("a", "b", "c"), pixels=pixels)
    images, _ = next(loader_of(samples).epoch(0))
    torch.testing.assert_close(images.permute(0, 2, 3, 1) * 255, torch.from_numpy(pixels).float(), atol=1e-3, rtol=0)
    grey = Samples(
        samples.files, samples.labels, samples.class_names, pixels=np.broadcast_to(pixels[..., :1], pixels.shape)
    )
    with pytest.raises(UserError, match="--data-backend dali"):  # for three channels of it
        loader_of(grey)


def test_loaders_of_the_same_images_share_them_and_the_last_lets_go(samples):
    own = samples.subset(range(14))
    training, scoring = training_loader(own), loader_of(own)
    assert training._images is scoring._images
    assert loader_of(samples)._images is not scoring._images
    list(scoring.epoch(0))
    held = weakref.ref(scoring._images)
    del training, scoring  # and nothing has to be collected first
    for _ in range(200):
        if held() is None:
            break
        time.sleep(0.01)  # its thread may still be at the end of its last batch
    assert held() is None


def test_free_memory_is_a_part_of_what_the_machine_has():
    free = resident.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50


# The whole way


def test_a_run_on_resident_images_is_scored_alike_by_another_pipeline(tmp_path, capsys):
    folder = make_folder(tmp_path / "data", {"a": 12, "b": 9})
    output = str(tmp_path / "run")
    argv = ["--data-dir", str(folder), "--data-backend", "resident", "--model", "seresnet18", "--img-size", "32"]
    argv += ["-b", "8", "--epochs", "1", "--warmup-epochs", "0", "--output", output]
    assert run(train.main, argv) == 0
    assert run(evaluate.main, [output, "--data-backend", "dali"]) == 0
    _, trained, scored = capsys.readouterr().out.split("validation images, weights of epoch 0:")
    assert trained.startswith(scored.rstrip())


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("copied_at_once", (1000, 1 << 26))
def test_the_gpu_sees_what_the_cpu_sees_and_nobody_waits_for_it(samples, monkeypatch, copied_at_once):
    monkeypatch.setattr(resident, "_COPIED_AT_ONCE", copied_at_once)
    on_gpu = training_loader(samples, device=torch.device("cuda"))
    list(on_gpu.epoch(0))  # which compiles
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            for images, labels in on_gpu.epoch(1):
                torch.cuda._sleep(10_000_000)  # the stream runs behind while the host goes on
                found.append((images, labels))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for (x, y), (u, v) in zip(training_loader(samples).epoch(1), found, strict=True):
        assert u.is_cuda
        assert u.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, v.cpu())
        torch.testing.assert_close(x, u.cpu(), atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_arrays_are_copied_to_the_gpu():
    pixels = np.stack([picture(16, 16, seed=i) for i in range(3)])
    samples = Samples(("x", "y", "z"), np.arange(3), ("a", "b", "c"), pixels=pixels)
    images, _ = next(loader_of(samples, device=torch.device("cuda")).epoch(0))
    shown = images.permute(0, 2, 3, 1).cpu() * 255
    torch.testing.assert_close(shown, torch.from_numpy(pixels).float(), atol=1e-3, rtol=0)
