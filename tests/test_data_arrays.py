"""CIFAR's files and NPZ arrays become splits; what is wrong with them is named, and none of them runs code."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from engine import evaluate, train
from engine.cli import run
from engine.data import open_samples, open_splits
from engine.errors import UserError
from tests.array_files import images, pack, write_cifar10, write_cifar100, write_npz, write_pickle

QUICK = ["--model", "seresnet18", "--img-size", "32", "-b", "8", "-j", "1", "--epochs", "1", "--warmup-epochs", "0"]


def refusal(data_dir: Path) -> str:
    with pytest.raises(UserError) as raised:
        open_splits(data_dir=data_dir)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# CIFAR


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_is_read_to_its_pixels_and_names(tmp_path, protocol):
    folder = write_cifar10(tmp_path, protocol=protocol)
    splits = open_splits(data_dir=folder, val_fraction=0.2)
    assert splits.train.class_names == ("airplane", "frog")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 4, 4)
    stored = {f"cifar-10-batches-py/data_batch_{b}[{i}]": images(4, b)[i] for b in range(1, 6) for i in range(4)}
    for part in (splits.train, splits.val):
        assert part.pixels.flags.c_contiguous
        for name, pixels, label in zip(part.files, part.pixels, part.labels, strict=True):
            assert np.array_equal(pixels, stored.pop(name))
            assert label == int(name[-2]) % 2
    assert stored == {}
    assert splits.test.files[3] == "cifar-10-batches-py/test_batch[3]"
    assert np.array_equal(splits.test.pixels, images(4, 6))


def test_a_batch_that_python_2_wrote_is_read(tmp_path):
    """As the original files are: text and bytes are the same to it."""
    folder = write_cifar10(tmp_path, per_batch=2)
    pixels = images(2, seed=9)
    raw = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(K\x02M\x00\x0ct" + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    labels = b"](K\x00K\x01e"
    (folder / "test_batch").write_bytes(b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + labels + b"u.")
    test = open_splits(data_dir=folder).test
    assert np.array_equal(test.pixels, pixels)
    assert test.labels.tolist() == [0, 1]


def test_cifar100_has_its_coarse_labels_as_a_head(tmp_path):
    write_cifar100(tmp_path)
    splits = open_splits(data_dir=tmp_path, val_fraction=0.3)
    assert splits.train.class_names == ("ant", "bee", "cod", "eel")
    assert splits.test.labels.tolist() == [0, 1, 2, 3]
    for part in (splits.train, splits.val, splits.test):
        assert part.heads["coarse"].class_names == ("insect", "fish")
        assert part.heads["coarse"].labels.tolist() == (part.labels // 2).tolist()


def test_a_cifar_archive_is_read_without_being_unpacked(tmp_path):
    folder = write_cifar10(tmp_path)
    expected = open_splits(data_dir=folder)
    archive = pack(folder, tmp_path / "cifar-10-python.tar.gz")
    elsewhere = tmp_path / "renamed.tgz"
    os.link(archive, elsewhere)
    for source in (tmp_path, archive, elsewhere):
        splits = open_splits(data_dir=source)
        assert splits.train.files == expected.train.files
        assert np.array_equal(splits.train.pixels, expected.train.pixels)
        assert splits.test.labels.tolist() == expected.test.labels.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-python.tar.gz", "renamed.tgz"]


def test_two_sets_of_cifar_in_one_folder_are_refused(tmp_path):
    write_cifar10(tmp_path)
    pack(write_cifar100(tmp_path), tmp_path / "cifar-100-python.tar.gz")
    assert "holds both cifar-10-batches-py and cifar-100-python.tar.gz" in refusal(tmp_path)


class Malicious:
    """What a pickle may ask for."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_malicious_pickle_runs_nothing(tmp_path, name):
    folder = write_cifar10(tmp_path)
    trap = tmp_path / "trap"
    write_pickle(folder / name, {"data": Malicious(os.system, f"touch {trap}"), "labels": [0]})
    with_open = refusal(folder)
    assert f"{name} is not a pickle of CIFAR: it asks for posix.system" in with_open
    assert not trap.exists()
    pack(folder, tmp_path / "cifar-10-python.tar.gz")
    assert "posix.system" in refusal(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        Malicious(eval, "1/0"),
        Malicious(np.load, "x.npy"),
        Malicious(np.dtype, "O"),
        Malicious(bytes.fromhex, "00"),
        np.array([{}], dtype=object),
        np.arange(4.0),
    ],
    ids=lambda content: type(content).__name__,
)
def test_nothing_but_arrays_of_bytes_is_made_from_a_pickle(tmp_path, content):
    folder = write_cifar10(tmp_path)
    write_pickle(folder / "data_batch_1", {"data": content, "labels": [0]})
    assert "data_batch_1 is not a pickle of CIFAR: " in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2", None, "lacks data_batch_2: download the whole archive cifar-10-python.tar.gz again"),
        ("data_batch_2", b"", "data_batch_2 is not a pickle of CIFAR"),
        ("data_batch_2", b"hello", "data_batch_2 is not a pickle of CIFAR"),
        ("data_batch_2", [1], "data_batch_2 holds no dictionary"),
        ("data_batch_2", {"labels": [0]}, "data_batch_2 holds no data"),
        ("data_batch_2", {"data": [[1, 2]], "labels": [0]}, "data_batch_2 holds no data"),
        ("data_batch_2", {"data": np.zeros((2, 3072), np.uint8)}, "data_batch_2 holds no labels"),
        ("data_batch_2", {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "data is (2, 3071), and must be"),
        ("data_batch_2", {"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "a list of 2 integers from 0 to 1"),
        ("data_batch_2", {"data": np.zeros((1, 3072), np.uint8), "labels": [2]}, "a list of 1 integers from 0 to 1"),
        ("data_batch_2", {"data": np.zeros((1, 3072), np.uint8), "labels": [True]}, "a list of 1 integers"),
        ("batches.meta", {"label_names": ["a", "a"]}, "label_names must be a list of different names"),
        ("batches.meta", {"names": ["a", "b"]}, "batches.meta holds no label_names"),
    ],
)
def test_a_cifar_file_that_cannot_serve_is_named(tmp_path, name, content, message):
    folder = write_cifar10(tmp_path)
    if content is None:
        (folder / name).unlink()
    elif isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        write_pickle(folder / name, content)
    told = refusal(folder)
    assert message in told
    assert str(folder) in told


def test_a_truncated_pickle_and_a_truncated_archive_are_named(tmp_path):
    folder = write_cifar10(tmp_path)
    whole = (folder / "test_batch").read_bytes()
    (folder / "test_batch").write_bytes(whole[: len(whole) // 2])
    assert "test_batch is not a pickle of CIFAR: " in refusal(folder)
    archive = pack(folder, tmp_path / "cifar-10-python.tar.gz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert "is not a readable .tar.gz archive" in refusal(tmp_path)
    (tmp_path / "other.tar.gz").write_bytes(b"\x1f\x8b but no more")
    assert "is not a readable .tar.gz archive" in refusal(tmp_path / "other.tar.gz")
    (tmp_path / "images").mkdir()
    other = pack(tmp_path / "images", tmp_path / "images.tar.gz")
    assert "holds neither cifar-10-batches-py nor cifar-100-python" in refusal(other)


def test_a_file_far_too_large_is_not_read(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path)
    monkeypatch.setattr("engine.data.cifar._MAX_FILE_BYTES", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))
    assert "more than any file of CIFAR" in refusal(folder)


# NPZ


@pytest.mark.parametrize("grey", [True, False], ids=["grey", "colour"])
def test_npz_in_medmnists_form_gives_three_splits(tmp_path, grey):
    path = write_npz(tmp_path / "x.npz", {"train": 9, "val": 4, "test": 5}, grey=grey)
    splits = open_splits(data_dir=path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [9, 4, 5]
    assert splits.train.class_names == ("0", "1", "2")
    assert splits.val.labels.tolist() == [0, 1, 2, 0]
    assert splits.val.files[1] == "x.npz/val[1]"
    expected = images(4, 1, side=28)
    if grey:
        expected = np.repeat(expected[..., :1], 3, axis=3)
    assert np.array_equal(splits.val.pixels, expected)


def test_npz_without_validation_gives_a_part_of_train_for_it(tmp_path):
    labels = np.array([7, 30, 7, 30, 7, 30])
    splits = open_splits(data_dir=write_npz(tmp_path / "x.npz", {"train": 6}, train_labels=labels), val_fraction=0.4)
    assert splits.train.class_names == ("7", "30")
    assert (splits.val.class_counts().tolist(), splits.test) == ([1, 1], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, "has no array train_images (it has train_labels, val_images, val_labels)"),
        ({"val_labels": None}, "has val_images and no val_labels"),
        ({"train_images": np.zeros((6, 8, 8, 3))}, "train_images is (6, 8, 8, 3) float64, and must be"),
        ({"train_images": np.zeros((6, 8, 8, 4), np.uint8)}, "train_images is (6, 8, 8, 4) uint8"),
        ({"train_images": np.zeros((6, 64), np.uint8)}, "train_images is (6, 64) uint8"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8)}, "train_images is (0, 8, 8) uint8"),
        ({"train_labels": np.zeros(5, np.uint8)}, "train_labels is (5,) uint8, and must hold one integer"),
        ({"train_labels": np.zeros((6, 14), np.uint8)}, "train_labels is (6, 14) uint8"),
        ({"train_labels": np.zeros(6)}, "train_labels is (6,) float64"),
        ({"train_labels": np.array([0, 1, 0, 1, 0, -1])}, "one integer of at least 0"),
        ({"train_labels": np.zeros(6, np.uint8)}, "train_labels holds one label only (0)"),
        ({"val_labels": np.array([0, 9, 1])}, "val_labels holds 9, which train_labels does not"),
        ({"train_labels": np.array([{}] * 6, dtype=object)}, "is not a readable NPZ file: Object arrays"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_an_npz_file_that_cannot_serve_is_named(tmp_path, changes, message):
    path = write_npz(tmp_path / "x.npz", {"train": 6, "val": 3}, **changes)
    told = refusal(path)
    assert message in told
    assert str(path) in told


@pytest.mark.parametrize("part", [0.2, 0.6, 0.99])
def test_a_truncated_npz_file_is_named(tmp_path, part):
    path = write_npz(tmp_path / "x.npz", {"train": 6})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    assert str(path) in refusal(path)


def test_a_damaged_npz_file_is_named(tmp_path):
    path = write_npz(tmp_path / "x.npz", {"train": 6})
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    assert "is not a readable NPZ file" in refusal(path)


def test_open_samples_takes_the_test_set_under_the_models_names(tmp_path):
    path = write_npz(tmp_path / "x.npz", {"train": 6, "test": 4})
    samples = open_samples(("2", "1", "0"), data_dir=path)
    assert samples.labels.tolist() == [2, 1, 0, 2]
    assert samples.pixels.shape == (4, 28, 28, 3)
    with pytest.raises(UserError, match=r"training has no class '2' \(it has 0, 1\)"):
        open_samples(("0", "1"), data_dir=path)
    with pytest.raises(UserError, match="has no test_images"):
        open_samples(("0", "1", "2"), data_dir=write_npz(tmp_path / "y.npz", {"train": 6}))


@pytest.mark.parametrize("kind", ["cifar", "npz"])
def test_arrays_are_trained_on_and_scored(tmp_path, kind, capsys):
    write = {
        "cifar": lambda: write_cifar100(tmp_path, train=24, test=8).parent,
        "npz": lambda: write_npz(tmp_path / "x.npz", {"train": 24, "val": 6, "test": 6}, grey=True),
    }
    data = str(write[kind]())
    assert run(train.main, ["--data-dir", data, *QUICK, "--output", str(tmp_path / "run")]) == 0
    assert run(evaluate.main, [str(tmp_path / "run"), "--data-dir", data]) == 0
    assert "test images, weights of epoch 0" in capsys.readouterr().out
