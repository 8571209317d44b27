"""The example of a search by Optuna: trials are runs, what is found is a recipe, and a search goes on."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest

optuna = pytest.importorskip("optuna")

from engine.cli import run  # noqa: E402
from engine.command_line import read_recipe  # noqa: E402
from engine.config import Config  # noqa: E402
from examples import optuna_search  # noqa: E402
from tests.image_folders import COLOURS, write_image  # noqa: E402

FLAGS = ("--model", "seresnet18", "--img-size", "16", "-b", "8", "-j", "2", "--epochs", "1", "--warmup-epochs", "0")


def test_search_goes_on_and_its_best_figure_is_that_of_the_best_run(tmp_path, capsys):
    for name, count in (("blue", 20), ("red", 8)):
        for i in range(count):
            write_image(tmp_path / "images" / name / f"{i}.png", COLOURS[name], seed=i)
    output = tmp_path / "search"
    argv = ["--data-dir", str(tmp_path / "images"), *FLAGS, "--eval-metric", "loss", "--output", str(output)]
    for trials in ("2", "1"):
        assert run(optuna_search.main, [*argv, "--trials", trials]) == 0

    values = []
    for number in range(3):
        metrics = json.loads((output / f"trial{number}" / "metrics.json").read_text())
        assert metrics["split"] == "validation"
        values.append(metrics["loss"])
    best = values.index(min(values))
    assert f"trial {best} of 3: val loss {min(values):.4f}" in capsys.readouterr().out
    tried = [read_recipe(str(output / f"trial{number}" / "args.yaml")) for number in range(3)]
    assert len({options["lr"] for options in tried}) == 3  # the first trials are not drawn again
    found = read_recipe(str(output / "best.yaml"))
    assert {**found, "output": None} == {**tried[best], "output": None}
    with (output / f"trial{best}" / "summary.csv").open() as rows:
        assert float(next(csv.DictReader(rows))["val_loss"]) == pytest.approx(min(values))
    other = [*argv, "--trials", "1"]
    other[other.index("loss")] = "accuracy"
    assert run(optuna_search.main, other) == 2
    assert "was searched with eval_metric loss, and --eval-metric is now accuracy" in capsys.readouterr().err


def test_mixup_is_searched_only_where_it_goes_with_the_rest():
    options = {"lr": 1e-3, "weight_decay": 0.1, "sampling_alpha": 0.5, "aug_prob": 0.1}
    ldam = Config(loss="ldam")
    found = optuna_search.options_of(optuna.trial.FixedTrial(options), ldam)
    assert "mixup" not in found
    dataclasses.replace(ldam, **found)
    with_mixup = optuna.trial.FixedTrial(options | {"mixup": 0.3})
    for config in (Config(), Config(heads={"subtype": {"classes": {"a": ["x"], "b": ["y"]}}})):
        found = optuna_search.options_of(with_mixup, config)
        assert found["mixup"] == 0.3
        dataclasses.replace(config, **found)
