"""``engine.compare``: several recipes, several seeds, and what their figures say."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from engine import compare
from engine.cli import run
from engine.comparison import Outcome, compare_outcomes, format_csv, format_markdown, format_text, paired_t_test
from engine.predictions import Predictions, read_predictions
from tests.image_folders import write_folder

FLAGS = ("--model", "seresnet18", "--img-size", "16", "-b", "8", "-j", "2", "--epochs", "1", "--warmup-epochs", "0")
SEEDS = (0, 1)
METRICS = ("macro_f1", "loss")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Two recipes on a small folder; without --output."""
    root = tmp_path_factory.mktemp("compare")
    write_folder(root / "images", {"blue": 16, "green": 8, "red": 4}, test=5)
    (root / "plain.yaml").write_text("sampling: none\naug_prob: 0\nlr: 0.001\n")
    (root / "balanced.yaml").write_text("lr: 0.0015\n")
    recipes = [str(root / f"{name}.yaml") for name in ("plain", "balanced")]
    options = ["--seeds", *map(str, SEEDS), "--metrics", *METRICS, *FLAGS, "--data-dir", str(root / "images")]
    return ["--recipes", *recipes, *options]


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "compared"
    assert run(compare.main, [*arguments, "--output", str(output)]) == 0
    return output


@pytest.fixture
def copy(compared, tmp_path) -> Path:
    """By links: files are replaced, never written into, and the checkpoints are large."""
    return Path(shutil.copytree(compared, tmp_path / "copy", copy_function=os.link))


def metrics_of(output: Path, recipe: str) -> list[dict]:
    return [json.loads((output / recipe / f"seed{seed}" / "metrics.json").read_text()) for seed in SEEDS]


def test_figures_are_those_of_the_runs(compared):
    comparison = json.loads((compared / "comparison.json").read_text())
    assert (comparison["seeds"], comparison["against"]) == ([0, 1], "plain")
    for name in ("plain", "balanced"):
        for metric in METRICS:
            values = [metrics[metric] for metrics in metrics_of(compared, name)]
            found = comparison["recipes"][name]["metrics"][metric]
            assert found["values"] == values
            assert found["mean"] == pytest.approx(np.mean(values), abs=1e-12)
            assert found["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_each_run_has_its_recipe_and_its_seed(compared):
    for name, sampling in (("plain", "none"), ("balanced", "inverse")):
        for seed in SEEDS:
            told = yaml.safe_load((compared / name / f"seed{seed}" / "args.yaml").read_text())
            assert (told["sampling"], told["seed"], told["img_size"]) == (sampling, seed, 16)
            assert "test images, weights of epoch 0" in (compared / name / f"seed{seed}.log").read_text()


def test_tests_are_those_of_scipy_on_the_runs_files(compared):
    found = json.loads((compared / "comparison.json").read_text())["recipes"]["balanced"]
    plain, balanced = (metrics_of(compared, name) for name in ("plain", "balanced"))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(plain, balanced, strict=True)]
    differences = [b - a for a, b in pairs]
    error = np.std(differences, ddof=1) / np.sqrt(len(pairs))
    reach = stats.t.ppf(0.975, len(pairs) - 1) * error
    of_loss = found["paired_t_test"]["loss"]
    assert of_loss["difference"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert of_loss["interval"] == pytest.approx([np.mean(differences) - reach, np.mean(differences) + reach])
    assert of_loss["p"] == pytest.approx(2 * stats.t.sf(abs(np.mean(differences)) / error, len(pairs) - 1))

    for seed, pair in zip(SEEDS, found["mcnemar"], strict=True):
        runs = (read_predictions(compared / name / f"seed{seed}" / "predictions.csv") for name in ("plain", "balanced"))
        first, second = (predictions.labels == predictions.predictions for predictions in runs)
        b, c = int((first & ~second).sum()), int((second & ~first).sum())
        assert (pair["b"], pair["c"]) == (b, c)
        assert pair["p_exact"] == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0)


