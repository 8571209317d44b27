"""What a model makes of a set of images, and the figures that a run or ``engine.evaluate`` ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data import Loader, Samples
from engine.device import Precision
from engine.errors import UserError
from engine.heads import NO_LABEL, Heads
from engine.intervals import bootstrap_intervals
from engine.metrics import ClassificationMetrics, checked_samples, classification_metrics, probability_figures
from engine.operating_points import operating_points
from engine.predictions import Predictions, names_below

TTA = ("none", "hflip")


@dataclass(frozen=True, eq=False)
class Scored:
    """n images with what the model says of them.

    Attributes:
        files: n names, as the samples have them.
        class_names: the names of labels 0, 1, ...
        logits: (n, classes) float64, finite, on the CPU.
        labels: (n,) int64, the truth.
        heads: of a model with heads the same of each one, on the images that count there; the rest is then what they
            say together, end to end (`Heads.ends`).
        groups: n names of what belongs together, such as patients; None: each image is by itself.
        when: of a head the {head: class} on whose images alone it is scored, where it has such a condition.
    """

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    logits: Tensor
    labels: Tensor
    heads: Mapping[str, Scored] = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    when: Mapping[str, str] = field(default_factory=dict)

    def predictions(self, folder: Path) -> Predictions:
        """For ``predictions.csv``, with names relative to ``folder``."""
        return Predictions(
            names_below(self.files, folder),
            self.class_names,
            self.labels,
            self.logits.argmax(dim=1),
            self.logits.softmax(dim=1),
            self.groups,
        )


def score(
    model: nn.Module, loader: Loader, class_names: tuple[str, ...], precision: Precision, heads: Heads | None = None
) -> dict[str, Any]:
    """The metrics of `engine.metrics` over one pass of the loader. Raises UserError where a logit is not finite.

    With ``heads`` they are end to end, and under "heads" stand those of each one.
    """
    if heads is not None:
        scored = _score_heads(model, loader, heads, precision)
        of_head = {name: _metrics(own) for name, own in scored.heads.items()}
        return {**_metrics(scored), "heads": of_head}
    try:
        return _pass(model, loader, class_names, precision, "none").compute()
    except ValueError as error:
        raise _cannot_score(error) from error


def score_images(
    model: nn.Module,
    loader: Loader,
    class_names: tuple[str, ...],
    precision: Precision,
    *,
    heads: Heads | None = None,
    tta: str = "none",
) -> Scored:
    """Logits and labels over one pass of an evaluation loader, each with its file.

    Args:
        heads: those of the model, whose loader then is one by index; a head for which no image counts is left out.
        tta: without heads, one of ``TTA``: "hflip" takes the mean of the probabilities of the image and of its mirror
            image; the logits are then the logarithm of that mean.

    Raises:
        UserError: a logit is not finite; or of heads, the truth end to end is not known of any image.
    """
    if heads is not None:
        return _score_heads(model, loader, heads, precision)
    metrics = _pass(model, loader, class_names, precision, tta)
    try:
        logits, labels = checked_samples(torch.cat(metrics.logits), torch.cat(metrics.labels), len(class_names))
    except ValueError as error:
        raise _cannot_score(error) from error
    # A pass gives every image once, in order, so that those that it has lost by its end are those that it left out.
    kept = loader.kept()
    assert labels.tolist() == loader.data.labels[kept].tolist(), "the pass gave other images than the loader kept"
    files, groups = _named(loader.data, kept.tolist())
    return Scored(files, class_names, logits, labels, groups=groups)


def _score_heads(model: nn.Module, loader: Loader, heads: Heads, precision: Precision) -> Scored:
    model.eval()
    batches: list[Mapping[str, Tensor]] = []
    shown: list[Tensor] = []
    with torch.inference_mode():
        for images, indices in loader.epoch(0):
            with precision.autocast():
                batches.append({name: logits.float() for name, logits in model(images).items()})
            shown.append(indices.clone())
    indices = torch.cat(shown).cpu()
    logits = {name: torch.cat([batch[name] for batch in batches]).cpu().double() for name in heads.tasks}
    labels = {name: torch.from_numpy(own)[indices] for name, own in heads.labels(loader.data).items()}
    files, groups = _named(loader.data, indices.tolist())

    ends = heads.ends()
    truth = torch.full_like(indices, NO_LABEL)
    for end, path in enumerate(ends.values()):
        truth[torch.stack([labels[head] == label for head, label in path]).all(dim=0)] = end
    of_head = {
        name: replace(
            _counted(files, groups, task.class_names, logits[name], labels[name]),
            when=dict([task.spec.when] if task.spec.when else []),
        )
        for name, task in heads.tasks.items()
        if (labels[name] != NO_LABEL).any()
    }
    return replace(_counted(files, groups, tuple(ends), heads.together(logits), truth), heads=of_head)


def _named(samples: Samples, indices: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    groups = samples.groups
    return tuple(samples.files[i] for i in indices), groups and tuple(groups[i] for i in indices)


def _counted(
    files: Sequence[str],
    groups: tuple[str, ...] | None,
    class_names: tuple[str, ...],
    logits: Tensor,
    labels: Tensor,
) -> Scored:
    counts = labels != NO_LABEL
    if not counts.any():
        raise UserError(f"cannot score: of no image it is known which of {', '.join(class_names)} it is; label some")
    try:
        logits, labels = checked_samples(logits[counts], labels[counts], len(class_names))
    except ValueError as error:
        raise _cannot_score(error) from error
    kept = counts.nonzero().flatten().tolist()
    of_kept = groups and tuple(groups[i] for i in kept)
    return Scored(tuple(files[i] for i in kept), class_names, logits, labels, groups=of_kept)


def _metrics(scored: Scored) -> dict[str, Any]:
    return classification_metrics(scored.logits, scored.labels, scored.class_names)


def final_metrics(
    scored: Scored,
    validation: Scored | None,
    *,
    split: str,
    temperature: float | None,
    sensitivities: Sequence[float],
    head_temperatures: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """What metrics.json holds beside where it comes from: `classification_metrics`, and

    - ``intervals``: those of `engine.intervals`; ``intervals_by``, what was drawn for them, "image" or, where some
      have several images, "group"; and of groups their number as ``groups``.
    - ``temperature``: that of `engine.calibration`, None where there is none; and ``calibrated``, which is ``ece``,
      ``loss`` and ``brier`` at that temperature, unless ``split`` is the validation set that it was fitted on.
    - ``operating_points``: those of `engine.operating_points` for ``sensitivities``, chosen on ``validation``; where
      ``split`` is "validation", tried on the same images.
    - ``heads``: of a model with heads the same of each one, at the temperature of its own, and ``when`` it counts.
    """
    metrics = _metrics(scored)
    if scored.when:
        metrics["when"] = dict(scored.when)
    groups = scored.groups
    if groups is not None and len(set(groups)) == len(groups):  # of one image each
        groups = None
    metrics["intervals"] = bootstrap_intervals(scored.logits, scored.labels, scored.class_names, groups=groups)
    metrics["intervals_by"] = "image" if groups is None else "group"
    if groups is not None:
        metrics["groups"] = len(set(groups))
    metrics["temperature"] = temperature
    if temperature is not None and split != "validation":
        metrics["calibrated"] = probability_figures(scored.logits / temperature, scored.labels)
    if sensitivities and validation is not None:
        metrics["operating_points"] = operating_points(
            (validation.logits.softmax(dim=1), validation.labels),
            (scored.logits.softmax(dim=1), scored.labels),
            scored.class_names,
            sensitivities,
            metrics.get("positive_class"),
            groups,
        )
    if scored.heads:
        metrics["heads"] = {
            name: final_metrics(
                own,
                validation and validation.heads.get(name),
                split=split,
                temperature=(head_temperatures or {}).get(name),
                sensitivities=sensitivities,
            )
            for name, own in scored.heads.items()
        }
    return metrics


@torch.inference_mode()
def _pass(
    model: nn.Module, loader: Loader, class_names: tuple[str, ...], precision: Precision, tta: str
) -> ClassificationMetrics:
    model.eval()
    metrics: ClassificationMetrics | None = None
    for images, labels in loader.epoch(0):
        with precision.autocast():
            logits = model(images).float()
            if tta == "hflip":
                mirrored = model(images.flip(3)).float()
                both = torch.logaddexp(F.log_softmax(logits, dim=1), F.log_softmax(mirrored, dim=1))
                logits = both - math.log(2)
        metrics = metrics or ClassificationMetrics(class_names, logits.device)
        metrics.update(logits, labels)
    assert metrics is not None, "a loader holds at least one image"
    return metrics


def _cannot_score(error: ValueError) -> UserError:
    return UserError(f"cannot score: {error}; train with a lower --lr or --amp-dtype bfloat16")
