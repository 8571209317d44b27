"""Models with several named heads: their labels, loss, network and scores, and a run from end to end."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn

from engine import evaluate, predict, split, train
from engine.build import open_data
from engine.checkpoint import load_checkpoint
from engine.cli import run
from engine.command_line import read_recipe
from engine.config import Config
from engine.data import DATA_BACKENDS, Samples, make_loader, open_samples
from engine.data.samples import Head
from engine.data.torchvision_loader import _Batches
from engine.errors import UserError
from engine.fusion import fuse
from engine.head_specs import plain_specs, read_head_specs
from engine.heads import JointLoss, make_joint_criterion, open_heads, require_labels, restore_heads
from engine.losses import make_criterion
from engine.models import HeadShape, create_model, load_pretrained
from engine.predictions import predictions_path, read_predictions
from engine.run import RunDirectory
from engine.stages import make_freezing
from tests.against_sklearn import require_sklearns_figures
from tests.image_folders import write_image
from tests.test_train_step import HostReads

CPU = torch.device("cpu")
TREE = {
    "diagnosis": {"classes": {"benign": ["Benign"], "malignant": ["Early", "Pre", "Pro"]}, "hidden": 16, "drop": 0.5},
    "subtype": {
        "classes": {"Early": "Early", "Pre": "Pre", "Pro": "Pro"},
        "when": {"diagnosis": "malignant"},
        "weight": 0.5,
    },
}
CLASSES = ("Benign", "Early", "Pre", "Pro")
FOLDERS = {  # as published
    "Benign": (40, 200, 60),
    "[Malignant] Pre-B": (30, 60, 220),
    "[Malignant] Pro-B": (200, 180, 30),
    "[Malignant] early Pre-B": (220, 50, 40),
}


def samples(labels: list[int], **columns: Head) -> Samples:
    return Samples(tuple(f"{i}.png" for i in range(len(labels))), np.array(labels), CLASSES, heads=columns)


def test_labels_are_looked_up_merged_and_left_out_by_condition():
    stain = Head(("weak", "strong"), np.array([0, -1, 1, 1, -1]))
    specs = TREE | {"stain": {"column": "label_stain", "when": {"subtype": "Pre"}}}
    images = samples([0, 1, 2, 2, 3], stain=stain)
    heads = open_heads(Config(heads=specs), images)
    labels = {name: own.tolist() for name, own in heads.labels(images).items()}
    assert labels == {"diagnosis": [0, 1, 1, 1, 1], "subtype": [-1, 0, 1, 1, 2], "stain": [-1, -1, 1, 1, -1]}
    assert list(heads.ends()) == ["benign", "Early", "weak", "strong", "Pro"]
    assert heads.ends()["strong"] == (("diagnosis", 1), ("subtype", 1), ("stain", 1))


@pytest.mark.parametrize(
    "options",
    (
        {"smoothing": 0.1},
        {"class_weights": "balanced"},
        {"loss": "logit-adjustment"},
        {"loss": "focal", "class_weights": "effective"},
        {"loss": "ldam"},
    ),
    ids=("smoothing", "weights", "logit adjustment", "focal", "ldam"),
)
def test_the_joint_loss_is_the_weighted_sum_of_means_over_the_images_that_count(options):
    images = samples([0, 0, 0, 1, 2, 2, 3])
    config = Config(heads=TREE, **options)
    heads = open_heads(config, images)
    loss = make_joint_criterion(config, heads, images, CPU)(0)
    generator = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(5, shape.classes, generator=generator) for name, shape in heads.shapes().items()}
    indices = torch.tensor([0, 4, 6, 1, 5])  # of which three are malignant
    expected = torch.tensor(0.0)
    for name, factor, rows, labels in (
        ("diagnosis", 1.0, [0, 1, 2, 3, 4], [0, 1, 1, 0, 1]),
        ("subtype", 0.5, [1, 2, 4], [1, 2, 1]),
    ):
        counts = np.array([3, 4] if name == "diagnosis" else [1, 2, 1])
        expected += factor * make_criterion(config, counts, CPU)(0)(logits[name][rows], torch.tensor(labels))
    with HostReads() as reads:
        got = loss(logits, indices)
    torch.testing.assert_close(got, expected)
    assert reads.count == 0


def test_a_batch_in_which_nothing_counts_for_a_head_leaves_it_alone():
    criterion = nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1)
    loss = JointLoss({"a": criterion}, {"a": 1.0}, torch.tensor([[-1], [1]]))
    logits = torch.zeros(2, 3, requires_grad=True)
    loss({"a": logits}, torch.tensor([0, 0])).backward()
    assert not logits.grad.any()
    loss({"a": logits}, torch.tensor([0, 1])).backward()
    assert not logits.grad[0].any()
    assert logits.grad[1].isfinite().all()
    assert logits.grad[1].any()


SHAPES = {"diagnosis": HeadShape(2, 16, 0.5), "subtype": HeadShape(3)}


@pytest.mark.parametrize("name", ("seresnet18", "timm:resnet18"))
def test_a_network_with_heads_keeps_the_keys_of_its_trunk_fused_and_pretrained(name, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model(name.removeprefix("timm:"), num_classes=7)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    model = create_model(name, num_classes=4, heads=SHAPES)
    report = load_pretrained(model, name, tmp_path / "timm.pth")
    assert "classifier" in report.fresh[0]
    trunk = {key: t for key, t in source.state_dict().items() if not key.startswith("fc.")}
    state = model.state_dict()
    assert state.keys() - trunk.keys() == {
        *(f"heads.diagnosis.{layer}.{what}" for layer in (0, 3) for what in ("weight", "bias")),
        *(f"heads.subtype.1.{what}" for what in ("weight", "bias")),
    }
    assert all(torch.equal(state[key], t) for key, t in trunk.items())
    assert state["heads.diagnosis.0.weight"].shape == (16, 512)

    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    expected = model.eval()(images)
    assert {head: tuple(logits.shape) for head, logits in expected.items()} == {"diagnosis": (2, 2), "subtype": (2, 3)}
    fuse(model, Config(model=name))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    torch.save(state, tmp_path / "heads.pth")
    again = create_model(name, num_classes=4, heads=SHAPES)
    assert load_pretrained(again, name, tmp_path / "heads.pth").fresh == ()
    torch.testing.assert_close(again.eval()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As published: folders of classes, and no split."""
    root = tmp_path_factory.mktemp("smears")
    for label, (name, colour) in enumerate(FOLDERS.items()):
        for i in range(12):
            write_image(root / name / f"Snap_{i + 1:03d}.jpg", colour, seed=100 * label + i)
    return root


