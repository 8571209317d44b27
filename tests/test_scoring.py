"""What a run and ``engine.evaluate`` leave behind: predictions.csv, from which metrics.json follows."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn

from engine import evaluate, train
from engine.calibration import fit_temperature
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.cli import run
from engine.config import Config
from engine.data import DaliLoader, Splits, TorchvisionLoader
from engine.data.samples import Head, Samples
from engine.device import Precision
from engine.errors import UserError
from engine.fingerprint import of_division, of_training
from engine.predictions import Predictions, names_below, read_predictions, write_predictions
from engine.scoring import Scored, final_metrics, score, score_images
from tests.data_helpers import CPU, make_loader, make_samples
from tests.image_folders import write_folder

FLAGS = ("--model", "seresnet18", "--img-size", "32", "-b", "8", "-j", "2", "--epochs", "1", "--warmup-epochs", "0")
FLOAT32 = Precision(CPU, False, "bfloat16")
NAMES = ("0", "1", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("images"), {"blue": 12, "red": 8}, test=5)
    for part in ("train", "test"):
        (folder / part / "red").rename(folder / part / "red, pale")
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    flags = (*FLAGS, "--val-fraction", "0.4", "--sensitivity", "0.8", "1")
    assert run(train.main, ["--data-dir", str(folder), *flags, "--output", str(output)]) == 0
    return output


def metrics_of(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_figure_follows_from_the_saved_predictions(finished):
    metrics = metrics_of(finished / "metrics.json")
    with (finished / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "truth", "prediction", "prob_blue", "prob_red, pale"]
    truth, prediction = ([row[name] for row in rows] for name in ("truth", "prediction"))
    positive = metrics["positive_class"]
    scores = np.array([float(row[f"prob_{positive}"]) for row in rows])
    is_positive = np.array(truth) == positive
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, prediction),
        "macro_f1": sklearn.metrics.f1_score(truth, prediction, average="macro", zero_division=0),
        "auroc": sklearn.metrics.roc_auc_score(is_positive, scores),
        "average_precision": sklearn.metrics.average_precision_score(is_positive, scores),
        "loss": sklearn.metrics.log_loss(is_positive, scores),
        "brier": sklearn.metrics.brier_score_loss(is_positive, scores),
        "mcc": sklearn.metrics.matthews_corrcoef(truth, prediction),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    for point in metrics["operating_points"]:
        called = scores >= point["threshold"]
        assert point["sensitivity"] == pytest.approx(called[is_positive].mean())
        assert point["specificity"] == pytest.approx(1 - called[~is_positive].mean())
    assert [point["wanted_sensitivity"] for point in metrics["operating_points"]] == [0.8, 1.0]


def test_saved_predictions_name_the_images_in_order_below_the_folder(finished, folder):
    files = sorted((folder / "test").rglob("*.*"))
    expected = [file.relative_to(folder).as_posix() for file in files]
    saved = read_predictions(finished / "predictions.csv")
    assert list(saved.files) == expected
    assert [saved.class_names[label] for label in saved.labels] == [file.parent.name for file in files]


def test_evaluate_writes_the_same_and_finds_the_same_thresholds(finished, tmp_path, capsys):
    files = ("--output", str(tmp_path / "new folder" / "again.json"), "--predictions", str(tmp_path / "again.csv"))
    assert run(evaluate.main, [str(finished), "--sensitivity", "0.8", "1", *files]) == 0
    assert "Operating points" in capsys.readouterr().out
    got, expected = metrics_of(tmp_path / "new folder" / "again.json"), metrics_of(finished / "metrics.json")
    assert got["tta"] == "none"
    for name in ("temperature", "calibrated", "intervals", "operating_points"):
        assert got[name] == expected[name], name
    assert (tmp_path / "again.csv").read_bytes() == (finished / "predictions.csv").read_bytes()


def test_evaluate_on_the_validation_images_reports_their_temperature(finished, folder, tmp_path, monkeypatch):
    """With no test set a run is scored on what its temperature was fitted on."""
    fitted = []
    open_data = evaluate.open_data

    def without_test(config):
        splits = open_data(config)
        return type(splits)(splits.train, splits.val, None, splits.description)

    def remember(scored, *args, **options):
        fitted.append(fit_temperature(scored.logits, scored.labels))
        return final_metrics(scored, *args, **options)

    final_metrics = evaluate.final_metrics
    monkeypatch.setattr(evaluate, "open_data", without_test)
    division = load_checkpoint(finished / "best.pt")["division"]
    monkeypatch.setattr(evaluate.fingerprint, "of_division", lambda splits: division)
    monkeypatch.setattr(evaluate, "final_metrics", remember)
    output = tmp_path / "validation.json"
    assert run(evaluate.main, [str(finished), "--sensitivity", "0.5", "--output", str(output)]) == 0
    metrics = metrics_of(output)
    assert metrics["split"] == "validation"
    assert load_checkpoint(finished / "best.pt")["temperature"] == metrics["temperature"] == fitted[0]
    assert "calibrated" not in metrics
    assert metrics["operating_points"][0]["sensitivity"] >= 0.5


def test_mirrored_images_are_averaged_where_asked(finished, tmp_path):
    outputs = {}
    for tta in ("none", "hflip"):
        path = tmp_path / f"{tta}.csv"
        argv = [str(finished), "--tta", tta, "--predictions", str(path), "--output", str(tmp_path / f"{tta}.json")]
        assert run(evaluate.main, argv) == 0
        outputs[tta] = read_predictions(path).probabilities
    assert not torch.equal(outputs["none"], outputs["hflip"])
    metrics = metrics_of(tmp_path / "hflip.json")
    assert (metrics["tta"], metrics["temperature"]) == ("hflip", None)
    assert "calibrated" not in metrics


def test_a_folder_that_has_grown_is_not_divided_again_and_called_test(finished, folder, tmp_path, capsys):
    """The new division of what the run was trained on would hand some of it to the images that it is scored on."""
    grown = shutil.copytree(folder, tmp_path / "grown")
    checkpoint = load_checkpoint(finished / "best.pt")
    checkpoint["args"]["data_dir"] = str(grown)
    moved = tmp_path / "best.pt"
    save_checkpoint(moved, {k: v for k, v in checkpoint.items() if k != "format"})
    again = tmp_path / "again.json"
    assert run(evaluate.main, [str(moved), "--output", str(again)]) == 0
    assert metrics_of(again)["accuracy"] == metrics_of(finished / "metrics.json")["accuracy"]
    shutil.copy(grown / "train" / "blue" / "000.png", grown / "train" / "blue" / "new.png")
    capsys.readouterr()
    assert run(evaluate.main, [str(moved), "--sensitivity", "0.8"]) == 2
    assert "not the images that the run was divided from" in capsys.readouterr().err
    assert run(evaluate.main, [str(moved), "--data-dir", str(grown)]) == 0


def test_the_order_of_a_manifest_is_no_other_division(tmp_path):
    images = make_samples(tmp_path, (4, 4))
    splits = Splits(images.subset(range(6)), images.subset((6, 7)), None, "")
    turned = replace(splits, train=images.subset(range(5, -1, -1)))
    assert of_division(turned) == of_division(splits)
    other = replace(splits, train=images.subset((0, 1, 2, 3, 4, 7)), val=images.subset((6, 5)))
    assert of_division(other) != of_division(splits)


def test_images_of_one_name_are_told_apart_by_their_folders_wherever_these_stand(tmp_path):
    """Where each patient has an image.png, another division has the same names and labels."""
    labels = np.array([0, 0, 0, 1, 1, 1])

    def divided(top: Path, tested: tuple[int, ...]) -> Splits:
        files = tuple(f"{top}/{'ab'[label]}/patient {i}/image.png" for i, label in enumerate(labels))
        images = Samples(files, labels, ("a", "b"))
        rest = [i for i in range(6) if i not in tested]
        return Splits(images.subset(rest[1:]), images.subset(rest[:1]), images.subset(tested), "")

    first, moved, other = divided(tmp_path, (1, 4)), divided(tmp_path / "new", (1, 4)), divided(tmp_path, (2, 5))
    assert of_division(moved) == of_division(first) != of_division(other)
    assert of_training(moved, Config()) == of_training(first, Config()) != of_training(other, Config())


def test_weights_are_of_what_a_run_goes_on_with_and_not_of_its_division(tmp_path):
    images = replace(make_samples(tmp_path, (4, 4)), weights=np.ones(8))
    splits = Splits(images, images.subset((6, 7)), None, "")
    heavier = replace(splits, train=replace(images, weights=np.arange(8.0)))
    assert of_division(heavier) == of_division(splits)
    assert of_training(heavier, Config()) != of_training(splits, Config())


def test_other_images_labels_or_heads_are_another_division_and_another_training(tmp_path):
    images = replace(make_samples(tmp_path, (4, 4)), heads={"h": Head(("x", "y"), np.array([0, 1] * 4))})
    splits = Splits(images.subset(range(4)), images.subset((4, 5)), images.subset((6,)), "")
    train = splits.train
    relabelled = replace(splits, train=replace(train, labels=1 - train.labels))
    of_head = replace(splits, train=replace(train, heads={"h": Head(("x", "y"), 1 - train.heads["h"].labels)}))
    tested = replace(splits, test=images.subset((7,)))
    for other in (relabelled, of_head, tested):
        assert of_division(other) != of_division(splits)
    turned = replace(splits, train=train.subset((3, 2, 1, 0)))  # of which chance draws others
    for other in (relabelled, of_head, turned):
        assert of_training(other, Config()) != of_training(splits, Config())
    validated = replace(splits, val=images.subset((5, 7)))
    on_validation, on_test = (Config(select_on=select_on) for select_on in ("validation", "test"))
    for other, looked_at, passed_over in ((validated, on_validation, on_test), (tested, on_test, on_validation)):
        assert of_training(other, looked_at) != of_training(splits, looked_at)
        assert of_training(other, passed_over) == of_training(splits, passed_over)


def test_files_are_not_overwritten_and_shares_are_shares(finished, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("precious")
    assert run(evaluate.main, [str(finished), "--predictions", str(tmp_path / "mine.csv")]) == 2
    assert "--predictions" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "precious"
    assert run(evaluate.main, [str(finished), "--sensitivity", "95"]) == 2
    assert "--sensitivity" in capsys.readouterr().err


class Columns(nn.Module):
    """Logits that tell left from right: the red of the left, of the middle and of the right."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 9 * torch.stack([part.mean((1, 2)) for part in images[:, 0].split((5, 6, 5), dim=2)], dim=1)


