"""The further columns of a manifest, and manifests in Parquet: what is wrong is named by line and field."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from engine import train
from engine.cli import run
from engine.data import Samples, open_samples, open_splits
from engine.data.manifest import read_manifest
from engine.data.samples import Head
from engine.errors import UserError
from tests.data_helpers import save_picture
from tests.test_data_splits import names, write_csv


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve files, 0.png to 11.png, in one folder."""
    for i in range(12):
        save_picture(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def refusal(path: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        open_splits(csv=path, **options)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write_parquet(path: Path, **columns) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


SPLIT_ROWS = ("0.png,a,train", "1.png,b,train", "2.png,a,val", "3.png,b,test", "4.png,a,train", "5.png,a,test")


def test_a_column_split_gives_three_sets_from_one_file(images):
    splits = open_splits(csv=write_csv(images / "x.csv", *SPLIT_ROWS, header="filename,label,split"))
    assert [names(part) for part in (splits.train, splits.val, splits.test)] == [
        ["0.png", "1.png", "4.png"],
        ["2.png"],
        ["3.png", "5.png"],
    ]
    assert splits.val.class_names == ("a", "b")
    assert "val 1 (given), test 2" in splits.description


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_validation_has_three_names(images, word):
    rows = ["0.png,a,train", "1.png,b,train", f"2.png,a,{word}"]
    splits = open_splits(csv=write_csv(images / "x.csv", *rows, header="filename,label,split"))
    assert (names(splits.val), splits.test) == (["2.png"], None)


def test_without_rows_of_validation_it_is_taken_from_train(images):
    rows = [f"{i}.png,{'ab'[i % 2]},{'test' if i > 7 else 'train'}" for i in range(12)]
    splits = open_splits(csv=write_csv(images / "x.csv", *rows, header="filename,label,split"), val_fraction=0.25)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (6, 2, 4)


def test_a_model_is_scored_on_the_rows_of_test(images):
    path = write_csv(images / "x.csv", *SPLIT_ROWS, header="filename,label,split")
    assert names(open_samples(("b", "a"), csv=path)) == ["3.png", "5.png"]
    path = write_csv(images / "y.csv", *SPLIT_ROWS[:3], header="filename,label,split")
    with pytest.raises(UserError, match="has a column split and no row of test"):
        open_samples(("a", "b"), csv=path)


def test_groups_weights_and_further_labels_stay_with_their_images(images):
    rows = [f"{i}.png,{'ab'[i % 2]},p{i // 2},{i / 2},{'' if i % 3 == 0 else 'xyz'[i % 3]}" for i in range(12)]
    path = write_csv(images / "x.csv", *rows, header="filename,label,group,weight,label_kind")
    splits = open_splits(csv=path, val_fraction=0.3)
    assert len(splits.val) > 0
    for part in (splits.train, splits.val):
        numbers = [int(Path(file).stem) for file in part.files]
        assert part.groups == tuple(f"p{i // 2}" for i in numbers)
        assert part.weights.tolist() == [i / 2 for i in numbers]
        assert part.heads["kind"].class_names == ("y", "z")
        assert part.heads["kind"].labels.tolist() == [i % 3 - 1 for i in numbers]
        assert part.heads["kind"].labels.dtype == np.int64


def test_without_the_columns_there_is_none_of_it(images):
    samples = read_manifest(write_csv(images / "x.csv", "0.png,a", "1.png,b"), None)
    assert (samples.groups, samples.weights, samples.pixels, samples.heads) == (None, None, None, {})


def test_further_labels_of_validation_are_numbered_as_those_of_train(images):
    rows = ["0.png,a,train,x", "1.png,b,train,y", "2.png,a,val,y", "3.png,a,val,"]
    splits = open_splits(csv=write_csv(images / "x.csv", *rows, header="filename,label,split,label_h"))
    assert splits.val.heads["h"].labels.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("filename,label,split", ["0.png,a,train", "1.png,b,dev"], "line 3: split 'dev' is none of train, val, valid"),
        ("filename,label,split", ["0.png,a,train", "1.png,b,"], "line 3: empty split"),
        ("filename,label,split", ["0.png,a,val", "1.png,b,test"], "has a column split and no row of train"),
        (
            "filename,label,split",
            ["0.png,a,train", "1.png,b,train", "2.png,c,val"],
            "line 4: unknown label 'c' (known: a, b)",
        ),
        ("filename,label,split", ["0.png,a,train", "1.png,b,train", "0.png,a,val"], "0.png twice: 'a' (line 2)"),
        ("filename,label,group", ["0.png,a,p1", "1.png,b, "], "line 3: empty group"),
        ("filename,label,weight", ["0.png,a,1", "1.png,b,"], "line 3: empty weight"),
        (
            "filename,label,weight",
            ["0.png,a,1", "1.png,b,-0.5"],
            "line 3: weight '-0.5' must be a number of at least 0",
        ),
        ("filename,label,weight", ["0.png,a,nan", "1.png,b,1"], "line 2: weight 'nan' must be"),
        ("filename,label,weight", ["0.png,a,inf", "1.png,b,1"], "line 2: weight 'inf' must be"),
        ("filename,label,weight", ["0.png,a,heavy", "1.png,b,1"], "line 2: weight 'heavy' must be"),
        ("filename,label,weight", ["0.png,a,0", "1.png,b,0"], "every weight is 0"),
        ("filename,label,label_h", ["0.png,a,x", "1.png,b,"], "column label_h needs at least two labels, and has x"),
        ("filename,label,label", ["0.png,a,x", "1.png,b,x"], "has the column 'label' twice"),
        ("filename,label", ["0.png,a", "1.png,b,c"], "line 3: 3 fields under a header of 2"),
    ],
)
def test_a_manifest_that_cannot_serve_is_named_by_line_and_field(images, header, rows, message):
    assert message in refusal(write_csv(images / "x.csv", *rows, header=header))


