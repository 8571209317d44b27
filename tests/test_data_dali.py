"""The loader: pixels against Pillow and torchvision, layout, coverage, and epochs that begin anywhere."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from engine.data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, DaliLoader, Samples, WeightedSampler
from engine.data.decode import decode_image
from engine.data.sizes import image_sizes
from engine.data.transforms import centre_boxes
from engine.errors import UserError
from tests.data_helpers import CPU, make_loader, make_samples, picture, save

SIZES = ((64, 64), (37, 53), (200, 131), (8, 8), (150, 17), (1, 5))


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    """26 pictures in three classes, 14, 9 and 3."""
    return make_samples(tmp_path_factory.mktemp("dali"), (14, 9, 3))


def training_loader(samples, **options):
    sampler = WeightedSampler(samples.labels, 3, sampling="inverse", seed=5)
    return make_loader(samples, **({"training": True, "sampler": sampler, "augmentation": Augmentation()} | options))


def torchvision_eval(file: str, size: int) -> torch.Tensor:
    transform = v2.Compose(
        [
            v2.Resize((size, size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    with Image.open(file) as image:
        return transform(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_evaluation_pixels_equal_pillow_and_torchvision(tmp_path, size, extension, dtype):
    """Tolerance in 8-bit levels: 1 at most and 0.4 on average, from Pillow's rounding to 8 bits after each direction
    of the resize (two uniform errors: 1 and 1/3), and float16's own. Where a picture is reduced, its outermost pixels
    may differ by 15: Pillow cuts the filter off at the edge, DALI repeats the edge pixel.
    """
    files = [save(tmp_path / f"{h}x{w}.{extension}", picture(h, w, seed=h)) for h, w in SIZES]
    samples = Samples(tuple(files), np.arange(len(files)) % 2, ("a", "b"))
    loader = make_loader(samples, batch_size=8, img_size=size, dtype=dtype, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images, _ = next(loader.epoch(0))
    assert images.dtype == dtype
    slack = 0.06 if dtype == torch.float16 else 0.01
    for image, file, shape in zip(images, files, SIZES, strict=True):
        expected = torchvision_eval(file, size)
        difference = (image.float() - expected).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
        inner = difference[:, 1:-1, 1:-1] if max(shape) > size else difference
        assert inner.max() <= 1 + slack, file
        assert inner.mean() <= 0.4, file
        assert difference.max() <= 15, file
        if shape == (size, size):
            assert difference.max() <= slack, file


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / "x.jpg", picture(32, 32), quality=95, exif=exif)
    loader = make_loader(Samples((file,), np.zeros(1, dtype=np.int64), ("a", "b")), img_size=32)
    with Image.open(file) as image:
        expected = v2.functional.pil_to_tensor(ImageOps.exif_transpose(image)) / 255
    torch.testing.assert_close(next(loader.epoch(0))[0][0], expected, atol=1e-6, rtol=0)


def test_a_part_that_is_decoded_alone_equals_that_part_of_the_whole(tmp_path):
    """To the last bit, whatever the chroma and the order of the file, and however it lies."""
    kinds = {f"subsampled {i}": {"subsampling": i} for i in range(3)} | {"progressive": {"progressive": True}}
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        kinds[f"lying {orientation}"] = {"exif": exif}
    files = [save(tmp_path / f"{name}.jpg", picture(57, 41, seed=1), **options) for name, options in kinds.items()]
    files.append(save(tmp_path / "x.png", picture(57, 41)))
    samples = Samples(tuple(files), np.arange(len(files)) % 2, ("a", "b"))
    images, _ = next(make_loader(samples, batch_size=len(files), img_size=20, crop_pct=0.5).epoch(0))
    sizes = image_sizes(samples, workers=1)
    assert {tuple(size) for size in sizes.tolist()} == {(57, 41), (41, 57)}
    for image, file, (top, left, h, w) in zip(images, files, centre_boxes(sizes, 0.5).tolist(), strict=True):
        part = decode_image(file)[top : top + h, left : left + w]
        np.testing.assert_array_equal((image.permute(1, 2, 0) * 255).round().numpy(), part, err_msg=file)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_are_channels_last_and_need_no_copy(samples, training, dtype):
    make = training_loader if training else make_loader
    images, labels = next(make(samples, dtype=dtype).epoch(0))
    assert images.shape == (4, 3, 16, 16)
    assert images.stride() == (3 * 16 * 16, 1, 3 * 16, 3)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == dtype
    assert (labels.shape, labels.dtype) == ((4,), torch.int64)
    assert images.device == labels.device == CPU


def test_evaluation_gives_every_image_once_in_order(samples):
    loader = make_loader(samples, batch_size=4)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert [len(labels) for _, labels in batches] == [4] * 6 + [2]
        assert len(batches) == len(loader) == 7
        assert torch.cat([labels for _, labels in batches]).tolist() == samples.labels.tolist()
        for i, image in enumerate(torch.cat([images for images, _ in batches])):
            alone = next(make_loader(samples.subset([i])).epoch(0))[0][0]
            assert torch.equal(image, alone)
        assert loader.data is samples


def test_training_drops_the_partial_batch_unless_it_is_the_only_one(samples):
    loader = training_loader(samples)
    assert [len(labels) for _, labels in loader.epoch(0)] == [4] * 6
    assert len(loader) == 6
    alone = training_loader(samples, batch_size=64)
    assert [len(labels) for _, labels in alone.epoch(0)] == [26]
    assert len(alone) == 1


def test_training_follows_the_sampler(samples):
    loader = training_loader(samples, augmentation=None)
    order = loader.sampler.draw(3)[:24]
    labels = torch.cat([labels for _, labels in loader.epoch(3)])
    assert labels.tolist() == samples.labels[order].tolist()
    images = torch.cat([images for images, _ in loader.epoch(3)])
    plain = torch.cat([images for images, _ in make_loader(samples).epoch(0)])
    assert torch.equal(images, plain[order])


def test_training_without_a_sampler_takes_every_image_once(samples):
    loader = make_loader(samples, training=True, batch_size=26, sampler=None, seed=1)
    first, second = (next(loader.epoch(epoch))[1] for epoch in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == samples.labels.tolist()
    assert first.tolist() != second.tolist()


def equal(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_an_epoch_is_the_same_whenever_and_wherever_it_is_run(samples):
    loader = training_loader(samples, seed=7)
    whole = list(loader.epoch(3))
    list(loader.epoch(4))
    assert equal(list(loader.epoch(3)), whole)
    assert equal(list(training_loader(samples, seed=7, workers=1).epoch(3)), whole)
    assert not equal(list(loader.epoch(2)), whole)
    assert not equal(list(training_loader(samples, seed=8).epoch(3)), whole)


@pytest.mark.parametrize("start", [1, 4, 5, 6])
def test_an_epoch_begun_in_the_middle_gives_the_rest_bit_for_bit(samples, start):
    whole = list(training_loader(samples, seed=7).epoch(3))
    assert equal(list(training_loader(samples, seed=7).epoch(3, start=start)), whole[start:])


def test_an_abandoned_epoch_leaves_nothing_behind(samples):
    loader = training_loader(samples, seed=7)
    whole = list(loader.epoch(3))
    for taken in range(7):
        batches = loader.epoch(1)
        for _ in range(taken):
            next(batches)
        assert equal(list(loader.epoch(3)), whole)


def test_one_pipeline_serves_every_epoch(samples, monkeypatch):
    loader, built, build = training_loader(samples), [], DaliLoader._build
    monkeypatch.setattr(DaliLoader, "_build", lambda loader, size: built.append(size) or build(loader, size))
    for taken in (6, 0, 2, 6):
        assert len(list(itertools.islice(loader.epoch(taken), taken))) == taken
    assert built == [16]


def test_an_ended_epoch_says_so_and_does_not_mix_batches(samples):
    loader = training_loader(samples)
    old = loader.epoch(0)
    next(old)
    new = loader.epoch(1)
    next(new)
    with pytest.raises(RuntimeError, match="another one was begun"):
        next(old)
    assert len(list(new)) == 5


def test_a_batch_stays_valid_for_as_long_as_it_is_held(samples):
    loader = training_loader(samples)
    held, copies = [], []
    for epoch in range(3):
        for images, labels in loader.epoch(epoch):
            held.append((images, labels))
            copies.append((images.clone(), labels.clone()))
    del loader
    assert equal(held, copies)
    assert len({images.data_ptr() for images, _ in held}) == len(held)


def test_missing_dali_is_said_with_the_way_out(samples, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        make_loader(samples)


def test_impossible_arguments_are_refused(samples):
    with pytest.raises(ValueError, match="dtype"):
        make_loader(samples, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="batch_size 0"):
        make_loader(samples, batch_size=0)
    with pytest.raises(ValueError, match=r"hw_decoder_load 1\.5"):
        make_loader(samples, hw_decoder_load=1.5)
    with pytest.raises(ValueError, match="no image"):
        make_loader(samples.subset([]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [True, False])
def test_the_gpu_sees_what_the_cpu_sees(tmp_path, training):
    """Within 2 levels of 255 and 0.2 on average: JPEG decoders differ in their last bit."""
    files = [save(tmp_path / f"{i}.{e}", picture(90, 70, seed=i), quality=95) for i in range(8) for e in ("png", "jpg")]
    samples = Samples(tuple(files), np.arange(16) % 3, ("a", "b", "c"))
    make = training_loader if training else make_loader
    for (x, y), (u, v) in zip(
        make(samples, img_size=64).epoch(1),
        make(samples, img_size=64, device=torch.device("cuda")).epoch(1),
        strict=True,
    ):
        assert u.is_cuda
        assert v.is_cuda
        assert u.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, v.cpu())
        difference = (x - u.cpu()).abs() * 255
        assert difference.max() < 2
        assert difference.mean() < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_are_ready_on_the_current_stream_and_stay_valid(samples):
    expected = [(images.sum().item(), labels) for images, labels in make_loader(samples).epoch(0)]
    loader = make_loader(samples, device=torch.device("cuda"))
    with torch.cuda.stream(torch.cuda.Stream()):
        sums, held = [], []
        for images, labels in loader.epoch(0):
            torch.cuda._sleep(10_000_000)  # the stream runs behind while DALI goes on
            sums.append(images.sum())
            held.append(labels)
        torch.cuda.current_stream().synchronize()
    for (total, labels), actual, kept in zip(expected, sums, held, strict=True):
        assert actual.item() == pytest.approx(total, rel=1e-3)
        assert torch.equal(kept.cpu(), labels)
