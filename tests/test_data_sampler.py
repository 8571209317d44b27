"""The sampler's frequencies, and that an epoch is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from engine.data import WeightedSampler
from engine.errors import UserError

COUNTS = np.array([1000, 300, 60, 7])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
OWN_WEIGHTS = np.random.default_rng(1).uniform(0.5, 2, len(LABELS)) * (np.arange(len(LABELS)) % 5 > 0)
SHARES = {  # of the draws, by class, in proportion
    "none": COUNTS,
    "inverse": np.ones(4),
    "sqrt": np.sqrt(COUNTS),
    "power": COUNTS**0.75,
    "effective": [c * (1 - 0.99) / (1 - 0.99**c) for c in COUNTS],
    "column": [OWN_WEIGHTS[label == LABELS].sum() for label in range(4)],
}


def make(sampling: str, labels: np.ndarray = LABELS, seed: int = 0, **options) -> WeightedSampler:
    own = {"weights": OWN_WEIGHTS} if sampling == "column" else {}
    return WeightedSampler(
        labels, int(labels.max()) + 1, sampling=sampling, seed=seed, alpha=0.25, beta=0.99, **own, **options
    )


@pytest.mark.parametrize("sampling", SHARES)
def test_a_million_draws_have_the_frequencies_of_the_weighting(sampling):
    sampler = make(sampling, replacement=True)
    epochs = -(-(10**6) // len(sampler))
    drawn = np.concatenate([sampler.draw(epoch) for epoch in range(epochs)])
    expected = len(drawn) * np.divide(SHARES[sampling], np.sum(SHARES[sampling]))
    classes = np.bincount(LABELS[drawn], minlength=4)
    assert chisquare(classes, expected).pvalue > 0.001
    np.testing.assert_allclose(sampler.expected() * epochs, expected)

    # and among the images of one class, where the weights are the class's own
    weights = OWN_WEIGHTS if sampling == "column" else np.ones(len(LABELS))
    for label in range(4):
        inside = weights[label == LABELS]
        hits = np.bincount(drawn, minlength=len(LABELS))[label == LABELS]
        assert not hits[inside == 0].any()
        hits, inside = hits[inside > 0], inside[inside > 0]
        assert chisquare(hits, hits.sum() * inside / inside.sum()).pvalue > 1e-4


def test_the_test_of_frequencies_has_power():
    sampler = make("sqrt")
    drawn = sum(sampler.histogram(epoch) for epoch in range(20))
    assert chisquare(drawn, drawn.sum() * COUNTS**0.45 / (COUNTS**0.45).sum()).pvalue < 1e-9


@pytest.mark.parametrize("sampling", SHARES)
def test_without_replacement_every_count_is_the_expected_one_rounded(sampling):
    sampler = make(sampling, replacement=False)
    weights = sampler.image_weights()
    expected = len(sampler) * weights / weights.sum()
    orders = [sampler.draw(epoch) for epoch in range(40)]
    for order in orders:
        hits = np.bincount(order, minlength=len(LABELS))
        assert (np.floor(expected - 1e-9) <= hits).all()
        assert (hits <= np.ceil(expected + 1e-9)).all()
        assert np.abs(np.bincount(LABELS[order], minlength=4) - sampler.expected()).max() < 1
    # which of the images come once more than the others is drawn anew
    total = np.bincount(np.concatenate(orders), minlength=len(LABELS))
    assert chisquare(total[expected > 0], len(orders) * expected[expected > 0]).pvalue > 0.001
    assert not np.array_equal(np.sort(orders[0]), orders[0])


def test_no_weighting_is_a_permutation():
    order = make("none").draw(0)
    assert not np.array_equal(order, np.arange(len(LABELS)))
    assert np.array_equal(np.sort(order), np.arange(len(LABELS)))


@pytest.mark.parametrize(
    ("sampling", "epoch_size", "draws"),
    (
        ("inverse", "data", len(LABELS)),
        ("inverse", "over", 4 * 1000),
        ("inverse", "under", 4 * 7),
        ("none", "over", len(LABELS)),
        ("none", "under", len(LABELS)),
        ("sqrt", "over", int(np.ceil(np.sqrt(COUNTS).sum() * np.sqrt(1000)))),
        ("sqrt", "under", int(np.sqrt(COUNTS).sum() * np.sqrt(7))),
    ),
)
@pytest.mark.parametrize("replacement", (False, True))
def test_epoch_sizes(sampling, epoch_size, draws, replacement):
    sampler = make(sampling, epoch_size=epoch_size, replacement=replacement)
    assert len(sampler) == len(sampler.draw(3)) == draws


def test_oversampling_without_replacement_uses_every_image_and_undersampling_none_twice():
    over, under = (make("inverse", epoch_size=size, replacement=False).draw(0) for size in ("over", "under"))
    assert np.bincount(over, minlength=len(LABELS)).min() == 1
    assert np.bincount(LABELS[over]).tolist() == [1000] * 4
    assert np.bincount(under).max() == 1
    assert np.bincount(LABELS[under]).tolist() == [7] * 4


@pytest.mark.parametrize("replacement", (False, True))
@pytest.mark.parametrize("sampling", ("inverse", "none"))
def test_an_epoch_depends_on_seed_and_epoch_alone(sampling, replacement):
    a, b = (make(sampling, seed=5, replacement=replacement) for _ in range(2))
    a.draw(0)
    assert np.array_equal(a.draw(7), b.draw(7))
    assert a.draw(7).dtype == np.int64
    assert not np.array_equal(a.draw(7), a.draw(8))
    assert not np.array_equal(a.draw(7), make(sampling, seed=6, replacement=replacement).draw(7))


@pytest.mark.parametrize("replacement", (False, True))
@pytest.mark.parametrize("world_size", (1, 2, 4, 8))
def test_ranks_draw_together_what_one_process_draws(world_size, replacement):
    sampler = make("inverse", replacement=replacement)
    whole = sampler.draw(2)
    ranks = [sampler.draw(2, rank, world_size) for rank in range(world_size)]
    joined = np.stack(ranks, axis=1).ravel()  # refuses ranks of unequal lengths
    assert np.array_equal(joined, whole[: len(joined)])
    assert len(whole) - len(joined) < world_size


def test_histogram_counts_what_is_drawn_and_keeps_classes_without_images():
    sampler = WeightedSampler(LABELS, 6, sampling="inverse", seed=0)
    assert sampler.histogram(2).tolist() == np.bincount(LABELS[sampler.draw(2)], minlength=6).tolist()
    assert sampler.histogram(2)[4:].tolist() == sampler.expected()[4:].tolist() == [0, 0]


def test_more_images_than_torch_multinomial_takes_are_drawn_exactly():
    labels = np.zeros(2**24 + 3, dtype=np.int64)
    labels[-3:] = 1
    drawn = WeightedSampler(labels, 2, sampling="inverse", seed=0).draw(0)
    rare = drawn[drawn >= 2**24]
    assert len(drawn) == 2**24 + 3
    assert abs(len(rare) - len(drawn) / 2) < 5 * np.sqrt(len(drawn)) / 2
    assert chisquare(np.bincount(rare - 2**24)).pvalue > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"sampling": "cubic"}, "--sampling 'cubic' is not one of none, inverse, sqrt"),
        ({"sampling": "inverse", "epoch_size": "huge"}, "--epoch-size 'huge' is not one of data, over, under"),
        ({"sampling": "power", "alpha": -1.0}, "--sampling-alpha -1.0 does not work: it must be at least 0"),
        ({"sampling": "effective", "beta": 1.0}, "--sampling-beta 1.0 does not work"),
        ({"sampling": "column"}, "needs a manifest with a column 'weight'"),
        ({"sampling": "column", "weights": np.where(LABELS == 3, -2.0, 1)}, "'weight' holds -2.0"),
        ({"sampling": "column", "weights": np.where(LABELS == 3, np.nan, 1)}, "'weight' holds nan"),
        ({"sampling": "column", "weights": np.zeros(len(LABELS))}, "is 0 for every training image"),
    ),
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        WeightedSampler(LABELS, 4, seed=0, **options)
