"""A trained classifier from Python: ``from engine import load; load(RUN_DIR).predict(images)``."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from engine.config import Config
from engine.data import BadFile, Samples
from engine.data.decode import BadImage, decode_opened
from engine.data.unlabelled import Unlabelled, find_images
from engine.device import pick_device
from engine.errors import UserError
from engine.fusion import fuse
from engine.heads import Heads
from engine.predict import Predicted, as_predicted, look_at, look_at_files, nothing_seen
from engine.trained import read_trained, restore

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
_ONE = (str, os.PathLike, Image.Image)


def load(
    path: str | os.PathLike[str], device: str | torch.device | None = None, fused_se: bool | None = None
) -> Classifier:
    """The classifier that a run has kept: its best epoch's, or that of one checkpoint.

    Args:
        path: a run directory of ``engine.train``, or a checkpoint in one.
        device: by default the GPU where there is one.
        fused_se: whether to use the fused operators, by default as the run did.

    Raises:
        UserError: there is no such checkpoint or device, or it is none.
    """
    place = pick_device(None if device is None else str(device))
    checkpoint, config = read_trained(os.fspath(path))
    config = dataclasses.replace(config, fused_se=config.fused_se if fused_se is None else fused_se)
    # a library is silent where the commands print what they have fused
    model, heads = restore(checkpoint, dataclasses.replace(config, fused_se=False), place)
    if config.fused_se:
        fuse(model, config)
    return Classifier(model, tuple(checkpoint["class_names"]), config, place, heads)


@dataclass(frozen=True, eq=False)
class Classifier:
    """What `load` returns.

    Attributes:
        model: the network in evaluation mode: (N, 3, H, W) normalised images to (N, classes) logits, or of heads to a
            dict of theirs.
        class_names: the names of labels 0, 1, ...
        config: how it was trained, which also says how it is shown images.
        device: where it stands.
        heads: those of the model, where it has several.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    config: Config
    device: torch.device
    heads: Heads | None = None

    def predict(self, images: ImageLike | Iterable[ImageLike]) -> Predicted:
        """What ``engine.predict`` says of images, by the same input pipeline, size, crop and precision.

        Args:
            images: one of these, or several: the path of an image; that of a folder, for all images below
                it, sorted; a Pillow image; an array (H, W, 3) uint8 RGB.

        Returns:
            A row for each image, in order. One that cannot be read has a row of NaN, the label -1 and a reason.

        Raises:
            UserError: a path that does not exist, a folder without images, an array or object that is none of the
                above, or a probability that is not a number.
        """
        names, sources, bad = _find(images)
        files = {source: name for name, source in zip(names, sources, strict=True) if isinstance(source, str)}
        how = (self.model, self.class_names, self.config, self.device, self.heads)
        of_files, bad_files = look_at_files(Unlabelled(files, tuple(bad)), *how)
        row_of = {file: row for row, file in enumerate(files)}

        probabilities = nothing_seen(len(sources), self.class_names, self.heads)
        reasons: dict[int, str] = {}
        alike: dict[tuple[int, ...], dict[int, np.ndarray]] = defaultdict(dict)
        for i, source in enumerate(sources):
            if isinstance(source, str):
                row = row_of[source]
                probabilities[i] = of_files[row]
                if row in bad_files:
                    reasons[i] = bad_files[row]
            elif isinstance(source, BadImage):
                reasons[i] = str(source)
            else:
                alike[source.shape][i] = source
        for found in alike.values():
            shown = tuple(names[i] for i in found)
            samples = Samples(shown, np.arange(len(shown)), shown, pixels=np.stack(list(found.values())))
            probabilities[list(found)], _ = look_at(samples, *how)
        return as_predicted(tuple(names), probabilities, reasons, self.class_names, self.heads)


def _find(
    images: ImageLike | Iterable[ImageLike],
) -> tuple[list[str], list[str | np.ndarray | BadImage], list[BadFile]]:
    """Of each image its name, and its absolute path, its pixels or why it has none; and the files that are bad."""
    names: list[str] = []
    sources: list[str | np.ndarray | BadImage] = []
    bad: list[BadFile] = []
    is_one = isinstance(images, _ONE) or (isinstance(images, np.ndarray) and images.ndim != 4)
    for i, image in enumerate([images] if is_one or not isinstance(images, Iterable) else images):
        if isinstance(image, (str, os.PathLike)):
            found = find_images([os.fspath(image)])
            names += found.names.values()
            sources += found.names
            bad += found.bad
        else:
            names.append(f"images[{i}]")
            sources.append(_pixels(image, names[-1]))
    return names, sources, bad


def _pixels(image: Any, name: str) -> np.ndarray | BadImage:
    if isinstance(image, Image.Image):
        try:
            return decode_opened(image)
        except BadImage as error:
            return error
    is_array = isinstance(image, np.ndarray)
    if is_array and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
        return image
    given = f"an array {image.shape} {image.dtype}" if is_array else f"of type {type(image).__name__}"
    raise UserError(f"{name} is {given}: give a path, a Pillow image or an array (H, W, 3) uint8 RGB")
