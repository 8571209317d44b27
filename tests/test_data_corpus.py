"""Odd files are read to the same pixels by the reference decoder and the loader; bad ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import train
from engine.cli import run
from engine.data import DATA_BACKENDS, Augmentation, DaliLoader, ResidentLoader, Samples, check_images
from engine.data import make_loader as loader_by_name
from engine.data.decode import BadImage, dali_decodes, decode_image, read_header
from engine.data.sizes import image_sizes
from engine.errors import UserError
from tests.data_helpers import make_loader, picture, save
from tests.image_corpus import ORIENTED, RGB, WIDTH, Bad, Good, make_bad, make_good

LEVELS_BETWEEN_JPEG_DECODERS = 2

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")  # Pillow's, of a file made so


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> list[Good]:
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> list[Bad]:
    return make_bad(tmp_path_factory.mktemp("bad"))


def samples_of(paths: list[str]) -> Samples:
    return Samples(tuple(paths), np.arange(len(paths)) % 2, ("a", "b"))


def as_pixels(images: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) levels from 0 to 255, from what ``make_loader`` gives."""
    return (images.permute(0, 2, 3, 1) * 255).numpy()


def test_the_corpus_is_large(good, bad):
    assert len(good) >= 80
    assert len(bad) >= 40


def test_the_reference_decoder_gives_the_pixels_that_were_put_in(good):
    wrong = []
    for file in good:
        pixels = decode_image(file.path)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (WIDTH, WIDTH, 3)), file.path
        if file.pixels is not None and not np.array_equal(pixels, file.pixels):
            wrong.append(file.path)
    assert wrong == []


def test_the_reference_decoder_turns_lossy_files_as_their_exif_says(good):
    for value, turn in ORIENTED.items():
        path = next(file.path for file in good if file.path.endswith(f"turned_{value}.jpg"))
        assert np.abs(decode_image(path).astype(int) - turn(RGB)).mean() < 12  # and over 60 where it is turned wrongly


def test_sizes_are_those_of_the_decoded_images(good, tmp_path):
    wide = [save(tmp_path / "x.png", picture(9, 14)), save(tmp_path / "y.webp", picture(9, 14))]
    for value in ORIENTED:
        exif = Image.Exif()
        exif[0x0112] = value
        wide += [save(tmp_path / f"{value}.{end}", picture(9, 14), exif=exif) for end in ("jpg", "png", "tif", "webp")]
    paths = [*wide, *(file.path for file in good)]
    expected = [decode_image(path).shape[:2] for path in paths]
    assert [tuple(size) for size in image_sizes(samples_of(paths), workers=1).tolist()] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("pipeline", (DaliLoader, ResidentLoader))
def test_the_loader_gives_the_reference_pixels_of_every_kind(good, pipeline):
    both_ways = {dali_decodes(read_header(file.path)) for file in good}
    assert both_ways == {True, False}
    samples = samples_of([file.path for file in good])
    loader = make_loader(samples, pipeline=pipeline, batch_size=16, img_size=WIDTH)
    images = np.concatenate([as_pixels(images) for images, _ in loader.epoch(0)])
    wrong = {}
    for file, image in zip(good, images, strict=True):
        exact = file.pixels is not None or pipeline is ResidentLoader
        allowed = 0.01 if exact else LEVELS_BETWEEN_JPEG_DECODERS
        difference = np.abs(image - decode_image(file.path)).max()
        if difference > allowed:
            wrong[file.path] = difference
    assert wrong == {}


def test_a_mixed_epoch_is_the_same_wherever_it_is_begun(good):
    samples = samples_of([file.path for file in good])

    def make(workers: int):
        return make_loader(
            samples, training=True, augmentation=Augmentation(), seed=3, batch_size=16, img_size=24, workers=workers
        )

    whole = list(make(2).epoch(1))
    loader = make(1)
    for start in (0, 3, 4):
        rest = list(loader.epoch(1, start=start))
        assert len(rest) == len(whole) - start
        for (images, labels), (others, other_labels) in zip(whole[start:], rest, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)


