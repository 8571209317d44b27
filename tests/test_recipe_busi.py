"""The ultrasound recipe on the layout of Kaggle's "Breast Ultrasound Images Dataset", with masks and duplicates."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import evaluate, train
from engine.build import make_augmentation, make_sampler, open_data
from engine.cli import run
from engine.command_line import read_recipe
from engine.config import Config
from engine.losses import class_weights, twice_corrected
from engine.models import create_model
from tests.against_sklearn import require_sklearns_figures
from tests.data_helpers import save, squares

COUNTS = {"benign": 20, "malignant": 12, "normal": 8}
COPY = ("benign/benign (2).png", "benign/benign (3).png")
BRIGHTER = ("benign/benign (5).png", "malignant/malignant (4).png")
"""Nearly the same picture, under two labels."""


@pytest.fixture(scope="module")
def busi(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("busi") / "Dataset_BUSI_with_GT"
    mask = np.zeros((32, 36, 3), dtype=np.uint8)
    for label, (name, count) in enumerate(COUNTS.items()):
        for i in range(1, count + 1):
            save(root / name / f"{name} ({i}).png", squares(100 * label + i))
            save(root / name / f"{name} ({i})_mask.png", mask)
    save(root / "benign" / "benign (4)_mask_1.png", mask)
    (root / COPY[1]).write_bytes((root / COPY[0]).read_bytes())
    save(root / BRIGHTER[1], (0.9 * squares(5) + 9).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def finished(busi, tmp_path_factory) -> tuple[Path, str, str]:
    """A small run that starts from weights without SE; and what it printed, on stdout and on stderr."""
    folder = tmp_path_factory.mktemp("runs")
    torch.save(create_model("resnet18", num_classes=1000).state_dict(), folder / "imagenet.pth")
    small = ("--model", "seresnet18", "--img-size", "32", "-b", "8", "-j", "2", "--epochs", "2", "--warmup-epochs", "0")
    argv = ["--recipe", "busi", "--data-dir", str(busi), *small, "--pretrained-path", str(folder / "imagenet.pth")]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(train.main, [*argv, "--output", str(folder / "run")]) == 0
    return folder / "run", out.getvalue(), err.getvalue()


def parts(run_dir: Path) -> dict[str, set[str]]:
    config = Config(**read_recipe(str(run_dir / "args.yaml")))
    splits, top = open_data(config), Path(str(config.data_dir))
    found = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: {Path(file).relative_to(top).as_posix() for file in part.files} for name, part in found.items()}


def test_every_image_is_in_one_set_and_no_mask_is_in_any(finished):
    found = parts(finished[0])
    names = [name for part in found.values() for name in part]
    assert sorted(names) == sorted(f"{name}/{name} ({i}).png" for name, n in COUNTS.items() for i in range(1, n + 1))
    for name, count in COUNTS.items():
        counts = {part: sum(file.startswith(name) for file in files) for part, files in found.items()}
        assert abs(counts["test"] - 0.2 * count) <= 1
        assert abs(counts["val"] - 0.15 * (count - counts["test"])) <= 1
        assert min(counts.values()) >= 1


def test_duplicates_are_in_one_set(finished):
    for pair in (COPY, BRIGHTER):
        assert len({part for part, files in parts(finished[0]).items() if set(pair) & files}) == 1


def test_the_run_says_what_it_left_out_and_tied_together(finished):
    _, out, err = finished
    assert "41 files left out by --exclude" in out
    assert "4 images in 2 sets of duplicates kept on one side, 1 of them under several labels" in out
    assert "SE gates (none in the weights; they start nearly open)" in out
    (line,) = (line for line in err.splitlines() if "warning" in line)
    assert line == "warning: val has one image alone of malignant, normal: recall there is 0 or 1"


def test_figures_are_scikit_learns_and_evaluate_gives_the_same(finished, tmp_path):
    metrics = require_sklearns_figures(finished[0])
    assert list(metrics["per_class"]) == list(COUNTS)
    assert (metrics["split"], metrics["selected_on"]) == ("test", "validation")
    argv = [str(finished[0]), "--output", str(tmp_path / "m.json"), "--predictions", str(tmp_path / "p.csv")]
    assert run(evaluate.main, argv) == 0
    assert json.loads((tmp_path / "m.json").read_text()) == {"tta": "none", **metrics}
    assert (tmp_path / "p.csv").read_bytes() == (finished[0] / "predictions.csv").read_bytes()


def test_a_resumed_run_sees_the_same_sets(finished):
    before = (finished[0] / "predictions.csv").read_bytes()
    assert run(train.main, ["--resume", str(finished[0])]) == 0
    assert (finished[0] / "predictions.csv").read_bytes() == before


def test_sampler_and_loss_make_up_for_the_imbalance_once(finished):
    config = Config(**read_recipe("busi"))
    assert (config.model, config.pretrained, config.early_stopping_patience) == ("seresnet50", True, 10)
    train_set = open_data(Config(**read_recipe(str(finished[0] / "args.yaml")))).train
    counts = train_set.class_counts()
    draws = make_sampler(train_set, config).expected()
    assert draws[0] > draws[1] > draws[2]
    together = draws * class_weights(config, counts)
    np.testing.assert_allclose(together, together[0])
    assert twice_corrected(config, counts) is None


def test_rarer_classes_are_augmented_more_often():
    drawn = [
        make_augmentation(Config(**read_recipe("busi"))).draw(
            0, 0, np.arange(4000), img_size=32, sizes=np.full((4000, 2), 40), rarity=np.full(4000, rarity)
        )
        for rarity in (0.0, 1.0)
    ]
    assert drawn[0].jittered.mean() == pytest.approx(0.3, abs=0.03)
    assert drawn[1].jittered.mean() == pytest.approx(0.3 + 0.5 * 0.7, abs=0.03)
