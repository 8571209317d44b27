"""``python -m engine.split`` as a test runs it, and what it writes."""

from __future__ import annotations

import csv
from pathlib import Path

from engine import split
from engine.cli import run


def divided(capsys, *argv: str | Path) -> str:
    """What the command prints; it must succeed."""
    capsys.readouterr()
    status = run(split.main, [*map(str, argv)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def refused(capsys, output: Path, *argv: str | Path) -> str:
    """The one line that the command ends with; nothing may have been written."""
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    assert run(split.main, [*map(str, argv), "--output", str(output)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sorted(output.rglob("*")) == before
    return lines[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def names_in(path: Path) -> set[str]:
    return {Path(row["filename"]).name for row in rows(path)}
