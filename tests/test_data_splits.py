"""Folders and manifests become splits; whatever is wrong with them is named in one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.data import Samples, Splits, open_samples, open_splits
from engine.data.samples import sort_class_names
from engine.errors import UserError
from tests.data_helpers import make_folder, save_picture


def names(samples: Samples) -> list[str]:
    return [Path(file).name for file in samples.files]


def by_split(splits: Splits) -> dict[str, set[str]]:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: set(part.files) for name, part in parts.items() if part is not None}


def write_csv(path: Path, *rows: str, header: str = "filename,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten files, 0.png to 9.png, in one folder."""
    for i in range(10):
        save_picture(tmp_path / f"{i}.png", seed=i)
    return tmp_path


# Folders


def test_class_folders_alone_are_all_training(tmp_path):
    make_folder(tmp_path, {"cat": 8, "ant": 4})
    splits = open_splits(data_dir=tmp_path, val_fraction=0.25)
    assert splits.train.class_names == ("ant", "cat")
    assert splits.train.class_counts().tolist() == [3, 6]
    assert splits.val.class_counts().tolist() == [1, 2]
    assert splits.test is None
    assert all(Path(f).is_absolute() and Path(f).parent.name == "ant" for f in splits.train.files[:3])
    assert splits.train.labels.dtype == np.int64
    assert "2 classes, train 9, val 3 (taken from train, 25% of each class), test none" in splits.description


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_given_validation_and_test_folders_are_used_as_they_are(tmp_path, val_name):
    for i, split in enumerate(["train", val_name, "test"]):
        make_folder(tmp_path / split, {"a": 3 + i, "b": 2 + i})
    splits = open_splits(data_dir=tmp_path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5, 7, 9]
    assert "val 7 (given), test 9" in splits.description


def test_validation_comes_from_train_and_never_from_test(tmp_path):
    make_folder(tmp_path / "train", {"a": 10, "b": 10})
    make_folder(tmp_path / "test", {"a": 4, "b": 4})
    splits = open_splits(data_dir=tmp_path)
    assert len(splits.test) == 8
    assert all("/train/" in file for file in splits.val.files)
    assert len(splits.train) + len(splits.val) == 20


def test_validation_takes_one_of_two_and_none_of_one(tmp_path):
    make_folder(tmp_path, {"many": 40, "one": 1, "two": 2})
    low, high = (open_splits(data_dir=tmp_path, val_fraction=f) for f in (0.01, 0.99))
    assert low.val.class_counts().tolist() == [1, 0, 1]
    assert high.train.class_counts().tolist() == [1, 1, 1]


def test_validation_split_depends_on_the_seed_and_on_nothing_else(tmp_path):
    make_folder(tmp_path / "x", {"a": 20, "b": 20})
    for file in sorted((tmp_path / "x").glob("*/*.png"), reverse=True):  # made in another order
        (tmp_path / "y" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "y" / file.parent.name)
    first, again, elsewhere, other = (
        open_splits(data_dir=tmp_path / folder, seed=seed) for folder, seed in (("x", 1), ("x", 1), ("y", 1), ("x", 2))
    )
    assert first.val.files == again.val.files
    assert names(first.val) == names(elsewhere.val)
    for splits in (first, elsewhere):
        assert list(splits.train.files) == sorted(splits.train.files)
    assert first.val.files != other.val.files
    assert by_split(first)["train"].isdisjoint(first.val.files)


def test_one_classes_validation_part_does_not_depend_on_another_class(tmp_path):
    make_folder(tmp_path / "x", {"a": 20, "b": 20})
    make_folder(tmp_path / "y", {"a": 33, "b": 20})
    x, y = (open_splits(data_dir=tmp_path / folder) for folder in "xy")
    of_b = [{Path(f).name for f in s.val.files if "/b/" in f} for s in (x, y)]
    assert of_b[0] == of_b[1]


