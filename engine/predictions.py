"""What a classifier says of each image: ``predictions.csv``, written and read."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import write_atomically
from engine.data.listing import printable
from engine.errors import UserError

_FIRST_COLUMNS = ("filename", "truth", "prediction")
_PROBABILITY = "prob_"


@dataclass(frozen=True, eq=False)
class Predictions:
    """n images, in the order in which they were scored.

    Attributes:
        files: n names.
        class_names: the names of labels 0, 1, ...
        labels: (n,) int64, the truth.
        predictions: (n,) int64.
        probabilities: (n, classes) float64.
    """

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor


def predictions_path(path: Path, head: str | None = None) -> Path:
    """Where what one head says stands, beside the ``path`` of what all say together."""
    return path if head is None else path.with_stem(f"{path.stem}_{head}")


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes a row an image: ``filename,truth,prediction``, and a column ``prob_CLASS`` for each class.

    Numbers are written with as many digits as make them exactly what they were, so that any figure can be computed from
    the file again. Raises UserError where it cannot be written.
    """
    names = predictions.class_names

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_FIRST_COLUMNS, *(_PROBABILITY + name for name in names)])
            columns = (predictions.files, predictions.labels, predictions.predictions, predictions.probabilities)
            for name, truth, predicted, probabilities in zip(*columns, strict=True):
                writer.writerow([printable(name), names[truth], names[predicted], *probabilities.tolist()])

    try:
        write_atomically(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another file") from error


def read_predictions(path: Path) -> Predictions:
    """Reads what `write_predictions` wrote. Raises UserError that names the file, and the line where there is one."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: not readable as predictions ({error}); name a predictions.csv") from error
    class_names = tuple(column.removeprefix(_PROBABILITY) for column in header[len(_FIRST_COLUMNS) :])
    if header != [*_FIRST_COLUMNS, *(_PROBABILITY + name for name in class_names)] or not class_names:
        raise UserError(f"{path}: its columns are not filename,truth,prediction,prob_CLASS,...; name a predictions.csv")
    label_of = {name: label for label, name in enumerate(class_names)}
    labels, predictions, probabilities = [], [], []
    for i, row in enumerate(rows):
        try:
            _, truth, predicted, *numbers = row
            labels.append(label_of[truth])
            predictions.append(label_of[predicted])
            probabilities.append([float(number) for number in numbers])
            if len(numbers) != len(class_names):
                raise ValueError
        except (ValueError, KeyError):
            raise UserError(f"{path}, image {i + 1}: not a row of predictions of {', '.join(class_names)}") from None
    return Predictions(
        tuple(row[0] for row in rows),
        class_names,
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(predictions, dtype=torch.int64),
        torch.tensor(probabilities, dtype=torch.float64).reshape(len(rows), len(class_names)),
    )


def names_below(files: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Each file's name relative to the folder, with "/"; one that lies elsewhere, or is no path, as it is."""
    top = f"{folder.absolute()}{os.sep}"
    return tuple(file.removeprefix(top).replace(os.sep, "/") if file.startswith(top) else file for file in files)
