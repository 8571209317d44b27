"""Operating points: the threshold that gives a wanted sensitivity, chosen on one set of images and tried on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from engine.intervals import proportion_interval


def sensitivity_threshold(scores: Tensor, positive: Tensor, sensitivity: float) -> float | None:
    """The largest t such that at least that share of the positive samples has a score of t or more; None of none.

    Args:
        scores: (N,); positive: (N,) bool; sensitivity: above 0 and at most 1.
    """
    own = scores[positive].sort(descending=True).values
    if not len(own):
        return None
    # 0.55 * 100 is a little more than 55 in floating point
    return own[math.ceil(sensitivity * len(own) - 1e-9) - 1].item()


def operating_points(
    chosen_on: tuple[Tensor, Tensor],
    tried_on: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    sensitivities: Sequence[float],
    positive_class: str | None = None,
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """What ``metrics.json`` holds as ``operating_points``: an entry for each class and wanted sensitivity.

    An image is called positive where the probability of the class is at least ``threshold``: the largest one that gives
    the wanted sensitivity on the ``chosen_on`` images of the class in the first set, of which one or two tell little.
    ``sensitivity`` and ``specificity`` are those on the second set, with Wilson's 95% intervals
    (`engine.intervals.proportion_interval`); what there are no images for is None.

    Args:
        chosen_on, tried_on: probabilities (N, classes) and labels (N,).
        positive_class: the one class to do this for; None: each against the rest.
        groups: of the images of the second set.
    """
    points = []
    for label, name in enumerate(class_names):
        if positive_class not in (None, name):
            continue
        (scores, labels), (tried_scores, tried_labels) = chosen_on, tried_on
        positive = tried_labels == label
        for wanted in sensitivities:
            threshold = sensitivity_threshold(scores[:, label], labels == label, wanted)
            point: dict[str, Any] = {
                "class": name,
                "wanted_sensitivity": wanted,
                "threshold": threshold,
                "chosen_on": int((labels == label).sum()),
            }
            called = None if threshold is None else tried_scores[:, label] >= threshold
            points.append(point | tried(called, positive, groups))
    return points


def tried(called: Tensor | None, positive: Tensor, groups: Sequence[str] | None) -> dict[str, Any]:
    """``sensitivity`` and ``specificity`` with their intervals, of what was ``called`` and is ``positive``, (n,) bool.

    None of what there is no image for, and of all where ``called`` is None.
    """
    if called is None:
        return dict.fromkeys(f"{name}{end}" for name in ("sensitivity", "specificity") for end in ("", "_interval"))
    found: dict[str, Any] = {}
    for name, of in (("sensitivity", positive), ("specificity", ~positive)):
        right = (called == positive)[of]
        own = groups and [groups[i] for i in of.nonzero().flatten().tolist()]
        found[name] = right.double().mean().item() if len(right) else None
        found[f"{name}_interval"] = proportion_interval(right, own)
    return found
