"""The embedded digits: written once, whole, the same everywhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import engine.data.digits as digits
from engine.data import open_samples, open_splits, write_digits
from engine.errors import UserError


def counts(folder: Path) -> list[int]:
    return [len(list((folder / str(c)).glob("*.png"))) for c in range(10)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits") / "root")


def test_test_is_balanced_and_train_long_tailed(root):
    assert counts(root / "test") == [40] * 10
    assert counts(root / "train") == [int(134 * 0.1 ** (c / 9)) for c in range(10)]
    assert counts(root / "train")[0] == 134
    assert counts(root / "train")[9] == 13


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
    assert (splits.train.class_counts() + splits.val.class_counts()).tolist() == counts(
        Path(splits.train.files[0]).parents[1]
    )
    assert open_samples(splits.train.class_names).files == splits.test.files


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the embedded digits to .*file/x .*XDG_CACHE_HOME"):
        write_digits(tmp_path / "file" / "x")
