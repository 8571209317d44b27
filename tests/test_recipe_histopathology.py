"""The histopathology recipe on the layout of Kaggle's "Breast Histopathology Images": PATIENT/0 and PATIENT/1."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import evaluate, train
from engine.build import make_augmentation, open_data
from engine.cli import run
from engine.command_line import read_recipe
from engine.config import Config
from engine.data import Augmentation
from engine.models import create_model
from engine.optim import make_optimizer
from engine.predictions import read_predictions
from tests.against_sklearn import require_sklearns_figures
from tests.image_folders import write_image

PATIENTS = {"8863": (7, 2), "9036": (5, 0), "9135": (8, 3), "10253": (6, 2), "10254": (9, 1), "12748": (4, 3)}
"""Patches without and with a carcinoma."""


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("idc") / "IDC_regular_ps50_idx5"
    for seed, (patient, counts) in enumerate(PATIENTS.items()):
        for label, count in enumerate(counts):
            for i in range(count):
                name = f"{patient}_idx5_x{1001 + 50 * i}_y{1101 + 50 * label}_class{label}.png"
                colour = ((230, 200, 220), (170, 90, 150))[label]
                write_image(root / patient / str(label) / name, colour, seed=100 * seed + 10 * label + i, size=(50, 50))
    return root


@pytest.fixture(scope="module")
def finished(patches, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    small = ("--epochs", "1", "-b", "8", "--img-size", "32", "-j", "2")
    assert (
        run(train.main, ["--recipe", "histopathology", "--data-dir", str(patches), *small, "--output", str(output)])
        == 0
    )
    return output


def test_patients_are_in_one_set_each_and_labels_are_those_of_the_names(finished):
    splits = open_data(Config(**read_recipe(str(finished / "args.yaml"))))
    sets = [splits.train, splits.val, splits.test]
    patients = [{Path(file).name.split("_")[0] for file in part.files} for part in sets]
    assert sum(map(len, patients)) == len(set.union(*patients)) == len(PATIENTS)
    assert all(patients)
    for part in sets:
        assert part.class_names == ("0", "1")
        assert [f"class{label}.png" for label in part.labels] == [file.rpartition("_")[2] for file in part.files]
        assert set(part.groups) == {Path(file).parents[1].name for file in part.files}


def test_patients_are_in_one_set_each_below_the_folder_of_the_archive_and_with_its_second_copy(patches, tmp_path):
    archive = tmp_path / "archive"
    for copy in (archive / patches.name, archive):
        shutil.copytree(patches, copy, dirs_exist_ok=True)
        splits = open_data(Config(**read_recipe("histopathology") | {"data_dir": str(archive)}))
        sets = (splits.train, splits.val, splits.test)
        found = [{Path(file).name.split("_")[0] for file in part.files} for part in sets]
        assert sum(map(len, found)) == len(set.union(*found)) == len(PATIENTS)


def test_figures_are_scikit_learns_and_evaluate_gives_the_same(finished, tmp_path):
    metrics = require_sklearns_figures(finished)
    assert metrics["positive_class"] == "1"
    assert run(evaluate.main, [str(finished), "--output", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text()) == {"tta": "none", **metrics}
    tested = {file.split("/")[0] for file in read_predictions(finished / "predictions.csv").files}
    assert tested < set(PATIENTS)


def test_each_class_is_drawn_equally_often(finished):
    """The seed's rule: class_weight * class_count is the same for every class."""
    with (finished / "sampling.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[0]["images"]) > 2 * int(rows[1]["images"])
    assert rows[0]["expected"] == rows[1]["expected"]


def test_the_options_are_the_seeds():
    config = Config(**read_recipe("histopathology"))
    assert (config.batch_size, config.epochs, config.sched, config.warmup_epochs) == (32, 50, "constant", 0)
    assert (config.class_weights, config.smoothing, config.data_backend) == ("none", 0.0, "resident")
    augmentation = make_augmentation(config)
    assert augmentation == Augmentation(rotation=0.3, affine=0.3, hflip=0.3, jitter=0.3)
    optimizer = make_optimizer(create_model("resnet18", num_classes=2), config)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (1e-4, 0.9, False, 0.0)
