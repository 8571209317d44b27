"""CIFAR's files and NPZ files: ``engine.verify`` looks at them as at files, ``engine.split`` says why it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine import split, verify
from engine.cli import run
from engine.data.array_sources import read_arrays
from engine.data.leakage import hash_pictures
from tests.array_files import images, pack, write_cifar10, write_cifar100, write_npz
from tests.data_helpers import picture, save


def verified(capsys, source: Path, output: Path, *argv: str, status: int) -> tuple[str, dict]:
    """What is printed, and summary.json."""
    capsys.readouterr()
    assert run(verify.main, [str(source), "--output", str(output), *argv]) == status
    assert (output / "classes.png").stat().st_size > 1000
    assert (output / "bad_files.csv").read_text() == "filename,split,reason\n"
    return capsys.readouterr().out, json.loads((output / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["root", "folder", "archive"])
def test_cifar_is_counted(tmp_path, capsys, kind):
    folder = write_cifar10(tmp_path / "data")
    source = {"root": lambda: folder.parent, "folder": lambda: folder}.get(
        kind, lambda: pack(folder, tmp_path / "x.tar.gz")
    )()
    printed, summary = verified(capsys, source, tmp_path / "out", status=0)
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["24", "images,", "0", "bad"]
    assert ["airplane", "10", "2", "12", "50.0%"] in lines
    assert ["width", "32", "32", "32"] in lines
    assert summary["classes"] == {"train": {"airplane": 10, "frog": 10}, "test": {"airplane": 2, "frog": 2}}
    assert (summary["formats"], summary["modes"], summary["bytes"]) == ({"array": 24}, {"RGB": 24}, None)
    assert summary["named_otherwise"] == 0


def test_copies_within_and_between_the_sets_of_an_npz_file_are_found(tmp_path, capsys):
    """Images 0, 3, 6 of a set are of class 0, 1 and 4 of class 1."""
    train, test = images(9, 0, side=28), images(4, 2, side=28)
    train[6] = train[0]
    train[4] = train[3]  # under another label
    test[1] = train[7]
    test[2] = np.clip(train[8].astype(int) + 3, 0, 255)
    source = write_npz(tmp_path / "x.npz", {"train": 9, "val": 3, "test": 4}, train_images=train, test_images=test)
    printed, summary = verified(capsys, source, tmp_path / "out", status=1)

    def named(what: str) -> list[tuple[str, ...]]:
        return [tuple(leak["files"]) for leak in summary[what]]

    assert named("copies") == [("x.npz/train[0]", "x.npz/train[6]"), ("x.npz/train[3]", "x.npz/train[4]")]
    assert named("contradictions") == [("x.npz/train[3]", "x.npz/train[4]")]
    assert named("shared") == [("x.npz/train[7]", "x.npz/test[1]")]
    assert ("x.npz/test[2]", "x.npz/train[8]") in named("near_duplicates")
    assert not any("x.npz/test[1]" in pair for pair in named("near_duplicates"))
    assert "more than once on one side: 2\n  train x.npz/train[0], train x.npz/train[6]  (same bytes)" in printed
    assert "near" not in verified(capsys, source, tmp_path / "out", "--near-distance", "-1", status=1)[0]


def test_sets_of_other_sizes_and_grey_are_looked_at(tmp_path, capsys):
    grey = images(6, 0, side=28)[..., 0]
    larger = images(3, 1, side=40)[..., 0]
    source = write_npz(tmp_path / "x.npz", {"train": 6, "test": 3}, train_images=grey, test_images=larger)
    _, summary = verified(capsys, source, tmp_path / "out", status=0)
    assert summary["width"] == [28, 28, 40]
    assert summary["modes"] == {"L": 9}


def test_an_array_has_the_hash_of_the_same_picture_in_a_file(tmp_path):
    pixels = [picture(40, 56, seed=i) for i in range(4)]
    files = [save(tmp_path / f"{i}.png", image) for i, image in enumerate(pixels)]
    np.testing.assert_array_equal(hash_pictures(pixels, workers=1), hash_pictures(files, workers=1))


def test_arrays_are_named_alone(tmp_path, capsys):
    source = write_npz(tmp_path / "x.npz", {"train": 6})
    assert run(verify.main, [str(source), str(tmp_path)]) == 2
    assert "x.npz holds images as arrays, and all their sets: name it alone" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cifar", "npz"])
def test_split_says_why_it_cannot_divide_arrays_and_the_way_out(tmp_path, capsys, kind):
    if kind == "cifar":
        source = write_cifar100(tmp_path / "data").parent
    else:
        source = write_npz(tmp_path / "x.npz", {"train": 6})
    assert read_arrays(source) is not None
    assert run(split.main, [str(source), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {source} holds images as arrays, and a manifest can only name files: train on it")
    assert "--val-fraction" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()
