"""Where a command may write."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


def free_file(name: str, *, force: bool | None = None, flag: str = "--output") -> Path:
    """The file that ``flag`` names, whose folder is made if there is none; ``force`` is ``--force``, None without one.

    Asked for before anything is computed, and after whatever else may be refused, so that no folder is made in vain.
    Raises UserError rather than overwrite a file without ``--force``.
    """
    path = Path(name)
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path}: is a folder; name a file")
        if path.exists() and not force:
            hint = "" if force is None else ", or add --force"
            raise UserError(f"{flag} {path}: exists; name another file{hint}")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot make its folder ({error.strerror}); name another") from error
    return path
