"""`engine.report`: a run's page says what its files say, and nothing in it runs, loads or leaks."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml

from engine import report
from engine.build import open_data
from engine.cli import run
from engine.config import Config
from engine.data import drop_bad
from engine.device import Precision
from engine.grad_cam import explain
from engine.predictions import read_predictions
from engine.provenance import describe_run
from engine.report import drawings, mistakes, tables
from engine.report.runs import read_run
from engine.report.settings import without_folders
from tests.image_folders import write_folder
from tests.report_pages import HOSTILE, HOSTILE_FILE, TREE, make, table
from tests.report_runs import CLASSES, EPOCHS, write_run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose classes and files have names that would do harm, with its images and a model."""
    folder = tmp_path_factory.mktemp("hostile")
    return write_run(folder / "a <b>run", HOSTILE, images=folder / "private & images", files=(HOSTILE_FILE,))


@pytest.fixture(scope="module")
def page(hostile) -> str:
    assert run(report.main, [str(hostile), "--device", "cpu"]) == 0
    return (hostile / "report.html").read_text(encoding="utf-8")


def test_the_page_has_the_figures_of_metrics_json(hostile, page):
    metrics = json.loads((hostile / "metrics.json").read_text())
    shown = {label: float(value) for label, value, _ in table(page, "Figures over all classes")[1:]}
    keys = {"Macro-F1": "macro_f1", "Accuracy": "accuracy", "MCC": "mcc", "ECE, 15 bins": "ece", "Brier score": "brier"}
    assert {label: shown[label] for label in keys} == {label: metrics[key] for label, key in keys.items()}
    ranges = {label: text for label, _, text in table(page, "Figures over all classes")[1:]}
    for label in ("Macro-F1", "Accuracy"):
        assert ranges[label] == tables.span(metrics["intervals"][keys[label]])

    by_class = table(page, "Figures of each class against the rest")
    assert by_class[0] == ["Class", "Images", "Recall", "Precision", "Specificity", "F1", "AUROC", "AP"]
    keys = ("support", "recall", "precision", "specificity", "f1", "auroc", "average_precision")
    for name, *figures in by_class[1:-1]:
        assert [float(figure) for figure in figures] == [metrics["per_class"][name][key] for key in keys]
    assert [row[0] for row in by_class[1:-1]] == list(HOSTILE)
    low, high = metrics["intervals"]["per_class"][HOSTILE[0]]["recall"]
    assert f"<small>{low:.3f} to {high:.3f}</small>" in page
    for (name, *cells), intervals in zip(
        tables.class_table(metrics).rows, metrics["intervals"]["per_class"].values(), strict=True
    ):
        assert [cell.below for cell in cells] == [tables.span(intervals.get(key)) for key in keys], name
    macro = ("macro_recall", "macro_precision", "macro_f1", "auroc_macro_ovr", "average_precision_macro")
    assert [float(value) for value in by_class[-1][1:] if value] == [60, *(metrics[key] for key in macro)]

    tiles = {label: (cell.value, cell.below) for label, cell in tables.headline(metrics)}
    assert tiles.pop("ECE") == (metrics["ece"], f"{metrics['calibrated']['ece']:.3f} scaled")
    keys = ("macro_f1", "balanced_accuracy", "auroc_macro_ovr", "accuracy")
    assert list(tiles.values()) == [(metrics[key], tables.span(metrics["intervals"][key])) for key in keys]
    assert list(tiles) == ["Macro-F1", "Balanced accuracy", "AUROC, macro", "Accuracy"]

    confusion = table(page, "Confusion matrix: rows are the truth, columns the prediction")
    assert [[int(count) for count in row[1:]] for row in confusion[1:]] == metrics["confusion_matrix"]
    points = table(page, "Operating points")
    assert [float(row[2]) for row in points[1:]] == [point["threshold"] for point in metrics["operating_points"]]
    for row, point in zip(tables.operating_table(metrics).rows, metrics["operating_points"], strict=True):
        for cell, name in zip(row[-2:], ("sensitivity", "specificity"), strict=True):
            assert (cell.value, cell.below) == (point[name], tables.span(point[f"{name}_interval"]))
    scaled = {
        row[0]: [float(value) for value in row[1:]] for row in table(page, "Before and after temperature scaling")[1:]
    }
    keys = {"ECE, 15 bins": "ece", "Loss": "loss", "Brier score": "brier"}
    assert scaled == {label: [metrics[key], metrics["calibrated"][key]] for label, key in keys.items()}
    assert [row[0] for row in table(page, "Training by epoch")[1:]] == [str(epoch) for epoch in range(EPOCHS)]
    for name, images, drawn, times in table(page, "Images of each class")[1:-1]:
        assert int(images) == metrics["per_class"][name]["support"]
        assert (float(drawn), float(times)) == pytest.approx((21.5, 21.5 / int(images)))  # of 20, 21, 22 and 23


