"""How every command ends: 0, 1 where it looked for faults and found some, 2 with one line on what to mend, 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from engine.errors import UserError


def run(command: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Runs ``command(argv)`` and returns the exit status: its own, 0 where it returns none."""
    try:
        return command(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def warn(warnings: Iterable[str]) -> None:
    """A line on stderr for each thing that may not have been meant."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises `UserError`, so that every mistake is reported the same way."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
