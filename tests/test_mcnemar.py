"""McNemar's test: by image against scipy's binomial test, by group against every way to draw the signs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from engine.errors import UserError
from engine.mcnemar import ByGroup, McNemar, compare_predictions, mcnemar, mcnemar_by_group
from engine.predictions import Predictions


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (5, 5), (3, 14), (40, 22), (0, 60), (50_200, 49_100)])
def test_mcnemar_is_the_binomial_test_and_edwards_chi_square(b, c):
    found = mcnemar(b, c)
    assert found.p_exact == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue if b + c else 1, rel=1e-9)
    chi2 = max(0, abs(b - c) - 1) ** 2 / (b + c) if b + c else 0
    assert found.chi2 == pytest.approx(chi2)
    assert found.p_chi2 == pytest.approx(scipy.stats.chi2.sf(chi2, df=1), rel=1e-9)
    assert mcnemar(c, b) == replace(found, b=c, c=b)


def of_differences(differences: list[int]) -> McNemar:
    """Of groups in each of which both classifiers alone get an image right, and one of them so many more."""
    return mcnemar_by_group([max(d, 0) + 1 for d in differences], [max(-d, 0) + 1 for d in differences])


@pytest.mark.parametrize(
    "differences",
    [
        (),
        (0,),
        (3,),
        (1, -1),
        (5, 5, 5, 5, 5, 5),
        (1, 2, 4, 8, -16),
        (7, 0, -2, -2, 0, 3, 3),
        (9, 1, 1, 1, -1, 6, -4, 2),
    ],
)
def test_p_by_group_is_that_of_all_ways_to_draw_the_signs(differences):
    sums = [sum(drawn) for drawn in itertools.product(*((d, -d) for d in differences))]
    found = of_differences(list(differences))
    assert found.p_exact == pytest.approx(np.mean([abs(drawn) >= abs(sum(differences)) for drawn in sums]), rel=1e-14)
    assert of_differences([-d for d in differences]).p_exact == found.p_exact
    ahead = np.sign(differences).tolist()
    assert found.by_group == ByGroup(len(differences), ahead.count(1), ahead.count(-1))
    assert found.b - found.c == sum(differences)


@pytest.mark.parametrize("ahead", [0.5, 0.6, 0.75])
def test_many_groups_have_the_p_that_whole_numbers_give(ahead):
    rng = np.random.default_rng(0)
    differences = (rng.integers(0, 10, 700) * np.where(rng.random(700) < ahead, 1, -1)).tolist()
    sizes = [abs(d) for d in differences]
    at_most = (sum(sizes) - abs(sum(differences))) // 2
    ways = np.array([1] + [0] * at_most, dtype=object)  # to choose groups whose sizes add up to 0, 1, ...
    for size in sizes:
        ways = ways + (np.append([0] * size, ways)[: len(ways)] if size else ways)
    expected = min(Fraction(1), Fraction(2 * ways.sum(), 2**700))
    assert of_differences(differences).p_exact == pytest.approx(float(expected), rel=1e-12)


def test_p_knows_no_unit():
    differences = [1] * 700 + [-1] * 660 + [2] * 30 + [-2] * 10
    once, thrice = (of_differences([unit * d for d in differences]).p_exact for unit in (1, 3))
    assert thrice == pytest.approx(once, rel=1e-13)
    assert once == pytest.approx(scipy.stats.norm.sf((80 - 1) / (1360 + 4 * 40) ** 0.5) * 2, rel=0.01)


def test_p_by_chi_square_comes_near_with_many_groups():
    rng = np.random.default_rng(1)
    found = of_differences((rng.integers(1, 4, 900) * np.where(rng.random(900) < 0.55, 1, -1)).tolist())
    assert 0.01 < found.p_exact < 0.5
    assert found.p_chi2 == pytest.approx(found.p_exact, rel=0.02)


def test_a_hundred_thousand_groups_that_all_agree_have_a_p_of_nothing():
    assert of_differences([1, 2, 3, 4] * 25_000).p_exact < 1e-100


def test_groups_of_one_image_are_images():
    found = mcnemar_by_group([1] * 14 + [0] * 9, [0] * 14 + [1] * 3 + [0] * 6)
    assert replace(found, by_group=None) == mcnemar(14, 3)
    assert found.by_group == ByGroup(23, 14, 3)


def predictions(said: dict[str, tuple[str, str]], groups: str | None = None) -> Predictions:
    """{file: (truth, prediction)} of the classes "a", "b", "c"; the letters of ``groups`` are the files' groups."""
    labels, predicted = torch.tensor([["abc".index(name) for name in pair] for pair in said.values()]).T
    of_files = None if groups is None else tuple(groups)
    return Predictions(tuple(said), ("a", "b", "c"), labels, predicted, torch.eye(3)[predicted].double(), of_files)


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