def test_names_that_would_do_harm_are_inert(page):
    for harm in ("<script", "<img src=x", "</style> "):
        assert harm not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&#34;&gt;&lt;img src=x onerror=alert(1)&gt;&amp;.png" in page
    assert "{{7*7}}" in page  # and not 49: a name is no template


def test_the_page_loads_nothing(page):
    assert "//" not in re.sub(r'"data:image[^"]*"', "", page)
    links = re.findall(r'<[^<>]*\s(?:xlink:)?(?:src|href)="([^"]*)"', page)
    assert {re.split("[,;:]|(?<=#)", link)[0] for link in links} == {"data", "#"}
    assert "default-src 'none'" in page


def test_the_worst_mistakes_stand_with_their_evidence(hostile, page):
    told = read_predictions(hostile / "predictions.csv")
    said = told.probabilities.amax(dim=1)
    wrong = sorted(torch.nonzero(told.predictions != told.labels).flatten().tolist(), key=lambda i: -said[i])
    gallery = page[page.index('<ul class="gallery">') : page.index("</ul>", page.index('<ul class="gallery">'))]
    assert re.findall(r"<small><bdi>(.*?)</bdi>", gallery) == [
        told.files[i].replace("&", "&amp;").replace('"', "&#34;").replace("<", "&lt;").replace(">", "&gt;")
        for i in wrong[:12]
    ]
    assert re.findall(r"called <strong>.*?</strong> with (\S+?)<", gallery) == [f"{said[i]:.3f}" for i in wrong[:12]]
    of_truth = [f"{told.probabilities[i, told.labels[i]]:.3f}" for i in wrong[:12]]
    assert re.findall(r"is <strong>.*?</strong> with (\S+?)<", gallery) == of_truth
    assert gallery.count("data:image/png;base64,") == 12
    assert gallery.count("data:image/jpeg;base64,") == 12
    assert len(page) < 1_000_000


def test_only_the_folded_options_have_the_paths_of_the_machine(hostile, page):
    visible = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert str(hostile.parent) in page
    assert str(hostile.parent) not in visible
    assert "private &amp; images" in visible


def test_the_same_run_gives_the_same_bytes_and_its_page_can_be_made_again(hostile, page):
    assert run(report.main, [str(hostile), "--device", "cpu"]) == 0
    assert (hostile / "report.html").read_text(encoding="utf-8") == page


def test_headings_and_sections_are_in_order_and_ids_are_unique(page, tmp_path):
    heads = write_run(tmp_path / "heads", heads=TREE)
    for shown in (page, make(tmp_path, heads, write_run(tmp_path / "plain"))):
        levels = [int(level) for level in re.findall(r"<h(\d)", shown)]
        assert levels.count(1) == 1
        assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
        ids = re.findall(r' id="([^"]+)"', shown)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]+)"', shown)) <= set(ids)


