"""What the pictures of a run draw is what the figures say, of any classes."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from engine.calibration import fit_temperature
from engine.intervals import bootstrap_intervals
from engine.metrics import classification_metrics, probability_figures
from engine.pictures import (
    alt_text,
    draw_class_balance,
    draw_class_figures,
    draw_confusion_matrix,
    draw_curves,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    to_svg,
)
from engine.pictures.reliability import calibration_bins
from engine.pictures.style import shortened
from engine.predictions import Predictions

ROWS = [
    {"epoch": 1, "train_loss": 1.5, "val_loss": 1.7, "val_macro_f1": 0.4, "val_accuracy": 0.5, "lr": 0.1},
    {"epoch": 2, "train_loss": 0.9, "val_loss": 1.1, "val_macro_f1": 0.75, "val_accuracy": 0.8, "lr": 0.05},
    {"epoch": 3, "train_loss": 0.6, "val_loss": 1.2, "val_macro_f1": 0.7, "val_accuracy": 0.9, "lr": 0.0},
]


def logits_and_labels(classes: int, n: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of falling size, rounded so that scores tie."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.linspace(1, 0.2, classes), n, replacement=True, generator=generator)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1.5
    return logits.round(decimals=1), labels


def predictions_of(logits: torch.Tensor, labels: torch.Tensor, names: list[str]) -> Predictions:
    files = tuple(f"{i}.png" for i in range(len(labels)))
    return Predictions(files, tuple(names), labels, logits.argmax(1), logits.softmax(1))


def scored(names: list[str], n: int = 120, *, seed: int = 0) -> Predictions:
    return predictions_of(*logits_and_labels(len(names), n, seed=seed), names)


def curves(figure: Figure) -> dict[str, np.ndarray]:
    """The line of each entry of the legend, (points, 2), by its text."""
    legend = figure.axes[0].get_legend()
    by_look = {(line.get_color(), line.get_linestyle(), line.get_linewidth()): line for line in figure.axes[0].lines}
    return {
        text.get_text(): by_look[handle.get_color(), handle.get_linestyle(), handle.get_linewidth()].get_xydata()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


# ROC and precision-recall


def test_roc_curves_are_scikit_learns():
    run = scored(["a", "b", "c"])
    drawn = curves(draw_roc(run))
    assert len(drawn) == 4
    for label, name in enumerate(run.class_names):
        truth, scores = (run.labels == label).numpy(), run.probabilities[:, label].numpy()
        area = roc_auc_score(truth, scores)
        points = drawn[f"{name}: {area:.4f}"]
        every = np.stack(roc_curve(truth, scores, drop_intermediate=False)[:2], axis=1)
        assert all(np.isclose(every, point, atol=1e-12).all(axis=1).any() for point in points)
        assert auc(*points.T) == pytest.approx(area, abs=1e-12)


def test_precision_recall_curves_are_scikit_learns():
    run = scored(["a", "b", "c"])
    figure = draw_precision_recall(run)
    drawn = curves(figure)
    for label, name in enumerate(run.class_names):
        truth, scores = (run.labels == label).numpy(), run.probabilities[:, label].numpy()
        area = average_precision_score(truth, scores)
        points = drawn[f"{name}: {area:.4f} (chance {truth.mean():.2g})"]
        precision, recall, _ = precision_recall_curve(truth, scores)
        every = np.stack([recall, precision], axis=1)
        assert all(np.isclose(every, point, atol=1e-12).all(axis=1).any() for point in points[1:])
        assert (np.diff(points[:, 0]) * points[1:, 1]).sum() == pytest.approx(area, abs=1e-12)
    prevalences = sorted(line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":")
    np.testing.assert_allclose(prevalences, np.sort(np.bincount(run.labels) / len(run.labels)))
    assert {line.get_drawstyle() for line in figure.axes[0].lines[:4]} == {"steps-pre"}


@pytest.mark.parametrize(
    ("draw", "macro"), [(draw_roc, "auroc_macro_ovr"), (draw_precision_recall, "average_precision_macro")]
)
def test_of_many_classes_the_worst_and_the_mean_are_drawn(draw, macro):
    names = [f"class {i}" for i in range(12)]
    logits, labels = logits_and_labels(12, 600)
    metrics = classification_metrics(logits, labels, names)
    figure = draw(predictions_of(logits, labels, names))
    *worst, mean = (text.get_text() for text in figure.axes[0].get_legend().get_texts())
    key = "auroc" if draw is draw_roc else "average_precision"
    by_area = sorted(names, key=lambda name: metrics["per_class"][name][key])
    assert [text.split(":")[0] for text in worst] == by_area[:5]
    assert mean == f"mean: {metrics[macro]:.4f}"
    assert "5 worst of 12" in alt_text(figure)
    line = next(line for line in figure.axes[0].lines if line.get_color() == "#000000")
    x, y = line.get_data()
    area = auc(x, y) if draw is draw_roc else (np.diff(x) * y[1:]).sum()
    assert area == pytest.approx(metrics[macro], abs=2e-3)


def test_the_mean_curve_is_the_mean_of_the_classes_at_each_rate():
    run = scored(["a", "b", "c"])
    drawn = curves(draw_roc({"only": run}))
    ((text, points),) = drawn.items()
    own = []
    for label in range(3):
        false_rate, true_rate, _ = roc_curve((run.labels == label).numpy(), run.probabilities[:, label].numpy())
        own.append([true_rate[false_rate <= rate].max() for rate in (0.0, 1.0)])
    assert points[0].tolist() == [0, 0]
    assert np.interp(1e-12, points[1:, 0], points[1:, 1]) == pytest.approx(np.mean(own, axis=0)[0])
    assert points[-1].tolist() == [1, 1]
    assert text.startswith("only:")


def test_several_runs_are_compared_in_the_positive_class():
    runs = {"plain": scored(["no", "yes"]), "balanced": scored(["no", "yes"], seed=1)}
    areas = [roc_auc_score(run.labels, run.probabilities[:, 1]) for run in runs.values()]
    assert list(curves(draw_roc(runs))) == [f"{name}: {area:.4f}" for area, name in zip(areas, runs, strict=True)]
    other = roc_auc_score(1 - runs["plain"].labels, runs["plain"].probabilities[:, 0])
    assert list(curves(draw_roc(runs["plain"], positive_class="no"))) == [f"no: {other:.4f}"]


@pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall])
def test_of_several_runs_each_has_its_own_line_and_none_that_of_a_mean(draw):
    runs = {f"run {i}": scored(["a", "b", "c"], 30, seed=i) for i in range(6)}
    lines = draw(runs).axes[0].get_legend().legend_handles
    assert len({line.get_color() for line in lines} - {"#000000"}) == 6
    assert len({line.get_linewidth() for line in lines}) == 1


def test_operating_points_stand_where_they_came_out():
    point = {"class": "yes", "wanted_sensitivity": 0.9, "threshold": 0.3, "sensitivity": 0.85, "specificity": 0.7}
    unknown = point | {"sensitivity": None}
    figure = draw_roc(scored(["no", "yes"]), operating_points=[point, unknown, point | {"class": "no"}])
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert marks == [[[pytest.approx(0.3), 0.85]]]
    assert "sensitivity 0.850 (0.9 wanted), specificity 0.700" in alt_text(figure)


# reliability


@pytest.mark.parametrize("temperature", [None, 0.6])
def test_reliability_bins_are_scikit_learns_and_the_error_is_that_of_the_metrics(temperature):
    logits, labels = logits_and_labels(3, 400)
    run = predictions_of(logits, labels, ["a", "b", "c"])
    figure = draw_reliability(run, temperature=temperature)
    scaled = logits if temperature is None else logits / temperature
    axes, counts = figure.axes[-2:]
    assert axes.get_title("left").endswith(f"ECE {probability_figures(scaled, labels)['ece']:.4f}")
    largest, right = scaled.softmax(1).amax(1).numpy(), (logits.argmax(1) == labels).numpy()
    accuracy, confidence = calibration_curve(right, largest, n_bins=15)
    marks = next(line for line in axes.lines if line.get_marker() == "D").get_xydata()
    np.testing.assert_allclose(marks[~np.isnan(marks[:, 1])], np.stack([confidence, accuracy], axis=1), atol=1e-12)
    expected, _ = np.histogram(largest, bins=15, range=(0, 1))
    assert [bar.get_height() for bar in counts.patches] == expected.tolist()


def test_a_fitted_temperature_is_applied_as_to_logits():
    logits, labels = logits_and_labels(4, 300)
    temperature = fit_temperature(3 * logits, labels)
    bins = calibration_bins(predictions_of(3 * logits, labels, list("abcd")), temperature)
    assert bins.ece() == pytest.approx(probability_figures(3 * logits / temperature, labels)["ece"], abs=1e-9)


# classes


def test_class_balance_shows_shares_of_the_data_and_of_all_draws():
    rows = [
        {"epoch": epoch, "class": name, "images": images, "expected": 50.0, "drawn": drawn}
        for epoch, draws in enumerate(((40, 60), (30, 70)))
        for name, images, drawn in zip(("small", "large"), (20, 80), draws, strict=True)
    ]
    for given in (rows, [{key: str(value) for key, value in row.items()} for row in rows]):
        axes = draw_class_balance(given).axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["large", "small"]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.8, 0.2, 0.65, 0.35])
        (expected,) = axes.collections
        assert [segment[0][0] for segment in expected.get_segments()] == [0.5, 0.5]


def test_class_balance_of_many_classes_goes_by_rank():
    rows = [{"epoch": 0, "class": i, "images": i, "expected": 10, "drawn": 2 * i} for i in range(1, 101)]
    figure = draw_class_balance(rows)
    assert figure.get_figheight() < 5
    drawn = next(line for line in figure.axes[0].lines if line.get_marker() == ".")
    np.testing.assert_allclose(drawn.get_ydata(), np.arange(100, 0, -1) / 5050)


def test_class_figures_show_values_and_intervals():
    logits, labels = logits_and_labels(3, 90)
    names = ["a", "b", "c"]
    metrics = classification_metrics(logits, labels, names)
    metrics["intervals"] = bootstrap_intervals(logits, labels, names, resamples=50)
    metrics["intervals"]["per_class"]["b"]["recall"] = None
    figure = draw_class_figures(metrics)
    for axes, key in zip(figure.axes, ("precision", "recall", "f1"), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [metrics["per_class"][name][key] for name in names]
        own = [metrics["intervals"]["per_class"][name].get(key) for name in names]
        assert [list(line.get_xdata()) for line in axes.lines] == [interval for interval in own if interval]
    several = draw_class_figures({"first": metrics, "per_class": metrics})
    assert len(several.axes[0].patches) == 6
    assert [text.get_text() for text in several.axes[0].get_legend().get_texts()] == ["first", "per_class"]


def test_of_many_classes_the_lowest_f1_are_shown():
    names = [f"class {i}" for i in range(60)]
    metrics = classification_metrics(*logits_and_labels(60, 900), names)
    figure = draw_class_figures(metrics)
    lowest = sorted(names, key=lambda name: metrics["per_class"][name]["f1"])[:24]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == lowest
    assert "24 of the lowest F1 of 60 classes" in alt_text(figure)
    logits, labels = logits_and_labels(60, 900)
    few = labels < 5
    figure = draw_class_figures(classification_metrics(logits[few], labels[few], names))
    assert {label.get_text() for label in figure.axes[0].get_yticklabels()} == set(names[:5])
    assert "the 5 of the lowest F1 of 60 classes, 55 of them without images" in alt_text(figure)


# the confusion matrix


def metrics_of(names: list[str]) -> dict:
    labels = torch.arange(len(names)).repeat(5)
    logits = torch.nn.functional.one_hot(labels, len(names)).float()
    logits[0] = logits[0].roll(1)
    return classification_metrics(logits, labels, names)


@pytest.mark.parametrize("classes", [2, 3, 50])
def test_confusion_matrix_shows_every_name_and_every_count(classes):
    names = [f"class {label}" for label in range(classes)]
    matrix = draw_confusion_matrix(metrics_of(names)).axes[0]
    assert [label.get_text() for label in matrix.get_xticklabels()] == names
    assert [label.get_text() for label in matrix.get_yticklabels()] == names
    counts = {text.get_position(): text.get_text() for text in matrix.texts}
    assert counts.pop((1, 0)) == "1"
    assert counts.pop((0, 0)) == "4"
    assert counts == {(label, label): "5" for label in range(1, classes)}


def test_truth_is_the_vertical_axis():
    matrix = draw_confusion_matrix(metrics_of(["a", "b", "c"])).axes[0]
    assert (matrix.get_ylabel(), matrix.get_xlabel()) == ("truth", "prediction")
    shares = matrix.images[0].get_array()
    assert shares[0, 1] == pytest.approx(0.2)
    assert shares[1, 0] == 0


def test_counts_can_be_read_on_their_cells():
    names = [str(label) for label in range(8)]
    metrics = metrics_of(names)
    metrics["confusion_matrix"] = [[8 - i] * i + [8 * (8 - i)] + [1] * (7 - i) for i in range(8)]
    matrix = draw_confusion_matrix(metrics).axes[0]
    colors = matrix.images[0].to_rgba(matrix.images[0].get_array())
    for text in matrix.texts:
        prediction, truth = text.get_position()
        cell, own = luminance(colors[truth, prediction, :3]), luminance(mpl.colors.to_rgb(text.get_color()))
        assert (max(cell, own) + 0.05) / (min(cell, own) + 0.05) >= 4.5


def luminance(rgb) -> float:
    """WCAG 2.2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_hundreds_of_classes_keep_the_size_of_the_picture():
    counts = np.eye(200, dtype=int).tolist()
    names = {f"class {i}": {} for i in range(200)}
    figure = draw_confusion_matrix({"confusion_matrix": counts, "per_class": names, "accuracy": 1.0, "macro_f1": 1.0})
    assert max(figure.get_size_inches()) < 16
    assert not figure.axes[0].texts