@pytest.fixture(scope="module")
def split_in_three(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("split")
    shares = ("--val-fraction", "0.25", "--test-fraction", "0.25")
    assert run(split.main, [str(folder), "--output", str(output), *shares]) == 0
    return output


@pytest.mark.parametrize("backend", DATA_BACKENDS)
def test_every_backend_gives_indices_where_it_is_asked_to(folder, backend):
    files = sorted(folder.rglob("*.jpg"))[:6]
    images = Samples(tuple(map(str, files)), np.array([0, 1] * 3), ("a", "b"))
    options = {"batch_size": 4, "img_size": 8, "device": CPU, "dtype": torch.float32, "training": False, "workers": 1}
    loader = make_loader(backend, images, by_index=True, **options)
    if backend == "torchvision":  # here, and not in a worker, which takes seconds to start
        batches = [_Batches(loader)[loader.planned(loader.order(0), 0, batch)] for batch in range(2)]
    else:
        batches = list(loader.epoch(0))
    assert [indices.tolist() for _, indices in batches] == [[0, 1, 2, 3], [4, 5]]


SMALL = ("--recipe", "leukemia-multitask", "--model", "resnet18", "--no-pretrained", "--img-size", "16", "-b", "8")
SHORT = ("-j", "1", "--warmup-epochs", "0")


@pytest.fixture(scope="module")
def finished(split_in_three, tmp_path_factory) -> Path:
    """Two epochs by the recipe on a small network, of which the second one after an interruption."""
    output = tmp_path_factory.mktemp("runs") / "heads"
    parts = {"--csv": "train.csv", "--val-csv": "val.csv", "--test-csv": "test.csv"}
    images = [word for flag, name in parts.items() for word in (flag, str(split_in_three / name))]
    flags = ("--epochs", "2", "--model-ema", "--model-ema-warmup", "--fused-se", "--eval-metric", "subtype.loss")
    with pytest.MonkeyPatch.context() as patch:
        write = RunDirectory.write_history

        def written_and_interrupted(*args):
            write(*args)
            raise KeyboardInterrupt

        patch.setattr(RunDirectory, "write_history", written_and_interrupted)
        assert run(train.main, [*SMALL, *SHORT, *images, *flags, "--output", str(output)]) == 130
    assert run(train.main, ["--resume", str(output)]) == 0
    return output


SUBTYPES = ("Pre-B", "Pro-B", "early Pre-B")


def assert_report_follows(output: Path, counts: dict[str | None, int]) -> None:
    """End to end, of the diagnosis, and of the subtype given malignant, from as many images as ``counts`` says."""
    metrics = require_sklearns_figures(output)
    classes = {None: ("benign", *SUBTYPES), "diagnosis": ("benign", "malignant"), "subtype": SUBTYPES}
    for head, names in classes.items():
        told = read_predictions(predictions_path(output / "predictions.csv", head))
        assert told.class_names == names
        assert len(told.files) == counts[head]
    assert metrics["heads"]["diagnosis"]["positive_class"] == "malignant"


def test_figures_of_each_head_and_end_to_end_follow_from_the_predictions(finished):
    assert_report_follows(finished, {None: 12, "diagnosis": 12, "subtype": 9})


def test_labels_of_two_columns_train_the_same_recipe(folder, tmp_path, capsys):
    """Of a benign image the subtype is empty, and of one malignant image it is not known."""
    lines = ["filename,label,label_subtype,split"]
    for name, subtype in zip(FOLDERS, ("", *SUBTYPES), strict=True):
        for i, image in enumerate(sorted((folder / name).iterdir())):
            told = "" if (name, i) == ("[Malignant] Pro-B", 11) else subtype
            lines.append(f"{image},{'malignant' if subtype else 'benign'},{told},{('train', 'val', 'test')[i // 4]}")
    (tmp_path / "smears.csv").write_text("\n".join(lines))
    argv = [*SMALL, *SHORT, "--csv", str(tmp_path / "smears.csv"), "--epochs", "1", "--output", str(tmp_path / "run")]
    assert run(train.main, argv) == 0
    assert_report_follows(tmp_path / "run", {None: 15, "diagnosis": 16, "subtype": 11})
    printed = capsys.readouterr().out
    titles = ("End to end: benign, Pre-B, Pro-B, early Pre-B", "Head diagnosis", "Head subtype, of diagnosis malignant")
    assert [title in printed for title in titles] == [True] * 3


def test_evaluate_gives_the_figures_of_the_run_and_leaves_out_a_head_without_images(finished, folder, tmp_path):
    expected = json.loads((finished / "metrics.json").read_text())
    predictions, output = tmp_path / "of.csv", tmp_path / "metrics.json"
    assert run(evaluate.main, [str(finished), "--output", str(output), "--predictions", str(predictions)]) == 0
    assert {"tta": "none", **expected} == json.loads(output.read_text())
    for name in ("", "_diagnosis", "_subtype"):
        assert (tmp_path / f"of{name}.csv").read_text() == (finished / f"predictions{name}.csv").read_text()

    benign = sorted((folder / "Benign").iterdir())
    (tmp_path / "benign.csv").write_text("filename,label\n" + "".join(f"{file},Benign\n" for file in benign))
    argv = [str(finished), "--csv", str(tmp_path / "benign.csv"), "--output", str(tmp_path / "benign.json")]
    assert run(evaluate.main, argv) == 0
    assert list(json.loads((tmp_path / "benign.json").read_text())["heads"]) == ["diagnosis"]


def test_evaluate_overwrites_the_table_of_no_head(finished, tmp_path, capsys):
    (tmp_path / "of_subtype.csv").write_text("precious")
    assert run(evaluate.main, [str(finished), "--predictions", str(tmp_path / "of.csv")]) == 2
    assert f"--predictions {tmp_path / 'of_subtype.csv'}: exists" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_predict_writes_what_the_run_says_of_every_head(finished, folder, tmp_path):
    output = tmp_path / "of.csv"
    tested = read_predictions(finished / "predictions_subtype.csv").files
    images = [file for file in tested if Path(file).parent.name == "[Malignant] Pre-B"]
    assert run(predict.main, [str(finished), *images, "--output", str(output)]) == 0
    with output.open() as file:
        rows = list(csv.DictReader(file))
    told = {name: read_predictions(finished / f"predictions{name}.csv") for name in ("", "_diagnosis", "_subtype")}
    for row in rows:
        for name, of_head in told.items():
            i = of_head.files.index(row["filename"])
            assert row[f"prediction{name}"] == of_head.class_names[of_head.predictions[i]]
            got = [float(row[f"prob{name}_{label}"]) for label in of_head.class_names]
            assert got == pytest.approx(of_head.probabilities[i].tolist(), rel=1e-4)
    assert len(rows) == 3


def test_end_to_end_probabilities_are_those_of_the_chain(finished):
    whole, diagnosis, subtype = (
        read_predictions(finished / f"predictions{head}.csv") for head in ("", "_diagnosis", "_subtype")
    )
    assert whole.files == diagnosis.files
    torch.testing.assert_close(whole.probabilities[:, 0], diagnosis.probabilities[:, 0])
    malignant = [whole.files.index(file) for file in subtype.files]
    chain = diagnosis.probabilities[malignant, 1, None] * subtype.probabilities
    torch.testing.assert_close(whole.probabilities[malignant, 1:], chain)
    assert whole.labels.tolist() == [list(FOLDERS).index(Path(file).parent.name) for file in whole.files]


def test_a_run_with_heads_keeps_their_classes_and_chooses_by_one_of_them(finished):
    best, last = load_checkpoint(finished / "best.pt"), load_checkpoint(finished / "last.pt")
    assert best["heads"] == {"diagnosis": ["benign", "malignant"], "subtype": ["Pre-B", "Pro-B", "early Pre-B"]}
    losses = [row["val_subtype.loss"] for row in last["history"]]
    assert best["epoch"] == int(np.argmin(losses))
    assert (finished / "confusion_matrix_subtype.png").stat().st_size > 0
    config = Config.from_mapping(yaml.safe_load((finished / "args.yaml").read_text()), "args.yaml")
    assert config.heads["subtype"]["when"] == {"diagnosis": "malignant"}


def test_labels_of_two_columns_of_a_manifest(tmp_path):
    """Of a benign image the second is empty; validation is taken from train, test knows the classes of train."""
    rows = [("benign", ""), ("malignant", "pro"), ("malignant", "pre")] * 3
    for i in range(9):
        write_image(tmp_path / f"{i}.png", (9 * i, 0, 0), seed=i, size=(4, 4))
    lines = [f"{i}.png,{label},{kind},{'test' if i > 5 else 'train'}\n" for i, (label, kind) in enumerate(rows)]
    (tmp_path / "all.csv").write_text("filename,label,label_kind,split\n" + "".join(lines))
    specs = {"diagnosis": {}, "kind": {"column": "label_kind", "when": {"diagnosis": "malignant"}}}
    config = Config(csv=str(tmp_path / "all.csv"), heads=plain_specs(read_head_specs(specs)))
    splits = open_data(config)
    heads = open_heads(config, splits.train)
    assert heads.class_names() == {"diagnosis": ["benign", "malignant"], "kind": ["pre", "pro"]}
    assert heads.labels(splits.test)["kind"].tolist() == [-1, 1, 0]
    assert list(heads.ends()) == ["benign", "pre", "pro"]
    require_labels(heads, splits)
    with pytest.raises(UserError, match="heads: kind: the validation images hold none of pre, pro"):
        require_labels(heads, replace(splits, val=splits.test.subset([0])))


@pytest.mark.parametrize("kinds", (("pro", "pro"), ("pro", ""), ("", "")))
def test_a_manifest_to_score_need_not_hold_every_class_of_a_head(tmp_path, kinds):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", (9 * i, 0, 0), seed=i, size=(4, 4))
    lines = [f"{i}.png,malignant,{kind}\n" for i, kind in enumerate(kinds)]
    (tmp_path / "some.csv").write_text("filename,label,label_kind\n" + "".join(lines))
    images = open_samples(("benign", "malignant"), csv=tmp_path / "some.csv")
    for spec in ({}, {"classes": {"early": ["pre"], "late": ["pro", "pros"]}}):
        config = Config(heads=plain_specs(read_head_specs({"diagnosis": {}, "kind": spec})))
        names = {"diagnosis": ["benign", "malignant"], "kind": list(spec["classes"]) if spec else ["pre", "pro"]}
        labels = restore_heads(config, names).labels(images)
        assert labels["diagnosis"].tolist() == [1, 1]
        assert labels["kind"].tolist() == [1 if kind else -1 for kind in kinds]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"subtype": {"when": {"grade": "malignant"}}}, "subtype: when: grade is no head that stands before it"),
        (
            {"subtype": {"when": {"diagnosis": "maligant"}}},
            r"diagnosis has no class maligant \(its classes: benign",
        ),
        ({"subtype": {"column": "label_kind"}}, "subtype: the images have no column label_kind; they have label"),
        ({"subtype": {"classes": {"a": ["Earl"], "b": ["Pro"]}}}, "subtype: label holds nothing of class a"),
        ({"subtype": {"hiden": 3}}, "subtype: .* must be a mapping with keys of column, classes, hidden"),
        ({"subtype": {"drop": 1.0}}, "subtype: drop 1.0 must be at least 0 and below 1"),
        ({"type": {}}, "type: not a name for a head"),
        ({"training": {}}, "training: not a name for a head"),
    ),
)
def test_heads_that_cannot_be_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as error:
        images = samples([0, 1, 2, 3])
        open_heads(Config(heads=plain_specs(read_head_specs(TREE | change))), images).labels(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"drop": 0.5}, "give each head its own drop"),
        ({"eval_metric": "grade.macro_f1"}, "HEAD.METRIC with a head of diagnosis, subtype"),
    ),
)
def test_options_that_heads_do_not_take_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Config(heads=plain_specs(read_head_specs(TREE)), **options)


