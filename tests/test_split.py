"""``engine.split``: whole groups, fixed counts, nothing on two sides, nothing overwritten."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from engine import split
from engine.cli import run
from engine.data import open_splits
from engine.data.listing import write_all
from engine.data.splitting import (
    PARTS,
    fold_stratified,
    merge_groups,
    split_first,
    split_groups,
    split_stratified,
)
from engine.errors import UserError
from tests.data_helpers import make_folder, picture, save

THIRDS = (0.7, 0.15, 0.15)


def divided(capsys, *argv: str | Path) -> str:
    """What the command prints; it must succeed."""
    capsys.readouterr()
    status = run(split.main, [*map(str, argv)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def refused(capsys, output: Path, *argv: str | Path) -> str:
    """The one line that the command ends with; nothing may have been written."""
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    assert run(split.main, [*map(str, argv), "--output", str(output)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sorted(output.rglob("*")) == before
    return lines[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def names_in(path: Path) -> set[str]:
    return {Path(row["filename"]).name for row in rows(path)}


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """A manifest of 24 patients with 1 to 4 pictures each in two classes, and a column of weights."""
    lines = ["filename,label,patient,weight"]
    for patient in range(24):
        for i in range(1 + patient % 4):
            name = f"images/patient{patient:02d}_{i}.png"
            save(tmp_path / name, picture(9, 9, seed=10 * patient + i, noise=60))
            lines.append(f"{name},{'sick' if patient % 3 == 0 else 'well'},p{patient},{patient / 4}")
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "all.csv"


# The first names of each class


def test_first_split_has_the_counts_and_ranges_of_the_tuberculosis_data(tmp_path, capsys):
    touch(
        tmp_path / "x",
        *(f"Healthy/h{i:04d}.png" for i in range(1, 3801)),
        *(f"TB/tb{i:04d}.png" for i in range(1, 801)),
    )
    printed = divided(capsys, tmp_path / "x", "--method", "first", "--output", tmp_path / "out")
    assert [line.split() for line in printed.splitlines()[:5]] == [
        ["split", "class", "images", "first", "last"],
        ["train", "Healthy", "3040", "h0761.png", "h3800.png"],
        ["train", "TB", "640", "tb0161.png", "tb0800.png"],
        ["test", "Healthy", "760", "h0001.png", "h0760.png"],
        ["test", "TB", "160", "tb0001.png", "tb0160.png"],
    ]
    assert (tmp_path / "out" / "train.csv").read_text().splitlines()[0] == "filename,label"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["split.json", "test.csv", "train.csv"]
    train, test = (rows(tmp_path / "out" / f"{part}.csv") for part in ("train", "test"))
    assert Counter(row["label"] for row in train) == {"Healthy": 3040, "TB": 640}
    assert Counter(row["label"] for row in test) == {"Healthy": 760, "TB": 160}
    report = json.loads((tmp_path / "out" / "split.json").read_text())
    assert report["counts"] == {"train": {"Healthy": 3040, "TB": 640}, "test": {"Healthy": 760, "TB": 160}}
    assert report["ranges"]["test"]["TB"] == {"images": 160, "first": "TB/tb0001.png", "last": "TB/tb0160.png"}
    splits = open_splits(csv=tmp_path / "out" / "train.csv", test_csv=tmp_path / "out" / "test.csv")
    assert splits.test is not None
    assert splits.test.class_counts().tolist() == [760, 160]
    assert (splits.train.class_counts() + splits.val.class_counts()).tolist() == [3040, 640]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.2, 0), (4, 0.2, 0), (5, 0.2, 1), (9, 0.2, 1), (7, 0.5, 3)]
)
def test_first_split_rounds_down(count, fraction, expected):
    names = [f"{i}" for i in reversed(range(count))]
    part = split_first(names, np.zeros(count, dtype=int), fraction)
    assert sorted(names[i] for i in np.flatnonzero(part == 2)) == sorted(names)[:expected]


# By chance, class by class


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_keeps_the_shares_and_every_class_everywhere(seed):
    counts = [3, 4, 7, 20, 133, 432]
    labels = np.repeat(np.arange(6), counts)
    names = [f"{label}/{i}" for i, label in enumerate(labels)]
    part = split_stratified(names, labels, THIRDS, seed)
    for label, count in enumerate(counts):
        found = np.bincount(part[labels == label], minlength=3)
        assert (found >= 1).all()
        assert (
            np.abs(found[1:] - count * 0.15).max() <= 0.85
        )  # half an image by rounding, or the one that must be there
        assert found.sum() == count


@pytest.mark.parametrize(("count", "fractions", "expected"), [
    (1, THIRDS, [1, 0, 0]),
    (2, (0.6, 0.15, 0.25), [1, 0, 1]),
    (3, (0.1, 0.45, 0.45), [1, 1, 1]),
    (4, (0.1, 0.45, 0.45), [1, 1, 2]),
    (2, (0.8, 0.0, 0.2), [1, 0, 1]),
    (10, (0.8, 0.0, 0.2), [8, 0, 2]),
])  # fmt: skip
def test_small_classes_are_spread_as_far_as_they_reach(count, fractions, expected):
    part = split_stratified([str(i) for i in range(count)], np.zeros(count, dtype=int), fractions, 0)
    assert np.bincount(part, minlength=3).tolist() == expected


@pytest.mark.parametrize("way", ["stratified", "folds", "groups"])
def test_a_split_does_not_depend_on_the_order_of_the_list(way):
    rng = np.random.default_rng(0)
    names = [f"{i:03d}" for i in range(90)]
    labels = rng.integers(0, 3, 90)
    groups = [f"g{g}" for g in rng.integers(0, 30, 90)]

    def parts(order, seed=1):
        chosen, of = [names[i] for i in order], labels[order]
        if way == "groups":
            part = split_groups(of, [groups[i] for i in order], THIRDS, seed, num_classes=3)
        else:
            part = (
                split_stratified(chosen, of, THIRDS, seed)
                if way == "stratified"
                else fold_stratified(chosen, of, 4, seed)
            )
        return dict(zip(chosen, part.tolist(), strict=True))

    assert parts(np.arange(90)) == parts(rng.permutation(90))
    assert parts(np.arange(90)) != parts(np.arange(90), seed=2)


def test_one_class_does_not_depend_on_another():
    names = [f"a{i:02d}" for i in range(30)] + [f"b{i:02d}" for i in range(30)]
    labels = np.repeat([0, 1], 30)
    whole = split_stratified(names, labels, THIRDS, 5)
    without = split_stratified(names[:10] + names[30:], np.repeat([0, 1], [10, 30]), THIRDS, 5)
    assert whole[30:].tolist() == without[10:].tolist()


def test_a_seed_means_what_it_meant():
    """A seed in a paper has to mean the same division tomorrow."""
    part = split_stratified([f"{i:02d}" for i in range(20)], np.repeat([0, 1], 10), (0.6, 0.2, 0.2), 42)
    assert "".join(str(p) for p in part) == "20010102000002100201"


# Folds


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_a_balanced_partition(seed):
    counts = [2, 5, 11, 40]
    labels = np.repeat(np.arange(4), counts)
    fold = fold_stratified([str(i) for i in range(58)], labels, 4, seed)
    table = np.array([np.bincount(fold[labels == label], minlength=4) for label in range(4)])
    assert table.sum() == 58
    assert (table.max(axis=1) - table.min(axis=1)).max() <= 1
    assert np.ptp(table.sum(axis=0)) <= 1


@pytest.mark.parametrize("grouped", [(), ("--group-column", "patient")])
def test_folds_are_written_as_pairs_that_share_nothing(patients, tmp_path, capsys, grouped):
    divided(capsys, patients, "--folds", "3", *grouped, "--output", tmp_path / "out")
    everything = names_in(patients)
    validated = Counter()
    for k in range(3):
        train, val = (tmp_path / "out" / f"fold{k}" / f"{part}.csv" for part in ("train", "val"))
        assert names_in(train) | names_in(val) == everything
        assert names_in(train).isdisjoint(names_in(val))
        if grouped:
            assert {row["patient"] for row in rows(train)}.isdisjoint(row["patient"] for row in rows(val))
        validated.update(names_in(val))
        assert len(open_splits(csv=train, val_csv=val).train) == len(names_in(train))
    assert set(validated.values()) == {1}
    assert set(validated) == everything


# Groups


@pytest.mark.parametrize("seed", range(25))
def test_groups_are_never_divided_and_every_class_reaches_every_part(seed):
    rng = np.random.default_rng(seed)
    num_groups, classes = rng.integers(12, 80), rng.integers(2, 5)
    group_of = rng.integers(0, num_groups, rng.integers(100, 400))
    label_of_group = rng.choice(classes, num_groups, p=rng.dirichlet(np.full(classes, 2)))
    mixed = rng.random(len(group_of)) < rng.choice([0, 0.1])
    labels = np.where(mixed, rng.integers(0, classes, len(group_of)), label_of_group[group_of])
    part = split_groups(labels, [f"p{g}" for g in group_of], THIRDS, seed, num_classes=classes)
    for g in np.unique(group_of):
        assert len(set(part[group_of == g])) == 1
    assert set(part) == {0, 1, 2}
    for label in np.unique(labels):
        if not mixed.any() and len(set(group_of[labels == label])) >= 3:
            assert set(part[labels == label]) == {0, 1, 2}


def test_grouped_folds_are_as_balanced_as_those_of_scikit_learn():
    ours, theirs = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        group_of = rng.choice(60, 400, p=rng.dirichlet(np.full(60, 1.0)))
        labels = (rng.random(60) < 0.2)[group_of].astype(int)
        peer = np.zeros(400, dtype=int)
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=seed).split(labels, labels, group_of)
        for k, (_, val) in enumerate(folds):
            peer[val] = k
        mine = split_groups(labels, [str(g) for g in group_of], [0.25] * 4, seed, num_classes=2)
        for fold, into in ((mine, ours), (peer, theirs)):
            shares = [np.bincount(fold[labels == c], minlength=4) / np.sum(labels == c) for c in (0, 1)]
            into.append(np.abs(np.array(shares) - 0.25).mean())
    assert np.mean(ours) < 1.05 * np.mean(theirs)


def test_a_column_of_groups_and_the_other_columns_reach_the_manifests(patients, tmp_path, capsys):
    divided(capsys, patients, "--group-column", "patient", "--output", tmp_path)
    parts = {part: rows(tmp_path / f"{part}.csv") for part in PARTS}
    assert sum(map(len, parts.values())) == len(rows(patients))
    of_part = {part: {row["patient"] for row in found} for part, found in parts.items()}
    assert all(of_part.values())
    assert len(set.union(*of_part.values())) == sum(map(len, of_part.values()))
    for found in parts.values():
        assert {row["label"] for row in found} == {"sick", "well"}
        for row in found:
            patient = int(row["patient"][1:])
            assert list(row) == ["filename", "label", "patient", "weight"]
            assert float(row["weight"]) == patient / 4
            assert row["filename"].startswith(f"images/patient{patient:02d}_")


def test_groups_from_names_are_written_as_a_column(patients, tmp_path, capsys):
    argv = (patients, "--group-regex", r"patient(\d+)_", "--val-fraction", "0")
    divided(capsys, *argv, "--output", tmp_path / "out")
    train, test = (rows(tmp_path / "out" / f"{part}.csv") for part in ("train", "test"))
    assert not (tmp_path / "out" / "val.csv").exists()
    assert all(f"patient{row['group']}_" in row["filename"] for row in train + test)
    assert {row["group"] for row in train}.isdisjoint(row["group"] for row in test)


def test_merged_groups_join_through_each_other():
    groups = ["a", "b", "c", "d", "b", "e"]
    assert merge_groups(groups, [(2, 3), (0, 1), (4, 3)]) == ["a", "a", "a", "a", "a", "e"]
    assert merge_groups(groups, []) == groups


# Copies


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """Two classes of 20, the last 10 of class a the same as its first 10."""
    folder = make_folder(tmp_path / "x", {"a": 20, "b": 20})
    for i in range(10):
        (folder / "a" / f"{i + 10:03d}.png").write_bytes((folder / "a" / f"{i:03d}.png").read_bytes())
    return folder


def test_the_same_bytes_on_two_sides_are_refused_with_the_ways_out(copies, tmp_path, capsys):
    line = refused(capsys, tmp_path / "out", copies)
    assert "a/0" in line
    assert "(same bytes)" in line
    assert all(flag in line for flag in ("--dedupe together", "--dedupe drop", "--allow-leakage"))


def test_copies_are_kept_together(copies, tmp_path, capsys):
    divided(capsys, copies, "--dedupe", "together", "--output", tmp_path / "out")
    part_of = {
        row["filename"]: part for part in PARTS for row in rows(tmp_path / "out" / f"{part}.csv") if row["label"] == "a"
    }
    assert len(part_of) == 20
    assert set(part_of.values()) == set(PARTS)
    for i in range(10):
        assert part_of[str(copies / f"a/{i:03d}.png")] == part_of[str(copies / f"a/{i + 10:03d}.png")]


def test_one_of_each_copy_is_kept(copies, tmp_path, capsys):
    printed = divided(capsys, copies, "--dedupe", "drop", "--output", tmp_path / "out")
    assert "copies of another image, left out: 10 (a/010.png, a/011.png, a/012.png and 7 more)" in printed
    kept = [row["filename"] for part in PARTS for row in rows(tmp_path / "out" / f"{part}.csv") if row["label"] == "a"]
    assert sorted(kept) == [str(copies / f"a/{i:03d}.png") for i in range(10)]


def test_leakage_can_be_allowed_and_is_then_told(copies, tmp_path, capsys):
    printed = divided(capsys, copies, "--allow-leakage", "--output", tmp_path / "out")
    assert "on two sides (--allow-leakage): " in printed
    shared = json.loads((tmp_path / "out" / "split.json").read_text())["shared"]
    assert shared
    assert all(leak["why"] == "same bytes" and len(set(leak["parts"])) == 2 for leak in shared)


def test_copies_under_two_labels_are_not_chosen_from(copies, tmp_path, capsys):
    (copies / "b" / "000.png").write_bytes((copies / "a" / "000.png").read_bytes())
    line = refused(capsys, tmp_path / "out", copies, "--dedupe", "drop")
    assert "a/000.png, a/010.png, b/000.png are the same image under a, b" in line


def test_groups_on_two_sides_are_refused(patients, tmp_path, capsys):
    line = refused(capsys, tmp_path / "out", patients, "--method", "first", "--group-column", "patient")
    assert "(group p" in line
    assert "--method stratified" in line


def test_near_duplicates_are_told_and_with_strict_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 8, "b": 8})
    for i in range(8):
        save(folder / "a" / f"{i:03d}.bmp", picture(12, 10, seed=i))
    assert "near-duplicates on two sides: " in divided(capsys, folder, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "split.json").read_text())["near_duplicates"]
    assert "of 64 bits apart" in refused(capsys, tmp_path / "strict", folder, "--strict")
    divided(capsys, folder, "--strict", "--near-distance", "-1", "--output", tmp_path / "not_looked_for")


# Files


def test_manifests_move_with_the_images_below_them(tmp_path, capsys):
    make_folder(tmp_path / "x" / "images", {"a": 9, "b": 9})
    divided(capsys, tmp_path / "x" / "images", "--output", tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "moved")
    manifests = {f"{part}_csv" if part != "train" else "csv": tmp_path / "moved" / f"{part}.csv" for part in PARTS}
    splits = open_splits(**manifests)
    assert splits.test is not None
    assert len(splits.train) + len(splits.val) + len(splits.test) == 18
    assert all(Path(file).is_file() for file in splits.train.files)


def test_odd_names_come_back_as_they_are(tmp_path, capsys):
    odd = ['a, "b".png', "ü.png", " leading.png", "new\nline.png", "semi;colon.png", "tab\t.png"]
    for i, name in enumerate(odd):
        save(tmp_path / name, picture(9, 9, seed=i, noise=60))
    quoted = "".join(
        '"' + name.replace('"', '""') + f'",{"xy"[i % 2]}\n' for i, name in enumerate(odd) if name[0] != " "
    )
    (tmp_path / "all.csv").write_text(f"filename,label\n./ leading.png,x\n{quoted}")
    divided(capsys, tmp_path / "all.csv", "--val-fraction", "0", "--test-fraction", "0.4", "--output", tmp_path)
    splits = open_splits(csv=tmp_path / "train.csv", val_csv=tmp_path / "test.csv")
    found = {os.path.relpath(file, tmp_path) for file in splits.train.files + splits.val.files}
    assert found == set(odd)


def test_an_older_split_is_replaced_with_force_alone(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 9, "b": 9})
    out = tmp_path / "out"
    divided(capsys, folder, "--output", out)
    (out / "mine.csv").write_text("precious")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "already holds split.json, test.csv, train.csv, val.csv" in refused(capsys, out, folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "already holds split.json" in refused(capsys, out, folder, "--folds", "2")
    divided(capsys, folder, "--folds", "2", "--force", "--output", out)
    assert sorted(path.name for path in out.iterdir()) == ["fold0", "fold1", "mine.csv", "split.json"]
    divided(capsys, folder, "--method", "first", "--force", "--output", out)
    assert sorted(p.name for p in out.rglob("*.csv")) == ["mine.csv", "test.csv", "train.csv"]


def test_a_disk_that_fills_leaves_the_old_split_whole(tmp_path, monkeypatch):
    write_all(tmp_path, {"a.csv": b"old a", "b.csv": b"old b"})
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_all(tmp_path, {"a.csv": b"new a", "b.csv": b"new b"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.csv": b"old a", "b.csv": b"old b"}


def test_a_report_that_is_not_ours_removes_no_file(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 9, "b": 9})
    (tmp_path / "out").mkdir()
    (tmp_path / "precious.csv").write_text("")
    (tmp_path / "out" / "split.json").write_text('{"files": ["../precious.csv", "keep.csv"]}')
    (tmp_path / "out" / "keep.csv").write_text("")
    divided(capsys, folder, "--force", "--output", tmp_path / "out")
    assert (tmp_path / "precious.csv").exists()
    assert (tmp_path / "out" / "keep.csv").exists()


def test_a_manifest_is_not_replaced_by_its_own_parts(tmp_path, capsys):
    divided(capsys, make_folder(tmp_path / "x", {"a": 9, "b": 9}), "--output", tmp_path)
    for more in (["--folds", "2"], ["--method", "first"]):
        assert "would be replaced by its own parts" in refused(
            capsys, tmp_path, tmp_path / "train.csv", "--force", *more
        )


# Mistakes


@pytest.mark.parametrize(("argv", "message"), [
    (["--folds", "1"], "--folds 1: there must be at least 2"),
    (["--folds", "99"], "40 images cannot make 99 parts"),
    (["--folds", "3", "--test-fraction", "0.1"], "split off a test set first"),
    (["--folds", "3", "--method", "first"], "--folds does not go with --method first"),
    (["--method", "first", "--val-fraction", "0.1"], "--val-fraction does not go with --method first"),
    (["--method", "first", "--dedupe", "together"], "use --dedupe drop"),
    (["--val-fraction", "0.5", "--test-fraction", "0.5"], "below 1"),
    (["--val-fraction", "-0.1"], "neither may be negative"),
    (["--val-fraction", "0", "--test-fraction", "0"], "above 0"),
    (["--test-fraction", "nan"], "above 0"),
    (["--near-distance", "65"], "from -1 to 64"),
    (["--workers", "0"], "from 1 to 1024"),
    (["--seed", "-1"], "--seed -1"),
    (["--group-column", "patient"], "no further column; for names use --group-regex"),
    (["--group-regex", "("], "is not a regular expression"),
    (["--group-regex", "a/"], "no group in parentheses"),
    (["--group-regex", r"(\d)9\."], "no match for 36 of 40 files: a/000.png, a/001.png, a/002.png and 33 more"),
    (["--method", "first", "--test-fraction", "0.01"], "test would be empty"),
    (["--group-regex", "(.)/"], "2 groups cannot make 3 parts"),
    (["--group-regex", "(.)/", "--val-fraction", "0"], "would have no image in train"),
    (["--group-column", "a", "--group-regex", "b"], "not allowed with"),
])  # fmt: skip
def test_mistakes_are_named_in_one_line(tmp_path, capsys, argv, message):
    folder = touch(tmp_path / "x", *(f"{name}/{i:03d}.png" for name in "ab" for i in range(20)))
    assert message in refused(capsys, tmp_path / "out", folder, *argv)
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_split(patients, tmp_path, capsys):
    out = tmp_path / "out"
    make_folder(tmp_path / "done" / "train", {"a": 2, "b": 2})
    assert "is split already" in refused(capsys, out, tmp_path / "done")
    assert "nowhere does not exist" in refused(capsys, out, tmp_path / "nowhere")
    assert "has patient, weight; for names" in refused(capsys, out, patients, "--group-column", "person")
    text = patients.read_text()
    patients.write_text(text.replace(",p7,", ",,", 2))
    assert "--group-column patient: empty for 2 of 60 files" in refused(
        capsys, out, patients, "--group-column", "patient"
    )
    (tmp_path / "file").write_text("in the way")
    patients.write_text(text)
    assert run(split.main, [str(patients), "--output", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_name_that_is_not_utf8_is_refused_in_print(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 9, "b": 9})
    (folder / "a" / "000.png").rename(folder / "a" / os.fsdecode(b"caf\xe9.png"))
    assert r"caf\xe9.png: its name is not UTF-8" in refused(capsys, tmp_path / "out", folder)


@pytest.mark.parametrize("end", ["csv", "parquet"])
def test_a_manifest_that_was_split_before_is_split_whole(patients, tmp_path, capsys, end):
    old = rows(patients)
    columns = {name: [row[name] for row in old] for name in old[0]}
    columns["split"] = ["train" if i % 3 else "test" for i in range(len(old))]
    source = tmp_path / f"old.{end}"
    if end == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), source)
    else:
        lines = [",".join(columns), *(",".join(fields) for fields in zip(*columns.values(), strict=True))]
        source.write_text("\n".join(lines))
    divided(capsys, source, "--group-column", "patient", "--output", tmp_path)
    new = [row for part in PARTS for row in rows(tmp_path / f"{part}.csv")]
    assert sorted(map(str, new)) == sorted(map(str, old))
