"""Labelled files from a CSV manifest: a header with the columns ``filename,label``, then a line for each image."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.samples import Samples, shorten, sort_class_names
from engine.errors import UserError

COLUMNS = ("filename", "label")


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    label: str


def read_manifest(path: Path, base: Path | None, class_names: tuple[str, ...] | None = None) -> Samples:
    """The files that a manifest lists, in its order; a file that it lists again under the same label counts once.

    Args:
        path: UTF-8, comma separated; further columns are passed over.
        base: the folder that relative file names start from; None: the manifest's own.
        class_names: the known classes; None: those that the manifest names, sorted.

    Raises:
        UserError: the manifest cannot be read, lacks a column, lists nothing or fewer than two classes, has an empty
            field, a file that does not exist, one file under two labels, or a label that is not in ``class_names``.
    """
    rows = _distinct(path, _parse(path, base if base is not None else path.parent))
    absent = [row for row in rows if not Path(row.file).is_file()]
    if absent:
        first = shorten([f"{row.file} (line {row.line})" for row in absent], limit=3)
        raise UserError(f"{path} lists {len(absent)} of {len(rows)} files that do not exist: {first}")

    names = sort_class_names(row.label for row in rows) if class_names is None else class_names
    if len(names) < 2:
        raise UserError(f"{path} has one label only ({names[0]}): classification needs at least two")
    index = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in index:
            raise UserError(f"{path}, line {row.line}: unknown label {row.label!r} (known: {shorten(names)})")
    labels = np.array([index[row.label] for row in rows], dtype=np.int64)
    return Samples(tuple(row.file for row in rows), labels, names)


def _parse(path: Path, base: Path) -> Iterator[_Row]:
    folder = base.absolute()
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            found = reader.fieldnames or []
            for column in COLUMNS:
                if column not in found:
                    raise UserError(
                        f"{path} has no column {column!r} (its first line: {shorten(found) or 'empty'}): "
                        f"begin it with the header {','.join(COLUMNS)}"
                    )
            for record in reader:
                filename, label = ((record[column] or "").strip() for column in COLUMNS)
                if not filename or not label:
                    raise UserError(f"{path}, line {reader.line_num}: empty {'label' if filename else 'filename'}")
                yield _Row(reader.line_num, str(folder / filename), label)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _distinct(path: Path, rows: Iterator[_Row]) -> list[_Row]:
    first: dict[str, _Row] = {}
    for row in rows:
        known = first.setdefault(row.file, row)
        if known.label != row.label:
            raise UserError(
                f"{path} labels {row.file} twice: {known.label!r} (line {known.line}), {row.label!r} (line {row.line})"
            )
    if not first:
        raise UserError(f"{path} lists no file")
    return list(first.values())
