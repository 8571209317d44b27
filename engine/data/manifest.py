"""Labelled files from a manifest: CSV, or Parquet by pyarrow (the extra ``parquet``).

Columns: ``filename`` and ``label``, and where there are any ``split`` (train, val or test: one file for all three),
``group`` (what a split must not tear apart, such as a patient), ``weight`` (how often an image is drawn) and
``label_*`` (further labels; an empty field is none). Other columns are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.data.folder import VAL_NAMES
from engine.data.samples import Head, Samples, label_indices, shorten, sort_class_names
from engine.data.table import HEAD_PREFIX, Row, read_rows
from engine.errors import UserError

SPLITS = {"train": "train", **dict.fromkeys(VAL_NAMES, "val"), "test": "test"}
"""What the column ``split`` may hold, and which set each means."""


def read_manifest(
    path: Path,
    base: Path | None,
    class_names: tuple[str, ...] | None = None,
    heads: Mapping[str, Head] | None = None,
    split: str = "test",
    classes: Sequence[str] = (),
) -> Samples:
    """The files that a manifest lists, in its order.

    Args:
        path: CSV in UTF-8, or Parquet.
        base: the folder that relative file names start from; None: the manifest's own.
        class_names: the known classes; None: those that the manifest names, sorted.
        heads: the known further labels, for the names of their classes; None: those that the manifest has.
        split: the rows to take where there is a column ``split``: ``"train"``, ``"val"`` or ``"test"``.
        classes: rows of others are passed over; none named: of none.

    Raises:
        UserError: the manifest cannot be read, lacks a column, lists nothing, a file twice or fewer than two classes,
            has an empty field, a weight that is none, a file that does not exist, or a label that is not known.
    """
    rows = _existing_rows(path, base)
    parts = _by_split(path, rows)
    chosen = rows if parts is None else _some(path, parts, split)
    return _samples(path, _of_classes(path, chosen, classes), class_names, heads)


def read_manifest_splits(
    path: Path, base: Path | None, classes: Sequence[str] = ()
) -> tuple[Samples, Samples | None, Samples | None]:
    """Train, validation and test of a manifest, the last two where its column ``split`` has them.

    Of the last two rows of other than ``classes``, where any are named, are passed over.

    Raises UserError as ``read_manifest`` does, and where a split is none or validation or test name a new class.
    """
    rows = _existing_rows(path, base)
    parts = _by_split(path, rows) or {"train": rows, "val": [], "test": []}
    train = _samples(path, _some(path, parts, "train"), None, None)
    val, test = (
        _samples(path, _of_classes(path, parts[name], classes), train.class_names, train.heads) if parts[name] else None
        for name in ("val", "test")
    )
    return train, val, test


def _of_classes(path: Path, rows: Sequence[Row], classes: Sequence[str]) -> Sequence[Row]:
    chosen = [row for row in rows if row.label in classes] if classes else rows
    if not chosen:
        raise UserError(f"{path}: --classes leaves no image of one of its sets (of {shorten(classes)})")
    return chosen


def _existing_rows(path: Path, base: Path | None) -> list[Row]:
    rows = read_rows(path, base if base is not None else path.parent)
    first: dict[str, Row] = {}
    for row in rows:
        known = first.setdefault(row.file, row)
        if known is not row:
            raise UserError(
                f"{path} lists {row.file} twice: {known.label!r} ({known.place}), {row.label!r} ({row.place}): "
                "remove one of them (to have an image drawn more often, give it a larger weight)"
            )
    absent = [row for row in rows if not Path(row.file).is_file()]
    if absent:
        named = [f"{row.file} ({row.place}{', a folder' if Path(row.file).is_dir() else ''})" for row in absent[:3]]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(f"{path} lists {len(absent)} of {len(rows)} files that do not exist: {', '.join(named)}{more}")
    return rows


def _by_split(path: Path, rows: Sequence[Row]) -> dict[str, list[Row]] | None:
    if rows[0].split is None:
        return None
    parts: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        if row.split not in SPLITS:
            raise UserError(f"{path}, {row.place}: split {row.split!r} is none of {', '.join(SPLITS)}")
        parts[SPLITS[row.split]].append(row)
    return parts


def _some(path: Path, parts: Mapping[str, list[Row]], split: str) -> list[Row]:
    if not parts[split]:
        raise UserError(f"{path} has a column split and no row of {split}: leave the column out to take every row")
    return parts[split]


def _samples(
    path: Path, rows: Sequence[Row], class_names: tuple[str, ...] | None, heads: Mapping[str, Head] | None
) -> Samples:
    names = sort_class_names(row.label for row in rows) if class_names is None else class_names
    if len(names) < 2:
        raise UserError(f"{path} has one label only ({names[0]}): classification needs at least two")
    places = [f"{path}, {row.place}" for row in rows]
    labels = label_indices([row.label for row in rows], names, places)
    return Samples(
        tuple(row.file for row in rows),
        labels,
        names,
        groups=tuple(str(row.group) for row in rows) if rows[0].group is not None else None,
        weights=_weights(path, rows) if rows[0].weight is not None else None,
        heads={
            name: _head(
                path,
                rows,
                name,
                None if heads is None or name not in heads else heads[name].class_names,
                learnt=class_names is None,
            )
            for name in rows[0].heads
        },
    )


def _head(path: Path, rows: Sequence[Row], name: str, class_names: tuple[str, ...] | None, *, learnt: bool) -> Head:
    """``learnt``: by a model from these rows, which takes two labels, where a model can be scored on rows of one."""
    named = [i for i, row in enumerate(rows) if row.heads[name]]
    column = HEAD_PREFIX + name
    if class_names is None:
        class_names = sort_class_names(rows[i].heads[name] for i in named)
        if learnt and len(class_names) < 2:
            raise UserError(f"{path}: column {column} needs at least two labels, and has {shorten(class_names) or '0'}")
    labels = np.full(len(rows), -1, dtype=np.int64)
    places = [f"{path}, {rows[i].place}, column {column}" for i in named]
    labels[named] = label_indices([rows[i].heads[name] for i in named], class_names, places)
    return Head(class_names, labels)


def _weights(path: Path, rows: Sequence[Row]) -> np.ndarray:
    weights = np.empty(len(rows))
    for i, row in enumerate(rows):
        try:
            weights[i] = float(row.weight or "")
        except ValueError:
            weights[i] = math.nan
        if not 0 <= weights[i] < math.inf:
            raise UserError(f"{path}, {row.place}: weight {row.weight!r} must be a number of at least 0")
    if not weights.any():
        raise UserError(f"{path}: every weight is 0, so no image could be drawn")
    return weights
