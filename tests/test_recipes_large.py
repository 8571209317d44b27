"""Recipes on published layouts that come without patients and masks: long-tailed CIFAR-50, and ImageNet's folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import evaluate, train
from engine.build import open_data
from engine.cli import run
from engine.command_line import list_recipes, parse_args, read_recipe
from tests.against_sklearn import require_sklearns_figures
from tests.array_files import write_cifar100
from tests.data_helpers import picture
from tests.test_train import rows

FIFTY = tuple(read_recipe("cifar50-lt")["classes"])
SYNSETS = ("n01440764", "n01443537", "n01484850")


def test_cifar50_lt_from_the_published_files(tmp_path):
    """Two classes more than the fifty, which must not be seen."""
    write_cifar100(tmp_path, train=52 * 10, test=52 * 2, fine=(*FIFTY, "mouse", "mushroom"))
    output = tmp_path / "run"
    argv = ["--recipe", "cifar50-lt", "--data-dir", str(tmp_path), "--imbalance-ratio", "0.1", "--sampling", "inverse"]
    assert run(train.main, [*argv, "--epochs", "1", "--lr", "1e-2", "--img-size", "32", "--output", str(output)]) == 0
    metrics = require_sklearns_figures(output)
    assert metrics["split"] == "test"
    assert {name: of["support"] for name, of in metrics["per_class"].items()} == dict.fromkeys(FIFTY, 2)

    config, _ = parse_args(argv)
    splits = open_data(config)
    both = splits.train.class_counts() + splits.val.class_counts()
    assert both.tolist() == [max(1, int(10 * 0.1 ** (x / 49))) for x in range(50)]
    assert (splits.train.class_counts().min(), splits.val.class_counts().min()) == (1, 0)
    points = tmp_path / "points.json"
    assert run(evaluate.main, [str(output), "--sensitivity", "0.5", "--output", str(points)]) == 0
    chosen_on = [point["chosen_on"] for point in json.loads(points.read_text())["operating_points"]]
    assert chosen_on == splits.val.class_counts().tolist()
    drawn = (output / "sampling.csv").read_text().splitlines()[1:]
    expected = [float(line.split(",")[-2]) for line in drawn]
    assert expected == pytest.approx([len(splits.train) / 50] * 50, abs=1e-3)


@pytest.mark.parametrize("ratio", ["0.1", "0.02", "0.005"])
def test_cifar50_of_five_hundred_images_a_class(tmp_path, ratio):
    labels = np.arange(51 * 500) % 51
    np.savez(tmp_path / "x.npz", train_images=np.zeros((len(labels), 1, 1, 3), np.uint8), train_labels=labels)
    argv = ["--recipe", "cifar50-lt", "--data-dir", str(tmp_path / "x.npz"), "--classes", *map(str, range(50))]
    splits = open_data(parse_args([*argv, "--imbalance-ratio", ratio])[0])
    both = splits.train.class_counts() + splits.val.class_counts()
    assert both.tolist() == [int(500 * float(ratio) ** (x / 49)) for x in range(50)]


def test_imagenet_recipe_on_its_folders(tmp_path):
    data, output = tmp_path / "imagenet", tmp_path / "run"
    for c, synset in enumerate(SYNSETS):
        for i in range(9):
            write_jpeg(data / "train" / synset / f"{synset}_{10026 + 7 * i}.JPEG", seed=100 * c + i)
        for i in range(4):
            write_jpeg(data / "val" / synset / f"ILSVRC2012_val_{293 + 3 * i + c:08d}.JPEG", seed=100 * c + 50 + i)
    # as in the published set: one of its files is a PNG, and some are CMYK
    png = next((data / "train" / SYNSETS[0]).iterdir())
    Image.open(png).save(png, format="PNG")
    cmyk = next((data / "val" / SYNSETS[1]).iterdir())
    Image.open(cmyk).convert("CMYK").save(cmyk, format="JPEG")

    small = ["--model", "seresnet18", "--img-size", "48", "--train-img-sizes", "16", "24", "32", "-b", "8", "-j", "2"]
    argv = ["--recipe", "imagenet-seresnet50", "--data-dir", str(data), *small, "--epochs", "3", "--warmup-epochs", "1"]
    assert run(train.main, [*argv, "--output", str(output)]) == 0
    metrics = require_sklearns_figures(output)
    assert metrics["split"] == "validation"
    assert {name: of["support"] for name, of in metrics["per_class"].items()} == dict.fromkeys(SYNSETS, 4)
    assert len(rows(output)) == 3

    again = tmp_path / "again.json"
    assert run(evaluate.main, [str(output), "--data-dir", str(data / "val"), "--output", str(again)]) == 0
    assert f'"accuracy": {metrics["accuracy"]}' in again.read_text()


def test_recipes_are_listed_with_what_they_reproduce_and_nothing_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "72")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run(train.main, ["--list-recipes", "--data-dir", "/nowhere"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 72
    assert lines == list_recipes(72).splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert listed == sorted(listed)
    assert {"digits", "cifar50-lt", "imagenet-seresnet50", "leukemia-multitask"} <= {*listed}
    text = " ".join(" ".join(lines).split())
    assert "imagenet-seresnet50 SE-ResNet50 from scratch on ImageNet" in text
    assert not list(tmp_path.iterdir())


def write_jpeg(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(40 + seed % 9, 50, seed)).save(path, format="JPEG")
