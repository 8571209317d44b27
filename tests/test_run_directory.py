"""`engine.run.RunDirectory`: what it writes when epochs are repeated, and which pictures."""

from __future__ import annotations

import csv

import torch
from PIL import Image

from engine.config import Config
from engine.metrics import classification_metrics
from engine.predictions import Predictions
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


def test_pictures_are_those_of_the_predictions_draws_and_metrics_of_the_run_and_of_each_head(tmp_path):
    run = RunDirectory.create(Config(output=str(tmp_path / "run")))
    labels = torch.tensor([0, 1, 1, 0, 1])
    logits = torch.tensor([[2.0, 0], [0, 1], [1, 0], [1, 0], [0, 3]], dtype=torch.float64)
    names = ("cat", "dog")
    metrics = {**classification_metrics(logits, labels, names), "temperature": 0.5}
    metrics |= {"calibrated": {}, "epoch": 1, "heads": {"size": dict(metrics)}}
    predictions = Predictions(("a", "b", "c", "d", "e"), names, labels, logits.argmax(1), logits.softmax(1))
    run.write_predictions(predictions)
    run.write_predictions(predictions, "size")
    run.write_draws(0, names, {"images": (2, 3), "expected": (2.5, 2.5), "drawn": (3, 2)})
    run.write_pictures([{"epoch": 0, "val_loss": 1.5}, {"epoch": 1, "val_loss": 1.0}], metrics)
    kinds = ("confusion_matrix", "curves", "precision_recall", "reliability", "roc")
    expected = {f"{kind}{ending}.png" for kind in kinds for ending in ("", "_size")} | {"class_balance.png"}
    assert {path.name for path in run.path.glob("*.png")} == expected
    with Image.open(run.path / "reliability.png") as calibrated, Image.open(run.path / "reliability_size.png") as plain:
        assert calibrated.width > 1.5 * plain.width, "a head without calibrated figures has one diagram, not two"
