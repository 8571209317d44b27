"""``--imbalance-ratio``: the rule's counts, which images it keeps, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.build import open_data
from engine.command_line import parse_args
from engine.data import Samples, open_splits
from engine.data.long_tail import long_tail_counts, make_long_tailed
from engine.errors import UserError
from tests.array_files import write_npz
from tests.data_helpers import make_folder


def samples(*counts: int, prefix: str = "") -> Samples:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"{prefix}{label}/{i:04d}.png" for label, count in enumerate(counts) for i in range(count))
    return Samples(names, labels, tuple("abcdefghij"[: len(counts)]))


@pytest.mark.parametrize(("ratio", "last"), [(0.1, 50), (0.02, 10), (0.005, 2)])
def test_fifty_balanced_classes_follow_the_formula(ratio, last):
    found = long_tail_counts(np.full(50, 500), ratio)
    assert found.tolist() == [int(500 * ratio ** (x / 49)) for x in range(50)]
    assert (found[0], found[-1]) == (500, last)


def test_a_class_keeps_one_image_where_the_rule_says_less():
    assert long_tail_counts(np.full(10, 134), 0.005).tolist() == [134, 74, 41, 22, 12, 7, 3, 2, 1, 1]


def test_of_unequal_classes_n_is_the_largest_that_all_can_meet():
    counts = np.array([1000, 30, 400, 77])
    found = long_tail_counts(counts, 0.1)

    def rule(n: int) -> np.ndarray:
        return np.array([int(n * 0.1 ** (x / 3)) for x in range(4)])

    n = max(n for n in range(2000) if (rule(n) <= counts).all())
    assert found.tolist() == rule(n).tolist()
    assert found[1] == 30  # the class that is the limit gives all that it has
    assert long_tail_counts(counts, 1).tolist() == [30] * 4
    assert long_tail_counts(np.array([8, 0, 8]), 0.25).tolist() == [8, 0, 2]


def test_what_is_kept_follows_from_names_label_and_seed():
    whole = samples(40, 40, 40)
    kept = make_long_tailed(whole, 0.25, seed=3)
    assert kept.class_counts().tolist() == [40, 20, 10]
    assert list(kept.files) == sorted(kept.files)
    backwards = make_long_tailed(whole.subset(reversed(range(120))), 0.25, seed=3)
    assert set(backwards.files) == set(kept.files)
    assert set(make_long_tailed(whole, 0.25, seed=4).files) != set(kept.files)
    more = make_long_tailed(whole, 0.5, seed=3)
    assert set(kept.files) < set(more.files)
    of_b = {file for file in kept.files if file.startswith("1/")}
    beside_another = make_long_tailed(samples(50, 40, 40), 0.25, seed=3)
    assert of_b <= {file for file in beside_another.files if file.startswith("1/")}


def test_validation_that_is_taken_from_train_is_long_tailed_too_and_test_is_whole(tmp_path):
    for split, counts in (("train", [20, 20, 20]), ("test", [5, 6, 7])):
        make_folder(tmp_path / split, dict(zip("abc", counts, strict=True)))
    config, _ = parse_args(["--data-dir", str(tmp_path), "--imbalance-ratio", "0.1", "--val-fraction", "0.3"])
    splits = open_data(config)
    assert splits.val.class_counts().tolist() == [6, 2, 1]
    assert splits.train.class_counts().tolist() == [14, 4, 1]
    assert splits.test.class_counts().tolist() == [5, 6, 7]
    assert f"{tmp_path}, long-tailed with U = 0.1: 3 classes, train 19, val 9" in splits.description


def test_a_validation_set_that_is_given_is_whole(tmp_path):
    file = write_npz(tmp_path / "x.npz", {"train": 30, "val": 9, "test": 6})
    splits = open_splits(data_dir=file, imbalance_ratio=0.1)
    assert splits.train.class_counts().tolist() == [10, 3, 1]
    assert splits.val.class_counts().tolist() == [3, 3, 3]
    assert splits.test.class_counts().tolist() == [2, 2, 2]
    whole = open_splits(data_dir=file).train
    for name, pixels in zip(splits.train.files, splits.train.pixels, strict=True):
        np.testing.assert_array_equal(pixels, whole.pixels[whole.files.index(name)])


def test_of_a_manifest_rows_keep_their_groups(tmp_path):
    make_folder(tmp_path, {"a": 12, "b": 12})
    rows = [f"{c}/{i:03d}.png,{c},p{i % 4}{c}" for c in "ab" for i in range(12)]
    (tmp_path / "all.csv").write_text("\n".join(["filename,label,group", *rows]) + "\n")
    splits = open_splits(csv=tmp_path / "all.csv", imbalance_ratio=0.5, val_fraction=0.25)
    together = splits.train.class_counts() + splits.val.class_counts()
    assert together.tolist() == [12, 6]
    for part in (splits.train, splits.val):
        for file, group in zip(part.files, part.groups, strict=True):
            assert group == f"p{int(Path(file).stem) % 4}{Path(file).parent.name}"
    assert not {*splits.train.groups} & {*splits.val.groups}


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.5", "nan"])
def test_a_ratio_that_is_none_is_named(ratio):
    with pytest.raises(UserError, match=r"--imbalance-ratio .* does not work: it must be above 0 and at most 1"):
        parse_args(["--imbalance-ratio", ratio])


def test_a_test_set_that_is_taken_from_train_keeps_its_proportions(tmp_path):
    make_folder(tmp_path, {"a": 20, "b": 20})
    flags = ["--test-fraction", "0.5", "--val-fraction", "0.2", "--imbalance-ratio", "0.5"]
    splits = open_data(parse_args(["--data-dir", str(tmp_path), *flags])[0])
    assert splits.test.class_counts().tolist() == [10, 10]
    assert (splits.train.class_counts() + splits.val.class_counts()).tolist() == [10, 5]