# curves


def test_curves_show_the_rows_and_the_epoch_that_was_kept():
    figure = draw_curves(ROWS, chosen=3)
    loss, score, _rate = figure.axes
    shown = [{text.get_text() for text in axes.get_legend().get_texts()} for axes in (loss, score)]
    assert shown == [{"training", "validation"}, {"macro-F1", "accuracy"}]
    values = [[list(line.get_ydata()) for line in axes.lines[:-1]] for axes in figure.axes]
    assert values == [
        [[1.5, 0.9, 0.6], [1.7, 1.1, 1.2]],
        [[0.4, 0.75, 0.7], [0.5, 0.8, 0.9]],
        [[0.1, 0.05, 0.0]],
    ]
    assert [axes.lines[-1].get_xdata()[0] for axes in figure.axes] == [3, 3, 3]
    assert "validation macro-F1 0.7000" in alt_text(figure)
    assert "epoch 2" in alt_text(draw_curves(ROWS))


def test_curves_take_text_leave_gaps_and_show_runs_that_chose_on_test():
    rows = [{key.replace("val_", "test_"): str(value) for key, value in row.items()} for row in ROWS]
    rows[1]["test_loss"] = ""
    rows = [*rows, {"epoch": 4, "train_loss": 0.5, "test_loss": None, "test_macro_f1": None}]
    loss, score, _ = draw_curves(rows).axes
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), [1.7, np.nan, 1.2, np.nan])
    assert score.get_title("left") == "test scores"


