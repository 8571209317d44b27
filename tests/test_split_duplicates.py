"""``engine.split`` on images that come twice: refused, kept on one side as a run keeps them, or left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.data import held_out, leakage, open_splits
from engine.data.splitting import PARTS
from tests.data_helpers import make_folder, picture, save, squares
from tests.split_command import divided, refused, rows


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
    assert all(flag in line for flag in ("--group-duplicates identical", "--dedupe", "--allow-leakage"))


def test_copies_are_kept_together(copies, tmp_path, capsys):
    divided(capsys, copies, "--group-duplicates", "identical", "--output", tmp_path / "out")
    part_of = {
        row["filename"]: part for part in PARTS for row in rows(tmp_path / "out" / f"{part}.csv") if row["label"] == "a"
    }
    assert len(part_of) == 20
    assert set(part_of.values()) == set(PARTS)
    for i in range(10):
        assert part_of[str(copies / f"a/{i:03d}.png")] == part_of[str(copies / f"a/{i + 10:03d}.png")]


def test_one_of_each_copy_is_kept(copies, tmp_path, capsys):
    printed = divided(capsys, copies, "--dedupe", "--output", tmp_path / "out")
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
    line = refused(capsys, tmp_path / "out", copies, "--dedupe")
    assert "a/000.png, a/010.png, b/000.png are the same image under a, b" in line


def test_near_duplicates_are_told_and_with_strict_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "x", {"a": 8, "b": 8})
    for i in range(8):
        save(folder / "a" / f"{i:03d}.bmp", picture(12, 10, seed=i))
    assert "near-duplicates on two sides: " in divided(capsys, folder, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "split.json").read_text())["near_duplicates"]
    line = refused(capsys, tmp_path / "strict", folder, "--strict")
    assert "of 64 bits apart" in line
    assert "add --group-duplicates near" in line
    divided(capsys, folder, "--strict", "--group-duplicates", "near", "--output", tmp_path / "tied")
    divided(capsys, folder, "--strict", "--near-distance", "-1", "--output", tmp_path / "not_looked_for")


# As a run keeps them on one side


@pytest.fixture
def lookalikes(tmp_path: Path) -> Path:
    """Two classes of 12, darker ones of the first three of a, which are 0 bits apart, and a copy of the first of b."""
    folder = tmp_path / "x"
    for i in range(24):
        save(folder / "ab"[i // 12] / f"{i:02d}.png", squares(i))
    for i in range(3):
        save(folder / "a" / f"{20 + i}.png", (0.9 * squares(i)).astype(np.uint8))
    (folder / "b" / "30.png").write_bytes((folder / "b" / "12.png").read_bytes())
    return folder


def parts_of(output: Path, names: Sequence[str] = PARTS) -> dict[str, set[str]]:
    return {name: {row["filename"] for row in rows(output / f"{name}.csv")} for name in names}


@pytest.mark.parametrize("kind", ("identical", "near"))
def test_duplicates_are_kept_on_one_side_as_a_run_does(lookalikes, tmp_path, capsys, kind):
    argv = ("--group-duplicates", kind, "--seed", "3", "--val-fraction", "0", "--test-fraction", "0.4")
    printed = divided(capsys, lookalikes, *argv, "--output", tmp_path / "out")
    written = parts_of(tmp_path / "out", ("train", "test"))
    of_run = open_splits(data_dir=lookalikes, duplicates=kind, seed=3, test_fraction=0.4)
    assert set(of_run.test.files) == written["test"]
    told = of_run.description.rpartition("; ")[2]
    assert told == {"identical": "2 images in 1 set", "near": "8 images in 4 sets"}[kind] + (
        " of duplicates kept on one side"
    )
    assert told in printed.splitlines()
    groups = {row["filename"]: row["group"] for part in written for row in rows(tmp_path / "out" / f"{part}.csv")}
    assert len(set(groups.values())) == 28 - {"identical": 1, "near": 4}[kind]
    assert groups[str(lookalikes / "b" / "12.png")] == groups[str(lookalikes / "b" / "30.png")] == "b/12.png"
    is_near = [groups[str(lookalikes / "a" / f"{20 + i}.png")] == f"a/0{i}.png" for i in range(3)]
    assert is_near == [kind == "near"] * 3
    assert ("near-duplicates on two sides" in printed) <= (kind == "identical")
    read = open_splits(csv=tmp_path / "out" / "train.csv", test_csv=tmp_path / "out" / "test.csv")
    assert set(read.test.groups) == {groups[file] for file in read.test.files}


def test_folds_are_those_of_a_run(lookalikes, tmp_path, capsys):
    argv = ("--folds", "3", "--group-duplicates", "near", "--seed", "3", "--output", tmp_path)
    divided(capsys, lookalikes, *argv)
    for fold in range(3):
        of_run = open_splits(data_dir=lookalikes, duplicates="near", seed=3, folds=3, fold=fold)
        assert set(of_run.test.files) == parts_of(tmp_path / f"fold{fold}", ["val"])["val"]


def test_near_duplicates_are_as_near_as_is_said_and_looked_at_once(lookalikes, tmp_path, capsys, monkeypatch):
    (lookalikes / "a" / "cut.png").write_bytes((lookalikes / "a" / "00.png").read_bytes()[:90])
    looked_at = []
    hashed = held_out.hash_pictures
    for module in (held_out, leakage):
        monkeypatch.setattr(module, "hash_pictures", lambda *args, **how: looked_at.append(1) or hashed(*args, **how))
    argv = ("--group-duplicates", "near", "--near-distance", "63", "--test-fraction", "0", "--val-fraction", "0.5")
    printed = divided(capsys, lookalikes, *argv, "--output", tmp_path / "out", "--strict")
    assert looked_at == [1]
    assert "28 images in 1 set of duplicates kept on one side, 1 of them under several labels" in printed
    assert "not compared: 1 files that cannot be decoded" in printed
    assert json.loads((tmp_path / "out" / "split.json").read_text())["not_compared"] == 1


def test_the_first_by_name_cannot_tear_what_is_tied_apart(lookalikes, tmp_path, capsys):
    argv = ("--method", "first", "--group-duplicates", "near")
    line = refused(capsys, tmp_path / "out", lookalikes, *argv)
    assert "nothing written, 4 on two sides: test a/00.png and train a/20.png (group a/00.png)" in line
    assert "use --method stratified" in line
    assert "on two sides (--allow-leakage): 4" in divided(
        capsys, lookalikes, *argv, "--allow-leakage", "--output", tmp_path / "out"
    )
