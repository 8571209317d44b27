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
_FURTHER_COLUMNS = ("group", "fold")
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
        groups: n names of what belongs together, such as patients; None where the images have none.
        folds: n numbers of the fold that each was in; None where there are none.
    """

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: Tensor
    predictions: Tensor
    probabilities: Tensor
    groups: tuple[str, ...] | None = None
    folds: tuple[int, ...] | None = None


def predictions_path(path: Path, head: str | None = None) -> Path:
    """Where what one head says stands, beside the ``path`` of what all say together."""
    return path if head is None else path.with_stem(f"{path.stem}_{head}")


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes a row an image: ``filename,truth,prediction``, ``group`` and ``fold`` where there are any, and a column
    ``prob_CLASS`` for each class.

    Numbers are written with as many digits as make them exactly what they were, so that any figure can be computed from
    the file again. Raises UserError where it cannot be written.
    """
    names = predictions.class_names
    further = {"group": predictions.groups, "fold": predictions.folds}
    told = {column: list(map(str, values)) for column, values in further.items() if values is not None}

    def write(unfinished: Path) -> None:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_FIRST_COLUMNS, *told, *(_PROBABILITY + name for name in names)])
            columns = (predictions.files, predictions.labels, predictions.predictions, predictions.probabilities)
            for name, truth, predicted, probabilities, *more in zip(*columns, *told.values(), strict=True):
                row = [printable(name), names[truth], names[predicted], *map(printable, more)]
                writer.writerow([*row, *probabilities.tolist()])

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
    further = [column for column in _FURTHER_COLUMNS if column in header]
    first = len(_FIRST_COLUMNS) + len(further)
    class_names = tuple(column.removeprefix(_PROBABILITY) for column in header[first:])
    if header != [*_FIRST_COLUMNS, *further, *(_PROBABILITY + name for name in class_names)] or not class_names:
        raise UserError(f"{path}: its columns are not filename,truth,prediction,prob_CLASS,...; name a predictions.csv")
    label_of = {name: label for label, name in enumerate(class_names)}
    labels, predictions, probabilities, folds = [], [], [], []
    for i, row in enumerate(rows):
        try:
            told = dict(zip(header, row, strict=True))
            labels.append(label_of[told["truth"]])
            predictions.append(label_of[told["prediction"]])
            probabilities.append([float(told[_PROBABILITY + name]) for name in class_names])
            if "fold" in told:
                folds.append(int(told["fold"]))
        except (ValueError, KeyError):
            raise UserError(f"{path}, image {i + 1}: not a row of predictions of {', '.join(class_names)}") from None
    return Predictions(
        tuple(row[0] for row in rows),
        class_names,
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(predictions, dtype=torch.int64),
        torch.tensor(probabilities, dtype=torch.float64).reshape(len(rows), len(class_names)),
        tuple(row[header.index("group")] for row in rows) if "group" in further else None,
        tuple(folds) if "fold" in further else None,
    )


def names_below(files: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Each file's name relative to the folder, with "/"; one that lies elsewhere, or is no path, as it is."""
    top = f"{folder.absolute()}{os.sep}"
    return tuple(file.removeprefix(top).replace(os.sep, "/") if file.startswith(top) else file for file in files)