def right_and_wrong(right: str) -> dict[str, tuple[str, str]]:
    """Images 0, 1, ... of class "a", of which those with an "x" are recognised."""
    return {str(i): ("a", "a" if of_image == "x" else "b") for i, of_image in enumerate(right)}


def test_what_is_beyond_chance_by_image_may_not_be_by_patient():
    first, second = right_and_wrong("xxxxxxxxxxxxxx----------"), right_and_wrong("-------------xxxxx------")
    by_image = compare_predictions(predictions(first), predictions(second))
    assert (by_image.b, by_image.c, by_image.by_group) == (13, 4, None)
    assert by_image.p_exact < 0.05
    patients = "A" * 8 + "B" * 8 + "C" * 8
    by_group = compare_predictions(predictions(first, patients), predictions(second, patients))
    assert (by_group.b, by_group.c, by_group.by_group) == (13, 4, ByGroup(3, 2, 1))
    assert by_group.p_exact == 0.5  # of +-8 +-3 +-2 those as far from 0 as 9: four of eight
    assert by_group.chi2 == pytest.approx((9 - 1) ** 2 / (8**2 + 3**2 + 2**2))


def test_copies_of_images_change_no_p():
    first, second = "xxxxxxxxxx---", "---x---xxxx-x"
    once = compare_predictions(*(predictions(right_and_wrong(right)) for right in (first, second)))
    groups = "ABCDEFGHIJKLM" * 5
    copied = compare_predictions(*(predictions(right_and_wrong(right * 5), groups) for right in (first, second)))
    assert (copied.b, copied.c) == (5 * once.b, 5 * once.c)
    assert copied.p_exact == once.p_exact
    assert copied.p_exact > 3 * mcnemar(copied.b, copied.c).p_exact


def test_groups_of_one_run_hold_for_both_under_any_names():
    first, second = right_and_wrong("xxxx-x"), right_and_wrong("------")
    expected = compare_predictions(predictions(first, "AABBCC"), predictions(second, "AABBCC"))
    assert expected.by_group == ByGroup(3, 3, 0)
    reordered = dict(reversed(second.items()))
    for one, two in (("AABBCC", None), (None, "CCBBAA"), ("AABBCC", "AACCBB")):
        assert compare_predictions(predictions(first, one), predictions(reordered, two)) == expected
    alone = compare_predictions(predictions(first, "ABCDEF"), predictions(second))
    assert alone == compare_predictions(predictions(first), predictions(second))


def test_runs_that_group_images_otherwise_are_not_compared():
    said = right_and_wrong("x-x-")
    with pytest.raises(UserError, match=r"^1: is of one group with 0 in the first run alone; give both runs the same"):
        compare_predictions(predictions(said, "AABB"), predictions(said, "ABCC"))
    with pytest.raises(UserError, match=r"^3: is of one group with 1 in the second run alone; "):
        compare_predictions(predictions(said, "ABCD"), predictions(said, "ABCB"))
