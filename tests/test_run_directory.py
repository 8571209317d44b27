"""`engine.run.RunDirectory`: what it writes when epochs are repeated."""

from __future__ import annotations

import csv

from engine.config import Config
from engine.run import RunDirectory


def test_an_epoch_that_is_repeated_has_its_draws_once(tmp_path):
    run = RunDirectory.create(Config(output=str(tmp_path / "run")))
    names = ("cat, small", "dog")
    for epoch, drawn in ((0, (5, 5)), (1, (4, 6)), (2, (0, 0)), (1, (3, 7)), (2, (6, 4))):
        run.write_draws(epoch, names, {"images": (8, 2), "expected": (5.0, 5.0), "drawn": drawn})
    with (run.path / "sampling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "class", "images", "expected", "drawn"]
    assert [(row["epoch"], row["class"], row["drawn"]) for row in rows] == [
        ("0", "cat, small", "5"),
        ("0", "dog", "5"),
        ("1", "cat, small", "3"),
        ("1", "dog", "7"),
        ("2", "cat, small", "6"),
        ("2", "dog", "4"),
    ]


def test_a_run_that_an_earlier_version_began_goes_on_with_more_columns(tmp_path):
    run = RunDirectory.create(Config(output=str(tmp_path / "run")))
    run.write_history([{"epoch": 0, "val_loss": 1.5}, {"epoch": 1, "val_loss": 1.25, "val_mcc": 0.5}])
    run.close()
    assert (run.path / "summary.csv").read_text() == "epoch,val_loss,val_mcc\n0,1.5,\n1,1.25,0.5\n"
