"""What a reader has to know before the figures: an unfinished run, a choice on the test images, other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from engine.report.runs import ReportedRun

Caution = tuple[str, str]
"""What is the matter, and what follows from it."""


def scored_split(metrics: Mapping[str, Any] | None) -> str:
    """What the figures are of: "test" or "validation"; of images that were named, the last part of their name."""
    return PurePath(str((metrics or {}).get("split", "validation"))).name


def selecting_split(metrics: Mapping[str, Any] | None) -> str:
    """What the epoch was chosen on, "" where a person named it."""
    return (metrics or {}).get("selected_on", "validation") or ""


def run_cautions(run: ReportedRun) -> list[Caution]:
    if run.metrics is None:
        done, wanted = len(run.history), run.args.get("epochs", "?")
        text = (
            f"metrics.json is missing: {done} of {wanted} epochs are done, and nothing was scored at the end. Below is "
            f"what there is. python -m engine.train --resume {run.path.resolve().name} goes on."
        )
        return [("This run has not finished.", text)]
    if run.is_cross_validation:
        text = (
            "Each image was scored by the model of its fold, which has not seen it. What is counted, such as accuracy "
            "and F1, is best taken of all images together. AUROC and average precision of all together also compare "
            "scores of different models, which need not be on one scale; their mean over the folds does not."
        )
        return [(f"These are the figures of {len(run.metrics['folds'])} models.", text)]
    if selecting_split(run.metrics) == "test":
        text = (
            "Each epoch was scored on them and the best one kept, so that these figures are higher than those of "
            "images that nothing was chosen on. They are not a held-out result, and must not be reported as one."
        )
        return [("The epoch was chosen on the test images.", text)]
    if scored_split(run.metrics) == "validation":
        text = (
            "The figures are those of the validation images, which the epoch was chosen on: they are higher than "
            "those of images that nothing was chosen on."
        )
        return [("There is no test set.", text)]
    return []


def comparison_cautions(runs: Sequence[ReportedRun]) -> list[str]:
    """What keeps the figures of these runs, which have the same classes, from meaning the same."""
    if len(runs) < 2:
        return []
    found = []
    splits = [scored_split(run.metrics) for run in runs]
    if len(set(splits)) > 1:
        parts = (f"{run.name} on {split}" for run, split in zip(runs, splits, strict=True))
        found.append(f"The runs were not scored on the same images: {', '.join(parts)}.")
    elif len({frozenset(run.predictions[None].files) for run in runs if None in run.predictions}) > 1:
        found.append("The runs were not scored on the same images; McNemar's test counts those that both predicted.")
    if "test" in {selecting_split(run.metrics) for run in runs}:
        chosen = ", ".join(run.name for run in runs if selecting_split(run.metrics) == "test")
        found.append(f"The epoch of {chosen} was chosen on the test images, which flatters it.")
    flattered = [run.name for run in runs if scored_split(run.metrics) == selecting_split(run.metrics) == "validation"]
    if flattered:
        found.append(
            f"The epoch of {', '.join(flattered)} was chosen on the very images compared here: figures and p flatter."
        )
    if len({str(run.args.get("data_dir")) for run in runs}) > 1:
        found.append("The runs name different data folders; images are matched by their names within them.")
    return found
