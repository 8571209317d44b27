"""The images on which a model was most confidently wrong, and where it saw its evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engine.data.decode import BadImage
from engine.pictures.style import GREY, PALE, new_figure, set_title, shortened
from engine.predictions import Predictions

_COLUMNS, _TILE, _GAP, _CAPTION, _TOP = 4, 1.75, 0.18, 0.5, 0.65
_PIXELS = 320
"""The longer side of what is drawn of an image."""


@dataclass(frozen=True, eq=False)
class Example:
    """An image with what was said of it.

    Attributes:
        file: its name.
        truth, prediction: names of classes; ``probability`` is that of the prediction.
        image: (H, W, 3) float32 in [0, 1] or uint8; None where it cannot be read.
        evidence: (H, W) float32 in [0, 1], of `engine.grad_cam`.
        reason: why it cannot be read.
    """

    file: str
    truth: str
    prediction: str
    probability: float
    image: np.ndarray | None = None
    evidence: np.ndarray | None = None
    reason: str = ""

    @property
    def is_right(self) -> bool:
        return self.truth == self.prediction


def worst_mistakes(predictions: Predictions, count: int = 12, *, label: int | None = None) -> list[int]:
    """The images, of a class where its ``label`` is given, that are called wrongly with the highest probability.

    The worst stands first; equals stand in their order.
    """
    said, wrong = _confidence(predictions), predictions.predictions != predictions.labels
    if label is not None:
        wrong &= predictions.labels == label
    indices = np.flatnonzero(wrong.numpy())
    return indices[np.argsort(-said[indices], kind="stable")][:count].tolist()


def typical_hits(predictions: Predictions, label: int, count: int = 2) -> list[int]:
    """Images of a class that are recognised, those whose confidence is nearest to their median first."""
    said = _confidence(predictions)
    indices = np.flatnonzero(((predictions.labels == label) & (predictions.predictions == label)).numpy())
    if not len(indices):
        return []
    return indices[np.argsort(np.abs(said[indices] - np.median(said[indices])), kind="stable")][:count].tolist()


def example(
    predictions: Predictions,
    i: int,
    *,
    image: np.ndarray | None = None,
    evidence: np.ndarray | None = None,
    reason: str = "",
) -> Example:
    """Image ``i`` of the predictions."""
    names = predictions.class_names
    truth, said = int(predictions.labels[i]), int(predictions.predictions[i])
    probability = float(predictions.probabilities[i, said])
    return Example(predictions.files[i], names[truth], names[said], probability, image, evidence, reason)


def draw_mistakes(predictions: Predictions, pixels: Callable[[str], np.ndarray], *, count: int = 12) -> Figure:
    """Draws the worst mistakes, each with its truth, the prediction and the probability of that.

    Args:
        pixels: gives (H, W, 3) uint8 of a name, or raises BadImage, whose text then stands in the image's place: that
            of `engine.originals.Originals`.
        count: how many at most.
    """
    examples = []
    for i in worst_mistakes(predictions, count):
        try:
            examples.append(example(predictions, i, image=_reduced(pixels(predictions.files[i]))))
        except BadImage as error:
            examples.append(example(predictions, i, reason=str(error)))
    wrong = int((predictions.predictions != predictions.labels).sum())
    about = f"{wrong:,} of {len(predictions.labels):,} images are wrong"
    if wrong > len(examples):
        about += f"; these {len(examples)} with the highest probability"
    rows = max(1, -(-len(examples) // _COLUMNS))
    pitch = _TILE + _CAPTION + _GAP
    figure = new_figure(
        0.3 + _COLUMNS * (_TILE + _GAP), _TOP + rows * pitch, f"Worst mistakes: {about}. {_words(examples)}"
    )
    set_title(figure, "Worst mistakes", about)
    if not examples:
        figure.text(0.5, 0.4, "every image is right", ha="center", color=GREY)
    for k, shown in enumerate(examples):
        x, y = 0.15 + k % _COLUMNS * (_TILE + _GAP), _TOP + k // _COLUMNS * pitch
        _draw_tile(figure, x, y, shown.image, shown.reason)
        _draw_caption(figure, x, y, shown)
    return figure


def draw_evidence(rows: Mapping[str, Sequence[Example]]) -> Figure:
    """Draws {class: examples} class by class: each image, and beside it the image with its evidence laid over.

    Bright is what speaks most for the predicted class.
    """
    most = max([1, *map(len, rows.values())])
    name_height, pitch = 0.28, _TILE + _CAPTION + _GAP
    height = _TOP + len(rows) * (pitch + name_height)
    everything = [shown for examples in rows.values() for shown in examples]
    about = "each image, and on it what speaks for the class that was predicted, the brighter the more"
    figure = new_figure(0.3 + most * (2 * _TILE + 0.04 + _GAP), height, f"Grad-CAM. {_words(everything)}")
    set_title(figure, "Grad-CAM", about)
    width = figure.get_figwidth()
    for k, (name, examples) in enumerate(rows.items()):
        top = _TOP + k * (pitch + name_height)
        title = f"images of {shortened(name)}" + ("" if examples else ": none")
        figure.text(0.15 / width, 1 - (top + 0.05) / height, title, va="top", fontsize=9.5, parse_math=False)
        for i, shown in enumerate(examples):
            x, y = 0.15 + i * (2 * _TILE + 0.04 + _GAP), top + name_height
            _draw_tile(figure, x, y, shown.image, shown.reason)
            if shown.image is not None and shown.evidence is not None:
                _draw_tile(figure, x + _TILE + 0.04, y, overlay(shown.image, shown.evidence), "")
            _draw_caption(figure, x, y, shown)
    return figure


def overlay(image: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """The image in grey, (H, W, 3) float32 in [0, 1], and over it the evidence from dark violet to bright yellow."""
    pixels = image / np.float32(255) if image.dtype == np.uint8 else image
    grey = np.repeat((pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, axis=2)
    colours = colormaps["inferno"](evidence)[..., :3]
    strength = 0.65 * evidence[..., None]
    return ((1 - strength) * grey + strength * colours).astype(np.float32)


def _draw_tile(figure: Figure, x: float, y: float, image: np.ndarray | None, reason: str) -> None:
    width, height = figure.get_size_inches()
    axes: Axes = figure.add_axes((x / width, 1 - (y + _TILE) / height, _TILE / width, _TILE / height))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(PALE)
    if image is None:
        axes.set_facecolor("#f3f4f6")
        text = f"cannot be read\nany more:\n{shortened(reason, 26)}"
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, color="#4b5563", parse_math=False)
    else:
        axes.imshow(image, aspect="equal", interpolation="nearest")


def _draw_caption(figure: Figure, x: float, y: float, shown: Example) -> None:
    width, height = figure.get_size_inches()
    truth, said = shortened(shown.truth, 20), shortened(shown.prediction, 15)
    lines = [f"truth {truth}", f"predicted {said} ({shown.probability:.3f})", shortened(_ending(shown.file), 26)]
    for i, (line, color) in enumerate(zip(lines, ("black", "black", GREY), strict=True)):
        place = (x / width, 1 - (y + _TILE + 0.04 + 0.15 * i) / height)
        figure.text(*place, line, va="top", fontsize=8 if i < 2 else 7, color=color, parse_math=False)


def _reduced(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    shrink = max(height, width) / _PIXELS
    if shrink <= 1:
        return image
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _ending(file: str) -> str:
    """The end of a name, which tells more of it than its beginning does."""
    return file if len(file) <= 26 else f"…{file[-25:]}"


def _words(examples: Sequence[Example]) -> str:
    return "; ".join(
        f"{shortened(shown.truth)} called {shortened(shown.prediction)} with {shown.probability:.3f}"
        for shown in examples
    ) + ("." if examples else "")


def _confidence(predictions: Predictions) -> np.ndarray:
    return predictions.probabilities.gather(1, predictions.predictions[:, None])[:, 0].numpy()
