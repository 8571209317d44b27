"""McNemar's test: whether two classifiers differ, from the images that one of them gets right and the other does not.

Sources: McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages" (1947);
Edwards, "Note on the Correction for Continuity" (1948); Dietterich, "Approximate Statistical Tests for Comparing
Supervised Classification Learning Algorithms" (1998), where this is the test for two classifiers that were each trained
once. Images count as independent: where several are of one patient, p is too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import UserError
from engine.predictions import Predictions


@dataclass(frozen=True)
class McNemar:
    """Attributes:
    b: images that the first classifier alone gets right.
    c: images that the second alone gets right.
    p_exact: two-sided binomial test of b out of b + c at one half; the one to report.
    chi2: (|b - c| - 1)^2 / (b + c), Edwards' continuity correction; 0 where b = c.
    p_chi2: of chi2 at one degree of freedom; close to ``p_exact`` from b + c = 25 on.
    """

    b: int
    c: int
    p_exact: float
    chi2: float
    p_chi2: float


def mcnemar(b: int, c: int) -> McNemar:
    """The test of two counts of discordant images, each at least 0."""
    n = b + c
    chi2 = max(0, abs(b - c) - 1) ** 2 / n if n else 0.0
    return McNemar(b, c, _binomial_p(min(b, c), n), chi2, math.erfc(math.sqrt(chi2 / 2)))


def compare_predictions(first: Predictions, second: Predictions) -> McNemar:
    """The test of two runs on the same images, which are matched by their names.

    Raises:
        UserError: the images, or what they are said to be, are not the same.
    """
    rights = [_right_by_file(predictions) for predictions in (first, second)]
    for here, there, which in ((*rights, "second"), (*rights[::-1], "first")):
        missing = next((file for file in here if file not in there), None)
        if missing is not None:
            raise UserError(f"{missing}: is not among the {which} run's predictions; score both on the same images")
    for file, (truth, _) in rights[0].items():
        if rights[1][file][0] != truth:
            raise UserError(
                f"{file}: is {truth} in the first run and {rights[1][file][0]} in the second; mend the labels"
            )
    pairs = [(right, rights[1][file][1]) for file, (_, right) in rights[0].items()]
    return mcnemar(pairs.count((True, False)), pairs.count((False, True)))


def _right_by_file(predictions: Predictions) -> dict[str, tuple[str, bool]]:
    """{file: (its class, whether it was recognised)}"""
    names = predictions.class_names
    pairs = zip(predictions.labels.tolist(), predictions.predictions.tolist(), strict=True)
    found = {
        file: (names[label], label == predicted)
        for file, (label, predicted) in zip(predictions.files, pairs, strict=True)
    }
    if len(found) < len(predictions.files):
        raise UserError("the predictions name a file twice, so that they cannot be matched; score each image once")
    return found


def _binomial_p(fewer: int, n: int) -> float:
    """min(1, 2 P(X <= fewer)) for X binomial of n at one half, in whole numbers: exact however many there are."""
    ways = total = 1
    for k in range(1, fewer + 1):
        ways = ways * (n - k + 1) // k
        total += ways
    return min(1.0, 2 * total / 2**n)
