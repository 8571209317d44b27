"""How a run was configured: what differs from the defaults, and between runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from engine.config import Config, spelled
from engine.report.runs import ReportedRun
from engine.report.tables import Cell, Table, name, words

_PATHS = ("data_dir", "csv", "val_csv", "test_csv", "pretrained_path", "output")
_WHERE_ONLY = ("output", "workers", "device")
"""Where a run goes on, not what it computes."""


def settings_table(run: ReportedRun) -> Table:
    """The options that are not at their defaults, with what each is for."""
    defaults = Config().as_mapping()
    helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(Config)}
    changed = [
        key
        for key, value in run.args.items()
        if key not in _WHERE_ONLY and (key not in defaults or _plain(value) != _plain(defaults[key]))
    ]
    rows = [
        [words(spelled(key), _first_part(helps.get(key, ""))), _cell(key, run.args[key]), _cell(key, defaults.get(key))]
        for key in changed
    ]
    return Table("Options that differ from the defaults", ("Option", "Here", "Default"), rows)


def differences_table(runs: Sequence[ReportedRun]) -> Table | None:
    """The options that are not the same in all runs; None where all are."""
    keys = list(dict.fromkeys(key for run in runs for key in run.args if key not in _WHERE_ONLY))
    rows = [
        [words(spelled(key)), *(_cell(key, run.args.get(key)) for run in runs)]
        for key in keys
        if any(_plain(run.args.get(key)) != _plain(runs[0].args.get(key)) for run in runs[1:])
    ]
    if not rows:
        return None
    return Table("Options that differ between the runs", ("Option", *(run.name for run in runs)), rows)


def data_name(args: Mapping[str, Any]) -> str:
    """The data of a run by the last part of its name."""
    if not args:
        return "unknown"
    source = args.get("csv") or args.get("data_dir")
    return PurePath(str(source)).name if source else "embedded digits"


def without_folders(text: str, args: Mapping[str, Any]) -> str:
    """``text`` with the last part alone of each path that the options name."""
    paths = {Path(str(args[key])) for key in _PATHS if args.get(key)}
    # one of a single part has no folder to leave out, and "." stands in any sentence
    for path in sorted((path for path in paths if len(path.parts) > 1), key=lambda path: len(str(path)), reverse=True):
        text = text.replace(str(path), path.name)
    return text


def _first_part(help: str) -> str:
    """Without the choices, which a flag's help lists behind a colon."""
    return "" if help.startswith("one of ") else help.partition(": ")[0].partition("; by default")[0]


def _cell(key: str, value: Any) -> Cell:
    if value is None or value in ([], (), {}):
        return words("none")
    if key in _PATHS:
        return name(PurePath(str(value)).name)
    if isinstance(value, list | tuple):
        return words(" ".join(map(_text, value)))
    return words(_text(value))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """YAML gives lists where a configuration has tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
