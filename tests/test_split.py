"""``engine.split``: what it writes, nothing on two sides, nothing overwritten."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from engine import split
from engine.cli import run
from engine.data import open_splits
from engine.data.listing import write_all
from engine.data.splitting import PARTS
from engine.errors import UserError
from tests.data_helpers import make_folder, picture, save
from tests.split_command import divided, names_in, refused, rows


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


# Folds


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


# Copies


def test_a_manifests_own_groups_stay_whole_without_a_flag(patients, tmp_path, capsys):
    patients.write_text(patients.read_text().replace("patient,", "group,", 1))
    divided(capsys, patients, "--output", tmp_path)
    of_part = [{row["group"] for row in rows(tmp_path / f"{part}.csv")} for part in PARTS]
    assert sum(map(len, of_part)) == len(set.union(*of_part)) == 24
    both = refused(capsys, tmp_path / "out", patients, "--group-regex", r"patient(\d+)_")
    assert "--group-regex: the manifest has a column group itself; leave one of the two out" in both


def test_groups_on_two_sides_are_refused(patients, tmp_path, capsys):
    line = refused(capsys, tmp_path / "out", patients, "--method", "first", "--group-column", "patient")
    assert "(group p" in line
    assert "--method stratified" in line


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
    (["--folds", "99"], "40 images cannot make 99 folds"),
    (["--folds", "3", "--test-fraction", "0.1"], "split off a test set first"),
    (["--folds", "3", "--method", "first"], "--folds does not go with --method first"),
    (["--method", "first", "--val-fraction", "0.1"], "--val-fraction does not go with --method first"),
    (["--group-duplicates", "near", "--near-distance", "-1"], "which looks for none: leave one out"),
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


def test_a_class_that_patterns_empty_is_refused_as_by_a_run(patients, tmp_path, capsys):
    sick = sorted({Path(row["filename"]).name[:10] + "*" for row in rows(patients) if row["label"] == "sick"})
    line = refused(capsys, tmp_path / "out", patients, "--exclude", *sick)
    assert "class 'sick' holds no image to train on but what --exclude leaves out" in line


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
