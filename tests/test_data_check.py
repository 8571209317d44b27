"""Bad images are found before training, by Pillow and by DALI, and left out or refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import DaliLoader, Samples, Splits, check_images, drop_bad
from engine.errors import UserError
from tests.data_helpers import CPU, make_loader, make_samples, picture, save


def samples_of(*files: str) -> Samples:
    return Samples(tuple(files), np.arange(len(files)) % 2, ("a", "b"))


def cut(path: Path, source: str, part: float | int) -> str:
    """The first part (a fraction, or all but -n bytes) of another file."""
    data = Path(source).read_bytes()
    path.write_bytes(data[: int(len(data) * part)] if isinstance(part, float) else data[:part])
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> dict[str, str]:
    """One picture in every kind of file that must be read, by file name."""
    rgb = picture(96, 124)
    grey = rgb[..., 0]
    image = Image.fromarray(rgb)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(grey))
    kinds = {
        **{f"rgb.{end}": (image, {}) for end in ("jpg", "png", "bmp", "tif", "webp", "ppm", "jp2")},
        **{f"grey.{end}": (image.convert("L"), {}) for end in ("jpg", "png", "bmp", "tif", "pgm", "jp2")},
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "progressive.jpg": (image, {"progressive": True}),
        "turned.jpg": (image, {"exif": _orientation(6)}),
        "palette.png": (image.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        "one_bit.png": (image.convert("1"), {}),
        "alpha.png": (alpha, {}),
        "grey_alpha.png": (image.convert("LA"), {}),
        "sixteen_bits.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "sixteen_bits.tif": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "group4.tif": (image.convert("1"), {"compression": "group4"}),
        "animated.png": (image, {"save_all": True, "append_images": [alpha]}),
        "animated.webp": (image, {"save_all": True, "append_images": [alpha], "lossless": True}),
    }
    for name, (content, options) in kinds.items():
        content.save(tmp_path / name, **options)
    Image.fromarray(rgb).save(tmp_path / "jpeg_named.png", format="JPEG")
    return {path.name: str(path) for path in sorted(tmp_path.iterdir())}


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_every_kind_that_is_promised_passes(good):
    assert check_images(samples_of(*good.values()), workers=2) == []


def test_every_kind_that_passes_is_decoded_to_its_pixels(good):
    files = [file for name, file in good.items() if not name.startswith("turned")]
    images, _ = next(make_loader(samples_of(*files), batch_size=64, img_size=96).epoch(0))
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as opened:
            deep = opened.mode.startswith("I")
            pixels = np.asarray(opened, dtype=np.float64) / 65535 if deep else np.asarray(opened.convert("RGB")) / 255
        rgb = torch.tensor(np.broadcast_to(pixels.reshape(96, 124, -1), (96, 124, 3))).permute(2, 0, 1)
        # Only the width is resized here: the columns' means must agree whatever the filter.
        difference = image.mean(dim=(1, 2)) - rgb.mean(dim=(1, 2))
        assert difference.abs().max() * 255 < 2.5, file


def test_what_cannot_be_decoded_is_named_with_a_reason(good, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(picture(5, 5)).save(tmp_path / "gif.png", format="GIF")
    expected = {
        "empty.png": "empty file",
        "text.jpg": "not an image of a known kind",
        "gif.png": "not an image of a known kind",
        "absent.png": "No such file",
        "folder.png": "Is a directory",
        Path(cut(tmp_path / "cut.jpg", good["rgb.jpg"], 0.6)).name: "truncated",
        Path(cut(tmp_path / "cut.png", good["rgb.png"], 0.6)).name: "truncated",
        Path(cut(tmp_path / "cut.bmp", good["rgb.bmp"], 0.6)).name: "truncated",
        Path(cut(tmp_path / "cut.webp", good["rgb.webp"], 0.6)).name: "decoder",
    }
    found = check_images(
        samples_of(good["rgb.jpg"], *(str(tmp_path / n) for n in expected), good["rgb.png"]), workers=2
    )
    assert [Path(bad.path).name for bad in found] == list(expected)
    for bad, reason in zip(found, expected.values(), strict=True):
        assert reason in bad.reason
        assert "\n" not in bad.reason


def test_what_pillow_takes_and_dali_does_not_is_named_too(good, tmp_path):
    """A PNG without its last chunk, which Pillow does not miss."""
    file = cut(tmp_path / "no_end.png", good["rgb.png"], -12)
    Image.open(file).load()
    found = check_images(samples_of(file, *good.values()), workers=2)
    assert [bad.path for bad in found] == [file]
    assert found[0].reason.startswith("DALI: ")


def test_without_dali_pillow_decides_alone(good, tmp_path, monkeypatch):
    file = cut(tmp_path / "no_end.png", good["rgb.png"], -12)
    broken = cut(tmp_path / "half.png", good["rgb.png"], 0.5)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert [bad.path for bad in check_images(samples_of(file, broken), workers=2)] == [broken]
    with pytest.raises(UserError, match=r"DALI cannot be imported .* --data-backend resident or torchvision"):
        DaliLoader(samples_of(file), batch_size=1, img_size=8, device=CPU, dtype=torch.float32, training=False)
    monkeypatch.undo()
    assert len(check_images(samples_of(file, broken), workers=2)) == 2


def test_arrays_have_nothing_to_be_decoded():
    samples = Samples(("x[0]", "x[1]"), np.array([0, 1]), ("a", "b"), pixels=np.zeros((2, 4, 4, 3), dtype=np.uint8))
    assert check_images(samples, workers=1) == []


def splits_with_bad(tmp_path: Path, bad: int) -> Splits:
    """Train 12, validation 4 and test 4 images in two classes; the first ``bad`` of train's are cut short."""
    train, val, test = (
        make_samples(tmp_path / name, counts) for name, counts in (("train", (6, 6)), ("val", (2, 2)), ("test", (2, 2)))
    )
    for file in train.files[:bad]:
        cut(Path(file), file, 0.5)
    return Splits(train, val, test, "described")


