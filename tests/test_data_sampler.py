"""The sampler's frequencies, and that an epoch is a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from engine.data import WeightedSampler
from engine.errors import UserError

COUNTS = np.array([1000, 300, 60, 7])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def balance_p_value(sampler: WeightedSampler, epochs: int = 5) -> float:
    """The chance that classes drawn alike would differ as much as these do."""
    return chisquare(sum(sampler.histogram(epoch) for epoch in range(epochs))).pvalue


def test_inverse_weighting_draws_every_class_alike():
    assert balance_p_value(WeightedSampler(LABELS, 4, weighting="inverse", seed=0)) > 0.01


def test_the_test_of_balance_has_power():
    assert balance_p_value(WeightedSampler(LABELS, 4, weighting="none", seed=0)) < 1e-9


def test_images_within_a_class_are_drawn_alike():
    sampler = WeightedSampler(LABELS, 4, weighting="inverse", seed=3)
    drawn = np.concatenate([sampler.draw(epoch) for epoch in range(40)])
    for label in range(1, 4):
        hits = np.bincount(drawn, minlength=len(LABELS))[label == LABELS]
        assert hits.min() > 0
        assert chisquare(hits).pvalue > 0.01


def test_class_weight_times_count_is_constant():
    sampler = WeightedSampler(LABELS, 4, weighting="inverse", seed=0)
    np.testing.assert_allclose(sampler.class_weights() * COUNTS, 1)


def test_no_weighting_is_a_permutation():
    sampler = WeightedSampler(LABELS, 4, weighting="none", seed=0)
    order = sampler.draw(0)
    assert not np.array_equal(order, np.arange(len(LABELS)))
    assert np.array_equal(np.sort(order), np.arange(len(LABELS)))
    assert sampler.histogram(5).tolist() == COUNTS.tolist()


@pytest.mark.parametrize("weighting", ["inverse", "none"])
def test_an_epoch_depends_on_seed_and_epoch_alone(weighting):
    a = WeightedSampler(LABELS, 4, weighting=weighting, seed=5)
    b = WeightedSampler(LABELS, 4, weighting=weighting, seed=5)
    a.draw(0)
    assert np.array_equal(a.draw(7), b.draw(7))
    assert a.draw(7).dtype == np.int64
    assert len(a.draw(7)) == len(a) == len(LABELS)
    assert not np.array_equal(a.draw(7), a.draw(8))
    assert not np.array_equal(a.draw(7), WeightedSampler(LABELS, 4, weighting=weighting, seed=6).draw(7))


def test_histogram_counts_what_is_drawn_and_keeps_classes_without_images():
    sampler = WeightedSampler(LABELS, 6, weighting="inverse", seed=0)
    assert sampler.histogram(2).tolist() == np.bincount(LABELS[sampler.draw(2)], minlength=6).tolist()
    assert sampler.histogram(2)[4:].tolist() == [0, 0]


def test_more_images_than_torch_multinomial_takes_are_drawn_exactly():
    labels = np.zeros(2**24 + 3, dtype=np.int64)
    labels[-3:] = 1
    drawn = WeightedSampler(labels, 2, weighting="inverse", seed=0).draw(0)
    rare = drawn[drawn >= 2**24]
    assert abs(len(rare) - len(drawn) / 2) < 5 * np.sqrt(len(drawn)) / 2
    assert chisquare(np.bincount(rare - 2**24)).pvalue > 0.01


def test_unknown_weighting_is_refused():
    with pytest.raises(UserError, match="unknown sample weighting 'sqrt': choose one of inverse, none"):
        WeightedSampler(LABELS, 4, weighting="sqrt", seed=0)
