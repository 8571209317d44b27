"""The pictures are whole files, and show what the figures say."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from engine.metrics import classification_metrics
from engine.pictures import save_confusion_matrix, save_curves

ROWS = [
    {"epoch": 1, "train_loss": 1.5, "val_loss": 1.7, "val_macro_f1": 0.4, "lr": 0.1},
    {"epoch": 2, "train_loss": 0.9, "val_loss": 1.1, "val_macro_f1": 0.75, "lr": 0.1},
    {"epoch": 3, "train_loss": 0.6, "val_loss": 1.2, "val_macro_f1": 0.7, "lr": 0.1},
]


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def remember(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def metrics_of(names: list[str]) -> dict:
    labels = torch.arange(len(names)).repeat(5)
    logits = torch.nn.functional.one_hot(labels, len(names)).float()
    logits[0] = logits[0].roll(1)
    return classification_metrics(logits, labels, names)


@pytest.mark.parametrize("classes", [2, 3, 50])
def test_confusion_matrix_shows_every_name_and_every_count(classes, tmp_path, saved):
    names = [f"class {label}" for label in range(classes)]
    save_confusion_matrix(metrics_of(names), tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        picture.load()
        assert min(picture.size) > 300

    matrix, _color_bar = saved[0].axes
    assert [label.get_text() for label in matrix.get_xticklabels()] == names
    assert [label.get_text() for label in matrix.get_yticklabels()] == names
    counts = {text.get_position(): text.get_text() for text in matrix.texts}
    assert counts.pop((1, 0)) == "1"
    assert counts.pop((0, 0)) == "4"
    assert counts == {(label, label): "5" for label in range(1, classes)}


def test_truth_is_the_vertical_axis(tmp_path, saved):
    save_confusion_matrix(metrics_of(["a", "b", "c"]), tmp_path / "confusion.png")
    matrix = saved[0].axes[0]
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("truth", "prediction")
    shares = matrix.images[0].get_array()
    assert shares[0, 1] == pytest.approx(0.2)
    assert shares[1, 0] == 0


def test_a_class_without_samples_and_odd_names_draw(tmp_path, saved):
    metrics = classification_metrics(torch.eye(2), torch.zeros(2, dtype=torch.long), ["$x_{$", "a" * 99])
    save_confusion_matrix(metrics, tmp_path / "confusion.png")
    labels = [label.get_text() for label in saved[0].axes[0].get_yticklabels()]
    assert labels[0] == "$x_{$"
    assert len(labels[1]) < 30
    assert np.isfinite(saved[0].axes[0].images[0].get_array()).all()


def test_curves_show_the_rows_and_the_best_epoch(tmp_path, saved):
    save_curves(ROWS, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.width > picture.height > 300
    loss, f1 = saved[0].axes
    assert {line.get_label(): list(line.get_ydata()) for line in loss.lines} == {
        "training": [1.5, 0.9, 0.6],
        "validation": [1.7, 1.1, 1.2],
    }
    assert list(f1.lines[0].get_ydata()) == [0.4, 0.75, 0.7]
    assert f1.get_title("right") == "best 0.7500 at epoch 2"


def test_curves_take_text_and_leave_gaps(tmp_path, saved):
    rows = [{key: str(value) for key, value in row.items()} for row in ROWS]
    rows[1]["val_loss"] = ""
    rows = [*rows, {"epoch": 4, "train_loss": 0.5, "val_loss": None, "val_macro_f1": None}]
    save_curves(rows, tmp_path / "curves.png")
    validation = saved[0].axes[0].lines[1]
    np.testing.assert_array_equal(validation.get_ydata(), [1.7, np.nan, 1.2, np.nan])


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[0] | {"val_loss": None, "val_macro_f1": None}]])
@pytest.mark.filterwarnings("error")
def test_one_epoch_draws(rows, tmp_path):
    save_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_no_epochs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no epochs"):
        save_curves([], tmp_path / "curves.png")


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
    before = dict(mpl.rcParams)
    save_confusion_matrix(metrics_of(["a", "b"]), tmp_path / "confusion.png")
    save_curves(ROWS, tmp_path / "curves.png")
    assert dict(mpl.rcParams) == before
