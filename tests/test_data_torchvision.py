"""The torchvision pipeline: begun anywhere it gives the same batches, names files in errors, keeps the contract."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.data import Augmentation, TorchvisionLoader, WeightedSampler
from engine.errors import UserError
from tests.data_helpers import make_loader, make_samples


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
