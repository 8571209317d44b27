"""The temperature against scipy's minimum, and operating points against scikit-learn's ROC curve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.optimize
import scipy.special
import sklearn.metrics
import torch

from engine.calibration import fit_temperature
from engine.intervals import proportion_interval
from engine.metric_report import format_report
from engine.operating_points import operating_points, sensitivity_threshold
from engine.scoring import Scored, final_metrics
from tests.test_metrics import DIGITS, sample


def loss_at(temperature: float, logits: torch.Tensor, labels: torch.Tensor) -> float:
    scaled = scipy.special.log_softmax(logits.double().numpy() / temperature, axis=1)
    return -scaled[range(len(labels)), labels.numpy()].mean()


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_is_where_scipy_finds_the_least_loss(classes, scale):
    logits, labels = sample(classes, 400)
    logits = scale * logits
    found = fit_temperature(logits, labels)
    expected = scipy.optimize.minimize_scalar(
        lambda log_t: loss_at(scipy.special.exp10(log_t), logits, labels), bounds=(-3, 3), options={"xatol": 1e-10}
    )
    assert found == pytest.approx(10**expected.x, rel=1e-5)
    assert loss_at(found, logits, labels) <= expected.fun + 1e-12


def test_temperature_undoes_an_overconfident_scale():
    generator = torch.Generator().manual_seed(0)
    calibrated = torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(calibrated.softmax(1), 1, generator=generator).flatten()
    assert fit_temperature(2.5 * calibrated, labels) == pytest.approx(2.5, rel=0.03)


def test_there_is_no_temperature_where_the_loss_has_no_minimum():
    logits, labels = sample(3, 40)
    assert fit_temperature(torch.nn.functional.one_hot(labels, 3) + 0.1 * logits, labels) is None  # all are right
    assert fit_temperature(-torch.nn.functional.one_hot(labels, 3).float(), labels) is None  # all are wrong
    assert fit_temperature(torch.zeros(40, 3), labels) is None


def test_temperature_is_found_for_what_inference_made():
    logits, labels = sample(3, 200)
    expected = fit_temperature(logits, labels)
    with torch.inference_mode():
        logits, labels = logits.double() * 1, labels * 1
        assert fit_temperature(logits, labels) == expected
    assert fit_temperature(logits, labels) == expected


@pytest.mark.parametrize("sensitivity", [0.05, 0.5, 0.8, 0.95, 1.0])
def test_threshold_is_the_largest_of_the_roc_curve_that_is_sensitive_enough(sensitivity):
    logits, labels = sample(2, 200, signal=1.0)
    scores, positive = (4 * logits).round().double().softmax(1)[:, 1], labels == 1  # with ties
    _, tpr, thresholds = sklearn.metrics.roc_curve(positive, scores, drop_intermediate=False)
    assert sensitivity_threshold(scores, positive, sensitivity) == thresholds[tpr >= sensitivity - 1e-12].max()


@pytest.mark.parametrize(("sensitivity", "count", "reached"), [(0.95, 20, 19), (0.55, 100, 55), (0.9, 19, 18)])
def test_no_more_images_are_taken_than_the_sensitivity_needs(sensitivity, count, reached):
    scores = torch.arange(count, dtype=torch.float64)
    assert (scores >= sensitivity_threshold(scores, scores >= 0, sensitivity)).sum() == reached


def test_operating_points_are_chosen_on_one_set_and_tried_on_the_other():
    chosen, tried = (
        (logits.double().softmax(1), labels) for logits, labels in (sample(3, 300), sample(3, 200, seed=1))
    )
    points = operating_points(chosen, tried, "abc", (0.5, 0.95))
    assert [(point["class"], point["wanted_sensitivity"]) for point in points] == [
        (name, wanted) for name in "abc" for wanted in (0.5, 0.95)
    ]
    for point in points:
        label = "abc".index(point["class"])
        assert point["chosen_on"] == (chosen[1] == label).sum()
        called, positive = tried[0][:, label] >= point["threshold"], tried[1] == label
        (tn, fp), (fn, tp) = sklearn.metrics.confusion_matrix(positive, called)
        assert point["sensitivity"] == pytest.approx(tp / (tp + fn))
        assert point["specificity"] == pytest.approx(tn / (tn + fp))
        for name in ("sensitivity", "specificity"):
            low, high = point[f"{name}_interval"]
            assert low < point[name] <= high


def test_operating_points_of_patients_have_the_intervals_of_so_many_patients():
    validation, test = scored(3, 300, 0), scored(3, 200, 1)
    patients = tuple(f"patient {label} {i % 9}" for i, label in enumerate(test.labels))
    options = {"split": "test", "temperature": None, "sensitivities": (0.8,)}
    points, by_image = (
        final_metrics(replace(test, groups=groups), validation, **options)["operating_points"]
        for groups in (patients, None)
    )
    for label, (alone, point) in enumerate(zip(by_image, points, strict=True)):
        positive = test.labels == label
        called = test.logits.softmax(1)[:, label] >= point["threshold"]
        for name, of in (("sensitivity", positive), ("specificity", ~positive)):
            own = [patients[i] for i in of.nonzero().flatten()]
            assert point[f"{name}_interval"] == proportion_interval((called == positive)[of], own)
            assert point[name] == alone[name]
    assert points != by_image


def test_two_classes_have_the_operating_point_of_the_positive_one():
    logits, labels = sample(2, 100)
    data = logits.double().softmax(1), labels
    assert [point["class"] for point in operating_points(data, data, "ab", (0.9,), "b")] == ["b"]


def test_an_operating_point_without_images_is_undefined():
    probabilities, labels = torch.eye(3, dtype=torch.float64), torch.arange(3)
    empty = probabilities[:2], labels[:2]
    (point,) = operating_points(empty, (probabilities, labels), "abc", (0.9,), "c")
    assert point["threshold"] is point["sensitivity"] is point["specificity"] is point["specificity_interval"] is None
    (point,) = operating_points((probabilities, labels), empty, "abc", (0.9,), "c")
    assert point["sensitivity"] is point["sensitivity_interval"] is None
    assert point["specificity"] == 1


def scored(classes: int, count: int, seed: int) -> Scored:
    logits, labels = sample(classes, count, seed=seed)
    return Scored(tuple(map(str, range(count))), tuple(DIGITS[:classes]), logits.double(), labels)


def test_final_figures_are_calibrated_on_test_and_not_where_the_temperature_was_fitted():
    validation, test = scored(2, 200, 0), scored(2, 150, 1)
    options = {"temperature": 2.0, "sensitivities": (0.9,)}
    metrics = final_metrics(test, validation, split="test", **options)
    assert metrics["calibrated"]["loss"] == pytest.approx(loss_at(2.0, test.logits, test.labels), abs=1e-12)
    probabilities = (test.logits / 2).softmax(1)[:, 1].numpy()
    expected = sklearn.metrics.brier_score_loss(test.labels.numpy(), probabilities)
    assert metrics["calibrated"]["brier"] == pytest.approx(expected, abs=1e-12)
    report = format_report({"split": "test", **metrics})
    assert f"at temperature 2:   ECE {metrics['calibrated']['ece']:.4f}" in report
    assert "thresholds chosen on the validation images" in report
    low, high = metrics["intervals"]["accuracy"]
    assert f"95% intervals:   accuracy {low:.3f}-{high:.3f}" in report

    in_sample = final_metrics(validation, validation, split="validation", **options)
    assert "calibrated" not in in_sample
    assert in_sample["operating_points"][0]["sensitivity"] >= 0.9
    assert "in-sample" in format_report({"split": "validation", **in_sample})
    of_heads = final_metrics(
        replace(test, heads={"first": test, "second": validation}),
        None,
        split="test",
        temperature=None,
        sensitivities=(),
        head_temperatures={"first": 2.0, "second": 3.0},
    )
    assert "calibrated" not in of_heads
    assert of_heads["heads"]["first"]["calibrated"] == metrics["calibrated"]
    expected = loss_at(3.0, validation.logits, validation.labels)
    assert of_heads["heads"]["second"]["calibrated"]["loss"] == pytest.approx(expected, abs=1e-12)
    plain = final_metrics(test, None, split="test", temperature=None, sensitivities=())
    assert plain["temperature"] is None
    assert not {"calibrated", "operating_points"} & set(plain)
