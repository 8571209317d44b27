"""What the reference decoder has to say about one image file."""

from __future__ import annotations

from engine.data.decode import BadImage, decode_image


def pillow_failure(file: str) -> str | None:
    """Why the reference decoder does not decode a file, in one line; None: it does.

    Raises UserError where a package is missing that would decode it.
    """
    try:
        decode_image(file)
    except BadImage as error:
        return str(error)
    return None
