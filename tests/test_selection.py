"""Which images of a source are read, and what is held out of them: classes, patterns, names, groups, duplicates."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import split, verify
from engine.build import open_data
from engine.cli import run
from engine.config import Config
from engine.data import Samples, Splits, open_samples, open_splits
from engine.data.held_out import take_test, tie_duplicates
from engine.data.leakage import NEAR_DISTANCE, find_near_sets
from engine.data.selection import Selection
from engine.errors import UserError
from tests.array_files import write_npz
from tests.data_helpers import make_folder, save, save_picture, squares


def names(samples: Samples, folder: Path) -> set[str]:
    return {Path(file).relative_to(folder).as_posix() for file in samples.files}


def sets(splits: Splits, folder: Path) -> dict[str, set[str]]:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: names(part, folder) for name, part in parts.items() if part is not None}


def write_manifest(path: Path, *rows: str, header: str = "filename,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# Classes


def test_folders_of_other_classes_are_not_looked_at(tmp_path):
    make_folder(tmp_path, {"tb": 4, "health": 5, "sick": 2})
    save_picture(tmp_path / "test" / "loose.png")
    (tmp_path / "empty").mkdir()
    splits = open_splits(data_dir=tmp_path, selection=Selection(classes=("tb", "health")))
    assert splits.train.class_names == ("health", "tb")
    assert (splits.train.class_counts() + splits.val.class_counts()).tolist() == [5, 4]
    scored = open_samples(("health", "tb"), data_dir=tmp_path, selection=Selection(classes=("tb", "health")))
    assert len(scored) == 9


def test_classes_of_a_split_folder_are_left_out_of_every_set(tmp_path):
    for part in ("train", "val", "test"):
        make_folder(tmp_path / part, {"a": 2, "b": 2, "c": 2})
    splits = open_splits(data_dir=tmp_path, selection=Selection(classes=("c", "a")))
    assert [part.class_counts().tolist() for part in (splits.train, splits.val, splits.test)] == [[2, 2]] * 3


def test_classes_of_manifests_and_of_arrays(tmp_path):
    make_folder(tmp_path / "x", {"a": 3, "b": 3, "c": 3})
    rows = [f"x/{c}/{i:03d}.png,{c},{'test' if i == 2 else 'train'}" for c in "abc" for i in range(3)]
    manifest = write_manifest(tmp_path / "all.csv", *rows, header="filename,label,split")
    splits = open_splits(csv=manifest, val_fraction=0.5, selection=Selection(classes=("c", "b")))
    assert splits.train.class_names == ("b", "c")
    assert sets(splits, tmp_path / "x")["test"] == {"b/002.png", "c/002.png"}

    seen = write_manifest(tmp_path / "seen.csv", *(f"x/{c}/000.png,{c}" for c in "abc"))
    assert names(open_samples(("a", "b"), csv=seen, selection=Selection(classes=("a", "b"))), tmp_path) == {
        "x/a/000.png",
        "x/b/000.png",
    }
    with pytest.raises(UserError, match="unknown label 'c'"):
        open_samples(("a", "b"), csv=seen)
    train = write_manifest(tmp_path / "train.csv", "x/a/001.png,a", "x/b/001.png,b")
    assert len(open_splits(csv=train, val_csv=seen, selection=Selection(classes=("a", "b"))).val) == 2

    labels = np.array([2, 10, 2, 3, 10, 3])
    arrays = write_npz(tmp_path / "x.npz", {"train": 6}, train_labels=labels)
    splits = open_splits(data_dir=arrays, val_fraction=0.5, selection=Selection(classes=("10", "2")))
    assert splits.train.class_names == ("2", "10")
    kept = {
        int(file.split("[")[1][:-1]): label
        for s in (splits.train, splits.val)
        for file, label in zip(s.files, s.labels, strict=True)
    }
    assert kept == {0: 0, 1: 1, 2: 0, 4: 1}


def test_unknown_classes_are_named_with_the_known_ones(tmp_path):
    make_folder(tmp_path / "x", {"health": 2, "tb": 2})
    manifest = write_manifest(tmp_path / "all.csv", *(f"x/{c}/000.png,{c}" for c in ("health", "tb")))
    for source in ({"data_dir": tmp_path / "x"}, {"csv": manifest}):
        with pytest.raises(UserError, match=r"--classes TB: .* has no class of that name \(it has health, tb\)"):
            open_splits(**source, selection=Selection(classes=("health", "TB")))
    with pytest.raises(UserError, match=r"one class only \(tb\)"):
        open_splits(data_dir=tmp_path / "x", selection=Selection(classes=("tb",)))
    with pytest.raises(UserError, match="--classes tb: classification needs at least two"):
        open_splits(csv=manifest, selection=Selection(classes=("tb",)))


def test_a_recipe_for_other_images_asks_for_them():
    with pytest.raises(UserError, match="no classes health, tb in the embedded digits: name --data-dir or --csv"):
        open_data(Config(classes=("health", "tb")))
    assert open_data(Config(classes=("8", "3"))).test.class_counts().tolist() == [40, 40]


# Patterns of file names


def test_patterns_leave_files_out_and_those_that_match_none_are_told(tmp_path, capsys):
    make_folder(tmp_path, {"a": 4, "b": 4})
    for name in ("000_mask.png", "001_mask_1.png", "001_MASK.png"):
        save_picture(tmp_path / "a" / name, seed=77)
    config = Config(data_dir=str(tmp_path), exclude=("*_mask*.png", "003.png", "mask"))
    splits = open_data(config)
    found = set.union(*sets(splits, tmp_path).values())
    assert found == {"a/000.png", "a/001.png", "a/002.png", "a/001_MASK.png", "b/000.png", "b/001.png", "b/002.png"}
    assert splits.description.endswith("; 4 files left out by --exclude")
    told = [line for line in capsys.readouterr().err.splitlines() if "--exclude" in line]
    assert told == ["warning: --exclude mask matches no file name"]


def test_a_pattern_that_empties_a_class_or_a_manifest_is_refused(tmp_path):
    make_folder(tmp_path / "x", {"a": 2, "b": 2})
    with pytest.raises(UserError, match="x/a holds no image but what --exclude leaves out"):
        open_splits(data_dir=tmp_path / "x", selection=Selection(exclude=("*.png",)))
    manifest = write_manifest(tmp_path / "all.csv", "x/a/000.png,a", "x/b/000.png,b")
    with pytest.raises(UserError, match="--classes and --exclude leave no image"):
        open_splits(csv=manifest, selection=Selection(exclude=("*.png",)))
    shutil.copy(tmp_path / "x" / "b" / "000.png", tmp_path / "x" / "b" / "other.png")
    manifest = write_manifest(tmp_path / "some.csv", "x/a/000.png,a", "x/b/000.png,b", "x/b/other.png,b")
    with pytest.raises(UserError, match="class 'a' holds no image to train on but what --exclude leaves out"):
        open_splits(csv=manifest, selection=Selection(exclude=("0*.png",)))


def test_split_and_verify_take_the_same_flags(tmp_path, capsys):
    make_folder(tmp_path / "x", {"a": 10, "b": 10, "c": 3})
    save_picture(tmp_path / "x" / "a" / "000_mask.png", seed=77)
    flags = ["--classes", "a", "b", "--exclude", "*_mask*.png"]
    assert run(split.main, [str(tmp_path / "x"), *flags, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "split.json").read_text())
    assert [(part, *counts) for part, counts in report["counts"].items()] == [
        (part, "a", "b") for part in ("train", "val", "test")
    ]
    assert sum(sum(counts.values()) for counts in report["counts"].values()) == 20
    capsys.readouterr()
    run(verify.main, [str(tmp_path / "x"), *flags])
    assert capsys.readouterr().out.startswith("20 images, 0 bad")


# Labels and groups in names


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Patients p0 to p9, each with three images of class 0 and two of class 1."""
    for patient, (label, count) in itertools.product(range(10), ((0, 3), (1, 2))):
        for i in range(count):
            name = f"p{patient}/{label}/p{patient}_idx5_x{i}_class{label}.png"
            save_picture(tmp_path / "x" / name, seed=100 * patient + 10 * label + i)
    return tmp_path / "x"


