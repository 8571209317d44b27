"""McNemar's test: whether two classifiers differ, from the images that one of them gets right and the other does not.

Images of one group (patient) are not independent; groups are. Of two classifiers that are alike either could have been
the other in each group, so that its difference d, the images that the first alone gets right less those that the second
alone does, is as often -d. p is how often the sum of all d would be as far from 0 as it is or farther, were each one's
sign the throw of a fair coin: the randomization test of Fisher, "The Design of Experiments" (1935), and Pitman,
"Significance Tests Which May be Applied to Samples from Any Populations" (1937). It takes no approximation, however few
groups there are or unequal. Each image counts the same, and a group as much as its d. Where each image is a group of
its own this is McNemar's exact test.

Sources: McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages" (1947);
Edwards, "Note on the Correction for Continuity" (1948); Dietterich, "Approximate Statistical Tests for Comparing
Supervised Classification Learning Algorithms" (1998), where this is the test for two classifiers that were each trained
once. The chi-square by group, but for Edwards' correction and a factor (groups - 1) / groups: Obuchowski, "On the
comparison of correlated proportions for clustered data" (1998), as Yang, Sun and Hardin write it, "A note on the tests
for clustered matched-pair binary data" (2010). Durkalski et al., "Analysis of clustered matched-pair data" (2003),
divide each d by the images of its group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import UserError
from engine.predictions import Predictions

_NEGLIGIBLE = 1e-120
"""A share of all signs that is left out: without these, and their products of two, nothing underflows."""


@dataclass(frozen=True)
class ByGroup:
    """Attributes:
    groups: how many the images are of.
    b: groups of whose images the first classifier gets more right.
    c: groups of whose images the second does.
    """

    groups: int
    b: int
    c: int


@dataclass(frozen=True)
class McNemar:
    """Attributes:
    b: images that the first classifier alone gets right.
    c: images that the second alone gets right.
    p_exact: two-sided, by image (the binomial test of b out of b + c at one half) or by group; the one to report. Of
        100,000 images or groups that differ it has nine digits right, and one below 1e-100 may be told too small.
    chi2: (|b - c| - 1)^2 / (b + c), Edwards' continuity correction; 0 where b = c. By group what it is divided by is
        the sum of the squares of the groups' differences.
    p_chi2: of chi2 at one degree of freedom; close to ``p_exact`` where 25 images (groups) or more differ.
    by_group: of what the test is where it counts groups; None where it counts images, each by itself.
    """

    b: int
    c: int
    p_exact: float
    chi2: float
    p_chi2: float
    by_group: ByGroup | None = None


def mcnemar(b: int, c: int) -> McNemar:
    """The test of two counts of discordant images, each at least 0, which are independent."""
    return _test(b, c, np.repeat((1, -1), (b, c)))


def mcnemar_by_group(b: Sequence[int], c: Sequence[int]) -> McNemar:
    """The test of these counts in each group, which may be 0; the groups are independent, and not their images."""
    differences = np.array(b, dtype=np.int64) - np.array(c, dtype=np.int64)
    by_group = ByGroup(len(differences), int((differences > 0).sum()), int((differences < 0).sum()))
    return replace(_test(sum(b), sum(c), differences), by_group=by_group)


def compare_predictions(first: Predictions, second: Predictions) -> McNemar:
    """The test of two runs on the same images, which are matched by their names.

    By group where several images are of one, else by image. Groups may have other names in the second run; where one
    run alone has any, they hold for both.

    Raises:
        UserError: the images, what they are said to be, or which of them are of one group, are not the same.
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
    groups = _groups(first, second)
    counts = {group: [0, 0] for group in groups.values()}
    for file, (_, right) in rights[0].items():
        if right != rights[1][file][1]:
            counts[groups[file]][0 if right else 1] += 1
    b, c = ([of_group[i] for of_group in counts.values()] for i in (0, 1))
    return mcnemar_by_group(b, c) if len(counts) < len(groups) else mcnemar(sum(b), sum(c))


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


def _groups(first: Predictions, second: Predictions) -> dict[str, str]:
    """{file: its group}, the file itself where neither run has groups."""
    known = [dict(zip(run.files, run.groups, strict=True)) for run in (first, second) if run.groups is not None]
    if not known:
        return {file: file for file in first.files}
    for here, there, which in ((known[0], known[-1], "first"), (known[-1], known[0], "second")):
        some_of: dict[str, str] = {}
        for file, group in here.items():
            other = some_of.setdefault(group, file)
            if there[file] != there[other]:
                raise UserError(
                    f"{file}: is of one group with {other} in the {which} run alone; give both runs the same groups"
                )
    return known[0]


def _test(b: int, c: int, differences: np.ndarray) -> McNemar:
    """Of (k,) int64 differences of what is independent."""
    squares = int((differences**2).sum())
    chi2 = max(0, abs(b - c) - 1) ** 2 / squares if squares else 0.0
    return McNemar(b, c, _sign_flip_p(differences), chi2, math.erfc(math.sqrt(chi2 / 2)))


def _sign_flip_p(differences: np.ndarray) -> float:
    """P(|sum of +-d| >= |sum of d|), the signs being throws of fair coins.

    That is twice the chance that the sizes |d| whose sign is not the sum's add up to what they do here or less. Sizes
    come one after the other, all d of a size at once. Every figure is a sum of products of what is not negative, so
    that roundings add up and nothing more: of k differences it is right to 8 k 2^-53 of itself.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    against = int(sizes @ counts - abs(differences.sum())) // 2
    shares, least = np.ones(1), 0  # shares[i]: of all signs those whose sizes add up to least + i
    for i in np.argsort(-counts):
        size = int(sizes[i])
        heads, fewest = _trimmed(_heads(int(counts[i])))
        spread = np.zeros(len(shares) + size * (len(heads) - 1))
        for start, share in enumerate(heads):
            spread[start * size : start * size + len(shares)] += share * shares
        least += size * fewest
        shares, dropped = _trimmed(spread[: max(0, against - least + 1)])
        least += dropped
    return min(1.0, 2 * float(shares.sum()))


def _heads(n: int) -> np.ndarray:
    """(n + 1,) float64: how often n fair coins show 0, 1, ... n heads."""
    k = np.arange(n // 2, n)
    falling = np.cumprod(np.append(1.0, (n - k) / (k + 1)))
    k = np.arange(n + 1)
    shares = falling[np.maximum(k, n - k) - n // 2]
    return shares / shares.sum()


def _trimmed(shares: np.ndarray) -> tuple[np.ndarray, int]:
    """Without what is negligible at both ends, and how many are gone from the first one."""
    kept = np.flatnonzero(shares >= _NEGLIGIBLE)
    return (shares[kept[0] : kept[-1] + 1], int(kept[0])) if len(kept) else (shares[:0], 0)