def test_options_that_differ_come_first(hostile, page):
    rows = {row[0]: row[1:] for row in table(page, "Options that differ from the defaults")[1:]}
    assert rows["--model"] == ["resnet18", "seresnet50"]
    assert rows["--data-dir"] == ["private & images", "none"]
    assert "--lr" not in rows
    assert "lr: 0.0005" in unescape(re.search(r"<pre.*?</pre>", page, re.DOTALL)[0])


def test_each_head_has_its_own_figures(tmp_path, undrawn):
    path = write_run(tmp_path / "run", heads=TREE)
    metrics = json.loads((path / "metrics.json").read_text())
    page = make(tmp_path, path)
    start = [page.index(f">Head {head}<") for head in ("diagnosis", "subtype")]
    assert "of these very images: in-sample, and too high" not in page
    for own, head in zip((page[start[0] : start[1]], page[start[1] :]), metrics["heads"].values(), strict=True):
        shown = {row[0]: row[1] for row in table(own, "Figures over all classes")[1:]}
        assert float(shown["Macro-F1"]) == head["macro_f1"]
        positive = {
            row[0]: row[1] for row in table(own, f"Figures of the positive class, {head['positive_class']}")[1:]
        }
        assert float(positive["Sensitivity"]) == head["recall"]
        assert float(positive["Specificity"]) == head["specificity"]
        intervals = {row[0].text: row[2].text for row in tables.binary_table(head).rows}
        of_class = {name == head["positive_class"]: of for name, of in head["intervals"]["per_class"].items()}
        assert intervals["Sensitivity"] == tables.span(of_class[True]["recall"])
        assert intervals["Specificity"] == tables.span(of_class[False]["recall"])


@pytest.mark.parametrize("when", ({"when": {"diagnosis": "malignant"}}, {}), ids=("divided", "side by side"))
def test_figures_are_called_end_to_end_only_where_a_head_divides_another(tmp_path, undrawn, when):
    subtype = {name: value for name, value in TREE["subtype"].items() if name != "when"} | when
    page = make(tmp_path, write_run(tmp_path / "run", heads=TREE | {"subtype": subtype}))
    assert ("The figures above are end to end" in page) is bool(when)
    assert ("The figures above are those of the first head." in page) is not bool(when)


def test_drawings_are_of_the_positive_class_the_temperature_and_the_epoch_of_the_run(tmp_path, undrawn):
    shown = read_run(write_run(tmp_path / "run", ("a", "b")), "run")
    told, metrics = shown.predictions[None], dict(shown.metrics)
    for draw, title in (
        (drawings.draw_roc_curves, "ROC"),
        (drawings.draw_precision_recall_curves, "Precision and recall"),
    ):
        assert draw(told, metrics | {"positive_class": "a"}).label.startswith(f"{title}: a against the rest")
    (point,) = metrics["operating_points"]
    assert f"sensitivity {point['sensitivity']:.3f} (0.9 wanted)" in drawings.draw_roc_curves(told, metrics).label
    scaled = f"at temperature 1.3: ECE {metrics.pop('calibrated')['ece']:.4f}"
    assert scaled in drawings.draw_reliability_diagram(told, shown.metrics).label
    assert scaled not in drawings.draw_reliability_diagram(told, metrics).label
    assert "epoch 2, which is kept" in drawings.draw_own_curves(shown).label


def test_an_option_without_a_folder_leaves_sentences_as_they_are():
    text = "3 images. Of a/data, the scans."
    assert without_folders(text, {"data_dir": ".", "output": "images"}) == text
    assert without_folders(text, {"data_dir": "a/data"}) == "3 images. Of data, the scans."


def test_what_the_intervals_count_as_independent_is_said(tmp_path, undrawn):
    page = make(tmp_path, write_run(tmp_path / "by image"))
    assert "Images count as independent" in page
    (tmp_path / "page.html").unlink()
    page = make(tmp_path, write_run(tmp_path / "by patient", patients=17))
    assert "Images count as independent" not in page
    assert 'whole groups (patients), of which there are <data value="17">17</data>' in page
    assert "divided by the design effect of the groups" in page


