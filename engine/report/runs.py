"""A run directory as ``engine.report`` reads it: whatever is there, and a line for what is not."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.errors import UserError
from engine.predictions import Predictions, read_predictions

_NEEDED = ("split", "per_class", "confusion_matrix", "accuracy", "macro_f1")
_OF_MACHINE = ("versions", "device", "precision", "started")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


_Columns = Mapping[str, Callable[[str], Any]]
_EPOCH: _Columns = {"epoch": int}
_DRAW: _Columns = {
    "epoch": int,
    "class": str,
    "images": int,
    "expected": _finite,
    "drawn": int,
}
"""Columns that ``summary.csv`` and ``sampling.csv`` must have, and what each holds."""


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """What a run has left behind, or a cross-validation: its figures, with the options and the machine of a fold.

    Attributes:
        path: its directory.
        name: the directory's own name, told apart from those of the other runs.
        args: what ``args.yaml`` holds, and ``args_text`` as it is written there.
        history: the rows of ``summary.csv``, as text.
        draws: the rows of ``sampling.csv``, as text.
        metrics: ``metrics.json``; None of a run that has not finished.
        predictions: ``predictions.csv`` under None, and those of heads under their names.
        about: ``about.json``, empty of a run that has none.
    """

    path: Path
    name: str
    args: Mapping[str, Any]
    args_text: str
    history: Sequence[Mapping[str, str]] = ()
    draws: Sequence[Mapping[str, str]] = ()
    metrics: Mapping[str, Any] | None = None
    predictions: Mapping[str | None, Predictions] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of what is scored; empty of a run that has not finished."""
        return tuple(self.metrics["per_class"]) if self.metrics else ()

    @property
    def is_cross_validation(self) -> bool:
        return "over_folds" in (self.metrics or {})

    def fold_path(self, fold: int) -> Path:
        """The run of one fold of a cross-validation."""
        return self.path / f"fold{fold}"


def read_runs(names: Sequence[str]) -> list[ReportedRun]:
    """Those runs, by the last parts of their names. Raises UserError as `read_run`.

    Of equal names each has the folder above it before it, as in ``plain/seed0``; of names equal still the later ones
    are numbered.
    """
    paths = [Path(name) for name in names]
    last = [path.resolve().name for path in paths]
    told = [
        f"{path.resolve().parent.name}/{own}" if last.count(own) > 1 else own
        for path, own in zip(paths, last, strict=True)
    ]
    before = [told[:i].count(own) for i, own in enumerate(told)]
    return [
        read_run(path, f"{own} ({times + 1})" if times else own)
        for path, own, times in zip(paths, told, before, strict=True)
    ]


def read_run(path: Path, name: str) -> ReportedRun:
    """The run in the directory ``path``, or the cross-validation.

    Raises UserError where it is neither, where not even an epoch of it has finished, or where a file is damaged.
    """
    if path.is_file():
        raise UserError(f"{path}: is a file; name the run directory that it is in, {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; name a run directory of engine.train")
    metrics = _read_json(path / "metrics.json")
    if metrics is not None and "over_folds" in metrics:
        return _read_cross_validation(path, name, metrics)
    if not (path / "args.yaml").is_file():
        if (path / "fold0").is_dir():
            raise UserError(
                f"{path}: not all of its folds have finished; go on with engine.cross_validate, or name one"
            )
        raise UserError(f"{path}: holds no args.yaml; name a run directory of engine.train")
    args, args_text = _read_args(path)
    history = _read_table(path / "summary.csv", _EPOCH, float)
    if metrics is None and not history:
        raise UserError(
            f"{path}: neither metrics.json nor summary.csv is there, no epoch of the run has finished; "
            f"start it again with python -m engine.train --recipe {path / 'args.yaml'} --output NEW_DIR"
        )
    if metrics is not None:
        _require(path, metrics, ("epoch", *_NEEDED), "score the run again with engine.evaluate")
    return ReportedRun(
        path,
        name,
        args,
        args_text,
        history,
        _read_table(path / "sampling.csv", _DRAW, str),
        metrics,
        _read_predictions(path, metrics or {}),
        _read_json(path / "about.json") or {},
    )


def _read_cross_validation(path: Path, name: str, metrics: Mapping[str, Any]) -> ReportedRun:
    """With the options of the first fold whose run is there; none where the folds were taken elsewhere."""
    _require(path, metrics, (*_NEEDED, "folds"), "make it again with engine.cross_validate")
    folds = metrics["folds"]
    there = [own for own in (path / f"fold{fold['fold']}" for fold in folds) if (own / "args.yaml").is_file()]
    args, args_text = _read_args(there[0]) if there else ({}, "")
    of_fold = (_read_json(there[0] / "about.json") if there else None) or {}
    about = {key: of_fold[key] for key in _OF_MACHINE if key in of_fold}
    images = sum(fold["images"] for fold in folds)
    about["data"] = {
        "description": f"{images:,} images in {len(folds)} folds. What a fold was trained on, and its curves, are in "
        f"its own report: python -m engine.report {path.resolve().name}/fold0"
    }
    return ReportedRun(
        path,
        name,
        {key: value for key, value in args.items() if key != "fold"},
        args_text,
        metrics=metrics,
        predictions=_read_predictions(path, metrics),
        about=about,
    )


def _read_args(path: Path) -> tuple[dict[str, Any], str]:
    text = _read_text(path / "args.yaml")
    return _parsed(path / "args.yaml", text, yaml.safe_load, "an args.yaml"), text


def _require(path: Path, metrics: Mapping[str, Any], keys: Sequence[str], mend: str) -> None:
    missing = [key for key in keys if key not in metrics]
    if missing:
        raise UserError(f"{path / 'metrics.json'}: holds no {missing[0]}; {mend}")


def _read_predictions(path: Path, metrics: Mapping[str, Any]) -> dict[str | None, Predictions]:
    files = {None: "predictions.csv", **{head: f"predictions_{head}.csv" for head in metrics.get("heads", {})}}
    return {head: read_predictions(path / file) for head, file in files.items() if (path / file).is_file()}


def _read_json(path: Path) -> dict[str, Any] | None:
    return _parsed(path, _read_text(path), json.loads, f"a {path.name}") if path.is_file() else None


def _read_table(path: Path, needed: _Columns, other: Callable[[str], Any]) -> list[dict[str, str]]:
    """Rows as text that can be read as ``needed`` says by column, or as ``other``; empty where there is no file."""
    if not path.is_file():
        return []
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    mend = "mend it, or remove it, and the page goes without"
    rows = []
    try:
        for column in needed:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{path}: has no column {column}; {mend}")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: has other columns than the first line; {mend}")
            for column, text in row.items():
                if text or column in needed:
                    _read_value(text, needed.get(column, other), f"{place}: {column}", mend)
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}: not readable as a table ({error}); {mend}") from error
    return rows


def _read_value(text: str, read: Callable[[str], Any], what: str, mend: str) -> None:
    try:
        read(text)
    except ValueError:
        raise UserError(f"{what} is {text!r}, not the number that belongs there; {mend}") from None


def _parsed(path: Path, text: str, parse: Callable[[str], Any], what: str) -> dict[str, Any]:
    try:
        values = parse(text)
        if not isinstance(values, dict):
            raise ValueError("no mapping")
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not readable as {what} ({' '.join(str(error).split())}); mend it, or name another run"
        ) from error
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
