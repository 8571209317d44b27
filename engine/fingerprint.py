"""Digests by which a run knows its images again; where their folder stands is left out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from engine.build import selected_on
from engine.config import SELECT_ON, Config
from engine.data import Samples, Splits


def of_division(splits: Splits) -> dict[str, str]:
    """Of each set that there is, whatever order it is in: while all are the same, none has an image of another.

    ``splits`` are those of ``open_data``, before unreadable images are left out of them.
    """
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: _digest(part, in_order=False) for name, part in parts.items() if part is not None}


def of_training(splits: Splits, config: Config) -> dict[str, str]:
    """Of what is trained on and what is chosen on, in their order, which decides what is drawn."""
    found = {
        "train": _digest(splits.train, in_order=True),
        SELECT_ON[config.select_on]: _digest(selected_on(splits, config), in_order=True),
    }
    if splits.train.weights is not None:
        found["weights"] = hashlib.sha256(repr(splits.train.weights.tolist()).encode()).hexdigest()
    return found


def _digest(samples: Samples, *, in_order: bool) -> str:
    """Of the names of files, the classes and all labels."""
    names, labels = _names(samples.files), samples.labels.tolist()
    places = list(range(len(names)))
    if not in_order:
        places.sort(key=names.__getitem__)
    told: list[Any] = [samples.class_names, [names[i] for i in places], [labels[i] for i in places]]
    told += [(name, head.class_names, head.labels[places].tolist()) for name, head in samples.heads.items()]
    return hashlib.sha256(repr(tuple(told)).encode()).hexdigest()


def _names(files: Sequence[str]) -> list[str]:
    """Below the folder that is common to all: images of two patients may have one name in folders of their own."""
    top = os.path.commonpath({file[: file.rfind(os.sep) + 1] for file in files})
    return [file.removeprefix(top) for file in files]
