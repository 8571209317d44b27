"""How every command ends: 0, or 2 with one line on what to mend, or 130 when interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.errors import UserError


def run(command: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Runs ``command(argv)`` and returns the exit status."""
    try:
        command(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
