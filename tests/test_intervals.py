"""The bootstrap against exact distributions, and Wilson's interval against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from engine import intervals
from engine.intervals import bootstrap_intervals, proportion_interval, wilson_interval
from engine.metrics import count_figures
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


def patients(labels: torch.Tensor, several_classes: bool) -> list[str]:
    """A name for each image: of one to four images each, of one class unless ``several_classes``."""
    of_image = np.random.default_rng(5).integers(len(labels) // 2, size=len(labels)).tolist()
    return [
        f"{i}" if several_classes else f"{i} of {label}" for i, label in zip(of_image, labels.tolist(), strict=True)
    ]


def drawn(labels: torch.Tensor, groups: list[str], resamples: int, seed: int = 0) -> np.ndarray:
    """(N, resamples): how often each image is in the resamples of `bootstrap_intervals` with that seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.cat(list(intervals._drawn(labels, groups, resamples, rng)), dim=1).numpy()


@pytest.mark.parametrize("several_classes", [False, True], ids=["of one class", "of several classes"])
def test_whole_groups_are_drawn_with_replacement_among_those_of_their_class(several_classes):
    labels = sample(3, 60)[1]
    groups = patients(labels, several_classes)
    times, names = drawn(labels, groups, 400), np.array(groups)
    classes_of = {name: set(labels[names == name].tolist()) for name in groups}
    first_of = {name: groups.index(name) for name in groups}
    for name, first in first_of.items():
        assert (times[names == name] == times[first]).all()
    for kind in ({0}, {1}, {2}, None):  # None: of several
        alike = [name for name, own in classes_of.items() if own == kind or (kind is None and len(own) > 1)]
        draws = times[[first_of[name] for name in alike]]
        assert (draws.sum(axis=0) == len(alike)).all()
        # a multinomial's: each is drawn once on average, with variance 1 - 1 / n
        assert draws.mean(axis=1) == pytest.approx(np.ones(len(alike)), abs=0.25)
        if len(alike) > 1:
            assert draws.var() == pytest.approx(1 - 1 / len(alike), abs=0.12)
    assert bool([own for own in classes_of.values() if len(own) > 1]) == several_classes


@pytest.mark.parametrize("several_classes", [False, True], ids=["of one class", "of several classes"])
def test_intervals_by_group_are_scikit_learns_of_the_same_resamples(several_classes):
    logits, labels = sample(3, 80, signal=1.0)
    logits = logits.double().mul(2).round()  # with ties
    groups = patients(labels, several_classes)
    if several_classes:  # the third class is in one group, so that every third resample has none of it
        labels[labels == 2] = 1
        labels[[7, 8]], groups[7], groups[8], groups[9] = 2, "both", "both", "both"
    found = intervals_of(logits, labels, groups=groups, resamples=50)
    truth, said, scores = labels.numpy(), logits.argmax(1).numpy(), logits.softmax(1).numpy()
    values: dict[str, list[float]] = {name: [] for name in ("accuracy", "balanced_accuracy", "macro_f1", "areas")}
    of_class: dict[tuple[str, int], list[float]] = {}
    absent = 0
    for times in drawn(labels, groups, 50).T.astype(int):
        images = np.repeat(np.arange(80), times)
        t, p, s = truth[images], said[images], scores[images]
        values["accuracy"].append(sklearn.metrics.accuracy_score(t, p))
        values["balanced_accuracy"].append(np.mean([(p[t == c] == c).mean() for c in set(t)]))
        values["macro_f1"].append(sklearn.metrics.f1_score(t, p, average="macro", zero_division=0))
        areas = {c: sklearn.metrics.roc_auc_score(t == c, s[:, c]) for c in set(t.tolist())}
        values["areas"].append(np.mean(list(areas.values())))
        absent += len(areas) < 3
        for c in range(3):
            of_class.setdefault(("precision", c), []).append((t[p == c] == c).mean() if (p == c).any() else 0)
            if c in areas:
                of_class.setdefault(("recall", c), []).append((p[t == c] == c).mean())
                of_class.setdefault(("auroc", c), []).append(areas[c])
    assert (absent > 5) == several_classes
    for name, told in (("accuracy",) * 2, ("balanced_accuracy",) * 2, ("macro_f1",) * 2, ("auroc_macro_ovr", "areas")):
        assert found[name] == pytest.approx(np.quantile(values[told], (0.025, 0.975)), abs=1e-12), name
    for (name, c), of in of_class.items():
        low, high = np.quantile(of, (0.025, 0.975))
        expected = pytest.approx([low, high], abs=1e-12) if low < high else None
        assert found["per_class"]["abc"[c]][name] == expected, (name, c)