def test_the_check_passes_every_odd_file_and_names_every_bad_one(good, bad):
    found = check_images(samples_of([file.path for file in [*good, *bad]]), workers=2)
    assert [file.path for file in found] == [file.path for file in bad]
    for file, expected in zip(found, bad, strict=True):
        assert expected.reason in file.reason, file.path
        assert file.reason
        assert "\n" not in file.reason


def test_training_leaves_the_bad_files_out(tmp_path, capsys):
    """In class folders, where a folder in place of a file is a folder."""
    make_good(tmp_path / "data" / "a")
    make_good(tmp_path / "data" / "b")
    bad = make_bad(tmp_path / "data" / "b")
    argv = ["--data-dir", str(tmp_path / "data"), "--model", "seresnet18", "--img-size", "32", "-b", "32", "-j", "2"]
    argv += ["--epochs", "1", "--warmup-epochs", "0", "--max-bad-fraction", "0.5", "--output", str(tmp_path / "run")]
    assert run(train.main, argv) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert {line.split(": ")[1] for line in lines} == {
        file.path for file in bad if Path(file.path).name != "folder.png"
    }


def test_a_file_that_the_reference_reads_and_that_goes_bad_is_named_when_its_turn_comes(tmp_path):
    files = [save(tmp_path / f"{i}.tif", picture(20, 20, seed=i)) for i in range(12)]
    loader = make_loader(samples_of(files))
    assert len(list(loader.epoch(0))) == 3
    whole = Path(files[9]).read_bytes()
    Path(files[9]).write_bytes(whole[:200])
    batches = loader.epoch(1)
    next(batches)
    next(batches)
    with pytest.raises(UserError, match=r"cannot decode .*/9\.tif \(.*\): remove or replace it"):
        next(batches)
    Path(files[9]).write_bytes(whole)
    assert len(list(loader.epoch(1))) == 3


def test_pixels_of_an_array_reach_the_model_as_those_of_files_do(tmp_path):
    pixels = np.stack([picture(20, 24, seed=i) for i in range(7)])
    files = samples_of([save(tmp_path / f"{i}.png", image) for i, image in enumerate(pixels)])
    arrays = Samples(files.files, files.labels, files.class_names, pixels=pixels)
    options = {"training": True, "augmentation": Augmentation(), "seed": 4, "batch_size": 3}
    for (x, y), (u, v) in zip(
        make_loader(files, **options).epoch(2), make_loader(arrays, **options).epoch(2), strict=True
    ):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


@pytest.mark.parametrize("backend", DATA_BACKENDS)
def test_every_backend_crops_arrays_and_odd_files_alike(tmp_path, backend):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = samples_of(
        [save(tmp_path / f"{i}.tif", picture(20, 30, seed=i), exif=exif, compression="tiff_lzw") for i in range(4)]
    )
    pixels = np.stack([decode_image(file) for file in files.files])
    arrays = Samples(files.files, files.labels, files.class_names, pixels=pixels)
    options = {"training": True, "augmentation": Augmentation(crop_scale=(0.2, 0.6)), "seed": 4}
    options |= {"device": torch.device("cpu"), "dtype": torch.float32, "batch_size": 4, "img_size": 16, "workers": 1}
    (x, y), (u, v) = (next(loader_by_name(backend, samples, **options).epoch(0)) for samples in (files, arrays))
    assert torch.equal(x, u)
    assert torch.equal(y, v)


def test_a_subset_of_arrays_keeps_each_image_with_its_label():
    """And grey arrays that show one channel three times are taken."""
    grey = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 5, 5, 3))
    samples = Samples(tuple("abcdefg"), np.arange(7), tuple("abcdefg"), pixels=grey)
    subset = samples.subset([4, 2])
    assert subset.pixels.base.nbytes == 2 * 5 * 5
    images, labels = next(make_loader(subset).epoch(0))
    np.testing.assert_allclose((images * 255).mean(dim=(1, 2, 3)), [4, 2], atol=1e-4)
    assert labels.tolist() == [4, 2]


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = save(tmp_path / "x.bmp", picture(20, 20))
    monkeypatch.setattr("engine.data.decode.MAX_PIXELS", 399)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="20 x 20 pixels, not between 1 and 399"):
        decode_image(file)
