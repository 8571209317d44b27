"""Where the engine keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``fused-se-engine`` in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``); it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused-se-engine"