def test_with_heads_each_mistake_is_explained_by_the_head_that_said_it(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", heads=TREE, images=tmp_path / "images")
    asked = []

    def explained(model, samples, config, device, *, labels, head):
        shown = [file.removeprefix(f"{tmp_path / 'images'}/") for file in samples.files]
        asked.extend(zip(shown, [head] * len(shown), labels, strict=True))
        return explain(model, samples, config, device, labels=labels, head=head)

    monkeypatch.setattr(mistakes, "explain", explained)
    found, remark = mistakes.find_mistakes(read_run(path, "run"), torch.device("cpu"))
    assert remark == ""
    assert len(found) == 12
    assert all(mistake.evidence is not None and mistake.truth != mistake.prediction for mistake in found)
    of_class = {"benign": ("diagnosis", 0), "early": ("subtype", 0), "late": ("subtype", 1)}
    assert sorted(asked) == sorted((mistake.file, *of_class[mistake.prediction]) for mistake in found)


def test_a_run_that_chose_on_the_test_images_has_their_curves(tmp_path, undrawn):
    path = write_run(tmp_path / "run", select_on="test")
    for file, old, new in (("summary.csv", "val_", "test_"), ("metrics.json", "{", '{"selected_on": "test",')):
        (path / file).write_text((path / file).read_text().replace(old, new, -1 if old == "val_" else 1))
    page = make(tmp_path, path)
    columns, *rows = table(page, "Training by epoch")
    assert "Test loss" in columns
    assert float(rows[0][columns.index("Test loss")]) == 2.2
    assert "The epoch was chosen on the test images." in page


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    page = make(tmp_path, write_run(tmp_path / "run", finished=False, epochs=9))
    assert "metrics.json is missing: 4 of 9 epochs are done" in page
    assert "--resume run goes on" in page
    assert "Curves by epoch" in page
    assert "Worst mistakes" not in page


@pytest.mark.parametrize(
    ("split", "change", "warning"),
    (
        ("test", {"selected_on": "test"}, "The epoch was chosen on the test images."),
        ("validation", {}, "There is no test set."),
        ("test", {"selected_on": "validation"}, None),
    ),
)
def test_what_flatters_the_figures_is_said_before_them(tmp_path, undrawn, split, change, warning):
    path = write_run(tmp_path / "run", split=split)
    metrics = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps(metrics | change))
    page = make(tmp_path, path)
    if warning is None:
        assert 'class="warning"' not in page
        assert "chosen on validation by macro f1" in page
    else:
        assert page.index(warning) < page.index('class="tiles"')
    assert ("of these very images: in-sample, and too high" in page) is (split == "validation")


def test_images_that_are_gone_or_not_wanted_are_said_to_be(tmp_path, undrawn, capsys):
    path = write_run(tmp_path / "run", images=tmp_path / "images")
    assert "left out of this page (--no-images)" in make(tmp_path, path)
    (tmp_path / "images").rename(tmp_path / "moved")
    assert run(report.main, [str(path), "--device", "cpu"]) == 0
    page = (path / "report.html").read_text()
    assert re.search(r"12 of the 12 worst mistakes cannot be shown", page)
    assert str(tmp_path) not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)


def test_many_classes_list_the_largest_confusions(tmp_path, undrawn):
    names = tuple(f"class {i}" for i in range(30))
    metrics_path = write_run(tmp_path / "run", names) / "metrics.json"
    confusion = json.loads(metrics_path.read_text())["confusion_matrix"]
    rows = table(make(tmp_path, tmp_path / "run"), "The most frequent confusions")
    largest = max(count for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j)
    assert int(rows[1][2]) == largest
    truth, _, count, share = rows[1]
    assert share == f"{int(count) / sum(confusion[names.index(truth)]):.1%}"
    assert len(rows) == 21


