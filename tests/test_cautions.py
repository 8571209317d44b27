"""What may not have been meant of a division is told, by ``engine.split`` and by a run in the same words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine import split
from engine.build import open_data
from engine.cli import run
from engine.config import Config
from engine.data import Samples
from engine.data.cautions import find_class_gaps, find_patients
from tests.data_helpers import save, squares


def samples(names: list[str], **columns) -> Samples:
    """Labelled by their first folder."""
    classes = sorted({name.partition("/")[0] for name in names})
    labels = np.array([classes.index(name.partition("/")[0]) for name in names])
    return Samples(tuple(names), labels, tuple(classes), **columns)


def numbered(pattern: str, images: int) -> list[str]:
    """``images`` names in each of two classes, with the number of the image and that of every second one."""
    return [pattern.format(label=label, i=i, patient=i // 2) for label in "ab" for i in range(images)]


@pytest.mark.parametrize(
    ("pattern", "flag"),
    (
        ("{label}/patient{patient:02d}_{i}.png", r"(patient\d+)"),
        ("{label}/Subject-{patient}/{i}.png", r"(Subject-\d+)"),
        ("{label}/sub-{patient:03d}_scan{i}.png", r"(sub-\d+)"),
        ("{label}/left_case {patient} view {i}.png", r"(case \d+)"),
    ),
)
def test_names_of_patients_are_told_with_the_flag_that_keeps_them_whole(pattern, flag):
    names = numbered(pattern, 6)
    told = find_patients(samples(names), names)
    assert told is not None
    assert f"there are no groups, and {names[0]} and {names[1]} look like images of one patient" in told
    assert told.endswith(f"add --group-regex '{flag}'")
    assert find_patients(samples(names, groups=tuple(names)), names) is None


@pytest.mark.parametrize(
    "pattern",
    (
        "{label}/{i:04d}.png",
        "{label}/patient{i}.png",  # each class counts its own
        "{label}/suitcase{patient}_{i}.png",
        "{label}/subset{patient}_{i}.png",
        "person{label}1/person{label}1_{i}.png",
        "person1/{label}{i}.png",  # the class is the person
    ),
)
def test_other_names_are_not_taken_for_patients(pattern):
    names = numbered(pattern, 6)
    assert find_patients(samples(names), names) is None


def test_a_few_names_like_patients_among_many_are_passed_over():
    names = numbered("{label}/{i:04d}.png", 9) + numbered("{label}/patient{patient}_{i}.png", 4)
    assert find_patients(samples(names), names) is None
    assert find_patients(samples(names[10:]), names[10:]) is not None


def test_classes_that_a_set_has_none_or_one_of_are_told():
    def part(*counts: int) -> Samples:
        labels = np.repeat(np.arange(4), counts)
        return Samples(tuple(map(str, labels)), labels, ("a", "b", "c", "d"))

    assert find_class_gaps({"val": part(9, 2, 3, 5)}) == []
    assert find_class_gaps({"val": part(5, 0, 1, 0), "test": part(1, 2, 2, 2)}) == [
        "val has no image of b, d: figures there say nothing of it",
        "val has one image alone of c: recall there is 0 or 1",
        "test has one image alone of a: recall there is 0 or 1",
    ]


def test_split_tells_what_a_run_tells(tmp_path, capsys):
    counts = {"a": 20, "rare": 3, "test": 20}
    for c, (label, count) in enumerate(counts.items()):
        for i in range(count):
            save(tmp_path / "x" / label / f"patient{i // 2}_{i}.png", squares(100 * c + i))
    flags = ["--exclude", "*mask*", "--test-fraction", "0.2"]
    assert run(split.main, [str(tmp_path / "x"), *flags, "--val-fraction", "0.2", "--output", str(tmp_path / "o")]) == 0
    by_split = capsys.readouterr().err.splitlines()
    open_data(Config(data_dir=str(tmp_path / "x"), exclude=("*mask*",), test_fraction=0.2, val_fraction=0.2))
    by_run = capsys.readouterr().err.splitlines()
    assert by_split == by_run
    wanted = ("matches no file name", "read as a class", "of one patient", "val has one image", "test has one image")
    assert [told in line for line, told in zip(by_split, wanted, strict=True)] == [True] * 5
    written = json.loads(Path(tmp_path / "o" / "split.json").read_text())["warnings"]
    assert [f"warning: {line}" for line in written] == by_split