def test_table_and_pages_hold_the_same_figures(compared, arguments, capsys):
    capsys.readouterr()
    assert run(compare.main, [*arguments, "--output", str(compared)]) == 0
    printed = capsys.readouterr().out
    comparison = json.loads((compared / "comparison.json").read_text())
    with (compared / "comparison.csv").open() as file:
        rows = {(row["recipe"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * len(METRICS)
    page = (compared / "comparison.md").read_text()
    for (name, metric), row in rows.items():
        figures = comparison["recipes"][name]["metrics"][metric]
        assert [float(row[column]) for column in ("mean", "seed0", "seed1")] == [figures["mean"], *figures["values"]]
        for text in (printed, page):
            assert f"{figures['mean']:.4f}" in text
    assert "paired t-test over 2 seeds, against plain" in printed


def test_finished_runs_are_not_trained_again(compared, arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*.pt")}
    capsys.readouterr()
    assert run(compare.main, [*arguments, "--output", str(compared), "-j", "1"]) == 0  # which changes no figure
    assert capsys.readouterr().out.count("is finished") == 4
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("*.pt")} == before


def test_what_was_begun_is_gone_on_with(compared, copy, arguments):
    (copy / "plain" / "seed1" / "metrics.json").unlink()  # stopped while it was scored
    before_first_epoch = copy / "balanced" / "seed0"
    for path in before_first_epoch.iterdir():
        if path.name != "args.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = (copy / "plain" / "seed1" / "last.pt").stat().st_mtime_ns
    assert run(compare.main, [*arguments, "--output", str(copy)]) == 0
    assert (copy / "plain" / "seed1" / "last.pt").stat().st_mtime_ns == kept
    assert (copy / "comparison.csv").read_text() == (compared / "comparison.csv").read_text()


def test_a_changed_recipe_is_refused_before_anything_is_trained(copy, arguments, capsys):
    shutil.rmtree(copy / "plain" / "seed0")
    assert run(compare.main, [*arguments, "--output", str(copy), "--lr", "0.002"]) == 2
    message = capsys.readouterr().err
    assert f"{copy / 'plain' / 'seed1'}: was trained with lr 0.001, and --lr is now 0.002" in message
    assert "name another --output, or remove that run" in message
    assert not (copy / "plain" / "seed0").exists()


def test_a_run_that_fails_stops_the_comparison_and_the_others_are_kept(copy, arguments, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("lr: 1.0e+30\nopt: sgd\nsched: constant\n")
    plain, balanced = arguments[1:3]
    argv = ["--recipes", plain, str(tmp_path / "broken.yaml"), balanced, *arguments[3:], "--output", str(copy)]
    before = (copy / "comparison.json").read_text()
    assert run(compare.main, argv) == 2
    message = capsys.readouterr().err
    assert "broken, seed 0 (3 of 6): " in message
    assert str(copy / "broken" / "seed0.log") in message
    assert (copy / "comparison.json").read_text() == before
    assert (copy / "plain" / "seed1" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--recipes", "digits", "other/digits.yaml"), "two are named digits"),
        (("--recipes", "digits", "--seeds", "3", "3"), "name each once"),
        (("--recipes", "digits", "--metrics", "f2"), "--metrics f2: must be of macro_f1"),
        (("--recipes", "digits", "--metrics", "subtype.f1"), "a head of every recipe"),
        (("--recipes", "digits", "same.yaml"), "digits and same ask for the same training"),
    ),
)
def test_refused_command_lines(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for file in ("other/digits.yaml", "same.yaml"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("base: digits\n")
    assert run(compare.main, [*flags, "--output", "never"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("never").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output, message in (("file", "is a file; name a folder"), ("file/below", "cannot be made")):
        assert run(compare.main, ["--recipes", "digits", "--output", str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err


def outcome(right: list[bool], split: str = "test", *, files: str = "image", **metrics: Any) -> Outcome:
    """Of images of class 0, ``right`` or not."""
    n = len(right)
    predicted = torch.tensor([0 if of_image else 1 for of_image in right])
    names = tuple(f"{files}{i}" for i in range(n))
    predictions = Predictions(names, ("no", "yes"), torch.zeros(n).long(), predicted, torch.full((n, 2), 0.5))
    return Outcome({"split": split, "selected_on": "validation", **metrics}, predictions)


def test_equal_differences_and_one_pair_have_no_spread():
    assert paired_t_test([0.5], [0.75]).difference == 0.25
    for first, second in (([0.5], [0.75]), ([0.5, 0.625], [0.75, 0.875]), ([0.1, 0.2], [0.1, 0.2])):
        test = paired_t_test(first, second)
        assert (test.interval, test.p) == (None, None)


def test_one_seed_gives_the_figures_and_mcnemars_test_alone():
    recipes = {"a": [outcome([True, False], accuracy=0.5)], "b": [outcome([True, True], accuracy=1.0)]}
    comparison = compare_outcomes(recipes, (7,), ("accuracy",))
    assert comparison["recipes"]["b"]["metrics"]["accuracy"] == {"values": [1.0], "mean": 1.0, "sd": None}
    test = comparison["recipes"]["b"]["paired_t_test"]["accuracy"]
    assert test == {"difference": 0.5, "interval": None, "p": None}
    assert (comparison["recipes"]["b"]["mcnemar"][0]["b"], comparison["recipes"]["b"]["mcnemar"][0]["c"]) == (0, 1)
    assert "One seed has no spread" in format_text(comparison)


def test_recipes_on_other_images_are_shown_and_not_tested():
    recipes = {
        "a": [outcome([True], accuracy=1.0)],
        "b": [outcome([True], "validation", files="another", accuracy=1.0)],
    }
    comparison = compare_outcomes(recipes, (0,), ("accuracy",))
    assert {"paired_t_test", "mcnemar"}.isdisjoint(comparison["recipes"]["b"])
    text = format_markdown(comparison)
    assert "b is not tested: image0: is not among the second run's predictions" in text
    assert "test and validation images, seed 0" in text
    assert "Of b the epochs were chosen on the very images scored here" in text


def test_seeds_with_test_images_of_their_own_have_no_test_over_seeds():
    recipes = {
        name: [outcome([True], files=f"of-seed{seed}-", accuracy=value) for seed, value in enumerate(values)]
        for name, values in {"a": (0.25, 0.5, 0.5), "b": (0.5, 0.625, 0.75)}.items()
    }
    comparison = compare_outcomes(recipes, (0, 1, 2), ("accuracy",))
    test = comparison["recipes"]["b"]["paired_t_test"]["accuracy"]
    assert test == {"difference": pytest.approx(5 / 24), "interval": None, "p": None}
    text = " ".join(format_text(comparison).split())
    assert "no test over seeds is made" in text
    assert "paired t-test" not in text
    assert "the same images" not in text
    assert "+0.2083" in text
    fixed = {name: [outcome([True], accuracy=of.metrics["accuracy"]) for of in runs] for name, runs in recipes.items()}
    assert compare_outcomes(fixed, (0, 1, 2), ("accuracy",))["recipes"]["b"]["paired_t_test"]["accuracy"]["p"] < 0.2


def test_images_of_one_patient_are_tested_by_patient():
    texts = {}
    for groups in (None, tuple("abcdefgh"), tuple("aaaaaabc")):
        runs = [outcome(right, accuracy=0.5) for right in ([True] * 7 + [False], [False] * 7 + [True])]
        runs = [Outcome(of.metrics, dataclasses.replace(of.predictions, groups=groups)) for of in runs]
        comparison = compare_outcomes({"a": runs[:1], "b": runs[1:]}, (0,), ("accuracy",))
        (test,) = comparison["recipes"]["b"]["mcnemar"]
        texts[groups] = " ".join(format_text(comparison).split())
        assert f"{test['p_exact']:.4f}" in texts[groups]
        assert json.loads(json.dumps(test)) == test
    assert test["by_group"] == {"groups": 3, "b": 2, "c": 1}
    assert (test["b"], test["c"], test["p_exact"]) == (7, 1, 0.75)  # of +-6 +-1 +-1 those as far from 0 as 6
    by_image, of_one_each, by_patient = texts.values()
    assert by_image == of_one_each
    assert "by image recipe seed right in a alone right in it alone p b 0 7 1 0.0703" in by_image
    assert (
        "by group recipe seed right in a alone right in it alone groups for a groups for it p b 0 7 1 2 1" in by_patient
    )
    assert "p is of whole groups" in by_patient
    assert "group" not in by_image


def test_epochs_that_were_chosen_on_the_images_scored_here_are_said_to_flatter():
    for split, selected_on, said in (
        ("test", "validation", False),
        ("test", "test", True),
        ("validation", "validation", True),
    ):
        chosen = outcome([True], split, selected_on=selected_on, accuracy=1.0)
        text = " ".join(format_text(compare_outcomes({"a": [chosen]}, (0,), ("accuracy",))).split())
        assert ("Of a the epochs were chosen on the very images scored here: they flatter." in text) is said


def test_every_figure_stands_in_its_column_and_every_recipe_is_tested_against_the_first():
    right = {"a|b": ((3, 2), (0.25, 0.5)), "c": ((5, 6), (0.75, 0.5)), "d": ((0, 1), (0.5, 0.625))}
    recipes = {
        name: [outcome([i < n for i in range(8)], accuracy=value) for n, value in zip(*of_seeds, strict=True)]
        for name, of_seeds in right.items()
    }
    comparison = compare_outcomes(recipes, (3, 5), ("accuracy",))
    found = {name: recipe["paired_t_test"]["accuracy"] for name, recipe in list(comparison["recipes"].items())[1:]}
    assert [test["difference"] for test in found.values()] == [0.25, 0.1875]
    low, high = found["d"]["interval"]
    page = format_markdown(comparison).splitlines()
    for row in (
        "| recipe | mean | sd | seed 3 | seed 5 | difference | 95% interval | p |",
        "| a\\|b | 0.3750 | 0.1768 | 0.2500 | 0.5000 |  |  |  |",
        f"| d | 0.5625 | 0.0884 | 0.5000 | 0.6250 | +0.1875 | {low:+.4f} to {high:+.4f} | {found['d']['p']:.4f} |",
        "| recipe | seed | right in a\\|b alone | right in it alone | p |",
        "| c | 5 | 0 | 4 | 0.1250 |",
        "| d | 3 | 3 | 0 | 0.2500 |",
    ):
        assert row in page
    assert "The interval is 12.7 standard errors to each side" in format_markdown(comparison)
    *_, last = csv.DictReader(format_csv(comparison).splitlines())
    figures = ("mean", "sd", "seed3", "seed5", "difference", "low", "high", "p")
    assert [float(last[name]) for name in figures] == pytest.approx(
        [0.5625, 0.125 * 0.5**0.5, 0.5, 0.625, 0.1875, low, high, found["d"]["p"]]
    )
    assert (last["recipe"], last["split"], last["metric"]) == ("d", "test", "accuracy")


def test_f1_of_the_positive_class_is_shown_where_all_have_two_classes():
    two = outcome([True], positive_class="yes", f1=0.25)
    shown = list(compare_outcomes({"a": [two]}, (0,))["recipes"]["a"]["metrics"])
    assert shown == ["macro_f1", "accuracy", "balanced_accuracy", "auroc_macro_ovr", "f1"]
    assert "f1" not in compare_outcomes({"a": [two], "b": [outcome([True])]}, (0,))["recipes"]["a"]["metrics"]


def test_a_head_s_figure_is_named_by_the_head_and_an_undefined_one_has_no_mean():
    of_heads = [outcome([True], heads={"subtype": {"ece": value}}) for value in (0.5, None)]
    comparison = compare_outcomes({"a": of_heads, "b": of_heads}, (0, 1), ("subtype.ece",))
    figures = comparison["recipes"]["a"]["metrics"]["subtype.ece"]
    assert figures == {"values": [0.5, None], "mean": None, "sd": None}
    assert comparison["recipes"]["b"]["paired_t_test"] == {}
    format_text(comparison)
