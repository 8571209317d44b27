"""What may not have been meant of a division, a line for each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from engine.data.listing import printable
from engine.data.samples import Samples, shorten

_PATIENT = re.compile(r"(?<![a-z])((?:patient|subject|person|case|sub)[-_ ]?)\d+", re.IGNORECASE)
_GAPS = {
    0: "{} has no image of {}: figures there say nothing of it",
    1: "{} has one image alone of {}: recall there is 0 or 1",
}


def find_patients(samples: Samples, names: Sequence[str]) -> str | None:
    """A line where there are no groups, and half of the ``names`` look like one of several images of a patient."""
    if samples.groups is not None:
        return None
    images_of = defaultdict(list)
    for name, label in zip(names, samples.labels.tolist(), strict=True):
        if match := _PATIENT.search(name):
            images_of[label, match[0]].append(match)  # by label, as each class may count its images from 1
    counts = samples.class_counts()
    several = [own for (label, _), own in images_of.items() if 1 < len(own) < counts[label]]
    if 2 * sum(map(len, several)) < len(names) or not several:
        return None
    first, second = several[0][:2]
    return (
        f"there are no groups, and {printable(first.string)} and {printable(second.string)} look like images of one "
        rf"patient, who may come to stand on two sides; to keep each on one, add --group-regex '({first[1]}\d+)'"
    )


def find_class_gaps(parts: Mapping[str, Samples]) -> list[str]:
    """A line for each set to score, by its name, that has no image of some classes, and for each that has one alone."""
    found = []
    for part, samples in parts.items():
        counts = samples.class_counts()
        for count, told in _GAPS.items():
            if (counts == count).any():
                classes = [samples.class_names[label] for label in np.flatnonzero(counts == count)]
                found.append(told.format(part, printable(shorten(classes))))
    return found
