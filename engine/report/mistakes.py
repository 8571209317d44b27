"""The images that a run is surest of and wrong about, as small pictures for the page, with Grad-CAM."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.data.decode import BadImage
from engine.errors import UserError
from engine.grad_cam import explain
from engine.originals import Originals
from engine.pictures import worst_mistakes
from engine.pictures.mistakes import overlay
from engine.predictions import Predictions
from engine.report.runs import ReportedRun
from engine.report.settings import without_folders
from engine.trained import read_trained, restore

SHOWN = 12
_SIDE = 224
"""Pixels of the longer side of a picture."""
_LARGEST_ENLARGED = 64
"""Images up to this side are enlarged by a whole factor, so that each of their pixels is a square."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Mistake:
    """An image that was called wrongly; ``evidence`` is Grad-CAM's."""

    file: str
    truth: str
    truth_probability: str
    prediction: str
    probability: str
    image: Thumbnail
    evidence: Thumbnail | None


def find_mistakes(run: ReportedRun, device: torch.device) -> tuple[list[Mistake], str]:
    """The worst mistakes of a finished run, the worst first, and in words what is missing of them."""
    predictions = run.predictions.get(None)
    if predictions is None:
        return [], "predictions.csv is missing, which says what was predicted of each image."
    worst = worst_mistakes(predictions, SHOWN)
    if not worst:
        return [], "There is none: every image was recognised."
    found: dict[int, Mistake] = {}
    remarks: list[str] = []
    reasons: list[str] = []
    for path, rows in _models(run, predictions, worst).items():
        try:
            _, config = read_trained(str(path))
            originals = Originals(config)
        except UserError as error:
            remarks.append(f"The images cannot be shown: {error}.")
            continue
        images, unread = _read(originals, predictions, rows)
        reasons += unread
        evidence: dict[int, Thumbnail] = {}
        try:
            evidence = _evidence(path, originals, predictions, images, device) if images else {}
        except UserError as error:
            remarks.append(f"There is no Grad-CAM: {str(error).removeprefix('Grad-CAM: ')}.")
        found |= {i: _mistake(predictions, i, image, evidence.get(i)) for i, image in images.items()}
    if reasons:
        remarks.insert(0, f"{len(reasons)} of the {len(worst)} worst mistakes cannot be shown: {reasons[0]}.")
    remark = without_folders(" ".join(remarks), run.args)
    if run.path.is_absolute():
        remark = remark.replace(str(run.path), run.path.name)
    return [found[i] for i in worst if i in found], remark


def _models(run: ReportedRun, predictions: Predictions, rows: Sequence[int]) -> dict[Path, list[int]]:
    """The run whose model scored each image: of a cross-validation that of the image's fold."""
    if predictions.folds is None:
        return {run.path: list(rows)}
    models: dict[Path, list[int]] = {}
    for i in rows:
        models.setdefault(run.fold_path(predictions.folds[i]), []).append(i)
    return models


def _read(
    originals: Originals, predictions: Predictions, rows: Sequence[int]
) -> tuple[dict[int, Thumbnail], list[str]]:
    images: dict[int, Thumbnail] = {}
    reasons = []
    for i in rows:
        try:
            images[i] = _thumbnail(originals.pixels(predictions.files[i]))
        except (BadImage, UserError) as error:
            reasons.append(str(error))
    return images, reasons


def _evidence(
    path: Path,
    originals: Originals,
    predictions: Predictions,
    images: dict[int, Thumbnail],
    device: torch.device,
) -> dict[int, Thumbnail]:
    """Grad-CAM for the predicted class of each image; with heads, of the last head on the way to that class.

    Raises UserError where the model gives none.
    """
    checkpoint, _ = read_trained(str(path))
    # a handful of images are as fast unfused, which asks nothing of the machine
    config = dataclasses.replace(originals.config, fused_se=False)
    model, heads = restore(checkpoint, config, device)
    wanted: dict[str | None, dict[int, int]] = {}
    for i in images:
        label = int(predictions.predictions[i])
        head, own = (None, label) if heads is None else heads.ends()[predictions.class_names[label]][-1]
        wanted.setdefault(head, {})[i] = own
    found: dict[int, Thumbnail] = {}
    for head, labels in wanted.items():
        samples = originals.samples([predictions.files[i] for i in labels])
        seen = explain(model, samples, config, device, labels=list(labels.values()), head=head)
        for k, i in enumerate(labels):
            if k not in seen.reasons:
                shown = Image.fromarray(np.rint(overlay(seen.images[k], seen.maps[k]) * 255).astype(np.uint8))
                # the network sees the whole image stretched to a square, or else a central square of it
                size = (_SIDE, _SIDE) if config.crop_pct else (images[i].width, images[i].height)
                found[i] = _as_thumbnail(shown.resize(size, Image.Resampling.BICUBIC), exact=False)
    return found


def _mistake(predictions: Predictions, i: int, image: Thumbnail, evidence: Thumbnail | None) -> Mistake:
    names = predictions.class_names
    truth, said = int(predictions.labels[i]), int(predictions.predictions[i])
    return Mistake(
        file=predictions.files[i],
        truth=names[truth],
        truth_probability=f"{predictions.probabilities[i, truth]:.3f}",
        prediction=names[said],
        probability=f"{predictions.probabilities[i, said]:.3f}",
        image=image,
        evidence=evidence,
    )


def _thumbnail(pixels: np.ndarray) -> Thumbnail:
    """Of (H, W, 3) uint8."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    longer = max(image.size)
    width, height = image.size
    if longer <= _LARGEST_ENLARGED:
        factor = _SIDE // longer
        return _as_thumbnail(image.resize((width * factor, height * factor), Image.Resampling.NEAREST), exact=True)
    size = (max(1, round(width * _SIDE / longer)), max(1, round(height * _SIDE / longer)))
    return _as_thumbnail(image.resize(size, Image.Resampling.LANCZOS), exact=False)


def _as_thumbnail(image: Image.Image, *, exact: bool) -> Thumbnail:
    """As PNG, or as JPEG, a tenth of its size."""
    written = io.BytesIO()
    if exact:
        image.save(written, format="PNG", optimize=True)
    else:
        image.save(written, format="JPEG", quality=85, optimize=True)
    data = base64.b64encode(written.getvalue()).decode()
    return Thumbnail(f"data:image/{'png' if exact else 'jpeg'};base64,{data}", image.width, image.height)
