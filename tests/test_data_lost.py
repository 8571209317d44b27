"""A file that goes bad while a loader runs: named, left out, and the epoch goes on from the same batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data import Augmentation, DaliLoader, ResidentLoader, Samples, TorchvisionLoader, WeightedSampler
from engine.errors import UserError
from tests.data_helpers import make_loader, make_samples, save_picture

PIPELINES = pytest.mark.parametrize("pipeline", (DaliLoader, ResidentLoader, TorchvisionLoader))
BAD = 6  # of class 0


@pytest.fixture
def samples(tmp_path):
    return make_samples(tmp_path, (9, 4, 3))


def loader_of(pipeline, samples, **options):
    sampler = WeightedSampler(samples.labels, 3, sampling="none", seed=5)
    defaults = {"training": True, "sampler": sampler, "augmentation": Augmentation(), "max_bad_fraction": 0.2}
    return make_loader(samples, pipeline=pipeline, **(defaults | options))


def spoil(file: str) -> None:
    Path(file).write_bytes(b"no image")


@PIPELINES
@pytest.mark.parametrize("suffix", (".png", ".tif"))  # decoded by DALI, and for it
def test_another_image_of_its_class_takes_its_place(pipeline, suffix, tmp_path, capsys):
    samples = make_samples(tmp_path, (9, 4, 3))
    if suffix != ".png":
        files = tuple(save_picture(Path(file).with_suffix(suffix), seed=i) for i, file in enumerate(samples.files))
        samples = type(samples)(files, samples.labels, samples.class_names)
    whole = list(loader_of(pipeline, samples).epoch(1))
    order = loader_of(pipeline, samples).order(1)
    at = int(np.flatnonzero(order == BAD)[0])
    spoil(samples.files[BAD])
    loader = loader_of(pipeline, samples)
    for epoch in (1, 1):  # and it stays out
        batches = list(loader.epoch(epoch))
        assert len(batches) == len(whole)
        for k, ((images, labels), (expected, expected_labels)) in enumerate(zip(batches, whole, strict=True)):
            assert torch.equal(labels, expected_labels)
            same = (images == expected).flatten(1).all(1)
            assert [i for i in range(4) if not same[i]] == ([at % 4] if at // 4 == k else [])
        replaced = batches[at // 4][0][at % 4]
    assert replaced.isfinite().all()
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1
    assert f"left out from now on: {samples.files[BAD]}: " in told[0]


@pytest.mark.parametrize("pipeline", (DaliLoader, TorchvisionLoader))  # which read while they run
def test_an_image_drawn_twice_in_a_batch_is_lost_once(pipeline, tmp_path, capsys):
    samples = make_samples(tmp_path, (9, 4, 3))
    files = tuple(save_picture(Path(file).with_suffix(".tif"), seed=i) for i, file in enumerate(samples.files))
    samples = Samples(files, samples.labels, samples.class_names)
    sampler = WeightedSampler(samples.labels, 3, sampling="none", seed=5, replacement=True)
    loader = loader_of(pipeline, samples, sampler=sampler)
    order, twice = loader.order(7).reshape(4, 4), 13
    assert [(batch == twice).sum() for batch in order] == [0, 2, 0, 0]
    next(loader.epoch(0))
    spoil(files[twice])
    batches = list(loader.epoch(7))
    assert [labels.tolist() for _, labels in batches] == samples.labels[order].tolist()
    assert list(loader.reasons_lost) == [twice]
    assert capsys.readouterr().err.count("left out from now on: ") == 1


@PIPELINES
def test_evaluation_gives_all_the_others_once(pipeline, samples):
    for i in (5, 12, 13, 14, 15):  # one of a batch, and a whole batch
        spoil(samples.files[i])
    loader = make_loader(samples, pipeline=pipeline, max_bad_fraction=0.5)
    expected = np.delete(samples.labels, [5, 12, 13, 14, 15]).tolist()
    for epoch in range(2):
        assert torch.cat([labels for _, labels in loader.epoch(epoch)]).tolist() == expected


@PIPELINES
def test_more_than_the_fraction_ends_the_run_in_one_line(pipeline, samples):
    spoil(samples.files[BAD])
    with pytest.raises(UserError, match=f"cannot decode {samples.files[BAD]} .*--max-bad-fraction") as raised:
        list(loader_of(pipeline, samples, max_bad_fraction=0.01).epoch(0))
    assert "\n" not in str(raised.value)


@PIPELINES
def test_the_last_image_of_a_class_is_not_done_without(pipeline, samples):
    for i in (13, 14, 15):
        spoil(samples.files[i])
    with pytest.raises(UserError, match="the last image of class '2', replace it"):
        list(loader_of(pipeline, samples, max_bad_fraction=1.0).epoch(0))
