"""What the reference decoder has to say about one image file."""

from __future__ import annotations

from dataclasses import dataclass

from engine.data.decode import BadImage, decode


@dataclass(frozen=True)
class Probe:
    """One file: ``reason`` says in a few words why it is bad (None: it is good), the rest is what it holds.

    ``format`` and ``mode`` are those of ``engine.data.decode.Decoded``; the size is that of the upright image.
    """

    reason: str | None
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0


def probe(file: str) -> Probe:
    """Decodes a file. Raises UserError where a package is missing that would decode it, and nothing for a bad one."""
    try:
        decoded = decode(file)
    except BadImage as error:
        return Probe(str(error))
    height, width = decoded.pixels.shape[:2]
    return Probe(None, decoded.format, decoded.mode, width, height)


def pillow_failure(file: str) -> str | None:
    """Why the reference decoder does not decode a file, in one line; None: it does."""
    return probe(file).reason