OF_PATCHES = {"label_regex": "class([01])[.]png$", "group_regex": "^p(.)/"}


def test_labels_and_patients_come_from_names_and_patients_stay_whole(patches):
    splits = open_splits(data_dir=patches, test_fraction=0.2, selection=Selection(**OF_PATCHES))
    patients = []
    for part in (splits.train, splits.val, splits.test):
        assert part.class_names == ("0", "1")
        assert [f"class{label}.png" for label in part.labels] == [file.rpartition("_")[2] for file in part.files]
        assert part.groups == tuple(Path(file).name[1] for file in part.files)
        patients.append(set(part.groups))
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10
    assert len(patients[2]) == 2
    assert "(taken from train, in whole groups about 20% of each class)" in splits.description


def test_regular_expressions_are_checked(patches, tmp_path):
    for flag, field in (("--label-regex", "label_regex"), ("--group-regex", "group_regex")):
        with pytest.raises(UserError, match=f"{flag} 'p' has no group in parentheses"):
            Selection(**{field: "p"})
        with pytest.raises(UserError, match=rf"{flag} '\(p' is not a regular expression"):
            Selection(**{field: "(p"})
    with pytest.raises(
        UserError, match=r"--label-regex 'class\(1\)': no match for 30 of 50 files: p0/0/p0_idx5_x0_class0"
    ):
        open_splits(data_dir=patches, selection=Selection(label_regex="class(1)"))
    manifest = write_manifest(tmp_path / "m.csv", "x/p0/0/p0_idx5_x0_class0.png,a", "x/p0/1/p0_idx5_x0_class1.png,b")
    with pytest.raises(UserError, match="--label-regex goes with a folder of images"):
        open_splits(csv=manifest, selection=Selection(label_regex="class(.)"))
    assert len(open_samples(("a", "b"), csv=manifest, selection=Selection(label_regex="class(.)"))) == 2


