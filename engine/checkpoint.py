"""Checkpoints: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError

FORMAT = 1
_OF_NO_PICKLE = (struct.error, LookupError, TypeError, AttributeError)  # by bytes that are taken for opcodes


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a file beside ``path`` and then puts it in ``path``'s place.

    A process killed at any moment leaves the old file or the new one, never a part.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain values) to ``path``, atomically."""
    write_atomically(path, lambda unfinished: torch.save({"format": FORMAT, **state}, unfinished))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, on the CPU. Raises UserError that names the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, *_OF_NO_PICKLE) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not readable as a checkpoint ({reason}); name another one") from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise UserError(f"{path}: not a checkpoint of engine.train; for a weight file use --pretrained-path")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; use the version it is from"
        )
    return state