@pytest.mark.parametrize(
    ("prepare", "message"),
    (
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "holds no args.yaml"),
        (lambda path: (write_run(path, finished=False) / "summary.csv").unlink(), "no epoch of the run has finished"),
        (lambda path: path.write_text(""), "is a file; name the run directory"),
        (lambda path: (write_run(path) / "metrics.json").write_text("{"), "metrics.json: not readable"),
        (lambda path: (write_run(path) / "metrics.json").write_text('{"split": "test"}'), "holds no epoch"),
    ),
    ids=("absent", "no run", "nothing finished", "a file", "damaged", "incomplete"),
)
def test_what_is_no_run_is_refused_with_a_way_out(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    assert run(report.main, [str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "found", "put", "message"),
    (
        ("summary.csv", ",2.0,", ",two,", "summary.csv, line 2: train_loss is 'two', not the number"),
        ("summary.csv", "epoch,", "time,", "summary.csv: has no column epoch"),
        ("summary.csv", "\n1,", "\n1\n1,", "summary.csv, line 3: has other columns than the first line"),
        ("sampling.csv", "\n0,", "\nx,", "sampling.csv, line 2: epoch is 'x'"),
        ("sampling.csv", ",drawn", ",taken", "sampling.csv: has no column drawn"),
        ("sampling.csv", ",20.0,", ",nan,", "sampling.csv, line 2: expected is 'nan'"),
    ),
)
def test_a_damaged_table_is_named_with_a_way_out(hostile, tmp_path, capsys, file, found, put, message):
    path = tmp_path / "run"
    shutil.copytree(hostile, path)
    text = (path / file).read_text()
    assert found in text
    (path / file).write_text(text.replace(found, put, 1))
    assert run(report.main, [str(path), "--no-images"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.endswith("mend it, or remove it, and the page goes without\n")
    assert error.count("\n") == 1
    (path / file).unlink()
    assert read_run(path, "run").metrics is not None


def test_nothing_is_overwritten_unasked(tmp_path, undrawn, capsys):
    path = write_run(tmp_path / "run")
    (tmp_path / "page.html").write_text("mine")
    argv = [str(path), "--no-images", "--output", str(tmp_path / "page.html")]
    assert run(report.main, argv) == 2
    assert (tmp_path / "page.html").read_text() == "mine"
    assert run(report.main, [*argv, "--force"]) == 0
    assert run(report.main, [str(path), str(path)]) == 2
    assert "add --output FILE.html" in capsys.readouterr().err


def test_a_run_writes_down_its_data_its_bad_files_and_its_software(tmp_path, undrawn):
    folder = write_folder(tmp_path / "data", {"blue": 6, "red": 4})
    (folder / "train" / "blue" / "000.png").write_bytes(b"no image")
    config = Config(data_dir=str(folder), max_bad_fraction=0.5, workers=1)
    splits, bad = drop_bad(open_data(config), workers=1, max_bad_fraction=0.5)
    device = torch.device("cpu")
    about = json.loads(json.dumps(describe_run(config, splits, bad, device, Precision(device, False, "bfloat16"))))
    counts = about["data"]["counts"]
    assert sum(counts["train"].values()) + sum(counts["validation"].values()) == 9
    assert counts["test"] == {"blue": 4, "red": 4}
    (left_out,) = about["data"]["left_out"]
    assert left_out["file"] == "train/blue/000.png"
    assert about["versions"]["torch"] == torch.__version__

    path = write_run(tmp_path / "run", CLASSES, data_dir=str(folder))
    (path / "about.json").write_text(json.dumps(about))
    page = make(tmp_path, path)
    assert "<bdi>train/blue/000.png</bdi>: " in page
    assert f"torch {torch.__version__}" in page
    assert [row[:3] for row in table(page, "Images of each class")[:2]] == [
        ["Class", "Train images", "Validation images"],
        ["blue", str(counts["train"]["blue"]), str(counts["validation"]["blue"])],
    ]
    assert str(tmp_path) not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert yaml.safe_load((path / "args.yaml").read_text())["data_dir"] == str(folder)