def test_the_leukaemia_recipe_fits_both_ways_of_naming_the_folders():
    config = Config(**read_recipe("leukemia-multitask"))
    for names, subtypes in ((CLASSES, [-1, 2, 0, 1]), (tuple(FOLDERS), [-1, 0, 1, 2])):
        images = Samples(("a", "b", "c", "d"), np.arange(4), names)
        heads = open_heads(config, images)
        assert heads.labels(images)["subtype"].tolist() == subtypes
        assert list(heads.ends()) == ["benign", "Pre-B", "Pro-B", "early Pre-B"]


def test_the_leukaemia_network_is_as_described():
    """Two heads of 256 units over ResNet50, which is frozen up to its second stage, BatchNorm included."""
    config = Config(**read_recipe("leukemia-multitask"))
    heads = open_heads(config, Samples(("a", "b", "c", "d"), np.arange(4), CLASSES))
    assert heads.shapes() == {"diagnosis": HeadShape(2, 256, 0.5), "subtype": HeadShape(3, 256, 0.5)}
    assert [task.spec.weight for task in heads.tasks.values()] == [1.0, 1.0]
    with torch.device("meta"):
        model = create_model(config.model, num_classes=4, heads=heads.shapes())
    layers = [type(layer) for layer in model.heads["subtype"]]
    assert layers == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert model.heads["subtype"][0].in_features == 2048
    make_freezing(model, config)
    frozen = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[0] for name, norm in norms.items() if not norm.training} == {"bn1", "layer1", "layer2"}