def test_bad_files_are_left_out(tmp_path):
    splits = splits_with_bad(tmp_path, 2)
    kept, bad = drop_bad(splits, workers=2, max_bad_fraction=0.5)
    assert [file.path for file in bad] == list(splits.train.files[:2])
    assert kept.train.files == splits.train.files[2:]
    assert kept.train.labels.tolist() == [0] * 4 + [1] * 6
    assert kept.val.files == splits.val.files
    assert kept.test is not None
    assert kept.test.files == splits.test.files
    assert kept.description == "described"


def test_more_bad_files_than_allowed_stop_the_run(tmp_path):
    splits = splits_with_bad(tmp_path, 5)
    with pytest.raises(
        UserError, match=r"5 of 20 images cannot be read: .*000\.png \(.*002\.png \(.* and 2 more"
    ) as raised:
        drop_bad(splits, workers=2)
    assert "--max-bad-fraction" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_limit_itself_is_allowed(tmp_path):
    splits = splits_with_bad(tmp_path, 2)
    assert len(drop_bad(splits, workers=2, max_bad_fraction=2 / 20)[1]) == 2
    with pytest.raises(UserError, match="2 of 20"):
        drop_bad(splits, workers=2, max_bad_fraction=1.9 / 20)
    with pytest.raises(UserError, match=r"--max-bad-fraction 1\.5"):
        drop_bad(splits, workers=2, max_bad_fraction=1.5)


def test_a_class_that_loses_its_last_image_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"class '0' has no readable image left in train: .*000\.png"):
        drop_bad(splits_with_bad(tmp_path, 6), workers=2, max_bad_fraction=1)


def test_splits_without_test_stay_without(tmp_path):
    splits = splits_with_bad(tmp_path, 0)
    kept, bad = drop_bad(Splits(splits.train, splits.val, None, ""), workers=2)
    assert kept.test is None
    assert bad == []


def test_a_bad_file_that_appears_later_is_named_by_the_loader(tmp_path):
    samples = make_samples(tmp_path, (6, 6))
    loader = make_loader(samples)
    assert len(list(loader.epoch(0))) == 3
    whole = Path(samples.files[6]).read_bytes()
    Path(samples.files[6]).unlink()
    batches = loader.epoch(1)
    next(batches)
    with pytest.raises(UserError, match=r"cannot decode .*006\.png \(.*No such file"):
        next(batches)
    Path(samples.files[6]).write_bytes(whole)
    assert len(list(loader.epoch(1))) == 3


def test_a_file_cut_short_during_training_is_named(tmp_path):
    files = [save(tmp_path / f"{i}.jpg", picture(90, 90, seed=i)) for i in range(8)]
    cut(tmp_path / "5.jpg", files[5], 0.8)
    loader = make_loader(samples_of(*files), training=True, batch_size=8)
    with pytest.raises(UserError, match=r"cannot decode .*5\.jpg \(image file is truncated"):
        next(loader.epoch(0))
