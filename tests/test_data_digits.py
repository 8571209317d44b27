"""The embedded digits: written once, whole, the same everywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import engine.data.digits as digits
from engine.build import open_data
from engine.command_line import parse_args
from engine.data import open_samples, open_splits, write_digits
from engine.errors import UserError


def counts(folder: Path) -> list[int]:
    return [len(list((folder / str(c)).glob("*.png"))) for c in range(10)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "root")


def test_both_splits_are_balanced_and_train_as_large_as_the_smallest_class_allows(root):
    assert counts(root / "test") == [40] * 10
    assert counts(root / "train") == [np.bincount(load_digits().target).min() - 40] * 10


def test_files_are_the_scans_and_no_scan_is_in_both_splits(root):
    scans, targets = load_digits(return_X_y=True)
    index = {}
    for split in ("train", "test"):
        for path in (root / split).glob("*/*.png"):
            i = int(path.stem)
            assert i not in index, f"scan {i} is in {index.get(i)} and {split}"
            index[i] = split
            image = np.asarray(Image.open(path))
            assert image.shape == (8, 8)
            assert targets[i] == int(path.parent.name)
            np.testing.assert_allclose(image.ravel(), scans[i] * 255 / 16, atol=0.5)
    assert len(index) == 400 + sum(counts(root / "train"))


def test_a_second_call_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_digits(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_what_a_crash_left_out_is_added(tmp_path, root, monkeypatch):
    written = []

    def fail_after_100(path, content, write=digits._write_atomically):
        if len(written) == 100:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "_write_atomically", fail_after_100)
        with pytest.raises(KeyboardInterrupt):
            write_digits(tmp_path)
    assert not (tmp_path / "digits.json").exists()

    write_digits(tmp_path)
    next((tmp_path / "test" / "3").iterdir()).unlink()
    write_digits(tmp_path)
    next((tmp_path / "test" / "4").iterdir()).write_bytes(b"")
    write_digits(tmp_path)
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")} == files


def test_several_writers_at_once_agree(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(write_digits, [tmp_path] * 4)) == {tmp_path}
    assert counts(tmp_path / "test") == [40] * 10
    assert not list(tmp_path.rglob(".*")), "temporary files were left behind"


def test_default_place_is_the_users_cache_and_the_default_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    splits = open_splits()
    assert all(file.startswith(str(tmp_path / "fused-se-engine")) for file in splits.train.files)
    assert splits.description.startswith("embedded digits: 10 classes")
    assert splits.test.class_counts().tolist() == [40] * 10
    assert splits.train.class_names == tuple("0123456789")
    assert (splits.train.class_counts() + splits.val.class_counts()).tolist() == [134] * 10
    assert open_samples(splits.train.class_names).files == splits.test.files


def test_the_first_command_trains_on_the_same_long_tail_whatever_the_seed(tmp_path, monkeypatch):
    """Of each class the first images in the order that chance dealt them once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, other = (open_data(parse_args(["--seed", seed])[0]) for seed in ("42", "7"))
    assert first.description.startswith("embedded digits, long-tailed with U = 0.1: 10 classes, train 463, val 81 ")
    kept = {*first.train.files, *first.val.files}
    assert kept == {*other.train.files, *other.val.files}
    assert first.val.files != other.val.files
    assert (first.train.class_counts() + first.val.class_counts()).tolist() == [
        int(134 * 0.1 ** (c / 9)) for c in range(10)
    ]
    nines = {int(Path(file).stem) for file in kept if "/9/" in file}
    assert nines == {105, 125, 505, 683, 751, 774, 975, 1068, 1318, 1412, 1444, 1507, 1698}


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the embedded digits to .*file/x .*XDG_CACHE_HOME"):
        write_digits(tmp_path / "file" / "x")
