"""Figures as files and as parts of a page."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

_FONT = "DejaVu Sans"
# Those that many machines have, for scripts that matplotlib's own font lacks.
_OTHER_SCRIPTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)


def alt_text(figure: Figure) -> str:
    """What a figure of this package shows, in words."""
    return str(figure.get_label())


def to_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element for a page of HTML, labelled with its `alt_text`.

    Text stays text, in DejaVu Sans or the browser's own sans-serif. The same figure gives the same text whenever it
    is drawn; its ids are its own, so that several stand in one page, and its style rules reach nothing beside it.
    """
    written = io.StringIO()
    with _settings({"svg.fonttype": "none", "svg.hashsalt": "pictures", "font.sans-serif": [_FONT]}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    svg = _own_ids(svg)
    _, _, width, height = re.search(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', svg).groups()  # type: ignore[union-attr]
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-label="{html.escape(alt_text(figure))}" width="{float(width):.0f}" height="{float(height):.0f}" '
        f'viewBox="0 0 {width} {height}" stroke-linejoin="round" stroke-linecap="butt">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    written = io.BytesIO()
    save(figure, written, format="png", dpi=dpi, metadata={"Software": None})
    return written.getvalue()


def to_jpeg(figure: Figure, dpi: int = 120, quality: int = 85) -> bytes:
    """The figure as a JPEG file, which suits photographs: a tenth of the size of its PNG file."""
    written = io.BytesIO()
    save(figure, written, format="jpeg", dpi=dpi, pil_kwargs={"quality": quality, "optimize": True})
    return written.getvalue()


def image_to_jpeg(pixels: np.ndarray, quality: int = 85) -> bytes:
    """One photograph (H, W, 3) uint8 RGB as a JPEG file."""
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, format="JPEG", quality=quality, optimize=True)
    return written.getvalue()


def save(figure: Figure, file: str | os.PathLike[str] | io.BytesIO, **options: Any) -> None:
    """``figure.savefig`` with a font for as many scripts as the machine has fonts for."""
    with _settings({"font.sans-serif": _fonts()}):
        figure.savefig(Path(file) if isinstance(file, str) else file, **options)


@contextmanager
def _settings(settings: Any) -> Iterator[None]:
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A name in a script that no font here knows is drawn as boxes; the SVG still has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@cache
def _fonts() -> list[str]:
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [_FONT, *(name for name in _OTHER_SCRIPTS if name in known)]


def _own_ids(svg: str) -> str:
    """Without the ids that nothing refers to; the others begin with what no other picture's do. Text is left alone."""
    reference = re.compile(r'(xlink:href="#|url\(#)([^")]+)')
    referred = {found[2] for tag in re.findall(r"<[^>]*>", svg) for found in reference.finditer(tag)}
    own = f"p{hashlib.sha256(svg.encode()).hexdigest()[:10]}-"

    def renamed(tag: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda found: f' id="{own}{found[1]}"' if found[1] in referred else "", tag[0])
        return reference.sub(rf"\g<1>{own}\g<2>", text)

    return re.sub(r"<[^>]*>", renamed, svg)