def test_mirroring_takes_the_mean_of_probabilities(tmp_path):
    loader = make_loader(make_samples(tmp_path, (5, 4, 3)))
    plain = score_images(Columns(), loader, NAMES, FLOAT32).logits.softmax(1)
    averaged = score_images(Columns(), loader, NAMES, FLOAT32, tta="hflip").logits.softmax(1)
    # mirroring swaps left and right, and with them the first logit and the last
    assert not torch.allclose(plain, plain.flip(1), atol=1e-3)
    torch.testing.assert_close(averaged, (plain + plain.flip(1)) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pipeline", (DaliLoader, TorchvisionLoader))
def test_a_file_lost_while_scoring_leaves_the_others_their_names(pipeline, tmp_path):
    samples = make_samples(tmp_path, (9, 4, 3))
    whole = score_images(Columns(), make_loader(samples), NAMES, FLOAT32)
    assert whole.files == samples.files
    assert torch.nn.functional.pdist(whole.logits).min() > 0.1
    lost = [0, 5, 12, 13, 14, 15]  # the first, one amid a batch, and a whole batch
    for i in lost:
        Path(samples.files[i]).write_bytes(b"no image")
    loader = make_loader(samples, pipeline=pipeline, max_bad_fraction=0.5, workers=1)
    kept = np.delete(np.arange(16), lost)
    for _ in range(2):  # they are lost in the first pass, and stay so
        scored = score_images(Columns(), loader, NAMES, FLOAT32)
        assert scored.files == tuple(samples.files[i] for i in kept)
        torch.testing.assert_close(scored.logits, whole.logits[kept], rtol=0, atol=0.05)  # pixels differ by a level
        assert torch.equal(scored.labels, whole.labels[kept])


@pytest.mark.parametrize(("groups", "drawn"), (("pqrs", "image"), ("ppqr", "group")))
def test_groups_of_one_image_each_are_no_groups(groups, drawn):
    labels = torch.tensor([0, 0, 1, 1])
    scored = Scored(tuple("abcd"), ("0", "1"), torch.eye(2).double()[labels], labels, groups=tuple(groups))
    metrics = final_metrics(scored, None, split="test", temperature=None, sensitivities=())
    assert (metrics["intervals_by"], metrics.get("groups")) == (drawn, 3 if drawn == "group" else None)


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    loader = make_loader(make_samples(tmp_path, (2, 1, 1)))
    broken = nn.Sequential(Columns(), nn.Threshold(1e9, float("nan")))
    for refuse in (score, score_images):
        with pytest.raises(UserError, match="cannot score: logits hold NaN or infinity in 4 of 4 samples"):
            refuse(broken, loader, NAMES, FLOAT32)


@pytest.mark.parametrize(
    ("groups", "folds"),
    ((None, None), (("a, b", "", "fold", "1"), None), (None, (0, 2, 1, 2)), (("p",) * 4, (1, 0, 0, 1))),
    ids=("plain", "groups", "folds", "both"),
)
def test_predictions_are_read_as_they_were_written(tmp_path, groups, folds):
    probabilities = torch.rand(4, 3, dtype=torch.float64) ** 40  # far below what nine digits can tell apart
    probabilities[0] = torch.tensor([1.0, 5e-324, 0.0], dtype=torch.float64)
    files = ('a, "b".png', "line\nbreak.png", "结核病/1.png", "not utf-8 \udcff.png")
    labels = torch.tensor([0, 1, 2, 1])
    told = (files, ("x", "y, z", "prob_w"), labels, labels.flip(0), probabilities)
    written = Predictions(*told, groups, folds)
    write_predictions(tmp_path / "p.csv", written)
    found = read_predictions(tmp_path / "p.csv")
    assert found.files == (*files[:3], "not utf-8 \\xff.png")
    assert (found.class_names, found.groups, found.folds) == (written.class_names, groups, folds)
    for name in ("labels", "predictions", "probabilities"):
        assert torch.equal(getattr(found, name), getattr(written, name)), name


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("", "not readable as predictions"),
        ("filename,label\na,b\n", "its columns are not filename,truth,prediction,prob_CLASS"),
        ("filename,truth,prediction,prob_a\n1,a,a,1\n2,a,b,1\n", "image 2: not a row of predictions of a"),
        ("filename,truth,prediction,prob_a\n1,a,a,most\n", "image 1"),
        ("filename,truth,prediction,prob_a\n1,a,a\n", "image 1"),
        ("filename,truth,prediction,prob_a\n\n", "image 1"),
        ("filename,truth,prediction,fold,prob_a\n1,a,a,last,1\n", "image 1"),
        ("filename,truth,prediction,prob_a,group\n1,a,a,1,p\n", "its columns are not filename"),
    ),
)
def test_what_is_no_table_of_predictions_is_refused(tmp_path, text, message):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_predictions(path)
    assert str(path) in str(refused.value)
    with pytest.raises(UserError, match="not readable as predictions"):
        read_predictions(tmp_path / "none.csv")


def test_names_are_relative_only_below_the_folder(tmp_path):
    files = (str(tmp_path / "a" / "b.png"), f"{tmp_path}x/c.png", "train[17]")
    assert names_below(files, tmp_path) == ("a/b.png", f"{tmp_path}x/c.png", "train[17]")


def test_a_checkpoint_of_before_temperatures_is_scored(finished, tmp_path):
    checkpoint = load_checkpoint(finished / "best.pt")
    del checkpoint["temperature"], checkpoint["args"]["sensitivity"]
    save_checkpoint(tmp_path / "old.pt", checkpoint)
    assert run(evaluate.main, [str(tmp_path / "old.pt"), "--output", str(tmp_path / "old.json")]) == 0
    assert metrics_of(tmp_path / "old.json")["temperature"] is None
