"""DecodedSet sets: the reference decoder's pixels, taken from the cache while they are true, never half of one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.data import Samples, decoded
from engine.data.decode import BadImage, decode_image
from engine.data.decoded import KEPT, DecodedSet, open_decoded
from engine.errors import UserError
from tests.data_helpers import make_samples, picture, save


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(decoded, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def samples(tmp_path) -> Samples:
    """Five images of three sizes."""
    sizes = ((7, 9), (12, 5), (7, 9), (1, 1), (30, 40))
    files = [save(tmp_path / "images" / f"{i}.png", picture(*size, seed=i)) for i, size in enumerate(sizes)]
    return Samples(tuple(files), np.zeros(5, dtype=np.int64), ("a",))


def opened(samples: Samples, workers: int = 2) -> DecodedSet:
    return open_decoded(samples, workers=workers, admit=lambda *_: None)


def image(found: DecodedSet, i: int) -> np.ndarray:
    height, width = found.sizes[i]
    return found.pixels[found.starts[i] :][: height * width * 3].reshape(height, width, 3)


def assert_holds(found: DecodedSet, samples: Samples) -> None:
    assert (found.pixels.dtype, found.starts.dtype, found.sizes.dtype) == (np.uint8, np.int64, np.int32)
    for i, file in enumerate(samples.files):
        np.testing.assert_array_equal(image(found, i), decode_image(file))


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """The files that are decoded from here on."""
    seen: list[str] = []
    monkeypatch.setattr(decoded, "decode_image", lambda file: seen.append(file) or decode_image(file))
    return seen


def kept(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_the_second_time_nothing_is_decoded(samples, cache, decodes, capsys):
    assert_holds(opened(samples), samples)
    assert sorted(decodes) == sorted(samples.files)
    decodes.clear()
    assert_holds(opened(samples, workers=1), samples)
    assert decodes == []
    assert len(kept(cache)) == 1
    assert "again" not in capsys.readouterr().err


def test_a_set_of_many_parts_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "_AT_ONCE", 2)
    samples = make_samples(tmp_path, (7,))
    for _ in range(2):
        assert_holds(opened(samples, workers=1), samples)


@pytest.mark.parametrize("change", ("content", "time", "decoder"))
def test_what_has_changed_is_decoded_again(samples, cache, decodes, monkeypatch, capsys, change):
    opened(samples)
    decodes.clear()
    if change == "decoder":
        monkeypatch.setattr(decoded, "_decoder", lambda: "another")
    elif change == "time":
        os.utime(samples.files[2], ns=(1, 1))
    else:
        save(Path(samples.files[2]), picture(20, 20, seed=9))
    assert_holds(opened(samples), samples)
    assert sorted(decodes) == sorted(samples.files)
    assert "have changed; decoding the images again" in capsys.readouterr().err
    assert len(kept(cache)) == 1  # in place of the other


def flip_a_pixel(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[64 + 3 * (63 + 60 + 63) + 1] ^= 1  # of the image of one pixel
    file.write_bytes(content)


def flip_a_size(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-12] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a pixel": (flip_a_pixel, r"damaged where it holds .*3\.png"),
    "a size": (flip_a_size, "damaged"),
    "cut short": (lambda file: os.truncate(file, 900), "damaged"),
    "a header alone": (lambda file: os.truncate(file, 64), "damaged"),
    "empty": (lambda file: os.truncate(file, 0), "not a file of decoded images"),
    "another file": (lambda file: file.write_bytes(b"x" * 9999), "not a file of decoded images"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(samples, cache, decodes, capsys, damage):
    opened(samples)
    decodes.clear()
    spoil, reason = DAMAGES[damage]
    (file,) = kept(cache)
    spoil(file)
    assert_holds(opened(samples), samples)
    assert sorted(decodes) == sorted(samples.files)
    assert re.search(rf"{file.name}: {reason}; decoding the images again", capsys.readouterr().err)


def test_bad_files_are_told_every_time_and_the_others_are_there(samples, decodes):
    for i in (1, 4):
        Path(samples.files[i]).write_bytes(b"no image")
    good = samples.subset([0, 2, 3])
    for _ in range(2):
        found = opened(samples)
        assert [failure.index for failure in found.failures] == [1, 4]
        assert all("not an image of a known kind" in failure.reason for failure in found.failures)
        assert found.sizes[[1, 4]].tolist() == [[0, 0], [0, 0]]
        rest = DecodedSet(found.pixels, found.starts[[0, 2, 3]], found.sizes[[0, 2, 3]])
        assert_holds(rest, good)
        assert sorted(decodes) == sorted(samples.files)
        decodes[:] = good.files  # which the second time are not decoded


def test_a_bad_file_that_has_become_good_without_a_trace_is_decoded(samples, monkeypatch):
    def fail(file: str) -> np.ndarray:
        raise BadImage("Permission denied")

    with monkeypatch.context() as without_permission:
        without_permission.setattr(decoded, "decode_image", fail)
        found = opened(samples)
        assert len(found.failures) == 5
        assert found.pixels.shape == (0,)
    assert_holds(opened(samples), samples)


def test_memory_is_asked_for_before_anything_is_done(samples, cache, decodes):
    def refuse(count: int, in_memory: bool) -> None:
        assert not in_memory
        assert count == 3 * (63 + 60 + 63 + 1 + 1200)
        raise UserError("no")

    for made in (False, True):
        with pytest.raises(UserError, match="no"):
            open_decoded(samples, workers=1, admit=refuse)
        assert decodes == []
        assert cache.exists() == made
        if not made:
            opened(samples)
            decodes.clear()


def test_an_interruption_leaves_nothing_behind(samples, cache, monkeypatch):
    def interrupt(file: str) -> np.ndarray:
        if file == samples.files[3]:
            raise KeyboardInterrupt
        return decode_image(file)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(decoded, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(samples)
    assert kept(cache) == []
    assert_holds(opened(samples), samples)


@pytest.mark.parametrize("when", ("before", "while writing"))
def test_a_full_disk_is_said_with_the_sizes_and_the_way_out(samples, cache, monkeypatch, when):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4200))  # 4161 are pixels
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as raised:
        opened(samples)
    told = str(raised.value)
    assert f"no room for the decoded images in {cache}: they take 0.0 MiB" in told
    assert "XDG_CACHE_HOME" in told
    assert "--data-backend dali" in told
    assert "\n" not in told
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_is_said(samples, cache):
    cache.parent.write_text("a file in its place")
    with pytest.raises(UserError, match=f"cannot write the decoded images to {cache} .*: set XDG_CACHE_HOME"):
        opened(samples)


def test_two_that_make_the_same_set_at_once_both_have_it(samples, cache, monkeypatch):
    both = threading.Barrier(2)

    def meet(folder: object) -> SimpleNamespace:
        both.wait(timeout=60)
        return SimpleNamespace(free=10**9)

    monkeypatch.setattr(shutil, "disk_usage", meet)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(opened, (samples, samples)):
            assert_holds(found, samples)
    assert len(kept(cache)) == 1


def test_what_is_in_use_outlives_its_file(samples, cache):
    found = opened(samples)
    again = opened(samples)
    kept(cache)[0].unlink()
    assert_holds(found, samples)
    assert_holds(again, samples)


def test_the_last_used_sets_of_a_folder_are_kept_and_leftovers_removed(tmp_path, cache):
    def used(folder: Path, count: int) -> set[Path]:
        """Makes or opens the set of the folder's first images; gives what is kept since."""
        before = set(kept(cache)) if cache.exists() else set()
        opened(everything[folder].subset(range(count)))
        new = set(kept(cache)) - before
        for age, path in enumerate(sorted(kept(cache), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, (1000 + age, 1000 + age))
        return new

    everything = {folder: make_samples(folder, (KEPT + 2,)) for folder in (tmp_path / "a", tmp_path / "b")}
    other = used(tmp_path / "b", 1)
    first = used(tmp_path / "a", 1)
    second = used(tmp_path / "a", 2)
    for count in range(3, KEPT + 1):
        used(tmp_path / "a", count)
    used(tmp_path / "a", 1)  # so that the second is now the oldest
    leftover, unfinished = cache / ".a.rgb.0123", cache / ".b.rgb.4567"
    leftover.touch()
    os.utime(leftover, (1, 1))
    unfinished.touch()
    used_last = used(tmp_path / "a", KEPT + 1)
    assert set(kept(cache)) >= other | first | used_last | {unfinished}
    assert not set(kept(cache)) & (second | {leftover})
    assert len(kept(cache)) == KEPT + 2


def test_what_is_not_to_be_kept_leaves_the_cache_as_it_was(samples, cache, capsys):
    for count in range(1, KEPT + 1):
        opened(samples.subset([*range(count % 5), 4]))
    before = kept(cache)
    assert_holds(open_decoded(samples, workers=2, admit=lambda *_: None, keep=False), samples)
    assert kept(cache) == before


def test_arrays_are_taken_as_they_are(cache):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    grey = np.broadcast_to(pixels[..., :1], pixels.shape)
    for images, in_memory in ((pixels, True), (grey, False), (pixels[::2], False)):
        asked: list[tuple[int, bool]] = []
        n = len(images)
        samples = Samples(tuple("abcd"[:n]), np.zeros(n, dtype=np.int64), ("x",), pixels=images)
        found = open_decoded(samples, workers=1, admit=lambda *told, asked=asked: asked.append(told))
        assert asked == [(n * 5 * 6 * 3, in_memory)]
        assert np.shares_memory(found.pixels, pixels) == in_memory
        for i in range(n):
            np.testing.assert_array_equal(image(found, i), images[i])
    assert not cache.exists()
