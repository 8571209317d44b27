"""An image that cannot be decoded, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError


@dataclass(frozen=True)
class Failure:
    """``index`` into the samples, and why, in one line without the file's name."""

    index: int
    reason: str


def cannot_decode(file: str, reason: str, way_out: str = "remove or replace it") -> UserError:
    return UserError(f"cannot decode {file} ({reason}): {way_out}, then start again")
