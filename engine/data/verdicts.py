"""Which files have been seen to decode, remembered from one start to the next.

Good files alone are kept: what makes one bad (its permissions, a disk that is away) may pass without a trace in its
size or its time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from engine.data.cache import cache_folder
from engine.data.probe import Probe

Stamp = tuple[int, int]


def stamp(file: str) -> Stamp | None:
    """Size in bytes and time of the last change in nanoseconds; None where there is no such file."""
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Verdicts:
    """The files below one folder that decoded, by path, size and time of change.

    They are kept in the user's cache, in one file for each folder, and count for the same ``judges`` only (the versions
    and limits that decided). A cache that cannot be read counts as empty; one that cannot be written costs time.

    Args:
        files: absolute paths, at least one; the deepest folder above all of them names the cache's file.
        judges: any text.
    """

    def __init__(self, files: Sequence[str], judges: str) -> None:
        self._judges = judges
        root = os.path.commonpath([Path(file).parent for file in files])
        name = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
        self._path = cache_folder() / "checked" / f"{name}.json"
        self._known = self._read()
        self._has_news = False

    def find(self, file: str, now: Stamp | None) -> Probe | None:
        """What was found out about a file, if it has not changed since."""
        entry = self._known.get(file)
        return Probe(None, *entry[2:]) if entry is not None and now == tuple(entry[:2]) else None

    def add(self, file: str, before: Stamp | None, found: Probe) -> None:
        """Remembers a good file; ``before``: its stamp before it was read."""
        if found.reason is None and before is not None:
            self._known[file] = [*before, *dataclasses.astuple(found)[1:]]
            self._has_news = True

    def save(self) -> None:
        if not self._has_news:
            return
        unfinished = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                unfinished.write_text(json.dumps({"judges": self._judges, "files": self._known}), encoding="ascii")
                unfinished.replace(self._path)
            finally:
                unfinished.unlink(missing_ok=True)

    def _read(self) -> dict[str, list]:
        try:
            kept = json.loads(self._path.read_text(encoding="ascii"))
            files = kept["files"] if kept["judges"] == self._judges else {}
            return files if all(len(entry) == 6 for entry in files.values()) else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