def test_images_are_searched_below_the_class_and_hidden_ones_are_passed_over(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    save_picture(tmp_path / "a" / "deep" / "er" / "x.PNG")
    save_picture(tmp_path / "a" / ".hidden.png")
    save_picture(tmp_path / "a" / ".cache" / "y.png")
    save_picture(tmp_path / ".git" / "z.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    splits = open_splits(data_dir=tmp_path, val_fraction=0.5)
    files = by_split(splits)["train"] | by_split(splits)["val"]
    assert {Path(f).relative_to(tmp_path).as_posix() for f in files} == {"a/000.png", "a/deep/er/x.PNG", "b/000.png"}


def test_integer_class_names_sort_as_numbers():
    assert sort_class_names(["10", "9", "1"]) == ("1", "9", "10")
    assert sort_class_names(["10", "9", "x"]) == ("10", "9", "x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.write_text(""), "is not a folder"),
        (lambda d: d.mkdir(), "is empty"),
        (lambda d: save_picture(d / "x.png"), "holds images but no class folders"),
        (lambda d: make_folder(d, {"a": 1}), "one class only (a)"),
        (lambda d: (make_folder(d, {"a": 1, "b": 1}), (d / "void").mkdir()), "data/void holds no image"),
        (lambda d: make_folder(d / "test", {"a": 1, "b": 1}), "has test/ but no train/"),
        (lambda d: (d / "train").mkdir(parents=True), "data/train is empty"),
        (lambda d: [make_folder(d / s, {"a": 1, "b": 1}) for s in ("train", "val", "valid")], "both val/ and valid/"),
        (
            lambda d: [make_folder(d / s, c) for s, c in (("train", {"a": 2, "b": 2}), ("test", {"a": 1, "c": 1}))],
            "data/test/c: training has no class 'c' (it has a, b)",
        ),
        (lambda d: make_folder(d, {"a": 1, "b": 1}), "no class has two images"),
    ],
)
def test_a_folder_that_cannot_serve_is_named(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(UserError) as raised:
        open_splits(data_dir=tmp_path / "data")
    assert message in str(raised.value)
    assert str(tmp_path / "data") in str(raised.value) or "no class has two images" in message
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_validation_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(UserError, match="--val-fraction"):
        open_splits(val_fraction=fraction)


# Manifests


def test_manifest_names_start_from_its_own_folder(images):
    rows = [f"{i}.png,{'even' if i % 2 == 0 else 'odd'},ignored" for i in range(10)]
    path = write_csv(images / "all.csv", *rows, header="filename,label,comment")
    splits = open_splits(csv=path, val_fraction=0.2)
    assert splits.train.class_names == ("even", "odd")
    assert splits.val.class_counts().tolist() == [1, 1]
    for part in (splits.train, splits.val):
        assert [splits.train.class_names[label] for label in part.labels] == [
            "even" if int(Path(f).stem) % 2 == 0 else "odd" for f in part.files
        ]


def test_manifest_names_start_from_data_dir_where_it_is_given(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [f"{i}.png,{i % 2}" for i in range(8)]
    path = write_csv(elsewhere / "train.csv", *rows, f"{images / '9.png'},1")
    splits = open_splits(csv=path, data_dir=images)
    assert by_split(splits)["train"] | by_split(splits)["val"] == {str(images / f"{i}.png") for i in [*range(8), 9]}


def test_three_manifests_give_three_splits(images):
    train = write_csv(images / "train.csv", "0.png,a", "1.png,b", "2.png,a")
    val = write_csv(images / "val.csv", "3.png,b", "4.png,b")
    test = write_csv(images / "test.csv", "5.png,b")
    splits = open_splits(csv=train, val_csv=val, test_csv=test)
    assert [names(part) for part in (splits.train, splits.val, splits.test)] == [
        ["0.png", "1.png", "2.png"],
        ["3.png", "4.png"],
        ["5.png"],
    ]
    assert splits.val.labels.tolist() == [1, 1]
    assert splits.test.class_names == ("a", "b")


def test_order_of_a_manifest_does_not_change_the_split(images):
    rows = [f"{i}.png,{i % 2}" for i in range(10)]
    up = open_splits(csv=write_csv(images / "up.csv", *rows))
    down = open_splits(csv=write_csv(images / "down.csv", *reversed(rows)))
    assert by_split(up) == by_split(down)


def test_a_file_listed_twice_is_refused(images):
    rows = [f"{i}.png,{i % 2}" for i in range(10)]
    with pytest.raises(UserError, match=r"lists .*/3\.png twice: '1' \(line 5\), '1' \(line 12\): remove one of them"):
        open_splits(csv=write_csv(images / "x.csv", *rows, "3.png,1"))


def test_byte_order_mark_blank_lines_and_quotes_are_read(images):
    path = images / "x.csv"
    path.write_bytes(b'\xef\xbb\xbffilename,label\r\n"0.png","a, b"\r\n\r\n1.png, c \r\n2.png,c\r\n3.png,"a, b"\r\n')
    assert open_splits(csv=path).train.class_names == ("a, b", "c")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["0.png,a", "1.png,b"], "file,label", "has no column 'filename' (its first line: file, label)"),
        (["0.png,a", "1.png,b"], "filename,class", "has no column 'label'"),
        ([], "filename,label", "lists no file"),
        (["0.png,a", "1.png,"], "filename,label", "line 3: empty label"),
        (["0.png,a", "1.png"], "filename,label", "line 3: empty label"),
        (["0.png,a", ",b"], "filename,label", "line 3: empty filename"),
        (["0.png,a", "1.png,a"], "filename,label", "one label only (a)"),
        (["0.png,a", "1.png,b", "0.png,b"], "filename,label", "0.png twice: 'a' (line 2), 'b' (line 4)"),
        (["0.png,a", "nope.png,b"], "filename,label", "lists 1 of 2 files that do not exist"),
        (['0.png,"a', "1.png,b"], "filename,label", "is not a CSV file"),
    ],
)
def test_a_manifest_that_cannot_serve_is_named(images, rows, header, message):
    path = write_csv(images / "bad.csv", *rows, header=header)
    with pytest.raises(UserError) as raised:
        open_splits(csv=path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_absent_files_are_counted_and_the_first_named_with_their_lines(images):
    path = write_csv(images / "x.csv", "0.png,a", *[f"gone{i}.png,b" for i in range(7)])
    with pytest.raises(UserError, match=r"lists 7 of 8 .*gone0\.png \(line 3\).*gone2\.png \(line 5\) and 4 more"):
        open_splits(csv=path)


def test_unknown_label_is_named_with_file_line_and_what_is_known(images):
    train = write_csv(images / "train.csv", "0.png,a", "1.png,b")
    for flag in ("val_csv", "test_csv"):
        path = write_csv(images / f"{flag}.csv", "2.png,a", "3.png,dog")
        with pytest.raises(UserError, match=rf"{path}, line 3: unknown label 'dog' \(known: a, b\)"):
            open_splits(csv=train, **{flag: path})


def test_unreadable_manifests_are_named(images):
    with pytest.raises(UserError, match=r"cannot read .*absent\.csv: No such file"):
        open_splits(csv=images / "absent.csv")
    with pytest.raises(UserError, match=r"0\.png is not a CSV file in UTF-8"):
        open_splits(csv=images / "0.png")


def test_contradictory_sources_are_refused(images):
    path = write_csv(images / "x.csv", "0.png,a", "1.png,b")
    with pytest.raises(UserError, match="--val-csv without --csv"):
        open_splits(val_csv=path)
    with pytest.raises(UserError, match="--test-csv without --csv"):
        open_splits(data_dir=images, test_csv=path)
    make_folder(images / "train", {"a": 1, "b": 1})
    with pytest.raises(UserError, match=r"--data-dir .* has its own train/, and --csv"):
        open_splits(data_dir=images, csv=path)


def test_a_file_in_two_splits_is_refused(images):
    train = write_csv(images / "train.csv", "0.png,a", "1.png,b", "2.png,a")
    test = write_csv(images / "test.csv", "2.png,a")
    with pytest.raises(UserError, match=r"2\.png is in both (train|val) and test"):
        open_splits(csv=train, test_csv=test)


# A set to score a model on


def test_open_samples_labels_by_the_models_own_order(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 2})
    samples = open_samples(["b", "c", "a"], data_dir=tmp_path)
    assert samples.class_names == ("b", "c", "a")
    assert samples.class_counts().tolist() == [2, 0, 1]
    assert [Path(f).parent.name for f in samples.files] == ["b", "b", "a"]


def test_open_samples_takes_the_test_folder_where_there_is_one(tmp_path):
    make_folder(tmp_path / "train", {"a": 3, "b": 3})
    with pytest.raises(UserError, match="has train/ but no test/"):
        open_samples(["a", "b"], data_dir=tmp_path)
    make_folder(tmp_path / "test", {"a": 1, "b": 1})
    assert len(open_samples(["a", "b"], data_dir=tmp_path)) == 2


def test_open_samples_refuses_a_class_that_the_model_does_not_know(images):
    make_folder(images / "d", {"a": 1, "z": 1})
    with pytest.raises(UserError, match="no class 'z'"):
        open_samples(["a", "b"], data_dir=images / "d")
    path = write_csv(images / "x.csv", "0.png,z")
    with pytest.raises(UserError, match="unknown label 'z'"):
        open_samples(["a", "b"], csv=path)
    assert len(open_samples(["z", "b"], csv=path)) == 1


def test_file_names_that_are_not_utf8_survive(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    odd = os.fsencode(tmp_path / "a") + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "a" / "000.png").read_bytes())
    splits = open_splits(data_dir=tmp_path)
    assert os.fsdecode(odd) in by_split(splits)["train"] | by_split(splits)["val"]
