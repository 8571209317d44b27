"""Where a command may write."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


def free_file(name: str, *, force: bool) -> Path:
    """The file of ``--output``; raises UserError rather than overwrite one without ``--force``."""
    path = Path(name)
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file")
    if path.exists() and not force:
        raise UserError(f"--output {path}: exists; name another file, or add --force")
    return path
