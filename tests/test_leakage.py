"""What stands on two sides of a split is found: groups, bytes, nearly the same picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data import leakage
from engine.data.leakage import (
    find_identical,
    find_leakage,
    find_near_duplicates,
    find_shared_bytes,
    find_shared_groups,
    hash_pictures,
)
from tests.data_helpers import picture, save
from tests.dicom_files import write_dicom


def natural(seed: int, size: int = 160) -> np.ndarray:
    """(size, size) uint8 with a 1/f spectrum, as photographs have."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    wave = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) / frequency**1.3).real
    return np.clip(128 + 45 * (wave - wave.mean()) / wave.std(), 0, 255).astype(np.uint8)


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first != second).sum(axis=-1)


def test_a_group_on_two_sides_is_one_leak():
    groups = ["a", "b", "a", "c", "b", "a"]
    found = find_shared_groups(groups, np.array([0, 1, 0, 0, 1, 2]))
    assert [(leak.first, leak.second, leak.why) for leak in found] == [(0, 5, "group a")]


def test_identical_files_are_those_with_the_same_bytes(tmp_path):
    contents = [b"one", b"two", b"one", b"", b"", b"long" * 10**6, b"long" * 10**6, b"two!"]
    files = [str(tmp_path / str(i)) for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        Path(file).write_bytes(content)
    files.append(str(tmp_path / "absent"))
    identical = find_identical(files, workers=2)
    assert identical == [(0, 2), (5, 6)]
    found = find_shared_bytes(identical, np.array([0, 0, 1, 0, 1, 2, 2, 0, 0]))
    assert [(leak.first, leak.second) for leak in found] == [(0, 2)]


def test_a_difference_in_the_last_byte_of_a_large_file_counts(tmp_path):
    for name, end in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        (tmp_path / name).write_bytes(bytes(3 * 2**20) + end)
    assert find_identical([str(tmp_path / name) for name in "abc"], workers=1) == [(0, 2)]


@pytest.mark.parametrize("parts", (2, 3, 5))
@pytest.mark.parametrize("distance", (0, 3))
def test_near_duplicates_are_all_found_whatever_the_blocks(monkeypatch, parts, distance):
    monkeypatch.setattr(leakage, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(leakage, "_BLOCK_COLUMNS", 11)
    rng = np.random.default_rng(parts)
    kinds = rng.choice([-1, 1], (20, 64))
    hashes = kinds[rng.integers(0, 20, 150)].astype(np.int8)
    hashes[rng.random(hashes.shape) < 0.02] *= -1
    hashes[::31] = 0
    part = rng.integers(0, parts, 150)

    sizes = {p: (sum((part == p) & hashes.any(axis=1)), p) for p in range(parts)}
    expected = {}
    for i in range(150):
        larger = [j for j in range(150) if sizes[part[j]] > sizes[part[i]] and hashes[i].any() and hashes[j].any()]
        nearest = min((distances(hashes[i], hashes[j]) for j in larger), default=99)
        if nearest <= distance:
            expected[i] = nearest
    found = find_near_duplicates(hashes, part, distance)
    assert {leak.first: distances(hashes[leak.first], hashes[leak.second]) for leak in found} == expected
    assert len(found) == len(expected) > 5
    for leak in found:
        assert part[leak.first] != part[leak.second]
        assert leak.why == f"{expected[leak.first]} of 64 bits apart"


def test_a_picture_saved_in_another_way_has_nearly_the_same_hash(tmp_path):
    pairs = []
    for seed in range(12):
        image = Image.fromarray(natural(seed))
        original = save(tmp_path / f"{seed}.png", np.asarray(image))
        half = np.asarray(image.resize((80, 80), Image.Resampling.BICUBIC))
        deep = natural(seed).astype(np.uint16) * 257
        pairs += [
            (original, save(tmp_path / f"{seed}.jpg", np.asarray(image.convert("RGB")), quality=70)),
            (original, save(tmp_path / f"{seed}_half.png", half)),
            (original, save(tmp_path / f"{seed}_deep.png", deep)),
            (original, save(tmp_path / f"{seed}_deep.tif", deep)),
        ]
    first, second = (hash_pictures([pair[k] for pair in pairs], workers=2) for k in (0, 1))
    assert np.isin(first, (-1, 1)).all()
    assert (distances(first, second) <= leakage.NEAR_DISTANCE).mean() > 0.9
    assert distances(first, second).max() <= 3


def test_unrelated_pictures_are_far_from_each_other(tmp_path):
    files = [save(tmp_path / f"{seed}.png", natural(seed)) for seed in range(40)]
    hashes = hash_pictures(files, workers=2)
    apart = distances(hashes[:, None], hashes[None])[np.triu_indices(40, 1)]
    assert apart.min() > 3 * leakage.NEAR_DISTANCE
    assert 24 < apart.mean() < 40


def test_a_turned_copy_counts_as_it_is_shown(tmp_path):
    image = Image.fromarray(natural(1))
    upright = save(tmp_path / "upright.png", np.asarray(image))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored_turned.jpg", exif=exif, quality=95)
    first, second = hash_pictures([upright, str(tmp_path / "stored_turned.jpg")], workers=1)
    assert distances(first, second) <= 2


def test_what_cannot_be_decoded_has_no_hash(tmp_path, monkeypatch):
    good = save(tmp_path / "good.png", picture(20, 20))
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:200])
    (tmp_path / "empty.png").touch()
    files = [good, *(str(tmp_path / name) for name in ("cut.png", "empty.png", "absent.png"))]
    assert hash_pictures(files, workers=2).any(axis=1).tolist() == [True, False, False, False]
    monkeypatch.setattr(leakage, "MAX_PIXELS", 399)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert not hash_pictures([good], workers=1).any()


