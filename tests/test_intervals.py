"""The bootstrap against exact distributions, Wilson's interval and McNemar's test against scipy's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from engine import intervals
from engine.errors import UserError
from engine.intervals import bootstrap_intervals, wilson_interval
from engine.mcnemar import compare_predictions, mcnemar
from engine.metrics import count_figures
from engine.predictions import Predictions
from tests.test_metrics import DIGITS, absent_altogether, never_predicted, one_class_in_truth, sample


def intervals_of(logits: torch.Tensor, labels: torch.Tensor, **options) -> dict:
    return bootstrap_intervals(logits.double(), labels, DIGITS[: logits.shape[1]], **options)


def exact_interval(recalled: list[int], support: list[int]) -> tuple[float, float]:
    """Of the sum of a binomial a class, as a share: what infinitely many resamples would give."""
    mass = np.ones(1)
    for k, n in zip(recalled, support, strict=True):
        mass = np.convolve(mass, scipy.stats.binom.pmf(np.arange(n + 1), n, k / n))
    low, high = np.searchsorted(mass.cumsum(), (0.025, 0.975))
    return low / sum(support), high / sum(support)


def test_accuracy_and_recall_have_the_intervals_of_binomials_with_every_class_as_large_as_it_is():
    logits, labels = sample(3, 200, signal=1.0)
    found = intervals_of(logits, labels, resamples=20_000)
    prediction = logits.argmax(1)
    support = [int((labels == c).sum()) for c in range(3)]
    recalled = [int(((labels == c) & (prediction == c)).sum()) for c in range(3)]
    assert found["accuracy"] == pytest.approx(exact_interval(recalled, support), abs=1.01 / 200)
    for c, name in enumerate("abc"):
        expected = exact_interval(recalled[c : c + 1], support[c : c + 1])
        assert found["per_class"][name]["recall"] == pytest.approx(expected, abs=1.01 / support[c])


def test_every_interval_is_that_of_whole_images_drawn_class_by_class():
    logits, labels = sample(3, 120, signal=1.0)
    found = intervals_of(logits, labels, resamples=4000)
    truth, prediction, scores = labels.numpy(), logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    rng = np.random.default_rng(1)
    values = {"balanced_accuracy": [], "macro_f1": [], "precision": [], "auroc_macro_ovr": [], "auroc": []}
    wins = [(column[:, None] > column) + 0.5 * (column[:, None] == column) for column in scores.T]
    for _ in range(2000):
        drawn = np.concatenate([rng.choice(np.flatnonzero(truth == c), (truth == c).sum()) for c in range(3)])
        t, p = truth[drawn], prediction[drawn]
        hits = np.bincount(t[t == p], minlength=3)
        of, called = np.bincount(t, minlength=3), np.bincount(p, minlength=3)
        values["balanced_accuracy"].append((hits / of).mean())
        values["macro_f1"].append((2 * hits / (of + called)).mean())
        values["precision"].append(hits[2] / max(called[2], 1))
        areas = [wins[c][np.ix_(drawn[t == c], drawn[t != c])].mean() for c in range(3)]
        values["auroc_macro_ovr"].append(np.mean(areas))
        values["auroc"].append(areas[2])
    expected = {name: np.quantile(drawn, (0.025, 0.975)) for name, drawn in values.items()}
    assert np.array([found[name] for name in ("balanced_accuracy", "macro_f1", "auroc_macro_ovr")]) == pytest.approx(
        np.array([expected[name] for name in ("balanced_accuracy", "macro_f1", "auroc_macro_ovr")]), abs=0.012
    )
    assert [found["per_class"]["c"][name] for name in ("precision", "auroc")] == [
        pytest.approx(expected[name], abs=0.03) for name in ("precision", "auroc")
    ]


def test_a_resampled_auroc_is_scikit_learns_of_weighted_samples():
    logits, labels = sample(3, 300, signal=1.0)
    scores = logits.double().round().softmax(1)[:, 1].contiguous()
    positive = labels == 1
    assert len(scores.unique()) < 100  # ties within and between the classes
    times = torch.zeros(300, 5, dtype=torch.float64)
    for members in (positive, ~positive):
        times[members] = intervals._times_drawn(int(members.sum()), 5, np.random.default_rng(2))
    found = intervals._Ranks(scores, positive).aurocs(times)
    expected = [sklearn.metrics.roc_auc_score(positive, scores, sample_weight=times[:, k]) for k in range(5)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_figures_of_many_counts_at_once_are_those_of_each():
    counts = torch.randint(0, 9, (20, 4, 4), generator=torch.Generator().manual_seed(0))
    counts[3], counts[4, 1], counts[5, :, 2] = torch.diag(torch.tensor([7, 0, 0, 0])), 0, 0
    together = count_figures(counts.diagonal(dim1=1, dim2=2), counts.sum(1), counts.sum(2))
    for k, one in enumerate(counts):
        alone = count_figures(one.diag(), one.sum(0), one.sum(1))
        for many, single in zip(together, alone, strict=True):
            torch.testing.assert_close({name: values[k] for name, values in many.items()}, single, equal_nan=True)


def test_a_figure_that_is_undefined_has_no_interval():
    found = intervals_of(*absent_altogether(), resamples=50)
    assert found["per_class"]["c"] == {"precision": None, "recall": None, "auroc": None}
    assert found["per_class"]["a"]["auroc"] is not None
    assert intervals_of(*never_predicted(), resamples=50)["per_class"]["b"]["precision"] is None
    found = intervals_of(*one_class_in_truth(), resamples=50)
    assert found["auroc_macro_ovr"] is None
    assert found["balanced_accuracy"] == found["per_class"]["a"]["recall"] == found["accuracy"] is not None


def test_without_an_error_there_is_no_interval_as_if_there_could_be_none():
    labels = torch.arange(3).repeat(20)
    logits = torch.nn.functional.one_hot(labels, 3).float()
    logits[0] = logits[0].roll(1)  # one image of class 0 is taken for class 1
    found = intervals_of(logits, labels)
    assert found["per_class"]["c"] == {"precision": None, "recall": None, "auroc": None}
    assert found["per_class"]["a"]["recall"] == [0.85, 1.0]
    assert found["per_class"]["a"]["precision"] is None
    assert found["per_class"]["b"]["recall"] is None
    assert found["per_class"]["b"]["precision"][1] == 1


def test_intervals_are_the_same_every_time_whatever_is_held_in_memory(monkeypatch):
    logits, labels = sample(3, 90)
    first = intervals_of(logits, labels)
    assert intervals_of(logits, labels) == first
    assert intervals_of(logits, labels, seed=1) != first
    monkeypatch.setattr(intervals, "LARGEST_FOR_AUROC", 269)
    assert intervals_of(logits, labels)["auroc_macro_ovr"] is None
    assert intervals_of(logits, labels)["macro_f1"] == first["macro_f1"]


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (3, 3), (0, 40), (37, 40), (9999, 10_000)])
def test_wilson_interval_is_scipys(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert wilson_interval(0, 0) is None


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (5, 5), (3, 14), (40, 22), (0, 60), (2900, 3100)])
def test_mcnemar_is_the_binomial_test_and_edwards_chi_square(b, c):
    found = mcnemar(b, c)
    assert found.p_exact == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue if b + c else 1, rel=1e-9)
    chi2 = max(0, abs(b - c) - 1) ** 2 / (b + c) if b + c else 0
    assert found.chi2 == pytest.approx(chi2)
    assert found.p_chi2 == pytest.approx(scipy.stats.chi2.sf(chi2, df=1), rel=1e-9)
    assert mcnemar(c, b) == replace(found, b=c, c=b)


def predictions(said: dict[str, tuple[str, str]]) -> Predictions:
    """{file: (truth, prediction)} of the classes "a", "b", "c"."""
    labels, predicted = torch.tensor([["abc".index(name) for name in pair] for pair in said.values()]).T
    return Predictions(tuple(said), ("a", "b", "c"), labels, predicted, torch.eye(3)[predicted].double())


def test_runs_are_compared_image_by_image():
    first = {"1": ("a", "a"), "2": ("b", "b"), "3": ("c", "a"), "4": ("a", "c"), "5": ("a", "a")}
    second = {"5": ("a", "b"), "4": ("a", "a"), "3": ("c", "b"), "2": ("b", "c"), "1": ("a", "a")}
    found = compare_predictions(predictions(first), predictions(second))
    assert (found.b, found.c) == (2, 1)
    assert compare_predictions(predictions(first), predictions(first)).p_exact == 1


def test_runs_on_other_images_are_not_compared():
    one, two = {"1": ("a", "a")}, {"1": ("a", "b"), "2": ("b", "b")}
    with pytest.raises(UserError, match="2: is not among the first run's predictions"):
        compare_predictions(predictions(one), predictions(two))
    with pytest.raises(UserError, match="2: is not among the second run's predictions"):
        compare_predictions(predictions(two), predictions(one))
    with pytest.raises(UserError, match="1: is a in the first run and b in the second"):
        compare_predictions(predictions(one), predictions({"1": ("b", "b")}))
    twice = replace(predictions(two), files=("1", "1"))
    with pytest.raises(UserError, match="name a file twice"):
        compare_predictions(twice, twice)
