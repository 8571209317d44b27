"""`engine.report` of several runs: what is said of one is of that one, and of their difference what holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.mcnemar import compare_predictions
from engine.predictions import Predictions, read_predictions
from engine.report import comparison, tables
from engine.report.cautions import comparison_cautions
from engine.report.comparison import pair
from engine.report.runs import ReportedRun, read_runs
from tests.report_pages import make, table
from tests.report_runs import write_run


def test_a_comparison_gives_mcnemars_test_and_differences(tmp_path, undrawn):
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1, lr=0.01)
    page = make(tmp_path, first, second)
    told = [read_predictions(path / "predictions.csv") for path in (first, second)]
    test = compare_predictions(*told)
    assert test.b + test.c > 0
    (row,) = table(page, "McNemar&#39;s test against one")[1:]
    assert row[:4] == ["two", "60", str(test.b), str(test.c)]
    assert [float(value) for value in row[4:6]] == [test.p_exact, test.chi2]

    one, two = (json.loads((path / "metrics.json").read_text()) for path in (first, second))
    difference = f"{two['macro_f1'] - one['macro_f1']:+.4f}".replace("-", "\N{MINUS SIGN}")
    assert f"difference </span>{difference}</span>" in page
    assert {row[0]: row[1:] for row in table(page, "Options that differ between the runs")[1:]} == {
        "--lr": ["0.0005", "0.01"]
    }
    assert "Read with care" not in page
    assert "whole groups" not in page


def test_each_run_of_a_comparison_has_its_own_figures(tmp_path):
    runs = read_runs([str(write_run(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"))])
    metrics = [run.metrics for run in runs]
    for row, own in zip(comparison.figures_table(runs).rows, metrics, strict=True):
        found = {key: (cell.value, cell.below) for key, cell in zip(tables.MAIN_FIGURES, row[1:], strict=True)}
        assert found == {key: (own[key], tables.span(own["intervals"].get(key))) for key in found}
    for name, *cells in comparison.recall_table(runs).rows:
        of_class = [(own["per_class"][name.text], own["intervals"]["per_class"][name.text]) for own in metrics]
        assert [cell.value for cell in cells] == [figures["recall"] for figures, _ in of_class]
        assert [cell.below for cell in cells] == [tables.span(intervals["recall"]) for _, intervals in of_class]
    drawn = ("macro_f1", "balanced_accuracy", "accuracy", "auroc_macro_ovr")
    for axis, key in zip(comparison.interval_axes(runs), drawn, strict=True):
        low, high = float(axis.low), float(axis.high)
        for mark, own in zip(axis.marks, metrics, strict=True):
            shown = [low + (high - low) * place / 100 for place in (mark.start, mark.at, mark.end)]
            start, end = own["intervals"][key]
            assert shown == pytest.approx([start, own[key], end], abs=1e-3)


def reported(name: str, right: int) -> ReportedRun:
    """Ten images of one class, of which so many are recognised."""
    predicted = (torch.arange(10) >= right).long()
    files = tuple(map(str, range(10)))
    told = Predictions(files, ("a", "b"), torch.zeros(10).long(), predicted, torch.full((10, 2), 0.5))
    return ReportedRun(Path(name), name, {}, "", predictions={None: told})


@pytest.mark.parametrize(
    ("first", "second", "reading"),
    ((10, 2, "one is right more often"), (2, 10, "two is right more often"), (10, 7, "no difference shown")),
)
def test_mcnemars_test_names_the_run_that_is_right_more_often(first, second, reading):
    (row,) = comparison.mcnemar_table([reported("one", first), reported("two", second)]).rows
    assert row[-1].text == reading


def test_images_of_one_patient_are_tested_by_patient(tmp_path, undrawn):
    runs = write_run(tmp_path / "one", patients=6), write_run(tmp_path / "two", seed=1, patients=6)
    page = make(tmp_path, *runs)
    told = [read_predictions(path / "predictions.csv") for path in runs]
    by_image, test = (compare_predictions(*of) for of in ([replace(of, groups=None) for of in told], told))
    assert test.by_group is not None
    assert test.p_exact != by_image.p_exact
    (row,) = table(page, "McNemar&#39;s test against one")[1:]
    assert row[1:4] == ["60", str(test.b), str(test.c)]
    assert [float(value) for value in row[4:6]] == [test.p_exact, test.chi2]
    assert row[6] == "no difference shown"
    assert "<small>of 6 groups</small>" in page
    assert f"<small>more in {test.by_group.b} group" in page
    assert "p and chi-square are those of whole groups" in page


def test_a_run_that_groups_images_otherwise_has_no_test_and_says_why(tmp_path):
    runs = [write_run(tmp_path / str(patients), patients=patients) for patients in (6, 7)]
    found = pair(*(read_predictions(path / "predictions.csv") for path in runs))
    assert (found.test, found.images) == (None, 60)
    assert "test/006.png: is of one group with test/000.png in the first run alone" in found.remark


def test_runs_scored_on_other_images_are_compared_on_those_of_both(tmp_path, undrawn):
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    rows = (second / "predictions.csv").read_text().splitlines(keepends=True)
    (second / "predictions.csv").write_text("".join([*rows[:41], rows[41].replace("test/", "elsewhere/")]))
    page = make(tmp_path, first, second)
    assert "The runs were not scored on the same images" in page
    (row,) = table(page, "McNemar&#39;s test against one")[1:]
    told = [read_predictions(path / "predictions.csv") for path in (first, second)]
    right = [dict(zip(of.files, (of.labels == of.predictions).tolist(), strict=True)) for of in told]
    shared = right[0].keys() & right[1].keys()
    assert row[1:4] == [
        "40",
        str(sum(right[0][file] and not right[1][file] for file in shared)),
        str(sum(right[1][file] and not right[0][file] for file in shared)),
    ]
    assert "21 were predicted by one run only" in page
    assert pair(told[0], None).test is None


def test_runs_with_other_classes_or_unfinished_ones_are_named_and_not_compared(tmp_path, undrawn):
    runs = [
        write_run(tmp_path / "one"),
        write_run(tmp_path / "two", ("cat", "dog", "hen")),
        write_run(tmp_path / "three", finished=False),
    ]
    page = make(tmp_path, *runs)
    assert "two is not compared: its classes (cat, dog, hen) are not those of one (benign, malignant, normal)" in page
    assert "three is not compared: three has not finished" in page
    assert "McNemar" not in page
    assert all(f'<h2 class="run" id="run{i}-run">' in page for i in (1, 2, 3))


def test_a_comparison_says_which_epochs_were_chosen_on_its_images(tmp_path, undrawn):
    runs = [write_run(tmp_path / name, split="validation", seed=i) for i, name in enumerate(("one", "two"))]
    page = make(tmp_path, *runs)
    assert "The epoch of one, two was chosen on the very images compared here" in page
    assert "was chosen on the test images" not in page


def test_a_comparison_says_what_keeps_its_figures_from_meaning_the_same(tmp_path):
    of_test, of_other_test, of_validation = (
        write_run(tmp_path / name, split=split, data_dir=str(tmp_path / folder))
        for name, split, folder in (("one", "test", "a"), ("two", "test", "b"), ("three", "validation", "a"))
    )
    (of_test / "metrics.json").write_text(
        json.dumps(json.loads((of_test / "metrics.json").read_text()) | {"selected_on": "test"})
    )

    def said(*paths: Path) -> list[str]:
        return comparison_cautions(read_runs([str(path) for path in paths]))

    chosen = "The epoch of one was chosen on the test images, which flatters it."
    folders = "The runs name different data folders; images are matched by their names within them."
    assert said(of_test, of_other_test) == [chosen, folders]
    assert said(of_test, of_validation) == [
        "The runs were not scored on the same images: one on test, three on validation.",
        chosen,
        "The epoch of three was chosen on the very images compared here: figures and p flatter.",
    ]
    assert said(of_other_test, of_other_test) == []


def test_runs_of_one_name_are_told_apart(tmp_path, undrawn):
    of_a, of_b = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", seed=1)
    page = make(tmp_path, of_a, of_b, of_a)
    assert [row[0] for row in table(page, "Figures of the runs")[1:]] == ["a/run", "b/run", "a/run (2)"]
