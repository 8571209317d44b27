"""`engine.cross_validate`: folds without leakage, and the figures of all images together and by fold."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from engine import cross_validate, evaluate, train
from engine.cli import run
from engine.data import Samples, open_splits
from engine.data.folds import hold_out_fold, join
from engine.data.samples import Head
from engine.errors import UserError
from engine.intervals import proportion_interval
from engine.metric_report import format_reports
from engine.metrics import METRIC_NAMES
from engine.pooling import Fold, pooled_metrics
from engine.predictions import Predictions, read_predictions
from engine.run import RunDirectory
from tests.data_helpers import make_folder
from tests.image_folders import COLOURS, write_folder, write_image

FLAGS = ("--model", "resnet18", "--img-size", "16", "-b", "12", "-j", "1", "--warmup-epochs", "0", "--opt", "momentum")
QUICK = (*FLAGS, "--data-backend", "resident", "--lr", "2e-2")
SHORT = (*QUICK, "--epochs", "2", "--val-fraction", "0.3", "--sensitivity", "0.8")
FOLDS = 3


def samples(labels: list[int], groups: list[str] | None = None, prefix: str = "", **columns) -> Samples:
    files = tuple(f"{prefix}{i:03d}.png" for i in range(len(labels)))
    return Samples(files, np.array(labels), ("a", "b", "c"), None if groups is None else tuple(groups), **columns)


@pytest.mark.parametrize("grouped", (False, True), ids=("images", "groups"))
@pytest.mark.parametrize("seed", range(3))
def test_every_image_is_in_one_fold_whatever_the_order_and_no_group_in_two(grouped, seed):
    labels = [0] * 23 + [1] * 12 + [2] * 6
    train = samples(labels, [f"p{i // 2}" for i in range(41)] if grouped else None)
    val = samples([0, 1, 2, 2], [f"q{i}" for i in range(4)] if grouped else None, "val ")
    divided = [hold_out_fold(join(train, val), 4, fold, seed) for fold in range(4)]
    assert sorted(file for _, held_out in divided for file in held_out.files) == sorted(train.files + val.files)
    for rest, held_out in divided:
        assert sorted(rest.files + held_out.files) == sorted(train.files + val.files)
        assert not set(rest.groups or ()) & set(held_out.groups or ())
        assert (rest.class_counts() > 0).all()
        assert (np.abs(held_out.class_counts() - np.array([24, 13, 8]) / 4) <= (2 if grouped else 1)).all()
    mixed = np.random.default_rng(0).permutation(41)
    again = hold_out_fold(join(train.subset(mixed), val), 4, 2, seed)[1]
    assert set(again.files) == set(divided[2][1].files)
    assert set(hold_out_fold(join(train, val), 4, 2, seed + 1)[1].files) != set(again.files)


def test_columns_and_pixels_of_validation_come_along():
    pixels = np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1).repeat(2, 2)
    grey = np.broadcast_to(pixels, (9, 1, 2, 3))
    head = Head(("x", "y"), np.array([0, 1, -1, 0, 1, 0]))
    options = {"weights": np.arange(9.0), "pixels": grey}
    train = samples([0, 0, 1, 1, 2, 2], heads={"h": head}, **{name: values[:6] for name, values in options.items()})
    of_val = {name: values[6:] for name, values in options.items()}
    val = samples([0, 1, 2], prefix="val ", heads={"h": Head(("x", "y"), np.array([1, 1, -1]))}, **of_val)
    rest, held_out = hold_out_fold(join(train, val), 3, 0, 0)
    assert rest.pixels.strides[3] == 0
    told = {file: i for i, file in enumerate(train.files + val.files)}
    for part in (rest, held_out):
        chosen = [told[file] for file in part.files]
        assert part.weights.tolist() == chosen
        assert np.array_equal(part.pixels, grey[chosen])
        assert part.heads["h"].labels.tolist() == [[0, 1, -1, 0, 1, 0, 1, 1, -1][i] for i in chosen]
    of_one = {"weight": {"weights": np.ones(3)}, "group": {"groups": list("pqr")}, "label_h": {"heads": val.heads}}
    for column, given in of_one.items():
        with pytest.raises(UserError, match=f"val has a column {column} and train, .* has none; give it to both"):
            join(samples([0, 1, 2]), samples([0, 1, 2], prefix="val ", **given))


def test_what_cannot_be_divided_is_refused_for_every_fold():
    with pytest.raises(UserError, match="--folds 7: 6 images cannot make 7 folds: ask for fewer"):
        hold_out_fold(samples([0, 0, 1, 1, 2, 2]), 7, 0, 0)
    with pytest.raises(UserError, match="--folds 3: 2 groups cannot make 3 folds"):
        hold_out_fold(samples([0, 0, 1, 1], list("pqpq")), 3, 0, 0)
    for fold in range(2):
        with pytest.raises(
            UserError, match=r"class 'c' would have no image in the training of fold\d: it has too few images"
        ):
            hold_out_fold(samples([0, 0, 1, 1, 2]), 2, fold, 0)
        with pytest.raises(UserError, match=r"class 'b' .* in the training of fold\d: it has too few groups"):
            hold_out_fold(samples([0, 0, 0, 1, 1, 1], list("pqrsss")), 2, fold, 0)


def test_folds_keep_a_patient_whole_whom_the_given_sets_share(tmp_path):
    make_folder(tmp_path, {"a": 6, "b": 6})
    rows = ["filename,label,split,group"]
    rows += [f"{label}/{i:03d}.png,{label},{('train', 'val')[i % 2]},p{i // 2}" for label in "ab" for i in range(6)]
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match="the group 'p0' is in both train and val"):
        open_splits(csv=tmp_path / "all.csv")
    splits = open_splits(csv=tmp_path / "all.csv", folds=3, val_fraction=0.5)
    assert len(splits.test) == 4
    assert set(splits.test.groups).isdisjoint((*splits.train.groups, *splits.val.groups))


@pytest.mark.parametrize("duplicates", ("none", "identical"))
def test_folds_do_not_depend_on_where_a_second_manifests_folder_stands(tmp_path, duplicates):
    """In one place its path comes before that of train, in the other after it; names in the two are alike."""
    for place in ("one/m", "two/m", "one/a", "two/z"):
        own = make_folder(tmp_path / place, {"a": 6, "b": 6})
        rows = "".join(f"{label}/{i:03d}.png,{label}\n" for label in "ab" for i in range(6))
        (own / "all.csv").write_text("filename,label\n" + rows)

    def told(place: str, val: str) -> list[set[str]]:
        top = tmp_path / place
        options = {"folds": 3, "val_fraction": 0.3, "imbalance_ratio": 0.5, "duplicates": duplicates}
        splits = open_splits(csv=top / "m" / "all.csv", val_csv=top / val / "all.csv", **options)
        parts = (splits.train, splits.val, splits.test)
        below = [{Path(file).relative_to(top).as_posix() for file in part.files} for part in parts]
        return [{re.sub("^[az]/", "other/", name) for name in part} for part in below]

    assert told("one", "a") == told("two", "z")


def write_manifest(folder: Path) -> Path:
    """Patients of two images each, a few of whom look like the other class, and a test set beside them."""
    lines = ["filename,label,group,split"]
    for label, (name, patients) in enumerate({"blue": 12, "red": 6}.items()):
        for i in range(2 * patients):
            colour = COLOURS["green"] if i // 2 % 3 == 0 else COLOURS[name]
            write_image(folder / name / f"{i}.png", colour, seed=100 * label + i)
            lines.append(f"{name}/{i}.png,{name},{name} {i // 2},train")
        write_image(folder / name / "test.png", COLOURS[name], seed=100 * label + 99)
        lines.append(f"{name}/test.png,{name},{name} of test,test")
    path = folder / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("images"))


def command(manifest: Path, output: Path) -> list[str]:
    return ["--csv", str(manifest), *SHORT, "--folds", str(FOLDS), "--output", str(output)]


def interrupted(name: str, calls: int, argv: list[str]) -> int:
    """The exit status where `calls` calls of that method of the run directory come to their end, and no more."""
    with pytest.MonkeyPatch.context() as patch:
        method, done = getattr(RunDirectory, name), []

        def counted(*args):
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(method(*args))

        patch.setattr(RunDirectory, name, counted)
        return run(cross_validate.main, argv)


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory) -> Path:
    """Stopped in its very first epoch, then amid the second fold."""
    output = tmp_path_factory.mktemp("runs") / "folds"
    assert interrupted("write_draws", 0, command(manifest, output)) == 130
    assert not (output / "fold0" / "last.pt").exists()
    assert interrupted("write_history", 3, command(manifest, output)) == 130
    assert (output / "fold1" / "last.pt").exists()
    assert not (output / "metrics.json").exists()
    assert run(cross_validate.main, command(manifest, output)) == 0
    return output


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_fold_is_the_run_of_that_fold_alone_wherever_it_was_stopped(finished, manifest, tmp_path, capsys):
    alone = tmp_path / "alone"
    argv = ["--csv", str(manifest), *SHORT, "--folds", str(FOLDS), "--fold", "1", "--output", str(alone)]
    assert run(train.main, argv) == 0
    assert "(fold 1 of 0 to 2; the data's own 2 test images are left alone)" in capsys.readouterr().out
    assert (alone / "predictions.csv").read_bytes() == (finished / "fold1" / "predictions.csv").read_bytes()
    assert metrics_of(alone) == metrics_of(finished / "fold1")


def test_evaluate_scores_a_fold_on_its_very_images(finished, tmp_path):
    files = ("--output", str(tmp_path / "again.json"), "--predictions", str(tmp_path / "again.csv"))
    assert run(evaluate.main, [str(finished / "fold1"), "--sensitivity", "0.8", *files]) == 0
    got, expected = json.loads((tmp_path / "again.json").read_text()), metrics_of(finished / "fold1")
    assert {name: got[name] for name in expected} == expected
    assert (tmp_path / "again.csv").read_bytes() == (finished / "fold1" / "predictions.csv").read_bytes()


def test_every_image_is_scored_once_by_a_run_that_has_seen_nothing_of_its_patient(finished, manifest):
    with (finished / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "truth", "prediction", "group", "fold", "prob_blue", "prob_red"]
    with manifest.open(newline="") as file:
        expected = [(row["filename"], row["label"], row["group"]) for row in csv.DictReader(file)]
    told = sorted((row["filename"], row["truth"], row["group"]) for row in rows)
    assert told == sorted(row for row in expected if "of test" not in row[2])
    for fold in range(FOLDS):
        splits = open_splits(csv=manifest, val_fraction=0.3, folds=FOLDS, fold=fold, seed=42)
        tested = {row["group"] for row in rows if row["fold"] == str(fold)}
        assert set(splits.test.groups) == tested
        assert not tested & {*splits.train.groups, *splits.val.groups}
        assert not set(splits.train.groups) & set(splits.val.groups)
        own = read_predictions(finished / f"fold{fold}" / "predictions.csv")
        pooled = read_predictions(finished / "predictions.csv")
        assert torch.equal(pooled.probabilities[torch.tensor(pooled.folds) == fold], own.probabilities)


def test_pooled_figures_follow_from_the_table_and_those_over_folds_from_the_folds(finished):
    metrics, told = metrics_of(finished), read_predictions(finished / "predictions.csv")
    truth, prediction, scores = told.labels.numpy(), told.predictions.numpy(), told.probabilities[:, 1].numpy()
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, prediction),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, prediction),
        "macro_f1": sklearn.metrics.f1_score(truth, prediction, average="macro", zero_division=0),
        "mcc": sklearn.metrics.matthews_corrcoef(truth, prediction),
        "auroc": sklearn.metrics.roc_auc_score(truth, scores),
        "average_precision": sklearn.metrics.average_precision_score(truth, scores),
        "loss": sklearn.metrics.log_loss(truth, scores),
        "brier": sklearn.metrics.brier_score_loss(truth, scores),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert all(0 < value < 1 for value in expected.values()), "or it would say little"
    assert (metrics["split"], metrics["intervals_by"], metrics["groups"]) == ("out of fold", "group", 18)

    of_folds = [metrics_of(finished / f"fold{fold}") for fold in range(FOLDS)]
    assert [row["fold"] for row in metrics["folds"]] == [0, 1, 2]
    for name in ("epoch", "temperature"):
        assert [row[name] for row in metrics["folds"]] == [fold[name] for fold in of_folds]
    for name, found in metrics["over_folds"].items():
        values = [fold[name] for fold in of_folds]
        assert [row[name] for row in metrics["folds"]] == values
        assert (found["mean"], found["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-12)
        assert found["folds"] == FOLDS
    (point,) = metrics["operating_points"]
    assert point["thresholds"] == [fold["operating_points"][0]["threshold"] for fold in of_folds]
    called = scores >= np.array(point["thresholds"])[list(told.folds)]
    assert point["sensitivity"] == pytest.approx(called[truth == 1].mean())
    assert point["specificity"] == pytest.approx(1 - called[truth == 0].mean())
    assert point["chosen_on"] == sum(fold["operating_points"][0]["chosen_on"] for fold in of_folds)
    patients = np.array(told.groups)
    for name, of in (("sensitivity", truth == 1), ("specificity", truth == 0)):
        right = torch.from_numpy(called == (truth == 1))[torch.from_numpy(of)]
        assert point[f"{name}_interval"] == proportion_interval(right, patients[of])


def test_a_second_call_trains_nothing_and_gives_the_same(finished, manifest, monkeypatch, capsys):
    before = {name: (finished / name).read_bytes() for name in ("metrics.json", "predictions.csv")}
    monkeypatch.setattr(cross_validate, "train", None)
    assert run(cross_validate.main, command(manifest, finished)) == 0
    assert before == {name: (finished / name).read_bytes() for name in before}
    printed = capsys.readouterr().out
    assert "36 images of 3 folds, each scored by the model that has not seen it:" in printed
    assert "95% intervals (of 18 groups):" in printed
    told = metrics_of(finished)["over_folds"]["macro_f1"]
    table = printed[printed.index("Folds, their mean") :].splitlines()
    rows = {line.split()[0]: line.split() for line in table if line}
    assert rows["mean"][3] == f"{told['mean']:.4f}"
    assert rows["sd"][3] == f"{told['sd']:.4f}"
    assert rows["pooled"][:2] == ["pooled", "36"]


def test_runs_of_other_options_or_images_are_not_pooled(finished, manifest, tmp_path, monkeypatch, capsys):
    def refused(*argv: str) -> str:
        assert run(cross_validate.main, list(argv)) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(cross_validate, "train", None)
    same = command(manifest, finished)
    assert "fold0 has 0.02; take that, or name another --output" in refused(*same, "--lr", "0.1")
    assert "fold0 has 42; take that, or name another --output" in refused(*same, "--seed", "7")
    assert "holds a run of engine.train" in refused(*same[:-1], str(finished / "fold0"))
    assert "required: --folds" in refused("--csv", str(manifest))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "predictions.csv").write_text("mine\n")
    assert "mine: holds predictions.csv, which is not of" in refused(*command(manifest, tmp_path / "mine"))
    (tmp_path / "mine" / "fold0").mkdir()
    (tmp_path / "mine" / "fold3").mkdir()
    assert "mine: holds fold3, which is not of" in refused(*command(manifest, tmp_path / "mine"))
    assert "is the folder of the images" in refused(
        *command(manifest, manifest.parent), "--data-dir", str(manifest.parent)
    )
    assert "blue, which is not of" in refused(*command(manifest, manifest.parent))
    others = write_manifest(tmp_path / "others")
    others.write_text("".join(line for line in others.open() if not line.startswith("blue/0.png")))
    assert "is not in fold 0 of these images: the run is of others" in refused(*command(others, finished))

    for source in finished.glob("fold?/*.[cjy]*"):
        copy = tmp_path / "copy" / source.relative_to(finished)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    *kept, last = (tmp_path / "copy" / "fold2" / "predictions.csv").read_text().splitlines()
    (tmp_path / "copy" / "fold2" / "predictions.csv").write_text("\n".join(kept) + "\n")
    message = refused(*command(manifest, tmp_path / "copy"))
    (tmp_path / "copy" / "fold1" / "metrics.json").write_text("{}")
    assert "metrics.json: not the figures of a run; remove it" in refused(*command(manifest, tmp_path / "copy"))
    assert f"1 of 36 images are in no predictions.csv, such as {last.split(',')[0]}; remove" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--folds", "5"), "--folds 5 needs --fold: one of 0 to 4, or all of them by python -m engine.cross_validate"),
        (("--folds", "5", "--fold", "5"), "--folds 5 does not go with --fold 5: one of 0 to 4"),
        (("--fold", "1"), "--fold 1 does nothing without --folds"),
        (("--folds", "1", "--fold", "0"), "--folds 1 does not work: it must be at least 2"),
    ),
)
def test_a_fold_is_one_of_several(flags, message, capsys):
    assert run(train.main, list(flags)) == 2
    assert message in capsys.readouterr().err


def fold(number: int, classes: tuple[str, ...], heads: dict[str, Fold] | None = None) -> Fold:
    generator = torch.Generator().manual_seed(number)
    probabilities = torch.rand(20, len(classes), dtype=torch.float64, generator=generator).softmax(1)
    labels = torch.randint(len(classes), (20,), generator=generator)
    told = Predictions(
        tuple(f"{number} {i}" for i in range(20)), classes, labels, probabilities.argmax(1), probabilities
    )
    figures = dict.fromkeys(METRIC_NAMES, 0.5) | {"accuracy": 0.25 * number, "auroc_macro_ovr": None}
    return Fold(number, told, {**figures, "temperature": 0.5 + number}, heads or {})


def test_each_image_is_calibrated_as_its_fold_is_and_heads_are_pooled_for_themselves():
    folds = [fold(k, ("a", "b", "c"), {"h": fold(k + 5, ("x", "y"))} if k else {}) for k in range(3)]
    folds[0].predictions.probabilities[3] = torch.tensor([1.0, 0.0, 0.0])
    metrics = pooled_metrics(folds)
    scaled = [one.predictions.probabilities.clamp(min=5e-324).log() / (0.5 + one.number) for one in folds]
    labels = torch.cat([one.predictions.labels for one in folds])
    expected = torch.nn.functional.cross_entropy(torch.cat(scaled), labels)
    assert metrics["calibrated"]["loss"] == pytest.approx(expected.item())
    assert metrics["temperature"] is None
    assert "at each fold's temperature" in format_reports(metrics)
    assert metrics["over_folds"]["accuracy"] == {"mean": 0.25, "sd": 0.25, "folds": 3}
    assert metrics["over_folds"]["auroc_macro_ovr"] == {"mean": None, "sd": None, "folds": 0}
    head = metrics["heads"]["h"]
    assert [row["fold"] for row in head["folds"]] == [6, 7]
    assert sum(row["support"] for row in head["per_class"].values()) == 40
    folds[1].metrics["temperature"] = None
    assert "calibrated" not in pooled_metrics(folds)


def test_the_image_that_is_a_fold_s_threshold_is_called_positive_and_classes_of_another_order_are_not_pooled():
    folds = [fold(k, ("a", "b")) for k in range(3)]
    for one in folds:
        threshold = one.predictions.probabilities[one.predictions.labels == 1, 1].min().item()
        point = {"class": "b", "wanted_sensitivity": 1.0, "threshold": threshold, "chosen_on": 4 + one.number}
        one.metrics["operating_points"] = [point]
    (point,) = pooled_metrics(folds)["operating_points"]
    assert (point["sensitivity"], point["chosen_on"]) == (1.0, 15)
    with pytest.raises(UserError, match="fold 4 has other classes or columns than fold 0"):
        pooled_metrics([folds[0], fold(4, ("b", "a"))])


def test_heads_are_cross_validated_too(tmp_path):
    data = write_folder(tmp_path / "images", {"blue": 8, "red": 8}, test=0)
    recipe = tmp_path / "heads.yaml"
    recipe.write_text("heads: {warm: {classes: {no: blue, yes: red}}, colour: {}}\n")
    flags = ("--recipe", str(recipe), "--data-dir", str(data), *QUICK, "--epochs", "1", "--folds", "2")
    assert run(cross_validate.main, [*flags, "--output", str(tmp_path / "out")]) == 0
    metrics = metrics_of(tmp_path / "out")
    for head in ("warm", "colour"):
        told = read_predictions(tmp_path / "out" / f"predictions_{head}.csv")
        assert len(set(told.files)) == 16
        accuracy = (told.labels == told.predictions).double().mean().item()
        assert metrics["heads"][head]["accuracy"] == pytest.approx(accuracy)
        assert [row["images"] for row in metrics["heads"][head]["folds"]] == [8, 8]