def test_a_new_further_label_in_validation_is_named(images):
    rows = ["0.png,a,train,x", "1.png,b,train,y", "2.png,a,val,z"]
    path = write_csv(images / "x.csv", *rows, header="filename,label,split,label_h")
    assert "line 4, column label_h: unknown label 'z' (known: x, y)" in refusal(path)


def test_a_folder_in_place_of_a_file_is_named_as_one(images):
    (images / "deep.png").mkdir()
    assert "deep.png (line 3, a folder)" in refusal(write_csv(images / "x.csv", "0.png,a", "deep.png,b"))


def test_two_sources_of_one_set_are_refused(images):
    path = write_csv(images / "x.csv", *SPLIT_ROWS, header="filename,label,split")
    other = write_csv(images / "y.csv", "7.png,a")
    for flag in ("val_csv", "test_csv"):
        assert f"--{flag.replace('_', '-')} {other}: --csv {path} has such rows itself" in refusal(
            path, **{flag: other}
        )


# Parquet


def test_parquet_is_read_as_csv_is(images):
    columns = {
        "filename": [f"{i}.png" for i in range(8)],
        "label": pyarrow.array([i % 2 for i in range(8)], pyarrow.int64()),
        "ignored": [{"deep": i} for i in range(8)],
        "split": pyarrow.array(["train"] * 5 + ["val", "test", "test"]).dictionary_encode(),
        "weight": [0.1 * i for i in range(8)],
        "group": [10, 10, 11, 11, 12, 13, 14, 14],
        "label_h": ["x", None, "y", "x", None, "y", "x", None],
    }
    by_content = write_parquet(images / "x.csv", **columns)
    splits = open_splits(csv=by_content)
    assert splits.train.class_names == ("0", "1")
    assert splits.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert splits.train.weights.tolist() == [0.1 * i for i in range(5)]
    assert splits.train.groups == ("10", "10", "11", "11", "12")
    assert splits.train.heads["h"].labels.tolist() == [0, -1, 1, 0, -1]
    assert (names(splits.val), names(splits.test)) == (["5.png"], ["6.png", "7.png"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"filename": ["0.png"]}, "has no column 'label'"),
        ({"filename": ["0.png", "1.png"], "label": ["a", None]}, "row 2: empty label"),
        ({"filename": ["0.png", "1.png"], "label": ["a", "b"], "weight": [1.0, float("nan")]}, "row 2: weight 'nan'"),
        (
            {"filename": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.string())},
            "lists no file",
        ),
    ],
)
def test_a_parquet_file_that_cannot_serve_is_named(images, columns, message):
    assert message in refusal(write_parquet(images / "x.parquet", **columns))


@pytest.mark.parametrize("part", [0.01, 0.5, 0.95])
def test_a_truncated_parquet_file_is_named(images, part):
    path = write_parquet(images / "x.parquet", filename=[f"{i}.png" for i in range(12)], label=["a", "b"] * 6)
    path.write_bytes(path.read_bytes()[: max(10, int(path.stat().st_size * part))])
    assert "is not a readable Parquet file" in refusal(path)


def test_missing_pyarrow_is_said_with_the_way_out(images, monkeypatch):
    path = write_parquet(images / "x.parquet", filename=["0.png", "1.png"], label=["a", "b"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'fused-se-engine[parquet]', or save it as CSV" in refusal(path)


def test_a_parquet_manifest_is_trained_on_by_its_weights(images):
    columns = {"filename": [f"{i}.png" for i in range(12)], "label": ["a", "b"] * 6, "weight": [1.0, 0.0] * 6}
    path = write_parquet(images / "x.parquet", **columns, split=["train"] * 8 + ["val"] * 2 + ["test"] * 2)
    argv = ["--csv", str(path), "--model", "seresnet18", "--img-size", "32", "-b", "4", "-j", "1", "--epochs", "1"]
    argv += ["--sampling", "column", "--warmup-epochs", "0", "--output", str(images / "run")]
    assert run(train.main, argv) == 0
    drawn = [line.split(",") for line in (images / "run" / "sampling.csv").read_text().splitlines()]
    assert drawn[0][-1] == "drawn"
    assert {row[1]: int(row[-1]) for row in drawn[1:]} == {"a": 8, "b": 0}


# The type


def test_what_does_not_fit_together_is_refused():
    files, labels = ("x", "y"), np.array([0, 1])
    for column in (
        {"groups": ("p",)},
        {"weights": np.ones(3)},
        {"heads": {"h": Head(("u", "v"), np.zeros(1, np.int64))}},
        {"pixels": np.zeros((1, 4, 4, 3), np.uint8)},
        {"pixels": np.zeros((2, 4, 4), np.uint8)},
        {"pixels": np.zeros((2, 4, 4, 3), np.float32)},
    ):
        with pytest.raises(ValueError, match=next(iter(column)) if "heads" not in column else "h"):
            Samples(files, labels, ("a", "b"), **column)
