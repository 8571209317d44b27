"""The tuberculosis recipes on the layout of Kaggle's "tbx-11": the split, the options and the figures of the seed."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine import evaluate, train
from engine.build import make_augmentation, open_data
from engine.checkpoint import load_checkpoint
from engine.cli import run
from engine.command_line import read_recipe
from engine.config import Config
from engine.losses import CrossEntropyLoss, make_criterion
from engine.models import create_model
from engine.optim import make_optimizer
from engine.predictions import read_predictions
from tests.against_sklearn import compare_with_sklearn, require_sklearns_figures
from tests.image_folders import write_image

EXPERIMENTS = {
    "baseline": {},
    "l2": {"l2_loss": 0.001},
    "dropout": {"drop": 0.5},
    "sharpness": {"sharpness": 1.2, "sharpness_prob": 0.2},
    "contrast": {"color_jitter": (0.0, 0.2, 0.0, 0.0), "color_jitter_prob": 1.0},
}
SMALL = ("--model", "resnet18", "--img-size", "32", "--workers", "2")
HELD_OUT = {"health/h0001.png", "health/h0002.png", "health/h0003.png", "tb/tb0001.png", "tb/tb0002.png"}
"""int(0.2 * 19) and int(0.2 * 13) of the files below."""


@pytest.fixture(scope="module")
def imgs(tmp_path_factory) -> Path:
    """TBX11K/imgs: health and tb, the sick, and a folder test whose images have no class."""
    root = tmp_path_factory.mktemp("tbx") / "TBX11K" / "imgs"
    for label, (name, prefix, count) in enumerate((("health", "h", 19), ("tb", "tb", 13), ("sick", "s", 3))):
        for i in range(1, count + 1):
            write_image(root / name / f"{prefix}{i:04d}.png", (200 - 80 * label,) * 3, seed=100 * label + i)
    for i in range(3):
        write_image(root / "test" / f"t{i:04d}.png", (0, 0, 0), seed=1000 + i)
    return root


def trained(imgs: Path, output: Path, recipe: str, *flags: str) -> Path:
    argv = ["--recipe", recipe, "--data-dir", str(imgs), *SMALL, *flags, "--output", str(output)]
    assert run(train.main, argv) == 0
    return output


@pytest.fixture(scope="module")
def baseline(imgs, tmp_path_factory) -> Path:
    return trained(imgs, tmp_path_factory.mktemp("runs") / "baseline", "tbx11-baseline", "--epochs", "2")


@pytest.fixture(scope="module")
def on_test(imgs, tmp_path_factory) -> Path:
    flags = ("--epochs", "2", "--select-on", "test")
    return trained(imgs, tmp_path_factory.mktemp("runs") / "test", "tbx11-dropout", *flags)


def summary(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names(files, imgs: Path) -> set[str]:
    return {Path(file).relative_to(imgs).as_posix() for file in files}


def config_of(run_dir: Path) -> Config:
    return Config(**read_recipe(str(run_dir / "args.yaml")))


def test_the_experiments_are_the_baseline_but_for_one_thing_each():
    first = Config(**read_recipe("tbx11-baseline"))
    for name, change in EXPERIMENTS.items():
        assert Config(**read_recipe(f"tbx11-{name}")) == dataclasses.replace(first, **change)


def test_the_baseline_is_what_the_seed_has():
    config = Config(**read_recipe("tbx11-baseline"))
    assert (config.img_size, config.batch_size, config.epochs, config.keep_epochs) == (224, 4, 20, True)
    with torch.device("meta"):
        model = create_model(config.model, num_classes=2, **config.model_options())
    assert sum(p.numel() for p in model.parameters()) == 23_512_130

    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = make_optimizer(small, config)
    assert type(optimizer) is torch.optim.Adam
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 1e-4, (0.9, 0.999))

    criterion = make_criterion(config, np.array([3040, 640]), torch.device("cpu"))(0)
    assert type(criterion) is CrossEntropyLoss
    assert (criterion.weight, criterion.label_smoothing) == (None, 0.0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_augmentation_is_the_one_of_the_experiment(name):
    drawn = make_augmentation(Config(**read_recipe(f"tbx11-{name}"))).draw(
        0, 0, np.arange(2000), sizes=np.full((2000, 2), 32), img_size=32, rarity=np.ones(2000)
    )
    assert not drawn.warped.any()
    assert not drawn.erased.any()
    assert not drawn.sigma.any()
    assert not drawn.tone.any()
    assert drawn.jittered.all() == drawn.jittered.any() == (name == "contrast")
    sharpened = drawn.sharpness != 1
    assert np.allclose(drawn.sharpness[sharpened], 1.2)
    assert sharpened.mean() == pytest.approx(0.2 if name == "sharpness" else 0, abs=0.05)
    if name == "contrast":
        factors = drawn.color[:, 0, 0]
        np.testing.assert_allclose(drawn.color, factors[:, None, None] * np.eye(3), atol=1e-6)
        assert 0.8 <= factors.min() < 0.81
        assert 1.19 < factors.max() <= 1.2


def test_the_first_fifth_of_each_class_by_name_is_tested_and_nothing_else(baseline, imgs):
    predictions = read_predictions(baseline / "predictions.csv")
    assert set(predictions.files) == HELD_OUT
    assert predictions.class_names == ("health", "tb")
    splits = open_data(config_of(baseline))
    train_names, val_names = names(splits.train.files, imgs), names(splits.val.files, imgs)
    assert splits.train.class_counts().tolist() == [14, 9]
    assert splits.val.class_counts().tolist() == [2, 2]
    rest = {f"health/h{i:04d}.png" for i in range(4, 20)} | {f"tb/tb{i:04d}.png" for i in range(3, 14)}
    assert not train_names & val_names
    assert train_names | val_names == rest
    assert "test 5 (taken from train, the first 20% of each class by name)" in splits.description


def test_figures_are_scikit_learns_and_the_epoch_is_that_of_validation(baseline):
    metrics = require_sklearns_figures(baseline)
    assert (metrics["split"], metrics["selected_on"], metrics["positive_class"]) == ("test", "validation", "tb")
    rows = summary(baseline)
    assert [float(row["lr"]) for row in rows] == [1e-4, 1e-4]
    best = max(rows, key=lambda row: (float(row["val_f1"]), -float(row["val_loss"])))
    assert metrics["epoch"] == int(best["epoch"])
    assert not any(column.startswith("test_") for column in rows[0])


def test_every_epoch_is_kept_and_can_be_scored(baseline, tmp_path):
    assert sorted(path.name for path in (baseline / "epochs").iterdir()) == ["0000.pt", "0001.pt"]
    for epoch in range(2):
        output, predictions = tmp_path / f"{epoch}.json", tmp_path / f"{epoch}.csv"
        argv = [str(baseline), "--epoch", str(epoch), "--output", str(output), "--predictions", str(predictions)]
        assert run(evaluate.main, argv) == 0
        metrics = json.loads(output.read_text())
        assert (metrics["epoch"], metrics["split"], metrics["selected_on"]) == (epoch, "test", None)
        compare_with_sklearn(metrics, predictions)
    best = json.loads((baseline / "metrics.json").read_text())["epoch"]
    assert (tmp_path / f"{best}.csv").read_bytes() == (baseline / "predictions.csv").read_bytes()


def test_evaluate_finds_the_two_classes_in_the_folder_as_it_was_downloaded(baseline, imgs, tmp_path):
    argv = [str(baseline), "--data-dir", str(imgs), "--predictions", str(tmp_path / "all.csv")]
    assert run(evaluate.main, argv) == 0
    files = read_predictions(tmp_path / "all.csv").files
    assert len(files) == 32
    assert {file.split("/")[0] for file in files} == {"health", "tb"}


@pytest.mark.parametrize("name", ("l2", "sharpness", "contrast"))
def test_the_other_experiments_run_and_are_scored(name, imgs, tmp_path):
    finished = trained(imgs, tmp_path / name, f"tbx11-{name}", "--epochs", "1")
    metrics = require_sklearns_figures(finished)
    assert np.sum(metrics["confusion_matrix"]) == len(HELD_OUT)
    assert (finished / "epochs" / "0000.pt").exists()
    for option, value in EXPERIMENTS[name].items():
        assert getattr(config_of(finished), option) == value


def test_an_epoch_chosen_on_test_is_marked_everywhere(on_test, imgs, tmp_path, capsys):
    metrics = require_sklearns_figures(on_test)
    assert (metrics["split"], metrics["selected_on"]) == ("test", "test")
    assert metrics["temperature"] is load_checkpoint(on_test / "best.pt")["temperature"] is None
    assert "select_on: test" in (on_test / "args.yaml").read_text()

    rows = summary(on_test)
    assert not any(column.startswith("val_") for column in rows[0])
    best = max(rows, key=lambda row: (float(row["test_f1"]), -float(row["test_loss"])))
    assert metrics["epoch"] == int(best["epoch"])
    for name in ("f1", "accuracy", "loss"):
        assert float(best[f"test_{name}"]) == pytest.approx(metrics[name], abs=1e-6)

    splits = open_data(config_of(on_test))
    assert splits.val is None
    assert splits.train.class_counts().tolist() == [16, 11]
    assert names(splits.test.files, imgs) == HELD_OUT

    capsys.readouterr()
    assert run(evaluate.main, [str(on_test), "--output", str(tmp_path / "again.json")]) == 0
    assert "optimistic: the epoch was chosen on these very test images" in capsys.readouterr().out
    assert json.loads((tmp_path / "again.json").read_text()) == {"tta": "none", **metrics}


def test_a_run_that_chooses_on_test_is_resumed_with_the_same_images(on_test, capsys):
    before = (on_test / "metrics.json").read_text()
    assert run(train.main, ["--resume", str(on_test)]) == 0
    assert (on_test / "metrics.json").read_text() == before
    printed = capsys.readouterr().out
    assert "train 27, val none, test 5" in printed
    assert "optimistic" in printed


def test_thresholds_and_epochs_are_not_chosen_on_images_that_are_not_there(imgs, baseline, on_test, capsys):
    argv = ["--data-dir", str(imgs), "--classes", "health", "tb", "--select-on", "test", *SMALL]
    assert run(train.main, argv) == 2
    assert "--select-on test: the data has no test images; add --test-fraction 0.2" in capsys.readouterr().err
    assert run(evaluate.main, [str(on_test), "--sensitivity", "0.9"]) == 2
    assert "--sensitivity chooses thresholds on validation images" in capsys.readouterr().err
