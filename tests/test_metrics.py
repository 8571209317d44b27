"""The figures of metrics.json against scikit-learn, also where they degenerate."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch

from engine.errors import UserError
from engine.metric_report import format_report
from engine.metrics import (
    BINARY_METRIC_NAMES,
    METRIC_NAMES,
    ClassificationMetrics,
    check_metric_name,
    classification_metrics,
    higher_is_better,
    metric_is_better,
)
from tests.against_sklearn import require_equal, sklearns_figures

DIGITS = tuple("abcdefghijklmnopqrstuvwxyz")


def sample(classes: int, count: int, *, seed: int = 0, signal: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a middling classifier, and labels whose classes are ever rarer."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.6 ** torch.arange(classes)
    labels = torch.multinomial(share, count, replacement=True, generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    return logits + signal * torch.nn.functional.one_hot(labels, classes), labels


def score(logits: torch.Tensor, labels: torch.Tensor, **options) -> dict:
    return classification_metrics(logits, labels, DIGITS[: logits.shape[1]], **options)


def absent_in_truth():
    logits, labels = sample(4, 200)
    labels[labels == 2] = 0
    assert (logits.argmax(1) == 2).any()
    return logits, labels


def never_predicted():
    logits, labels = sample(4, 200)
    logits[:, 1] = -20
    assert (labels == 1).any()
    return logits, labels


def absent_altogether():
    logits, labels = absent_in_truth()
    logits[:, 2] = -20
    return logits, labels


def one_class_in_truth():
    logits, labels = sample(3, 50)
    return logits, torch.zeros_like(labels)


def ties():
    logits, labels = sample(3, 400)
    return logits.round(), labels


def all_alike():
    _, labels = sample(3, 60)
    return torch.zeros(60, 3), labels


def saturated():
    logits, labels = sample(3, 200)
    return 300 * logits, labels


def perfect_ranking():
    scores = torch.linspace(3, -3, 20)
    return torch.stack([-scores, scores], dim=1), (torch.arange(20) == 0).long()


def two_classes(*, truth: int | None = None, said: int | None = None, rounded: bool = False):
    """Of two classes with one of them alone in truth, or alone predicted, or many ties."""
    logits, labels = sample(2, 80)
    if truth is not None:
        labels[:] = truth
    if said is not None:
        logits[:, said] = logits[:, 1 - said] + 0.5 + logits[:, said].abs()
    return logits.round() if rounded else logits, labels


CASES = {
    "two classes": lambda: sample(2, 300),
    "five classes": lambda: sample(5, 700),
    "fifty thousand samples": lambda: sample(3, 50_000, signal=1.0),
    "a class absent in truth": absent_in_truth,
    "a class never predicted": never_predicted,
    "a class absent altogether": absent_altogether,
    "one class in truth": one_class_in_truth,
    "ties": ties,
    "a perfect ranking": perfect_ranking,
    "all logits alike": all_alike,
    "saturated probabilities": saturated,
    "one sample": lambda: sample(3, 1),
    "two classes, one sample": lambda: sample(2, 1),
    "two classes, ties": lambda: two_classes(rounded=True),
    "two classes, no positive": lambda: two_classes(truth=0),
    "two classes, all positive": lambda: two_classes(truth=1),
    "two classes, none called positive": lambda: two_classes(said=0),
    "two classes, one alone in truth and predictions": lambda: two_classes(truth=1, said=1),
    "two classes, all alike": lambda: (torch.zeros(40, 2), sample(2, 40)[1]),
    "one class in all": lambda: sample(1, 10),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_every_figure_is_scikit_learns(case):
    logits, labels = case
    log_p = scipy.special.log_softmax(logits.double().numpy(), axis=1)
    own = log_p[range(len(labels)), labels]
    beyond_sklearn = logits.shape[1] == 1 or own.min() < np.log(1e-15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, loss = DIGITS[: logits.shape[1]], -own.mean() if beyond_sklearn else None
        expected = sklearns_figures(labels.numpy(), logits.double().softmax(1).numpy(), names, loss)
    ours = score(*case)
    assert ours.keys() == expected.keys()
    require_equal(ours, expected)


def test_macro_auroc_is_scikit_learns_multiclass_auroc():
    logits, labels = sample(5, 700)
    expected = sklearn.metrics.roc_auc_score(
        labels, logits.double().softmax(1).numpy(), multi_class="ovr", average="macro"
    )
    assert score(logits, labels)["auroc_macro_ovr"] == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_a_hand_made_case():
    # Confidences 0.9, 0.9, 0.9, 0.6: one bin is right 2 times in 3, the other never.
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6], dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    expected = (abs(2 - 2.7) + abs(0 - 0.6)) / 4
    assert score(logits, torch.tensor([0, 0, 1, 1]))["ece"] == pytest.approx(expected, abs=1e-12)


def test_every_figure_is_plain_and_json_has_no_nan(case):
    ours = score(*case)
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours
    assert list(ours)[:8] == [
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "macro_precision",
        "macro_recall",
        "auroc_macro_ovr",
        "ece",
        "loss",
    ]
    assert all(type(ours[name]) is float for name in list(ours)[:8] if ours[name] is not None)
    assert list(ours)[8:13] == ["brier", "weighted_f1", "average_precision_macro", "cohen_kappa", "mcc"]
    assert all(type(ours[name]) is float for name in list(ours)[8:13] if ours[name] is not None)
    row = ours["per_class"]["a"]
    assert list(row) == ["precision", "recall", "f1", "support", "auroc", "average_precision", "specificity"]
    assert {type(value) for value in row.values()} <= {float, int, type(None)}


def test_no_warning_reaches_the_user(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(*case)


@pytest.mark.parametrize(("positive_class", "label"), [(None, 1), ("a", 0), ("b", 1)])
def test_two_classes_have_a_positive_one(positive_class, label):
    logits, labels = sample(2, 300)
    ours = score(logits, labels, positive_class=positive_class)
    truth, prediction = labels.numpy(), logits.numpy().argmax(1)
    assert ours["positive_class"] == "ab"[label]
    assert ours["f1"] == pytest.approx(sklearn.metrics.f1_score(truth, prediction, pos_label=label), abs=1e-12)
    assert ours["recall"] == pytest.approx(sklearn.metrics.recall_score(truth, prediction, pos_label=label), abs=1e-12)
    assert ours["precision"] == pytest.approx(
        sklearn.metrics.precision_score(truth, prediction, pos_label=label), abs=1e-12
    )
    is_it, scores = truth == label, logits.double().softmax(1)[:, label].numpy()
    assert ours["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(is_it, scores), abs=1e-6)
    assert ours["average_precision"] == pytest.approx(sklearn.metrics.average_precision_score(is_it, scores), abs=1e-12)
    true_negatives = ((truth != label) & (prediction != label)).sum()
    assert ours["specificity"] == pytest.approx(true_negatives / (truth != label).sum(), abs=1e-12)


def test_more_classes_have_no_positive_one():
    assert not {"positive_class", *BINARY_METRIC_NAMES} & set(score(*sample(3, 50)))
    with pytest.raises(UserError, match="'b': only for two classes, here are 3"):
        ClassificationMetrics("abc", positive_class="b")
    with pytest.raises(UserError, match="'x': the classes are a, b"):
        ClassificationMetrics("ab", positive_class="x")


def test_updates_add_up_and_reset_empties():
    logits, labels = sample(5, 700)
    metrics = ClassificationMetrics(DIGITS[:5])
    metrics.update(*sample(5, 100, seed=9))
    metrics.compute()
    metrics.reset()
    for start in range(0, 700, 64):
        metrics.update(logits[start : start + 64], labels[start : start + 64].int())
    assert metrics.compute() == score(logits, labels)


def test_half_precision_logits_are_scored_as_they_are():
    logits, labels = sample(5, 300)
    metrics = ClassificationMetrics(DIGITS[:5])
    metrics.update(logits.bfloat16(), labels)
    assert metrics.compute() == score(logits.bfloat16().float(), labels)


def test_update_keeps_copies():
    logits, labels = sample(3, 60)
    metrics = ClassificationMetrics("abc")
    metrics.update(logits, labels)
    expected = score(logits, labels)
    logits.zero_()
    labels.zero_()
    assert metrics.compute() == expected


def test_update_never_reads_a_value_back():
    # On the meta device nothing has a value: whatever would wait for one raises.
    metrics = ClassificationMetrics("abc", "meta")
    metrics.update(torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.int32, device="meta"))
    assert metrics.logits[0].is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        metrics.compute()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_updates_do_not_synchronise_and_score_alike():
    logits, labels = sample(5, 700)
    metrics = ClassificationMetrics(DIGITS[:5], "cuda")
    on_gpu = logits.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.logits[0].is_cuda
    assert metrics.compute() == score(logits, labels)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_logits_are_counted(broken):
    logits, labels = sample(3, 10)
    logits[2, 0] = logits[2, 1] = logits[7, 2] = broken
    with pytest.raises(ValueError, match="logits hold NaN or infinity in 2 of 10 samples"):
        score(logits, labels)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_to_score_is_said():
    metrics = ClassificationMetrics("abc")
    with pytest.raises(ValueError, match="no samples to score"):
        metrics.compute()
    metrics.update(torch.empty(0, 3), torch.empty(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no samples to score"):
        metrics.compute()


def test_wrong_shapes_and_labels_are_refused():
    metrics = ClassificationMetrics("abc")
    with pytest.raises(ValueError, match=r"expected logits \(N, 3\) and labels \(N,\), got \(4, 2\) and \(4,\)"):
        metrics.update(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(4, 1\)"):
        metrics.update(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="labels reach from 0 to 3, there are 3 classes"):
        score(torch.zeros(4, 3), torch.arange(4))
    with pytest.raises(ValueError, match="labels reach from -1 to 1"):
        score(torch.zeros(2, 3), torch.tensor([-1, 1]))


def test_better_means_lower_for_loss_and_calibration_alone():
    assert {name for name in METRIC_NAMES if not higher_is_better(name)} == {"loss", "ece", "brier"}
    assert metric_is_better("macro_f1", 0.8, 0.7)
    assert not metric_is_better("macro_f1", 0.7, 0.7)
    assert metric_is_better("loss", 0.7, 0.8)
    assert not metric_is_better("loss", 0.8, 0.7)
    assert metric_is_better("loss", 0.8, None)
    assert not metric_is_better("auroc_macro_ovr", None, None)
    assert not metric_is_better("auroc_macro_ovr", None, 0.5)


def test_metric_names_are_what_metrics_hold():
    assert set(METRIC_NAMES) == {name for name, value in score(*sample(2, 50)).items() if isinstance(value, float)}
    for name in METRIC_NAMES:
        check_metric_name(name, 2)
    with pytest.raises(UserError, match="--eval-metric f1: only for two classes, here are 3; use macro_f1"):
        check_metric_name("f1", 3)
    for name in BINARY_METRIC_NAMES:
        with pytest.raises(UserError, match="; use ") as refused:
            check_metric_name(name, 3)
        check_metric_name(str(refused.value).split("; use ")[1], 3)
    for refuse in (lambda: check_metric_name("auc", 3), lambda: higher_is_better("auc")):
        with pytest.raises(UserError, match=r"--eval-metric auc: unknown; choose one of macro_f1, .*auroc_macro_ovr"):
            refuse()


def test_report_holds_every_class_and_every_count():
    logits, labels = sample(3, 300)
    metrics = classification_metrics(logits, labels, ["benign", "malignant", "normal"])
    lines = format_report(metrics).splitlines()
    assert lines[0].startswith(f"accuracy {metrics['accuracy']:.4f}   balanced accuracy")
    row = metrics["per_class"]["malignant"]
    figures = [f"{row[key]:.4f}" for key in ("precision", "recall", "specificity", "f1")]
    assert [line.split() for line in lines if line.startswith("malignant")] == [
        ["malignant", *figures, str(row["support"]), f"{row['auroc']:.4f}", f"{row['average_precision']:.4f}"],
        ["malignant", *(str(count or ".") for count in metrics["confusion_matrix"][1])],
    ]
    # specificity has no macro average
    assert next(line for line in lines if line.startswith("macro")).split()[3] == f"{metrics['macro_f1']:.4f}"
    assert f"Cohen's kappa {metrics['cohen_kappa']:.4f}   MCC {metrics['mcc']:.4f}" in lines[1]


def test_report_of_two_classes_names_the_positive_one():
    metrics = classification_metrics(*sample(2, 100), ["healthy", "TB"])
    assert f"positive class TB:   precision {metrics['precision']:.4f}" in format_report(metrics)


def test_report_shows_an_undefined_area_as_a_dash():
    logits, labels = absent_in_truth()
    row = next(line for line in format_report(score(logits, labels)).splitlines() if line.startswith("c "))
    assert row.split()[-3:] == ["0", "-", "-"]


@pytest.mark.parametrize("selected_on", ["validation", "test", None])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_report_calls_figures_optimistic_of_the_images_that_the_epoch_was_chosen_on(split, selected_on):
    first, *_ = format_report(score(*sample(3, 10)) | {"split": split, "selected_on": selected_on}).splitlines()
    told = f"optimistic: the epoch was chosen on these very {split} images"
    assert first == told if split == selected_on else first.startswith("accuracy")


@pytest.mark.parametrize("classes", [2, 3, 12, 26])
@pytest.mark.parametrize("name", ["{}", "a rather long class name that tells {}", "结核病 {}"])
def test_report_fits_the_terminal_and_its_columns_are_aligned(classes, name):
    logits, labels = sample(classes, 2000)
    names = [name.format(letter) for letter in DIGITS[:classes]]
    lines = format_report(classification_metrics(logits, labels, names), width=100).splitlines()
    wide = "结核病"
    widths = [len(line) + sum(line.count(char) for char in wide) for line in lines]
    table = lines.index("") + 1
    assert max(widths[table:]) <= 100
    assert len(set(widths[table : table + classes + 2])) == 1


def test_report_of_many_classes_lists_the_largest_confusions():
    labels = torch.arange(50).repeat(20)
    wrong = labels.clone()
    wrong[torch.where(labels == 7)[0][:5]] = 31
    logits = torch.nn.functional.one_hot(wrong, 50).float()
    report = format_report(classification_metrics(logits, labels, [f"fish {label}" for label in range(50)]))
    assert "Confusion matrix" not in report
    assert [line.split() for line in report.splitlines()[-2:]] == [
        ["truth", "prediction", "samples", "of", "the", "class"],
        ["fish", "7", "fish", "31", "5", "25.0%"],
    ]
