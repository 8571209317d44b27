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

_NEEDED = ("split", "epoch", "per_class", "confusion_matrix", "accuracy", "macro_f1")


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
    """What a run has left behind.

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


def read_runs(names: Sequence[str]) -> list[ReportedRun]:
    """Those runs; of equal names the later ones are numbered. Raises UserError as `read_run`."""
    runs: list[ReportedRun] = []
    for name in names:
        path = Path(name)
        own = path.resolve().name
        times = sum(run.path.resolve().name == own for run in runs)
        runs.append(read_run(path, own if not times else f"{own} ({times + 1})"))
    return runs


def read_run(path: Path, name: str) -> ReportedRun:
    """The run in the directory ``path``.

    Raises UserError where it is no run, where not even an epoch of it has finished, or where a file is damaged.
    """
    if path.is_file():
        raise UserError(f"{path}: is a file; name the run directory that it is in, {path.parent}")
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; name a run directory of engine.train")
    if not (path / "args.yaml").is_file():
        raise UserError(f"{path}: holds no args.yaml; name a run directory of engine.train")
    args_text = _read_text(path / "args.yaml")
    args = _parsed(path / "args.yaml", args_text, yaml.safe_load, "an args.yaml")
    metrics = _read_json(path / "metrics.json")
    history = _read_table(path / "summary.csv", _EPOCH, float)
    if metrics is None and not history:
        raise UserError(
            f"{path}: neither metrics.json nor summary.csv is there, no epoch of the run has finished; "
            f"start it again with python -m engine.train --recipe {path / 'args.yaml'} --output NEW_DIR"
        )
    missing = [key for key in _NEEDED if metrics is not None and key not in metrics]
    if missing:
        raise UserError(f"{path / 'metrics.json'}: holds no {missing[0]}; score the run again with engine.evaluate")
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