def test_curves_of_several_runs_and_of_a_head():
    shorter = [row | {"val_macro_f1": 0.1 * row["epoch"]} for row in ROWS[:2]]
    training, loss, f1 = draw_curves({"_one": ROWS, "other": shorter}, chosen={"_one": 3, "other": 1}).axes
    assert [list(line.get_ydata()) for line in f1.lines] == [[0.4, 0.75, 0.7], [0.7], [0.1, 0.2], [0.1]]
    assert [text.get_text() for text in f1.get_legend().get_texts()] == ["_one", "other"]
    assert [len(line.get_ydata()) for line in training.lines] == [3, 1, 2, 1]
    rows = [row | {"val_subtype.loss": 9.0, "val_subtype.macro_f1": 0.3} for row in ROWS]
    loss, score, _ = draw_curves(rows, chosen=1, head="subtype").axes
    assert [list(line.get_ydata()) for line in loss.lines[:-1]] == [[9.0] * 3]
    assert list(score.lines[0].get_ydata()) == [0.3] * 3


@pytest.mark.parametrize("draw", [draw_curves, draw_class_balance])
def test_no_rows_are_refused(draw):
    with pytest.raises(ValueError, match="no "):
        draw([])


# odd input


def pictures_of(logits: torch.Tensor, labels: torch.Tensor, names: list[str]) -> list[Figure]:
    run, metrics = predictions_of(logits, labels, names), classification_metrics(logits, labels, names)
    draws = [{"epoch": 0, "class": name, "images": 0, "expected": 0, "drawn": 0} for name in names]
    return [
        draw_confusion_matrix(metrics),
        draw_roc(run),
        draw_precision_recall(run),
        draw_class_figures(metrics),
        draw_class_balance(draws),
        draw_reliability(run, temperature=2.0),
        draw_roc({"one": run, "_two": run}),
    ]