def test_copies_of_an_image_tell_no_more_than_the_image():
    logits, labels = sample(3, 60, signal=1.0)
    once = intervals_of(logits, labels, groups=[str(i) for i in range(60)])
    copies = logits.repeat_interleave(4, dim=0), labels.repeat_interleave(4)
    assert intervals_of(*copies, groups=[str(i // 4) for i in range(240)]) == once

    def width(of: dict) -> float:
        return of["accuracy"][1] - of["accuracy"][0]

    assert width(intervals_of(logits, labels)) == pytest.approx(width(once), rel=0.1)
    assert width(intervals_of(*copies)) == pytest.approx(width(once) / 2, rel=0.15)


def test_intervals_by_group_hold_the_truth_as_often_as_they_say():
    """Forty patients of whom each has five like images, eight in ten of them recognised."""
    held = {"group": 0, "image": 0, "wilson": 0}
    rng = np.random.default_rng(0)
    groups = np.arange(40).repeat(5).astype(str).tolist()
    for _ in range(100):
        right = torch.from_numpy(rng.random(40) < 0.8).repeat_interleave(5)
        labels = torch.arange(2).repeat_interleave(100)
        logits = torch.nn.functional.one_hot(torch.where(right, labels, 1 - labels), 2).double()
        for name, of in (("group", groups), ("image", None)):
            low, high = intervals_of(logits, labels, groups=of, resamples=200)["accuracy"]
            held[name] += low <= 0.8 <= high
        low, high = proportion_interval(right, groups)
        held["wilson"] += low <= 0.8 <= high
    assert min(held["group"], held["wilson"]) >= 89
    assert held["image"] <= 75


def test_a_single_group_says_nothing_of_others():
    found = intervals_of(*sample(3, 30), groups=["one"] * 30, resamples=20)
    assert found["accuracy"] is found["auroc_macro_ovr"] is found["per_class"]["a"]["recall"] is None
    assert proportion_interval(torch.tensor([True, False]), ["one", "one"]) is None


def test_a_proportion_of_groups_is_wilsons_of_rao_and_scotts_number_of_images():
    rng = np.random.default_rng(3)
    group_of = rng.integers(25, size=120)
    right = torch.from_numpy(rng.random(120) < 0.3 + 0.5 * (group_of % 2))
    sizes = np.bincount(group_of)
    share = right.double().mean().item()
    residuals = np.bincount(group_of, weights=right.numpy()) - share * sizes
    variance = 25 / 24 * (residuals**2).sum() / 120**2
    images = share * (1 - share) / variance
    assert images < 100
    groups = group_of.astype(str).tolist()
    assert proportion_interval(right, groups) == pytest.approx(wilson_interval(share * images, images))
    assert proportion_interval(torch.ones(120, dtype=torch.bool), groups) == pytest.approx(wilson_interval(25, 25))
    assert proportion_interval(right) == wilson_interval(int(right.sum()), 120)
    alike = torch.tensor([True, False] * 20)  # pairs more alike than chance makes them tell no more than images do
    assert proportion_interval(alike, [str(i // 2) for i in range(40)]) == wilson_interval(20, 40)
    assert proportion_interval(right[:0], []) is proportion_interval(right[:0]) is None


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (3, 3), (0, 40), (37, 40), (9999, 10_000)])
def test_wilson_interval_is_scipys(successes, trials):
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert wilson_interval(0, 0) is None
