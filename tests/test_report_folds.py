"""`engine.report` of a cross-validation, and of one of its folds."""

from __future__ import annotations

import json
import shutil

import torch

from engine import report
from engine.cli import run
from engine.report import mistakes
from engine.report.runs import read_run
from tests.report_pages import make, table
from tests.report_runs import write_cross_validation, write_run


def test_a_cross_validation_has_its_folds_and_the_figures_of_all_images(tmp_path, undrawn):
    path = write_cross_validation(tmp_path / "folds")
    metrics = json.loads((path / "metrics.json").read_text())
    page = make(tmp_path, path)
    columns, *rows = table(page, "Figures of each fold")
    keys = {"Accuracy": "accuracy", "Macro-F1": "macro_f1", "AUROC": "auroc_macro_ovr", "Brier": "brier"}
    expected = [*metrics["folds"], *({k: v[part] for k, v in metrics["over_folds"].items()} for part in ("mean", "sd"))]
    for row, figures in zip(rows, [*expected, metrics], strict=True):
        shown = dict(zip(columns, row, strict=True))
        assert {label: float(shown[label]) for label in keys} == {label: figures[key] for label, key in keys.items()}
    assert [row[:2] for row in rows[:2] + rows[-1:]] == [["0", "60"], ["1", "60"], ["All images", "120"]]
    assert "120 out of fold images" in page
    assert page.index("need not be on one scale") < page.index('class="tiles"')
    assert "temperature of its fold" in page
    (point,) = [row for row in table(page, "Operating points")[1:] if row[0] == "malignant"]
    (told,) = [point for point in metrics["operating_points"] if point["class"] == "malignant"]
    assert float(point[4]) == told["sensitivity"]
    assert ", ".join(f"{threshold:.3g}" for threshold in told["thresholds"]) in page
    assert page.count("<svg></svg>") == 5
    options = [row[0] for row in table(page, "Options that differ from the defaults")[1:]]
    assert "--folds" in options
    assert "--fold" not in options
    for fold in range(2):
        shutil.rmtree(path / f"fold{fold}")
    assert run(report.main, [str(path), "--device", "cpu"]) == 0
    alone = (path / "report.html").read_text()
    assert table(alone, "Figures of each fold") == [columns, *rows]
    assert "The images cannot be shown" in alone
    assert "The runs of the folds are not here any more" in alone
    assert "embedded digits" not in alone


def test_each_mistake_of_a_cross_validation_is_explained_by_the_model_of_its_fold(tmp_path, monkeypatch):
    path = write_cross_validation(tmp_path / "folds", images=tmp_path / "images")
    asked = {}

    def evidence(run_path, originals, predictions, images, device):
        asked[run_path.name] = {predictions.files[i].split("/")[0] for i in images}
        return {}

    monkeypatch.setattr(mistakes, "_evidence", evidence)
    found, remark = mistakes.find_mistakes(read_run(path, "folds"), torch.device("cpu"))
    assert asked == {"fold0": {"fold0"}, "fold1": {"fold1"}}
    assert (len(found), remark) == (12, "")
    said = [float(mistake.probability) for mistake in found]
    assert said == sorted(said, reverse=True)
    shutil.rmtree(path / "fold1")
    kept, remark = mistakes.find_mistakes(read_run(path, "folds"), torch.device("cpu"))
    assert kept == [mistake for mistake in found if mistake.file.startswith("fold0/")]
    assert "The images cannot be shown: folds/fold1" in remark


def test_one_fold_is_a_run_like_any_other_and_an_unfinished_cross_validation_says_so(tmp_path, undrawn, capsys):
    fold = write_run(tmp_path / "folds" / "fold0", folds=5, fold=0)
    page = make(tmp_path, fold)
    assert {"--folds": "5", "--fold": "0"}.items() <= {
        row[0]: row[1] for row in table(page, "Options that differ from the defaults")[1:]
    }.items()
    assert "Figures of each fold" not in page
    assert run(report.main, [str(tmp_path / "folds")]) == 2
    assert "not all of its folds have finished; go on with engine.cross_validate" in capsys.readouterr().err