@pytest.mark.filterwarnings("error")
def test_any_name_of_a_class_is_shown_as_it_is():
    names = ["$x_{$ <b>&amp;", "_hidden %s", "肺结核" * 9, "a" * 99, "two\nlines"]
    for figure in pictures_of(*logits_and_labels(5, 40), names)[:5]:
        texts = "\n".join(ElementTree.fromstring(to_svg(figure)).itertext())
        for name in ("$x_{$ <b>&amp;", "_hidden %s", "肺结核" * 3 + "肺结…", "a" * 23 + "…", r"two\nlines"):
            assert name in texts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["one class only", "an absent class", "one image"])
def test_odd_sets_of_images_draw(case):
    logits, labels = logits_and_labels(3, 40)
    if case == "one class only":
        labels[:] = 1
    elif case == "an absent class":
        labels[labels == 2] = 0
    else:
        logits, labels = logits[:1], labels[:1]
    for figure in pictures_of(logits, labels, ["a", "b", "c"]):
        figure.draw_without_rendering()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", [ROWS[0], {"epoch": 0, "train_loss": 1.0, "val_loss": None, "val_macro_f1": None}])
def test_one_epoch_draws(row):
    draw_curves([row]).draw_without_rendering()
    draw_curves({"a": [row], "b": [row]}).draw_without_rendering()


def test_long_names_are_cut_by_the_room_that_they_take():
    assert shortened("a" * 24) == "a" * 24
    assert shortened("a" * 25) == "a" * 23 + "…"
    assert shortened("肺" * 13) == "肺" * 11 + "…"
    assert shortened("two\nlines \udcff") == "two\\nlines \\xff"


@pytest.mark.parametrize("make", [lambda: draw_curves(ROWS), lambda: draw_roc(scored(["a", "b"]))])
def test_drawing_leaves_matplotlibs_settings_alone(make):
    before = dict(mpl.rcParams)
    to_svg(make())
    assert dict(mpl.rcParams) == before