def test_labels_from_names_do_not_keep_other_sources_from_being_scored(tmp_path):
    selection = Selection(label_regex="class(.)")
    make_folder(tmp_path / "x", {"0": 2, "1": 1})
    assert open_samples(("0", "1"), data_dir=tmp_path / "x", selection=selection).class_counts().tolist() == [2, 1]
    arrays = write_npz(tmp_path / "x.npz", {"train": 4, "test": 4})
    classes = open_splits(data_dir=arrays, val_fraction=0.5).train.class_names
    assert len(open_samples(classes, data_dir=arrays, selection=selection)) == 4


def test_a_patient_in_two_given_sets_is_refused(tmp_path):
    for part, patient in (("train", 1), ("train", 2), ("test", 2)):
        for label in "ab":
            save_picture(tmp_path / part / label / f"p{patient}_0.png", seed=patient)
    with pytest.raises(UserError, match="the group '2' is in both train and test"):
        open_splits(data_dir=tmp_path, selection=Selection(group_regex=r"p(\d)_"))


def test_a_manifest_with_groups_and_a_pattern_for_them_is_refused(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    rows = [f"{label}/{i:03d}.png,{label},p{i}" for label in "ab" for i in range(2)]
    manifest = write_manifest(tmp_path / "all.csv", *rows, header="filename,label,group")
    with pytest.raises(UserError, match="--group-regex: the manifest has a column group itself"):
        open_splits(csv=manifest, selection=Selection(group_regex="(.)/"))


def test_images_to_score_have_the_groups_that_all_their_names_tell(patches, capsys):
    (patches / "q").mkdir()
    selection = Selection(**OF_PATCHES)
    samples = open_samples(("0", "1"), data_dir=patches, selection=selection)
    assert samples.groups == tuple(Path(file).name[1] for file in samples.files)
    shutil.copy(patches / "p0" / "0" / "p0_idx5_x0_class0.png", patches / "q" / "q_class1.png")
    assert capsys.readouterr().err == ""
    assert open_samples(("0", "1"), data_dir=patches, selection=selection).groups is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "each image counts for itself: --group-regex '^p(.)/': no match for 1 of 51 files: q/q_class1.png" in line


def test_each_manifests_names_are_searched_below_its_own_folder(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / part, {f"{part}-{patient}": 2 for patient in "pq"})
        rows = [f"{part}-{patient}/{i:03d}.png,{i}" for patient in "pq" for i in range(2)]
        write_manifest(tmp_path / part / "all.csv", *rows)
    splits = open_splits(
        csv=tmp_path / "train" / "all.csv",
        val_csv=tmp_path / "val" / "all.csv",
        selection=Selection(group_regex="^([^/]+)/"),
    )
    assert splits.train.groups == ("train-p", "train-p", "train-q", "train-q")
    assert splits.val.groups == ("val-p", "val-p", "val-q", "val-q")


# A test set that is taken from train


@pytest.mark.parametrize(
    ("flags", "options"),
    (
        ("--val-fraction 0", {}),
        ("--method first", {"test_method": "first"}),
        ("--val-fraction 0 --group-regex /(..)", {"selection": Selection(group_regex="/(..)")}),
        ("--val-fraction 0 --group-duplicates identical", {"duplicates": "identical"}),
    ),
    ids=("chance", "first", "groups", "duplicates"),
)
@pytest.mark.parametrize("copies", (0, 3))
def test_the_test_set_is_the_one_that_split_makes(tmp_path, flags, options, copies):
    make_folder(tmp_path / "x", {"a": 33, "b": 21})
    for i in range(copies):
        shutil.copy(tmp_path / "x" / "a" / f"{i:03d}.png", tmp_path / "x" / "b" / f"{i + 9:03d}.png")
    argv = ["--seed", "5", "--test-fraction", "0.3", *flags.split(), "--allow-leakage", "--near-distance", "-1"]
    assert run(split.main, [str(tmp_path / "x"), *argv, "--output", str(tmp_path / "out")]) == 0
    written = [line.split(",")[0] for line in (tmp_path / "out" / "test.csv").read_text().splitlines()[1:]]
    splits = open_splits(data_dir=tmp_path / "x", test_fraction=0.3, seed=5, **options)
    found = sets(splits, tmp_path / "x")
    assert found["test"] == {Path(file).relative_to(tmp_path / "x").as_posix() for file in written}
    assert not found["train"] & found["val"]
    assert len(set.union(*found.values())) == 54


def test_a_test_set_that_is_given_is_taken_as_it_is_and_none_without_a_fraction(tmp_path):
    for part in ("train", "test"):
        make_folder(tmp_path / part, {"a": 10, "b": 10})
    given = open_splits(data_dir=tmp_path, test_fraction=0.5)
    assert (len(given.train) + len(given.val), len(given.test)) == (20, 20)
    assert given.description.endswith("; --test-fraction passed over")
    assert open_splits(data_dir=tmp_path / "train").test is None
    taken = open_splits(data_dir=tmp_path / "train", test_fraction=0.5, val_fraction=None)
    assert (len(taken.train), taken.val, len(taken.test)) == (10, None, 10)
    assert "train 10, val none, test 10 (taken from train, 50% of each class)" in taken.description


def test_what_is_held_out_depends_on_names_and_seed_alone(patches, tmp_path):
    shutil.copytree(patches, tmp_path / "elsewhere")
    options = {"test_fraction": 0.2, "duplicates": "identical"}
    first, again, other = (
        sets(open_splits(data_dir=folder, seed=seed, selection=Selection(label_regex="class(.)"), **options), folder)
        for folder, seed in ((patches, 1), (tmp_path / "elsewhere", 1), (patches, 2))
    )
    assert first == again != other


def test_the_first_by_name_cannot_tear_a_group_apart(tmp_path):
    samples = Samples(tuple("abcde"), np.zeros(5, dtype=np.int64), ("x",), groups=("1", "1", "2", "3", "4"))
    with pytest.raises(UserError, match="--test-method first would put a and b on two sides"):
        take_test(samples, samples.files, 0.2, method="first", seed=0)
    whole = take_test(samples, samples.files, 0.4, method="first", seed=0)
    assert [part.files for part in whole] == [("c", "d", "e"), ("a", "b")]


# Duplicates


def test_near_sets_tie_all_that_are_near(monkeypatch):
    monkeypatch.setattr("engine.data.leakage._BLOCK_ROWS", 7)
    monkeypatch.setattr("engine.data.leakage._BLOCK_COLUMNS", 11)
    rng = np.random.default_rng(0)
    hashes = rng.choice(np.array([-1, 1], dtype=np.int8), (8, 64)).repeat(5, axis=0)
    for row in hashes:
        row[rng.integers(0, 64, rng.integers(0, 4))] *= -1
    hashes[3] = 0  # could not be decoded
    near = {
        (i, j)
        for i, j in itertools.combinations(range(40), 2)
        if 3 not in (i, j) and (hashes[i] != hashes[j]).sum() <= 2
    }
    tied: list[set[int]] = [{i} for i in range(40)]

    def merge(pairs):
        for i, j in pairs:
            whole = tied[i] | tied[j]
            for k in whole:
                tied[k] = whole
        return [frozenset(own) for own in tied]

    expected = merge(near)
    tied = [{i} for i in range(40)]
    assert merge(pair for own in find_near_sets(hashes, 2) for pair in itertools.pairwise(own)) == expected
    assert len(set(expected)) > 8


def test_duplicates_join_the_groups_that_they_are_in(tmp_path):
    files = make_folder(tmp_path, {"a": 6})
    paths = [str(files / "a" / f"{i:03d}.png") for i in range(6)]
    shutil.copy(paths[0], paths[3])
    samples = Samples(tuple(paths), np.array([0, 0, 0, 1, 1, 1]), ("a", "b"), groups=tuple("ppqqrs"))
    tied = tie_duplicates(samples, [Path(path).name for path in paths], near_distance=-1, workers=1)
    assert tied.samples.groups == tuple("pppprs")
    assert tied.told == "2 images in 1 set of duplicates kept on one side, 1 of them under several labels"
    alone = tie_duplicates(samples.subset([1, 2, 4]), ["x", "y", "z"], near_distance=-1, workers=1)
    assert (alone.samples.groups, alone.told) == (("p", "q", "r"), "no duplicates")
    for i, brightness in ((1, 1), (4, 0.9)):
        save(Path(paths[i]), (brightness * squares(0)).astype(np.uint8))
    tied = tie_duplicates(samples, [Path(path).name for path in paths], near_distance=NEAR_DISTANCE, workers=1)
    assert tied.samples.groups == tuple("ppppps")
    assert tied.told == "4 images in 2 sets of duplicates kept on one side, 2 of them under several labels"


def test_images_held_out_have_groups_only_where_duplicates_are_among_them(tmp_path):
    make_folder(tmp_path, {"a": 10, "b": 10})
    for label in "ab":
        shutil.copy(tmp_path / label / "000.png", tmp_path / label / "copy.png")
    splits = open_splits(data_dir=tmp_path, test_fraction=0.7, duplicates="identical")
    assert {"a/000.png", "a/copy.png", "b/000.png", "b/copy.png"} <= names(splits.test, tmp_path)
    assert len(set(splits.test.groups)) == len(splits.test) - 2
    assert splits.val.groups is None


def test_duplicates_that_given_sets_share_are_told(tmp_path):
    for seed, (part, label, i) in enumerate(itertools.product(("train", "test"), "ab", range(3))):
        save(tmp_path / part / label / f"{i}.png", squares(seed))
    save(tmp_path / "test" / "b" / "darker.png", (0.9 * squares(0)).astype(np.uint8))
    line, *others = open_splits(data_dir=tmp_path, duplicates="near").warnings
    assert re.fullmatch(
        r"1 near or identical .*, such as .*train/a/0.png and .*test/b/darker.png \(0 of 64 bits apart\)", line
    )
    assert open_splits(data_dir=tmp_path, duplicates="identical").warnings == tuple(others)