def test_a_dicom_file_has_the_hash_of_what_it_shows(tmp_path):
    shown = natural(5)
    stored = shown.astype(np.uint16) * 16 + 1000
    files = [
        write_dicom(tmp_path / "x.dcm", stored, WindowCenter="3040", WindowWidth="4081"),
        write_dicom(
            tmp_path / "inverted",
            stored,
            WindowCenter="3040",
            WindowWidth="4081",
            PhotometricInterpretation="MONOCHROME1",
        ),
        save(tmp_path / "x.png", shown),
    ]
    dicom, inverted, png = hash_pictures(files, workers=1)
    assert distances(dicom, png) <= leakage.NEAR_DISTANCE
    assert distances(dicom, inverted) > 50


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert not hash_pictures([str(tmp_path / "pipe.png")], workers=1).any()


def test_what_is_shared_is_not_reported_as_near_too(tmp_path):
    one = natural(1)
    files = [save(tmp_path / f"{i}.png", one) for i in range(2)]
    files += [save(tmp_path / "other.bmp", one), save(tmp_path / "else.png", natural(2)), str(tmp_path / "absent.png")]
    found = find_leakage(
        files,
        np.array([0, 1, 1, 1, 1]),
        groups=None,
        identical=find_identical(files, workers=1),
        near_distance=0,
        workers=1,
    )
    assert [(leak.first, leak.second, leak.why) for leak in found.shared] == [(0, 1, "same bytes")]
    assert found.near == []
    assert found.undecoded == 1
    Path(files[1]).unlink()
    found = find_leakage(files, np.array([0, 1, 1, 1, 1]), groups=None, identical=[], near_distance=0, workers=1)
    assert [(leak.first, leak.second) for leak in found.near] == [(0, 2)]
    assert found.undecoded == 2
    without = find_leakage(files, np.zeros(5), groups=list("aabbc"), identical=[], near_distance=-1, workers=1)
    assert (without.shared, without.near, without.undecoded) == ([], [], 0)
