"""Where a command may write."""

from __future__ import annotations

import os
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


def made_folder(name: str, *, flag: str = "--output") -> Path:
    """The folder that ``flag`` names, made if there is none; asked for before anything is computed.

    Raises UserError where it is a file, or cannot be made or written to.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{flag} {path}: is a file; name a folder") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be made ({error.strerror}); name another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: cannot be written to; name another folder")
    return path
